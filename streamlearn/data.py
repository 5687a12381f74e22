"""The data types that all layers share: labels, positions, batches, tasks, deliveries and progress."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from streamlearn.core.errors import StreamlearnError
from streamlearn.older_keys import update_task_keys

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from typing import SupportsIndex

    import numpy as np
    from torch import Tensor

Label = int | str
Partition = tuple[str, int]

TOPIC_NAME = re.compile(r"(?!\.{1,2}$)[a-zA-Z0-9._-]{1,249}")
"""A whole topic name that Kafka accepts."""

INTEGER = re.compile(r"0|-?[1-9][0-9]*")
"""A whole text that is an integer in its usual form: 007 and +7 are not."""

OUTCOMES = ("trained", "held_out", "late", "rejected", "duplicates", "skipped")
"""What can become of a consumed sample. Until then it is queued. The counts of all outcomes add up to the samples consumed."""

MAX_LABEL_BYTES = 256
"""The longest accepted label. Every checkpoint, every status and every status page contains all labels."""

CODEC_VERSION = 2
"""The version of the rules by which samples are decoded. A job keeps its first version, or its hold-out would change.

1: words of text without combining marks. 2: words with combining marks, in Unicode's form NFC.
"""

REJECT_REASONS = ("decode", "schema", "shape", "nonfinite", "label_range", "unknown_task", "oversize", "missing_label")
"""All reasons for which a sample can be rejected. The set is closed, because a metric has the reason as a label."""

DEAD_LETTER_REASONS = (*REJECT_REASONS, "late")
"""All reasons for which a sample can be in the dead-letter topic."""


class Rejected(Exception):  # noqa: N818 - an outcome, not a fault of the program
    """A sample cannot be used; `reason` is one of `DEAD_LETTER_REASONS`."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def parse_digits(text: str | bytes, max_digits: int) -> int | None:
    """Return a number that is written with at most `max_digits` of the digits 0 to 9 alone, or None for other text."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= max_digits else None


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


@dataclass(frozen=True)
class Batch:
    """The samples of one update.

    `x [B, ...]`: inputs, in the dtype in which they arrived, or as scaled floats.
    `y [B]`: output indices.
    `task [B]`: task indices, on the host, so that routing by task never waits for the device.
    `weight [B]`: each sample's share of the loss. None before the update has added the replayed samples, unless the replay
    weights its samples itself.
    `soft_targets [R, C]`: the targets of the last R samples. They are distributions at `temperature`, or logits if
    `targets_are_logits`: then -inf stands for an output for which there is no target.
    """

    x: Tensor
    y: Tensor
    task: Tensor
    weight: Tensor | None = None
    soft_targets: Tensor | None = None
    temperature: float = 1.0
    targets_are_logits: bool = False

    def __len__(self) -> int:
        return len(self.y)

    def with_replay(self, replayed: Batch | None, share: float) -> Batch:
        """Return these samples followed by the replayed ones. The replayed samples together have `share` of the loss."""
        import torch

        own = 1.0 if replayed is None else 1.0 - share
        weight = torch.full((len(self),), own / len(self), device=self.x.device)
        if replayed is None:
            return replace(self, weight=weight)
        replayed_weight = replayed.weight
        if replayed_weight is None:
            replayed_weight = torch.full((len(replayed),), share / len(replayed), device=self.x.device)
        return Batch(
            torch.cat([self.x, replayed.x]),
            torch.cat([self.y, replayed.y]),
            torch.cat([self.task, replayed.task]),
            torch.cat([weight, replayed_weight]),
            replayed.soft_targets,
            replayed.temperature,
            replayed.targets_are_logits,
        )

    def scale_weights(self, factor: float) -> Batch:
        """Return these samples with every weight multiplied by `factor`."""
        return self if factor == 1 or self.weight is None else replace(self, weight=self.weight * factor)


@dataclass(frozen=True)
class HeldOut:
    """Samples for a task's probe: `x [n, ...]` as they arrived, `y [n]` output indices.

    A label that no trained sample has had yet has no output. Then `y` is -1 minus the label's index in
    `Progress.probe_labels`. In a text, a word that no trained sample has had yet is stored in the same way: -1 minus the
    word's index in `Progress.probe_words`.
    """

    task: int
    x: np.ndarray
    y: np.ndarray


@dataclass
class Observations:
    """What the reader observed while it collected a batch. It takes effect when that batch is learned, never earlier."""

    consumed: Counter[str] = field(default_factory=Counter)  # samples, by topic
    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)  # samples, by (topic, outcome); never "trained"
    rejected: Counter[tuple[str, str]] = field(default_factory=Counter)  # samples, by (topic, reason)
    records: Counter[Partition] = field(default_factory=Counter)
    num_bytes: Counter[str] = field(default_factory=Counter)  # of keys and values, by topic
    lost_offsets: Counter[tuple[str, str]] = field(default_factory=Counter)  # by (topic, reason)
    held_out: list[HeldOut] = field(default_factory=list)
    new_labels: list[tuple[int, Label]] = field(
        default_factory=list
    )  # (task index, label), at its first sample in a task
    new_words: list[str] = field(default_factory=list)  # new in the vocabulary, in order of first appearance
    new_probe_labels: list[Label] = field(
        default_factory=list
    )  # of held-out samples; no trained sample had them so far
    new_probe_words: list[str] = field(default_factory=list)  # of held-out texts; no trained text had them so far
    task_end_markers: list[Partition] = field(default_factory=list)  # partitions in which a task-end marker was read

    def __bool__(self) -> bool:
        return bool(self.consumed or self.records or self.lost_offsets)


class Labels(list[Label]):
    """A list of distinct labels in order of first appearance, with `in` and `index` in constant time."""

    def __init__(self, labels: Iterable[Label] = ()) -> None:
        super().__init__(labels)
        self._indices = {label: index for index, label in reversed(list(enumerate(self)))}

    def append(self, label: Label) -> None:
        """Add a label at the end."""
        self._indices.setdefault(label, len(self))
        super().append(label)

    def __contains__(self, label: object) -> bool:
        return label in self._indices

    def index(self, value: Label, *bounds: SupportsIndex) -> int:
        """Return a label's index; raises `ValueError` if the list does not contain it."""
        return super().index(value, *bounds) if bounds or value not in self._indices else self._indices[value]


def label_of_other_type(label: Label) -> Label | None:
    """Return the label of the other type with the same text: 1 for "1", and "1" for 1. None if there is none.

    An integer and a string are two different labels, even if they have the same text.
    """
    if isinstance(label, int):
        return str(label)
    return int(label) if INTEGER.fullmatch(label) and len(label.lstrip("-")) <= 18 else None


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


@dataclass(frozen=True)
class Delivery:
    """What one turn of the loop applies: everything between two sets of positions, in the order of these fields."""

    positions: Positions = field(default_factory=Positions)
    observations: Observations = field(default_factory=Observations)
    new_task: Task | None = None  # a task that begins with this delivery
    batch: Batch | None = None
    end_offsets: Mapping[int, int] | None = None  # of the current task, by partition, if they are fixed now
    fixed_by: str = "next_topic"  # what fixed the end offsets: next_topic | command
    forgives_below: Mapping[int, int] | None = None  # the new value of `Task.forgiven_below`
    task_end_reason: str | None = None  # if the current task ends now: marker | count | next_topic | idle | command
    newest_timestamp: float | None = None  # of the newest record in this delivery, Unix seconds


@dataclass
class Progress:
    """The applied part of the stream: positions, tasks, labels, words and counts. All of it is saved in checkpoints.

    Only trained samples add to `labels` and `vocabulary`, so that a probe never takes an output or a word id. Labels and
    words that only probes contain are listed separately.
    """

    positions: Positions = field(default_factory=Positions)
    tasks: list[Task] = field(default_factory=list)
    labels: list[Label] = field(default_factory=list)  # in order of first appearance; append-only
    counts_by_topic: dict[str, Counter[str]] = field(default_factory=dict)  # samples consumed, and by outcome
    vocabulary: list[str] = field(default_factory=list)  # of text: in order of first appearance; append-only
    probe_labels: list[Label] = field(default_factory=list)  # seen in a probe before any trained sample; append-only
    probe_words: list[str] = field(default_factory=list)  # the same for words
    codec_version: int = CODEC_VERSION

    def __post_init__(self) -> None:
        self.labels = Labels(self.labels)

    @property
    def current(self) -> Task | None:
        """The task that is being learned, or None."""
        return self.tasks[-1] if self.tasks and self.tasks[-1].state != "ended" else None

    def register_labels(self, observations: Observations) -> None:
        """Add a delivery's new labels and words. Call this before its batch is learned: the batch may contain them."""
        self.vocabulary += observations.new_words
        self.probe_labels += observations.new_probe_labels
        self.probe_words += observations.new_probe_words
        for index, label in observations.new_labels:
            task = self.tasks[index]
            if label not in task.labels:
                task.labels.append(label)
            if label not in self.labels:
                self.labels.append(label)

    def advance(self, delivery: Delivery, outcome: str, unusable: int = 0) -> None:
        """Move the positions and counts past a delivery. `outcome` is that of its batch: trained or skipped.

        `unusable` samples of the batch were left out of the update; they count as skipped.
        """
        self.positions = self.positions.advance(delivery.positions)
        observations = delivery.observations
        for topic, count in observations.consumed.items():
            self.counts_by_topic.setdefault(topic, Counter())["consumed"] += count
        for (topic, kind), count in observations.outcomes.items():
            self.counts_by_topic.setdefault(topic, Counter())[kind] += count
        if (task := self.current) is None:
            return
        if delivery.batch is not None:
            for kind, count in ((outcome, len(delivery.batch) - unusable), ("skipped", unusable)):
                if count:
                    self.counts_by_topic.setdefault(task.name, Counter())[kind] += count
                    task.counts[kind] += count
        for kind in ("held_out", "rejected", "duplicates"):
            task.counts[kind] += observations.outcomes[task.name, kind]
        uncounted = observations.outcomes[task.name, "late"] + observations.outcomes[task.name, "duplicates"]
        task.counts["consumed"] += observations.consumed[task.name] - uncounted
        task.marked_partitions.extend(
            partition for topic, partition in observations.task_end_markers if topic == task.name
        )
        if delivery.end_offsets is not None:
            task.end_offsets, task.fixed_by = dict(delivery.end_offsets), delivery.fixed_by
        if delivery.forgives_below is not None:
            task.forgiven_below = dict(delivery.forgives_below)
        if delivery.task_end_reason is not None:
            task.forgiven_below = {}

    def totals(self) -> Counter[str]:
        """Return samples consumed and by outcome, summed over all topics."""
        totals = Counter(dict.fromkeys(("consumed", *OUTCOMES), 0))
        for count in self.counts_by_topic.values():
            totals.update(count)
        return totals

    def counts_of(self, topic: str) -> Counter[str]:
        """Return a topic's samples consumed and by outcome."""
        return self.counts_by_topic.get(topic, Counter())

    def unaccounted(self) -> dict[str, int]:
        """Return the samples consumed minus the sum of all outcomes, for each topic where they differ."""
        gaps = {
            topic: count["consumed"] - sum(count[kind] for kind in OUTCOMES)
            for topic, count in self.counts_by_topic.items()
        }
        return {topic: gap for topic, gap in gaps.items() if gap}

    def to_json(self) -> dict[str, Any]:
        """Return a JSON tree from which `from_json` makes equal progress. Positions are not in it: they have their own file."""
        return {
            "tasks": [task.to_json() for task in self.tasks],
            "labels": self.labels,
            "ledger": {topic: dict(count) for topic, count in self.counts_by_topic.items()},
            "vocabulary": list(self.vocabulary),
            "probe_labels": list(self.probe_labels),
            "probe_words": list(self.probe_words),
            "codec": self.codec_version,
        }

    @classmethod
    def from_json(cls, tree: Mapping[str, Any], positions: Positions) -> Progress:
        """Return the progress that `to_json` wrote."""
        counts_by_topic = {topic: Counter(count) for topic, count in tree["ledger"].items()}
        tasks = [Task.from_json(task) for task in tree["tasks"]]
        labels, words = list(tree["labels"]), list(tree["vocabulary"])
        # older checkpoints have none of these keys
        probe_labels, probe_words = list(tree.get("probe_labels", [])), list(tree.get("probe_words", []))
        return cls(positions, tasks, labels, counts_by_topic, words, probe_labels, probe_words, tree.get("codec", 1))


def format_outcomes(topics: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Return one line for each topic of a status: the samples consumed, as the sum of their outcomes."""
    return [
        f"{topic}: {count['consumed']} samples = "
        + " + ".join(f"{number} {kind.replace('_', ' ')}" for kind, number in count.items() if kind != "consumed")
        for topic, count in topics.items()
    ]


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Return a sort key that compares the digits 0 to 9 as numbers: `task-2` comes before `task-10`."""
    parts = re.split(
        r"([0-9]+)", name
    )  # every second part is a number; of two numbers, the one with fewer digits is smaller
    parts[1::2] = [digits.lstrip("0") for digits in parts[1::2]]
    return [(n % 2, len(part) if n % 2 else 0, part) for n, part in enumerate(parts)]
