"""What every log offers: topics of partitions of records, read by position and written by append."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from streamlearn.data import StreamlearnError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from streamlearn.data import Partition

CONTENT_TYPE = "content-type"
USE = "streamlearn-use"  # header; the value `probe` sends a sample to the probe whatever its hash says
CONTROL = "streamlearn-control"  # header; the value `task-end` makes a record a marker
ATTEMPT = "streamlearn-attempt"  # header of a dead letter that was sent again: how often
CUT = "streamlearn.cut-from-bytes"  # header of a record that was too large for its topic: its size
PROBE = b"probe"
TASK_END = b"task-end"

Headers = tuple[tuple[str, bytes], ...]

FLUSH_SECONDS = 60.0  # how long a writer waits to be acknowledged


class BrokerUnavailable(StreamlearnError):  # noqa: N818 - it names a state of the world, and callers wait for it to pass
    """No broker answers now; trying again later may help."""

    def __init__(self, message: str) -> None:
        super().__init__(message, code=69)


@dataclass(frozen=True, slots=True)
class Record:
    """One entry of a partition; `timestamp` in Unix seconds."""

    topic: str
    partition: int
    offset: int
    timestamp: float
    key: bytes | None
    value: bytes | None
    headers: Headers = ()

    def header(self, name: str) -> bytes | None:
        """Return a header's first value, or None."""
        return next((value for key, value in self.headers if key == name), None)


@dataclass(frozen=True, slots=True)
class TopicInfo:
    """A topic as the log describes it; the id differs when a topic of the same name is created anew."""

    name: str
    topic_id: str | None
    partitions: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Bounds:
    """The first offset that is kept and the one that the next record will get."""

    begin: int
    end: int


class Log(Protocol):
    """Reading: one thread owns it. Every method may raise `BrokerUnavailable`, and `StreamlearnError` (77) at once."""

    def connect(self) -> None:
        """Reach the log, or raise."""

    @property
    def cluster_id(self) -> str | None:
        """The identity of the cluster, or None before it is known."""

    def topics(self) -> dict[str, TopicInfo]:
        """Return all topics, freshly asked for."""

    def topic_id(self, topic: str) -> str | None:
        """Return a topic's id as it is now, or None if it is gone."""

    def bounds(self, partitions: Sequence[Partition]) -> dict[Partition, Bounds]:
        """Return begin and end of each partition; one that is too new to be known may be missing."""

    def assign(self, offsets: Mapping[Partition, int]) -> None:
        """Read exactly these partitions from now on, each from its offset."""

    def poll(self, timeout: float) -> list[Record]:
        """Return the next records, in order in each partition; waits at most `timeout` seconds for the first."""

    def position(self, partition: Partition) -> int:
        """Return the next offset to be read, past any hole that holds no record."""

    def hold(self, partitions: Collection[Partition]) -> None:
        """Return nothing of exactly these from `poll`, but stay connected."""

    def first_timestamp(self, topic: TopicInfo) -> float | None:
        """Return the timestamp of the topic's first record, or None if it has none."""

    def commit(self, group: str, offsets: Mapping[Partition, int]) -> None:
        """Report positions for lag graphs; never the truth about what was learned."""

    def close(self) -> None:
        """Let go of everything."""


class Sink(Protocol):
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
