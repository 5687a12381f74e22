"""What every log offers: topics of partitions of records, read by position and written by append."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from streamlearn.data import StreamlearnError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from streamlearn.data import Partition

CONTENT_TYPE = "content-type"
USE_HEADER = "streamlearn-use"  # header; the value `probe` sends a sample to the probe whatever its hash says
CONTROL_HEADER = "streamlearn-control"  # header; the value `task-end` makes a record a marker
ATTEMPT_HEADER = "streamlearn-attempt"  # header of a dead letter that was sent again: how often
ORIGINAL_SIZE_HEADER = "streamlearn.cut-from-bytes"  # header of a record that was too large for its topic: its size
PROBE = b"probe"
TASK_END = b"task-end"

Headers = tuple[tuple[str, bytes], ...]

FLUSH_SECONDS = 60.0  # how long a writer waits to be acknowledged


class BrokerUnavailable(StreamlearnError):  # noqa: N818 - it names a state of the world, and callers wait for it to pass
    """No broker answers now; trying again later may help."""

    def __init__(self, message: str) -> None:
        super().__init__(message, code=69)


class Unreadable(StreamlearnError):  # noqa: N818 - it names a state of the log, as `BrokerUnavailable` does
    """The log answers, but what it answers cannot be read: connecting again at once does not help.

    `partition` is where, and `begin` and `end` are the offsets of the damaged batch, where they are known.
    """

    def __init__(self, message: str, partition: Partition | None = None, begin: int = 0, end: int = 0) -> None:
        super().__init__(message, code=74)
        self.partition = partition
        self.begin = begin
        self.end = end


@dataclass(frozen=True, slots=True)
class Record:
    """One entry of a partition; `timestamp` in Unix seconds.

    `oversize` is set where this record stands for a whole compressed batch that was not unpacked: it says why, `value` is
    None, `offset` is the batch's last offset and `begin` its first.
    """

    topic: str
    partition: int
    offset: int
    timestamp: float
    key: bytes | None
    value: bytes | None
    headers: Headers = ()
    oversize: str | None = None
    begin: int | None = None

    def header(self, name: str) -> bytes | None:
        """Return a header's first value, or None."""
        return next((value for key, value in self.headers if key == name), None)


@dataclass(frozen=True, slots=True)
class TopicInfo:
    """A topic as the log describes it; the id differs when a topic of the same name is created anew.

    `missing_permission` says which permission is missing where the topic may not be read.
    """

    name: str
    topic_id: str | None
    partitions: tuple[int, ...]
    missing_permission: str | None = None


@dataclass(frozen=True, slots=True)
class Bounds:
    """The first offset that is kept and the one that the next record will get.

    `last_stable` is the first offset of a transaction that is still open: from there on nothing can be read before it ends.
    """

    begin: int
    end: int
    last_stable: int | None = None

    @property
    def readable(self) -> int:
        """The offset up to which records can be read now."""
        return self.end if self.last_stable is None else self.last_stable


class LogReader(Protocol):
    """Reading: one thread owns it. Every method may raise `BrokerUnavailable`, `Unreadable`, and `StreamlearnError` (77)."""

    def connect(self) -> None:
        """Reach the log, or raise."""

    @property
    def cluster_id(self) -> str | None:
        """The identity of the cluster, or None before it is known."""

    def topics(self) -> dict[str, TopicInfo]:
        """Return all topics, freshly asked for."""

    def describe(self, topic: str) -> TopicInfo | None:
        """Return a topic as it is now, or None if it is gone."""

    def bounds(self, partitions: Sequence[Partition]) -> dict[Partition, Bounds]:
        """Return begin and end of each partition; one that is too new to be known, or has no leader, is missing."""

    def assign(self, offsets: Mapping[Partition, int]) -> None:
        """Read exactly these partitions from now on, each from its offset."""

    def poll(self, timeout: float) -> list[Record]:
        """Return the next records, in order in each partition; waits at most `timeout` seconds for the first."""

    def position(self, partition: Partition) -> int:
        """Return the next offset to be read, past any hole that holds no record; never waits."""

    def pause_partitions(self, partitions: Collection[Partition]) -> None:
        """Return nothing of exactly these from `poll`, but stay connected."""

    def first_timestamp(self, topic: TopicInfo) -> float | None:
        """Return the timestamp of the topic's first record, or None if it has none."""

    def commit(self, group: str, offsets: Mapping[Partition, int]) -> None:
        """Report positions for lag graphs; never the truth about what was learned."""

    def close(self) -> None:
        """Let go of everything."""


class LogWriter(Protocol):
    """Writing: safe to call from any thread."""

    def create_topic(self, name: str, partitions: int) -> bool:
        """Create a topic; return False if it exists."""

    def partitions(self, topic: str) -> int:
        """Return how many partitions a topic has; raises `StreamlearnError` if there is no such topic."""

    def append(
        self, topic: str, partition: int, value: bytes | None, *, key: bytes | None = None, headers: Headers = ()
    ) -> None:
        """Write a record; it is durable after the next `flush`."""

    def flush(self, timeout: float = FLUSH_SECONDS) -> None:
        """Return when everything appended is acknowledged; raises `StreamlearnError` if something is not, `timeout` in seconds.

        What was not acknowledged is kept, and written by a later flush.
        """

    def close(self) -> None:
        """Let go of everything."""
