"""What the Kafka sink does with records that are not acknowledged; the producer alone is a stand-in here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from kafka import errors as kafka_errors

from streamlearn.config import KafkaConfig
from streamlearn.data import StreamlearnError
from streamlearn.stream.kafka import CUT_HEADER_BYTES, KafkaWriter
from streamlearn.stream.log import ORIGINAL_SIZE_HEADER, BrokerUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable


class Future:
    """The answer to one record."""

    def __init__(self, error: Exception | None) -> None:
        self.error = error

    def add_callback(self, call: Callable[[object], None]) -> None:
        """Tell of success at once."""
        if self.error is None:
            call(None)

    def add_errback(self, call: Callable[[Exception], None]) -> None:
        """Tell of a failure at once."""
        if self.error is not None:
            call(self.error)


class Producer:
    """Fails as it is told to, then keeps what it is sent."""

    def __init__(self, failures: list[Exception]) -> None:
        self.failures = failures
        self.sent: list[Any] = []

    def send(self, topic: str, **record: Any) -> Future:
        """Take a record, or fail."""
        if self.failures:
            return Future(self.failures.pop(0))
        self.sent.append((topic, record["value"], dict(record["headers"])))
        return Future(None)

    def flush(self, timeout: float) -> None:
        """Have nothing waiting."""

    def close(self, timeout: float) -> None:
        """Have nothing to let go of."""


class Refusing(Producer):
    """Takes nothing, as a client whose broker is gone."""

    def __init__(self) -> None:
        super().__init__([])

    def send(self, topic: str, **record: Any) -> Future:
        """Refuse."""
        raise kafka_errors.KafkaTimeoutError(f"{topic} {record['partition']}")


class FakeWriter(KafkaWriter):
    """One whose new producer is its old one."""

    def _replace_producer(self) -> None:
        self._errors.clear()


def sink(*failures: Exception) -> tuple[KafkaWriter, Producer]:
    """Return a sink whose producer fails so."""
    made, producer = FakeWriter(KafkaConfig.model_validate({"bootstrap_servers": "a:1"})), Producer(list(failures))
    made._admin, made._producer = object(), producer
    return made, producer


class Admin:
    """A broker's refusal to create a topic."""

    def list_topics(self) -> list[str]:
        """Have none."""
        return []

    def create_topics(self, topics: list[Any], *, wait_for_metadata: bool) -> None:
        """Refuse the name."""
        assert wait_for_metadata
        raise kafka_errors.InvalidTopicError(f"CreateTopicsRequest({topics})")


def test_a_name_that_kafka_forbids_is_a_mistake_of_configuration() -> None:
    """One line says so; it is no outage to wait for."""
    made, _ = sink()
    made._admin = Admin()
    with pytest.raises(StreamlearnError, match=r"^a b: Kafka does not accept this name for a topic$") as caught:
        made.create_topic("a b", 1)
    assert caught.value.code == 78


def test_what_was_not_acknowledged_is_sent_again() -> None:
    """A flush that fails keeps the record; only a flush that succeeds has written it."""
    made, producer = sink(*[kafka_errors.KafkaTimeoutError()] * 2)
    made.append("t", 0, b"v")
    with pytest.raises(StreamlearnError, match="not acknowledged"):
        made.flush()
    made.flush()
    assert producer.sent == [("t", b"v", {})]


def test_what_is_too_large_is_cut_and_says_so() -> None:
    """A record that its topic will never take does not stand in the way of every checkpoint."""
    made, producer = sink(*[kafka_errors.MessageSizeTooLargeError()] * 4)
    made.append("t", 0, b"x" * 100_000, headers=(("mine", b"y" * 1000),))
    made.flush()
    assert producer.sent == [("t", b"", {"mine": b"y" * CUT_HEADER_BYTES, ORIGINAL_SIZE_HEADER: b"100000"})]


def test_what_cannot_be_sent_again_is_kept() -> None:
    """A broker that goes away during the second attempt costs no record."""
    made, producer = sink(*[kafka_errors.KafkaTimeoutError()] * 4)
    made.append("t", 0, b"a")
    made.append("t", 0, b"b")
    with pytest.raises(StreamlearnError, match="2 records: t: not acknowledged"):
        made.flush()
    made._producer = Refusing()
    with pytest.raises(BrokerUnavailable, match="t: cannot be written"):
        made.flush()
    made._producer = producer
    made.flush()
    assert sorted(value for _, value, _ in producer.sent) == [b"a", b"b"]
