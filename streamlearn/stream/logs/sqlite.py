"""Topics in one SQLite file: the default if no broker is configured, so that everything runs without further installation.

Partitions, offsets, keys, headers and timestamps mean the same as in Kafka. Several processes can read and write at once.
"""

from __future__ import annotations

import sqlite3
import threading
import time
import uuid
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import msgpack

from streamlearn.core.errors import AccessError, InputOutputError, StreamlearnError
from streamlearn.stream.logs.base import FLUSH_SECONDS, Bounds, BrokerUnavailable, Headers, Record, TopicInfo

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from pathlib import Path

    from streamlearn.core.positions import Partition

POLL_SECONDS = 0.05  # SQLite cannot wake a reader in another process, so the reader checks this often
FETCH_RECORDS = 500
FETCH_BYTES = 8 << 20
WRITE_RECORDS = 500
WRITE_BYTES = 8 << 20

SCHEMA = """
CREATE TABLE IF NOT EXISTS log (cluster_id TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS topics (name TEXT PRIMARY KEY, topic_id TEXT NOT NULL, partitions INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS records (
    topic TEXT NOT NULL, partition INTEGER NOT NULL, offset INTEGER NOT NULL,
    timestamp REAL NOT NULL, key BLOB, value BLOB, headers BLOB,
    PRIMARY KEY (topic, partition, offset)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS committed (
    grp TEXT NOT NULL, topic TEXT NOT NULL, partition INTEGER NOT NULL, offset INTEGER NOT NULL,
    PRIMARY KEY (grp, topic, partition));
"""


def open_database(path: Path) -> sqlite3.Connection:
    """Open the file, create it if it is missing, and return the connection; raises `AccessError` or `InputOutputError`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        database = sqlite3.connect(path, timeout=30, isolation_level=None, check_same_thread=False)
        if database.execute("PRAGMA journal_mode=WAL").fetchone()[0] != "wal":
            raise InputOutputError(f"{path}: this file system cannot hold SQLite's write-ahead log")
        database.execute("PRAGMA synchronous=FULL")
        with _Transaction(database):
            for statement in filter(str.strip, SCHEMA.split(";")):
                database.execute(statement)
            if database.execute("SELECT count(*) FROM log").fetchone()[0] == 0:
                database.execute("INSERT INTO log VALUES (?)", (str(uuid.uuid4()),))
    except PermissionError as error:
        raise AccessError(f"{path}: {error.strerror}") from error
    except (OSError, sqlite3.Error) as error:
        kind = AccessError if "readonly" in str(error) or "unable to open" in str(error) else InputOutputError
        raise kind(f"{path}: cannot be used for embedded topics: {error}") from error
    return database


def file_identity(path: Path) -> tuple[int, int] | None:
    """Return the device and inode number, by which a file differs from a later one at the same path; None without a file.

    A process that has a removed file open can still use it: it would read and write records that no other process sees.
    """
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


class _Transaction:
    """A write transaction that locks the file when it begins, so that two writers never assign the same offset."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self.database = database

    def __enter__(self) -> None:
        self.database.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is not None:
            self._roll_back()
            return
        try:
            self.database.execute("COMMIT")
        except sqlite3.Error:
            self._roll_back()
            raise

    def _roll_back(self) -> None:
        """Roll back, unless SQLite did so itself, as it does when the disk is full. Ignore errors: the first one counts."""
        with suppress(sqlite3.Error):
            if self.database.in_transaction:
                self.database.execute("ROLLBACK")


class EmbeddedReader:
    """Reads the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cluster_id: str | None = None
        self._database: sqlite3.Connection | None = None
        self._identity: tuple[int, int] | None = None
        self._next_offsets: dict[Partition, int] = {}
        self._paused: set[Partition] = set()
        # of each partition that was read to its end: the file's version at that time
        self._version_at_end: dict[Partition, int] = {}

    def connect(self) -> None:
        self.close()
        self._database = open_database(self.path)
        self._identity = file_identity(self.path)
        self.cluster_id = self._database.execute("SELECT cluster_id FROM log").fetchone()[0]

    @property
    def database(self) -> sqlite3.Connection:
        """The connection to the open file."""
        if self._database is None:
            raise StreamlearnError(f"{self.path}: not connected")
        return self._database

    def _query(self, query: str, values: tuple[str | int, ...] = ()) -> list[tuple[Any, ...]]:
        """Return the rows of a query; raises `InputOutputError` if the file cannot be read."""
        try:
            return self.database.execute(query, values).fetchall()
        except sqlite3.Error as error:
            raise InputOutputError(f"{self.path}: cannot be read: {error}") from error

    def topics(self) -> dict[str, TopicInfo]:
        if file_identity(self.path) != self._identity:
            raise BrokerUnavailable(f"{self.path}: the file was removed or replaced while it was read")
        rows = self._query("SELECT name, topic_id, partitions FROM topics")
        return {name: TopicInfo(name, topic_id, tuple(range(count))) for name, topic_id, count in rows}

    def describe(self, topic: str) -> TopicInfo | None:
        rows = self._query("SELECT topic_id, partitions FROM topics WHERE name = ?", (topic,))
        return TopicInfo(topic, rows[0][0], tuple(range(rows[0][1]))) if rows else None

    def bounds(self, partitions: Sequence[Partition]) -> dict[Partition, Bounds]:
        # two subqueries use the index; min and max in one query would read every record
        one = "(SELECT {}(offset) FROM records WHERE topic = ?1 AND partition = ?2)"
        query = f"SELECT {one.format('min')}, {one.format('max')}"
        found = {partition: self._query(query, partition)[0] for partition in partitions}
        return {p: Bounds(0, 0) if low is None else Bounds(low, high + 1) for p, (low, high) in found.items()}

    def assign(self, offsets: Mapping[Partition, int]) -> None:
        self._next_offsets = dict(offsets)
        self._version_at_end.clear()

    def poll(self, timeout: float) -> list[Record]:
        deadline = time.monotonic() + timeout
        while not (records := self._read_available()):
            if (remaining := deadline - time.monotonic()) <= 0:
                break
            time.sleep(min(POLL_SECONDS, remaining))
        return records

    def position(self, partition: Partition) -> int:
        return self._next_offsets[partition]

    def pause_partitions(self, partitions: Collection[Partition]) -> None:
        self._paused = set(partitions)

    def first_timestamp(self, topic: TopicInfo) -> float | None:
        query = "SELECT timestamp FROM records WHERE topic = ? AND partition = ? AND offset = 0"
        found = [row[0] for p in topic.partitions for row in self._query(query, (topic.name, p))]
        return min(found, default=None)

    def commit(self, group: str, offsets: Mapping[Partition, int]) -> None:
        rows = [(group, topic, partition, offset) for (topic, partition), offset in offsets.items()]
        try:
            with _Transaction(self.database):
                self.database.executemany("INSERT OR REPLACE INTO committed VALUES (?, ?, ?, ?)", rows)
        except sqlite3.Error as error:
            raise InputOutputError(f"{self.path}: positions cannot be written: {error}") from error

    def close(self) -> None:
        if self._database is not None:
            self._database.close()
            self._database = None

    def _read_available(self) -> list[Record]:
        version = self._query("PRAGMA data_version")[0][0]  # changes when another connection writes
        records: list[Record] = []
        bytes_left = FETCH_BYTES
        query = (
            "SELECT offset, timestamp, key, value, headers FROM records"
            " WHERE topic = ? AND partition = ? AND offset >= ? ORDER BY offset LIMIT ?"
        )
        for (topic, partition), start in self._next_offsets.items():
            topic_partition = (topic, partition)
            if topic_partition in self._paused or self._version_at_end.get(topic_partition) == version:
                continue
            rows = self._query(query, (topic, partition, start, FETCH_RECORDS))
            for offset, timestamp, key, value, headers in rows:
                pairs = tuple((name, bytes(data or b"")) for name, data in msgpack.unpackb(headers)) if headers else ()
                records.append(Record(topic, partition, offset, timestamp, key, value, pairs))
                self._next_offsets[topic, partition] = offset + 1
                bytes_left -= len(value or b"")
                if bytes_left <= 0:
                    return records
            if len(rows) < FETCH_RECORDS:
                self._version_at_end[topic_partition] = version
        return records


class EmbeddedWriter:
    """Writes to the file; many records are written in one transaction."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._database = open_database(path)
        self._identity = file_identity(path)
        self._lock = threading.Lock()
        self._unwritten: list[tuple[str, int, bytes | None, bytes | None, Headers]] = []
        self._unwritten_bytes = 0

    def create_topic(self, name: str, partitions: int) -> bool:
        with self._lock:
            if file_identity(self.path) != self._identity:  # unwritten records go into the new file
                self._database.close()
                self._database = open_database(self.path)
                self._identity = file_identity(self.path)
        row = (name, str(uuid.uuid4()), partitions)
        try:
            with self._lock, _Transaction(self._database):
                return self._database.execute("INSERT OR IGNORE INTO topics VALUES (?, ?, ?)", row).rowcount == 1
        except sqlite3.Error as error:
            raise InputOutputError(f"embedded topics: {name} cannot be created: {error}") from error

    def partitions(self, topic: str) -> int:
        with self._lock:
            row = self._database.execute("SELECT partitions FROM topics WHERE name = ?", (topic,)).fetchone()
        if row is None:
            raise StreamlearnError(f"no topic {topic}")
        return int(row[0])

    def append(
        self, topic: str, partition: int, value: bytes | None, *, key: bytes | None = None, headers: Headers = ()
    ) -> None:
        with self._lock:
            self._unwritten.append((topic, partition, key, value, headers))
            self._unwritten_bytes += len(value or b"")
            if len(self._unwritten) >= WRITE_RECORDS or self._unwritten_bytes >= WRITE_BYTES:
                self._write()

    def flush(self, timeout: float = FLUSH_SECONDS) -> None:
        del timeout  # SQLite has a time limit of its own
        with self._lock:
            self._write()

    def close(self) -> None:
        try:
            self.flush()
        finally:
            self._database.close()

    def _write(self) -> None:
        if not self._unwritten:
            return
        if file_identity(self.path) != self._identity:
            raise InputOutputError(f"{self.path}: the file was removed or replaced while it was written")
        last = "SELECT coalesce(max(offset), -1) FROM records WHERE topic = ? AND partition = ?"
        try:
            with _Transaction(self._database):
                ends: dict[Partition, int] = {}
                for topic, partition, key, value, headers in self._unwritten:
                    topic_partition = (topic, partition)
                    if (offset := ends.get(topic_partition)) is None:
                        offset = self._database.execute(last, topic_partition).fetchone()[0] + 1
                    packed = msgpack.packb(headers) if headers else None
                    self._database.execute(
                        "INSERT INTO records VALUES (?, ?, ?, ?, ?, ?, ?)",
                        (topic, partition, offset, time.time(), key, value, packed),
                    )
                    ends[topic_partition] = offset + 1
        except sqlite3.Error as error:
            raise InputOutputError(f"embedded topics: cannot be written: {error}") from error
        self._unwritten.clear()
        self._unwritten_bytes = 0
