"""Probes: a bounded random sample of each task's held-out samples, used for evaluation. Sealed when the task ends.

A probe may contain labels that training has not seen. Such a label has no output (`y` is negative), and its samples count as
wrong answers until training sees the label. Words of a text that training has not seen are unknown words until then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from streamlearn.core.immutable import Immutable
from streamlearn.core.samples import FIRST_WORD_ID, UNKNOWN_ID
from streamlearn.learning.memory import ALL, Reservoir

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from streamlearn.core.labels import Label
    from streamlearn.core.progress import Progress
    from streamlearn.core.samples import HeldOut

State = dict[str, Any]


class Evaluator(Protocol):
    """Evaluates a model on several probes."""

    def evaluate_all(self, probes: Sequence[tuple[Tensor, Tensor, int]]) -> list[tuple[float, float]]:
        """Return accuracy and mean loss for each probe, given as its `x [n, ...]`, `y [n]` and task."""


class _Numbers:
    """The number that training has given to each name that a probe contained first; negative if there is none yet.

    Names are only ever added, so an update costs what is new: a stream may have a hundred thousand words.
    """

    def __init__(self, first: int, dtype: torch.dtype) -> None:
        self.table = torch.empty(0, dtype=dtype)
        self._first = first  # the number of the first name that training has seen
        self._seen: dict[Label, int] = {}  # names that training has seen: their numbers
        self._places: dict[Label, int] = {}  # names that probes contained first: their places in the table

    def update(self, seen: Sequence[Label], probe_names: Sequence[Label]) -> None:
        """Take what was added to the two lists since the last call."""
        if len(seen) == len(self._seen) and len(probe_names) == len(self._places):
            return
        begin = len(self._places)
        for place, name in enumerate(probe_names[begin:], begin):
            self._places[name] = place
        added = [self._seen.get(name, -1 - place) for place, name in enumerate(probe_names[begin:], begin)]
        self.table = torch.cat([self.table, torch.tensor(added, dtype=self.table.dtype)])
        for number, name in enumerate(seen[len(self._seen) :], self._first + len(self._seen)):
            self._seen[name] = number
            if name in self._places:
                self.table[self._places[name]] = number


class Probes:
    """One probe per task, of at most `maximum` samples (None: no limit)."""

    def __init__(self, maximum: int | None, max_bytes: int, seed: int) -> None:
        self.maximum = maximum
        self.max_bytes = max_bytes
        self.seed = seed
        self._sealed: dict[int, tuple[Tensor, Tensor]] = {}
        self._open: dict[int, Reservoir] = {}
        self._outputs = _Numbers(0, torch.int64)  # of each of `Progress.probe_labels`
        self._word_ids = _Numbers(FIRST_WORD_ID, torch.int32)  # of each of `Progress.probe_words`

    def resolve_names(self, progress: Progress) -> None:
        """Look up outputs and ids for the labels and words that only probes contained when they arrived."""
        self._outputs.update(progress.labels, progress.probe_labels)
        self._word_ids.update(progress.vocabulary, progress.probe_words)

    def add(self, held_out: Iterable[HeldOut]) -> None:
        """Offer held-out samples to the probes of their tasks. Sealed probes ignore them."""
        for part in held_out:
            if part.task not in self._sealed:
                if part.task not in self._open:
                    self._open[part.task] = self._new(part.task)
                self._open[part.task].add(*self._resolved(torch.from_numpy(part.x), torch.from_numpy(part.y)))

    def seal(self, task: int) -> None:
        """Seal a task's probe: its samples never change again."""
        if (probe := self._open.pop(task, None)) is not None and len(probe):
            x, y = self._resolved(probe.x, probe.y)
            self._sealed[task] = (x.clone(), y.clone())

    def samples(self, task: int) -> tuple[Tensor, Tensor] | None:
        """Return a probe's samples, `x [n, ...]` and `y [n]`, or None if the task has none.

        `y` is negative for labels that training has not seen.
        """
        if task in self._sealed:
            x, y = self._sealed[task]
        elif (probe := self._open.get(task)) is not None and len(probe):
            x, y = probe.x, probe.y
        else:
            return None
        x, y = self._resolved(x, y)
        return (torch.where(x < 0, UNKNOWN_ID, x) if len(self._word_ids.table) else x), y

    @property
    def sizes(self) -> dict[int, int]:
        """Number of samples in each probe, by task."""
        sizes = {task: len(y) for task, (_, y) in self._sealed.items()} | {t: len(p) for t, p in self._open.items()}
        return dict(sorted(sizes.items()))

    def evaluate(self, learner: Evaluator, minimum: int) -> dict[int, tuple[float, float]]:
        """Return accuracy and mean loss by task. Probes that are not sealed are left out below `minimum` samples."""
        included = []
        for task, size in self.sizes.items():
            probe = self.samples(task)
            if probe is not None and (task in self._sealed or size >= minimum):
                included.append((*probe, task))
        results = learner.evaluate_all(included)
        return {task: result for (*_, task), result in zip(included, results, strict=True)}

    def state_dict(self) -> State:
        """Return everything needed to continue bit-equal."""
        return {
            "sealed": {str(task): Immutable(x=x, y=y) for task, (x, y) in self._sealed.items()},
            "open": {str(task): probe.state_dict() for task, probe in self._open.items()},
        }

    def load_state_dict(self, state: State) -> None:
        """Restore what `state_dict` returned."""
        self._sealed = {int(task): (probe["x"], probe["y"]) for task, probe in state.get("sealed", {}).items()}
        self._open = {}
        for task, saved in state.get("open", {}).items():
            self._open[int(task)] = self._new(int(task))
            self._open[int(task)].load_state_dict(saved)

    def _resolved(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Replace negative numbers in `x` and `y` by the ids and outputs that are known now."""
        if len(self._outputs.table):
            y = torch.where(y < 0, self._outputs.table[(-1 - y).clamp(min=0)], y)
        if len(self._word_ids.table):
            x = torch.where(x < 0, self._word_ids.table[(-1 - x).clamp(min=0)], x)
        return x, y

    def _new(self, task: int) -> Reservoir:
        return Reservoir(ALL if self.maximum is None else self.maximum, self.max_bytes, self.seed + 1 + task)
