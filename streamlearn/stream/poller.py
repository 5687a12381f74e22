"""Poll the log, feed its records to the assembler, and put the deliveries into the queue."""

from __future__ import annotations

import contextlib
import logging
import time
from typing import TYPE_CHECKING

from streamlearn.core.errors import AccessError, DataError, StreamlearnError
from streamlearn.core.tasks import TaskEndReason
from streamlearn.stream.assignment import Assignment
from streamlearn.stream.log_watch import LogWatch
from streamlearn.stream.logs.base import BrokerUnavailable
from streamlearn.stream.schedule import TopicSchedule

if TYPE_CHECKING:
    from collections.abc import Sequence

    from streamlearn.core.deliveries import Delivery
    from streamlearn.core.positions import Partition
    from streamlearn.stream.assembler import Assembler
    from streamlearn.stream.config import StreamConfig
    from streamlearn.stream.deadletter import DeadLetterWriter
    from streamlearn.stream.logs.base import LogReader, Record, Unreadable
    from streamlearn.stream.queue import DeliveryQueue
    from streamlearn.stream.status import StreamStatus

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.2
PAUSED_POLL_SECONDS = 0.05  # while the queue is full: the reader checks this often whether there is room again


class Poller:
    """One step of reading a connected log at a time. Only the reader thread uses it."""

    def __init__(
        self,
        log_reader: LogReader,
        assembler: Assembler,
        config: StreamConfig,
        dead_letters: DeadLetterWriter,
        queue: DeliveryQueue,
        status: StreamStatus,
        refresh_seconds: float,
    ) -> None:
        self.log_reader = log_reader
        self.assembler = assembler
        self.config = config
        self.dead_letters = dead_letters
        self.queue = queue
        self.status = status
        self.last_record = time.monotonic()  # when a record last arrived, or reading began again
        self.last_polled: float | None = None  # when a record last arrived
        self._watch = LogWatch(log_reader, config.on_offset_out_of_range, refresh_seconds)
        self._schedule = TopicSchedule(config, self._watch, dead_letters.topic)
        self._assignment = Assignment(log_reader, status, merged=config.merge == "fixed")
        self._linger_since: float | None = None
        self._burst: str | None = None  # why reading has stopped until `continue_after_burst`

    # -- polling

    def poll_and_feed(self) -> None:
        """Poll once, feed the records, and end the task if it is complete."""
        try:
            self._poll_and_feed()
        finally:
            self.queue.publish_undelivered(self.assembler.undelivered)

    def _poll_and_feed(self) -> None:
        self._assignment.pause_or_resume(queue_full=self.queue.is_full(was_full=self.status.paused))
        if (records := self._poll()) is None:
            return
        self._check_topic_ids({record.topic for record in records})
        for record in self._assignment.in_order(records, self.assembler.task):
            self._check_partitions_before_end(record)
            self._feed(record)
            if self._stop_at_burst():
                return  # the records after the burst count as unread, so `_finish_poll` would be wrong
        self._finish_poll(records)

    def _poll(self) -> list[Record] | None:
        """Return the next records, or None if a topic had to be left out because its permission was withdrawn."""
        try:
            return self.log_reader.poll(PAUSED_POLL_SECONDS if self.status.paused else POLL_SECONDS)
        except AccessError:
            self._watch.check_soon(topics=True)
            self._check_log(time.monotonic())  # raises if it is the current topic; leaves out any other
            if not self._watch.left_out:
                raise
            return None

    def _feed(self, record: Record) -> None:
        for delivery in self.assembler.feed(record):
            self._put(delivery)

    def _feed_waiting(self) -> None:
        for record in self._assignment.pop_waiting():
            self._feed(record)

    def _put(self, delivery: Delivery | None) -> None:
        """Put a delivery, if there is one, into the queue."""
        if delivery is None:
            return
        if delivery.batch is not None:
            self._linger_since = None
        if delivery.task_end_reason is not None:
            self._watch.check_soon()  # to begin the next task
        self.queue.put(delivery, self.assembler.undelivered)

    def _finish_poll(self, records: Sequence[Record]) -> None:
        """Update the offsets after a poll, end the task if it is complete, and deliver what must not wait longer."""
        if records:
            self.last_record = self.last_polled = time.monotonic()
            self._assignment.advance(records)
        self._end_task_if_complete(polled=bool(records))
        linger = self.config.linger
        if linger is not None and self.assembler.num_undelivered:
            self._linger_since = self._linger_since or time.monotonic()
            if time.monotonic() - self._linger_since >= linger:
                self._put(self.assembler.flush_short_batch())
        if not records:
            self._put(self.assembler.flush_observations())
        if not self.assembler.num_undelivered:
            self._linger_since = None

    def _check_topic_ids(self, topics: set[str]) -> None:
        """Raise if the records come from a topic that was deleted and created again: the client does not notice it."""
        for topic in topics:
            known = self.assembler.topic_id(topic)
            info = self.log_reader.describe(topic) if known is not None else None
            if known is not None and (info is None or info.topic_id != known):
                raise BrokerUnavailable(f"topic {topic} is no longer the topic that was read so far")

    def _check_partitions_before_end(self, record: Record) -> None:
        """Before the last marker of a task, ask whether its topic has new partitions, which need a marker too."""
        if self.assembler.is_last_marker(record) and self._has_new_partitions(record.topic):
            info = self._watch.topics[record.topic]
            self.assembler.set_partitions(info.name, info.topic_id, info.partitions)

    def _has_new_partitions(self, topic: str) -> bool:
        return self._watch.find_new_partitions(topic, self.assembler.read_state())

    # -- bursts of rejected samples, and damaged batches

    def _stop_at_burst(self) -> bool:
        """Stop reading if too many samples in a row were rejected; return whether it stops.

        Raises `DataError` if `on_burst` is exit; only logs if it is continue.
        """
        config, burst = self.config.dead_letter, self.assembler.burst
        if config.burst is None or burst.length < config.burst:
            return False
        problem = str(burst)
        logger.error("%s (stream.dead_letter.on_burst: %s)", problem, config.on_burst)
        if config.on_burst == "continue":
            burst.clear()
            return False
        self._put(self.assembler.flush_observations())
        self._put(self.assembler.forgive_rejects())
        if config.on_burst == "exit":
            raise DataError(problem)
        self._burst = self.status.problem = problem
        self.status.stopped_by_burst = True
        return True

    def continue_after_burst(self) -> None:
        """Continue reading after a burst has stopped it, and set the count of rejects to zero."""
        self._burst, self.status.stopped_by_burst = None, False
        self.assembler.burst.clear()
        self.start_at_positions()  # records that were polled after the burst are read again

    def skip_damaged_batch(self, error: Unreadable) -> bool:
        """Skip a damaged batch if the configuration says so, or if its task has ended; return whether it was skipped.

        The skipped offsets count as lost. Raises `StreamlearnError` if `stream.on_offset_out_of_range` is exit.
        """
        read, partition, policy = self.assembler.read_state(), error.partition, self.config.on_offset_out_of_range
        is_current = partition is None or read.current is None or partition[0] == read.current
        if is_current and policy == "exit":
            raise StreamlearnError(str(error)) from error
        if (is_current and policy == "stop") or partition is None or self._assignment.has_waiting:
            return False  # records that wait in a merge come before the damaged batch, and must not be lost
        bounds = None
        with contextlib.suppress(StreamlearnError):
            bounds = self.log_reader.bounds([partition]).get(partition)
        target = min(error.end, bounds.end if bounds is not None else 0)  # the size in a damaged batch can be wrong
        position = read.positions.get(partition)
        lost = target - max(error.begin, position.offset if position is not None else 0)
        if lost <= 0:
            return False
        logger.error("%s: continuing at %d; %d offsets are lost", error, target, lost)
        self.assembler.skip_lost_offsets(partition, target, lost, "corrupt")
        return True

    # -- checking the log

    def start_at_positions(self) -> None:
        """Check the log, and assign all partitions again at the assembler's positions."""
        self.last_record = time.monotonic()  # the time of an outage does not count for `idle`
        self._watch.check_soon(topics=True)
        self._assignment.reset()
        self._check_log(time.monotonic())

    def check_log_if_due(self) -> None:
        """Check the log if it is time."""
        if self._watch.is_due(now := time.monotonic()):
            self._check_log(now)

    def _check_log(self, now: float) -> None:
        """Ask the log for what `poll` does not report (topics, ids, bounds); then begin a task, assign, and fix ends."""
        read = self.assembler.read_state()
        self._watch.update(read, now)
        names = self._schedule.topics_in_order(read.begun)
        self._watch.update_bounds(names, read, now)
        self.status.connected = True
        self.status.last_contact, self.status.last_contact_monotonic = time.time(), now
        self.status.problem = self.dead_letters.retry_failed() or self._find_problem() or self._burst
        if self.status.problem is not None:
            return
        self._begin_next_task(names)
        self._assign_partitions()
        next_offsets = self._assignment.update_offsets()
        if not self._assignment.has_waiting:
            self.assembler.skip_to(next_offsets)
        self.status.behind_open_transaction = self._watch.find_open_transactions(next_offsets, now)
        self._watch.check_for_stall(next_offsets, self._assignment.paused, self.last_record, now)
        assigned = {p: bounds for p, bounds in self._watch.bounds.items() if p in next_offsets}
        self.status.begin_offsets = {p: bounds.begin for p, bounds in assigned.items()}
        self.status.end_offsets = {p: bounds.end for p, bounds in assigned.items()}
        self._fix_end_offsets_if_passed(names)

    def _find_problem(self) -> str | None:
        """Return why reading must stop, or None. Skip what retention has removed, if the configuration says so."""
        problem, lost = self._watch.find_problem(self.assembler.read_state(), self.status.problem)
        for each in lost:
            self.assembler.skip_lost_offsets(each.partition, each.offset, each.count, "retention")
            self._assignment.restart(each.partition)
        return problem

    def _assign_partitions(self) -> None:
        """Read all partitions of all tasks that have begun, each from its position."""
        offsets: dict[Partition, int] = {}
        read, bounds = self.assembler.read_state(), self._watch.bounds
        for name in read.begun:
            info = self._watch.topics.get(name)
            if info is None or read.was_recreated(info) or name in self._watch.left_out:
                continue
            self.assembler.set_partitions(name, info.topic_id, info.partitions)
            for p in info.partitions:
                partition = (name, p)
                position = read.positions.get(partition)
                begin = bounds[partition].begin if partition in bounds else 0
                offsets[partition] = position.offset if position is not None else begin
                if name != read.current and partition in bounds:
                    self._fit_to_bounds(partition, offsets)
        self._assignment.set(offsets)

    def _fit_to_bounds(self, partition: Partition, offsets: dict[Partition, int]) -> None:
        """Adjust the offset of an ended task's partition, whose records only count as late, so that it can be read."""
        bounds, offset = self._watch.bounds[partition], offsets[partition]
        if offset > bounds.end:
            del offsets[partition]
        elif offset < bounds.begin:
            self.assembler.skip_lost_offsets(partition, bounds.begin, bounds.begin - offset, "retention")
            offsets[partition] = bounds.begin
            self._assignment.restart(partition)

    # -- tasks

    def _begin_next_task(self, names: Sequence[str]) -> None:
        """Begin the next task if no task is current and its topic has a record.

        Raises `AccessError` if we may not read the topic, `ConfigurationError` if the scenario declares no classes for it.
        """
        read = self.assembler.read_state()
        if read.current is not None:
            return
        found = self._schedule.find_next(names, read.begun)
        if found.finished:
            self.queue.exhausted = True
        if found.topic is None:
            self._set_waiting_for(None if self.queue.exhausted else found.waiting_for)
            return
        self._set_waiting_for(None)
        self._schedule.warn_if_out_of_order(found.topic, read.begun)
        task = self.assembler.make_task(found.topic)
        self._feed_waiting()
        self._put(self.assembler.begin_task(task))
        self.last_record = time.monotonic()

    def _set_waiting_for(self, topic: str | None) -> None:
        if topic is not None and topic != self.status.waiting_for:
            missing = "has no record yet" if topic in self._watch.topics else "does not exist yet"
            logger.info("waiting for topic %s, which %s", topic, missing, extra={"topic": topic})
        self.status.waiting_for = topic

    def _fix_end_offsets_if_passed(self, names: Sequence[str]) -> None:
        """Fix the end offsets of the current task when a later topic has a record (`task_end.next_topic`)."""
        task = self.assembler.task
        if task is None or not self._schedule.is_passed(task, names, self.assembler.read_state().begun):
            return
        if self._has_new_partitions(task.name):
            return  # they are not assigned yet; the next check fixes the offsets
        partitions = self._watch.partitions([task.name])
        now = self.log_reader.bounds(partitions)  # asked after the later record was seen, so that no record is missed
        if len(now) == len(partitions):  # otherwise wait until all partitions are known
            self._put(self.assembler.fix_end_offsets({p: now[task.name, p].end for _, p in partitions}))

    def _end_task_if_complete(self, *, polled: bool) -> None:
        """End the current task if its end offsets are reached, or if no record has arrived for `task_end.idle` seconds."""
        task = self.assembler.task
        if task is None:
            return
        if task.end_offsets is not None:
            ends = {(task.name, p): end for p, end in task.end_offsets.items()}
            reached = {partition: self.log_reader.position(partition) for partition in ends}
            if all(reached[partition] >= end for partition, end in ends.items()):
                self.assembler.skip_to(ends)
                self._put(self.assembler.end_task(task.fixed_by))
            return
        if polled or self.status.paused:
            return
        self._schedule.warn_if_open(task, time.monotonic() - self.last_record)
        idle = self._schedule.is_idle(task, time.monotonic() - self.last_record)
        if idle and not self._has_new_partitions(task.name):
            self._feed_waiting()
            self._put(self.assembler.end_task(TaskEndReason.IDLE))

    def end_task_now(self, topic: str) -> None:
        """End a topic's task where it was read up to, if it is current and its end offsets are not fixed yet.

        If a burst has stopped the reading, the task ends here even if its end offsets are fixed: they cannot be reached.
        """
        task = self.assembler.task
        if task is None or task.name != topic or (task.end_offsets is not None and self._burst is None):
            return
        known = self._watch.topics[topic].partitions if topic in self._watch.topics else ()
        positions = (*self.status.next_offsets, *self.assembler.saved_partitions)
        read = [p for name, p in positions if name == topic]
        # the end offsets are saved, so that a restart ends the task at the same place
        self._put(self.assembler.fix_end_offsets_here(sorted({*known, *read})))
        self._put(self.assembler.end_task(TaskEndReason.COMMAND))
        self._feed_waiting()  # these records count as late
        if self._burst is not None:  # a burst in the ended task must not keep the next one from beginning
            self.continue_after_burst()
