"""A user's model that fails or returns wrong outputs is an error of the configuration, reported at the start."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from streamlearn.learning.models import model_check, registry
from tests.support.refusals import refused


class Custom(nn.Module):
    """A linear layer and dropout, which draws numbers and is in training mode when it is built."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.head = nn.Linear(inputs, outputs)
        self.drop = nn.Dropout(0.5)
        self.frozen = nn.Dropout(0.5).eval()
        self.seen: list[tuple[bool, bool]] = []

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs."""
        self.seen.append((self.training, torch.is_grad_enabled()))
        logits: Tensor = self.drop(self.head(x + torch.rand(()) * 0))
        return logits


def fits(shape: list[int], outputs: int) -> nn.Module:
    """Build a model that fits."""
    return Custom(shape[0], outputs)


def narrow(shape: list[int], outputs: int) -> nn.Module:
    """Build a model for other inputs."""
    return Custom(shape[0] + 1, outputs)


def wide(shape: list[int], outputs: int) -> nn.Module:
    """Build a model with another number of outputs."""
    return Custom(shape[0], outputs + 1)


class Pair(Custom):
    """Returns a pair of outputs."""

    def forward(self, x: Tensor) -> Any:
        """Return the outputs twice."""
        return super().forward(x), x


def pair(shape: list[int], outputs: int) -> nn.Module:
    """Build a model that returns a pair."""
    return Pair(shape[0], outputs)


class Keeping(Custom):
    """Keeps its outputs with their graph."""

    def forward(self, x: Tensor) -> Any:
        """Return the outputs."""
        self.last = super().forward(x)
        return self.last


def keeping(shape: list[int], outputs: int) -> nn.Module:
    """Build a model that cannot be copied after a forward pass."""
    return Keeping(shape[0], outputs)


def nowhere(shape: list[int], outputs: int) -> nn.Module:
    """Build a model with NaN weights."""
    model = Custom(shape[0], outputs)
    nn.init.constant_(model.head.bias, torch.nan)
    return model


def frozen(shape: list[int], outputs: int) -> nn.Module:
    """Build a model without trainable parameters."""
    return Custom(shape[0], outputs).requires_grad_(requires_grad=False)


def key_error(*_: object) -> nn.Module:
    """Raise a KeyError."""
    raise KeyError("no such option")


def two_lines(*_: object) -> nn.Module:
    """Raise an error whose message has two lines."""
    raise RuntimeError("first\nsecond")


def build(name: str) -> nn.Module:
    """Build one of the models above."""
    return registry.build({"name": f"{__name__}:{name}", "options": {}}, [4], 3, 0)


WRONG: list[tuple[str, str]] = [
    (
        "narrow",
        r"the forward pass of a batch of shape \[2, 4\] failed: RuntimeError: .*mat1 and mat2 shapes cannot be multiplied",
    ),
    ("wide", r"the output for a batch of shape \[2, 4\] must have shape \[2, 3\], and is \[2, 4\]$"),
    ("pair", r"must have shape \[2, 3\], and is tuple$"),
    ("nowhere", r"parameter head\.bias is not finite$"),
    ("frozen", r"it has no trainable parameter: expected at least one with requires_grad$"),
    ("key_error", r"KeyError: 'no such option'$"),
    ("two_lines", r"RuntimeError: first second$"),
    ("absent", r"AttributeError: "),
]


@pytest.mark.parametrize(("name", "message"), WRONG)
def test_an_unusable_model_is_refused(name: str, message: str) -> None:
    """One line names the model, the failure and the shapes; the exit code is 78."""
    with refused(f"model {__name__}:{name}: ", message):
        build(name)


def test_building_a_model_leaves_no_trace() -> None:
    """The check runs in evaluation mode; it leaves no gradients and no changed modes, and advances no global generator."""
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    model = build("fits")
    assert torch.equal(torch.rand(3), expected)
    assert isinstance(model, Custom)
    assert model.seen == [(False, False)]
    assert (model.training, model.drop.training, model.frozen.training) == (True, True, False)
    assert all(param.grad is None and param.requires_grad for param in model.parameters())


def test_a_model_that_keeps_its_graph_is_refused_if_it_must_be_copied() -> None:
    """It can be built, but not copied for the weight average after training."""
    model_check.check_copies("own:fits", build("fits"), torch.zeros(2, 4))
    why = "cannot be copied after training, .*: RuntimeError: Only Tensors created"
    with refused("model own:keeping: ", why):
        model_check.check_copies("own:keeping", build("keeping"), torch.zeros(2, 4))


def test_a_model_that_is_too_large_for_memory_is_refused() -> None:
    """A failed allocation of a built-in model is reported in one line, too."""
    spec: dict[str, Any] = {"name": "mlp", "hidden": [1 << 31]}
    with refused("model mlp: ", "RuntimeError: "):
        registry.build(spec, [1 << 28], 3, 0)
