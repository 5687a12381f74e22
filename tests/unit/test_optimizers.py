"""Optimizers: the same bits as torch's classes, and nothing at all where the gradient is not finite."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from streamlearn.optimizers import Optimizer

CASES: list[tuple[str, type[torch.optim.Optimizer], dict[str, Any]]] = [
    ("adam", torch.optim.Adam, {}),
    ("adam", torch.optim.Adam, {"weight_decay": 0.1}),
    ("adamw", torch.optim.AdamW, {"weight_decay": 0.1}),
    ("sgd", torch.optim.SGD, {}),
    ("sgd", torch.optim.SGD, {"momentum": 0.9}),
]
FINE, BROKEN = torch.tensor(data=True), torch.tensor(data=False)


def gradients(step: int) -> list[torch.Tensor]:
    """Return the same gradients for the same step."""
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(4, 3, generator=generator), torch.randn(5, generator=generator)]


@pytest.mark.parametrize(("name", "kind", "options"), CASES)
def test_steps_as_torch_does(name: str, kind: Any, options: dict[str, Any]) -> None:
    """Ten steps give the bits of torch.optim's fused class."""
    ours, theirs = ([torch.ones(4, 3), torch.ones(5)] for _ in range(2))
    optimizer, reference = Optimizer(ours, name, 0.01, **options), kind(theirs, lr=0.01, fused=True, **options)
    for step in range(10):
        optimizer.step(gradients(step), FINE)
        for param, grad in zip(theirs, gradients(step), strict=True):
            param.grad = grad
        reference.step()
    assert [param.numpy().tobytes() for param in ours] == [param.numpy().tobytes() for param in theirs]


@pytest.mark.parametrize(("name", "kind", "options"), CASES)
def test_a_broken_step_changes_nothing(name: str, kind: Any, options: dict[str, Any]) -> None:
    """Where the flag is down, parameters, moments and step counts stay as they were."""
    del kind
    params = [torch.ones(4, 3), torch.ones(5)]
    optimizer = Optimizer(params, name, 0.01, **options)
    optimizer.step(gradients(0), FINE)
    before = (
        [param.clone() for param in params],
        {k: {n: v.clone() for n, v in m.items()} for k, m in optimizer.state_dict().items()},
    )
    optimizer.step([torch.full((4, 3), torch.nan), torch.full((5,), torch.inf)], BROKEN)
    assert all(torch.equal(a, b) for a, b in zip(before[0], params, strict=True))
    after = optimizer.state_dict()
    assert all(torch.equal(value, after[key][n]) for key, group in before[1].items() for n, value in group.items())
