"""Apache Kafka as a log: manual assignment, positions from the checkpoint, and active checks where `poll` keeps silent.

kafka-python reports neither a missing topic, nor a withdrawn permission, nor brokers that are gone, nor a topic that was
created anew: `topics` and `bounds` ask, and raise.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from typing import TYPE_CHECKING, Any

from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer
from kafka import errors as kafka_errors
from kafka.admin import NewTopic
from kafka.structs import OffsetAndMetadata, TopicPartition

from streamlearn.data import StreamlearnError
from streamlearn.stream.log import Bounds, BrokerUnavailable, Headers, Record, TopicInfo

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from streamlearn.config import Kafka
    from streamlearn.data import Partition

BOOTSTRAP_MS = 5000
REQUEST_MS = 10_000
MAX_POLL_RECORDS = 2000
SEND_SECONDS = 60
CUT_BYTES = 64 << 10
CUT_HEADER = "streamlearn.cut-from-bytes"  # a record that was too large for its topic, and its size

_Sent = tuple[str, int, bytes | None, bytes | None, Headers]

PERMISSION = (
    kafka_errors.TopicAuthorizationFailedError,
    kafka_errors.GroupAuthorizationFailedError,
    kafka_errors.ClusterAuthorizationFailedError,
    kafka_errors.SaslAuthenticationFailedError,
    kafka_errors.UnsupportedSaslMechanismError,
)
# what only the client's own log says, and what it means for a user
REFUSALS = ("SaslAuthenticationFailed", "CERTIFICATE_VERIFY_FAILED", "UnsupportedSaslMechanism", "IllegalSaslState")


class _Cause(logging.Handler):
    """Remembers the last thing the client's network loggers said: the constructor's exception never has the cause."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.last = ""
        self.refused = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.last = record.getMessage()
        if any(word in self.last for word in REFUSALS):
            self.refused = self.last


def client_settings(kafka: Kafka) -> dict[str, Any]:
    """Return the connection settings that consumer, producer and admin client share."""
    settings: dict[str, Any] = {
        "bootstrap_servers": kafka.bootstrap_servers,
        "client_id": kafka.client_id,
        "security_protocol": kafka.security_protocol,
        "ssl_check_hostname": kafka.ssl_check_hostname,
        "request_timeout_ms": REQUEST_MS,
        "bootstrap_timeout_ms": BOOTSTRAP_MS,
        "reconnect_backoff_ms": 50,
        "reconnect_backoff_max_ms": 1000,
    }
    for name in ("ssl_cafile", "ssl_certfile", "ssl_keyfile"):
        if (path := getattr(kafka, name)) is not None:
            if not path.is_file():
                raise StreamlearnError(f"kafka.{name}: {path} is not a readable file", code=77)
            settings[name] = str(path)
    if kafka.ssl_password is not None:
        settings["ssl_password"] = kafka.ssl_password.get_secret_value()
    if kafka.sasl is not None:
        settings |= {
            "sasl_mechanism": kafka.sasl.mechanism,
            "sasl_plain_username": kafka.sasl.username,
            "sasl_plain_password": kafka.sasl.secret(),
        }
    return settings


def _connected(kind: type, settings: Mapping[str, Any]) -> Any:
    """Return a client, or raise `StreamlearnError` (77) where the broker refused and `BrokerUnavailable` where none is."""
    cause = _Cause()
    logger = logging.getLogger("kafka")
    logger.addHandler(cause)
    servers = ", ".join(settings["bootstrap_servers"])
    try:
        return kind(**settings)
    except PERMISSION as error:
        raise StreamlearnError(f"{servers}: {error}", code=77) from error
    except (kafka_errors.KafkaError, OSError) as error:
        if cause.refused:
            raise StreamlearnError(f"{servers}: refused: {cause.refused:.200}", code=77) from error
        raise BrokerUnavailable(f"{servers}: no broker answers ({cause.last or error!s:.160})") from error
    finally:
        logger.removeHandler(cause)


class KafkaLog:
    """One reader. kafka-python's consumer is not thread safe: the reader thread alone calls this."""

    def __init__(self, kafka: Kafka, group: str) -> None:
        self.kafka = kafka
        self.group = group
        self.cluster_id: str | None = None
        self._consumer: Any = None
        self._admin: Any = None
        self._held: set[Partition] = set()

    def connect(self) -> None:
        settings = client_settings(self.kafka)
        self.close()
        self._admin = _connected(KafkaAdminClient, settings)
        self._consumer = _connected(
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
        return self._describe(sorted(self._ask(self._admin.list_topics)))

    def topic_id(self, topic: str) -> str | None:
        info = self._describe([topic]).get(topic)
        return info.topic_id if info is not None else None

    def _describe(self, names: Sequence[str]) -> dict[str, TopicInfo]:
        found = {}
        for entry in self._ask(self._admin.describe_topics, list(names)) if names else []:
            name = entry.get("name") or entry.get("topic")
            if entry.get("error_code") in {29, 30}:
                raise StreamlearnError(f"{name}: no permission to describe the topic", code=77)
            if not entry.get("error_code"):
                partitions = sorted(p.get("partition_index", p.get("partition")) for p in entry["partitions"])
                found[name] = TopicInfo(name, str(entry["topic_id"]), tuple(partitions))
        return found

    def bounds(self, partitions: Sequence[Partition]) -> dict[Partition, Bounds]:
        if not partitions:
            return {}
        try:
            return self._bounds(partitions)
        except KeyError:  # the client has yet to learn of a topic that was made a moment ago
            found: dict[Partition, Bounds] = {}
            for partition in partitions:
                with contextlib.suppress(KeyError):
                    found |= self._bounds([partition])
            return found

    def _bounds(self, partitions: Sequence[Partition]) -> dict[Partition, Bounds]:
        asked = {TopicPartition(*partition): partition for partition in partitions}
        begins = self._ask(self._consumer.beginning_offsets, list(asked))
        ends = self._ask(self._consumer.end_offsets, list(asked))
        return {partition: Bounds(begins[tp], ends[tp]) for tp, partition in asked.items()}

    def assign(self, offsets: Mapping[Partition, int]) -> None:
        self._consumer.assign([TopicPartition(*partition) for partition in offsets])
        for partition, offset in offsets.items():
            self._consumer.seek(TopicPartition(*partition), offset)
        self.hold(self._held)

    def poll(self, timeout: float) -> list[Record]:
        try:
            polled = self._consumer.poll(timeout_ms=int(timeout * 1000))
        except (kafka_errors.OffsetOutOfRangeError, kafka_errors.LogTruncationError) as error:
            # not one record more before the reader has compared ids and bounds, which it does when it connects
            raise BrokerUnavailable(f"the log is not what it was: {type(error).__name__}") from error
        except PERMISSION as error:
            raise StreamlearnError(str(error), code=77) from error
        except kafka_errors.KafkaError as error:
            raise BrokerUnavailable(str(error)) from error
        return [
            Record(r.topic, r.partition, r.offset, r.timestamp / 1000, r.key, r.value, tuple(r.headers))
            for records in polled.values()
            for r in records
        ]

    def position(self, partition: Partition) -> int:
        return int(self._ask(self._consumer.position, TopicPartition(*partition)))

    def hold(self, partitions: Collection[Partition]) -> None:
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
        except PERMISSION as error:
            raise StreamlearnError(f"no permission: {error}", code=77) from error
        except kafka_errors.KafkaError as error:
            raise BrokerUnavailable(f"{type(error).__name__}: {error!s:.160}") from error


class KafkaSink:
    """A writer: acks from all replicas, idempotent; `flush` tells of every record that was not acknowledged."""

    def __init__(self, kafka: Kafka) -> None:
        self.kafka = kafka
        self._admin: Any = None
        self._producer: Any = None
        self._lock = threading.Lock()
        self._failed: list[tuple[_Sent, str]] = []  # not acknowledged: sent again by the next flush

    def _clients(self) -> tuple[Any, Any]:
        with self._lock:
            if self._admin is None:
                self._admin = _connected(KafkaAdminClient, client_settings(self.kafka))
            if self._producer is None:
                settings = client_settings(self.kafka) | {
                    "acks": "all",
                    "linger_ms": 20,
                    "batch_size": 512 << 10,
                    "max_request_size": 32 << 20,
                    "delivery_timeout_ms": SEND_SECONDS * 1000,
                    "compression_type": "lz4",
                }
                self._producer = _connected(KafkaProducer, settings)
            return self._admin, self._producer

    def create_topic(self, name: str, partitions: int) -> bool:
        admin, _ = self._clients()
        try:
            if name in admin.list_topics():
                return False
            admin.create_topics([NewTopic(name, partitions, self.kafka.replication_factor)])
        except kafka_errors.TopicAlreadyExistsError:
            return False
        except kafka_errors.InvalidTopicError as error:
            raise StreamlearnError(f"{name}: not a name that Kafka accepts for a topic", code=78) from error
        except PERMISSION as error:
            raise StreamlearnError(f"{name}: may not be created: {error}", code=77) from error
        except kafka_errors.KafkaError as error:
            raise BrokerUnavailable(f"{name}: cannot be created: {error!s:.160}") from error
        return True

    def partitions(self, topic: str) -> int:
        admin, producer = self._clients()
        try:
            if topic not in admin.list_topics():  # asking the producer would wait for it a minute
                raise StreamlearnError(f"no topic {topic}")
            return len(producer.partitions_for(topic))
        except PERMISSION as error:
            raise StreamlearnError(f"{topic}: no permission: {error}", code=77) from error
        except kafka_errors.KafkaError as error:
            raise BrokerUnavailable(f"{topic}: {error!s:.160}") from error

    def append(
        self, topic: str, partition: int, value: bytes | None, *, key: bytes | None = None, headers: Headers = ()
    ) -> None:
        self._send((topic, partition, value, key, headers))

    def _send(self, record: _Sent) -> None:
        _, producer = self._clients()
        topic, partition, value, key, headers = record
        try:
            sent = producer.send(topic, value=value, key=key, headers=list(headers), partition=partition)
        except kafka_errors.MessageSizeTooLargeError:
            self._send(_cut(record))
            return
        except kafka_errors.KafkaError as error:
            raise BrokerUnavailable(f"{topic}: cannot be written: {error!s:.160}") from error
        sent.add_errback(lambda error: self._failed.append(self._again(record, error)))

    @staticmethod
    def _again(record: _Sent, error: Exception) -> tuple[_Sent, str]:
        too_large = isinstance(error, kafka_errors.MessageSizeTooLargeError | kafka_errors.RecordListTooLargeError)
        return (_cut(record) if too_large else record), f"{record[0]}: not acknowledged: {error!s:.160}"

    def flush(self) -> None:
        again, self._failed = self._failed, []
        for record, _ in again:
            self._send(record)
        if self._producer is None:
            return
        try:
            self._producer.flush(timeout=SEND_SECONDS)
        except kafka_errors.KafkaError as error:
            raise BrokerUnavailable(f"not acknowledged within {SEND_SECONDS} s: {error!s:.160}") from error
        if self._failed:
            raise StreamlearnError(f"{len(self._failed)} records: {self._failed[0][1]}", code=74)

    def close(self) -> None:
        for client in (self._producer, self._admin):
            if client is not None:
                client.close()


def _cut(record: _Sent) -> _Sent:
    """Return a record that its topic takes: the beginning of its value, and a header that says so."""
    topic, partition, value, key, headers = record
    size = len(value or b"")
    return (
        topic,
        partition,
        (value or b"")[: min(CUT_BYTES, size // 2)],
        key,
        (*headers, (CUT_HEADER, str(size).encode())),
    )
