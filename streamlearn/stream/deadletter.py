"""The dead-letter topic: what cannot be used goes there, with its reason, before any position moves past it."""

from __future__ import annotations

import logging
import zlib
from typing import TYPE_CHECKING

import numpy as np

from streamlearn.data import StreamlearnError
from streamlearn.stream.log import BrokerUnavailable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from streamlearn.data import Rejected
    from streamlearn.stream.log import Record, Sink

log = logging.getLogger(__name__)

HEADER_PREFIX = "streamlearn.errors."
MAX_SINGLE_LETTERS = 1000  # letters of one sample each; what further samples of the record are rejected share a letter
SHARED_SPAN = 1 << 20  # sample numbers of one shared letter: its header must fit into a broker's message
SPAN_BYTES = SHARED_SPAN // 8
MAX_SAMPLES = 1 << 30  # of one record: it has a byte for each at least
NO_PERMISSION = 77  # the exit code of a missing permission
ACK_SECONDS = 5.0  # how long a letter may stay unacknowledged before reading stands still


class DeadLetterWriter:
    """Writes rejected samples to one topic; one thread sends, any may flush.

    The value and headers are the record's own (but for names that begin with `streamlearn.errors.`, which are ours); a batch
    record's value stands in the letter of its first rejected sample, which the others name in `streamlearn.errors.value-in`.
    The key is `topic-partition-offset-index`, so that a repeat after a crash is recognised; a header has the topic's id,
    because a topic that is deleted and created again has other samples at the same offsets. The record's own key stands in a
    header.
    """

    def __init__(self, sink: Sink, topic: str) -> None:
        self.sink = sink
        self.topic = topic
        self.sent = 0
        self.failures = 0  # attempts to have letters acknowledged that failed
        self._unacknowledged = False
        self._failure: str | None = None
        self._num_partitions = 1
        self._last: tuple[object, bytes] | None = None  # the last record's place, and the key of its first letter

    def prepare(self) -> None:
        """Make sure that the topic is there; raises `StreamlearnError` if it is not and may not be created."""
        made = self.sink.create_topic(self.topic, 1)
        self._num_partitions = (
            1 if made else self.sink.partitions(self.topic)
        )  # brokers list a new topic a little later

    def write_rejected(
        self, record: Record, rejected: Mapping[int, Rejected], samples: int, topic_id: str | None
    ) -> None:
        """Write the rejected samples of a record of `samples`, by index.

        Past `MAX_SINGLE_LETTERS` the samples of one reason share a letter: a record of a megabyte may have 300,000 samples.
        """
        indices = list(rejected)
        for index in indices[:MAX_SINGLE_LETTERS]:
            self.write(record, index, samples, rejected[index], topic_id)
        shared: dict[tuple[str, int], list[int]] = {}
        for index in indices[MAX_SINGLE_LETTERS:]:
            shared.setdefault((rejected[index].reason, index // SHARED_SPAN), []).append(index)
        for first, *further in shared.values():
            self.write(record, first, samples, rejected[first], topic_id, further)

    def write(
        self,
        record: Record,
        index: int,
        samples: int,
        rejected: Rejected,
        topic_id: str | None,
        further: Sequence[int] = (),
    ) -> None:
        """Write one rejected sample of a record's `samples`, with further ones where given; safe after the next `flush`."""
        more = f" (and {len(further)} further samples of this record)" if further else ""
        facts = {
            "topic": record.topic,
            "partition": str(record.partition),
            "offset": str(record.offset),
            "index": str(index),
            "samples": str(samples),
            "timestamp": f"{record.timestamp:.3f}",
            "reason": rejected.reason,
            "message": f"{rejected}{more}",
            **({"topic-id": topic_id} if topic_id is not None else {}),
        }
        added = tuple((HEADER_PREFIX + name, value.encode(errors="backslashreplace")) for name, value in facts.items())
        if further:
            added += ((HEADER_PREFIX + "further", pack_indices(further, samples)),)
        if record.key is not None:
            added += ((HEADER_PREFIX + "key", record.key),)
        key = f"{record.topic}-{record.partition}-{record.offset}-{index}".encode()
        partition = record.partition % self._num_partitions
        value = record.value
        place = (topic_id, record.topic, record.partition, record.offset)
        carrier = self._last[1] if self._last is not None and self._last[0] == place else key
        if carrier != key:  # a batch record's bytes are written once, not for each sample
            value = None
            added += ((HEADER_PREFIX + "value-in", carrier),)
        # Kafka allows null, its client does not
        kept = tuple((name, data or b"") for name, data in record.headers if not name.startswith(HEADER_PREFIX))
        self._unacknowledged = True
        try:
            self.sink.append(self.topic, partition, value, key=key, headers=(*kept, *added))
        except StreamlearnError as error:
            self.failures += 1
            if error.code != 74:
                raise
            raise BrokerUnavailable(str(error)) from error  # as a full disk: the record is left unread, and read again
        self._last = (place, carrier)  # not before: only what was taken can be named
        self.sent += 1

    def flush(self) -> None:
        """Return when every letter is acknowledged; raises `StreamlearnError` where one is not, at once if that is known."""
        if self._failure is not None:
            raise StreamlearnError(self._failure, code=74)
        self._flush()

    def retry_failed(self) -> str | None:
        """Return why letters are not acknowledged, or None; tries those again that failed. For the thread that sends.

        Raises `StreamlearnError` (77) where we may not write them.
        """
        if not self._unacknowledged:
            return None
        self._unacknowledged = False
        try:
            if self._failure is not None:
                self.prepare()  # it may have been deleted
            self._flush()
        except StreamlearnError as error:
            self._unacknowledged = True
            if error.code == NO_PERMISSION:
                raise  # no later try would help
            if self._failure is None:
                log.error("dead-letter topic %s: %s; reading stands still until it is written", self.topic, error)  # noqa: TRY400 - the line says all
            self._failure = f"dead-letter topic {self.topic}: {error}"
        else:
            self._failure = None
        return self._failure

    def _flush(self) -> None:
        try:
            self.sink.flush(ACK_SECONDS)
        except StreamlearnError:
            self.failures += 1
            raise


def pack_indices(indices: Sequence[int], samples: int) -> bytes:
    """Return the bytes of a set of sample numbers below `samples`, of one span: a bit for each sample, compressed."""
    bits = np.zeros(samples, bool)
    bits[list(indices)] = True
    return zlib.compress(np.packbits(bits).tobytes())


def unpack_indices(data: bytes, samples: int) -> list[int]:
    """Return the sample numbers that `pack_indices` packed; raises `ValueError` if these bytes are no such set."""
    size = -(-samples // 8)
    if samples > MAX_SAMPLES:
        raise ValueError(f"{samples} samples")
    try:
        raw = zlib.decompressobj().decompress(data, size + 1)
    except zlib.error as error:
        raise ValueError(str(error)) from error
    # whoever may write to the topic chooses these bytes: only a span of them is ever made into a list
    first = len(raw) - len(raw.lstrip(b"\0"))
    start = first - first % SPAN_BYTES
    span, rest = raw[start : start + SPAN_BYTES], raw[start + SPAN_BYTES :]
    found: list[int] = (np.flatnonzero(np.unpackbits(np.frombuffer(span, np.uint8))) + 8 * start).tolist()
    if len(raw) != size or (found and found[-1] >= samples) or rest.strip(b"\0"):
        raise ValueError(f"no set of numbers below {samples}")
    return found
