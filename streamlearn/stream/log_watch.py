"""Watch a log: which topics and offsets it has, and what keeps their records from being read."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from streamlearn.core.errors import AccessError, StreamlearnError
from streamlearn.stream.logs.base import BrokerUnavailable

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from streamlearn.core.positions import Partition
    from streamlearn.stream.assembler import ReadState
    from streamlearn.stream.logs.base import Bounds, LogReader, TopicInfo

logger = logging.getLogger(__name__)

CHECK_SECONDS = 1.0  # how often the log is asked for bounds (for lag, later topics and retention)
NO_LEADER_SECONDS = 10.0  # how long a partition of the current or next topic may have no leader before it is an outage
OPEN_TRANSACTION_SECONDS = 5.0  # how long an open transaction may delay records before it is logged
STALLED_SECONDS = 60.0  # without a record although records can be read: the client has failed without an error


class Interval:
    """Says when something is due that is repeated every `seconds` seconds; at first it is due at once."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._last: float | None = None

    def is_due(self, now: float) -> bool:
        """Return whether it is due at this time (seconds on the monotonic clock)."""
        return self._last is None or now - self._last >= self.seconds

    def restart(self, now: float) -> None:
        """Start the interval at this time."""
        self._last = now

    def make_due(self) -> None:
        """Make it due at once."""
        self._last = None


@dataclass(frozen=True, slots=True)
class LostOffsets:
    """The `count` offsets of a partition before `offset` that cannot be read any more. Reading continues at `offset`."""

    partition: Partition
    offset: int
    count: int


class LogWatch:
    """Asks the log for what `poll` does not report. Only the reader thread uses it; it reads no records.

    `policy` is `stream.on_offset_out_of_range`: stop, exit, earliest or latest.
    """

    def __init__(self, log_reader: LogReader, policy: str, refresh_seconds: float) -> None:
        self.log_reader = log_reader
        self.policy = policy
        self.topics: dict[str, TopicInfo] = {}
        self.bounds: dict[Partition, Bounds] = {}
        self.left_out: dict[str, str] = {}  # topics, neither current nor next, that do not answer, and why
        self._check = Interval(CHECK_SECONDS)  # of bounds
        self._refresh = Interval(refresh_seconds)  # of topics
        self._logged_left_out: dict[str, str] = {}  # the reasons that were logged
        self._no_leader_since: float | None = None  # since when a partition of the current or next topic has no leader
        self._transaction_since: dict[Partition, float] = {}  # when reading reached an open transaction
        self._behind_transaction: dict[Partition, int] = {}  # numbers of offsets that were logged as delayed
        self._waiting_since: float | None = None  # since when records can be read but do not arrive

    def is_due(self, now: float) -> bool:
        """Return whether it is time to check the log."""
        return self._check.is_due(now)

    def check_soon(self, *, topics: bool = False) -> None:
        """Make the check of the log due at once; with `topics`, it also asks for the topics."""
        self._check.make_due()
        if topics:
            self._refresh.make_due()

    def update(self, read: ReadState, now: float) -> None:
        """Ask for the topics if that is due, or if no task is current."""
        if self._refresh.is_due(now) or read.current is None:
            self.topics = self.log_reader.topics()
            self._refresh.restart(now)
            self.left_out = {}

    def update_bounds(self, names: Sequence[str], read: ReadState, now: float) -> None:
        """Ask for the bounds of the topics with these names, which are in the order of their tasks.

        The current and the next topic must answer; the others can be left out. Raises `AccessError` if we may not read the
        current topic, `BrokerUnavailable` if the current or the next topic has had no leader for too long.
        """
        begun = set(read.begun)
        required = [read.current] if read.current is not None and read.current in self.topics else []
        required += [name for name in names if name not in begun][:1]
        if read.current in required:
            self.require_permission(str(read.current))
        for name in begun & set(names) - set(required):
            if (missing := self.topics[name].missing_permission) is not None:
                self._leave_out(name, missing)
        self._update_required(required, now)
        others = [name for name in names if name not in required and name not in self.left_out]
        self._update_others(others, begun)
        self._check.restart(now)

    def _update_required(self, topics: Iterable[str], now: float) -> None:
        partitions = self.partitions(topics)
        self.bounds = self.log_reader.bounds(partitions)
        leaderless = [f"{topic}[{p}]" for topic, p in partitions if (topic, p) not in self.bounds]
        if not leaderless:
            self._no_leader_since = None
        elif self._no_leader_since is None:
            self._no_leader_since = now  # the partition can be new, or about to get another leader
        elif now - self._no_leader_since > NO_LEADER_SECONDS:
            raise BrokerUnavailable(f"{', '.join(leaderless)}: no leader answers for it")

    def _update_others(self, topics: Sequence[str], begun: Collection[str]) -> None:
        try:
            self.bounds |= self.log_reader.bounds(self.partitions(topics))
        except (BrokerUnavailable, AccessError) as error:
            for name in topics:
                self._leave_out(name, str(error))
            return
        for name in topics:
            silent = [p for topic, p in self.partitions([name]) if (topic, p) not in self.bounds]
            if not silent:
                self._logged_left_out.pop(name, None)
            elif name in begun and self.log_reader.describe(name) is not None:  # or it was deleted
                self._leave_out(name, f"no leader answers for partition {', '.join(map(str, silent))}")

    def _leave_out(self, topic: str, why: str) -> None:
        """Do not read a topic, neither current nor next, until the topics are asked for again; log each reason once."""
        self.left_out[topic] = why
        if self._logged_left_out.get(topic) != why:
            text = "topic %s: %s; it is not read for now, and learning continues"
            logger.warning(text, topic, why, extra={"topic": topic})
        self._logged_left_out[topic] = why

    def partitions(self, topics: Iterable[str]) -> list[Partition]:
        """Return the partitions of these topics."""
        return [(name, p) for name in topics for p in self.topics[name].partitions]

    def has_records(self, topic: str) -> bool:
        """Return whether a topic has a record that can be read."""
        found = [self.bounds[topic, p] for p in self.topics[topic].partitions if (topic, p) in self.bounds]
        return any(bounds.readable > bounds.begin for bounds in found)

    def require_permission(self, topic: str) -> None:
        """Raise `AccessError` if we may not read the topic.

        If the topic is not listed, ask the log for it: otherwise we would wait for ever for a topic that we may not see.
        """
        info = self.topics[topic] if topic in self.topics else self.log_reader.describe(topic)
        if info is not None and info.missing_permission is not None:
            raise AccessError(f"topic {topic}: {info.missing_permission}")

    def find_new_partitions(self, topic: str, read: ReadState) -> bool:
        """Ask whether a topic has other partitions than before; if so, remember them and make a check due at once."""
        info = self.log_reader.describe(topic)
        if info is None or info.partitions == self.topics[topic].partitions:
            return False
        if read.was_recreated(info):
            raise BrokerUnavailable(f"topic {topic} is no longer the topic that was read so far")
        self.topics[topic] = info
        self._check.make_due()
        return True

    def find_problem(self, read: ReadState, logged: str | None) -> tuple[str | None, list[LostOffsets]]:
        """Return why reading must stop, or None, and the offsets that retention has removed, if they may be skipped.

        A problem that equals `logged` is not logged again. Raises `StreamlearnError` if the policy is exit.
        """
        for name in read.begun:
            if name != read.current and (info := self.topics.get(name)) is not None and read.was_recreated(info):
                why = "its task has ended, so new records would not be learned; write them to a topic of another name"
                return self._stop(f"topic {name} was deleted and created again ({info.topic_id}); {why}", logged), []
        if read.current is None:
            return None, []
        if (info := self.topics.get(read.current)) is None:
            problem = f"topic {read.current} is gone"
            if problem != logged:
                logger.error("%s: reading stops", problem)
            return problem, []
        if read.was_recreated(info):
            problem = f"topic {read.current} was deleted and created again: its id is {info.topic_id}"
            return self._stop(problem, logged), []
        lost: list[LostOffsets] = []
        for p in info.partitions:
            if (mismatch := self._compare_bounds((read.current, p), read, lost)) is not None:
                return self._stop(mismatch, logged), lost
        return None, lost

    def _compare_bounds(self, partition: Partition, read: ReadState, lost: list[LostOffsets]) -> str | None:
        """Return the problem if our position is not between the bounds; if it may be skipped, add it to `lost` instead."""
        position, bounds, (topic, p) = read.positions.get(partition), self.bounds.get(partition), partition
        if position is None or bounds is None:
            return None
        if position.offset > bounds.end:
            return f"{topic}[{p}] ends at {bounds.end}, before our position {position.offset}"
        if position.offset < bounds.begin:
            problem = f"{topic}[{p}] begins at {bounds.begin}, past our position {position.offset}"
            if self.policy not in {"earliest", "latest"}:
                return problem
            target = bounds.begin if self.policy == "earliest" else bounds.end
            lost.append(LostOffsets(partition, target, target - position.offset))
            logger.error("%s: continuing at %d; %d offsets are lost", problem, target, target - position.offset)
        return None

    def _stop(self, problem: str, logged: str | None) -> str:
        """Log a problem once and return it; raises `StreamlearnError` if the policy is exit."""
        if self.policy == "exit":
            raise StreamlearnError(problem)
        if problem != logged:
            logger.error("%s: reading stops (stream.on_offset_out_of_range)", problem)
        return problem

    def find_open_transactions(self, next_offsets: Mapping[Partition, int], now: float) -> dict[Partition, int]:
        """Return the number of offsets of each partition that an open transaction has delayed for some time."""
        delayed = {
            partition: bounds.end - bounds.readable
            for partition, bounds in self.bounds.items()
            if bounds.last_stable is not None and next_offsets.get(partition, -1) >= bounds.last_stable
        }
        self._transaction_since = {partition: self._transaction_since.get(partition, now) for partition in delayed}
        since = self._transaction_since
        behind = {p: count for p, count in delayed.items() if now - since[p] >= OPEN_TRANSACTION_SECONDS}
        for (topic, p), count in behind.items():
            if (topic, p) not in self._behind_transaction:
                text = "%s[%d]: %d offsets are behind an open transaction; they are read when it ends"
                logger.info(text, topic, p, count)
        self._behind_transaction = behind
        return dict(behind)

    def check_for_stall(
        self, next_offsets: Mapping[Partition, int], paused: Collection[Partition], last_record: float, now: float
    ) -> None:
        """Raise `BrokerUnavailable`, to connect again, if records can be read but none arrive.

        kafka-python can stop returning records without an error (dpkp/kafka-python#2605 describes such a case).
        """
        waiting = sum(
            max(0, bounds.readable - next_offsets[partition])
            for partition, bounds in self.bounds.items()
            if partition in next_offsets and partition not in paused
        )
        since = self._waiting_since
        if not waiting or since is None or last_record > since:
            self._waiting_since = now if waiting else None
        elif now - since > STALLED_SECONDS:
            self._waiting_since = None
            raise BrokerUnavailable(f"{waiting} records can be read, but none has arrived for {STALLED_SECONDS:.0f} s")
