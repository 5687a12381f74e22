"""A user's model is checked before training: in both modes, with a single sample, and with its state saved and loaded."""

from __future__ import annotations

import copy
import logging
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from streamlearn.learning.models.model_check import ModelCheck
from tests.support import awkward
from tests.support.refusals import refused

if TYPE_CHECKING:
    from collections.abc import Callable


class Last(nn.Module):
    """A linear layer, and a function after it."""

    def __init__(self, last: Callable[[Tensor], Any], training: Callable[[Tensor], Any] | None = None) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.last = last
        self.in_training = training or last

    def forward(self, x: Tensor) -> Any:
        """Apply the function to the layer's output."""
        return (self.in_training if self.training else self.last)(self.head(x))


class Renamed(nn.Linear):
    """Saves its state under names that it cannot load."""

    def state_dict(self, *args: Any, **options: Any) -> dict[str, Any]:  # type: ignore[override]  # as users write it
        """Return the state under other names."""
        return {f"my.{name}": value for name, value in super().state_dict(*args, **options).items()}


class Lazy(nn.Linear):
    """Registers a buffer in its first training step, so that a restored module lacks it."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs."""
        if self.training and "calls" not in self._buffers:
            self.register_buffer("calls", torch.ones(1))
        return super().forward(x)


class Scaled(nn.Linear):
    """Changes its state when it is loaded."""

    def set_extra_state(self, factor: float) -> None:
        """Change the factor."""
        self.factor = 2 * factor

    def get_extra_state(self) -> float:
        """Return a factor."""
        return getattr(self, "factor", 1.0)


def check(build: Callable[[], nn.Module], size: int = 4) -> bool:
    """Check a model; return whether it can learn a single sample in training mode."""
    return ModelCheck("own:make", build, lambda n: torch.randn(n, size), 0).run(copies=True)


WRONG: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "squeezed": (lambda: Last(torch.squeeze), r"a single sample|training on a batch of shape \[1, 4\] failed"),
    "tuple in training": (
        lambda: Last(nn.Identity(), lambda y: (y, y)),
        r"training on a batch of shape \[2, 4\] failed: ",
    ),
    "no statistics to use": (
        lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False)),
        r"training on a batch of shape \[1, 4\] failed: ValueError: Expected more than 1 value per channel",
    ),
    "renamed": (lambda: Renamed(4, 3), "its state cannot be saved and loaded: RuntimeError: "),
    "lazy": (lambda: Lazy(4, 3), "its state cannot be saved and loaded: RuntimeError: .*calls"),
    "scaled": (lambda: Scaled(4, 3), "its state changes when it is saved and loaded: '_extra_state'"),
}


@pytest.mark.parametrize("name", list(WRONG))
def test_a_model_that_would_fail_later_is_refused_at_the_start(name: str) -> None:
    """One line names the model and the failure; the exit code is 78."""
    build, why = WRONG[name]
    with refused("model own:make: ", why):
        check(build)


@pytest.mark.parametrize("kind", list(awkward.MAKERS))
def test_usable_models_pass(kind: str) -> None:
    """Only models with batch statistics cannot learn a single sample in training mode."""
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert check(lambda: awkward.make([12], 3, kind=kind), 12) is (kind not in {"statistics", "spread"})
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("last", "warned"),
    [
        (nn.Softmax(1), True),
        (nn.Sigmoid(), True),
        (lambda y: torch.exp(torch.log_softmax(y, 1)), True),
        (nn.LogSoftmax(1), False),
        (nn.Identity(), False),
        (lambda y: 0.5 + 0.001 * y, False),
    ],
)
def test_a_model_that_returns_probabilities_is_accepted_with_a_warning(
    last: Callable[[Tensor], Tensor], warned: object, caplog: pytest.LogCaptureFixture
) -> None:
    """For a model that ends in a softmax or sigmoid, the warning says that logits are expected."""
    with caplog.at_level(logging.WARNING):
        assert check(lambda: copy.deepcopy(Last(last)))
    found = [line for line in caplog.messages if "outputs are probabilities, and logits are expected" in line]
    assert bool(found) is warned
