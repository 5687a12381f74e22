"""Held-out probes: a bounded, seeded sample of what each task kept back; sealed when the task ends."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from streamlearn.memory import ALL, Immutable, Reservoir

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from streamlearn.data import HeldOut

State = dict[str, Any]


class Evaluates(Protocol):
    """What can be probed."""

    def evaluate(self, x: Tensor, y: Tensor, task: int, params: Sequence[Tensor] | None = None) -> tuple[float, float]:
        """Return accuracy and mean loss on samples of a task."""


class Probes:
    """One probe a task, of at most `maximum` samples (None: no bound)."""

    def __init__(self, maximum: int | None, max_bytes: int, seed: int) -> None:
        self.maximum = maximum
        self.max_bytes = max_bytes
        self.seed = seed
        self._sealed: dict[int, tuple[Tensor, Tensor]] = {}
        self._open: dict[int, Reservoir] = {}

    def collect(self, held_out: Iterable[HeldOut]) -> None:
        """Offer held-out samples to the probes of their tasks; a sealed probe takes no more."""
        for part in held_out:
            if part.task not in self._sealed:
                if part.task not in self._open:
                    self._open[part.task] = self._new(part.task)
                self._open[part.task].add(torch.from_numpy(part.x), torch.from_numpy(part.y))

    def seal(self, task: int) -> None:
        """Fix a task's probe for good."""
        if (probe := self._open.pop(task, None)) is not None and len(probe):
            self._sealed[task] = (probe.x.clone(), probe.y.clone())

    def of(self, task: int) -> tuple[Tensor, Tensor] | None:
        """Return a probe's samples, `x [n, ...]` and `y [n]`, or None where the task has none."""
        if task in self._sealed:
            return self._sealed[task]
        probe = self._open.get(task)
        return (probe.x, probe.y) if probe is not None and len(probe) else None

    @property
    def sizes(self) -> dict[int, int]:
        """Samples in each probe."""
        sizes = {task: len(y) for task, (_, y) in self._sealed.items()} | {t: len(p) for t, p in self._open.items()}
        return dict(sorted(sizes.items()))

    def evaluate(self, learner: Evaluates, minimum: int) -> dict[int, tuple[float, float]]:
        """Return accuracy and mean loss by task; an open probe counts from `minimum` samples on."""
        results = {}
        for task, size in self.sizes.items():
            probe = self.of(task)
            if probe is not None and (task in self._sealed or size >= minimum):
                results[task] = learner.evaluate(*probe, task)
        return results

    def state_dict(self) -> State:
        """Return everything needed to go on bit-equal."""
        return {
            "sealed": {str(task): Immutable(x=x, y=y) for task, (x, y) in self._sealed.items()},
            "open": {str(task): probe.state_dict() for task, probe in self._open.items()},
        }

    def load_state_dict(self, state: State) -> None:
        """Take over what `state_dict` returned."""
        self._sealed = {int(task): (probe["x"], probe["y"]) for task, probe in state.get("sealed", {}).items()}
        self._open = {}
        for task, saved in state.get("open", {}).items():
            self._open[int(task)] = self._new(int(task))
            self._open[int(task)].load_state_dict(saved)

    def _new(self, task: int) -> Reservoir:
        return Reservoir(ALL if self.maximum is None else self.maximum, self.max_bytes, self.seed + 1 + task)
