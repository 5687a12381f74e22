"""The reader: one thread owns the log, decides which topic is the current task, and fills a bounded queue of deliveries."""

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

from streamlearn.data import Delivery, Positions, StreamlearnError, Task, natural_key
from streamlearn.stream.deadletter import NO_PERMISSION
from streamlearn.stream.log import BrokerUnavailable, Unreadable
from streamlearn.stream.merge import PartitionMerge

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from streamlearn.config import StreamConfig
    from streamlearn.data import Partition, Position
    from streamlearn.stream.assembler import Assembler
    from streamlearn.stream.deadletter import DeadLetterWriter
    from streamlearn.stream.log import Bounds, LogReader, Record, TopicInfo

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.2
PAUSED_SECONDS = 0.05  # how soon a reader that waits for the learner goes on
CHECK_SECONDS = 1.0  # how often bounds are asked for: lag, later topics, retention
MAX_BACKOFF = 30.0
OPEN_SECONDS = 60.0  # of silence after which a task is open that only a marker can end
SOUND_SECONDS = 5.0  # a connection that held so long, or gave a record, was a good one
LEADER_SECONDS = 10.0  # how long the current or the next topic may be without a leader before that is an outage
HELD_BACK_SECONDS = 5.0  # how long an open transaction may hold records back before a line says so
STALLED_SECONDS = 60.0  # without a record that is there: the client is not to be believed any more
SWITCH_SECONDS = 0.0005  # how long the learner, back from a kernel, waits at most for this thread to let go


@dataclass
class StreamStatus:
    """What the reader knows of its log, for status and metrics; written by the reader thread alone."""

    connected: bool = False
    last_contact: float | None = None  # Unix seconds
    last_contact_monotonic: float | None = None  # the same, monotonic: a clock that jumps makes no outage
    begin_offsets: dict[Partition, int] = field(default_factory=dict)  # first offsets that are kept
    end_offsets: dict[Partition, int] = field(default_factory=dict)  # log end offsets; none while no broker tells them
    next_offsets: dict[Partition, int] = field(default_factory=dict)  # next offset to be read
    # number of offsets behind a transaction that is still open
    behind_open_transaction: dict[Partition, int] = field(default_factory=dict)
    num_assigned: int = 0
    paused: bool = False
    problem: str | None = None  # why reading stands still
    waiting_for: str | None = None  # topic, or pattern of topics, from which the next task's first record must come

    def lag(self, applied: Mapping[Partition, Position]) -> dict[Partition, int]:
        """Return log end less the next offset to be applied; where nothing was applied, what the log still holds."""
        return {
            place: max(0, end - (applied[place].offset if place in applied else self.begin_offsets.get(place, 0)))
            for place, end in self.end_offsets.items()
        }

    def unread(self) -> dict[Partition, int]:
        """Return log end less the next offset to be read."""
        return {
            place: max(0, end - self.next_offsets.get(place, self.begin_offsets.get(place, 0)))
            for place, end in self.end_offsets.items()
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
        self.refresh_seconds = refresh_seconds
        self.status = StreamStatus()
        self.finished = False  # nothing further will ever come, and everything was given out
        self._queue: deque[Delivery] = deque()
        self._prepended: Iterator[Delivery] = iter(())
        self._waiting: Counter[str] = Counter()  # samples in the queue, by topic
        self._waiting_bytes = 0
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)  # a delivery, an error, or a call of `wake`
        self._woken = False
        self._stopping = threading.Event()
        self._error: BaseException | None = None
        self._exhausted = False
        self._commits: dict[Partition, int] = {}
        self._thread = threading.Thread(target=self._run, name="reader", daemon=True)
        self._merge = PartitionMerge() if config.merge == "fixed" else None
        self._held: set[Partition] = set()
        self._topics: dict[str, TopicInfo] = {}
        self._bounds: dict[Partition, Bounds] = {}
        self._checked = self._refreshed = -1e9
        self._last_record = time.monotonic()
        self._last_polled = -1e9  # when the source last gave a record
        self._waiting_since: float | None = None  # when records were there and none came
        self._unknown_since: float | None = None  # when the current or the next topic lost its leader
        self._held_back_since: dict[Partition, float] = {}  # when reading came to an open transaction
        self._left_out: dict[str, str] = {}  # topics of no present use that do not answer, and why; asked again later
        self._warned: dict[str, str] = {}  # those of them that a line was logged for
        self._linger_since: float | None = None
        self._to_end: str | None = None  # the topic whose task somebody asked to end
        self._told_open: str | None = None  # the task of which it was said that it stays open
        self._burst: str | None = None  # why reading stands still until it is acknowledged
        self._burst_resumed = threading.Event()

    # -- for the loop

    def start(self) -> None:
        """Begin to read."""
        sys.setswitchinterval(SWITCH_SECONDS)
        self._thread.start()

    def next_delivery(self, timeout: float) -> Delivery | None:
        """Return the next delivery, or None when none came in time or `wake` was called; raises what the reader died of.

        The main thread waits here, so a signal handler may run inside. `Condition` is used, because `SimpleQueue.get` of
        CPython 3.11 and 3.12 waits for ever when a handler returns after the deadline.
        """
        if (prepended := next(self._prepended, None)) is not None:
            return prepended
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._error or self._woken, timeout)
            woken, self._woken = self._woken, False
            if self._queue:
                delivery = self._queue.popleft()
                self._waiting -= delivery.observations.consumed
                self._waiting_bytes -= _num_bytes(delivery)
                return delivery
            if self._error is not None:
                raise self._error
            self.finished = self._exhausted and not woken
        return None

    def wake(self) -> None:
        """Have the call of `next` that waits, or else the following one, return at once."""
        with self._changed:
            self._woken = True
            self._changed.notify()

    def prepend(self, deliveries: Iterable[Delivery]) -> None:
        """Give these out before anything else, each made when it is its turn: refinement is not a second loop."""
        self._prepended = iter(deliveries)

    def flush_dead_letters(self) -> None:
        """Return when every dead letter is acknowledged; a checkpoint begins only after it."""
        try:
            self.dead_letters.flush()
        except StreamlearnError as error:
            if error.code == NO_PERMISSION:
                self._error = error  # no later try would help: the loop gets it when it has applied what is queued
            raise

    def resume_after_burst(self) -> None:
        """Have reading go on where a burst of rejects stopped it, with the count anew."""
        if self._burst is not None:
            self._burst_resumed.set()

    def end_task(self, topic: str) -> None:
        """Have this topic's task end where it was read up to; to ask again does nothing."""
        self._to_end = topic

    def commit_positions(self, positions: Positions) -> None:
        """Have positions reported to the log, soon, for lag graphs."""
        with self._lock:
            self._commits = {partition: position.offset for partition, position in positions.by_partition.items()}

    @property
    def queued_samples(self) -> Counter[str]:
        """Samples consumed and not yet given out, by topic."""
        with self._lock:
            return +self._waiting + self.assembler.undelivered

    def stop(self) -> None:
        """End the thread and let go of the log."""
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
            self._read_on()
        except BaseException as error:  # noqa: BLE001 - a thread has no caller: the loop raises it
            self.status.problem = str(error)
            with self._changed:
                self._error = error
                self._changed.notify()
        finally:
            try:
                with contextlib.suppress(StreamlearnError):  # a report is not worth an error, least of all after one
                    if self.status.connected and self._commits:
                        self._commit()
                        self.log_reader.poll(POLL_SECONDS)  # a client sends only while it polls
                self.log_reader.close()
            except Exception as error:  # noqa: BLE001 - what it ends with is known already, and closing is no reason to hide it
                logger.warning("closing the log failed: %s", error)

    def _read_on(self) -> None:
        backoff, since, last = 1.0, time.monotonic(), ""
        while not self._stopping.is_set():
            connected = float("inf")
            try:
                self.log_reader.connect()
                self.assembler.cluster_id = self.log_reader.cluster_id
                self.dead_letters.prepare()
                self._restore()
                connected = time.monotonic()
                while not self._stopping.is_set():
                    self._turn()
                    since = time.monotonic()
            except BrokerUnavailable as error:
                sound = self._was_sound(connected)
                if self.status.last_contact is None or (self.status.connected and (sound or str(error) != last)):
                    logger.warning("%s; waiting for it", error)
                self.status.connected = False
                self.status.end_offsets = {}
                self.status.problem = last = str(error)
                limit = self.config.startup_timeout
                if limit is not None and self.status.last_contact is None and time.monotonic() - since > limit:
                    raise
                if sound:
                    backoff = 1.0
            except Unreadable as error:
                if self._steps_over(error):
                    continue
                if str(error) != last:
                    logger.error("%s; reading stands still, and is tried again now and then", error)  # noqa: TRY400 - the line says all
                    backoff = 1.0
                self.status.problem = last = str(error)
            jitter = random.SystemRandom().uniform(0.5, 1.0)  # not the global generator: it is the learner's
            self._stopping.wait(backoff * jitter)
            backoff = min(2 * backoff, MAX_BACKOFF)

    def _was_sound(self, connected: float) -> bool:
        """Tell whether a connection since this time was of use, so that its end is the beginning of a new outage."""
        return self._last_polled > connected or time.monotonic() - connected > SOUND_SECONDS

    def _steps_over(self, error: Unreadable) -> bool:
        """Go on behind a damaged batch where that is configured, or its task has ended; the offsets count as lost."""
        task, place, policy = self.assembler.task, error.partition, self.config.on_offset_out_of_range
        is_current = place is None or task is None or place[0] == task.name
        if is_current and policy == "exit":
            raise StreamlearnError(str(error)) from error
        if (is_current and policy == "stop") or place is None or self._merge:
            return False  # what waits in a merge lies before the damage, and is not lost
        bounds = None
        with contextlib.suppress(StreamlearnError):
            bounds = self.log_reader.bounds([place]).get(place)
        target = min(error.end, bounds.end if bounds is not None else 0)  # a damaged batch may lie about its size
        lost = target - max(error.begin, position.offset if (position := self._position(place)) is not None else 0)
        if lost <= 0:
            return False
        logger.error("%s: going on at %d, %d offsets are lost", error, target, lost)
        self.assembler.skip_lost_offsets(place, target, lost, "corrupt")
        return True

    def _turn(self) -> None:
        now = time.monotonic()
        if self._burst_resumed.is_set():
            self._burst_resumed.clear()
            self._read_on_after_burst()
        if now - self._checked >= CHECK_SECONDS:
            self._check(now)
        self._commit()
        if (topic := self._to_end) is not None:
            self._to_end = None
            self._end_here(topic)
        if self.status.problem is not None:
            self._stopping.wait(POLL_SECONDS)
            return
        self._balance()
        if (records := self._poll()) is None:
            return  # nothing is concluded from how far the log was read
        self._identify({record.topic for record in records})
        for record in self._in_order(records):
            self._before_end(record)
            for delivery in self.assembler.feed(record):
                self._put(delivery)
            if self._stops_at_burst():
                return  # before anything is concluded from how far the log was read
        self._after_poll(records)

    def _poll(self) -> list[Record] | None:
        """Return the next records, or None where a topic of no present use is refused, and is left out from now on."""
        try:
            return self.log_reader.poll(PAUSED_SECONDS if self.status.paused else POLL_SECONDS)
        except StreamlearnError as error:
            if error.code != NO_PERMISSION:
                raise
            self._refreshed = -1e9
            self._check(time.monotonic())  # raises where it is the current topic that is refused; another is left out
            if not self._left_out:
                raise
            return None

    def _in_order(self, records: list[Record]) -> Iterable[Record]:
        """Return the records whose turn it is: as they arrive, or merged in an order that the log alone decides."""
        if self._merge is None or self.assembler.task is None:
            return records  # late, all of them
        current = self.assembler.task.name
        self._merge.add([record for record in records if record.topic == current])
        late = [record for record in records if record.topic != current]
        return chain(late, self._merge.pop_ready(self._awaited(), self.log_reader.position))

    def _drain(self) -> None:
        """Feed what waits for other partitions: they will have nothing more, or the task has ended."""
        for record in self._merge.pop_ready([], self.log_reader.position) if self._merge is not None else ():
            for delivery in self.assembler.feed(record):
                self._put(delivery)

    def _awaited(self) -> list[Partition]:
        """Return the current task's partitions that may still have records for it."""
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

    def _stops_at_burst(self) -> bool:
        """Tell whether reading stands still here, because too many samples in a row were rejected."""
        spec, burst = self.config.dead_letter, self.assembler.burst
        if spec.burst is None or burst.length < spec.burst:
            return False
        why = str(burst)
        logger.error("%s (stream.dead_letter.on_burst: %s)", why, spec.on_burst)
        if spec.on_burst == "continue":
            burst.clear()
            return False
        self._put(self.assembler.flush_observations())
        self._put(self.assembler.forgive_rejects())
        if spec.on_burst == "exit":
            raise StreamlearnError(why, code=65)
        self._burst = self.status.problem = why
        return True

    def _read_on_after_burst(self) -> None:
        self._burst = None
        self.assembler.burst.clear()
        self._restore()  # what was polled beyond the burst is read again

    def _identify(self, topics: set[str]) -> None:
        """Refuse records of a topic that was made anew: clients read on by name and number, and say nothing."""
        for topic in topics:
            known = self.assembler.topic_id(topic)
            info = self.log_reader.describe(topic) if known is not None else None
            if known is not None and (info is None or info.topic_id != known):
                raise BrokerUnavailable(f"topic {topic} is not the one that was read so far")

    def _before_end(self, record: Record) -> None:
        """Ask for the topic anew before its last marker counts: a partition that was added has yet to give its own."""
        if self.assembler.is_last_marker(record) and self._has_grown(record.topic):
            info = self._topics[record.topic]
            self.assembler.set_partitions(info.name, info.topic_id, info.partitions)

    def _has_grown(self, topic: str) -> bool:
        """Ask whether a topic has other partitions than those known; if so, the next check assigns them, at once."""
        info = self.log_reader.describe(topic)
        if info is None or info.partitions == self._topics[topic].partitions:
            return False
        if self._is_other(info):
            raise BrokerUnavailable(f"topic {topic} is not the one that was read so far")
        self._topics[topic] = info
        self._checked = -1e9
        return True

    def _after_poll(self, records: list[Record]) -> None:
        if records:
            self._last_record = self._last_polled = time.monotonic()
            for record in records:
                self.status.next_offsets[record.topic, record.partition] = record.offset + 1
        self._end_if_reached(polled=bool(records))
        linger = self.config.linger
        if linger is not None and self.assembler.num_undelivered:
            self._linger_since = self._linger_since or time.monotonic()
            if time.monotonic() - self._linger_since >= linger:
                self._put(self.assembler.flush_short_batch())
        if not records:
            self._put(self.assembler.flush_observations())
        if not self.assembler.num_undelivered:
            self._linger_since = None

    def _put(self, delivery: Delivery | None) -> None:
        if delivery is None:
            return
        if delivery.batch is not None:
            self._linger_since = None
        if delivery.task_end_reason is not None:
            self._checked = -1e9  # the next task is chosen at once
        with self._changed:
            self._waiting += delivery.observations.consumed
            self._waiting_bytes += _num_bytes(delivery)
            self._queue.append(delivery)
            self._changed.notify()

    def _balance(self) -> None:
        """Pause over the high mark, resume under half of it; polling goes on, so the connection is kept."""
        bounds = self.config.queue
        fill = max(self._waiting.total() / bounds.samples, self._waiting_bytes / (bounds.megabytes * 1e6))
        if fill >= 1 or (self.status.paused and fill >= 0.5):
            self.status.paused, held = True, set(self.status.next_offsets)
        else:
            self.status.paused, held = False, self._merge.full if self._merge is not None else set()
        if held != self._held:
            self.log_reader.pause_partitions(held)
            self._held = held

    def _commit(self) -> None:
        with self._lock:
            commits, self._commits = self._commits, {}
        if commits:
            try:
                self.log_reader.commit(self.group, commits)
            except StreamlearnError as error:
                logger.warning("positions could not be reported: %s", error)

    # -- which topics

    def _restore(self) -> None:
        self._last_record = time.monotonic()  # an outage is not silence
        self._refreshed = self._checked = -1e9
        self.status.next_offsets.clear()
        self._check(time.monotonic())

    def _check(self, now: float) -> None:
        """Ask the log what `poll` keeps silent about: topics, ids, bounds; then choose, assign and close."""
        if now - self._refreshed >= self.refresh_seconds or self.assembler.task is None:
            self._topics = self.log_reader.topics()
            self._refreshed = now
            self._left_out = {}
        names = self._matching()
        self._ask_bounds(names, now)
        self._checked = now
        self.status.connected = True
        self.status.last_contact, self.status.last_contact_monotonic = time.time(), now
        self.status.problem = self.dead_letters.retry_failed() or self._trouble() or self._burst
        if self.status.problem is not None:
            return
        self._choose(names)
        self._assign()
        self._follow_positions(now)
        self._look_for_stall(now)
        self.status.begin_offsets = {
            p: bounds.begin for p, bounds in self._bounds.items() if p in self.status.next_offsets
        }
        self.status.end_offsets = {p: bounds.end for p, bounds in self._bounds.items() if p in self.status.next_offsets}
        self._close_if_passed(names)

    def _ask_bounds(self, names: list[str], now: float) -> None:
        """Ask for the bounds of all topics. The current one and the next must answer; the others may be left out."""
        task, begun = self.assembler.task, {task.name for task in self.assembler.progress.tasks}
        first = ([task.name] if task is not None and task.name in self._topics else []) + self._later(names)[:1]
        if (
            task is not None
            and task.name in first
            and (refused := self._topics[task.name].missing_permission) is not None
        ):
            raise StreamlearnError(f"topic {task.name}: {refused}", code=NO_PERMISSION)
        for name in begun & set(names) - set(first):
            if (refused := self._topics[name].missing_permission) is not None:
                self._leave_out(name, refused)
        places = self._places(first)
        self._bounds = self.log_reader.bounds(places)
        missing = [f"{topic}[{p}]" for topic, p in places if (topic, p) not in self._bounds]
        if not missing:
            self._unknown_since = None
        elif self._unknown_since is None:
            self._unknown_since = now  # it may be of a moment ago, or about to have another leader
        elif now - self._unknown_since > LEADER_SECONDS:
            raise BrokerUnavailable(f"{', '.join(missing)}: no leader answers for it")
        rest = [name for name in names if name not in first and name not in self._left_out]
        try:
            self._bounds |= self.log_reader.bounds(self._places(rest))
        except StreamlearnError as error:
            if not isinstance(error, BrokerUnavailable) and error.code != NO_PERMISSION:
                raise
            for name in rest:
                self._leave_out(name, str(error))
            return
        for name in rest:
            silent = [p for topic, p in self._places([name]) if (topic, p) not in self._bounds]
            if not silent:
                self._warned.pop(name, None)
            elif (
                name in begun and self.log_reader.describe(name) is not None
            ):  # else it is gone, and the next refresh sees it
                self._leave_out(name, f"no leader answers for partition {', '.join(map(str, silent))}")

    def _places(self, names: Iterable[str]) -> list[Partition]:
        return [(name, p) for name in names for p in self._topics[name].partitions]

    def _leave_out(self, name: str, why: str) -> None:
        """Do without a topic that is neither current nor next, until the topics are asked for again; say it once."""
        self._left_out[name] = why
        if self._warned.get(name) != why:
            logger.warning(
                "topic %s: %s; it is not read for now, and learning goes on", name, why, extra={"topic": name}
            )
        self._warned[name] = why

    def _follow_positions(self, now: float) -> None:
        """Take the log's word on how far it was read: the ends of transactions, and what they aborted, are no records."""
        self.status.next_offsets = {place: self.log_reader.position(place) for place in self.status.next_offsets}
        if not self._merge:
            self.assembler.skip_to(self.status.next_offsets)
        held_back = {
            place: bounds.end - bounds.readable
            for place, bounds in self._bounds.items()
            if bounds.last_stable is not None and self.status.next_offsets.get(place, -1) >= bounds.last_stable
        }
        since = self._held_back_since
        self._held_back_since = {place: since.get(place, now) for place in held_back}
        for (topic, p), begun in self._held_back_since.items():
            if now - begun >= HELD_BACK_SECONDS and (topic, p) not in self.status.behind_open_transaction:
                count = held_back[topic, p]
                logger.info(
                    "%s[%d]: an open transaction holds %d offsets back: they are read when it ends", topic, p, count
                )
        self.status.behind_open_transaction = {
            p: n for p, n in held_back.items() if now - self._held_back_since[p] >= HELD_BACK_SECONDS
        }

    def _position(self, place: Partition) -> Position | None:
        """Return up to where a partition was fed, in this process or before it."""
        return self.assembler.read_position(place) or self.assembler.progress.positions.by_partition.get(place)

    def _matching(self) -> list[str]:
        """Return the tasks' topics that exist, in order: those begun first, in the order they were begun."""
        begun = dict.fromkeys(task.name for task in self.assembler.progress.tasks)  # in order
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

    def _has_records(self, name: str) -> bool:
        bounds = [self._bounds[name, p] for p in self._topics[name].partitions if (name, p) in self._bounds]
        return any(b.readable > b.begin for b in bounds)

    def _later(self, names: list[str]) -> list[str]:
        begun = {task.name for task in self.assembler.progress.tasks}
        return [name for name in names if name not in begun]

    def _choose(self, names: list[str]) -> None:
        """Begin the next task when none is current and its topic has a record; refuse (78) what a domain cannot learn."""
        if self.assembler.task is not None:
            return
        tasks = self.assembler.progress.tasks
        later = self._later(names)
        if self.config.topics is not None:
            upcoming = self.config.topics[len(tasks)] if len(tasks) < len(self.config.topics) else None
            later = [name for name in later if name == upcoming]
            over = upcoming is None
            if upcoming is not None and upcoming not in self._topics:
                self._refuse_hidden(upcoming)
        else:
            later = [name for name in later if self._has_records(name)]
            upcoming = self.config.pattern
            over = bool(tasks) and not later
        if self.config.on_finished == "exit" and over:
            self._exhausted = True
        if not later or not self._has_records(later[0]):
            self._wait_for(None if self._exhausted else upcoming)
            return
        name = later[0]
        if (refused := self._topics[name].missing_permission) is not None:
            raise StreamlearnError(f"topic {name}: {refused}", code=NO_PERMISSION)
        self._wait_for(None)
        if (
            self.config.order == "name"
            and self.config.pattern
            and tasks
            and natural_key(name) < natural_key(tasks[-1].name)
        ):
            logger.warning("topic %s sorts before %s, which has begun: it is learned after it", name, tasks[-1].name)
        scenario = self.assembler.settings.scenario
        declared = scenario.declared_classes(name) if scenario.kind == "domain" else []
        if declared is None:
            known = ", ".join(scenario.declared)
            raise StreamlearnError(f"topic {name}: scenario.tasks has no classes for it, only for {known}", code=78)
        task = Task(len(tasks), name, labels=list(declared))
        self._drain()
        self._put(self.assembler.begin_task(task))
        self._last_record = time.monotonic()

    def _refuse_hidden(self, topic: str) -> None:
        """Raise (77) where the topic is there, and not ours to see: it would be waited for in vain."""
        info = self.log_reader.describe(topic)
        if info is not None and info.missing_permission is not None:
            raise StreamlearnError(f"topic {topic}: {info.missing_permission}", code=NO_PERMISSION)

    def _wait_for(self, topic: str | None) -> None:
        if topic is not None and topic != self.status.waiting_for:
            missing = "has no record yet" if topic in self._topics else "does not exist yet"
            logger.info("waiting for topic %s, which %s", topic, missing, extra={"topic": topic})
        self.status.waiting_for = topic

    def _assign(self) -> None:
        offsets: dict[Partition, int] = {}
        for task in self.assembler.progress.tasks:
            if (info := self._topics.get(task.name)) is None or self._is_other(info) or task.name in self._left_out:
                continue
            self.assembler.set_partitions(task.name, info.topic_id, info.partitions)
            for p in info.partitions:
                place = (task.name, p)
                known = self._position(place)
                begin = self._bounds[place].begin if place in self._bounds else 0
                offsets[place] = known.offset if known is not None else begin
                if task is not self.assembler.task and place in self._bounds:
                    self._step_aside(place, offsets)
        if set(offsets) != set(self.status.next_offsets):
            self.log_reader.assign(offsets)
            if self._merge is not None:
                self._merge.clear()  # what had its turn is what the offsets tell
            self.status.next_offsets = {
                place: self.status.next_offsets.get(place, offset) for place, offset in offsets.items()
            }
        self.status.num_assigned = len(offsets)

    def _step_aside(self, place: Partition, offsets: dict[Partition, int]) -> None:
        """Keep an ended task's partition readable: nothing there can be learned any more, only counted late."""
        bounds, at = self._bounds[place], offsets[place]
        if at > bounds.end:
            del offsets[place]
        elif at < bounds.begin:
            self.assembler.skip_lost_offsets(place, bounds.begin, bounds.begin - at, "retention")
            offsets[place] = bounds.begin
            self.status.next_offsets.pop(place, None)

    def _is_other(self, info: TopicInfo) -> bool:
        known = self.assembler.topic_id(info.name)
        return known is not None and info.topic_id is not None and known != info.topic_id

    def _trouble(self) -> str | None:
        """Return why the current task cannot be read on, or None; jumps over what retention took, where configured."""
        task = self.assembler.task
        for ended in self.assembler.progress.tasks:
            if ended is not task and (info := self._topics.get(ended.name)) is not None and self._is_other(info):
                why = "its task has ended, so nothing of it would be learned: give new data a topic of another name"
                return self._refuse(f"topic {ended.name} was deleted and created again ({info.topic_id}); {why}")
        if task is None:
            return None
        if (info := self._topics.get(task.name)) is None:
            problem = f"topic {task.name} is gone"
            if self.status.problem != problem:
                logger.error("%s: reading stands still until it is there again", problem)
            return problem
        if self._is_other(info):
            return self._refuse(f"topic {task.name} was deleted and created again: its id is {info.topic_id}")
        for p in info.partitions:
            place = (task.name, p)
            position = self._position(place)
            if position is None or place not in self._bounds:
                continue
            bounds = self._bounds[place]
            if position.offset > bounds.end:
                return self._refuse(f"{task.name}[{p}] ends at {bounds.end}, before our position {position.offset}")
            if position.offset < bounds.begin:
                where = f"{task.name}[{p}] begins at {bounds.begin}, past our position {position.offset}"
                if self.config.on_offset_out_of_range not in {"earliest", "latest"}:
                    return self._refuse(where)
                target = bounds.begin if self.config.on_offset_out_of_range == "earliest" else bounds.end
                logger.error("%s: going on at %d, %d offsets are lost", where, target, target - position.offset)
                self.assembler.skip_lost_offsets(place, target, target - position.offset, "retention")
                self.status.next_offsets.pop(place, None)
        return None

    def _refuse(self, problem: str) -> str:
        if self.config.on_offset_out_of_range == "exit":
            raise StreamlearnError(problem)
        if self.status.problem != problem:
            logger.error("%s: reading stops here (stream.on_offset_out_of_range)", problem)
        return problem

    def _close_if_passed(self, names: list[str]) -> None:
        """Fix the current task's end offsets, once, when a later topic has shown a record."""
        task = self.assembler.task
        if task is None or task.end_offsets is not None or not self.config.task_end.next_topic:
            return
        if any(self._has_records(name) for name in self._later(names)):
            if self._has_grown(task.name):
                return  # to a partition that nobody reads yet; the next check, at once, closes
            places = self._places([task.name])
            now = self.log_reader.bounds(
                places
            )  # asked after the later record was seen, or the last ones could be missed
            if len(now) == len(places):  # one that is too new to be known is waited for
                self._put(self.assembler.fix_end_offsets({p: now[task.name, p].end for _, p in places}))

    def _end_if_reached(self, *, polled: bool) -> None:
        task = self.assembler.task
        if task is None:
            return
        if task.end_offsets is not None:
            reached = {(task.name, p): self.log_reader.position((task.name, p)) for p in task.end_offsets}
            if all(reached[task.name, p] >= end for p, end in task.end_offsets.items()):
                self.assembler.skip_to({(task.name, p): end for p, end in task.end_offsets.items()})
                self._put(self.assembler.end_task(task.fixed_by))
            return
        self._warn_if_open(task, polled=polled)
        idle = self.config.task_end.idle
        if idle is None or polled or task.counts["consumed"] == 0 or self.status.paused:
            return
        places = self._places([task.name]) if task.name in self._topics else []
        caught_up = bool(places) and all(
            p in self._bounds and self.log_reader.position(p) >= self._bounds[p].end for p in places
        )
        if caught_up and time.monotonic() - self._last_record >= idle and not self._has_grown(task.name):
            self._drain()
            self._put(self.assembler.end_task("idle"))

    def _end_here(self, topic: str) -> None:
        """End a topic's task where it was read up to, if it is the current one and does not end already.

        Where a burst has stopped the reading, it does not come to an end that was fixed before.
        """
        task = self.assembler.task
        if task is None or task.name != topic or (task.end_offsets is not None and self._burst is None):
            return
        known = self._topics[topic].partitions if topic in self._topics else ()
        read = [
            p
            for name, p in (*self.status.next_offsets, *self.assembler.progress.positions.by_partition)
            if name == topic
        ]
        self._put(
            self.assembler.fix_end_offsets_here(sorted({*known, *read}))
        )  # saved, so that a restart ends it there too
        self._put(self.assembler.end_task("command"))
        self._drain()  # what waits for other partitions is late
        if self._burst is not None:  # of this task: it does not keep the next one from beginning
            self._read_on_after_burst()

    def _warn_if_open(self, task: Task, *, polled: bool) -> None:
        """Say once that a silent task stays open, where no later topic can end it and perhaps no marker will come."""
        topics = self.config.topics
        if polled or topics is None or task.name != topics[-1] or not self.config.task_end.next_topic:
            return
        silent = time.monotonic() - self._last_record
        if silent < OPEN_SECONDS or task.name == self._told_open or self.status.paused:
            return
        self._told_open = task.name
        logger.warning(
            "task %s has had no record for %.0f s and stays open: no topic is listed after it, so a marker ends it, or "
            "`streamlearn task end`, or stream.task_end with records or idle",
            task.name,
            silent,
            extra={"task": task.name},
        )

    def _look_for_stall(self, now: float) -> None:
        """Make the client anew when records wait and none comes: clients have been seen to be silent for ever."""
        waiting = sum(
            max(0, bounds.readable - self.status.next_offsets[place])
            for place, bounds in self._bounds.items()
            if place in self.status.next_offsets and place not in self._held
        )
        since = self._waiting_since
        if not waiting or since is None or self._last_record > since:
            self._waiting_since = now if waiting else None
        elif now - since > STALLED_SECONDS:
            self._waiting_since = None
            raise BrokerUnavailable(f"{waiting} records wait, and none has come for {STALLED_SECONDS:.0f} s")


def _num_bytes(delivery: Delivery) -> int:
    """Return the size of a delivery's samples."""
    held = sum(part.x.nbytes for part in delivery.observations.held_out)
    return held + (delivery.batch.x.nbytes if delivery.batch is not None else 0)
