"""Models of one's own: what they raise or return wrongly is an error of the configuration, told at the start."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from streamlearn.data import StreamlearnError
from streamlearn.models import model_check, registry


class Own(nn.Module):
    """A linear layer, and dropout, which draws numbers and is in training mode when it is made."""

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
    """Make a model that fits."""
    return Own(shape[0], outputs)


def narrow(shape: list[int], outputs: int) -> nn.Module:
    """Make a model for other inputs."""
    return Own(shape[0] + 1, outputs)


def wide(shape: list[int], outputs: int) -> nn.Module:
    """Make a model with another number of outputs."""
    return Own(shape[0], outputs + 1)


class Pair(Own):
    """Returns two things."""

    def forward(self, x: Tensor) -> Any:
        """Return the outputs twice."""
        return super().forward(x), x


def pair(shape: list[int], outputs: int) -> nn.Module:
    """Make a model that returns two things."""
    return Pair(shape[0], outputs)


class Keeping(Own):
    """Remembers what it has computed, with its graph."""

    def forward(self, x: Tensor) -> Any:
        """Return the outputs."""
        self.last = super().forward(x)
        return self.last


def keeping(shape: list[int], outputs: int) -> nn.Module:
    """Make a model that cannot be copied any more."""
    return Keeping(shape[0], outputs)


def nowhere(shape: list[int], outputs: int) -> nn.Module:
    """Make a model of NaN."""
    model = Own(shape[0], outputs)
    nn.init.constant_(model.head.bias, torch.nan)
    return model


def frozen(shape: list[int], outputs: int) -> nn.Module:
    """Make a model that learns nothing."""
    return Own(shape[0], outputs).requires_grad_(requires_grad=False)


def key_error(*_: object) -> nn.Module:
    """Fail as a user's code may."""
    raise KeyError("no such option")


def out_of_memory(*_: object) -> nn.Module:
    """Fail in two lines."""
    raise RuntimeError("first\nsecond")


def build(name: str) -> nn.Module:
    """Build one of the above."""
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
    ("out_of_memory", r"RuntimeError: first second$"),
    ("absent", r"AttributeError: "),
]


@pytest.mark.parametrize(("name", "message"), WRONG)
def test_a_model_that_cannot_work_is_refused(name: str, message: str) -> None:
    """One line names the model, what it did, and the shapes; the code is that of the configuration."""
    with pytest.raises(StreamlearnError, match=message) as caught:
        build(name)
    assert caught.value.code == 78
    assert str(caught.value).startswith(f"model {__name__}:{name}: ")


def test_the_trial_leaves_no_trace() -> None:
    """It runs in evaluation mode; no gradient is left, modes are as they were, and no number is drawn that others would."""
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    model = build("fits")
    assert torch.equal(torch.rand(3), expected)
    assert isinstance(model, Own)
    assert model.seen == [(False, False)]
    assert (model.training, model.drop.training, model.frozen.training) == (True, True, False)
    assert all(param.grad is None and param.requires_grad for param in model.parameters())


def test_a_model_that_keeps_a_graph_is_refused_where_it_is_copied() -> None:
    """It can be built; the average's copy of it could not be made any more once it has learned."""
    model_check.check_copies("own:fits", build("fits"), torch.zeros(2, 4))
    why = r"^model own:keeping: cannot be copied after training, .*: RuntimeError: Only Tensors created"
    with pytest.raises(StreamlearnError, match=why) as caught:
        model_check.check_copies("own:keeping", build("keeping"), torch.zeros(2, 4))
    assert caught.value.code == 78


def test_a_model_too_large_for_the_memory_is_refused() -> None:
    """What a shipped model cannot allocate is told in one line, too."""
    spec: dict[str, Any] = {"name": "mlp", "hidden": [1 << 31]}
    with pytest.raises(StreamlearnError, match=r"^model mlp: RuntimeError: .*$") as caught:
        registry.build(spec, [1 << 28], 3, 0)
    assert caught.value.code == 78
