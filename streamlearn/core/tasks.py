"""Tasks: what is learned, one after another."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from streamlearn.core.labels import Label, Labels
from streamlearn.older_keys import update_task_keys

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass
class Task:
    """One task: what is learned from one topic, from its first sample to its end."""

    index: int
    name: str
    state: str = "active"  # active | refining | ended
    labels: list[Label] = field(default_factory=list)  # declared, or in order of first appearance in training
    counts: Counter[str] = field(default_factory=Counter)  # consumed, and every outcome except late
    end_offsets: dict[int, int] | None = None  # by partition; None until they are fixed
    fixed_by: str = "next_topic"  # what fixed the end offsets: next_topic | command
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
            tree["state"],
            tree["labels"],
            Counter(tree["counts"]),
            None if ends is None else {int(p): end for p, end in ends.items()},
            tree.get("fixed_by", "next_topic"),
            tree.get("marked", []),
            {int(p): offset for p, offset in tree.get("forgiven_below", {}).items()},
        )
