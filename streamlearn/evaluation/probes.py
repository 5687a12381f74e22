"""Held-out probes: a bounded, seeded sample of what each task kept back; sealed when the task ends.

A probe may hold labels that training has not met. They have no output (`y` is negative), and count as wrong answers until
training meets them. Words of a text that training has not met are unknown words until then.
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
    """What can be probed."""

    def evaluate_all(self, probes: Sequence[tuple[Tensor, Tensor, int]]) -> list[tuple[float, float]]:
        """Return accuracy and mean loss on each probe: its samples `x`, `y`, and its task."""


class Probes:
    """One probe a task, of at most `maximum` samples (None: no bound)."""

    def __init__(self, maximum: int | None, max_bytes: int, seed: int) -> None:
        self.maximum = maximum
        self.max_bytes = max_bytes
        self.seed = seed
        self._sealed: dict[int, tuple[Tensor, Tensor]] = {}
        self._open: dict[int, Reservoir] = {}
        self._labels = torch.empty(0, dtype=torch.int64)  # what each of `Progress.probe_labels` is by now
        self._words = torch.empty(0, dtype=torch.int32)  # the same for `Progress.probe_words`
        self._known = (0, 0, 0, 0)

    def resolve_names(self, progress: Progress) -> None:
        """Look up which of the labels and words that probes alone contained have an output or an id by now."""
        known = progress.labels, progress.probe_labels, progress.vocabulary, progress.probe_words
        sizes = len(known[0]), len(known[1]), len(known[2]), len(known[3])
        if sizes == self._known:  # all four are append-only
            return
        self._known = sizes
        ids = (
            {word: FIRST_WORD_ID + place for place, word in enumerate(progress.vocabulary)}
            if progress.probe_words
            else {}
        )
        met = progress.labels
        labels = [met.index(label) if label in met else -1 - place for place, label in enumerate(progress.probe_labels)]
        words = [ids.get(word, -1 - place) for place, word in enumerate(progress.probe_words)]
        self._labels = torch.tensor(labels, dtype=torch.int64)
        self._words = torch.tensor(words, dtype=torch.int32)

    def add(self, held_out: Iterable[HeldOut]) -> None:
        """Offer held-out samples to the probes of their tasks; a sealed probe takes no more."""
        for part in held_out:
            if part.task not in self._sealed:
                if part.task not in self._open:
                    self._open[part.task] = self._new(part.task)
                self._open[part.task].add(*self._numbered(torch.from_numpy(part.x), torch.from_numpy(part.y)))

    def seal(self, task: int) -> None:
        """Fix a task's probe for good."""
        if (probe := self._open.pop(task, None)) is not None and len(probe):
            x, y = self._numbered(probe.x, probe.y)
            self._sealed[task] = (x.clone(), y.clone())

    def samples(self, task: int) -> tuple[Tensor, Tensor] | None:
        """Return a probe's samples, `x [n, ...]` and `y [n]`, or None where the task has none.

        `y` is negative where training has not met the label.
        """
        if task in self._sealed:
            x, y = self._sealed[task]
        elif (probe := self._open.get(task)) is not None and len(probe):
            x, y = probe.x, probe.y
        else:
            return None
        x, y = self._numbered(x, y)
        return (torch.where(x < 0, UNKNOWN_ID, x) if len(self._words) else x), y

    @property
    def sizes(self) -> dict[int, int]:
        """Samples in each probe."""
        sizes = {task: len(y) for task, (_, y) in self._sealed.items()} | {t: len(p) for t, p in self._open.items()}
        return dict(sorted(sizes.items()))

    def evaluate(self, learner: Evaluator, minimum: int) -> dict[int, tuple[float, float]]:
        """Return accuracy and mean loss by task; an open probe counts from `minimum` samples on."""
        chosen = []
        for task, size in self.sizes.items():
            probe = self.samples(task)
            if probe is not None and (task in self._sealed or size >= minimum):
                chosen.append((*probe, task))
        results = learner.evaluate_all(chosen)
        return {task: result for (*_, task), result in zip(chosen, results, strict=True)}

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

    def _numbered(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Put outputs and ids in place of negative numbers, where there are any by now."""
        if len(self._labels):
            y = torch.where(y < 0, self._labels[(-1 - y).clamp(min=0)], y)
        if len(self._words):
            x = torch.where(x < 0, self._words[(-1 - x).clamp(min=0)], x)
        return x, y

    def _new(self, task: int) -> Reservoir:
        return Reservoir(ALL if self.maximum is None else self.maximum, self.max_bytes, self.seed + 1 + task)
