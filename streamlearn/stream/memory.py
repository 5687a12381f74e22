"""A log in memory, for tests and benchmarks: the same meaning as Kafka's, without a broker."""

from __future__ import annotations

import threading
import time
import uuid
from typing import TYPE_CHECKING

from streamlearn.data import StreamlearnError
from streamlearn.stream.log import FLUSH_SECONDS, Bounds, Headers, Record, TopicInfo

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from streamlearn.data import Partition


class MemoryStore:
    """The topics themselves, shared by any number of `MemoryReader` readers; also a `LogWriter`."""

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
        """Nothing is ever unacknowledged here."""

    def close(self) -> None:
        """Nothing is held."""


class MemoryReader:
    """One reader of a `MemoryStore`."""

    def __init__(self, store: MemoryStore, max_poll_records: int = 500) -> None:
        self.store = store
        self.max_poll_records = max_poll_records
        self.cluster_id: str | None = "memory"
        self._at: dict[Partition, int] = {}
        self._held: set[Partition] = set()

    def connect(self) -> None:
        """Do nothing: it is always there."""

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
        self._at = dict(offsets)

    def poll(self, timeout: float) -> list[Record]:
        with self.store.changed:
            found = self._take()
            if not found and timeout > 0:
                self.store.changed.wait(timeout)
                found = self._take()
            return found

    def position(self, partition: Partition) -> int:
        return self._at[partition]

    def pause_partitions(self, partitions: Collection[Partition]) -> None:
        self._held = set(partitions)

    def first_timestamp(self, topic: TopicInfo) -> float | None:
        with self.store.changed:
            firsts = [self.store.records[topic.name, p][:1] for p in topic.partitions]
            return min((record.timestamp for first in firsts for record in first), default=None)

    def commit(self, group: str, offsets: Mapping[Partition, int]) -> None:
        del group
        self.store.committed.update(offsets)

    def close(self) -> None:
        self._at = {}

    def _take(self) -> list[Record]:
        found: list[Record] = []
        for partition, offset in self._at.items():
            if partition in self._held:
                continue
            records = self.store.records[partition][offset : offset + self.max_poll_records - len(found)]
            found += records
            self._at[partition] = offset + len(records)
        return found
