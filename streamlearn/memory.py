"""Samples kept: a reservoir of the current task, and an episodic memory of past ones. Both keep the dtype they arrived in."""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from streamlearn.data import Label, StreamlearnError
from streamlearn.tensors import seeded

State = dict[str, Any]
StoredSamples = dict[str, Tensor]  # values of stored samples, each [n, ...]
Classes = Sequence[Mapping[int, Label]]  # of each task: the label of each output

ALL = -1
"""A number of samples that stands for every one."""


class Immutable(dict[str, Tensor]):
    """Tensors that never change under this name: a checkpoint links them to the previous one instead of writing them."""


class Reservoir:
    """A uniform sample of the current task (Vitter 1985, algorithm R), of `capacity` samples, or `ALL`.

    `balanced`: uniform within each class, and the classes as equal as what has come allows (Chrysakis & Moens 2020, algorithm
    1). Kept on the host, where two insertions into one place have an order.
    """

    def __init__(self, capacity: int, max_bytes: int, seed: int, *, balanced: bool = False) -> None:
        self.capacity = capacity
        self.max_bytes = max_bytes
        self.balanced = balanced
        self._met: Counter[int] = Counter()  # samples seen of each class, where balanced
        self._full: set[int] = set()  # classes that were the largest once
        self._places: dict[int, list[int]] = {}  # where the samples of each class are, once all places are taken
        self.seen = 0
        self.sealed = False
        self._size = 0
        self._x = torch.empty(0)
        self._y = torch.empty(0, dtype=torch.int64)
        self._generator = seeded(seed, "reservoir")

    def __len__(self) -> int:
        return self._size

    @property
    def x(self) -> Tensor:
        """The samples, `[n, ...]`, as they arrived."""
        return self._x[: self._size]

    @property
    def y(self) -> Tensor:
        """Their output indices, `[n]`."""
        return self._y[: self._size]

    def add(self, x: Tensor, y: Tensor) -> None:
        """Offer samples; ignored while sealed. Raises `StreamlearnError` when `ALL` no longer fits `max_bytes`."""
        if self.capacity == 0 or self.sealed:
            return
        room = len(y) if self.capacity == ALL else max(0, min(self.capacity - self._size, len(y)))
        if room > 0:
            self._append(x[:room], y[:room])
        rest = torch.arange(room, len(y))
        # of two insertions into one place the later stays; written together, their order would be undefined
        if self.balanced:
            self._met.update(y[:room].tolist())
            taken = self._balance(room, y[room:].tolist())
        else:
            draws = torch.rand(len(rest), generator=self._generator, dtype=torch.float64)
            places = (draws * (self.seen + rest + 1)).long().tolist()
            taken = {place: room + number for number, place in enumerate(places) if place < self.capacity}
        self.seen += len(y)
        if taken:
            into, index = torch.tensor(list(taken)), torch.tensor(list(taken.values()))
            self._x[into], self._y[into] = x[index], y[index]

    def clear(self) -> None:
        """Forget the task; the stream of random numbers goes on."""
        self.seen = self._size = 0
        self.sealed = False
        self._met.clear()
        self._full.clear()
        self._places = {}
        self._x, self._y = torch.empty(0), torch.empty(0, dtype=torch.int64)

    def state_dict(self) -> State:
        return {
            "x": self.x,
            "y": self.y,
            "seen": self.seen,
            "sealed": self.sealed,
            "met": {str(label): count for label, count in self._met.items()},
            "full": sorted(self._full),
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: State) -> None:
        self._x, self._y = state["x"].clone(), state["y"].clone()
        self._met = Counter({int(label): count for label, count in state.get("met", {}).items()})
        self._full = set(state.get("full", []))
        if self.balanced and "met" not in state:  # of a version whose reservoirs were uniform: what it saw is estimated
            self._met = Counter(self._y.tolist())
            if state["seen"] > len(self._y):
                self._full = set(self._met)
                self._met = Counter({y: round(n * state["seen"] / len(self._y)) for y, n in self._met.items()})
        self._places = {}
        self._size = len(self._y)
        self.seen, self.sealed = state["seen"], state["sealed"]
        self._generator.set_state(state["generator"])

    def _balance(self, first: int, labels: Sequence[int]) -> dict[int, int]:
        """Return which of the samples from number `first` on go into which places, all of which are taken."""
        if not labels:
            return {}
        if not (places := self._places):
            for place, label in enumerate(self.y.tolist()):
                places.setdefault(label, []).append(place)
        largest = self._largest()
        draws = torch.rand(len(labels), 2, generator=self._generator, dtype=torch.float64).tolist()
        taken = {}
        for number, (label, (chance, where)) in enumerate(zip(labels, draws, strict=True), first):
            self._met[label] += 1
            if label not in self._full:  # it grows, and the largest shrinks
                place = places[largest].pop(int(where * len(places[largest])))
                bisect.insort(places.setdefault(label, []), place)  # in order, as after a restart
                largest = self._largest()
            elif chance * self._met[label] <= len(places[label]):
                place = places[label][int(where * len(places[label]))]
            else:
                continue
            taken[place] = number
        return taken

    def _largest(self) -> int:
        """Return the class that has the most places, and note all that have as many."""
        most = max(map(len, self._places.values()))
        largest = [label for label, rows in self._places.items() if len(rows) == most]
        self._full.update(largest)
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
                    f"memory.max_bytes: {self.max_bytes} bytes hold {self.max_bytes // per_sample} samples of the current "
                    f"task, and the strategy needs more"
                )
            grown_x = torch.empty((size, *x.shape[1:]), dtype=x.dtype)
            grown_y = torch.empty(size, dtype=torch.int64)
            if self._size:
                grown_x[: self._size], grown_y[: self._size] = self.x, self.y
            self._x, self._y = grown_x, grown_y
        self._x[self._size : needed], self._y[self._size : needed] = x, y
        self._size = needed


class EpisodicMemory:
    """Samples of past tasks, at most `budget` in all (or `ALL`) and `max_bytes`; drawn by index, at a cost that does not grow.

    `balanced` shares the budget equally over the classes (a class is a label, in however many tasks it came), at most
    `per_class` each, and a class's part over its tasks; otherwise the tasks share it, and within a task every sample is as
    likely to be kept. Where one has fewer than its share, the others have more.
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
        self.samples_by_task: dict[int, StoredSamples] = {}  # by task
        self._all: StoredSamples = {}  # every slot's samples, one after the other, with their tasks
        self._generator = seeded(seed, "memory")

    def __len__(self) -> int:
        return sum(len(slot["y"]) for slot in self.samples_by_task.values())

    @property
    def num_bytes(self) -> int:
        """Bytes of the stored samples."""
        return sum(num_bytes_of(slot) for slot in self.samples_by_task.values())

    def store(self, task: int, x: Tensor, y: Tensor, classes: Classes = (), **more: Tensor) -> None:
        """Keep a finished task's samples in random order, and cut every slot to its new share.

        `x [n, ...]`, `y [n]`, and more values for each sample, `[n, ...]`, all on the host. `classes` gives the label of
        each output of each task; without it an output is a class. Raises `StreamlearnError` when `ALL` samples no longer
        fit `max_bytes`.
        """
        if not len(y):
            return
        order = torch.randperm(len(y), generator=self._generator)
        self.samples_by_task[task] = {name: value[order].clone() for name, value in {"x": x, "y": y, **more}.items()}
        affordable = self.max_bytes // max(1, sum(value[0].nbytes for value in self.samples_by_task[task].values()))
        if self.budget == ALL:
            if len(self) > affordable:
                raise StreamlearnError(
                    f"memory.max_bytes: {self.max_bytes} bytes hold {affordable} samples; the strategy has {len(self)} to keep"
                )
        else:
            self._share(min(self.budget, affordable), classes)
        self._gather()

    def draw(self, count: int) -> StoredSamples:
        """Return `count` stored samples with replacement, each equally likely: `x`, `y`, their `task`, and whatever more."""
        chosen = torch.randint(len(self._all["y"]), (count,), generator=self._generator)
        self.drawn += count
        return {name: value[chosen] for name, value in self._all.items()}

    def usage(self) -> dict[str, Any]:
        """Return what metrics show: samples by task, capacity (None: no bound), bytes, drawn and evicted."""
        return {
            "samples": {task: len(slot["y"]) for task, slot in self.samples_by_task.items()},
            "capacity": self.budget if self.budget > 0 else None,
            "bytes": self.num_bytes,
            "drawn": self.drawn,
            "evicted": self.evicted,
        }

    def widen(self, name: str, size: int, value: float) -> None:
        """Give stored values `[n, c]` of this name `size` columns, the new ones filled with `value`."""
        for slot in self.samples_by_task.values():
            slot[name] = functional.pad(slot[name], (0, size - slot[name].shape[1]), value=value)
        self._gather()

    def state_dict(self) -> State:
        # a name for each content: a slot that was cut, or whose values got wider, is another file
        named = {f"{task}-{len(slot['y'])}-{num_bytes_of(slot)}": slot for task, slot in self.samples_by_task.items()}
        slots = {name: Immutable(slot) for name, slot in named.items()}
        return {"slots": slots, "drawn": self.drawn, "evicted": self.evicted, "generator": self._generator.get_state()}

    def load_state_dict(self, state: State) -> None:
        slots = {int(name.split("-")[0]): dict(slot) for name, slot in state["slots"].items()}
        self.samples_by_task = dict(sorted(slots.items()))  # as they were stored, or a draw would mean another sample
        self.drawn, self.evicted = state["drawn"], state["evicted"]
        self._generator.set_state(state["generator"])
        self._gather()

    def _share(self, room: int, classes: Classes) -> None:
        """Cut every slot to its share of `room` samples: the first of its random order.

        Balanced, the classes share the room equally, and the tasks in which a class came share its part; else the tasks
        share the room. What a small one leaves goes to the others; where there is not one sample for each, the newest
        have one.
        """
        groups: dict[Label, dict[tuple[int, int], Tensor]] = {}  # of a class, or a task: its rows in each task's slot
        for task, slot in sorted(self.samples_by_task.items()):
            for output in slot["y"].unique().tolist() if self.balanced else [0]:
                rows = slot["y"] == output if self.balanced else torch.ones(len(slot["y"]), dtype=torch.bool)
                name = (classes[task].get(output, output) if classes else output) if self.balanced else task
                # what came in a newer task goes behind: the oldest are the first to have none
                groups[name] = {**groups.pop(name, {}), (task, output): rows}
        most = self.per_class or room
        sizes = {name: {place: int(rows.sum()) for place, rows in group.items()} for name, group in groups.items()}
        share = min(fair_share([min(sum(size.values()), most) for size in sizes.values()], room), most)
        poor = list(groups)[: len(groups) - room] if share == 0 else []
        kept = {task: torch.zeros(len(slot["y"]), dtype=torch.bool) for task, slot in self.samples_by_task.items()}
        for name, group in groups.items():
            quotas = split_fairly(sizes[name], 0 if name in poor else max(share, 1))
            for (task, output), rows in group.items():
                kept[task] |= rows & (rows.cumsum(0) <= quotas[task, output])
        self._cut(kept)

    def _cut(self, kept: dict[int, Tensor]) -> None:
        for task, mask in kept.items():
            if not bool(mask.all()):
                self.evicted += int((~mask).sum())
                self.samples_by_task[task] = {
                    name: value[mask].clone() for name, value in self.samples_by_task[task].items()
                }

    def _gather(self) -> None:
        """Lay all slots end to end, so that a draw is one index, however many tasks there are; slots become views of it."""
        self._all = {}
        if not self.samples_by_task:
            return
        sizes = [len(slot["y"]) for slot in self.samples_by_task.values()]
        for name in next(iter(self.samples_by_task.values())):
            values = [slot[name] for slot in self.samples_by_task.values()]
            self._all[name] = joined = torch.cat(values)
            for slot, part in zip(self.samples_by_task.values(), joined.split(sizes), strict=True):
                slot[name] = part
        self._all["task"] = torch.repeat_interleave(torch.tensor(list(self.samples_by_task)), torch.tensor(sizes))


def num_bytes_of(slot: StoredSamples) -> int:
    """Return the bytes of stored samples."""
    return sum(value.nbytes for value in slot.values())


def place_in_class(y: Tensor) -> Tensor:
    """Return each sample's place among those of its class, `[n]`, from 0."""
    place = torch.empty_like(y)
    for label in y.unique().tolist():
        rows = y == label
        place[rows] = torch.arange(int(rows.sum()))
    return place


def fair_share(sizes: Sequence[int], room: int) -> int:
    """Return the largest share for which all, each cut to it, fit into `room`."""
    for number, size in enumerate(sorted(sizes)):
        share = room // (len(sizes) - number)
        if size > share:
            return share
        room -= size
    return max(sizes, default=0)


def split_fairly(sizes: Mapping[tuple[int, int], int], room: int) -> dict[tuple[int, int], int]:
    """Return how many each may keep, at most `room` in all and as equal as they can be; the last have what is left over."""
    share = fair_share(list(sizes.values()), room)
    parts = {key: min(size, share) for key, size in sizes.items()}
    left = room - sum(parts.values())
    for key in reversed(list(sizes)):
        if left > 0 and parts[key] < sizes[key]:
            parts[key] += 1
            left -= 1
    return parts
