"""The dead-letter topic: what cannot be used goes there, with its reason, before any position moves past it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from streamlearn.data import Rejected
    from streamlearn.stream.log import Record, Sink

PREFIX = "streamlearn.errors."


class DeadLetters:
    """Writes rejected samples to one topic.

    The value and headers are the record's own; a batch record's value stands in the letter of its first rejected sample,
    which the others name in `streamlearn.errors.value-in`. The key is `topic-partition-offset-index`, so that a repeat after a
    crash is recognised; the record's own key stands in a header.
    """

    def __init__(self, sink: Sink, topic: str) -> None:
        self.sink = sink
        self.topic = topic
        self.sent = 0
        self._num_partitions = 1
        self._last: tuple[tuple[str, int, int], bytes] | None = None  # the last record, and the key of its first letter

    def prepare(self) -> None:
        """Make sure that the topic is there; raises `StreamlearnError` if it is not and may not be created."""
        self.sink.create_topic(self.topic, 1)
        self._num_partitions = self.sink.partitions(self.topic)

    def send(self, record: Record, index: int, rejected: Rejected) -> None:
        """Write one rejected sample; it is safe after the next `flush`."""
        facts = {
            "topic": record.topic,
            "partition": str(record.partition),
            "offset": str(record.offset),
            "index": str(index),
            "timestamp": f"{record.timestamp:.3f}",
            "reason": rejected.reason,
            "message": str(rejected),
        }
        added = tuple((PREFIX + name, value.encode()) for name, value in facts.items())
        if record.key is not None:
            added += ((PREFIX + "key", record.key),)
        key = f"{record.topic}-{record.partition}-{record.offset}-{index}".encode()
        partition = record.partition % self._num_partitions
        value = record.value
        place = (record.topic, record.partition, record.offset)
        if (
            self._last is not None and self._last[0] == place
        ):  # a batch record's bytes are written once, not for each sample
            value = None
            added += ((PREFIX + "value-in", self._last[1]),)
        else:
            self._last = (place, key)
        kept = tuple((name, data or b"") for name, data in record.headers)  # Kafka allows null, its client does not
        self.sink.append(self.topic, partition, value, key=key, headers=(*kept, *added))
        self.sent += 1

    def flush(self) -> None:
        """Return when every dead letter is acknowledged."""
        self.sink.flush()
