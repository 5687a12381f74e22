"""Turn records into batches. A batch is the next `batch_size` trainable samples in offset order, however they were polled."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import TYPE_CHECKING

import numpy as np
import torch

from streamlearn.core.deliveries import Delivery, Observations
from streamlearn.core.errors import ConfigurationError
from streamlearn.core.labels import label_of_other_type
from streamlearn.core.positions import Position, Positions
from streamlearn.core.samples import Batch, HeldOut, Outcome, Rejected
from streamlearn.core.tasks import Task, TaskEndReason, TaskState
from streamlearn.stream.burst import Burst
from streamlearn.stream.codecs.text import Vocabulary
from streamlearn.stream.logs.base import CONTROL_HEADER, PROBE, TASK_END, USE_HEADER

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from streamlearn.core.labels import Label
    from streamlearn.core.positions import Partition
    from streamlearn.core.progress import Progress
    from streamlearn.core.scenario import Scenario
    from streamlearn.stream.deadletter import DeadLetterWriter
    from streamlearn.stream.decoder import DecodedRecord, RecordDecoder
    from streamlearn.stream.holdout import HoldOut
    from streamlearn.stream.logs.base import Record, TopicInfo

logger = logging.getLogger(__name__)

FLUSH_SAMPLES = 2000  # deliver observations after this many samples even if none of them is trainable


class SampleUse(IntEnum):
    """What a sample of a record is used for. An array of uint8 has one of these numbers for each sample."""

    TRAINABLE = 0
    HELD_OUT = 1
    REJECTED = 2


@dataclass
class AssemblerSettings:
    """The objects and limits by which the assembler turns records into samples, and samples into batches."""

    decoder: RecordDecoder
    holdout: HoldOut
    scenario: Scenario
    dead_letters: DeadLetterWriter
    batch_size: int
    samples_per_task: int | None = None  # end a task after this many samples
    dead_letter_late: bool = False  # send samples that come after the end of their task to the dead letters


@dataclass(frozen=True, slots=True)
class ReadState:
    """What has been read so far: the topics of the current task and of all tasks that have begun, ids and positions."""

    current: str | None
    begun: tuple[str, ...]
    topic_ids: Mapping[str, str]
    positions: Mapping[Partition, Position]

    def was_recreated(self, info: TopicInfo) -> bool:
        """Return whether a topic has another id than the one that was read under this name."""
        known = self.topic_ids.get(info.name)
        return known is not None and info.topic_id is not None and known != info.topic_id


@dataclass
class _PendingSamples:
    """Trainable samples that wait until their batch is full."""

    x: list[np.ndarray] = field(default_factory=list)
    y: list[np.ndarray] = field(default_factory=list)
    size: int = 0


class Assembler:
    """Takes records in the order in which they are read, and returns deliveries.

    Its output depends on the records and on the progress at the start, and on nothing else. It runs ahead of the learner,
    on a copy of the progress. Nothing here is saved: the deliveries carry all that must be saved.
    """

    def __init__(self, settings: AssemblerSettings, progress: Progress) -> None:
        self.settings = settings
        self.progress = progress
        for task in progress.tasks:  # a task that is being refined gets no more samples
            task.state = TaskState.ACTIVE if task.state == TaskState.ACTIVE else TaskState.ENDED
        self.task: Task | None = progress.current
        self.cluster_id: str | None = None
        self.num_undelivered = 0  # consumed samples that are in no delivery yet
        self.burst = Burst()
        self._pending = _PendingSamples()
        self._observations = Observations()
        self._read_positions: dict[Partition, Position] = {}
        self._has_skipped = False  # positions were moved by `skip_to`, and no delivery carries them yet
        self._newest_timestamp: float | None = None
        self._topic_ids: dict[str, str] = dict(progress.positions.topic_ids)
        self._task_partitions: tuple[int, ...] = ()
        self._logged_rejected: set[str] = set()  # topics of which a rejected sample was logged
        self._logged_late: set[str] = set()  # topics of which a late sample was logged
        text = settings.decoder.text
        self._vocabulary = Vocabulary(
            progress.vocabulary, text.vocabulary if text is not None else 0, progress.probe_words
        )
        # negative outputs of labels that only probes contain so far
        self._probe_outputs: dict[Label, int] = {label: -1 - index for index, label in enumerate(progress.probe_labels)}

    def set_partitions(self, topic: str, topic_id: str | None, partitions: tuple[int, ...]) -> None:
        """Set the id of a topic and, if it is the current task's, its partitions. Partitions can be added at any time."""
        if topic_id is not None:
            self._topic_ids[topic] = topic_id
        if self.task is not None and topic == self.task.name:
            self._task_partitions = partitions

    def read_position(self, partition: Partition) -> Position | None:
        """Return the position up to which a partition was read since the start, or None if nothing was read."""
        return self._read_positions.get(partition)

    @property
    def undelivered(self) -> Counter[str]:
        """The number of samples, by topic, that are in no delivery yet."""
        return Counter(self._observations.consumed)

    @property
    def saved_partitions(self) -> list[Partition]:
        """The partitions of which a position was known at the start."""
        return list(self.progress.positions.by_partition)

    def read_state(self) -> ReadState:
        """Return what has been read so far, as a value that does not change any more."""
        return ReadState(
            current=self.task.name if self.task is not None else None,
            begun=tuple(task.name for task in self.progress.tasks),
            topic_ids=dict(self._topic_ids),
            positions={**self.progress.positions.by_partition, **self._read_positions},
        )

    def topic_id(self, topic: str) -> str | None:
        """Return the id of the topic that was read under this name so far."""
        return self._topic_ids.get(topic)

    def make_task(self, topic: str) -> Task:
        """Return the next task, of this topic; raises `ConfigurationError` if the scenario declares no classes for it."""
        scenario = self.settings.scenario
        declared = scenario.declared_classes(topic) if scenario.kind == "domain" else []
        if declared is None:
            known = ", ".join(scenario.declared)
            raise ConfigurationError(f"topic {topic}: scenario.tasks has no classes for it, only for {known}")
        return Task(len(self.progress.tasks), topic, labels=list(declared))

    def begin_task(self, task: Task) -> Delivery:
        """Begin a task, and return the delivery with it."""
        self.task = replace(task, labels=list(task.labels), counts=Counter(), marked_partitions=[])
        self.progress.tasks.append(self.task)
        return Delivery(new_task=task)

    def is_last_marker(self, record: Record) -> bool:
        """Return whether a record is the last task-end marker that the current task still needs."""
        task = self.task
        if task is None or record.topic != task.name or record.header(CONTROL_HEADER) != TASK_END:
            return False
        return set(self._task_partitions) <= {*task.marked_partitions, record.partition}

    def feed(self, record: Record) -> Iterator[Delivery]:
        """Take one record, and yield the deliveries that it completes."""
        partition = (record.topic, record.partition)
        expected = self._position(partition) or Position(0)
        decoded = None if record.header(CONTROL_HEADER) == TASK_END else self.settings.decoder.decode(record)
        begin = record.offset if record.begin is None else record.begin  # a record can stand for a whole batch
        skip = expected.skip if begin <= expected.offset <= record.offset else 0
        if decoded is not None and skip >= max(1, len(decoded)):
            raise _fewer_samples_error(record, skip, decoded)
        is_current = decoded is not None and record.offset >= expected.offset and not self._is_late(record)
        outcomes, outputs = (
            self._classify(record, decoded, skip) if decoded is not None and is_current else (None, None)
        )
        if decoded is not None and not is_current and record.offset >= expected.offset:
            self._report_late(record, decoded, skip)
        # nothing is counted above this line: if a dead letter cannot be written, the record counts as unread
        self._observations.records[partition] += 1
        self._observations.num_bytes[record.topic] += len(record.key or b"") + len(record.value or b"")
        self._newest_timestamp = max(record.timestamp, self._newest_timestamp or 0.0)
        if decoded is not None and record.offset < expected.offset:
            self._count(record.topic, Outcome.DUPLICATES, len(decoded))
            return
        self._read_positions[partition] = Position(record.offset + 1)
        if record.begin is not None and (lost := record.offset - max(record.begin, expected.offset)) > 0:
            # the record counts as one sample, but stands for several offsets
            self._observations.lost_offsets[record.topic, "oversize"] += lost
        if decoded is None:
            yield from self._add_marker(partition)
        elif outcomes is None or outputs is None:
            self._count(record.topic, Outcome.LATE, len(decoded) - skip)
        else:
            self._update_burst(record, decoded, outcomes, skip)
            yield from self._add_record(record, decoded, outcomes, outputs, skip)

    def flush_observations(self) -> Delivery | None:
        """Return a delivery without a batch, or None if samples wait for their batch or if there is nothing new."""
        is_new = self._observations or self._has_skipped
        return None if self._pending.size or not is_new else self._deliver()

    def flush_short_batch(self) -> Delivery | None:
        """Return the waiting samples as a short batch (`linger`), or None if no samples wait."""
        return self._deliver() if self._pending.size else None

    def fix_end_offsets(self, ends: dict[int, int], fixed_by: TaskEndReason = TaskEndReason.NEXT_TOPIC) -> Delivery:
        """Fix the offsets, by partition, at which the current task ends; return the delivery with them."""
        assert self.task is not None
        self.task.end_offsets, self.task.fixed_by = ends, fixed_by
        return Delivery(end_offsets=ends, fixed_by=fixed_by)

    def fix_end_offsets_here(self, partitions: Iterable[int]) -> Delivery:
        """Let the current task end at the offsets up to which its partitions were read; return the delivery with them."""
        assert self.task is not None
        ends = {}
        for number in partitions:
            position = self._position((self.task.name, number))
            ends[number] = position.offset if position is not None else 0
        return self.fix_end_offsets(ends, TaskEndReason.COMMAND)

    def forgive_rejects(self) -> Delivery | None:
        """Return a delivery that marks the rejected samples so far as handled, or None if no task is current.

        A restart then does not stop at the same burst again. (If the task has ended, its positions are delivered already.)
        """
        if (task := self.task) is None:
            return None
        positions = self._read_positions.items()
        return Delivery(forgives_below={number: at.offset for (topic, number), at in positions if topic == task.name})

    def skip_to(self, offsets: dict[Partition, int]) -> None:
        """Move the positions to these offsets. There are no records before them: transactions and compaction leave gaps."""
        for partition, offset in offsets.items():
            position = self._position(partition) or Position(0)
            if position < Position(offset):
                self._read_positions[partition] = Position(offset)
                self._has_skipped = True

    def skip_lost_offsets(self, partition: Partition, offset: int, count: int, reason: str) -> None:
        """Continue at `offset`, and count `count` offsets before it as lost."""
        self._observations.lost_offsets[partition[0], reason] += count
        self._read_positions[partition] = Position(offset)

    def end_task(self, reason: TaskEndReason) -> Delivery:
        """End the current task; return the delivery with its end and its last, short batch."""
        assert self.task is not None
        delivery = self._deliver(task_end_reason=reason)
        self.task.state = TaskState.ENDED
        self.task = None
        return delivery

    def _position(self, partition: Partition) -> Position | None:
        """Return the position up to which a partition was read, in this process or before it."""
        return self._read_positions.get(partition) or self.progress.positions.by_partition.get(partition)

    def _add_record(
        self, record: Record, decoded: DecodedRecord, outcomes: np.ndarray, outputs: np.ndarray, skip: int
    ) -> Iterator[Delivery]:
        """Add the samples of a record from index `skip` on; yield a delivery for each batch that is full."""
        partition, next_position = (record.topic, record.partition), Position(record.offset + 1)
        start = skip
        while start < len(decoded):
            stop = self._batch_end(outcomes, start)
            self._add_samples(record.topic, decoded, outcomes, outputs, slice(start, stop))
            self._read_positions[partition] = next_position if stop == len(decoded) else Position(record.offset, stop)
            start = stop
            if self._has_enough_samples():
                yield self.end_task(TaskEndReason.COUNT)
                if start < len(decoded):
                    self._count(record.topic, Outcome.LATE, len(decoded) - start)
                    self._read_positions[partition] = next_position
                return
            if self._pending.size == self.settings.batch_size:
                yield self._deliver()
        if not self._pending.size and self.num_undelivered >= FLUSH_SAMPLES:
            yield self._deliver()

    def _is_late(self, record: Record) -> bool:
        """Return whether a record comes after the end of its task."""
        task = self.task
        if task is None or record.topic != task.name or record.partition in task.marked_partitions:
            return True
        return task.end_offsets is not None and record.offset >= task.end_offsets.get(record.partition, 0)

    def _classify(self, record: Record, decoded: DecodedRecord, skip: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the outcome and the output of each sample, both `[n]`, and write the dead letters."""
        assert self.task is not None
        outcomes = np.full(len(decoded), SampleUse.TRAINABLE, np.uint8)
        outputs = np.zeros(len(decoded), np.int64)
        is_probe = record.header(USE_HEADER) == PROBE
        output_of: dict[tuple[Label, bool], int | None] = {}
        limit = self.settings.samples_per_task
        room = len(decoded) if limit is None else max(0, limit - self.task.counts["consumed"])
        for index in range(skip, min(len(decoded), skip + room)):  # samples after the limit are late, valid or not
            if index not in decoded.rejected:
                label = decoded.y[index]
                held_out = is_probe or self.settings.holdout.is_held_out(decoded.hash_input(index), label, record.key)
                if (label, held_out) not in output_of:
                    output_of[label, held_out] = self._probe_output(label) if held_out else self._output(label)
                if (output := output_of[label, held_out]) is None:
                    text = f"label {label!r:.80} has no output; {self._accepted_labels()}{self._other_type_hint(label)}"
                    decoded.rejected[index] = Rejected("label_range", text)
                else:
                    outputs[index] = output
                    if held_out:
                        outcomes[index] = SampleUse.HELD_OUT
                    if index in decoded.text:
                        self._encode_text(decoded, index, held_out=held_out)
            if index in decoded.rejected:
                outcomes[index] = SampleUse.REJECTED
        rejected = np.flatnonzero(outcomes == SampleUse.REJECTED).tolist()
        reasons = {index: decoded.rejected[index] for index in rejected}
        self.settings.dead_letters.write_rejected(record, reasons, len(decoded), self.topic_id(record.topic))
        if skip + room < len(decoded):
            self._report_late(record, decoded, skip + room)
        if rejected and record.topic not in self._logged_rejected:
            self._logged_rejected.add(record.topic)
            place = f"{record.topic}[{record.partition}] offset {record.offset}"
            text = "%s: a sample is rejected: %s; further ones in this topic are counted, not logged"
            logger.warning(text, place, decoded.rejected[rejected[0]])
        return outcomes, outputs

    def _report_late(self, record: Record, decoded: DecodedRecord, start: int) -> None:
        """Log the first late sample of a topic; write a record's samples from index `start` on as dead letters, if set so."""
        if record.topic not in self._logged_late:
            self._logged_late.add(record.topic)
            place = f"{record.topic}[{record.partition}] offset {record.offset}"
            text = "%s: a late sample comes after the end of its task and is not learned; further ones are counted, not logged"
            logger.warning(text, place, extra={"task": record.topic})
        if self.settings.dead_letter_late:
            late = Rejected("late", f"came after the end of task {record.topic}")
            reasons = dict.fromkeys(range(start, len(decoded)), late)
            self.settings.dead_letters.write_rejected(record, reasons, len(decoded), self.topic_id(record.topic))

    def _update_burst(self, record: Record, decoded: DecodedRecord, outcomes: np.ndarray, skip: int) -> None:
        assert self.task is not None
        if not decoded.rejected:
            self.burst.clear()
        elif record.offset >= self.task.forgiven_below.get(record.partition, 0):
            self.burst.update(record, outcomes == SampleUse.REJECTED, decoded.rejected, skip)

    def _output(self, label: Label) -> int | None:
        """Return the output of a trainable sample's label, or None if there is none; a new label takes the next output."""
        assert self.task is not None
        labels = self.progress.labels
        output = self.settings.scenario.output(label, self.task.name, labels)
        if output is not None:
            if label not in self.task.labels:
                self.task.labels.append(label)
                self._observations.new_labels.append((self.task.index, label))
            if label not in labels:
                labels.append(label)
                if (other := label_of_other_type(label)) in labels:
                    text = "topic %s: labels %r and %r differ in type, so they are two different labels"
                    logger.warning(text, self.task.name, label, other)
        return output

    def _probe_output(self, label: Label) -> int | None:
        """Return the output of a held-out sample's label, or None if there is none.

        A label that no trainable sample had so far takes no output, because probes must not change what is learned. If
        outputs go by first appearance, such a label has a negative number until a trainable sample has it.
        """
        assert self.task is not None
        scenario, labels = self.settings.scenario, self.progress.labels
        output = scenario.output(label, self.task.name, labels)
        if output is None or not scenario.outputs_by_appearance or label in labels:
            return output
        if label not in self._probe_outputs:
            if not scenario.grow and len(self._probe_outputs) >= scenario.num_outputs(labels):
                return None
            self._probe_outputs[label] = -1 - len(self._probe_outputs)
            self.progress.probe_labels.append(label)
            self._observations.new_probe_labels.append(label)
        return self._probe_outputs[label]

    def _encode_text(self, decoded: DecodedRecord, index: int, *, held_out: bool) -> None:
        """Write the word ids of a text into its sample; the delivery carries new words, as it carries new labels."""
        rows, vocabulary = decoded.text[index], self._vocabulary
        if held_out:
            self._observations.new_probe_words += vocabulary.add_probe_words(rows)
            decoded.x[index] = vocabulary.encode(rows, decoded.x[index].shape, held_out=True)
            return
        was_full = vocabulary.full
        self._observations.new_words += vocabulary.add_words(rows)
        decoded.x[index] = vocabulary.encode(rows, decoded.x[index].shape)
        if vocabulary.full and not was_full:
            text = "the vocabulary is full (input.vocabulary: %d words); new words are unknown from now on"
            logger.warning(text, vocabulary.size)

    def _other_type_hint(self, label: Label) -> str:
        """Return a hint if the label with the same text and the other type is accepted, or else an empty text."""
        assert self.task is not None
        scenario, other = self.settings.scenario, label_of_other_type(label)
        if other is None or scenario.output(other, self.task.name, self.progress.labels) is None:
            return ""
        return f"; {other!r} is another label: {'text' if isinstance(other, str) else 'a number'}"

    def _accepted_labels(self) -> str:
        """Return a text that names the labels that the current task accepts."""
        assert self.task is not None
        scenario = self.settings.scenario
        declared = scenario.declared_classes(self.task.name)
        if declared is not None or not isinstance(scenario.classes, int):
            accepted = declared or scenario.classes
            assert not isinstance(accepted, int)
            return f"accepted: {', '.join(map(repr, accepted[:100]))}"[:200]
        return f"all {scenario.classes} outputs are taken; a new job with grow_head: true adds outputs for new labels"

    def _batch_end(self, outcomes: np.ndarray, start: int) -> int:
        """Return the index after the sample that fills the batch or ends the task, or after the record's last sample."""
        assert self.task is not None
        room = self.settings.batch_size - self._pending.size
        trainable = np.flatnonzero(outcomes[start:] == SampleUse.TRAINABLE)
        stop = len(outcomes) if len(trainable) < room else start + int(trainable[room - 1]) + 1
        if self.settings.samples_per_task is not None:
            stop = min(stop, start + max(0, self.settings.samples_per_task - self.task.counts["consumed"]))
        return stop

    def _add_samples(
        self, topic: str, decoded: DecodedRecord, outcomes: np.ndarray, outputs: np.ndarray, indices: slice
    ) -> None:
        """Add a range of a record's samples to the batch and to the observations, by their outcomes."""
        assert self.task is not None
        outcome, x, y = outcomes[indices], decoded.x[indices], outputs[indices]
        trainable = outcome == SampleUse.TRAINABLE
        if trainable.any():
            self._pending.x.append(x[trainable])
            self._pending.y.append(y[trainable])
            self._pending.size += int(trainable.sum())
        self._observations.consumed[topic] += len(outcome)
        self.task.counts["consumed"] += len(outcome)
        self.num_undelivered += len(outcome)
        if (held_out := outcome == SampleUse.HELD_OUT).any():
            self._observations.held_out.append(HeldOut(self.task.index, x[held_out], y[held_out]))
            self._observations.outcomes[topic, Outcome.HELD_OUT] += int(held_out.sum())
        for offset in np.flatnonzero(outcome == SampleUse.REJECTED).tolist():
            self._observations.outcomes[topic, Outcome.REJECTED] += 1
            self._observations.rejected[topic, decoded.rejected[indices.start + offset].reason] += 1

    def _count(self, topic: str, outcome: Outcome, count: int) -> None:
        """Count consumed samples that are neither learned, held out nor rejected."""
        self._observations.consumed[topic] += count
        self._observations.outcomes[topic, outcome] += count
        self.num_undelivered += count

    def _has_enough_samples(self) -> bool:
        """Return whether the current task has reached its number of samples (`task_end.records`)."""
        limit = self.settings.samples_per_task
        return limit is not None and self.task is not None and self.task.counts["consumed"] >= limit

    def _add_marker(self, partition: Partition) -> Iterator[Delivery]:
        """Count a task-end marker; yield the task's end if all of its partitions have one."""
        task = self.task
        if task is None or partition[0] != task.name or partition[1] in task.marked_partitions:
            return  # a marker of a task that has ended
        task.marked_partitions.append(partition[1])
        self._observations.task_end_markers.append(partition)
        if set(self._task_partitions) <= set(task.marked_partitions):
            yield self.end_task(TaskEndReason.MARKER)

    def _deliver(self, task_end_reason: TaskEndReason | None = None) -> Delivery:
        """Return a delivery with everything since the last one."""
        batch = None
        if self._pending.size:
            assert self.task is not None
            x = torch.from_numpy(np.concatenate(self._pending.x))
            y = torch.from_numpy(np.concatenate(self._pending.y))
            batch = Batch(x, y, torch.full((len(y),), self.task.index, dtype=torch.int64))
        topics = {topic for topic, _ in self._read_positions}
        ids = {topic: topic_id for topic, topic_id in self._topic_ids.items() if topic in topics}
        delivery = Delivery(
            positions=Positions(dict(self._read_positions), ids, self.cluster_id),
            observations=self._observations,
            batch=batch,
            task_end_reason=task_end_reason,
            newest_timestamp=self._newest_timestamp,
        )
        self.num_undelivered, self._has_skipped = 0, False
        self._pending, self._observations, self._newest_timestamp = _PendingSamples(), Observations(), None
        return delivery


def _fewer_samples_error(record: Record, skip: int, decoded: DecodedRecord) -> ConfigurationError:
    """Return the error for a record of which `skip` samples were consumed before, but which now has fewer samples."""
    why = f" ({decoded.rejected[0].reason}: {decoded.rejected[0]})" if 0 in decoded.rejected else ""
    place = f"{record.topic}[{record.partition}] offset {record.offset}"
    text = f"{place}: {skip} samples of this record were consumed before, but now it decodes to {len(decoded)}{why}"
    return ConfigurationError(
        f"{text}; use the configuration with which it was read before (check stream.max_record_bytes)"
    )
