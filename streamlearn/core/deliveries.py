"""Deliveries: what the reader hands to the loop, one for each turn."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from streamlearn.core.positions import Partition, Positions
from streamlearn.core.tasks import TaskEndReason

if TYPE_CHECKING:
    from collections.abc import Mapping

    from streamlearn.core.labels import Label
    from streamlearn.core.samples import Batch, HeldOut, Outcome
    from streamlearn.core.tasks import Task


@dataclass
class Observations:
    """What the reader observed while it collected a batch. It takes effect when that batch is learned, never earlier."""

    consumed: Counter[str] = field(default_factory=Counter)  # samples, by topic
    outcomes: Counter[tuple[str, Outcome]] = field(default_factory=Counter)  # samples, by topic; never TRAINED
    rejected: Counter[tuple[str, str]] = field(default_factory=Counter)  # samples, by (topic, reason)
    records: Counter[Partition] = field(default_factory=Counter)
    num_bytes: Counter[str] = field(default_factory=Counter)  # of keys and values, by topic
    lost_offsets: Counter[tuple[str, str]] = field(default_factory=Counter)  # by (topic, reason)
    held_out: list[HeldOut] = field(default_factory=list)
    # (task index, label), at its first sample in a task
    new_labels: list[tuple[int, Label]] = field(default_factory=list)
    new_words: list[str] = field(default_factory=list)  # new in the vocabulary, in order of first appearance
    new_probe_labels: list[Label] = field(default_factory=list)  # of held-out samples; not in a trained sample so far
    new_probe_words: list[str] = field(default_factory=list)  # of held-out texts; no trained text had them so far
    task_end_markers: list[Partition] = field(default_factory=list)  # partitions in which a task-end marker was read

    def __bool__(self) -> bool:
        return bool(self.consumed or self.records or self.lost_offsets)


@dataclass(frozen=True)
class Delivery:
    """What one turn of the loop applies: everything between two sets of positions, in the order of these fields."""

    positions: Positions = field(default_factory=Positions)
    observations: Observations = field(default_factory=Observations)
    new_task: Task | None = None  # a task that begins with this delivery
    batch: Batch | None = None
    end_offsets: Mapping[int, int] | None = None  # of the current task, by partition, if they are fixed now
    fixed_by: TaskEndReason = TaskEndReason.NEXT_TOPIC  # what fixed the end offsets
    forgives_below: Mapping[int, int] | None = None  # the new value of `Task.forgiven_below`
    task_end_reason: TaskEndReason | None = None  # if the current task ends now
    newest_timestamp: float | None = None  # of the newest record in this delivery, Unix seconds
