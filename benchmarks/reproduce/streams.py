"""Published tasks on topics in memory. Records are made when they are read, so repeated samples need no memory."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, cast, overload

import numpy as np

from benchmarks.common import DATA
from streamlearn.stream.codecs.registry import CODECS
from streamlearn.stream.logs.base import CONTENT_TYPE, Record
from streamlearn.stream.logs.memory import MemoryStore
from streamlearn.tools import producer
from streamlearn.tools.producer import PublishOptions, Samples

if TYPE_CHECKING:
    from collections.abc import Callable

DEGREES = 180.0
DIGITS = 10
PROBES_PER_RECORD = 1000


@dataclass(frozen=True)
class Curriculum:
    """The tasks, their order, and how often their samples are repeated."""

    tasks: str  # a key of TASKS
    count: int = 5
    distinct: int | None = None  # number of different samples of each task; None: all
    epochs: int = 1
    samples: int | None = None  # of each task, with repetitions; None: `epochs` times the different ones


@dataclass(frozen=True)
class TaskData:
    """A task's samples and its probe."""

    train: Samples
    probe: Samples


class RepeatedTopic(Sequence[Record]):
    """A topic's records: those of the probe, then `total` samples with a new order in every epoch, then the marker.

    It behaves as a list, but encodes each record when it is read: 256,000 samples of a task would be 200 MB.
    """

    def __init__(
        self, samples: Samples, *, total: int, size: int, seed: tuple[int, ...], head: Sequence[Record], tail: Record
    ) -> None:
        self.x, self.y = samples.x, np.asarray(samples.y)
        self.total = total
        self.size = size  # samples in a record
        self.seed = seed
        self.head = head
        self.middle = -(-total // size)
        self.tail = replace(tail, offset=len(head) + self.middle)
        self.created = time.time()
        self._orders: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return self.tail.offset + 1

    @overload
    def __getitem__(self, index: int) -> Record: ...

    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...

    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return [self._record(offset) for offset in range(*index.indices(len(self)))]
        return self._record(range(len(self))[index])

    def _record(self, offset: int) -> Record:
        if offset < len(self.head):
            return self.head[offset]
        if offset == self.tail.offset:
            return self.tail
        start = (offset - len(self.head)) * self.size
        chosen = self._chosen(start, min(start + self.size, self.total))
        value = CODECS["batch"].encode(self.x[chosen], self.y[chosen].tolist())
        headers = ((CONTENT_TYPE, CODECS["batch"].content_type),)
        return Record(self.tail.topic, self.tail.partition, offset, self.created, None, value, headers)

    def _chosen(self, start: int, stop: int) -> np.ndarray:
        """Return the samples at these positions of the endless sequence of epochs."""
        parts = []
        while start < stop:
            epoch, place = divmod(start, len(self.y))
            part = self._order(epoch)[place : place + stop - start]
            parts.append(part)
            start += len(part)
        return np.concatenate(parts)

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            if len(self._orders) > 1:  # a record has samples of two epochs at most, if epochs are longer than records
                del self._orders[min(self._orders)]
            self._orders[epoch] = np.random.default_rng([*self.seed, epoch]).permutation(len(self.y))
        return self._orders[epoch]


def topics(curriculum: Curriculum) -> list[str]:
    """Return the names of a curriculum's tasks."""
    if curriculum.tasks == "shuffled":
        return ["all"]
    return [f"{curriculum.tasks}-{n + 1}" for n in range(curriculum.count)]


def classes(curriculum: Curriculum, seed: int) -> list[list[int]]:
    """Return the digits of each task: two in order, two drawn by the seed (`drawn`; seed 0: in order), or all."""
    if curriculum.tasks not in {"split", "drawn"}:
        return [list(range(DIGITS)) for _ in topics(curriculum)]
    order = np.arange(DIGITS)
    if curriculum.tasks == "drawn" and seed:
        order = np.random.default_rng([seed, DIGITS]).permutation(DIGITS)
    return [order[2 * n : 2 * n + 2].tolist() for n in range(curriculum.count)]


def sizes(curriculum: Curriculum, task_data: Sequence[TaskData], scale: float) -> list[int]:
    """Return the number of samples of each task, with repetitions, multiplied by `scale` (1: the whole task)."""
    whole = [
        curriculum.epochs * len(data.train) if curriculum.samples is None else curriculum.samples for data in task_data
    ]
    return [max(1, round(scale * size)) for size in whole]


def publish(
    curriculum: Curriculum, task_data: Sequence[TaskData], *, per_record: int, seed: int, scale: float
) -> MemoryStore:
    """Return topics in memory that hold the curriculum."""
    store = MemoryStore()
    totals = sizes(curriculum, task_data, scale)
    for number, (topic, data, total) in enumerate(zip(topics(curriculum), task_data, totals, strict=True)):
        nothing = Samples(data.train.x[:0], [])
        producer.publish(store, topic, nothing, PublishOptions(samples_per_record=PROBES_PER_RECORD), probe=data.probe)
        *head, marker = store.records[topic, 0]
        records = RepeatedTopic(data.train, total=total, size=per_record, seed=(seed, number), head=head, tail=marker)
        store.records[topic, 0] = cast("list[Record]", records)  # no record is appended after this
    return store


def task_data(curriculum: Curriculum, seed: int) -> list[TaskData]:
    """Return the samples of each task. The seed decides which samples are used, and the angles of rotations."""
    return TASKS[curriculum.tasks](curriculum, seed)


@cache
def mnist(split: str) -> Samples:
    """Return MNIST with pixels 0 to 255."""
    return producer.read_samples(str(DATA / "mnist.npz"), split)


def _split(curriculum: Curriculum, seed: int) -> list[TaskData]:
    """Return tasks of two digits."""
    train, test = mnist("train"), mnist("test")
    groups = classes(curriculum, seed)
    parts = zip(producer.split_by_classes(train, groups), producer.split_by_classes(test, groups), strict=True)
    return [TaskData(_subset(part, curriculum.distinct, seed, n), probe) for n, (part, probe) in enumerate(parts)]


def _rotations(curriculum: Curriculum, seed: int) -> list[TaskData]:
    """Return tasks of all ten digits, each rotated by an angle from its part of 0 to 180 (Lopez-Paz & Ranzato 2017)."""
    width = DEGREES / curriculum.count
    angles = [width * (n + np.random.default_rng([seed, n]).uniform()) for n in range(curriculum.count)]
    chosen = [_subset(mnist("train"), curriculum.distinct, seed, n) for n in range(curriculum.count)]
    return [
        TaskData(Samples(producer.rotate_images(part.x, angle), part.y), _rotated_test(angle))
        for part, angle in zip(chosen, angles, strict=True)
    ]


def _permuted(curriculum: Curriculum, seed: int) -> list[TaskData]:
    """Return tasks of all ten digits, with permuted pixels except in the first task (Kirkpatrick et al. 2017)."""
    train = producer.make_permuted_tasks(mnist("train"), curriculum.count, seed)
    test = producer.make_permuted_tasks(mnist("test"), curriculum.count, seed)
    return [
        TaskData(_subset(part, curriculum.distinct, seed, n), probe)
        for n, (part, probe) in enumerate(zip(train, test, strict=True))
    ]


def _shuffled(curriculum: Curriculum, seed: int) -> list[TaskData]:
    """Return one task of all rotations. Its probe has all test sets; they have one size, so the mean is the same."""
    parts = _rotations(curriculum, seed)
    return [TaskData(_joined([part.train for part in parts]), _joined([part.probe for part in parts]))]


def _rotated_test(angle: float) -> Samples:
    test = mnist("test")
    return Samples(producer.rotate_images(test.x, angle), test.y)


def _joined(parts: Sequence[Samples]) -> Samples:
    return Samples(np.concatenate([part.x for part in parts]), [label for part in parts for label in part.y])


def _subset(samples: Samples, count: int | None, seed: int, task: int) -> Samples:
    if count is None or count >= len(samples):
        return samples
    return samples.select(np.random.default_rng([seed, task]).permutation(len(samples))[:count])


TASKS: dict[str, Callable[[Curriculum, int], list[TaskData]]] = {
    "split": _split,
    "drawn": _split,
    "rotations": _rotations,
    "permuted": _permuted,
    "shuffled": _shuffled,
}
