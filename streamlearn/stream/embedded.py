"""Topics in one SQLite file: the default where no broker is configured, so that everything runs with nothing installed.

Partitions, offsets, keys, headers and timestamps mean what they mean in Kafka; several processes read and write at once.
"""

from __future__ import annotations

import sqlite3
import threading
import time
import uuid
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import msgpack

from streamlearn.data import StreamlearnError
from streamlearn.stream.log import FLUSH_SECONDS, Bounds, BrokerUnavailable, Headers, Record, TopicInfo

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from pathlib import Path

    from streamlearn.data import Partition

POLL_SECONDS = 0.05  # SQLite cannot wake a reader in another process, so a waiting one looks this often
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
    """Return a connection to the file, made where it is missing; raises `StreamlearnError` (77 or 74) if it cannot be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        database = sqlite3.connect(path, timeout=30, isolation_level=None, check_same_thread=False)
        if database.execute("PRAGMA journal_mode=WAL").fetchone()[0] != "wal":
            raise StreamlearnError(f"{path}: this file system cannot hold SQLite's write-ahead log", code=74)
        database.execute("PRAGMA synchronous=FULL")
        with _Transaction(database):
            for statement in filter(str.strip, SCHEMA.split(";")):
                database.execute(statement)
            if database.execute("SELECT count(*) FROM log").fetchone()[0] == 0:
                database.execute("INSERT INTO log VALUES (?)", (str(uuid.uuid4()),))
    except PermissionError as error:
        raise StreamlearnError(f"{path}: {error.strerror}", code=77) from error
    except (OSError, sqlite3.Error) as error:
        code = 77 if "readonly" in str(error) or "unable to open" in str(error) else 74
        raise StreamlearnError(f"{path}: cannot be used for embedded topics: {error}", code=code) from error
    return database


def file_identity(path: Path) -> tuple[int, int] | None:
    """Return what tells a file from a later one of the same name, or None where there is none.

    A file that is removed stays usable for those who have it open: they would read and write what nobody else sees.
    """
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


class _Transaction:
    """A write transaction that takes its lock at the start, so that offsets are given out by one writer at a time."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self.database = database

    def __enter__(self) -> None:
        self.database.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is not None:
            self._undo()
            return
        try:
            self.database.execute("COMMIT")
        except sqlite3.Error:
            self._undo()
            raise

    def _undo(self) -> None:
        """Roll back unless SQLite has done so itself, as it does where the disk is full: the first error is the cause."""
        with suppress(sqlite3.Error):
            if self.database.in_transaction:
                self.database.execute("ROLLBACK")


class EmbeddedReader:
    """One reader of the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cluster_id: str | None = None
        self._database: sqlite3.Connection | None = None
        self._identity: tuple[int, int] | None = None
        self._at: dict[Partition, int] = {}
        self._held: set[Partition] = set()
        self._emptied: dict[Partition, int] = {}  # the version of the file in which each had nothing more to read

    def connect(self) -> None:
        self.close()
        self._database = open_database(self.path)
        self._identity = file_identity(self.path)
        self.cluster_id = self._database.execute("SELECT cluster_id FROM log").fetchone()[0]

    @property
    def database(self) -> sqlite3.Connection:
        """The open file."""
        if self._database is None:
            raise StreamlearnError(f"{self.path}: not connected")
        return self._database

    def _ask(self, query: str, values: tuple[str | int, ...] = ()) -> list[tuple[Any, ...]]:
        """Return a query's rows; raises `StreamlearnError` (74) where the file cannot be read."""
        try:
            return self.database.execute(query, values).fetchall()
        except sqlite3.Error as error:
            raise StreamlearnError(f"{self.path}: cannot be read: {error}", code=74) from error

    def topics(self) -> dict[str, TopicInfo]:
        if file_identity(self.path) != self._identity:
            raise BrokerUnavailable(f"{self.path}: the file was removed or replaced while it was read")
        rows = self._ask("SELECT name, topic_id, partitions FROM topics")
        return {name: TopicInfo(name, topic_id, tuple(range(count))) for name, topic_id, count in rows}

    def describe(self, topic: str) -> TopicInfo | None:
        rows = self._ask("SELECT topic_id, partitions FROM topics WHERE name = ?", (topic,))
        return TopicInfo(topic, rows[0][0], tuple(range(rows[0][1]))) if rows else None

    def bounds(self, partitions: Sequence[Partition]) -> dict[Partition, Bounds]:
        # two look-ups in the index: min and max in one query would read every record
        one = "(SELECT {}(offset) FROM records WHERE topic = ?1 AND partition = ?2)"
        query = f"SELECT {one.format('min')}, {one.format('max')}"
        found = {partition: self._ask(query, partition)[0] for partition in partitions}
        return {p: Bounds(0, 0) if low is None else Bounds(low, high + 1) for p, (low, high) in found.items()}

    def assign(self, offsets: Mapping[Partition, int]) -> None:
        self._at = dict(offsets)
        self._emptied.clear()

    def poll(self, timeout: float) -> list[Record]:
        deadline = time.monotonic() + timeout
        while not (found := self._take()):
            if (left := deadline - time.monotonic()) <= 0:
                break
            time.sleep(min(POLL_SECONDS, left))
        return found

    def position(self, partition: Partition) -> int:
        return self._at[partition]

    def pause_partitions(self, partitions: Collection[Partition]) -> None:
        self._held = set(partitions)

    def first_timestamp(self, topic: TopicInfo) -> float | None:
        query = "SELECT timestamp FROM records WHERE topic = ? AND partition = ? AND offset = 0"
        found = [row[0] for p in topic.partitions for row in self._ask(query, (topic.name, p))]
        return min(found, default=None)

    def commit(self, group: str, offsets: Mapping[Partition, int]) -> None:
        rows = [(group, topic, partition, offset) for (topic, partition), offset in offsets.items()]
        try:
            with _Transaction(self.database):
                self.database.executemany("INSERT OR REPLACE INTO committed VALUES (?, ?, ?, ?)", rows)
        except sqlite3.Error as error:
            raise StreamlearnError(f"{self.path}: positions cannot be written: {error}", code=74) from error

    def close(self) -> None:
        if self._database is not None:
            self._database.close()
            self._database = None

    def _take(self) -> list[Record]:
        version = self._ask("PRAGMA data_version")[0][0]  # it changes when another connection writes
        found: list[Record] = []
        room = FETCH_BYTES
        query = (
            "SELECT offset, timestamp, key, value, headers FROM records"
            " WHERE topic = ? AND partition = ? AND offset >= ? ORDER BY offset LIMIT ?"
        )
        for (topic, partition), start in self._at.items():
            place = (topic, partition)
            if place in self._held or self._emptied.get(place) == version:
                continue
            rows = self._ask(query, (topic, partition, start, FETCH_RECORDS))
            for offset, timestamp, key, value, headers in rows:
                pairs = tuple((name, bytes(data or b"")) for name, data in msgpack.unpackb(headers)) if headers else ()
                found.append(Record(topic, partition, offset, timestamp, key, value, pairs))
                self._at[topic, partition] = offset + 1
                room -= len(value or b"")
                if room <= 0:
                    return found
            if len(rows) < FETCH_RECORDS:
                self._emptied[place] = version
        return found


class EmbeddedWriter:
    """A writer to the file; records are gathered and written in transactions."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._database = open_database(path)
        self._identity = file_identity(path)
        self._lock = threading.Lock()
        self._waiting: list[tuple[str, int, bytes | None, bytes | None, Headers]] = []
        self._waiting_bytes = 0
        self._known: dict[str, int] = {}

    def create_topic(self, name: str, partitions: int) -> bool:
        with self._lock:
            if file_identity(self.path) != self._identity:  # what waits goes into the file that is there now
                self._database.close()
                self._database = open_database(self.path)
                self._identity = file_identity(self.path)
        row = (name, str(uuid.uuid4()), partitions)
        try:
            with self._lock, _Transaction(self._database):
                return self._database.execute("INSERT OR IGNORE INTO topics VALUES (?, ?, ?)", row).rowcount == 1
        except sqlite3.Error as error:
            raise StreamlearnError(f"embedded topics: {name} cannot be created: {error}", code=74) from error

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
            self._waiting.append((topic, partition, key, value, headers))
            self._waiting_bytes += len(value or b"")
            if len(self._waiting) >= WRITE_RECORDS or self._waiting_bytes >= WRITE_BYTES:
                self._write()

    def flush(self, timeout: float = FLUSH_SECONDS) -> None:
        del timeout  # SQLite has its own
        with self._lock:
            self._write()

    def close(self) -> None:
        try:
            self.flush()
        finally:
            self._database.close()

    def _write(self) -> None:
        if not self._waiting:
            return
        if file_identity(self.path) != self._identity:
            raise StreamlearnError(f"{self.path}: the file was removed or replaced while it was written", code=74)
        last = "SELECT coalesce(max(offset), -1) FROM records WHERE topic = ? AND partition = ?"
        try:
            with _Transaction(self._database):
                ends: dict[Partition, int] = {}
                for topic, partition, key, value, headers in self._waiting:
                    place = (topic, partition)
                    offset = ends[place] if place in ends else self._database.execute(last, place).fetchone()[0] + 1
                    packed = msgpack.packb(headers) if headers else None
                    self._database.execute(
                        "INSERT INTO records VALUES (?, ?, ?, ?, ?, ?, ?)",
                        (topic, partition, offset, time.time(), key, value, packed),
                    )
                    ends[place] = offset + 1
        except sqlite3.Error as error:
            raise StreamlearnError(f"embedded topics: cannot be written: {error}", code=74) from error
        self._waiting.clear()
        self._waiting_bytes = 0
