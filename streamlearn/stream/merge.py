"""Merge the records of several partitions into one order that depends on the log alone, so that a restart repeats it."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

    from streamlearn.core.positions import Partition
    from streamlearn.stream.logs.base import Record

MAX_RECORDS = 1000  # of one partition that wait for other partitions, before fetching from it is paused
MAX_BYTES = 16 << 20


class PartitionMerge:
    """Orders records by offset, then by partition. A record waits while another partition can still have an earlier one."""

    def __init__(self) -> None:
        self._waiting: dict[Partition, deque[Record]] = {}
        self._waiting_bytes: dict[Partition, int] = {}

    def __bool__(self) -> bool:
        return any(self._waiting.values())

    def add(self, records: Sequence[Record]) -> None:
        """Add polled records, which are in order within each partition."""
        for record in records:
            partition = (record.topic, record.partition)
            self._waiting.setdefault(partition, deque()).append(record)
            self._waiting_bytes[partition] = self._waiting_bytes.get(partition, 0) + len(record.value or b"")

    def pop_ready(self, awaited: Collection[Partition], position: Callable[[Partition], int]) -> Iterator[Record]:
        """Yield and remove, in order, the records before which no partition can have another one.

        `awaited` are the partitions that can have more records; `position` returns the next offset to be read from a
        partition. If `awaited` is empty, all records are ready.
        """
        while heads := [(queue[0].offset, partition) for partition, queue in self._waiting.items() if queue]:
            offset, partition = first = min(heads)
            if any((position(other), other) < first for other in awaited if not self._waiting.get(other)):
                return
            record = self._waiting[partition].popleft()
            assert record.offset == offset
            self._waiting_bytes[partition] -= len(record.value or b"")
            yield record

    @property
    def full(self) -> set[Partition]:
        """The partitions with so many waiting records that fetching from them must pause."""
        return {
            partition
            for partition, queue in self._waiting.items()
            if len(queue) >= MAX_RECORDS or self._waiting_bytes[partition] >= MAX_BYTES
        }

    def clear(self) -> None:
        """Discard the waiting records, because they will be read again."""
        self._waiting.clear()
        self._waiting_bytes.clear()
