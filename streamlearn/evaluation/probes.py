"""Probes: a bounded random sample of each task's held-out samples, used for evaluation. Sealed when the task ends.

A probe may contain labels that training has not seen. Such a label has no output (`y` is negative), and its samples count as
wrong answers until training sees the label. Words of a text that training has not seen are unknown words until then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from streamlearn.memory import ALL, Immutable, Reservoir
from streamlearn.stream.text import FIRST_WORD_ID, UNKNOWN_ID

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from streamlearn.data import HeldOut, Progress

State = dict[str, Any]


class Evaluator(Protocol):
    """Evaluates a model on several probes."""

    def evaluate_all(self, probes: Sequence[tuple[Tensor, Tensor, int]]) -> list[tuple[float, float]]:
        """Return accuracy and mean loss for each probe, given as its `x [n, ...]`, `y [n]` and task."""


class Probes:
    """One probe per task, of at most `maximum` samples (None: no limit)."""

    def __init__(self, maximum: int | None, max_bytes: int, seed: int) -> None:
        self.maximum = maximum
        self.max_bytes = max_bytes
        self.seed = seed
        self._sealed: dict[int, tuple[Tensor, Tensor]] = {}
        self._open: dict[int, Reservoir] = {}
        # output of each of `Progress.probe_labels`, and id of each of `Progress.probe_words`; negative if there is none yet
        self._labels = torch.empty(0, dtype=torch.int64)
        self._words = torch.empty(0, dtype=torch.int32)
        self._known = (0, 0, 0, 0)  # lengths of the four lists at the last look-up

    def resolve_names(self, progress: Progress) -> None:
        """Look up outputs and ids for the labels and words that only probes contained when they arrived."""
        lists = progress.labels, progress.probe_labels, progress.vocabulary, progress.probe_words
        sizes = len(lists[0]), len(lists[1]), len(lists[2]), len(lists[3])
        if sizes == self._known:  # all four lists are append-only
            return
        self._known = sizes
        ids: dict[str, int] = {}
        if progress.probe_words:
            ids = {word: FIRST_WORD_ID + index for index, word in enumerate(progress.vocabulary)}
        seen = progress.labels
        labels = [
            seen.index(label) if label in seen else -1 - index for index, label in enumerate(progress.probe_labels)
        ]
        words = [ids.get(word, -1 - index) for index, word in enumerate(progress.probe_words)]
        self._labels = torch.tensor(labels, dtype=torch.int64)
        self._words = torch.tensor(words, dtype=torch.int32)

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
        return (torch.where(x < 0, UNKNOWN_ID, x) if len(self._words) else x), y

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
        if len(self._labels):
            y = torch.where(y < 0, self._labels[(-1 - y).clamp(min=0)], y)
        if len(self._words):
            x = torch.where(x < 0, self._words[(-1 - x).clamp(min=0)], x)
        return x, y

    def _new(self, task: int) -> Reservoir:
        return Reservoir(ALL if self.maximum is None else self.maximum, self.max_bytes, self.seed + 1 + task)
