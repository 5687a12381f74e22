"""Write samples that cannot be used to the dead-letter topic, with the reason, before any position moves past them."""

from __future__ import annotations

import logging
import zlib
from typing import TYPE_CHECKING

import numpy as np

from streamlearn.core.errors import AccessError, InputOutputError, StreamlearnError
from streamlearn.stream.logs.base import BrokerUnavailable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from streamlearn.core.samples import Rejected
    from streamlearn.stream.logs.base import Headers, LogWriter, Record

logger = logging.getLogger(__name__)

HEADER_PREFIX = "streamlearn.errors."
MAX_SINGLE_LETTERS = 1000  # letters of one sample each, for one record; its other rejected samples share letters
SHARED_SPAN = 1 << 20  # sample indices that one shared letter can cover: its header must fit into a broker's message
SPAN_BYTES = SHARED_SPAN // 8
MAX_SAMPLES = 1 << 30  # in one record: each sample has at least one byte
ACK_SECONDS = 5.0  # how long a letter may stay unacknowledged before the reader pauses


class DeadLetterWriter:
    """Writes rejected samples to the dead-letter topic. One thread writes, any thread may call `flush`.

    A letter is a record of the dead-letter topic. Its value and headers are those of the original record, but original
    headers whose names begin with `streamlearn.errors.` are replaced. Of a batch record, only the letter of the first
    rejected sample has the value; the other letters name that letter in the header `streamlearn.errors.value-in`. The
    letter's key is `topic-partition-offset-index`, so that a letter that is written again after a crash can be recognised.
    The topic's id is in a header too, because a topic that is deleted and created again has other samples at the same
    offsets. The original record's key is in a header.
    """

    def __init__(self, writer: LogWriter, topic: str) -> None:
        self.writer = writer
        self.topic = topic
        self.sent = 0
        self.failures = 0  # failed attempts to write a letter, or to get letters acknowledged
        self._unacknowledged = False
        self._failure: str | None = None
        self._num_partitions = 1
        self._last: tuple[object, bytes] | None = None  # the last record, and the key of its first letter

    def prepare(self) -> None:
        """Create the topic if it does not exist; raises `StreamlearnError` if that is not possible."""
        created = self.writer.create_topic(self.topic, 1)
        # brokers take a moment to list a new topic, so do not ask for the partitions of one
        self._num_partitions = 1 if created else self.writer.partitions(self.topic)

    def write_rejected(
        self, record: Record, rejected: Mapping[int, Rejected], samples: int, topic_id: str | None
    ) -> None:
        """Write letters for the rejected samples of a record, by index. The record has `samples` samples.

        Beyond `MAX_SINGLE_LETTERS`, the samples with the same reason share a letter: a record of a megabyte may have 300,000
        samples.
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
        """Write a letter for one sample of a record, and for `further` samples that share it; durable after `flush`."""
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
        record_id = (topic_id, record.topic, record.partition, record.offset)
        value_key = self._last[1] if self._last is not None and self._last[0] == record_id else key
        if value_key != key:  # the bytes of a batch record are written once, not again for each sample
            value = None
            added += ((HEADER_PREFIX + "value-in", value_key),)
        self._unacknowledged = True
        try:
            self.writer.append(self.topic, partition, value, key=key, headers=(*original_headers(record), *added))
        except InputOutputError as error:
            self.failures += 1
            # for example a full disk: the reader then keeps its position, and reads the record again later
            raise BrokerUnavailable(str(error)) from error
        except StreamlearnError:
            self.failures += 1
            raise
        self._last = (record_id, value_key)  # only now: later letters may name only a letter that was accepted
        self.sent += 1

    def flush(self) -> None:
        """Wait until all letters are acknowledged; raises `StreamlearnError` if one is not, at once if that is known."""
        if self._failure is not None:
            raise InputOutputError(self._failure)
        self._flush()

    def retry_failed(self) -> str | None:
        """Try to get all letters acknowledged; return why that failed, or None. Only the writing thread may call this.

        Raises `AccessError` if we have no permission to write them.
        """
        if not self._unacknowledged:
            return None
        self._unacknowledged = False
        try:
            if self._failure is not None:
                self.prepare()  # the topic may have been deleted
            self._flush()
        except StreamlearnError as error:
            self._unacknowledged = True
            if isinstance(error, AccessError):
                raise  # another try would not help
            if self._failure is None:
                logger.error(  # noqa: TRY400 - the message contains the whole error
                    "dead-letter topic %s: %s; reading is paused until the letters are written", self.topic, error
                )
            self._failure = f"dead-letter topic {self.topic}: {error}"
        else:
            self._failure = None
        return self._failure

    def _flush(self) -> None:
        try:
            self.writer.flush(ACK_SECONDS)
        except StreamlearnError:
            self.failures += 1
            raise


def original_headers(record: Record) -> Headers:
    """Return the headers of a record, or of the original record of a letter: those without our prefix."""
    # a header's value may be null in Kafka, but not in its client
    return tuple((name, data or b"") for name, data in record.headers if not name.startswith(HEADER_PREFIX))


def pack_indices(indices: Sequence[int], samples: int) -> bytes:
    """Return a set of sample indices below `samples` as compressed bytes, one bit for each sample; all in one span."""
    bits = np.zeros(samples, bool)
    bits[list(indices)] = True
    return zlib.compress(np.packbits(bits).tobytes())


def unpack_indices(data: bytes, samples: int) -> list[int]:
    """Return the sample indices that `pack_indices` packed; raises `ValueError` if the bytes are not such a set."""
    size = -(-samples // 8)
    if samples > MAX_SAMPLES:
        raise ValueError(f"{samples} samples")
    try:
        raw = zlib.decompressobj().decompress(data, size + 1)
    except zlib.error as error:
        raise ValueError(str(error)) from error
    # anybody who may write to the topic can forge these bytes: never make a list of more than one span
    first = len(raw) - len(raw.lstrip(b"\0"))
    start = first - first % SPAN_BYTES
    span, rest = raw[start : start + SPAN_BYTES], raw[start + SPAN_BYTES :]
    indices: list[int] = (np.flatnonzero(np.unpackbits(np.frombuffer(span, np.uint8))) + 8 * start).tolist()
    if len(raw) != size or (indices and indices[-1] >= samples) or rest.strip(b"\0"):
        raise ValueError(f"not a set of indices below {samples}")
    return indices
