"""Gradient projection against its definitions: GEM's program by its optimality conditions, A-GEM by its dot products."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from streamlearn.memory import ALL, EpisodicMemory
from streamlearn.strategies.gem import RIDGE, AGEMConstraint, GEMConstraint, solve_weights
from streamlearn.strategies.slots import BuildContext

if TYPE_CHECKING:
    from streamlearn.data import Batch

CONTEXT = BuildContext(0, torch.device("cpu"), (1,), 2, 1 << 20, lambda x: x, lambda *_: nn.Identity(), 4)


def full(memory: EpisodicMemory, tasks: int) -> EpisodicMemory:
    """Return the memory with one sample of each task, whose value is the task's index."""
    for task in range(tasks):
        memory.store(task, torch.tensor([[float(task)]]), torch.tensor([0]))
    return memory


@settings(deadline=None)  # the first call imports scipy
@given(st.integers(1, 12), st.integers(0, 10_000), st.sampled_from([0.0, 0.5, 3.0]), st.sampled_from([1e-4, 1.0, 1e4]))
def test_gem_solves_its_program(tasks: int, seed: int, margin: float, size: float) -> None:
    """Each v is at least the margin, the gradient of the program is not negative, and one of the two is at its bound (KKT)."""
    rng = np.random.default_rng(seed)
    past = rng.standard_normal((tasks, 30)) * size
    gram, along = past @ past.T, past @ rng.standard_normal(30) * size
    v = solve_weights(gram, along, margin)
    assert v is not None
    assert (v >= margin).all()
    slope = gram @ v + along + RIDGE * v
    scale = np.abs(gram).max() * max(1.0, np.abs(v).max())
    assert (slope >= -1e-8 * scale).all()
    assert np.abs(slope * (v - margin)).max() <= 1e-7 * scale * max(1.0, np.abs(v).max())


def test_a_program_that_cannot_be_solved_is_none() -> None:
    """Values that are not finite are an answer to nothing."""
    assert solve_weights(np.full((2, 2), np.nan), np.ones(2), 0.5) is None


@pytest.mark.parametrize("margin", [0.0, 0.5])
@pytest.mark.parametrize("seed", range(5))
def test_gem_harms_no_past_task(margin: float, seed: int) -> None:
    """After projection no past task's gradient has a dot product with the step that is clearly negative."""
    torch.manual_seed(seed)
    past = torch.randn(3, 40)
    constraint = GEMConstraint(CONTEXT, full(EpisodicMemory(ALL, 1 << 20, 0), 3), per_task=1, margin=margin)

    def gradient_of(batch: Batch) -> list[Tensor]:
        row = past[int(batch.x[0, 0])]
        return [row[:10].reshape(2, 5), row[10:]]

    new = -past.sum(0) + torch.randn(40)
    grads = [new[:10].reshape(2, 5).clone(), new[10:].clone()]
    constraint.project_gradient([], grads, gradient_of)
    products = past @ torch.cat([grad.flatten() for grad in grads])
    assert constraint.counters() == {"projected": 1, "failed": 0}
    assert float(products.min()) > -1e-2 * float(past.square().sum(1).max())  # the ridge lets a little pass
    untouched = [past.sum(0)[:10].reshape(2, 5).clone(), past.sum(0)[10:].clone()]
    if bool((past @ past.sum(0) >= 0).all()):
        constraint.project_gradient([], untouched, gradient_of)
        assert torch.equal(torch.cat([part.flatten() for part in untouched]), past.sum(0))


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_agem_projects_where_the_reference_is_harmed(sign: float) -> None:
    """A gradient against the reference ends orthogonal to it; one along it is left as it was, bit for bit."""
    torch.manual_seed(0)
    reference = torch.randn(40)
    constraint = AGEMConstraint(CONTEXT, full(EpisodicMemory(10, 1 << 20, 0), 2), reference=None, epsilon=0.0)
    seen: list[int] = []

    def gradient_of(batch: Batch) -> list[Tensor]:
        seen.append(len(batch))
        return [reference[:10].reshape(2, 5), reference[10:]]

    new = sign * reference + 0.1 * torch.randn(40)
    grads = [new[:10].reshape(2, 5).clone(), new[10:].clone()]
    constraint.project_gradient([], grads, gradient_of)
    after = torch.cat([grad.flatten() for grad in grads])
    assert seen == [4]  # as many as the batch
    assert constraint.counters()["projected"] == (sign < 0)
    if sign > 0:
        assert torch.equal(after, new)
    else:
        expected = new - (new @ reference) / (reference @ reference) * reference
        torch.testing.assert_close(after, expected)
        assert abs(float(after @ reference)) < 1e-4


def test_agem_leaves_alone_what_a_fitted_memory_says() -> None:
    """A reference far smaller than the square root of epsilon is no reason to turn a step."""
    torch.manual_seed(0)
    reference, new = 1e-5 * torch.randn(40), torch.randn(40)
    new -= (new @ reference + 1e-4) / (reference @ reference) * reference
    ends = []
    for epsilon in (0.0, 1e-3):
        memory = full(EpisodicMemory(10, 1 << 20, 0), 2)
        constraint = AGEMConstraint(CONTEXT, memory, reference=None, epsilon=epsilon)
        grads = [new.clone()]
        constraint.project_gradient([], grads, lambda _: [reference])
        ends.append(grads[0])
    assert float((ends[0] - new).norm()) > 1.0
    torch.testing.assert_close(ends[1], new, atol=1e-4, rtol=0)
