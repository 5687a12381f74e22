"""All state that a module's outputs depend on is saved, and running statistics never keep values that are not finite."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from streamlearn.learning.models.module_state import RunningStatistics, load_module_state, module_state
from tests.support import awkward

YES, NO = torch.ones((), dtype=torch.bool), torch.zeros((), dtype=torch.bool)


class Cached(nn.Module):
    """Has non-persistent buffers: one is replaced, one is written in place, one is None at first."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.BatchNorm1d(2)
        for name, value in (("replaced", torch.zeros(2)), ("written", torch.zeros(2)), ("late", None)):
            self.register_buffer(name, value, persistent=False)
        self.register_buffer("fixed", torch.tensor([-torch.inf, 0.0]), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Change all three buffers."""
        self.replaced = self.get_buffer("replaced") + x.mean(0)
        self.written: Tensor
        self.written.add_(x.mean(0))
        self.late = x.detach()[0]
        y: Tensor = self.inner(x)
        return y


def test_non_persistent_buffers_are_restored() -> None:
    """They are saved under their full names, at any depth and of any shape, and may be missing."""
    module = nn.Sequential(Cached(), nn.Linear(2, 2))
    state = module_state(module)
    assert {"0.replaced", "0.written", "0.fixed", "0.inner.running_mean", "1.weight"} <= state.keys()
    assert "0.late" not in state
    module(torch.ones(3, 2))
    state = {name: value.clone() for name, value in module_state(module).items()}
    other = nn.Sequential(Cached(), nn.Linear(2, 2))
    alias = other[0].written
    load_module_state(other, state)
    again = module_state(other)
    assert again.keys() == state.keys()
    assert all(torch.equal(value, again[name]) for name, value in state.items())
    assert other[0].written is alias  # in place: another object may refer to this tensor


def test_the_state_of_an_older_version_is_loaded() -> None:
    """If non-persistent buffers are missing they keep their values; any other missing key is an error."""
    module = Cached()
    before = module.get_buffer("fixed").clone()
    load_module_state(module, {name: value for name, value in module_state(module).items() if name.startswith("inner")})
    assert torch.equal(module.get_buffer("fixed"), before)
    with pytest.raises(RuntimeError, match="Missing key"):
        load_module_state(module, {})


def test_the_averaged_module_gets_buffers_that_were_replaced() -> None:
    """The averaged copy gets the statistics of the live module, written in place or replaced."""
    live = Cached()
    mean = copy.deepcopy(live)
    followed = RunningStatistics(live, mean)
    for _ in range(3):
        live(torch.rand(4, 2))
        followed.after_step(YES)
        there = dict(mean.named_buffers())
        names = ["replaced", "written", "inner.running_mean", "inner.running_var", "fixed"]
        assert all(torch.equal(there[name], live.get_buffer(name)) for name in names)


@pytest.mark.parametrize("finite", [YES, NO])
def test_statistics_that_are_not_finite_are_restored(finite: Tensor) -> None:
    """A sample far out of range, or a dropped step, does not change running statistics."""
    live = Cached()
    mean = copy.deepcopy(live)
    followed = RunningStatistics(live, mean)
    live(torch.rand(4, 2))
    followed.after_step(YES)
    before = {
        name: value.clone() for name, value in live.named_buffers() if value.is_floating_point() and name != "late"
    }
    x = torch.rand(4, 2)
    if finite:
        x[0, 0] = 3e38
    live(x)
    followed.after_step(finite)
    kept = ["inner.running_var"] if finite else list(before)
    for module in (live, mean):
        there = dict(module.named_buffers())
        assert [name for name in kept if not torch.equal(there[name], before[name])] == []
    live(torch.rand(4, 2))
    followed.after_step(YES)
    variance = live.get_buffer("inner.running_var")
    assert bool(variance.isfinite().all())
    assert not torch.equal(variance, before["inner.running_var"])


def test_a_restored_model_has_the_same_outputs() -> None:
    """The odd model gives the same outputs after its state was saved and loaded."""
    torch.manual_seed(0)
    one, other = (awkward.make([12], 3, kind="odd") for _ in range(2))
    one(torch.rand(8, 12))
    load_module_state(other, module_state(one))
    x = torch.rand(5, 12)
    assert torch.equal(one.eval()(x), other.eval()(x))
