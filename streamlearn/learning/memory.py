"""Stores samples: a reservoir for the current task, an episodic memory for past tasks. Both keep the dtype of the input."""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from streamlearn.core.errors import StreamlearnError
from streamlearn.core.immutable import Immutable
from streamlearn.core.labels import Label
from streamlearn.learning.tensors import seeded_generator

State = dict[str, Any]
StoredSamples = dict[str, Tensor]  # name of a value -> the values of n samples, [n, ...]
Classes = Sequence[Mapping[int, Label]]  # for each task: output -> label

ALL = -1
"""As a number of samples: all of them, without a limit."""


class Reservoir:
    """Keeps a uniform random sample of the current task (Vitter 1985, algorithm R): `capacity` samples, or `ALL`.

    With `balanced` it samples uniformly within each class, and keeps the class sizes as equal as the stream allows
    (Chrysakis & Moens 2020, algorithm 1). The samples stay on the host, where the order of two writes to one index is
    defined.
    """

    def __init__(self, capacity: int, max_bytes: int, seed: int, *, balanced: bool = False) -> None:
        self.capacity = capacity
        self.max_bytes = max_bytes
        self.balanced = balanced
        self._seen_by_class: Counter[int] = Counter()  # samples offered of each class, if balanced
        self._once_largest: set[int] = set()  # classes that have been the largest at some time
        self._indices: dict[int, list[int]] = {}  # class -> indices of its samples; filled when the reservoir is full
        self.seen = 0
        self.sealed = False  # a sealed reservoir accepts no further samples
        self._size = 0
        self._x = torch.empty(0)
        self._y = torch.empty(0, dtype=torch.int64)
        self._generator = seeded_generator(seed, "reservoir")

    def __len__(self) -> int:
        return self._size

    @property
    def x(self) -> Tensor:
        """The stored samples, `[n, ...]`, unscaled."""
        return self._x[: self._size]

    @property
    def y(self) -> Tensor:
        """The output index of each stored sample, `[n]`."""
        return self._y[: self._size]

    def add(self, x: Tensor, y: Tensor) -> None:
        """Offer samples. A sealed reservoir ignores them. Raises `StreamlearnError` when `ALL` samples exceed `max_bytes`."""
        if self.capacity == 0 or self.sealed:
            return
        room = len(y) if self.capacity == ALL else max(0, min(self.capacity - self._size, len(y)))
        if room > 0:
            self._append(x[:room], y[:room])
        rest = torch.arange(room, len(y))
        # a dict keeps the later of two writes to one index; one indexed assignment would leave their order undefined
        if self.balanced:
            self._seen_by_class.update(y[:room].tolist())
            replaced = self._replace_balanced(room, y[room:].tolist())
        else:
            draws = torch.rand(len(rest), generator=self._generator, dtype=torch.float64)
            indices = (draws * (self.seen + rest + 1)).long().tolist()
            replaced = {index: room + number for number, index in enumerate(indices) if index < self.capacity}
        self.seen += len(y)
        if replaced:
            target, source = torch.tensor(list(replaced)), torch.tensor(list(replaced.values()))
            self._x[target], self._y[target] = x[source], y[source]

    def clear(self) -> None:
        """Remove all samples and accept new ones. The random generator keeps its state."""
        self.seen = self._size = 0
        self.sealed = False
        self._seen_by_class.clear()
        self._once_largest.clear()
        self._indices = {}
        self._x, self._y = torch.empty(0), torch.empty(0, dtype=torch.int64)

    def state_dict(self) -> State:
        """Return the state as tensors and JSON values."""
        return {
            "x": self.x,
            "y": self.y,
            "seen": self.seen,
            "sealed": self.sealed,
            "met": {str(label): count for label, count in self._seen_by_class.items()},
            "full": sorted(self._once_largest),
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: State) -> None:
        """Restore what `state_dict` returned."""
        self._x, self._y = state["x"].clone(), state["y"].clone()
        self._seen_by_class = Counter({int(label): count for label, count in state.get("met", {}).items()})
        self._once_largest = set(state.get("full", []))
        if self.balanced and "met" not in state:  # an older version: estimate what it has seen of each class
            self._seen_by_class = Counter(self._y.tolist())
            if state["seen"] > len(self._y):
                self._once_largest = set(self._seen_by_class)
                self._seen_by_class = Counter(
                    {y: round(n * state["seen"] / len(self._y)) for y, n in self._seen_by_class.items()}
                )
        self._indices = {}
        self._size = len(self._y)
        self.seen, self.sealed = state["seen"], state["sealed"]
        self._generator.set_state(state["generator"])

    def _replace_balanced(self, first: int, labels: Sequence[int]) -> dict[int, int]:
        """Choose which stored samples of a full reservoir are replaced; return {stored index: number of the new sample}.

        `labels` are the classes of the new samples, which are numbered from `first` on.
        """
        if not labels:
            return {}
        if not (indices := self._indices):
            for index, label in enumerate(self.y.tolist()):
                indices.setdefault(label, []).append(index)
        largest = self._update_largest()
        draws = torch.rand(len(labels), 2, generator=self._generator, dtype=torch.float64).tolist()
        replaced = {}
        for number, (label, (keep_draw, index_draw)) in enumerate(zip(labels, draws, strict=True), first):
            self._seen_by_class[label] += 1
            if label not in self._once_largest:  # this class takes a place from the largest one
                index = indices[largest].pop(int(index_draw * len(indices[largest])))
                bisect.insort(indices.setdefault(label, []), index)  # sorted, as they are after a restart
                largest = self._update_largest()
            elif keep_draw * self._seen_by_class[label] <= len(indices[label]):
                index = indices[label][int(index_draw * len(indices[label]))]
            else:
                continue
            replaced[index] = number
        return replaced

    def _update_largest(self) -> int:
        """Record the classes that have the most samples now; return the smallest of these."""
        most = max(map(len, self._indices.values()))
        largest = [label for label, rows in self._indices.items() if len(rows) == most]
        self._once_largest.update(largest)
        return min(largest)

    def _append(self, x: Tensor, y: Tensor) -> None:
        needed = self._size + len(y)
        if needed > len(self._y):
            size = max(needed, 2 * len(self._y), 1024)
            if self.capacity != ALL:
                size = min(size, self.capacity)
            per_sample = x[0].numel() * x.element_size()
            if needed * per_sample > self.max_bytes:
                raise StreamlearnError(
                    f"memory.max_bytes: {self.max_bytes} bytes hold only {self.max_bytes // per_sample} samples of the current "
                    f"task, and the strategy needs more; raise memory.max_bytes"
                )
            grown_x = torch.empty((size, *x.shape[1:]), dtype=x.dtype)
            grown_y = torch.empty(size, dtype=torch.int64)
            if self._size:
                grown_x[: self._size], grown_y[: self._size] = self.x, self.y
            self._x, self._y = grown_x, grown_y
        self._x[self._size : needed], self._y[self._size : needed] = x, y
        self._size = needed


class EpisodicMemory:
    """Stores samples of past tasks: at most `budget` samples (or `ALL`) and `max_bytes`.

    With `balanced` all classes get an equal share of the budget, at most `per_class` samples each, and a class divides its
    share equally over the tasks that it came in (a class is a label, in however many tasks it came). Otherwise all tasks
    get an equal share, and every sample of a task is equally likely to be kept. What a class or task does not need of its
    share goes to the others. The cost of a draw does not depend on the number of tasks.
    """

    def __init__(
        self, budget: int, max_bytes: int, seed: int, *, balanced: bool = False, per_class: int | None = None
    ) -> None:
        self.budget = budget
        self.max_bytes = max_bytes
        self.balanced = balanced
        self.per_class = per_class
        self.drawn = 0
        self.evicted = 0
        self.samples_by_task: dict[int, StoredSamples] = {}
        self._all: StoredSamples = {}  # the samples of all tasks, concatenated, and their tasks
        self._generator = seeded_generator(seed, "memory")

    def __len__(self) -> int:
        return sum(len(samples["y"]) for samples in self.samples_by_task.values())

    @property
    def num_bytes(self) -> int:
        """Size of the stored samples in bytes."""
        return sum(num_bytes_of(samples) for samples in self.samples_by_task.values())

    def store(self, task: int, x: Tensor, y: Tensor, classes: Classes = (), **more: Tensor) -> None:
        """Store an ended task's samples in random order, and reduce every task to its new share.

        `x [n, ...]`, `y [n]` and the further values, `[n, ...]` each, are on the host. `classes` maps the outputs of each
        task to labels; without it every output is a class. Raises `StreamlearnError` when `ALL` samples exceed `max_bytes`.
        """
        if not len(y):
            return
        order = torch.randperm(len(y), generator=self._generator)
        self.samples_by_task[task] = {name: value[order].clone() for name, value in {"x": x, "y": y, **more}.items()}
        affordable = self.max_bytes // max(1, sum(value[0].nbytes for value in self.samples_by_task[task].values()))
        if self.budget == ALL:
            if len(self) > affordable:
                raise StreamlearnError(
                    f"memory.max_bytes: {self.max_bytes} bytes hold only {affordable} samples, and the strategy must keep "
                    f"{len(self)}; raise memory.max_bytes"
                )
        else:
            self._share(min(self.budget, affordable), classes)
        self._gather()

    def draw(self, count: int) -> StoredSamples:
        """Draw `count` stored samples uniformly, with replacement: their `x`, `y`, `task`, and the further values stored."""
        indices = torch.randint(len(self._all["y"]), (count,), generator=self._generator)
        self.drawn += count
        return {name: value[indices] for name, value in self._all.items()}

    def usage(self) -> dict[str, Any]:
        """Return the numbers for metrics: samples by task, capacity (None: no limit), bytes, drawn and evicted samples."""
        return {
            "samples": {task: len(samples["y"]) for task, samples in self.samples_by_task.items()},
            "capacity": self.budget if self.budget > 0 else None,
            "bytes": self.num_bytes,
            "drawn": self.drawn,
            "evicted": self.evicted,
        }

    def widen(self, name: str, size: int, value: float) -> None:
        """Widen the stored values `[n, c]` of this name to `size` columns; fill the new columns with `value`."""
        for samples in self.samples_by_task.values():
            samples[name] = functional.pad(samples[name], (0, size - samples[name].shape[1]), value=value)
        self._gather()

    def state_dict(self) -> State:
        """Return the state as tensors and JSON values."""
        # the name says how many samples and bytes: a task whose samples were evicted or widened gets another file
        slots = {
            f"{task}-{len(samples['y'])}-{num_bytes_of(samples)}": Immutable(samples)
            for task, samples in self.samples_by_task.items()
        }
        return {"slots": slots, "drawn": self.drawn, "evicted": self.evicted, "generator": self._generator.get_state()}

    def load_state_dict(self, state: State) -> None:
        """Restore what `state_dict` returned."""
        by_task = {int(name.split("-")[0]): dict(samples) for name, samples in state["slots"].items()}
        self.samples_by_task = dict(sorted(by_task.items()))  # the order decides which sample a draw returns
        self.drawn, self.evicted = state["drawn"], state["evicted"]
        self._generator.set_state(state["generator"])
        self._gather()

    def _share(self, room: int, classes: Classes) -> None:
        """Reduce every task to its share of `room` samples: the first ones of its random order.

        A group is a class if `balanced`, else a task. All groups get an equal share; what one does not need goes to the
        others. If `room` is smaller than the number of groups, only the newest groups keep a sample.
        """
        groups: dict[Label, dict[tuple[int, int], Tensor]] = {}  # group -> (task, output) -> mask of its samples there
        for task, samples in sorted(self.samples_by_task.items()):
            for output in samples["y"].unique().tolist() if self.balanced else [0]:
                rows = samples["y"] == output if self.balanced else torch.ones(len(samples["y"]), dtype=torch.bool)
                name = (classes[task].get(output, output) if classes else output) if self.balanced else task
                # a group that comes in a newer task moves to the end: the oldest groups are the first to lose all samples
                groups[name] = {**groups.pop(name, {}), (task, output): rows}
        most = self.per_class or room
        sizes = {name: {key: int(rows.sum()) for key, rows in group.items()} for name, group in groups.items()}
        share = min(fair_share([min(sum(size.values()), most) for size in sizes.values()], room), most)
        dropped = list(groups)[: len(groups) - room] if share == 0 else []
        kept = {
            task: torch.zeros(len(samples["y"]), dtype=torch.bool) for task, samples in self.samples_by_task.items()
        }
        for name, group in groups.items():
            quotas = split_fairly(sizes[name], 0 if name in dropped else max(share, 1))
            for (task, output), rows in group.items():
                kept[task] |= rows & (rows.cumsum(0) <= quotas[task, output])
        self._evict(kept)

    def _evict(self, kept: dict[int, Tensor]) -> None:
        """Remove the samples that are not in the masks `kept`, `[n]` for each task."""
        for task, mask in kept.items():
            if not bool(mask.all()):
                self.evicted += int((~mask).sum())
                self.samples_by_task[task] = {
                    name: value[mask].clone() for name, value in self.samples_by_task[task].items()
                }

    def _gather(self) -> None:
        """Concatenate the samples of all tasks, so that one index chooses a sample; each task's samples become views."""
        self._all = {}
        if not self.samples_by_task:
            return
        sizes = [len(samples["y"]) for samples in self.samples_by_task.values()]
        for name in next(iter(self.samples_by_task.values())):
            values = [samples[name] for samples in self.samples_by_task.values()]
            self._all[name] = joined = torch.cat(values)
            for samples, part in zip(self.samples_by_task.values(), joined.split(sizes), strict=True):
                samples[name] = part
        self._all["task"] = torch.repeat_interleave(torch.tensor(list(self.samples_by_task)), torch.tensor(sizes))


def num_bytes_of(samples: StoredSamples) -> int:
    """Return the size of stored samples in bytes."""
    return sum(value.nbytes for value in samples.values())


def rank_in_class(y: Tensor) -> Tensor:
    """Return each sample's rank among the samples of its class in `y [n]`, from 0: `[n]`."""
    rank = torch.empty_like(y)
    for label in y.unique().tolist():
        rows = y == label
        rank[rows] = torch.arange(int(rows.sum()))
    return rank


def fair_share(sizes: Sequence[int], room: int) -> int:
    """Return the largest share for which the sum of all `min(size, share)` is at most `room`."""
    for number, size in enumerate(sorted(sizes)):
        share = room // (len(sizes) - number)
        if size > share:
            return share
        room -= size
    return max(sizes, default=0)


def split_fairly(sizes: Mapping[tuple[int, int], int], room: int) -> dict[tuple[int, int], int]:
    """Return how many samples each key keeps: as equal as possible, at most `room` in total; the last get the remainder."""
    share = fair_share(list(sizes.values()), room)
    parts = {key: min(size, share) for key, size in sizes.items()}
    left = room - sum(parts.values())
    for key in reversed(list(sizes)):
        if left > 0 and parts[key] < sizes[key]:
            parts[key] += 1
            left -= 1
    return parts
