"""Records to batches: a batch is the next `batch_size` trainable samples in offset order, whatever sizes were polled."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from streamlearn.data import (
    Batch,
    Delivery,
    HeldOut,
    Observations,
    Position,
    Positions,
    Rejected,
    StreamlearnError,
    label_of_other_type,
)
from streamlearn.stream.burst import Burst
from streamlearn.stream.log import CONTROL_HEADER, PROBE, TASK_END, USE_HEADER
from streamlearn.stream.text import Vocabulary

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from streamlearn.data import Label, Partition, Progress, Task
    from streamlearn.scenario import Scenario
    from streamlearn.stream.codec import Chunk, Codec
    from streamlearn.stream.deadletter import DeadLetterWriter
    from streamlearn.stream.holdout import HoldOut
    from streamlearn.stream.log import Record

logger = logging.getLogger(__name__)

TRAIN, HELD_OUT, REJECTED = 0, 1, 2
FLUSH_SAMPLES = 2000


@dataclass
class AssemblerSettings:
    """What turns records into samples and samples into batches."""

    codec: Codec
    holdout: HoldOut
    scenario: Scenario
    dead_letters: DeadLetterWriter
    batch_size: int
    samples_per_task: int | None = None  # end a task after so many samples
    dead_letter_late: bool = False  # send what comes after its task's end to the dead letters


@dataclass
class _Pending:
    """Trainable samples that wait for their batch to fill."""

    x: list[np.ndarray] = field(default_factory=list)
    y: list[np.ndarray] = field(default_factory=list)
    size: int = 0


class Assembler:
    """Eats records in the order they are read and gives deliveries; a function of those records and its progress alone.

    It runs ahead of the learner on a copy of the progress, so nothing here is state: everything travels in deliveries.
    """

    def __init__(self, settings: AssemblerSettings, progress: Progress) -> None:
        self.settings = settings
        self.progress = progress
        for task in progress.tasks:  # one that is being refined takes no more samples
            task.state = "active" if task.state == "active" else "ended"
        self.task: Task | None = progress.current
        self.cluster_id: str | None = None
        self.num_undelivered = 0  # samples consumed that no delivery carries yet
        self.burst = Burst()
        self._pending = _Pending()
        self._observations = Observations()
        self._scanned: dict[Partition, Position] = {}
        self._positions_skipped = False  # positions have moved on that no delivery carries yet
        self._newest: float | None = None
        self._topic_ids: dict[str, str] = dict(progress.positions.topic_ids)
        self._partitions: tuple[int, ...] = ()
        self._logged_rejected: set[str] = set()  # topics of which a rejected sample was logged
        self._logged_late: set[str] = set()  # topics of which a late sample was logged
        text = settings.codec.text
        self._vocabulary = Vocabulary(
            progress.vocabulary, text.vocabulary if text is not None else 0, progress.probe_words
        )
        self._probe_outputs: dict[Label, int] = {label: -1 - place for place, label in enumerate(progress.probe_labels)}

    def set_partitions(self, topic: str, topic_id: str | None, partitions: tuple[int, ...]) -> None:
        """Say which partitions the current task has; new ones may be added while it runs."""
        if topic_id is not None:
            self._topic_ids[topic] = topic_id
        if self.task is not None and topic == self.task.name:
            self._partitions = partitions

    def read_position(self, partition: Partition) -> Position | None:
        """Return up to where a partition was read, or None if nothing was read since the start."""
        return self._scanned.get(partition)

    @property
    def undelivered(self) -> Counter[str]:
        """The samples, by topic, that no delivery carries yet."""
        return Counter(dict(self._observations.consumed))  # dict: copied at once, whatever the reader does meanwhile

    def topic_id(self, topic: str) -> str | None:
        """Return the id of the topic that was read so far under this name."""
        return self._topic_ids.get(topic)

    def begin_task(self, task: Task) -> Delivery:
        """Return the delivery that begins a task."""
        self.task = replace(task, labels=list(task.labels), counts=Counter(), marked_partitions=[])
        self.progress.tasks.append(self.task)
        return Delivery(new_task=task)

    def is_last_marker(self, record: Record) -> bool:
        """Tell whether a record is the last marker that the current task still needs."""
        task = self.task
        if task is None or record.topic != task.name or record.header(CONTROL_HEADER) != TASK_END:
            return False
        return set(self._partitions) <= {*task.marked_partitions, record.partition}

    def feed(self, record: Record) -> Iterator[Delivery]:
        """Take one record; yield what it completes."""
        partition = (record.topic, record.partition)
        expected = self._scanned.get(partition) or self.progress.positions.by_partition.get(partition) or Position(0)
        chunk = None if record.header(CONTROL_HEADER) == TASK_END else self.settings.codec.decode(record)
        begin = record.offset if record.begin is None else record.begin  # it may stand for a whole batch of records
        skip = expected.skip if begin <= expected.offset <= record.offset else 0
        if chunk is not None and skip >= max(1, len(chunk)):
            raise _size_changed(record, skip, chunk)
        learns = chunk is not None and record.offset >= expected.offset and not self._is_late(record)
        outcomes, outputs = self._sort(record, chunk, skip) if chunk is not None and learns else (None, None)
        if chunk is not None and not learns and record.offset >= expected.offset:
            self._report_late(record, chunk, skip)
        # nothing above changes what was counted: a dead letter that cannot be sent leaves the record unread
        self._observations.records[partition] += 1
        self._observations.num_bytes[record.topic] += len(record.key or b"") + len(record.value or b"")
        self._newest = max(record.timestamp, self._newest or 0.0)
        if chunk is not None and record.offset < expected.offset:
            self._count(record.topic, "duplicates", len(chunk))
            return
        self._scanned[partition] = Position(record.offset + 1)
        if record.begin is not None and (missed := record.offset - max(record.begin, expected.offset)) > 0:
            self._observations.lost_offsets[record.topic, "oversize"] += (
                missed  # the record stands for more than itself
            )
        if chunk is None:
            yield from self._add_marker(partition)
        elif outcomes is None or outputs is None:
            self._count(record.topic, "late", len(chunk) - skip)
        else:
            self._update_burst(record, chunk, outcomes, skip)
            yield from self._samples(record, chunk, outcomes, outputs, skip)

    def flush_observations(self) -> Delivery | None:
        """Return what was found so far where no sample waits for its batch, or None if there is nothing to say."""
        return None if self._pending.size or not (self._observations or self._positions_skipped) else self._deliver()

    def flush_short_batch(self) -> Delivery | None:
        """Return the waiting samples as a short batch (`linger`), or None if none waits."""
        return self._deliver() if self._pending.size else None

    def fix_end_offsets(self, ends: dict[int, int], fixed_by: str = "next_topic") -> Delivery:
        """Return the delivery that fixes the current task's end offsets."""
        assert self.task is not None
        self.task.end_offsets, self.task.fixed_by = ends, fixed_by
        return Delivery(end_offsets=ends, fixed_by=fixed_by)

    def fix_end_offsets_here(self, partitions: Iterable[int]) -> Delivery:
        """Return the delivery that fixes the current task's end where each of its partitions was read up to."""
        assert self.task is not None
        ends = {}
        for partition in partitions:
            place = (self.task.name, partition)
            at = self._scanned.get(place) or self.progress.positions.by_partition.get(place)
            ends[partition] = at.offset if at is not None else 0
        return self.fix_end_offsets(ends, "command")

    def forgive_rejects(self) -> Delivery | None:
        """Return the delivery after which no restart counts what was rejected so far as a burst again."""
        if (task := self.task) is None:  # it ended, so its positions are delivered
            return None
        return Delivery(forgives_below={p: at.offset for (topic, p), at in self._scanned.items() if topic == task.name})

    def skip_to(self, reached: dict[Partition, int]) -> None:
        """Take the log's word that nothing lies below these offsets: transactions and compaction leave holes."""
        for partition, offset in reached.items():
            at = self._scanned.get(partition) or self.progress.positions.by_partition.get(partition) or Position(0)
            if at < Position(offset):
                self._scanned[partition] = Position(offset)
                self._positions_skipped = True

    def skip_lost_offsets(self, partition: Partition, offset: int, count: int, reason: str) -> None:
        """Go on at `offset`, with so many offsets never seen."""
        self._observations.lost_offsets[partition[0], reason] += count
        self._scanned[partition] = Position(offset)

    def end_task(self, how: str) -> Delivery:
        """Return the task's last, short batch together with its end."""
        assert self.task is not None
        delivery = self._deliver(ends=how)
        self.task.state = "ended"
        self.task = None
        return delivery

    def _samples(
        self, record: Record, chunk: Chunk, outcomes: np.ndarray, outputs: np.ndarray, skip: int
    ) -> Iterator[Delivery]:
        partition, after = (record.topic, record.partition), Position(record.offset + 1)
        start = skip
        while start < len(chunk):
            stop = self._batch_end(outcomes, start)
            self._add_samples(record.topic, chunk, outcomes, outputs, slice(start, stop))
            self._scanned[partition] = after if stop == len(chunk) else Position(record.offset, stop)
            start = stop
            if self._is_count_reached():
                yield self.end_task("count")
                if start < len(chunk):
                    self._count(record.topic, "late", len(chunk) - start)
                    self._scanned[partition] = after
                return
            if self._pending.size == self.settings.batch_size:
                yield self._deliver()
        if not self._pending.size and self.num_undelivered >= FLUSH_SAMPLES:
            yield self._deliver()

    def _is_late(self, record: Record) -> bool:
        task = self.task
        if task is None or record.topic != task.name or record.partition in task.marked_partitions:
            return True
        return task.end_offsets is not None and record.offset >= task.end_offsets.get(record.partition, 0)

    def _sort(self, record: Record, chunk: Chunk, skip: int) -> tuple[np.ndarray, np.ndarray]:
        """Decide each sample's outcome and output, `outcomes [n]` and `outputs [n]`, and send the dead letters."""
        assert self.task is not None
        outcomes = np.full(len(chunk), TRAIN, np.uint8)
        outputs = np.zeros(len(chunk), np.int64)
        probe = record.header(USE_HEADER) == PROBE
        known: dict[tuple[Label, bool], int | None] = {}
        limit = self.settings.samples_per_task
        room = len(chunk) if limit is None else max(0, limit - self.task.counts["consumed"])
        for index in range(skip, min(len(chunk), skip + room)):  # what comes after the count is late, whatever it is
            if index not in chunk.rejected:
                label = chunk.y[index]
                held_out = probe or self.settings.holdout.is_held_out(chunk.hash_input(index), label, record.key)
                if (label, held_out) not in known:
                    known[label, held_out] = self._probe_output(label) if held_out else self._output(label)
                if (output := known[label, held_out]) is None:
                    text = f"label {label!r:.80} has no output; {self._accepted()}{self._other_type_hint(label)}"
                    chunk.rejected[index] = Rejected("label_range", text)
                else:
                    outputs[index] = output
                    if held_out:
                        outcomes[index] = HELD_OUT
                    if index in chunk.text:
                        self._encode_text(chunk, index, held_out=held_out)
            if index in chunk.rejected:
                outcomes[index] = REJECTED
        rejected = np.flatnonzero(outcomes == REJECTED).tolist()
        why = {index: chunk.rejected[index] for index in rejected}
        self.settings.dead_letters.write_rejected(record, why, len(chunk), self.topic_id(record.topic))
        if skip + room < len(chunk):
            self._report_late(record, chunk, skip + room)
        if rejected and record.topic not in self._logged_rejected:  # once: what comes after is counted
            self._logged_rejected.add(record.topic)
            where = f"{record.topic}[{record.partition}] offset {record.offset}"
            logger.warning("%s: a sample is rejected: %s; further ones are counted", where, chunk.rejected[rejected[0]])
        return outcomes, outputs

    def _report_late(self, record: Record, chunk: Chunk, start: int) -> None:
        """LogReader a task's first late sample, and send the late samples of a record to the dead letters where configured."""
        if record.topic not in self._logged_late:
            self._logged_late.add(record.topic)
            where = f"{record.topic}[{record.partition}] offset {record.offset}"
            text = "%s: a sample comes after the end of its task: late, and not learned; further ones are counted"
            logger.warning(text, where, extra={"task": record.topic})
        if self.settings.dead_letter_late:
            late = Rejected("late", f"came after the end of task {record.topic}")
            why = dict.fromkeys(range(start, len(chunk)), late)
            self.settings.dead_letters.write_rejected(record, why, len(chunk), self.topic_id(record.topic))

    def _update_burst(self, record: Record, chunk: Chunk, outcomes: np.ndarray, skip: int) -> None:
        assert self.task is not None
        if not chunk.rejected:
            self.burst.clear()
        elif record.offset >= self.task.forgiven_below.get(record.partition, 0):
            self.burst.update(record, outcomes == REJECTED, chunk.rejected, skip)

    def _output(self, label: Label) -> int | None:
        """Return the output of a trained sample's label, or None if it has none; a new label takes the next one."""
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
                    logger.warning(
                        "topic %s: label %r comes beside %r: they are two labels", self.task.name, label, other
                    )
        return output

    def _probe_output(self, label: Label) -> int | None:
        """Return the output of a held-out sample's label, or None if it has none.

        A label that training has not met takes no output and does not compete: probes must not change what is learned.
        Where outputs go by first appearance, it has a negative number, until training meets it.
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

    def _encode_text(self, chunk: Chunk, index: int, *, held_out: bool) -> None:
        """Write a text's ids into its sample; what is new in it travels with the delivery, as labels do."""
        rows, vocabulary = chunk.text[index], self._vocabulary
        if held_out:
            self._observations.new_probe_words += vocabulary.add_probe_words(rows)
            chunk.x[index] = vocabulary.encode(rows, chunk.x[index].shape, held_out=True)
            return
        was_full = vocabulary.full
        self._observations.new_words += vocabulary.add_words(rows)
        chunk.x[index] = vocabulary.encode(rows, chunk.x[index].shape)
        if vocabulary.full and not was_full:
            logger.warning("input.vocabulary: all %d words are taken; others are unknown from here on", vocabulary.size)

    def _other_type_hint(self, label: Label) -> str:
        """Return the hint that a label of the other type is accepted, or nothing."""
        assert self.task is not None
        scenario, other = self.settings.scenario, label_of_other_type(label)
        if other is None or scenario.output(other, self.task.name, self.progress.labels) is None:
            return ""
        return f"; {other!r} is another label: {'text' if isinstance(other, str) else 'a number'}"

    def _accepted(self) -> str:
        assert self.task is not None
        scenario = self.settings.scenario
        declared = scenario.declared_classes(self.task.name)
        if declared is not None or not isinstance(scenario.classes, int):
            accepted = declared or scenario.classes
            assert not isinstance(accepted, int)
            return f"accepted: {', '.join(map(repr, accepted[:100]))}"[:200]
        return f"all {scenario.classes} outputs are taken; a new job with grow_head: true adds outputs for new labels"

    def _batch_end(self, outcomes: np.ndarray, start: int) -> int:
        """Return where the batch fills, or the task's count is reached, or the chunk ends."""
        assert self.task is not None
        room = self.settings.batch_size - self._pending.size
        trainable = np.flatnonzero(outcomes[start:] == TRAIN)
        stop = len(outcomes) if len(trainable) < room else start + int(trainable[room - 1]) + 1
        if self.settings.samples_per_task is not None:
            stop = min(stop, start + max(0, self.settings.samples_per_task - self.task.counts["consumed"]))
        return stop

    def _add_samples(self, topic: str, chunk: Chunk, outcomes: np.ndarray, outputs: np.ndarray, span: slice) -> None:
        assert self.task is not None
        part, x, y = outcomes[span], chunk.x[span], outputs[span]
        keep = part == TRAIN
        if keep.any():
            self._pending.x.append(x[keep])
            self._pending.y.append(y[keep])
            self._pending.size += int(keep.sum())
        self._observations.consumed[topic] += len(part)
        self.task.counts["consumed"] += len(part)
        self.num_undelivered += len(part)
        if (held := part == HELD_OUT).any():
            self._observations.held_out.append(HeldOut(self.task.index, x[held], y[held]))
            self._observations.outcomes[topic, "held_out"] += int(held.sum())
        for offset in np.flatnonzero(part == REJECTED).tolist():
            self._observations.outcomes[topic, "rejected"] += 1
            self._observations.rejected[topic, chunk.rejected[span.start + offset].reason] += 1

    def _count(self, topic: str, outcome: str, count: int) -> None:
        self._observations.consumed[topic] += count
        self._observations.outcomes[topic, outcome] += count
        self.num_undelivered += count

    def _is_count_reached(self) -> bool:
        limit = self.settings.samples_per_task
        return limit is not None and self.task is not None and self.task.counts["consumed"] >= limit

    def _add_marker(self, partition: Partition) -> Iterator[Delivery]:
        task = self.task
        if task is None or partition[0] != task.name or partition[1] in task.marked_partitions:
            return  # a marker of a task that has ended
        task.marked_partitions.append(partition[1])
        self._observations.task_end_markers.append(partition)
        if set(self._partitions) <= set(task.marked_partitions):
            yield self.end_task("marker")

    def _deliver(self, ends: str | None = None) -> Delivery:
        batch = None
        if self._pending.size:
            assert self.task is not None
            x = torch.from_numpy(np.concatenate(self._pending.x))
            y = torch.from_numpy(np.concatenate(self._pending.y))
            batch = Batch(x, y, torch.full((len(y),), self.task.index, dtype=torch.int64))
        topics = {topic for topic, _ in self._scanned}
        ids = {topic: topic_id for topic, topic_id in self._topic_ids.items() if topic in topics}
        delivery = Delivery(
            positions=Positions(dict(self._scanned), ids, self.cluster_id),
            observations=self._observations,
            batch=batch,
            task_end_reason=ends,
            newest_timestamp=self._newest,
        )
        self.num_undelivered, self._positions_skipped = 0, False
        self._pending, self._observations, self._newest = _Pending(), Observations(), None
        return delivery


def _size_changed(record: Record, skip: int, chunk: Chunk) -> StreamlearnError:
    """Return the refusal to go on in a record of which samples are done, and which has no further one any more."""
    why = f" ({chunk.rejected[0].reason}: {chunk.rejected[0]})" if 0 in chunk.rejected else ""
    where = f"{record.topic}[{record.partition}] offset {record.offset}"
    text = f"{where}: {skip} samples of this record were done before, and now it is read as {len(chunk)}{why}"
    return StreamlearnError(
        f"{text}; go back to the configuration that read it, stream.max_record_bytes above all", code=78
    )
