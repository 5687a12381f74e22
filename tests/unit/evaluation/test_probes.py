"""Probes: bounded, seeded, sealed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from streamlearn import state
from streamlearn.data import HeldOut
from streamlearn.evaluation.probes import Probes

if TYPE_CHECKING:
    from collections.abc import Sequence


class Constant:
    """Evaluates everything to the number of samples that it sees."""

    def evaluate(
        self, x: torch.Tensor, y: torch.Tensor, task: int, params: Sequence[torch.Tensor] | None = None
    ) -> tuple[float, float]:
        del x, params, task
        return float(len(y)), 0.0


def held(task: int, start: int, count: int) -> HeldOut:
    """Return held-out samples whose x is their number."""
    x = np.arange(start, start + count, dtype=np.float32)[:, None]
    return HeldOut(task, x, np.zeros(count, np.int64))


def test_an_open_probe_counts_from_a_minimum_on() -> None:
    """A few samples of the open task say nothing yet; a sealed probe always counts."""
    probes = Probes(100, 1 << 20, 0)
    probes.collect([held(0, 0, 3)])
    assert probes.evaluate(Constant(), 4) == {}
    probes.collect([held(0, 3, 1)])
    assert probes.evaluate(Constant(), 4) == {0: (4.0, 0.0)}
    probes.seal(0)
    assert probes.evaluate(Constant(), 99) == {0: (4.0, 0.0)}


def test_a_sealed_probe_takes_no_more() -> None:
    """Late samples cannot move a figure that was already published."""
    probes = Probes(100, 1 << 20, 0)
    probes.collect([held(0, 0, 3)])
    probes.seal(0)
    probes.collect([held(0, 3, 5)])
    assert probes.sizes == {0: 3}


def test_a_full_probe_is_a_uniform_sample_and_the_same_after_a_restart() -> None:
    """Past its bound a seeded reservoir decides, and saving in the middle changes nothing."""
    one, other = Probes(50, 1 << 20, 7), Probes(50, 1 << 20, 7)
    one.collect([held(0, 0, 400)])
    other.collect([held(0, 0, 100)])
    files, rest, _ = state.pack({"probes": other.state_dict()})
    third = Probes(50, 1 << 20, 7)
    third.load_state_dict(state.unpack(files, rest)["probes"])
    third.collect([held(0, 100, 300)])
    a, b = one.of(0), third.of(0)
    assert a is not None
    assert b is not None
    assert torch.equal(a[0], b[0])
    assert len(a[1]) == 50
    assert 120 < float(a[0].mean()) < 280
