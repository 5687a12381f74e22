"""The nouns that every layer shares: labels, positions, batches, tasks, and what a turn of the loop applies."""

from __future__ import annotations

import errno
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from streamlearn.older_keys import update_task_keys

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from typing import Self, SupportsIndex

    import numpy as np
    from torch import Tensor

Label = int | str
Partition = tuple[str, int]

TOPIC_NAME = re.compile(r"(?!\.{1,2}$)[a-zA-Z0-9._-]{1,249}")
"""What Kafka takes for a topic's name, as a whole."""

OUTCOMES = ("trained", "held_out", "late", "rejected", "duplicates", "skipped")
"""How a consumed sample can end; until then it is queued. Their sum is the number consumed."""

MAX_LABEL_BYTES = 256
"""The longest label that is accepted: labels stand in every checkpoint, every status and every page."""

CODEC_VERSION = 2
"""How samples are read, where that has changed; a job keeps the version that it began with, or its hold-out would change.

1: words of text without their combining marks. 2: words with their marks, in Unicode's form NFC.
"""

REJECT_REASONS = ("decode", "schema", "shape", "nonfinite", "label_range", "unknown_task", "oversize", "missing_label")
"""Why a sample can be rejected: a closed set, so that it can be a metric's label."""

DEAD_LETTER_REASONS = (*REJECT_REASONS, "late")
"""Why a sample can be in the dead-letter topic."""


class Rejected(Exception):  # noqa: N818 - an outcome, not a fault of the program
    """A sample cannot be used; `reason` is one of `DEAD_LETTER_REASONS`."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class StreamlearnError(Exception):
    """An expected failure: one line for the user, and the exit code that operators act on.

    Codes follow sysexits: 1 failure, 69 broker unavailable, 73 state locked, 74 input/output, 75 temporary,
    77 permission or authentication, 78 configuration.
    """

    def __init__(self, message: str, *, code: int = 1) -> None:
        super().__init__(message)
        self.code = code

    @classmethod
    def from_os_error(cls, error: OSError, what: object = None) -> Self:
        """Return what the system refused: a line that names the file, or `what`; 77 for a missing permission, else 74."""
        name = what if what is not None else error.filename
        reason = error.strerror or str(error)
        code = 77 if error.errno in {errno.EACCES, errno.EPERM, errno.EROFS} else 74
        return cls(reason if name is None else f"{name}: {reason}", code=code)

    @classmethod
    def from_out_of_memory(cls, error: Exception) -> Self:
        """Return that there was no memory left (75), with what was asked for where it is known."""
        return cls(f"out of memory: {error!r:.200}", code=75)


OUT_OF_MEMORY = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: Exception) -> bool:
    """Tell whether the host or the device had no memory left; torch says so by a type, or by words alone."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or any(words in str(error) for words in OUT_OF_MEMORY)
    )


@dataclass(frozen=True, slots=True, order=True)
class Position:
    """The next record that is not used up, and how many of its samples, in order and of any outcome, are done."""

    offset: int
    skip: int = 0


@dataclass(frozen=True)
class Positions:
    """Where learning stands in every partition; immutable, and never goes backwards.

    `topic_ids` and `cluster_id` tell a topic from another one that was created later under its name.
    """

    by_partition: Mapping[Partition, Position] = field(default_factory=dict)
    topic_ids: Mapping[str, str] = field(default_factory=dict)
    cluster_id: str | None = None

    def advance(self, later: Positions) -> Positions:
        """Return these positions moved on to `later`; raises `StreamlearnError` if one would go backwards."""
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
        """Return `{topic: {partition: next_offset}}`, as shown to people and reported to the broker."""
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
        """Return the positions that `to_json` described."""
        at = {
            (topic, int(partition)): Position(value["offset"], value["skip"])
            for topic, entry in tree["topics"].items()
            for partition, value in entry["partitions"].items()
        }
        ids = {topic: entry["topic_id"] for topic, entry in tree["topics"].items() if entry["topic_id"] is not None}
        return cls(at, ids, tree["cluster_id"])


@dataclass(frozen=True)
class Batch:
    """What an update eats.

    `x [B, ...]` in the dtype it arrived in, or scaled floats; `y [B]` output indices; `task [B]` task indices, kept on
    the host so that routing never waits for the device; `weight [B]` the samples' shares of the loss (None before the
    update has joined replay to it, unless the replay weighs its samples itself); `soft [R, C]` targets of the last R
    samples: distributions at `temperature`, or where `logits` is set, logits, -inf for outputs that they do not speak of.
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
        """Return these samples followed by the replayed ones, which together have `share` of the loss."""
        import torch

        own = 1.0 if replayed is None else 1.0 - share
        weight = torch.full((len(self),), own / len(self), device=self.x.device)
        if replayed is None:
            return replace(self, weight=weight)
        rest = replayed.weight
        if rest is None:
            rest = torch.full((len(replayed),), share / len(replayed), device=self.x.device)
        return Batch(
            torch.cat([self.x, replayed.x]),
            torch.cat([self.y, replayed.y]),
            torch.cat([self.task, replayed.task]),
            torch.cat([weight, rest]),
            replayed.soft_targets,
            replayed.temperature,
            replayed.targets_are_logits,
        )

    def scale_weights(self, factor: float) -> Batch:
        """Return these samples with `factor` times their shares of the loss."""
        return self if factor == 1 or self.weight is None else replace(self, weight=self.weight * factor)


@dataclass(frozen=True)
class HeldOut:
    """Samples kept for a task's probe: `x [n, ...]` as they arrived, `y [n]` output indices.

    A label that no trained sample has had yet has no output. `y` is then -1 less its place in `Progress.probe_labels`.
    In a text, a word that no trained sample has had yet stands in the same way for its place in `Progress.probe_words`.
    """

    task: int
    x: np.ndarray
    y: np.ndarray


@dataclass
class Observations:
    """What the reader met on the way to a batch; it takes effect when that batch is learned, never earlier."""

    consumed: Counter[str] = field(default_factory=Counter)  # samples by topic
    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)  # samples by (topic, outcome), never "trained"
    rejected: Counter[tuple[str, str]] = field(default_factory=Counter)  # samples by (topic, reason)
    records: Counter[Partition] = field(default_factory=Counter)
    num_bytes: Counter[str] = field(default_factory=Counter)
    lost_offsets: Counter[tuple[str, str]] = field(default_factory=Counter)  # offsets lost, by (topic, reason)
    held_out: list[HeldOut] = field(default_factory=list)
    new_labels: list[tuple[int, Label]] = field(default_factory=list)  # (task index, label) when first met in that task
    new_words: list[str] = field(default_factory=list)  # new in the vocabulary, in order of first appearance
    new_probe_labels: list[Label] = field(default_factory=list)  # of held-out samples, and without an output so far
    new_probe_words: list[str] = field(default_factory=list)  # of held-out texts, and not in the vocabulary so far
    task_end_markers: list[Partition] = field(default_factory=list)  # partitions whose task-end marker was read

    def __bool__(self) -> bool:
        return bool(self.consumed or self.records or self.lost_offsets)


class Labels(list[Label]):
    """Distinct labels in order of first appearance. A label's place is found in constant time."""

    def __init__(self, labels: Iterable[Label] = ()) -> None:
        super().__init__(labels)
        self._places = {label: place for place, label in reversed(list(enumerate(self)))}

    def append(self, label: Label) -> None:
        """Add a label at the end."""
        self._places.setdefault(label, len(self))
        super().append(label)

    def __contains__(self, label: object) -> bool:
        return label in self._places

    def index(self, value: Label, *bounds: SupportsIndex) -> int:
        """Return where a label is; raises `ValueError` if it is not here."""
        return super().index(value, *bounds) if bounds or value not in self._places else self._places[value]


def label_of_other_type(label: Label) -> Label | None:
    """Return the label of the other type that is written the same, 1 for "1" and "1" for 1, or None: they are two labels."""
    if isinstance(label, int):
        return str(label)
    return int(label) if re.fullmatch(r"0|-?[1-9][0-9]{0,17}", label) else None


@dataclass
class Task:
    """One topic's worth of experience, from its first sample to its end."""

    index: int
    name: str
    state: str = "active"  # active | refining | ended
    labels: list[Label] = field(default_factory=list)  # declared, or in order of first appearance in training
    counts: Counter[str] = field(default_factory=Counter)  # consumed and every outcome but late
    end_offsets: dict[int, int] | None = None  # end offset of each partition, once fixed
    fixed_by: str = "next_topic"  # what fixed them: next_topic | command
    marked_partitions: list[int] = field(default_factory=list)  # partitions whose marker was applied
    forgiven_below: dict[int, int] = field(
        default_factory=dict
    )  # rejects below these offsets count for no further burst

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
        """Return the task that `to_json` described."""
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
    new_task: Task | None = None
    batch: Batch | None = None
    is_refinement: bool = False  # the batch is a further pass over the reservoir, not new experience
    end_offsets: Mapping[int, int] | None = None  # end offsets of the current task, fixed now
    fixed_by: str = "next_topic"  # what fixed them: next_topic | command
    forgives_below: Mapping[int, int] | None = None  # up to where rejects count for no further burst, by partition
    task_end_reason: str | None = (
        None  # how the current task's end was found: marker | count | next_topic | idle | command
    )
    ends_refinement: bool = False  # refinement is over; what was learned is made to last
    newest_timestamp: float | None = None  # timestamp of the newest record in it, Unix seconds


@dataclass
class Progress:
    """Where the stream stands, as far as it was applied to the model: positions, tasks, labels, words and totals. All state.

    Only trained samples add to `labels` and `vocabulary`, so that no probe takes an output or an id. What probes alone
    contain is listed apart.
    """

    positions: Positions = field(default_factory=Positions)
    tasks: list[Task] = field(default_factory=list)
    labels: list[Label] = field(default_factory=list)  # in order of first appearance; append-only
    counts_by_topic: dict[str, Counter[str]] = field(default_factory=dict)  # topic -> samples consumed and by outcome
    vocabulary: list[str] = field(default_factory=list)  # of text: in order of first appearance; append-only
    probe_labels: list[Label] = field(default_factory=list)  # met in a probe before training met them; append-only
    probe_words: list[str] = field(default_factory=list)  # the same for words
    codec_version: int = CODEC_VERSION

    def __post_init__(self) -> None:
        self.labels = Labels(self.labels)

    @property
    def current(self) -> Task | None:
        """The task that is being learned, if one is."""
        return self.tasks[-1] if self.tasks and self.tasks[-1].state != "ended" else None

    def register_labels(self, observations: Observations) -> None:
        """Note the labels and words of a delivery, so that its own batch can be learned with them."""
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
        """Move on past a delivery whose batch, where it has one, ended as `outcome` (trained or skipped).

        Of the batch, `unusable` samples were left out, and count as skipped.
        """
        self.positions = self.positions.advance(delivery.positions)
        found = delivery.observations
        for topic, count in found.consumed.items():
            self.counts_by_topic.setdefault(topic, Counter())["consumed"] += count
        for (topic, kind), count in found.outcomes.items():
            self.counts_by_topic.setdefault(topic, Counter())[kind] += count
        if (task := self.current) is None:
            return
        if delivery.batch is not None and not delivery.is_refinement:
            for kind, count in ((outcome, len(delivery.batch) - unusable), ("skipped", unusable)):
                if count:
                    self.counts_by_topic.setdefault(task.name, Counter())[kind] += count
                    task.counts[kind] += count
        for kind in ("held_out", "rejected", "duplicates"):
            task.counts[kind] += found.outcomes[task.name, kind]
        uncounted = found.outcomes[task.name, "late"] + found.outcomes[task.name, "duplicates"]
        task.counts["consumed"] += found.consumed[task.name] - uncounted
        task.marked_partitions.extend(partition for topic, partition in found.task_end_markers if topic == task.name)
        if delivery.end_offsets is not None:
            task.end_offsets, task.fixed_by = dict(delivery.end_offsets), delivery.fixed_by
        if delivery.forgives_below is not None:
            task.forgiven_below = dict(delivery.forgives_below)
        if delivery.task_end_reason is not None:
            task.forgiven_below = {}

    def totals(self) -> Counter[str]:
        """Return samples consumed and by outcome, over all topics."""
        totals = Counter(dict.fromkeys(("consumed", *OUTCOMES), 0))
        for count in self.counts_by_topic.values():
            totals.update(count)
        return totals

    def counts_of(self, topic: str) -> Counter[str]:
        """Return a topic's samples consumed and by outcome."""
        return self.counts_by_topic.get(topic, Counter())

    def unaccounted(self) -> dict[str, int]:
        """Return, for each topic where they differ, samples consumed less the sum of their outcomes."""
        gaps = {
            topic: count["consumed"] - sum(count[kind] for kind in OUTCOMES)
            for topic, count in self.counts_by_topic.items()
        }
        return {topic: gap for topic, gap in gaps.items() if gap}

    def to_json(self) -> dict[str, Any]:
        """Return a JSON tree from which `from_json` makes equal progress (positions apart: they have a file of theirs)."""
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
        """Return the progress that `to_json` described."""
        ledger = {topic: Counter(count) for topic, count in tree["ledger"].items()}
        tasks = [Task.from_json(task) for task in tree["tasks"]]
        labels, words = list(tree["labels"]), list(tree["vocabulary"])
        # older checkpoints have none of these
        probe_labels, probe_words = list(tree.get("probe_labels", [])), list(tree.get("probe_words", []))
        return cls(positions, tasks, labels, ledger, words, probe_labels, probe_words, tree.get("codec", 1))


def format_outcomes(topics: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Return a line for each topic of a status: its samples, and how they ended."""
    return [
        f"{topic}: {count['consumed']} samples = "
        + " + ".join(f"{number} {kind.replace('_', ' ')}" for kind, number in count.items() if kind != "consumed")
        for topic, count in topics.items()
    ]


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Return a sort key that compares digits (0 to 9) as numbers: `task-2` comes before `task-10`."""
    parts = re.split(r"([0-9]+)", name)  # every second one is a number: the one with fewer digits is smaller
    parts[1::2] = [digits.lstrip("0") for digits in parts[1::2]]
    return [(n % 2, len(part) if n % 2 else 0, part) for n, part in enumerate(parts)]
