"""Samples kept: a reservoir of the current task, and an episodic memory of past ones. Both keep the dtype they arrived in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from streamlearn.data import StreamlearnError
from streamlearn.tensors import seeded

State = dict[str, Any]

ALL = -1
"""A number of samples that stands for every one."""


class Immutable(dict[str, Tensor]):
    """Tensors that never change under this name: a checkpoint links them to the previous one instead of writing them."""


class Reservoir:
    """A uniform sample of the current task (Vitter 1985, algorithm R), of `capacity` samples, or `ALL`.

    Kept on the host, where two insertions into one place have an order.
    """

    def __init__(self, capacity: int, max_bytes: int, seed: int) -> None:
        self.capacity = capacity
        self.max_bytes = max_bytes
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
        room = len(y) if self.capacity == ALL else min(self.capacity - self._size, len(y))
        if room > 0:
            self._append(x[:room], y[:room])
        self.seen += max(room, 0)
        for index in range(max(room, 0), len(y)):
            self.seen += 1
            place = int(torch.randint(self.seen, (1,), generator=self._generator))
            if place < self.capacity:
                self._x[place], self._y[place] = x[index], y[index]

    def clear(self) -> None:
        """Forget the task; the stream of random numbers goes on."""
        self.seen = self._size = 0
        self.sealed = False
        self._x, self._y = torch.empty(0), torch.empty(0, dtype=torch.int64)

    def state_dict(self) -> State:
        return {
            "x": self.x,
            "y": self.y,
            "seen": self.seen,
            "sealed": self.sealed,
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: State) -> None:
        self._x, self._y = state["x"].clone(), state["y"].clone()
        self._size = len(self._y)
        self.seen, self.sealed = state["seen"], state["sealed"]
        self._generator.set_state(state["generator"])

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
    """Samples of past tasks, at most `budget` in all (or `ALL`) and `max_bytes`, shared equally; drawn by index."""

    def __init__(self, budget: int, max_bytes: int, seed: int) -> None:
        self.budget = budget
        self.max_bytes = max_bytes
        self.drawn = 0
        self.evicted = 0
        self.slots: dict[int, tuple[Tensor, Tensor]] = {}  # task -> x [n, ...], y [n]
        self._generator = seeded(seed, "memory")

    def __len__(self) -> int:
        return sum(len(y) for _, y in self.slots.values())

    @property
    def num_bytes(self) -> int:
        """Bytes of the stored samples."""
        return sum(x.nbytes + y.nbytes for x, y in self.slots.values())

    def store(self, task: int, x: Tensor, y: Tensor) -> None:
        """Keep a finished task's samples in random order, and cut every slot to its new share.

        Raises `StreamlearnError` when `ALL` samples no longer fit `max_bytes`.
        """
        if not len(y):
            return
        order = torch.randperm(len(y), generator=self._generator)
        self.slots[task] = (x[order].clone(), y[order].clone())
        affordable = self.max_bytes // max(1, x[0].nbytes + y[0].nbytes)
        if self.budget == ALL:
            if len(self) > affordable:
                raise StreamlearnError(
                    f"memory.max_bytes: {self.max_bytes} bytes hold {affordable} samples; joint training has {len(self)}"
                )
            return
        share = min(self.budget, affordable) // len(self.slots)
        for index, (slot_x, slot_y) in self.slots.items():
            if len(slot_y) > share:
                self.evicted += len(slot_y) - share
                self.slots[index] = (slot_x[:share].clone(), slot_y[:share].clone())

    def draw(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return `count` stored samples with replacement, each equally likely: x, y and their tasks."""
        sizes = torch.tensor([len(y) for _, y in self.slots.values()])
        chosen = torch.randint(int(sizes.sum()), (count,), generator=self._generator)
        bounds = torch.cumsum(sizes, 0)
        place = torch.searchsorted(bounds, chosen, right=True)
        within = chosen - (bounds - sizes)[place]
        x0, y0 = next(iter(self.slots.values()))
        x = torch.empty((count, *x0.shape[1:]), dtype=x0.dtype)
        y = torch.empty(count, dtype=y0.dtype)
        for number, (slot_x, slot_y) in enumerate(self.slots.values()):
            rows = place == number
            x[rows], y[rows] = slot_x[within[rows]], slot_y[within[rows]]
        self.drawn += count
        return x, y, torch.tensor(list(self.slots))[place]

    def state_dict(self) -> State:
        slots = {f"{task}-{len(y)}": Immutable(x=x, y=y) for task, (x, y) in self.slots.items()}
        return {"slots": slots, "drawn": self.drawn, "evicted": self.evicted, "generator": self._generator.get_state()}

    def load_state_dict(self, state: State) -> None:
        self.slots = {int(name.split("-")[0]): (slot["x"], slot["y"]) for name, slot in state["slots"].items()}
        self.drawn, self.evicted = state["drawn"], state["evicted"]
        self._generator.set_state(state["generator"])
