"""The stream reader: a thread that owns the log, decides which topic is the current task, and fills a bounded queue."""

from __future__ import annotations

import contextlib
import logging
import random
import sys
import threading
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING

from streamlearn.core.errors import AccessError, ConfigurationError, DataError, StreamlearnError
from streamlearn.core.tasks import Task, TaskEndReason
from streamlearn.core.text import natural_key
from streamlearn.stream.logs.base import BrokerUnavailable, Unreadable
from streamlearn.stream.merge import PartitionMerge

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from streamlearn.core.deliveries import Delivery
    from streamlearn.core.positions import Partition, Position, Positions
    from streamlearn.stream.assembler import Assembler
    from streamlearn.stream.config import StreamConfig
    from streamlearn.stream.deadletter import DeadLetterWriter
    from streamlearn.stream.logs.base import Bounds, LogReader, Record, TopicInfo

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.2
PAUSED_POLL_SECONDS = 0.05  # while the queue is full: the reader checks this often whether there is room again
CHECK_SECONDS = 1.0  # how often the log is asked for bounds (for lag, later topics and retention)
MAX_BACKOFF = 30.0
OPEN_TASK_SECONDS = 60.0  # without a record: then warn that only a marker can end the task
STABLE_SECONDS = 5.0  # a connection that was open this long, or that returned a record, was a good one
NO_LEADER_SECONDS = 10.0  # how long a partition of the current or next topic may have no leader before it is an outage
OPEN_TRANSACTION_SECONDS = 5.0  # how long an open transaction may delay records before it is logged
STALLED_SECONDS = 60.0  # without a record although records can be read: the client has failed without an error
SWITCH_INTERVAL = 0.0005  # seconds: the longest time that the learner's thread waits for this thread to release the GIL


@dataclass
class StreamStatus:
    """What the reader knows about its log, for status and metrics. Only the reader thread writes it."""

    connected: bool = False
    last_contact: float | None = None  # Unix seconds
    last_contact_monotonic: float | None = None  # the same on the monotonic clock, which never jumps
    begin_offsets: dict[Partition, int] = field(default_factory=dict)  # of the first records that are kept
    end_offsets: dict[Partition, int] = field(default_factory=dict)  # log end offsets; empty while no broker answers
    next_offsets: dict[Partition, int] = field(default_factory=dict)  # of the next records to be read
    # number of offsets that cannot be read yet because of an open transaction
    behind_open_transaction: dict[Partition, int] = field(default_factory=dict)
    num_assigned: int = 0  # partitions
    paused: bool = False  # because the queue is full
    problem: str | None = None  # why reading has stopped
    waiting_for: str | None = None  # the topic, or the pattern of topics, of the next task

    def lag(self, applied: Mapping[Partition, Position]) -> dict[Partition, int]:
        """Return the number of offsets between the applied position (at first: the log's beginning) and the log's end."""
        begins = self.begin_offsets
        return {
            partition: max(0, end - (applied[partition].offset if partition in applied else begins.get(partition, 0)))
            for partition, end in self.end_offsets.items()
        }

    def unread(self) -> dict[Partition, int]:
        """Return the number of offsets between the next offset to be read and the log's end."""
        begins, nexts = self.begin_offsets, self.next_offsets
        return {
            partition: max(0, end - nexts.get(partition, begins.get(partition, 0)))
            for partition, end in self.end_offsets.items()
        }


class StreamReader:
    """Reads a log in a thread of its own, and hands deliveries to the loop, in order.

    The methods under "for the loop" may be called from the loop's thread; everything else runs in the reader thread.
    """

    def __init__(
        self,
        log_reader: LogReader,
        assembler: Assembler,
        config: StreamConfig,
        dead_letters: DeadLetterWriter,
        group: str,
        refresh_seconds: float = 10.0,
    ) -> None:
        self.log_reader = log_reader
        self.assembler = assembler
        self.config = config
        self.dead_letters = dead_letters
        self.group = group
        self.refresh_seconds = refresh_seconds  # how often the log is asked for its topics
        self.status = StreamStatus()
        self.finished = False  # no delivery is left, and there will be no further one
        self._queue: deque[Delivery] = deque()
        self._queued_samples: Counter[str] = Counter()  # by topic
        self._queued_bytes = 0
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)  # a new delivery, an error, or a call of `wake`
        self._woken = False
        self._stopping = threading.Event()
        self._error: BaseException | None = None
        self._exhausted = False  # no further task will begin
        self._commits: dict[Partition, int] = {}  # offsets to commit
        self._thread = threading.Thread(target=self._run, name="reader", daemon=True)
        self._merge = PartitionMerge() if config.merge == "fixed" else None
        self._paused_partitions: set[Partition] = set()
        self._topics: dict[str, TopicInfo] = {}
        self._bounds: dict[Partition, Bounds] = {}
        self._checked = self._refreshed = -1e9  # when `_check_log` last ran, and when it last asked for topics
        self._last_record = time.monotonic()  # when a record last arrived, or the connection was restored
        self._last_polled = -1e9  # when a record last arrived
        self._waiting_since: float | None = None  # since when records can be read but do not arrive
        self._no_leader_since: float | None = None  # since when a partition of the current or next topic has no leader
        self._transaction_since: dict[Partition, float] = {}  # when reading reached an open transaction
        self._left_out: dict[str, str] = {}  # topics, neither current nor next, that do not answer, and why
        self._logged_left_out: dict[str, str] = {}  # the reasons that were logged
        self._linger_since: float | None = None
        self._task_to_end: str | None = None  # the topic of the task that `end_task` must end
        self._logged_open: str | None = None  # the task of which it was logged that it stays open
        self._burst: str | None = None  # why reading has stopped until `resume_after_burst`
        self._burst_resumed = threading.Event()

    # -- for the loop

    def start(self) -> None:
        """Start the reader thread."""
        sys.setswitchinterval(SWITCH_INTERVAL)
        self._thread.start()

    def next_delivery(self, timeout: float) -> Delivery | None:
        """Return the next delivery, or None after `timeout` seconds or a call of `wake`; raises the reader thread's error.

        The main thread waits here, so a signal handler can run meanwhile. This is why a `Condition` is used: in CPython 3.11
        and 3.12, `SimpleQueue.get` waits for ever if a signal handler returns after the deadline.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._error or self._woken, timeout)
            woken, self._woken = self._woken, False
            if self._queue:
                delivery = self._queue.popleft()
                self._queued_samples -= delivery.observations.consumed
                self._queued_bytes -= _num_bytes(delivery)
                return delivery
            if self._error is not None:
                raise self._error
            self.finished = self._exhausted and not woken
        return None

    def wake(self) -> None:
        """Make the waiting call of `next_delivery`, or else the next call, return at once."""
        with self._changed:
            self._woken = True
            self._changed.notify()

    def flush_dead_letters(self) -> None:
        """Wait until all dead letters are acknowledged. A checkpoint may begin only after that."""
        try:
            self.dead_letters.flush()
        except AccessError as error:
            self._error = error  # trying again cannot help: the loop gets the error after the queued deliveries
            raise

    def resume_after_burst(self) -> None:
        """Continue reading if a burst of rejected samples has stopped it, and set the count of rejects to zero."""
        if self._burst is not None:
            self._burst_resumed.set()

    def end_task(self, topic: str) -> None:
        """End the task of this topic at the positions up to which it was read. A repeated call changes nothing."""
        self._task_to_end = topic

    def commit_positions(self, positions: Positions) -> None:
        """Let the reader thread commit these positions to the log soon, for lag graphs."""
        with self._lock:
            self._commits = {partition: position.offset for partition, position in positions.by_partition.items()}

    @property
    def queued_samples(self) -> Counter[str]:
        """The number of samples, by topic, that were read and are in no returned delivery yet."""
        with self._lock:
            return +self._queued_samples + self.assembler.undelivered

    def stop(self) -> None:
        """Stop the reader thread and close the log."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout=15)

    @property
    def alive(self) -> bool:
        """Whether the reader thread runs."""
        return self._thread.is_alive()

    # -- the reader thread

    def _run(self) -> None:
        try:
            self._read_until_stopped()
        except BaseException as error:  # noqa: BLE001 - the loop raises it, because a thread has no caller
            self.status.problem = str(error)
            with self._changed:
                self._error = error
                self._changed.notify()
        finally:
            try:
                with contextlib.suppress(StreamlearnError):  # a failed commit is no reason for an error
                    if self.status.connected and self._commits:
                        self._send_commits()
                        self.log_reader.poll(POLL_SECONDS)  # the client sends commits only while it polls
                self.log_reader.close()
            except Exception as error:  # noqa: BLE001 - it must not hide the error with which the thread ended
                logger.warning("closing the log failed: %s", error)

    def _read_until_stopped(self) -> None:
        """Connect, read, and connect again after each outage."""
        backoff, since, last = 1.0, time.monotonic(), ""
        while not self._stopping.is_set():
            connected = float("inf")
            try:
                self.log_reader.connect()
                self.assembler.cluster_id = self.log_reader.cluster_id
                self.dead_letters.prepare()
                self._start_at_positions()
                connected = time.monotonic()
                while not self._stopping.is_set():
                    self._read_once()
                    since = time.monotonic()
            except BrokerUnavailable as error:
                stable = self._was_stable(connected)
                if self.status.last_contact is None or (self.status.connected and (stable or str(error) != last)):
                    logger.warning("%s; waiting for it", error)
                self.status.connected = False
                self.status.end_offsets = {}
                self.status.problem = last = str(error)
                limit = self.config.startup_timeout
                if limit is not None and self.status.last_contact is None and time.monotonic() - since > limit:
                    raise
                if stable:
                    backoff = 1.0
            except Unreadable as error:
                if self._skip_damaged_batch(error):
                    continue
                if str(error) != last:
                    logger.error("%s; reading has stopped, and is tried again from time to time", error)  # noqa: TRY400 - no traceback
                    backoff = 1.0
                self.status.problem = last = str(error)
            jitter = random.SystemRandom().uniform(0.5, 1.0)  # the global generator belongs to the learner
            self._stopping.wait(backoff * jitter)
            backoff = min(2 * backoff, MAX_BACKOFF)

    def _was_stable(self, connected: float) -> bool:
        """Return whether the connection made at this time was of use, so that its end is the beginning of a new outage."""
        return self._last_polled > connected or time.monotonic() - connected > STABLE_SECONDS

    def _skip_damaged_batch(self, error: Unreadable) -> bool:
        """Skip a damaged batch if the configuration says so, or if its task has ended; return whether it was skipped.

        The skipped offsets count as lost. Raises `StreamlearnError` if `stream.on_offset_out_of_range` is exit.
        """
        task, partition, policy = self.assembler.task, error.partition, self.config.on_offset_out_of_range
        is_current = partition is None or task is None or partition[0] == task.name
        if is_current and policy == "exit":
            raise StreamlearnError(str(error)) from error
        if (is_current and policy == "stop") or partition is None or self._merge:
            return False  # records that wait in a merge come before the damaged batch, and must not be lost
        bounds = None
        with contextlib.suppress(StreamlearnError):
            bounds = self.log_reader.bounds([partition]).get(partition)
        target = min(error.end, bounds.end if bounds is not None else 0)  # the size in a damaged batch can be wrong
        position = self._position(partition)
        lost = target - max(error.begin, position.offset if position is not None else 0)
        if lost <= 0:
            return False
        logger.error("%s: continuing at %d; %d offsets are lost", error, target, lost)
        self.assembler.skip_lost_offsets(partition, target, lost, "corrupt")
        return True

    def _read_once(self) -> None:
        """Handle the requests of other threads, check the log if it is time, and poll once."""
        now = time.monotonic()
        if self._burst_resumed.is_set():
            self._burst_resumed.clear()
            self._continue_after_burst()
        if now - self._checked >= CHECK_SECONDS:
            self._check_log(now)
        self._send_commits()
        if (topic := self._task_to_end) is not None:
            self._task_to_end = None
            self._end_task_now(topic)
        if self.status.problem is not None:
            self._stopping.wait(POLL_SECONDS)
            return
        self._pause_or_resume()
        if (records := self._poll()) is None:
            return
        self._check_topic_ids({record.topic for record in records})
        for record in self._in_order(records):
            self._check_partitions_before_end(record)
            for delivery in self.assembler.feed(record):
                self._enqueue(delivery)
            if self._stop_at_burst():
                return  # the records after the burst count as unread, so `_finish_poll` would be wrong
        self._finish_poll(records)

    def _poll(self) -> list[Record] | None:
        """Return the next records, or None if a topic had to be left out because its permission was withdrawn."""
        try:
            return self.log_reader.poll(PAUSED_POLL_SECONDS if self.status.paused else POLL_SECONDS)
        except AccessError:
            self._refreshed = -1e9
            self._check_log(time.monotonic())  # raises if it is the current topic; leaves out any other
            if not self._left_out:
                raise
            return None

    def _in_order(self, records: list[Record]) -> Iterable[Record]:
        """Return the records to feed now: as they arrive, or merged in an order that depends on the log alone."""
        if self._merge is None or self.assembler.task is None:
            return records  # without a current task, all of them are late
        current = self.assembler.task.name
        self._merge.add([record for record in records if record.topic == current])
        late = [record for record in records if record.topic != current]
        return chain(late, self._merge.pop_ready(self._unfinished_partitions(), self.log_reader.position))

    def _feed_waiting(self) -> None:
        """Feed all records that wait in the merge, when no other partition has more records for the task."""
        for record in self._merge.pop_ready([], self.log_reader.position) if self._merge is not None else ():
            for delivery in self.assembler.feed(record):
                self._enqueue(delivery)

    def _unfinished_partitions(self) -> list[Partition]:
        """Return the partitions of the current task that can still have records for it."""
        task = self.assembler.task
        if task is None:
            return []
        ends = task.end_offsets or {}
        return [
            (task.name, p)
            for name, p in self.status.next_offsets
            if name == task.name
            and p not in task.marked_partitions
            and (p not in ends or self.log_reader.position((name, p)) < ends[p])
        ]

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
        self._enqueue(self.assembler.flush_observations())
        self._enqueue(self.assembler.forgive_rejects())
        if config.on_burst == "exit":
            raise DataError(problem)
        self._burst = self.status.problem = problem
        return True

    def _continue_after_burst(self) -> None:
        self._burst = None
        self.assembler.burst.clear()
        self._start_at_positions()  # records that were polled after the burst are read again

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
            info = self._topics[record.topic]
            self.assembler.set_partitions(info.name, info.topic_id, info.partitions)

    def _has_new_partitions(self, topic: str) -> bool:
        """Ask whether a topic has other partitions than before; if so, check the log in the next turn to assign them."""
        info = self.log_reader.describe(topic)
        if info is None or info.partitions == self._topics[topic].partitions:
            return False
        if self._was_recreated(info):
            raise BrokerUnavailable(f"topic {topic} is no longer the topic that was read so far")
        self._topics[topic] = info
        self._checked = -1e9
        return True

    def _finish_poll(self, records: list[Record]) -> None:
        """Update the offsets after a poll, end the task if it is complete, and deliver what must not wait longer."""
        if records:
            self._last_record = self._last_polled = time.monotonic()
            for record in records:
                self.status.next_offsets[record.topic, record.partition] = record.offset + 1
        self._end_task_if_complete(polled=bool(records))
        linger = self.config.linger
        if linger is not None and self.assembler.num_undelivered:
            self._linger_since = self._linger_since or time.monotonic()
            if time.monotonic() - self._linger_since >= linger:
                self._enqueue(self.assembler.flush_short_batch())
        if not records:
            self._enqueue(self.assembler.flush_observations())
        if not self.assembler.num_undelivered:
            self._linger_since = None

    def _enqueue(self, delivery: Delivery | None) -> None:
        """Put a delivery, if there is one, into the queue."""
        if delivery is None:
            return
        if delivery.batch is not None:
            self._linger_since = None
        if delivery.task_end_reason is not None:
            self._checked = -1e9  # check the log at once, to begin the next task
        with self._changed:
            self._queued_samples += delivery.observations.consumed
            self._queued_bytes += _num_bytes(delivery)
            self._queue.append(delivery)
            self._changed.notify()

    def _pause_or_resume(self) -> None:
        """Pause fetching while the queue is full, and resume when it is half empty. Polling continues, to stay connected."""
        limits = self.config.queue
        fill = max(self._queued_samples.total() / limits.samples, self._queued_bytes / (limits.megabytes * 1e6))
        if fill >= 1 or (self.status.paused and fill >= 0.5):
            self.status.paused, to_pause = True, set(self.status.next_offsets)
        else:
            self.status.paused, to_pause = False, self._merge.full if self._merge is not None else set()
        if to_pause != self._paused_partitions:
            self.log_reader.pause_partitions(to_pause)
            self._paused_partitions = to_pause

    def _send_commits(self) -> None:
        with self._lock:
            commits, self._commits = self._commits, {}
        if commits:
            try:
                self.log_reader.commit(self.group, commits)
            except StreamlearnError as error:
                logger.warning("positions could not be committed: %s", error)

    # -- which topics

    def _start_at_positions(self) -> None:
        """Check the log, and assign all partitions again at the assembler's positions."""
        self._last_record = time.monotonic()  # the time of an outage does not count for `idle`
        self._refreshed = self._checked = -1e9
        self.status.next_offsets.clear()
        self._check_log(time.monotonic())

    def _check_log(self, now: float) -> None:
        """Ask the log for what `poll` does not report (topics, ids, bounds); then begin a task, assign, and fix ends."""
        if now - self._refreshed >= self.refresh_seconds or self.assembler.task is None:
            self._topics = self.log_reader.topics()
            self._refreshed = now
            self._left_out = {}
        names = self._matching_topics()
        self._update_bounds(names, now)
        self._checked = now
        self.status.connected = True
        self.status.last_contact, self.status.last_contact_monotonic = time.time(), now
        self.status.problem = self.dead_letters.retry_failed() or self._find_problem() or self._burst
        if self.status.problem is not None:
            return
        self._begin_next_task(names)
        self._assign_partitions()
        self._update_offsets(now)
        self._check_for_stall(now)
        assigned = self.status.next_offsets
        self.status.begin_offsets = {p: bounds.begin for p, bounds in self._bounds.items() if p in assigned}
        self.status.end_offsets = {p: bounds.end for p, bounds in self._bounds.items() if p in assigned}
        self._fix_end_offsets_if_passed(names)

    def _update_bounds(self, names: list[str], now: float) -> None:
        """Ask for the bounds of all topics. The current and the next topic must answer; the others can be left out."""
        task, begun = self.assembler.task, {task.name for task in self.assembler.progress.tasks}
        required = [task.name] if task is not None and task.name in self._topics else []
        required += self._topics_not_begun(names)[:1]
        if task is not None and task.name in required and (missing := self._topics[task.name].missing_permission):
            raise AccessError(f"topic {task.name}: {missing}")
        for name in begun & set(names) - set(required):
            if (missing := self._topics[name].missing_permission) is not None:
                self._leave_out(name, missing)
        partitions = self._partitions(required)
        self._bounds = self.log_reader.bounds(partitions)
        leaderless = [f"{topic}[{p}]" for topic, p in partitions if (topic, p) not in self._bounds]
        if not leaderless:
            self._no_leader_since = None
        elif self._no_leader_since is None:
            self._no_leader_since = now  # the partition can be new, or about to get another leader
        elif now - self._no_leader_since > NO_LEADER_SECONDS:
            raise BrokerUnavailable(f"{', '.join(leaderless)}: no leader answers for it")
        others = [name for name in names if name not in required and name not in self._left_out]
        try:
            self._bounds |= self.log_reader.bounds(self._partitions(others))
        except (BrokerUnavailable, AccessError) as error:
            for name in others:
                self._leave_out(name, str(error))
            return
        for name in others:
            silent = [p for topic, p in self._partitions([name]) if (topic, p) not in self._bounds]
            if not silent:
                self._logged_left_out.pop(name, None)
            elif name in begun and self.log_reader.describe(name) is not None:  # or it was deleted
                self._leave_out(name, f"no leader answers for partition {', '.join(map(str, silent))}")

    def _partitions(self, topics: Iterable[str]) -> list[Partition]:
        return [(name, p) for name in topics for p in self._topics[name].partitions]

    def _leave_out(self, topic: str, why: str) -> None:
        """Do not read a topic, neither current nor next, until the topics are asked for again; log each reason once."""
        self._left_out[topic] = why
        if self._logged_left_out.get(topic) != why:
            text = "topic %s: %s; it is not read for now, and learning continues"
            logger.warning(text, topic, why, extra={"topic": topic})
        self._logged_left_out[topic] = why

    def _update_offsets(self, now: float) -> None:
        """Update the offsets from the log's positions, which also pass the gaps that transactions and compaction leave."""
        self.status.next_offsets = {p: self.log_reader.position(p) for p in self.status.next_offsets}
        if not self._merge:
            self.assembler.skip_to(self.status.next_offsets)
        delayed = {
            partition: bounds.end - bounds.readable
            for partition, bounds in self._bounds.items()
            if bounds.last_stable is not None and self.status.next_offsets.get(partition, -1) >= bounds.last_stable
        }
        since = self._transaction_since
        self._transaction_since = {partition: since.get(partition, now) for partition in delayed}
        for (topic, p), begun in self._transaction_since.items():
            if now - begun >= OPEN_TRANSACTION_SECONDS and (topic, p) not in self.status.behind_open_transaction:
                text = "%s[%d]: %d offsets are behind an open transaction; they are read when it ends"
                logger.info(text, topic, p, delayed[topic, p])
        self.status.behind_open_transaction = {
            p: count for p, count in delayed.items() if now - self._transaction_since[p] >= OPEN_TRANSACTION_SECONDS
        }

    def _position(self, partition: Partition) -> Position | None:
        """Return the position up to which a partition was read, in this process or before it."""
        return self.assembler.read_position(partition) or self.assembler.progress.positions.by_partition.get(partition)

    def _matching_topics(self) -> list[str]:
        """Return the existing topics of tasks, in order; topics whose task has begun come first."""
        begun = dict.fromkeys(task.name for task in self.assembler.progress.tasks)  # keeps the order
        if self.config.topics is not None:
            return [name for name in self.config.topics if name in self._topics]
        found = [
            name
            for name in self._topics
            if self.config.reads(name) and name != self.dead_letters.topic and name not in begun
        ]
        if self.config.order == "first_record":
            stamps = {name: self.log_reader.first_timestamp(self._topics[name]) for name in found}
            found.sort(key=lambda name: (stamps[name] or float("inf"), natural_key(name)))
        else:
            found.sort(key=natural_key)
        return [name for name in begun if name in self._topics] + found

    def _has_records(self, topic: str) -> bool:
        """Return whether a topic has a record that can be read."""
        bounds = [self._bounds[topic, p] for p in self._topics[topic].partitions if (topic, p) in self._bounds]
        return any(b.readable > b.begin for b in bounds)

    def _topics_not_begun(self, names: list[str]) -> list[str]:
        begun = {task.name for task in self.assembler.progress.tasks}
        return [name for name in names if name not in begun]

    def _begin_next_task(self, names: list[str]) -> None:
        """Begin the next task if no task is current and its topic has a record.

        Raises `AccessError` if we may not read the topic, 78 if the scenario declares no classes for it.
        """
        if self.assembler.task is not None:
            return
        tasks = self.assembler.progress.tasks
        later = self._topics_not_begun(names)
        if self.config.topics is not None:
            upcoming = self.config.topics[len(tasks)] if len(tasks) < len(self.config.topics) else None
            later = [name for name in later if name == upcoming]
            over = upcoming is None
            if upcoming is not None and upcoming not in self._topics:
                self._check_permission(upcoming)
        else:
            later = [name for name in later if self._has_records(name)]
            upcoming = self.config.pattern
            over = bool(tasks) and not later
        if self.config.on_finished == "exit" and over:
            self._exhausted = True
        if not later or not self._has_records(later[0]):
            self._set_waiting_for(None if self._exhausted else upcoming)
            return
        name = later[0]
        if (missing := self._topics[name].missing_permission) is not None:
            raise AccessError(f"topic {name}: {missing}")
        self._set_waiting_for(None)
        if (
            self.config.order == "name"
            and self.config.pattern
            and tasks
            and natural_key(name) < natural_key(tasks[-1].name)
        ):
            text = "topic %s sorts before %s, whose task has begun already; it is learned after it"
            logger.warning(text, name, tasks[-1].name)
        scenario = self.assembler.settings.scenario
        declared = scenario.declared_classes(name) if scenario.kind == "domain" else []
        if declared is None:
            known = ", ".join(scenario.declared)
            raise ConfigurationError(f"topic {name}: scenario.tasks has no classes for it, only for {known}")
        task = Task(len(tasks), name, labels=list(declared))
        self._feed_waiting()
        self._enqueue(self.assembler.begin_task(task))
        self._last_record = time.monotonic()

    def _check_permission(self, topic: str) -> None:
        """Raise `AccessError` if the topic exists but we may not read it; otherwise we would wait for ever."""
        info = self.log_reader.describe(topic)
        if info is not None and info.missing_permission is not None:
            raise AccessError(f"topic {topic}: {info.missing_permission}")

    def _set_waiting_for(self, topic: str | None) -> None:
        if topic is not None and topic != self.status.waiting_for:
            missing = "has no record yet" if topic in self._topics else "does not exist yet"
            logger.info("waiting for topic %s, which %s", topic, missing, extra={"topic": topic})
        self.status.waiting_for = topic

    def _assign_partitions(self) -> None:
        """Read all partitions of all tasks that have begun, each from its position."""
        offsets: dict[Partition, int] = {}
        for task in self.assembler.progress.tasks:
            info = self._topics.get(task.name)
            if info is None or self._was_recreated(info) or task.name in self._left_out:
                continue
            self.assembler.set_partitions(task.name, info.topic_id, info.partitions)
            for p in info.partitions:
                partition = (task.name, p)
                position = self._position(partition)
                begin = self._bounds[partition].begin if partition in self._bounds else 0
                offsets[partition] = position.offset if position is not None else begin
                if task is not self.assembler.task and partition in self._bounds:
                    self._fit_to_bounds(partition, offsets)
        if set(offsets) != set(self.status.next_offsets):
            self.log_reader.assign(offsets)
            if self._merge is not None:
                self._merge.clear()  # reading starts at the offsets again
            self.status.next_offsets = {p: self.status.next_offsets.get(p, offset) for p, offset in offsets.items()}
        self.status.num_assigned = len(offsets)

    def _fit_to_bounds(self, partition: Partition, offsets: dict[Partition, int]) -> None:
        """Adjust the offset of an ended task's partition, whose records only count as late, so that it can be read."""
        bounds, offset = self._bounds[partition], offsets[partition]
        if offset > bounds.end:
            del offsets[partition]
        elif offset < bounds.begin:
            self.assembler.skip_lost_offsets(partition, bounds.begin, bounds.begin - offset, "retention")
            offsets[partition] = bounds.begin
            self.status.next_offsets.pop(partition, None)

    def _was_recreated(self, info: TopicInfo) -> bool:
        """Return whether a topic has another id than the one that was read under this name."""
        known = self.assembler.topic_id(info.name)
        return known is not None and info.topic_id is not None and known != info.topic_id

    def _find_problem(self) -> str | None:
        """Return why reading must stop, or None. Skip what retention has removed, if the configuration says so."""
        task = self.assembler.task
        for ended in self.assembler.progress.tasks:
            if ended is not task and (info := self._topics.get(ended.name)) is not None and self._was_recreated(info):
                why = "its task has ended, so new records would not be learned; write them to a topic of another name"
                return self._stop_reading(f"topic {ended.name} was deleted and created again ({info.topic_id}); {why}")
        if task is None:
            return None
        if (info := self._topics.get(task.name)) is None:
            problem = f"topic {task.name} is gone"
            if self.status.problem != problem:
                logger.error("%s: reading stops until the topic exists again", problem)
            return problem
        if self._was_recreated(info):
            return self._stop_reading(f"topic {task.name} was deleted and created again: its id is {info.topic_id}")
        for p in info.partitions:
            partition = (task.name, p)
            position = self._position(partition)
            if position is None or partition not in self._bounds:
                continue
            bounds = self._bounds[partition]
            if position.offset > bounds.end:
                return self._stop_reading(
                    f"{task.name}[{p}] ends at {bounds.end}, before our position {position.offset}"
                )
            if position.offset < bounds.begin:
                problem = f"{task.name}[{p}] begins at {bounds.begin}, past our position {position.offset}"
                if self.config.on_offset_out_of_range not in {"earliest", "latest"}:
                    return self._stop_reading(problem)
                target = bounds.begin if self.config.on_offset_out_of_range == "earliest" else bounds.end
                lost = target - position.offset
                logger.error("%s: continuing at %d; %d offsets are lost", problem, target, lost)
                self.assembler.skip_lost_offsets(partition, target, lost, "retention")
                self.status.next_offsets.pop(partition, None)
        return None

    def _stop_reading(self, problem: str) -> str:
        """Log a problem once and return it; raises `StreamlearnError` if `stream.on_offset_out_of_range` is exit."""
        if self.config.on_offset_out_of_range == "exit":
            raise StreamlearnError(problem)
        if self.status.problem != problem:
            logger.error("%s: reading stops (stream.on_offset_out_of_range)", problem)
        return problem

    def _fix_end_offsets_if_passed(self, names: list[str]) -> None:
        """Fix the end offsets of the current task when a later topic has a record (`task_end.next_topic`)."""
        task = self.assembler.task
        if task is None or task.end_offsets is not None or not self.config.task_end.next_topic:
            return
        if any(self._has_records(name) for name in self._topics_not_begun(names)):
            if self._has_new_partitions(task.name):
                return  # they are not assigned yet; the next check fixes the offsets
            partitions = self._partitions([task.name])
            now = self.log_reader.bounds(
                partitions
            )  # asked after the later record was seen, so that no record is missed
            if len(now) == len(partitions):  # otherwise wait until all partitions are known
                self._enqueue(self.assembler.fix_end_offsets({p: now[task.name, p].end for _, p in partitions}))

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
                self._enqueue(self.assembler.end_task(task.fixed_by))
            return
        self._warn_if_open(task, polled=polled)
        idle = self.config.task_end.idle
        if idle is None or polled or task.counts["consumed"] == 0 or self.status.paused:
            return
        partitions = self._partitions([task.name]) if task.name in self._topics else []
        caught_up = bool(partitions) and all(
            p in self._bounds and self.log_reader.position(p) >= self._bounds[p].end for p in partitions
        )
        if caught_up and time.monotonic() - self._last_record >= idle and not self._has_new_partitions(task.name):
            self._feed_waiting()
            self._enqueue(self.assembler.end_task(TaskEndReason.IDLE))

    def _end_task_now(self, topic: str) -> None:
        """End a topic's task where it was read up to, if it is current and its end offsets are not fixed yet.

        If a burst has stopped the reading, the task ends here even if its end offsets are fixed: they cannot be reached.
        """
        task = self.assembler.task
        if task is None or task.name != topic or (task.end_offsets is not None and self._burst is None):
            return
        known = self._topics[topic].partitions if topic in self._topics else ()
        positions = (*self.status.next_offsets, *self.assembler.progress.positions.by_partition)
        read = [p for name, p in positions if name == topic]
        # the end offsets are saved, so that a restart ends the task at the same place
        self._enqueue(self.assembler.fix_end_offsets_here(sorted({*known, *read})))
        self._enqueue(self.assembler.end_task(TaskEndReason.COMMAND))
        self._feed_waiting()  # these records count as late
        if self._burst is not None:  # a burst in the ended task must not keep the next one from beginning
            self._continue_after_burst()

    def _warn_if_open(self, task: Task, *, polled: bool) -> None:
        """Warn once that a task without new records stays open, if no later topic can end it."""
        topics = self.config.topics
        if polled or topics is None or task.name != topics[-1] or not self.config.task_end.next_topic:
            return
        silent = time.monotonic() - self._last_record
        if silent < OPEN_TASK_SECONDS or task.name == self._logged_open or self.status.paused:
            return
        self._logged_open = task.name
        logger.warning(
            "task %s has had no record for %.0f s and stays open, because no topic is listed after it; to end it, write "
            "a marker, run `streamlearn task end`, or set stream.task_end.records or stream.task_end.idle",
            task.name,
            silent,
            extra={"task": task.name},
        )

    def _check_for_stall(self, now: float) -> None:
        """Raise `BrokerUnavailable`, to connect again, if records can be read but none arrive.

        kafka-python can stop returning records without an error (dpkp/kafka-python#2605 describes such a case).
        """
        waiting = sum(
            max(0, bounds.readable - self.status.next_offsets[partition])
            for partition, bounds in self._bounds.items()
            if partition in self.status.next_offsets and partition not in self._paused_partitions
        )
        since = self._waiting_since
        if not waiting or since is None or self._last_record > since:
            self._waiting_since = now if waiting else None
        elif now - since > STALLED_SECONDS:
            self._waiting_since = None
            raise BrokerUnavailable(f"{waiting} records can be read, but none has arrived for {STALLED_SECONDS:.0f} s")


def _num_bytes(delivery: Delivery) -> int:
    """Return the size of a delivery's samples in bytes."""
    held_out = sum(part.x.nbytes for part in delivery.observations.held_out)
    return held_out + (delivery.batch.x.nbytes if delivery.batch is not None else 0)
