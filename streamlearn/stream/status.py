"""What the reader thread knows about its log, for status and metrics."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from streamlearn.core.positions import Partition, Position


@dataclass
class StreamStatus:
    """What the reader knows about its log, for status and metrics. Only the reader thread writes it."""

    connected: bool = False
    last_contact: float | None = None  # Unix seconds
    last_contact_monotonic: float | None = None  # the same on the monotonic clock, which never jumps
    begin_offsets: dict[Partition, int] = field(default_factory=dict)  # of the first records that are kept
    end_offsets: dict[Partition, int] = field(default_factory=dict)  # log end offsets; empty while no broker answers
    next_offsets: dict[Partition, int] = field(default_factory=dict)  # of the next records to be read
    # number of offsets that cannot be read yet because of an open transaction
    behind_open_transaction: dict[Partition, int] = field(default_factory=dict)
    num_assigned: int = 0  # partitions
    paused: bool = False  # because the queue is full
    problem: str | None = None  # why reading has stopped
    stopped_by_burst: bool = False  # until `StreamReader.resume_after_burst`
    waiting_for: str | None = None  # the topic, or the pattern of topics, of the next task

    def lag(self, applied: Mapping[Partition, Position]) -> dict[Partition, int]:
        """Return the number of offsets between the applied position (at first: the log's beginning) and the log's end."""
        begins = self.begin_offsets
        return {
            partition: max(0, end - (applied[partition].offset if partition in applied else begins.get(partition, 0)))
            for partition, end in self.end_offsets.items()
        }

    def unread(self) -> dict[Partition, int]:
        """Return the number of offsets between the next offset to be read and the log's end."""
        begins, nexts = self.begin_offsets, self.next_offsets
        return {
            partition: max(0, end - nexts.get(partition, begins.get(partition, 0)))
            for partition, end in self.end_offsets.items()
        }
