"""How the Kafka writer treats records that are not acknowledged. Only the producer is a fake."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from kafka import errors as kafka_errors

from streamlearn.core.errors import StreamlearnError
from streamlearn.stream.logs.base import ORIGINAL_SIZE_HEADER, BrokerUnavailable
from streamlearn.stream.logs.config import KafkaConfig
from streamlearn.stream.logs.kafka_writer import CUT_HEADER_BYTES, KafkaWriter

if TYPE_CHECKING:
    from collections.abc import Callable


class Future:
    """The fake result of one `send`."""

    def __init__(self, error: Exception | None) -> None:
        self.error = error

    def add_callback(self, call: Callable[[object], None]) -> None:
        """Call at once if the record succeeded."""
        if self.error is None:
            call(None)

    def add_errback(self, call: Callable[[Exception], None]) -> None:
        """Call at once if the record failed."""
        if self.error is not None:
            call(self.error)


class Producer:
    """Fails with the given errors, then keeps what is sent."""

    def __init__(self, failures: list[Exception]) -> None:
        self.failures = failures
        self.sent: list[Any] = []

    def send(self, topic: str, **record: Any) -> Future:
        """Keep a record, or fail."""
        if self.failures:
            return Future(self.failures.pop(0))
        self.sent.append((topic, record["value"], dict(record["headers"])))
        return Future(None)

    def flush(self, timeout: float) -> None:
        """Do nothing."""

    def close(self, timeout: float) -> None:
        """Do nothing."""


class UnavailableProducer(Producer):
    """Fails always, like a client without a broker."""

    def __init__(self) -> None:
        super().__init__([])

    def send(self, topic: str, **record: Any) -> Future:
        """Fail."""
        raise kafka_errors.KafkaTimeoutError(f"{topic} {record['partition']}")


class FakeWriter(KafkaWriter):
    """A writer that keeps its producer when it should replace it."""

    def _replace_producer(self) -> None:
        self._errors.clear()


def sink(*failures: Exception) -> tuple[KafkaWriter, Producer]:
    """Return a writer whose producer fails with these errors."""
    made, producer = FakeWriter(KafkaConfig.model_validate({"bootstrap_servers": "a:1"})), Producer(list(failures))
    made._admin, made._producer = object(), producer
    return made, producer


class Admin:
    """Fails to create a topic."""

    def list_topics(self) -> list[str]:
        """Return no topic."""
        return []

    def create_topics(self, topics: list[Any], *, wait_for_metadata: bool) -> None:
        """Reject the name."""
        assert wait_for_metadata
        raise kafka_errors.InvalidTopicError(f"CreateTopicsRequest({topics})")


def test_an_invalid_topic_name_is_a_configuration_error() -> None:
    """The message is one line, and the code is 78: waiting cannot help."""
    made, _ = sink()
    made._admin = Admin()
    with pytest.raises(StreamlearnError, match=r"^a b: Kafka does not accept this name for a topic$") as caught:
        made.create_topic("a b", 1)
    assert caught.value.exit_code == 78


def test_unacknowledged_records_are_sent_again() -> None:
    """A failed flush keeps the record, and a later flush writes it."""
    made, producer = sink(*[kafka_errors.KafkaTimeoutError()] * 2)
    made.append("t", 0, b"v")
    with pytest.raises(StreamlearnError, match="not acknowledged"):
        made.flush()
    made.flush()
    assert producer.sent == [("t", b"v", {})]


def test_a_too_large_record_is_cut_and_has_its_size_in_a_header() -> None:
    """Otherwise a record that is too large for its topic would prevent every checkpoint."""
    made, producer = sink(*[kafka_errors.MessageSizeTooLargeError()] * 4)
    made.append("t", 0, b"x" * 100_000, headers=(("mine", b"y" * 1000),))
    made.flush()
    assert producer.sent == [("t", b"", {"mine": b"y" * CUT_HEADER_BYTES, ORIGINAL_SIZE_HEADER: b"100000"})]


def test_records_that_cannot_be_sent_again_are_kept() -> None:
    """An outage during the second attempt loses no record."""
    made, producer = sink(*[kafka_errors.KafkaTimeoutError()] * 4)
    made.append("t", 0, b"a")
    made.append("t", 0, b"b")
    with pytest.raises(StreamlearnError, match="2 records: t: not acknowledged"):
        made.flush()
    made._producer = UnavailableProducer()
    with pytest.raises(BrokerUnavailable, match="t: cannot be written"):
        made.flush()
    made._producer = producer
    made.flush()
    assert sorted(value for _, value, _ in producer.sent) == [b"a", b"b"]
