"""The state of the stream: what was applied so far, with a count of every sample."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from streamlearn.core.labels import Label, Labels
from streamlearn.core.positions import Positions
from streamlearn.core.samples import CODEC_VERSION, Outcome
from streamlearn.core.tasks import Task, TaskState

if TYPE_CHECKING:
    from collections.abc import Mapping

    from streamlearn.core.deliveries import Delivery, Observations


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
        return self.tasks[-1] if self.tasks and self.tasks[-1].state != TaskState.ENDED else None

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

    def advance(self, delivery: Delivery, outcome: Outcome, unusable: int = 0) -> None:
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
            for kind, count in ((outcome, len(delivery.batch) - unusable), (Outcome.SKIPPED, unusable)):
                if count:
                    self.counts_by_topic.setdefault(task.name, Counter())[kind] += count
                    task.counts[kind] += count
        for kind in (Outcome.HELD_OUT, Outcome.REJECTED, Outcome.DUPLICATES):
            task.counts[kind] += observations.outcomes[task.name, kind]
        uncounted = (
            observations.outcomes[task.name, Outcome.LATE] + observations.outcomes[task.name, Outcome.DUPLICATES]
        )
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
        totals = Counter(dict.fromkeys(("consumed", *Outcome), 0))
        for count in self.counts_by_topic.values():
            totals.update(count)
        return totals

    def counts_of(self, topic: str) -> Counter[str]:
        """Return a topic's samples consumed and by outcome."""
        return self.counts_by_topic.get(topic, Counter())

    def unaccounted(self) -> dict[str, int]:
        """Return the samples consumed minus the sum of all outcomes, for each topic where they differ."""
        gaps = {
            topic: count["consumed"] - sum(count[kind] for kind in Outcome)
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
