"""GEM and A-GEM: the solution of GEM's quadratic program, and dot products after the projection."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from streamlearn.learning.memory import ALL, EpisodicMemory
from streamlearn.learning.strategies.gem import RIDGE, AGEMConstraint, GEMConstraint, solve_weights
from streamlearn.learning.strategies.slots import BuildContext

if TYPE_CHECKING:
    from streamlearn.core.samples import Batch

CONTEXT = BuildContext(0, torch.device("cpu"), (1,), 2, 1 << 20, lambda x: x, lambda *_: nn.Identity(), 4)


def filled(memory: EpisodicMemory, tasks: int) -> EpisodicMemory:
    """Return the memory with one sample of each task, whose value is the task's index."""
    for task in range(tasks):
        memory.store(task, torch.tensor([[float(task)]]), torch.tensor([0]))
    return memory


@settings(deadline=None)  # the first call imports scipy
@given(st.integers(1, 12), st.integers(0, 10_000), st.sampled_from([0.0, 0.5, 3.0]), st.sampled_from([1e-4, 1.0, 1e4]))
def test_gem_solves_its_quadratic_program(tasks: int, seed: int, margin: float, size: float) -> None:
    """The solution meets the optimality conditions (KKT): v >= margin, slope >= 0, and for each v one is an equality."""
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


def test_a_program_without_solution_gives_none() -> None:
    """Values that are not finite give None."""
    assert solve_weights(np.full((2, 2), np.nan), np.ones(2), 0.5) is None


@pytest.mark.parametrize("margin", [0.0, 0.5])
@pytest.mark.parametrize("seed", range(5))
def test_gem_harms_no_past_task(margin: float, seed: int) -> None:
    """After the projection, no past task's gradient has a clearly negative dot product with the new gradient."""
    torch.manual_seed(seed)
    past = torch.randn(3, 40)
    constraint = GEMConstraint(CONTEXT, filled(EpisodicMemory(ALL, 1 << 20, 0), 3), per_task=1, margin=margin)

    def gradient_of(batch: Batch) -> list[Tensor]:
        row = past[int(batch.x[0, 0])]
        return [row[:10].reshape(2, 5), row[10:]]

    new = -past.sum(0) + torch.randn(40)
    grads = [new[:10].reshape(2, 5).clone(), new[10:].clone()]
    constraint.project_gradient([], grads, gradient_of)
    products = past @ torch.cat([grad.flatten() for grad in grads])
    assert constraint.counters() == {"projected": 1, "failed": 0}
    # the ridge allows slightly negative products
    assert float(products.min()) > -1e-2 * float(past.square().sum(1).max())
    untouched = [past.sum(0)[:10].reshape(2, 5).clone(), past.sum(0)[10:].clone()]
    if bool((past @ past.sum(0) >= 0).all()):
        constraint.project_gradient([], untouched, gradient_of)
        assert torch.equal(torch.cat([grad.flatten() for grad in untouched]), past.sum(0))


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_agem_projects_a_gradient_against_the_reference(sign: float) -> None:
    """A gradient against the reference becomes orthogonal to it. A gradient along the reference stays bit-equal."""
    torch.manual_seed(0)
    reference = torch.randn(40)
    constraint = AGEMConstraint(CONTEXT, filled(EpisodicMemory(10, 1 << 20, 0), 2), reference=None, epsilon=0.0)
    batch_sizes: list[int] = []

    def gradient_of(batch: Batch) -> list[Tensor]:
        batch_sizes.append(len(batch))
        return [reference[:10].reshape(2, 5), reference[10:]]

    new = sign * reference + 0.1 * torch.randn(40)
    grads = [new[:10].reshape(2, 5).clone(), new[10:].clone()]
    constraint.project_gradient([], grads, gradient_of)
    after = torch.cat([grad.flatten() for grad in grads])
    assert batch_sizes == [4]  # the default is the batch size
    assert constraint.counters()["projected"] == (sign < 0)
    if sign > 0:
        assert torch.equal(after, new)
    else:
        expected = new - (new @ reference) / (reference @ reference) * reference
        torch.testing.assert_close(after, expected)
        assert abs(float(after @ reference)) < 1e-4


def test_agem_does_not_project_for_a_tiny_reference() -> None:
    """A reference gradient far smaller than the square root of epsilon leaves the gradient almost unchanged."""
    torch.manual_seed(0)
    reference, new = 1e-5 * torch.randn(40), torch.randn(40)
    new -= (new @ reference + 1e-4) / (reference @ reference) * reference
    projected = []
    for epsilon in (0.0, 1e-3):
        memory = filled(EpisodicMemory(10, 1 << 20, 0), 2)
        constraint = AGEMConstraint(CONTEXT, memory, reference=None, epsilon=epsilon)
        grads = [new.clone()]
        constraint.project_gradient([], grads, lambda _: [reference])
        projected.append(grads[0])
    assert float((projected[0] - new).norm()) > 1.0
    torch.testing.assert_close(projected[1], new, atol=1e-4, rtol=0)
