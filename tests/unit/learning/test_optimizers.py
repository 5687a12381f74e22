"""Optimizers: bit-equal to torch's classes; a step that is not finite changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from streamlearn.learning.optimizers import Optimizer

CASES: list[tuple[str, type[torch.optim.Optimizer], dict[str, Any]]] = [
    ("adam", torch.optim.Adam, {}),
    ("adam", torch.optim.Adam, {"weight_decay": 0.1}),
    ("adamw", torch.optim.AdamW, {"weight_decay": 0.1}),
    ("sgd", torch.optim.SGD, {}),
    ("sgd", torch.optim.SGD, {"momentum": 0.9}),
]
FINITE, NOT_FINITE = torch.tensor(data=True), torch.tensor(data=False)


def gradients(step: int) -> list[torch.Tensor]:
    """Return gradients that depend on the step only."""
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(4, 3, generator=generator), torch.randn(5, generator=generator)]


@pytest.mark.parametrize(("name", "kind", "options"), CASES)
def test_steps_are_bit_equal_to_torch(name: str, kind: Any, options: dict[str, Any]) -> None:
    """Ten steps give bit-equal parameters to torch.optim's fused class."""
    ours, theirs = ([torch.ones(4, 3), torch.ones(5)] for _ in range(2))
    optimizer, reference = Optimizer(ours, name, 0.01, **options), kind(theirs, lr=0.01, fused=True, **options)
    for step in range(10):
        optimizer.step(gradients(step), FINITE)
        for param, grad in zip(theirs, gradients(step), strict=True):
            param.grad = grad
        reference.step()
    assert [param.numpy().tobytes() for param in ours] == [param.numpy().tobytes() for param in theirs]


@pytest.mark.parametrize(("name", "kind", "options"), CASES)
def test_a_dropped_step_changes_nothing(name: str, kind: Any, options: dict[str, Any]) -> None:
    """If the flag `finite` is false, parameters, moments and step counts stay as they were."""
    del kind
    params = [torch.ones(4, 3), torch.ones(5)]
    optimizer = Optimizer(params, name, 0.01, **options)
    optimizer.step(gradients(0), FINITE)
    before = (
        [param.clone() for param in params],
        {k: {n: v.clone() for n, v in m.items()} for k, m in optimizer.state_dict().items()},
    )
    optimizer.step([torch.full((4, 3), torch.nan), torch.full((5,), torch.inf)], NOT_FINITE)
    assert all(torch.equal(a, b) for a, b in zip(before[0], params, strict=True))
    after = optimizer.state_dict()
    assert all(torch.equal(value, after[key][n]) for key, group in before[1].items() for n, value in group.items())


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_new_entries_take_the_steps_of_a_new_parameter(name: str) -> None:
    """Rows added after many steps take the same steps as a new parameter; the steps of the old rows stay bit-equal."""
    generator = torch.Generator().manual_seed(0)
    grown, unchanged, fresh = torch.ones(2, 3), torch.ones(2, 3), torch.ones(1, 3)
    optimizer, reference, beginner = (Optimizer([param], name, 0.01) for param in (grown, unchanged, fresh))
    for _ in range(500):
        grad = torch.randn(2, 3, generator=generator)
        optimizer.step([grad], FINITE)
        reference.step([grad], FINITE)
    larger = torch.cat([grown, torch.ones(1, 3)])
    optimizer.set_parameters([larger])
    again = Optimizer([larger.clone()], name, 0.01)
    again.load_state_dict(optimizer.state_dict())
    optimizer.step([torch.full((3, 3), torch.nan)], NOT_FINITE)
    for _ in range(20):
        grad = torch.randn(3, 3, generator=generator)
        for one, rows in ((optimizer, grad), (again, grad), (reference, grad[:2]), (beginner, grad[2:])):
            one.step([rows.clone()], FINITE)
        assert torch.equal(larger[:2], unchanged)
        torch.testing.assert_close(larger[2:], fresh)
    assert torch.equal(again.params[0], larger), "a restart lost the number of steps before the entries were added"


def test_grown_parameters_keep_their_step_counts_when_moved() -> None:
    """Adding, moving and removing parameters does not mix up the step counts of their entries."""
    small, other = torch.ones(2), torch.ones(4)
    optimizer = Optimizer([small, other], "adam", 0.01)
    for _ in range(5):
        optimizer.step([torch.ones(2), torch.ones(4)], FINITE)
    optimizer.set_parameters([torch.ones(3), other], [0, 1])
    optimizer.set_parameters([other, torch.ones(2, 2), torch.ones(4)], [1, None, 0])
    assert {place: value.tolist() for place, value in optimizer.steps_before.items()} == {2: [0.0, 0.0, 5.0, 5.0]}
