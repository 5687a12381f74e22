"""Tasks: what is learned, one after another."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from streamlearn.core.labels import Label, Labels
from streamlearn.older_keys import update_task_keys

if TYPE_CHECKING:
    from collections.abc import Mapping


class TaskState(StrEnum):
    """How far a task is."""

    ACTIVE = "active"
    """Its samples are learned as they arrive."""

    REFINING = "refining"
    """Its last sample was learned. Some methods now train on stored samples of it."""

    ENDED = "ended"
    """Nothing more is learned of it."""


class TaskEndReason(StrEnum):
    """Why a task ends. `NEXT_TOPIC` and `COMMAND` are also what can fix its end offsets."""

    MARKER = "marker"
    """A task-end marker was read in every partition."""

    NEXT_TOPIC = "next_topic"
    """A later topic has samples."""

    COUNT = "count"
    """It has as many samples as `stream.task_end.records` says."""

    IDLE = "idle"
    """No record has arrived for `stream.task_end.idle` seconds."""

    COMMAND = "command"
    """A user has asked for it: `streamlearn task end`."""


@dataclass
class Task:
    """One task: what is learned from one topic, from its first sample to its end."""

    index: int
    name: str
    state: TaskState = TaskState.ACTIVE
    labels: list[Label] = field(default_factory=list)  # declared, or in order of first appearance in training
    counts: Counter[str] = field(default_factory=Counter)  # consumed, and every outcome except late
    end_offsets: dict[int, int] | None = None  # by partition; None until they are fixed
    fixed_by: TaskEndReason = TaskEndReason.NEXT_TOPIC  # what fixed the end offsets
    marked_partitions: list[int] = field(default_factory=list)  # partitions whose task-end marker was applied
    forgiven_below: dict[int, int] = field(default_factory=dict)  # rejects below these offsets start no further burst

    def __post_init__(self) -> None:
        self.labels = Labels(self.labels)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON tree from which `from_json` makes an equal task."""
        ends = None if self.end_offsets is None else {str(p): end for p, end in self.end_offsets.items()}
        forgiven = {str(p): offset for p, offset in self.forgiven_below.items()}
        return {
            "index": self.index,
            "name": self.name,
            "state": self.state,
            "labels": list(self.labels),
            "counts": dict(self.counts),
            "ends": ends,
            "fixed_by": self.fixed_by,
            "marked": self.marked_partitions,
            # version 0.1.0 refuses a task with a key that it does not know
            **({"forgiven_below": forgiven} if forgiven else {}),
        }

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> Task:
        """Return the task that `to_json` wrote."""
        tree = update_task_keys(tree)
        ends = tree["ends"]
        return cls(
            tree["index"],
            tree["name"],
            TaskState(tree["state"]),
            tree["labels"],
            Counter(tree["counts"]),
            None if ends is None else {int(p): end for p, end in ends.items()},
            TaskEndReason(tree.get("fixed_by", TaskEndReason.NEXT_TOPIC)),
            tree.get("marked", []),
            {int(p): offset for p, offset in tree.get("forgiven_below", {}).items()},
        )
