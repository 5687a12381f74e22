"""Everything that a module's outputs depend on is saved, and running statistics never keep what is not finite."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from streamlearn.models.module_state import RunningStatistics, load_module_state, module_state
from tests.support import awkward

YES, NO = torch.ones((), dtype=torch.bool), torch.zeros((), dtype=torch.bool)


class Cached(nn.Module):
    """Has buffers that are not persistent: one that is replaced, one that is written, one that is not there yet."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.BatchNorm1d(2)
        for name, value in (("replaced", torch.zeros(2)), ("written", torch.zeros(2)), ("late", None)):
            self.register_buffer(name, value, persistent=False)
        self.register_buffer("fixed", torch.tensor([-torch.inf, 0.0]), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Change each."""
        self.replaced = self.get_buffer("replaced") + x.mean(0)
        self.written: Tensor
        self.written.add_(x.mean(0))
        self.late = x.detach()[0]
        y: Tensor = self.inner(x)
        return y


def test_buffers_that_are_not_persistent_come_back() -> None:
    """They are saved by their full names beside the others, at any depth, of any shape, and may be absent."""
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
    assert other[0].written is alias  # in place: an average may follow it


def test_a_state_of_an_earlier_version_is_loaded() -> None:
    """Without buffers that are not persistent they stay as they were made; what else is missing is an error."""
    module = Cached()
    before = module.get_buffer("fixed").clone()
    load_module_state(module, {name: value for name, value in module_state(module).items() if name.startswith("inner")})
    assert torch.equal(module.get_buffer("fixed"), before)
    with pytest.raises(RuntimeError, match="Missing key"):
        load_module_state(module, {})


def test_an_average_follows_buffers_that_are_replaced() -> None:
    """The copy has the statistics of the live module, whether it writes into its buffers or makes new ones."""
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
def test_statistics_that_are_not_finite_are_taken_back(finite: Tensor) -> None:
    """One sample far out of range, or a dropped update, leaves running statistics as they were; so later ones are sound."""
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


def test_a_restored_model_answers_the_same() -> None:
    """The odd model, saved and read through its own state, answers the same."""
    torch.manual_seed(0)
    one, other = (awkward.make([12], 3, kind="odd") for _ in range(2))
    one(torch.rand(8, 12))
    load_module_state(other, module_state(one))
    x = torch.rand(5, 12)
    assert torch.equal(one.eval()(x), other.eval()(x))
