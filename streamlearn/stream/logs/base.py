"""The interface of every log. A log has topics, a topic has partitions, and a partition is a sequence of records."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from streamlearn.core.errors import InputOutputError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from streamlearn.core.positions import Partition

CONTENT_TYPE = "content-type"
USE_HEADER = "streamlearn-use"  # header; its value `probe` holds the record out for the probe, whatever the hash says
CONTROL_HEADER = "streamlearn-control"  # header; with the value `task-end`, the record marks the end of its task
ATTEMPT_HEADER = "streamlearn-attempt"  # header of a dead letter that was sent again: the number of times
ORIGINAL_SIZE_HEADER = "streamlearn.cut-from-bytes"  # header of a record that was cut: its size before, in bytes
PROBE = b"probe"
TASK_END = b"task-end"

Headers = tuple[tuple[str, bytes], ...]

FLUSH_SECONDS = 60.0  # how long a writer waits for acknowledgements


class BrokerUnavailable(UnavailableError):  # noqa: N818 - a temporary state: callers wait until it is over
    """No broker answers at the moment. A later attempt can succeed."""


class Unreadable(InputOutputError):  # noqa: N818 - a state of the log, like `BrokerUnavailable`
    """The log answers, but its answer cannot be read, so that connecting again does not help.

    If they are known, `partition` is the place of a damaged batch, `begin` its first offset, and `end` the offset after its
    last one.
    """

    def __init__(self, message: str, partition: Partition | None = None, begin: int = 0, end: int = 0) -> None:
        super().__init__(message)
        self.partition = partition
        self.begin = begin
        self.end = end


@dataclass(frozen=True, slots=True)
class Record:
    """One entry of a partition; `timestamp` in Unix seconds.

    A record with `oversize` stands for a whole compressed batch that was not unpacked: `oversize` is the reason, `value` is
    None, `begin` is the first offset of the batch and `offset` is its last one.
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
        """Return the first value of a header, or None if the record does not have the header."""
        return next((value for key, value in self.headers if key == name), None)


@dataclass(frozen=True, slots=True)
class TopicInfo:
    """A topic as the log describes it. A topic that is deleted and created again under the same name has another id.

    `missing_permission` is a text that names the permission that we lack, if we may not read the topic.
    """

    name: str
    topic_id: str | None
    partitions: tuple[int, ...]
    missing_permission: str | None = None


@dataclass(frozen=True, slots=True)
class Bounds:
    """The offsets of a partition: `begin` of the first record that is kept, `end` of the next record to be written.

    `last_stable` is Kafka's last stable offset while a transaction is open: records from there on can be read only after
    the transaction ends.
    """

    begin: int
    end: int
    last_stable: int | None = None

    @property
    def readable(self) -> int:
        """The offset before which all records can be read now."""
        return self.end if self.last_stable is None else self.last_stable


class LogReader(Protocol):
    """Reads a log. One thread uses it. Any method may raise `BrokerUnavailable`, `Unreadable` or `AccessError`."""

    def connect(self) -> None:
        """Connect to the log, or raise."""

    @property
    def cluster_id(self) -> str | None:
        """The id of the cluster, or None as long as it is unknown."""

    def topics(self) -> dict[str, TopicInfo]:
        """Ask the log for all topics and return them by name."""

    def describe(self, topic: str) -> TopicInfo | None:
        """Ask the log for one topic; return None if it does not exist."""

    def bounds(self, partitions: Sequence[Partition]) -> dict[Partition, Bounds]:
        """Return the bounds of each partition, except of partitions that have no leader or are too new to be known."""

    def assign(self, offsets: Mapping[Partition, int]) -> None:
        """Read exactly these partitions from now on, each from the given offset."""

    def poll(self, timeout: float) -> list[Record]:
        """Return the next records, ordered within each partition; wait at most `timeout` seconds for the first one."""

    def position(self, partition: Partition) -> int:
        """Return the next offset to be read, after any gap without records; does not wait."""

    def pause_partitions(self, partitions: Collection[Partition]) -> None:
        """Pause fetching from exactly these partitions, and resume all others. The connection stays open."""

    def first_timestamp(self, topic: TopicInfo) -> float | None:
        """Return the timestamp of the topic's first record, or None if the topic is empty."""

    def commit(self, group: str, offsets: Mapping[Partition, int]) -> None:
        """Commit offsets for a consumer group, for lag graphs only: the checkpoint decides where reading continues."""

    def close(self) -> None:
        """Close all connections and files."""


class LogWriter(Protocol):
    """Writes to a log; any thread may use it."""

    def create_topic(self, name: str, partitions: int) -> bool:
        """Create a topic; return False if it exists already."""

    def partitions(self, topic: str) -> int:
        """Return the number of partitions of a topic; raises `StreamlearnError` if it does not exist."""

    def append(
        self, topic: str, partition: int, value: bytes | None, *, key: bytes | None = None, headers: Headers = ()
    ) -> None:
        """Write a record, which is durable after the next `flush`."""

    def flush(self, timeout: float = FLUSH_SECONDS) -> None:
        """Wait until all appended records are acknowledged; raises `StreamlearnError` if some are not after `timeout` seconds.

        Records that are not acknowledged are kept, and the next flush writes them again.
        """

    def close(self) -> None:
        """Close all connections and files."""
