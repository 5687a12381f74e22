"""Apache Kafka as a log, with manual assignment of partitions and positions from the checkpoint.

`poll` of kafka-python 3.0 returns no records, and raises nothing, if a topic was deleted, or deleted and created again, if
a permission was withdrawn, or if all brokers are gone. Therefore `topics` and `bounds` ask the brokers, and raise. (The
consumer can also stop without an error, as in dpkp/kafka-python#2605; `StreamReader` notices that and connects again.)
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

from streamlearn.core.errors import AccessError, ConfigurationError, InputOutputError, StreamlearnError
from streamlearn.stream.logs.base import (
    FLUSH_SECONDS,
    ORIGINAL_SIZE_HEADER,
    Bounds,
    BrokerUnavailable,
    Headers,
    Record,
    TopicInfo,
    Unreadable,
)
from streamlearn.stream.logs.kafka_batches import OversizeValue, set_unpack_limit
from streamlearn.stream.logs.kafka_connection import (
    PERMISSION_ERRORS,
    REQUEST_MS,
    client_settings,
    create_client,
    error_text,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from streamlearn.core.positions import Partition
    from streamlearn.stream.logs.config import KafkaConfig

MAX_POLL_RECORDS = 2000
TOO_LARGE = (kafka_errors.MessageSizeTooLargeError, kafka_errors.RecordListTooLargeError)
CUT_BYTES = (64 << 10, 1 << 10, 0)  # sizes to which the value of a too large record is cut, tried in this order
CUT_HEADER_BYTES = 256  # with the last size, the names and values of headers are cut too

_Appended = tuple[str, int, bytes | None, bytes | None, Headers]  # topic, partition, value, key, headers


def is_allowed(topic: Mapping[str, Any], operation: str) -> bool:
    """Return whether a broker's description of a topic allows us an operation; true if an old broker does not say."""
    operations = topic.get("authorized_operations")
    return operations is None or operation in operations


def permission_error(error: kafka_errors.KafkaError) -> AccessError:
    """Return the error for a user that says which permission is missing."""
    names = error.args[0] if error.args else ""
    what = ", ".join(sorted(names)) if isinstance(names, set) else str(names)
    if isinstance(error, kafka_errors.GroupAuthorizationFailedError):
        return AccessError(f"group {what}: no permission to commit offsets for it (READ)")
    if isinstance(error, kafka_errors.TopicAuthorizationFailedError):
        return AccessError(f"topic {what}: no permission (READ and DESCRIBE are needed)")
    return AccessError(f"refused: {error_text(error)}")


# errors that end by themselves or after the client connects again; any other error is shown to the user
TEMPORARY_ERRORS = (
    kafka_errors.RetriableError,
    kafka_errors.BrokerNotAvailableError,
    kafka_errors.KafkaProtocolError,
    kafka_errors.UnknownBrokerIdError,
    kafka_errors.IllegalStateError,
    kafka_errors.NoOffsetForPartitionError,
)
LOG_CHANGED_ERRORS = (kafka_errors.OffsetOutOfRangeError, kafka_errors.LogTruncationError)


def translate_error(error: kafka_errors.KafkaError) -> StreamlearnError:
    """Return our error for one of the client's: a missing permission, an outage, or an answer that cannot be read."""
    if isinstance(error, PERMISSION_ERRORS):
        return permission_error(error)
    if isinstance(error, LOG_CHANGED_ERRORS):
        # connecting again makes the reader compare topic ids and bounds before it reads another record
        return BrokerUnavailable(f"the log has changed: {type(error).__name__}")
    text = f"{type(error).__name__}: {error_text(error):.160}"
    return (
        BrokerUnavailable(text)
        if isinstance(error, TEMPORARY_ERRORS)
        else Unreadable(f"the broker answers with {text}")
    )


class KafkaReader:
    """Reads from Kafka. The consumer of kafka-python is not thread safe, so the reader thread alone uses this class."""

    def __init__(self, kafka: KafkaConfig, group: str, max_record_bytes: int = 0) -> None:
        self.kafka = kafka
        self.group = group
        self.cluster_id: str | None = None
        self._consumer: Any = None
        self._admin: Any = None
        self._assigned_topics: set[str] = set()
        self._no_read_permission: set[str] = set()  # topics
        self._paused: set[Partition] = set()
        set_unpack_limit(max_record_bytes)

    def connect(self) -> None:
        settings = client_settings(self.kafka)
        self.close()
        self._admin = create_client(KafkaAdminClient, settings)
        self._consumer = create_client(
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
        """Return all topics that we may see, and the assigned topics, even if we may not see them any more."""
        listed = self._ask(self._admin.list_topics)
        return self._describe(sorted({*listed, *self._assigned_topics}))

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
                    (self._no_read_permission.discard if is_allowed(entry, "READ") else self._no_read_permission.add)(
                        name
                    )
                partitions = sorted(p["partition_index"] for p in entry["partitions"])
                refused = "no permission to read it (READ)" if name in self._no_read_permission else None
                found[name] = TopicInfo(name, str(entry["topic_id"]), tuple(partitions), refused)
        return found

    def _metadata(self, names: Iterable[str]) -> list[dict[str, Any]]:
        asked = list(names)
        entries: list[dict[str, Any]] = self._ask(self._admin.describe_topics, asked) if asked else []
        return entries

    def bounds(self, partitions: Sequence[Partition]) -> dict[Partition, Bounds]:
        """Return the bounds of each partition; raises `AccessError` if we may not see one of them.

        The end is the high watermark, because acknowledged records can follow a transaction that is still open.
        """
        leaders = self._leaders(partitions)
        begins = self._offsets(leaders, OffsetSpec.EARLIEST)
        ends = self._offsets({partition: leaders[partition] for partition in begins}, OffsetSpec.LATEST)
        last_stable: dict[Partition, int] = {}
        if self.kafka.isolation_level == "read_committed":
            # asked last: an older answer could be below the end although no transaction is open
            asked = {partition: leaders[partition] for partition in ends}
            stable = self._offsets(asked, OffsetSpec.LATEST, IsolationLevel.READ_COMMITTED)
            last_stable = {partition: offset for partition, offset in stable.items() if offset < ends[partition]}
        return {
            partition: Bounds(begins[partition], end, last_stable.get(partition)) for partition, end in ends.items()
        }

    def _leaders(self, partitions: Sequence[Partition]) -> dict[Partition, int]:
        """Return the leader of each partition that has one now."""
        wanted = set(partitions)
        return {
            topic_partition: partition["leader_id"]
            for entry in self._metadata({topic for topic, _ in partitions})
            for partition in entry["partitions"]
            if (topic_partition := (entry["name"], partition["partition_index"])) in wanted
            and partition["leader_id"] >= 0
        }

    def _offsets(
        self,
        leaders: Mapping[Partition, int],
        spec: OffsetSpec,
        isolation: IsolationLevel = IsolationLevel.READ_UNCOMMITTED,
    ) -> dict[Partition, int]:
        """Ask the leaders for offsets, and return them; partitions are missing if their leader does not answer."""
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
        """Ask one leader for offsets.

        The methods of kafka-python always ask with the isolation level of the consumer, or fail for all partitions if one
        fails.
        """
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
        response = await self._admin._manager.send(request, node_id=leader)  # noqa: SLF001 - no public method does this
        found: dict[Partition, int] = {}
        for topic in response.topics:
            for partition in topic.partitions:
                if partition.error_code == kafka_errors.TopicAuthorizationFailedError.errno:
                    raise kafka_errors.TopicAuthorizationFailedError({topic.name})
                if not partition.error_code:
                    found[topic.name, partition.partition_index] = partition.offset
        return found

    def assign(self, offsets: Mapping[Partition, int]) -> None:
        self._assigned_topics = {topic for topic, _ in offsets}
        self._consumer.assign([TopicPartition(*partition) for partition in offsets])
        for partition, offset in offsets.items():
            self._consumer.seek(TopicPartition(*partition), offset)
        self.pause_partitions(self._paused)

    def poll(self, timeout: float) -> list[Record]:
        try:
            polled = self._consumer.poll(timeout_ms=int(timeout * 1000))
        except kafka_errors.TopicAuthorizationFailedError as error:
            self._no_read_permission |= set(error.args[0])  # `topics` and `describe` use it
            raise permission_error(error) from error
        except kafka_errors.KafkaError as error:
            raise translate_error(error) from error
        return [_record(r) for records in polled.values() for r in records]

    def position(self, partition: Partition) -> int:
        return int(self._ask(self._consumer.position, TopicPartition(*partition), 0))

    def pause_partitions(self, partitions: Collection[Partition]) -> None:
        self._paused = set(partitions)
        assigned = self._consumer.assignment()
        to_pause = {TopicPartition(*partition) for partition in partitions} & assigned
        paused = self._consumer.paused()
        self._consumer.resume(*(paused - to_pause))
        self._consumer.pause(*(to_pause - paused))

    def first_timestamp(self, topic: TopicInfo) -> float | None:
        asked = {TopicPartition(topic.name, partition): 0 for partition in topic.partitions}
        found = self._ask(self._consumer.offsets_for_times, asked)
        return min((entry.timestamp / 1000 for entry in found.values() if entry is not None), default=None)

    def commit(self, group: str, offsets: Mapping[Partition, int]) -> None:
        del group  # the consumer has it from its settings
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
            raise translate_error(error) from error


def _record(record: Any) -> Record:
    """Convert a record of the client."""
    oversize = record.value if isinstance(record.value, OversizeValue) else None
    return Record(
        record.topic,
        record.partition,
        record.offset,
        record.timestamp / 1000,
        record.key,
        record.value if oversize is None else None,
        tuple(record.headers),
        oversize=oversize.why if oversize is not None else None,
        begin=oversize.begin if oversize is not None else None,
    )


class KafkaWriter:
    """Writes to Kafka, idempotently, with acknowledgements from all replicas.

    `flush` of kafka-python reports no record that failed (dpkp/kafka-python#2426: only the record's own future has the
    error). Therefore this class keeps each record until it is acknowledged, sends the others again, and raises if that does
    not help.
    """

    def __init__(self, kafka: KafkaConfig) -> None:
        self.kafka = kafka
        self._admin: Any = None
        self._producer: Any = None
        self._lock = threading.Lock()
        self._flush_lock = threading.Lock()
        self._numbers = itertools.count()
        self._unacknowledged: dict[int, _Appended] = {}  # by number, in the order of `append`
        self._errors: dict[int, Exception] = {}  # of unacknowledged records, by number

    def _clients(self) -> tuple[Any, Any]:
        with self._lock:
            if self._admin is None:
                self._admin = create_client(KafkaAdminClient, client_settings(self.kafka))
            if self._producer is None:
                settings = client_settings(self.kafka) | {
                    "acks": "all",
                    "linger_ms": 20,
                    "batch_size": 512 << 10,
                    "max_request_size": 32 << 20,
                    "delivery_timeout_ms": int(FLUSH_SECONDS * 1000),
                    "max_block_ms": REQUEST_MS,  # if a topic does not exist any more
                    "compression_type": "lz4",
                }
                self._producer = create_client(KafkaProducer, settings)
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
            raise ConfigurationError(f"{name}: Kafka does not accept this name for a topic") from error
        except PERMISSION_ERRORS as error:
            why = "does not exist, or we may not see it (DESCRIBE), and we may not create it (CREATE)"
            raise AccessError(f"topic {name}: {why}") from error
        except kafka_errors.KafkaError as error:
            raise BrokerUnavailable(f"{name}: cannot be created: {error!s:.160}") from error
        return True

    def partitions(self, topic: str) -> int:
        admin, producer = self._clients()
        try:
            if topic not in admin.list_topics():  # the producer would wait a minute for it
                raise StreamlearnError(f"no topic {topic}")
            if not is_allowed(admin.describe_topics([topic])[0], "WRITE"):
                raise AccessError(f"topic {topic}: no permission to write to it (WRITE)")
            return len(producer.partitions_for(topic))
        except PERMISSION_ERRORS as error:
            raise permission_error(error) from error
        except kafka_errors.KafkaError as error:
            raise BrokerUnavailable(f"{topic}: {error!s:.160}") from error

    def append(
        self, topic: str, partition: int, value: bytes | None, *, key: bytes | None = None, headers: Headers = ()
    ) -> None:
        number, record = next(self._numbers), (topic, partition, value, key, headers)
        self._unacknowledged[number] = record
        try:
            self._send(number, record)
        except BrokerUnavailable:
            del self._unacknowledged[number]
            raise

    def _send(self, number: int, record: _Appended) -> None:
        _, producer = self._clients()
        topic, partition, value, key, headers = record
        try:
            sent = producer.send(topic, value=value, key=key, headers=list(headers), partition=partition)
        except TOO_LARGE as error:
            self._errors[number] = error
            return
        except kafka_errors.KafkaError as error:
            if self._producer is not producer:  # the flush of another thread has replaced it
                self._send(number, record)
                return
            raise BrokerUnavailable(f"{topic}: cannot be written: {error!s:.160}") from error
        sent.add_callback(lambda _: self._unacknowledged.pop(number, None))
        sent.add_errback(lambda error: self._errors.setdefault(number, error))

    def flush(self, timeout: float = FLUSH_SECONDS) -> None:
        with self._flush_lock:  # or a second thread would return while the first one is about to send records again
            # `copy` is one step of the interpreter; meanwhile the client's thread removes acknowledged records
            numbers = list(self._unacknowledged.copy())
            self._wait(timeout)
            if left := self._still_unacknowledged(numbers):
                self._send_again(left, timeout)
            if left := self._still_unacknowledged(numbers):
                topic, error = self._unacknowledged[left[0]][0], self._errors.get(left[0])
                if isinstance(error, PERMISSION_ERRORS):
                    why = f"no permission to write to it (WRITE), {len(left)} records are waiting"
                    raise AccessError(f"topic {topic}: {why}")
                text = f"{topic}: not acknowledged: {type(error).__name__}: {error!s:.160}"
                raise InputOutputError(f"{len(left)} records: {text}")
            self._errors.clear()

    def _still_unacknowledged(self, numbers: Iterable[int]) -> list[int]:
        return [number for number in numbers if number in self._unacknowledged]

    def _send_again(self, numbers: list[int], timeout: float) -> None:
        too_large = any(isinstance(self._errors.get(number), TOO_LARGE) for number in numbers)
        self._replace_producer()
        if too_large:
            for number in numbers:
                self._send_alone(number, timeout)
            return
        for number in numbers:
            self._send(number, self._unacknowledged[number])
        self._wait(timeout)

    def _wait(self, timeout: float) -> None:
        if self._producer is None:
            return
        deadline = time.monotonic() + timeout
        while True:
            try:
                self._producer.flush(timeout=timeout)
            except kafka_errors.KafkaError as error:
                # after the client has split a batch, its flush fails for that batch; the next flush waits for the parts
                if isinstance(error, kafka_errors.UnknownError) and time.monotonic() < deadline:
                    continue
                raise BrokerUnavailable(f"not acknowledged within {timeout:.0f} s: {error!s:.160}") from error
            return

    def _replace_producer(self) -> None:
        """Replace the producer, because after one fatal error a producer of kafka-python fails every later record with it."""
        with self._lock:
            producer, self._producer = self._producer, None
        if producer is not None:
            with contextlib.suppress(kafka_errors.KafkaError):  # we still have the records that it did not write
                producer.close(timeout=0)
        self._errors.clear()

    def _send_alone(self, number: int, timeout: float) -> None:
        """Send one record, so that an error concerns this record alone; cut it if it is too large for its topic."""
        for cuts in range(len(CUT_BYTES) + 1):
            if (record := self._unacknowledged.get(number)) is None:
                return
            self._send(number, _cut(record, cuts))
            self._wait(timeout)
            if (error := self._errors.get(number)) is None:
                return
            self._replace_producer()
            if not isinstance(error, TOO_LARGE) or cuts == len(CUT_BYTES):
                self._errors[number] = error
                return

    def close(self) -> None:
        for client in (self._producer, self._admin):
            if client is not None:
                client.close()


def _cut(record: _Appended, cuts: int) -> _Appended:
    """Cut the value of a record to `CUT_BYTES[cuts - 1]`, and add a header with its original size; 0 `cuts`: do nothing."""
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
