"""Places in the stream: what was learned, and what comes next, in every partition."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from streamlearn.core.errors import StreamlearnError

if TYPE_CHECKING:
    from collections.abc import Mapping

Partition = tuple[str, int]


@dataclass(frozen=True, slots=True, order=True)
class Position:
    """A place in a partition: the next record, and how many of its first samples are already done.

    A sample is done when it has an outcome, whichever it is.
    """

    offset: int
    skip: int = 0


@dataclass(frozen=True)
class Positions:
    """The position of learning in every partition; immutable, and never moved backwards.

    `topic_ids` and `cluster_id` show whether a topic was deleted and created again under the same name.
    """

    by_partition: Mapping[Partition, Position] = field(default_factory=dict)
    topic_ids: Mapping[str, str] = field(default_factory=dict)
    cluster_id: str | None = None

    def advance(self, later: Positions) -> Positions:
        """Return these positions, updated by `later`; raises `StreamlearnError` if one would go backwards."""
        for partition, position in later.by_partition.items():
            if (known := self.by_partition.get(partition)) is not None and position < known:
                raise StreamlearnError(
                    f"{partition[0]}[{partition[1]}]: position would go back from {known} to {position}"
                )
        return Positions(
            {**self.by_partition, **later.by_partition},
            {**self.topic_ids, **later.topic_ids},
            later.cluster_id or self.cluster_id,
        )

    def by_topic(self) -> dict[str, dict[str, int]]:
        """Return `{topic: {partition: next_offset}}`, as the status shows it."""
        tree: dict[str, dict[str, int]] = {}
        for (topic, partition), position in sorted(self.by_partition.items()):
            tree.setdefault(topic, {})[str(partition)] = position.offset
        return tree

    def to_json(self) -> dict[str, Any]:
        """Return a JSON tree from which `from_json` makes equal positions."""
        topics: dict[str, Any] = {}
        for (topic, partition), position in sorted(self.by_partition.items()):
            entry = topics.setdefault(topic, {"topic_id": self.topic_ids.get(topic), "partitions": {}})
            entry["partitions"][str(partition)] = {"offset": position.offset, "skip": position.skip}
        return {"cluster_id": self.cluster_id, "topics": topics}

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> Positions:
        """Return the positions that `to_json` wrote."""
        by_partition = {
            (topic, int(partition)): Position(value["offset"], value["skip"])
            for topic, entry in tree["topics"].items()
            for partition, value in entry["partitions"].items()
        }
        ids = {topic: entry["topic_id"] for topic, entry in tree["topics"].items() if entry["topic_id"] is not None}
        return cls(by_partition, ids, tree["cluster_id"])
