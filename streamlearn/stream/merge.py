"""Several partitions in one order that the log alone decides, so that a restart meets the records in that order again."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

    from streamlearn.data import Partition
    from streamlearn.stream.log import Record

MOST_RECORDS = 1000  # that a partition may have waiting for the others
MOST_BYTES = 16 << 20


class PartitionMerge:
    """Records in order of offset, then partition: each waits until no other partition can still have one before it."""

    def __init__(self) -> None:
        self._waiting: dict[Partition, deque[Record]] = {}
        self._bytes: dict[Partition, int] = {}

    def __bool__(self) -> bool:
        return any(self._waiting.values())

    def add(self, records: Sequence[Record]) -> None:
        """Take records as they were polled, in order in each partition."""
        for record in records:
            place = (record.topic, record.partition)
            self._waiting.setdefault(place, deque()).append(record)
            self._bytes[place] = self._bytes.get(place, 0) + len(record.value or b"")

    def ready(self, awaited: Collection[Partition], position: Callable[[Partition], int]) -> Iterator[Record]:
        """Give out, one after the other, the records whose turn has come.

        `awaited`: the partitions that may have more; `position`: the next offset that will be read from one. Where nothing is
        awaited, everything is given out.
        """
        while heads := [(queue[0].offset, place) for place, queue in self._waiting.items() if queue]:
            offset, place = first = min(heads)
            if any((position(p), p) < first for p in awaited if not self._waiting.get(p)):
                return
            record = self._waiting[place].popleft()
            assert record.offset == offset
            self._bytes[place] -= len(record.value or b"")
            yield record

    @property
    def full(self) -> set[Partition]:
        """The partitions that have more waiting than they should."""
        return {
            place
            for place, queue in self._waiting.items()
            if len(queue) >= MOST_RECORDS or self._bytes[place] >= MOST_BYTES
        }

    def clear(self) -> None:
        """Forget what waits: it will be read again."""
        self._waiting.clear()
        self._bytes.clear()
