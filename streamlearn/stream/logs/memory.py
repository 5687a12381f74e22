"""A log in memory, for tests and benchmarks. It behaves like Kafka, without a broker."""

from __future__ import annotations

import threading
import time
import uuid
from typing import TYPE_CHECKING

from streamlearn.core.errors import StreamlearnError
from streamlearn.stream.logs.base import FLUSH_SECONDS, Bounds, Headers, Record, TopicInfo

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from streamlearn.core.positions import Partition


class MemoryStore:
    """The topics and their records, shared by any number of `MemoryReader`s. It is also a `LogWriter`."""

    def __init__(self) -> None:
        self.records: dict[Partition, list[Record]] = {}
        self.infos: dict[str, TopicInfo] = {}
        self.committed: dict[Partition, int] = {}
        self.changed = threading.Condition()

    def create_topic(self, name: str, partitions: int) -> bool:
        with self.changed:
            if name in self.infos:
                return False
            self.infos[name] = TopicInfo(name, str(uuid.uuid4()), tuple(range(partitions)))
            self.records.update({(name, p): [] for p in range(partitions)})
            return True

    def partitions(self, topic: str) -> int:
        if topic not in self.infos:
            raise StreamlearnError(f"no topic {topic}")
        return len(self.infos[topic].partitions)

    def append(
        self, topic: str, partition: int, value: bytes | None, *, key: bytes | None = None, headers: Headers = ()
    ) -> None:
        with self.changed:
            log = self.records[topic, partition]
            log.append(Record(topic, partition, len(log), time.time(), key, value, headers))
            self.changed.notify_all()

    def flush(self, timeout: float = FLUSH_SECONDS) -> None:
        """Do nothing: every record is acknowledged at once."""

    def close(self) -> None:
        """Do nothing: there is nothing to close."""


class MemoryReader:
    """Reads a `MemoryStore`."""

    def __init__(self, store: MemoryStore, max_poll_records: int = 500) -> None:
        self.store = store
        self.max_poll_records = max_poll_records
        self.cluster_id: str | None = "memory"
        self._next_offsets: dict[Partition, int] = {}
        self._paused: set[Partition] = set()

    def connect(self) -> None:
        """Do nothing: the store is always available."""

    def topics(self) -> dict[str, TopicInfo]:
        with self.store.changed:
            return dict(self.store.infos)

    def describe(self, topic: str) -> TopicInfo | None:
        return self.store.infos.get(topic)

    def bounds(self, partitions: Sequence[Partition]) -> dict[Partition, Bounds]:
        with self.store.changed:
            records = self.store.records
            return {partition: Bounds(0, len(records[partition])) for partition in partitions if partition in records}

    def assign(self, offsets: Mapping[Partition, int]) -> None:
        self._next_offsets = dict(offsets)

    def poll(self, timeout: float) -> list[Record]:
        with self.store.changed:
            records = self._read_available()
            if not records and timeout > 0:
                self.store.changed.wait(timeout)
                records = self._read_available()
            return records

    def position(self, partition: Partition) -> int:
        return self._next_offsets[partition]

    def pause_partitions(self, partitions: Collection[Partition]) -> None:
        self._paused = set(partitions)

    def first_timestamp(self, topic: TopicInfo) -> float | None:
        with self.store.changed:
            firsts = [self.store.records[topic.name, p][:1] for p in topic.partitions]
            return min((record.timestamp for first in firsts for record in first), default=None)

    def commit(self, group: str, offsets: Mapping[Partition, int]) -> None:
        del group
        self.store.committed.update(offsets)

    def close(self) -> None:
        self._next_offsets = {}

    def _read_available(self) -> list[Record]:
        records: list[Record] = []
        for partition, offset in self._next_offsets.items():
            if partition in self._paused:
                continue
            new = self.store.records[partition][offset : offset + self.max_poll_records - len(records)]
            records += new
            self._next_offsets[partition] = offset + len(new)
        return records
