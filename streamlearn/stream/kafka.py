"""Apache Kafka as a log: manual assignment, positions from the checkpoint, and active checks where `poll` keeps silent.

kafka-python reports neither a missing topic, nor a withdrawn permission, nor brokers that are gone, nor a topic that was
created anew: `topics` and `bounds` ask, and raise.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from typing import TYPE_CHECKING, Any

from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer
from kafka import errors as kafka_errors
from kafka.admin import NewTopic
from kafka.protocol.consumer import IsolationLevel, ListOffsetsRequest, OffsetSpec
from kafka.structs import OffsetAndMetadata, TopicPartition

from streamlearn.data import StreamlearnError
from streamlearn.stream.connection import PERMISSION, REQUEST_MS, client_settings, connected, reason
from streamlearn.stream.kafka_batches import Unread, bound_unpacking
from streamlearn.stream.log import (
    FLUSH_SECONDS,
    ORIGINAL_SIZE_HEADER,
    Bounds,
    BrokerUnavailable,
    Headers,
    Record,
    TopicInfo,
    Unreadable,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from streamlearn.config import KafkaConfig
    from streamlearn.data import Partition

MAX_POLL_RECORDS = 2000
TOO_LARGE = (kafka_errors.MessageSizeTooLargeError, kafka_errors.RecordListTooLargeError)
CUT_BYTES = (64 << 10, 1 << 10, 0)  # to what a record is cut that its topic does not take, in this order
CUT_HEADER_BYTES = 256  # and each of its headers with the last of them

_Sent = tuple[str, int, bytes | None, bytes | None, Headers]


def may(topic: Mapping[str, Any], operation: str) -> bool:
    """Tell whether we may do this with a topic, as the broker described it; an old broker does not say."""
    operations = topic.get("authorized_operations")
    return operations is None or operation in operations


def denied(error: kafka_errors.KafkaError) -> StreamlearnError:
    """Return what a missing permission means, for people."""
    names = error.args[0] if error.args else ""
    what = ", ".join(sorted(names)) if isinstance(names, set) else str(names)
    if isinstance(error, kafka_errors.GroupAuthorizationFailedError):
        return StreamlearnError(f"group {what}: no permission to report positions under its name (READ)", code=77)
    if isinstance(error, kafka_errors.TopicAuthorizationFailedError):
        return StreamlearnError(f"topic {what}: no permission (READ and DESCRIBE are needed)", code=77)
    return StreamlearnError(f"refused: {reason(error)}", code=77)


# what passes by itself, or when the client connects again; every other error is named and is no outage
PASSING = (
    kafka_errors.RetriableError,
    kafka_errors.BrokerNotAvailableError,
    kafka_errors.KafkaProtocolError,
    kafka_errors.UnknownBrokerIdError,
    kafka_errors.IllegalStateError,
    kafka_errors.NoOffsetForPartitionError,
)
CHANGED = (kafka_errors.OffsetOutOfRangeError, kafka_errors.LogTruncationError)


def told(error: kafka_errors.KafkaError) -> StreamlearnError:
    """Return what an error means for the reader: a missing permission, an outage, or an answer that makes no sense."""
    if isinstance(error, PERMISSION):
        return denied(error)
    if isinstance(error, CHANGED):
        # not one record more before the reader has compared ids and bounds, which it does when it connects
        return BrokerUnavailable(f"the log is not what it was: {type(error).__name__}")
    text = f"{type(error).__name__}: {reason(error):.160}"
    return BrokerUnavailable(text) if isinstance(error, PASSING) else Unreadable(f"the broker answers with {text}")


class KafkaReader:
    """One reader. kafka-python's consumer is not thread safe: the reader thread alone calls this."""

    def __init__(self, kafka: KafkaConfig, group: str, max_record_bytes: int = 0) -> None:
        self.kafka = kafka
        self.group = group
        self.cluster_id: str | None = None
        self._consumer: Any = None
        self._admin: Any = None
        self._reads: set[str] = set()
        self._unreadable: set[str] = set()
        self._held: set[Partition] = set()
        bound_unpacking(max_record_bytes)

    def connect(self) -> None:
        settings = client_settings(self.kafka)
        self.close()
        self._admin = connected(KafkaAdminClient, settings)
        self._consumer = connected(
            KafkaConsumer,
            settings
            | {
                "group_id": self.group,
                "enable_auto_commit": False,
                "auto_offset_reset": "none",
                "isolation_level": self.kafka.isolation_level,
                "max_poll_records": MAX_POLL_RECORDS,
                "fetch_max_wait_ms": 250,
                "fetch_max_bytes": 16 << 20,
                "max_partition_fetch_bytes": 4 << 20,
                "metadata_max_age_ms": int(self.kafka.metadata_refresh_seconds * 1000),
            },
        )
        self.cluster_id = self._ask(self._admin.describe_cluster).get("cluster_id")

    def topics(self) -> dict[str, TopicInfo]:
        """Return all topics, those too that are read and no longer ours to see."""
        listed = self._ask(self._admin.list_topics)  # without those that are not ours to see
        return self._describe(sorted({*listed, *self._reads}))

    def describe(self, topic: str) -> TopicInfo | None:
        return self._describe([topic]).get(topic)

    def _describe(self, names: Sequence[str]) -> dict[str, TopicInfo]:
        found = {}
        for entry in self._metadata(names):
            name = entry["name"]
            if entry.get("error_code") == kafka_errors.TopicAuthorizationFailedError.errno:
                found[name] = TopicInfo(name, None, (), "no permission to see it (DESCRIBE)")
            elif not entry.get("error_code"):
                if entry.get("authorized_operations") is not None:
                    (self._unreadable.discard if may(entry, "READ") else self._unreadable.add)(name)
                partitions = sorted(p["partition_index"] for p in entry["partitions"])
                refused = "no permission to read it (READ)" if name in self._unreadable else None
                found[name] = TopicInfo(name, str(entry["topic_id"]), tuple(partitions), refused)
        return found

    def _metadata(self, names: Iterable[str]) -> list[dict[str, Any]]:
        asked = list(names)
        entries: list[dict[str, Any]] = self._ask(self._admin.describe_topics, asked) if asked else []
        return entries

    def bounds(self, partitions: Sequence[Partition]) -> dict[Partition, Bounds]:
        """Return begin and end of each partition; raises `StreamlearnError` (77) where one is not ours to see.

        The end is the high watermark: behind a transaction that is still open lie records that are acknowledged too.
        """
        leaders = self._leaders(partitions)
        begins = self._offsets(leaders, OffsetSpec.EARLIEST)
        ends = self._offsets({place: leaders[place] for place in begins}, OffsetSpec.LATEST)
        last_stable: dict[Partition, int] = {}
        if self.kafka.isolation_level == "read_committed":  # asked last: what is before the end now stays before it
            asked = {place: leaders[place] for place in ends}
            stable = self._offsets(asked, OffsetSpec.LATEST, IsolationLevel.READ_COMMITTED)
            last_stable = {place: offset for place, offset in stable.items() if offset < ends[place]}
        return {place: Bounds(begins[place], end, last_stable.get(place)) for place, end in ends.items()}

    def _leaders(self, partitions: Sequence[Partition]) -> dict[Partition, int]:
        """Return the leader of each partition that has one now."""
        wanted = set(partitions)
        return {
            place: partition["leader_id"]
            for entry in self._metadata({topic for topic, _ in partitions})
            for partition in entry["partitions"]
            if (place := (entry["name"], partition["partition_index"])) in wanted and partition["leader_id"] >= 0
        }

    def _offsets(
        self,
        leaders: Mapping[Partition, int],
        spec: OffsetSpec,
        isolation: IsolationLevel = IsolationLevel.READ_UNCOMMITTED,
    ) -> dict[Partition, int]:
        """Return the offsets that the partitions' leaders name now; one whose leader does not answer is missing."""
        asked: dict[int, dict[str, list[int]]] = {}
        for (topic, partition), leader in leaders.items():
            asked.setdefault(leader, {}).setdefault(topic, []).append(partition)
        found: dict[Partition, int] = {}
        for leader, topics in asked.items():
            with contextlib.suppress(BrokerUnavailable):
                found |= self._ask(self._admin._manager.run, self._list_offsets, leader, topics, spec, isolation)  # noqa: SLF001
        return found

    async def _list_offsets(
        self, leader: int, topics: Mapping[str, Sequence[int]], spec: OffsetSpec, isolation: IsolationLevel
    ) -> dict[Partition, int]:
        """Ask one leader; kafka-python's own methods ask with the reader's isolation, or fail for all where one fails."""
        kind = ListOffsetsRequest.ListOffsetsTopic
        request = ListOffsetsRequest(
            isolation_level=isolation,
            topics=[
                kind(
                    name=name,
                    partitions=[kind.ListOffsetsPartition(partition_index=p, timestamp=spec) for p in indices],
                )
                for name, indices in topics.items()
            ],
            min_version=ListOffsetsRequest.min_version_for_isolation_level(isolation),
        )
        response = await self._admin._manager.send(request, node_id=leader)  # noqa: SLF001 - no public method asks this
        found: dict[Partition, int] = {}
        for topic in response.topics:
            for partition in topic.partitions:
                if partition.error_code == kafka_errors.TopicAuthorizationFailedError.errno:
                    raise kafka_errors.TopicAuthorizationFailedError({topic.name})
                if not partition.error_code:
                    found[topic.name, partition.partition_index] = partition.offset
        return found

    def assign(self, offsets: Mapping[Partition, int]) -> None:
        self._reads = {topic for topic, _ in offsets}
        self._consumer.assign([TopicPartition(*partition) for partition in offsets])
        for partition, offset in offsets.items():
            self._consumer.seek(TopicPartition(*partition), offset)
        self.pause_partitions(self._held)

    def poll(self, timeout: float) -> list[Record]:
        try:
            polled = self._consumer.poll(timeout_ms=int(timeout * 1000))
        except kafka_errors.TopicAuthorizationFailedError as error:
            self._unreadable |= set(error.args[0])  # the next description of the topics says so
            raise denied(error) from error
        except kafka_errors.KafkaError as error:
            raise told(error) from error
        return [_record(r) for records in polled.values() for r in records]

    def position(self, partition: Partition) -> int:
        return int(self._ask(self._consumer.position, TopicPartition(*partition), 0))

    def pause_partitions(self, partitions: Collection[Partition]) -> None:
        self._held = set(partitions)
        there = self._consumer.assignment()
        held = {TopicPartition(*partition) for partition in partitions} & there
        paused = self._consumer.paused()
        self._consumer.resume(*(paused - held))
        self._consumer.pause(*(held - paused))

    def first_timestamp(self, topic: TopicInfo) -> float | None:
        asked = {TopicPartition(topic.name, partition): 0 for partition in topic.partitions}
        found = self._ask(self._consumer.offsets_for_times, asked)
        return min((entry.timestamp / 1000 for entry in found.values() if entry is not None), default=None)

    def commit(self, group: str, offsets: Mapping[Partition, int]) -> None:
        del group  # it is the consumer's own
        self._consumer.commit_async({TopicPartition(*p): OffsetAndMetadata(o, "", -1) for p, o in offsets.items()})

    def close(self) -> None:
        for client in (self._consumer, self._admin):
            if client is not None:
                client.close()
        self._consumer = self._admin = None

    def _ask(self, question: Any, *arguments: Any) -> Any:
        try:
            return question(*arguments)
        except kafka_errors.KafkaError as error:
            raise told(error) from error


def _record(found: Any) -> Record:
    """Return a record of the client's as one of ours."""
    unread = found.value if isinstance(found.value, Unread) else None
    return Record(
        found.topic,
        found.partition,
        found.offset,
        found.timestamp / 1000,
        found.key,
        found.value if unread is None else None,
        tuple(found.headers),
        oversize=unread.why if unread is not None else None,
        begin=unread.begin if unread is not None else None,
    )


class KafkaWriter:
    """A writer: acks from all replicas, idempotent; `flush` tells of every record that was not acknowledged."""

    def __init__(self, kafka: KafkaConfig) -> None:
        self.kafka = kafka
        self._admin: Any = None
        self._producer: Any = None
        self._lock = threading.Lock()
        self._flushing = threading.Lock()
        self._numbers = itertools.count()
        self._open: dict[int, _Sent] = {}  # not acknowledged, in the order in which they were given
        self._refused: dict[int, Exception] = {}  # why

    def _clients(self) -> tuple[Any, Any]:
        with self._lock:
            if self._admin is None:
                self._admin = connected(KafkaAdminClient, client_settings(self.kafka))
            if self._producer is None:
                settings = client_settings(self.kafka) | {
                    "acks": "all",
                    "linger_ms": 20,
                    "batch_size": 512 << 10,
                    "max_request_size": 32 << 20,
                    "delivery_timeout_ms": int(FLUSH_SECONDS * 1000),
                    "max_block_ms": REQUEST_MS,  # for a topic that is gone
                    "compression_type": "lz4",
                }
                self._producer = connected(KafkaProducer, settings)
            return self._admin, self._producer

    def create_topic(self, name: str, partitions: int) -> bool:
        admin, _ = self._clients()
        try:
            if name in admin.list_topics():
                return False
            admin.create_topics([NewTopic(name, partitions, self.kafka.replication_factor)], wait_for_metadata=True)
        except kafka_errors.TopicAlreadyExistsError:
            return False
        except kafka_errors.InvalidTopicError as error:
            raise StreamlearnError(f"{name}: not a name that Kafka accepts for a topic", code=78) from error
        except PERMISSION as error:
            why = "is not there, or not ours to see (DESCRIBE), and we have no permission to create it (CREATE)"
            raise StreamlearnError(f"topic {name}: {why}", code=77) from error
        except kafka_errors.KafkaError as error:
            raise BrokerUnavailable(f"{name}: cannot be created: {error!s:.160}") from error
        return True

    def partitions(self, topic: str) -> int:
        admin, producer = self._clients()
        try:
            if topic not in admin.list_topics():  # asking the producer would wait for it a minute
                raise StreamlearnError(f"no topic {topic}")
            if not may(admin.describe_topics([topic])[0], "WRITE"):
                raise StreamlearnError(f"topic {topic}: no permission to write to it (WRITE)", code=77)
            return len(producer.partitions_for(topic))
        except PERMISSION as error:
            raise denied(error) from error
        except kafka_errors.KafkaError as error:
            raise BrokerUnavailable(f"{topic}: {error!s:.160}") from error

    def append(
        self, topic: str, partition: int, value: bytes | None, *, key: bytes | None = None, headers: Headers = ()
    ) -> None:
        number, record = next(self._numbers), (topic, partition, value, key, headers)
        self._open[number] = record
        try:
            self._send(number, record)
        except BrokerUnavailable:
            del self._open[number]
            raise

    def _send(self, number: int, record: _Sent) -> None:
        _, producer = self._clients()
        topic, partition, value, key, headers = record
        try:
            sent = producer.send(topic, value=value, key=key, headers=list(headers), partition=partition)
        except TOO_LARGE as error:
            self._refused[number] = error
            return
        except kafka_errors.KafkaError as error:
            if self._producer is not producer:  # another thread's flush has just taken a new one
                self._send(number, record)
                return
            raise BrokerUnavailable(f"{topic}: cannot be written: {error!s:.160}") from error
        sent.add_callback(lambda _: self._open.pop(number, None))
        sent.add_errback(lambda error: self._refused.setdefault(number, error))

    def flush(self, timeout: float = FLUSH_SECONDS) -> None:
        with self._flushing:  # else one thread would find nothing while another is about to send it again
            numbers = list(self._open.copy())  # one step: the client's thread removes what is acknowledged
            self._wait(timeout)
            if left := self._left(numbers):
                self._send_again(left, timeout)
            if left := self._left(numbers):
                topic, error = self._open[left[0]][0], self._refused.get(left[0])
                if isinstance(
                    error, PERMISSION
                ):  # of the topic, or where no topic may be written, of the producer itself
                    why = f"no permission to write to it (WRITE), {len(left)} records are waiting"
                    raise StreamlearnError(f"topic {topic}: {why}", code=77)
                text = f"{topic}: not acknowledged: {type(error).__name__}: {error!s:.160}"
                raise StreamlearnError(f"{len(left)} records: {text}", code=74)
            self._refused.clear()

    def _left(self, numbers: Iterable[int]) -> list[int]:
        return [number for number in numbers if number in self._open]

    def _send_again(self, numbers: list[int], timeout: float) -> None:
        too_large = any(isinstance(self._refused.get(number), TOO_LARGE) for number in numbers)
        self._renew()
        if too_large:
            for number in numbers:
                self._send_alone(number, timeout)
            return
        for number in numbers:
            self._send(number, self._open[number])
        self._wait(timeout)

    def _wait(self, timeout: float) -> None:
        if self._producer is None:
            return
        deadline = time.monotonic() + timeout
        while True:
            try:
                self._producer.flush(timeout=timeout)
            except kafka_errors.KafkaError as error:
                # of a batch that the client has split, it says that it is not done; its parts are waited for next
                if isinstance(error, kafka_errors.UnknownError) and time.monotonic() < deadline:
                    continue
                raise BrokerUnavailable(f"not acknowledged within {timeout:.0f} s: {error!s:.160}") from error
            return

    def _renew(self) -> None:
        """Take a new client: after one refusal kafka-python's refuses all that follows, with the same error."""
        with self._lock:
            producer, self._producer = self._producer, None
        if producer is not None:
            with contextlib.suppress(kafka_errors.KafkaError):  # what it has not written is still ours
                producer.close(timeout=0)
        self._refused.clear()

    def _send_alone(self, number: int, timeout: float) -> None:
        """Send one record by itself, so that its error is its own, and cut it only where its topic does not take it."""
        for cuts in range(len(CUT_BYTES) + 1):
            if (record := self._open.get(number)) is None:
                return
            self._send(number, _cut(record, cuts))
            self._wait(timeout)
            if (error := self._refused.get(number)) is None:
                return
            self._renew()
            if not isinstance(error, TOO_LARGE) or cuts == len(CUT_BYTES):
                self._refused[number] = error
                return

    def close(self) -> None:
        for client in (self._producer, self._admin):
            if client is not None:
                client.close()


def _cut(record: _Sent, cuts: int) -> _Sent:
    """Return a record that its topic may take: the beginning of its value, and a header that says so."""
    if cuts == 0:
        return record
    topic, partition, value, key, headers = record
    size = CUT_BYTES[cuts - 1]
    if size == 0:
        headers = tuple((name[:CUT_HEADER_BYTES], data[:CUT_HEADER_BYTES]) for name, data in headers)
    return (
        topic,
        partition,
        (value or b"")[:size],
        key,
        (*headers, (ORIGINAL_SIZE_HEADER, str(len(value or b"")).encode())),
    )
