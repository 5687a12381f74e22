"""Write to Apache Kafka, idempotently, and keep each record until it is acknowledged."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from typing import TYPE_CHECKING, Any

from kafka import KafkaAdminClient, KafkaProducer
from kafka import errors as kafka_errors
from kafka.admin import NewTopic

from streamlearn.core.errors import AccessError, ConfigurationError, InputOutputError, StreamlearnError
from streamlearn.stream.logs.base import FLUSH_SECONDS, ORIGINAL_SIZE_HEADER, BrokerUnavailable, Headers
from streamlearn.stream.logs.kafka_connection import REQUEST_MS, client_settings, create_client
from streamlearn.stream.logs.kafka_failures import PERMISSION_ERRORS, is_allowed, permission_error

if TYPE_CHECKING:
    from collections.abc import Iterable

    from streamlearn.stream.logs.config import KafkaConfig

TOO_LARGE = (kafka_errors.MessageSizeTooLargeError, kafka_errors.RecordListTooLargeError)
CUT_BYTES = (64 << 10, 1 << 10, 0)  # sizes to which the value of a too large record is cut, tried in this order
CUT_HEADER_BYTES = 256  # with the last size, the names and values of headers are cut too
_Appended = tuple[str, int, bytes | None, bytes | None, Headers]  # topic, partition, value, key, headers


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
