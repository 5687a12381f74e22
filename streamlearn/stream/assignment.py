"""The partitions that are read: where reading continues in each, which are paused, and the order of their records."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

from streamlearn.stream.merge import PartitionMerge

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from streamlearn.core.positions import Partition
    from streamlearn.core.tasks import Task
    from streamlearn.stream.logs.base import LogReader, Record
    from streamlearn.stream.status import StreamStatus


class Assignment:
    """Tells the log what to read, and puts what it returns into order. Only the reader thread uses it.

    The next offsets of the assigned partitions are in `status.next_offsets`, where other threads see them too.
    """

    def __init__(self, log_reader: LogReader, status: StreamStatus, *, merged: bool) -> None:
        self.log_reader = log_reader
        self.status = status
        self.paused: set[Partition] = set()
        self._merge = PartitionMerge() if merged else None

    @property
    def has_waiting(self) -> bool:
        """Whether records wait in the merge."""
        return bool(self._merge)

    def set(self, offsets: Mapping[Partition, int]) -> None:
        """Read exactly these partitions; one that was not read before begins at its offset."""
        if set(offsets) != set(self.status.next_offsets):
            self.log_reader.assign(offsets)
            if self._merge is not None:
                self._merge.clear()  # reading starts at the offsets again
            self.status.next_offsets = {p: self.status.next_offsets.get(p, offset) for p, offset in offsets.items()}
        self.status.num_assigned = len(offsets)

    def reset(self) -> None:
        """Let the next call of `set` assign all partitions again, at its offsets."""
        self.status.next_offsets.clear()

    def restart(self, partition: Partition) -> None:
        """Let the next call of `set` assign all partitions again, because this one continues at another offset."""
        self.status.next_offsets.pop(partition, None)

    def advance(self, records: Iterable[Record]) -> None:
        """Move the next offsets past these records."""
        for record in records:
            self.status.next_offsets[record.topic, record.partition] = record.offset + 1

    def update_offsets(self) -> dict[Partition, int]:
        """Update the next offsets from the log, which also passes gaps that transactions and compaction leave; return them."""
        self.status.next_offsets = {p: self.log_reader.position(p) for p in self.status.next_offsets}
        return self.status.next_offsets

    def pause_or_resume(self, *, queue_full: bool) -> None:
        """Pause fetching from all partitions while the queue is full, or else from those with too many waiting records.

        Polling continues, to stay connected.
        """
        self.status.paused = queue_full
        to_pause = self._merge.full if self._merge is not None else set()
        if queue_full:
            to_pause = set(self.status.next_offsets)
        if to_pause != self.paused:
            self.log_reader.pause_partitions(to_pause)
            self.paused = to_pause

    def in_order(self, records: Sequence[Record], task: Task | None) -> Iterable[Record]:
        """Return the records to feed now: as they arrive, or merged in an order that depends on the log alone."""
        if self._merge is None or task is None:
            return records  # without a current task, all of them are late
        self._merge.add([record for record in records if record.topic == task.name])
        late = [record for record in records if record.topic != task.name]
        return chain(late, self._merge.pop_ready(self._unfinished_partitions(task), self.log_reader.position))

    def pop_waiting(self) -> Iterator[Record]:
        """Yield and remove all records that wait in the merge, when no other partition has more records for the task."""
        if self._merge is not None:
            yield from self._merge.pop_ready([], self.log_reader.position)

    def _unfinished_partitions(self, task: Task) -> list[Partition]:
        """Return the partitions of the current task that can still have records for it."""
        ends = task.end_offsets or {}
        return [
            (task.name, p)
            for name, p in self.status.next_offsets
            if name == task.name
            and p not in task.marked_partitions
            and (p not in ends or self.log_reader.position((name, p)) < ends[p])
        ]
