"""Repairs of how kafka-python reads record batches: it unpacks whatever it is given, and its errors do not say where.

- A compressed batch is unpacked up to a bound. Beyond it one record stands for the whole batch, and says so (`Unread`).
- A damaged batch raises `Unreadable` with its partition and its offsets.
- The names of headers need not be UTF-8: clients in C write any bytes. kafka-python would read nothing from there on.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any, ClassVar, Self

import lz4.frame
import snappy
import zstandard
from kafka import errors as kafka_errors
from kafka.codec import _detect_xerial_stream
from kafka.consumer.fetcher import Fetcher
from kafka.record import legacy_records, memory_records
from kafka.record.default_records import DefaultRecord, DefaultRecordBatch
from kafka.record.util import decode_varint

from streamlearn.stream.connection import reason
from streamlearn.stream.log import Unreadable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

UNPACKED_BYTES = 64 << 20  # a compressed batch may always unpack to so much
UNPACKED_RECORDS = 4  # and to so many records of the largest size
STEP_BYTES = 1 << 20
XERIAL_HEADER = 16
XERIAL_LENGTH = 4


class Oversize(Exception):  # noqa: N818 - an outcome, not a fault of the program
    """A batch unpacks to more than the bound."""


class Damaged(kafka_errors.CorruptRecordError):  # type: ignore[misc]  # the package has no types
    """A batch that cannot be read, with its first offset and the one after its last."""

    def __init__(self, why: str, batch: DefaultRecordBatch) -> None:
        super().__init__(why)
        self.why = why
        self.begin = batch.base_offset
        self.end = batch.base_offset + max(0, batch.last_offset_delta) + 1


class Unread(bytes):
    """The value of the record that stands for a batch that was not unpacked: why, and the batch's first offset."""

    why: str
    begin: int

    @classmethod
    def of(cls, why: str, begin: int) -> Self:
        """Return such a value."""
        made = cls()
        made.why, made.begin = why, begin
        return made


def gathered(parts: Iterator[bytes], limit: int) -> bytes:
    """Return all parts as one; raises `Oversize` as soon as they are more than `limit` bytes."""
    kept, size = [], 0
    for part in parts:
        kept.append(part)
        size += len(part)
        if size > limit:
            raise Oversize
    return b"".join(kept)


def gzip_parts(data: bytes) -> Iterator[bytes]:
    """Give the content of one or several gzip members."""
    while data:
        member = zlib.decompressobj(wbits=31)
        while not member.eof:
            if not (part := member.decompress(data, STEP_BYTES)) and not member.eof:
                raise ValueError("it ends too early")
            yield part
            data = member.unconsumed_tail
        data = member.unused_data.lstrip(b"\0")


def lz4_parts(data: bytes) -> Iterator[bytes]:
    """Give the content of an LZ4 frame."""
    frame = lz4.frame.LZ4FrameDecompressor()
    while not frame.eof:
        if not (part := frame.decompress(data, STEP_BYTES)) and not frame.eof and frame.needs_input:
            raise ValueError("it ends too early")
        yield part
        data = b""


def zstd_parts(data: bytes) -> Iterator[bytes]:
    """Give the content of one or several Zstandard frames."""
    with zstandard.ZstdDecompressor().stream_reader(data, read_across_frames=True) as reader:
        while part := reader.read(STEP_BYTES):
            yield part


def snappy_blocks(data: bytes) -> Iterator[bytes]:
    """Give the compressed blocks: those of the framing that Java clients write, or all as one."""
    if not _detect_xerial_stream(data):
        yield data
        return
    at = XERIAL_HEADER
    while at < len(data):
        size = int.from_bytes(data[at : at + XERIAL_LENGTH], "big")
        at += XERIAL_LENGTH
        yield data[at : at + size]
        at += size


def snappy_unpacked(data: bytes, limit: int) -> bytes:
    """Return the content of snappy blocks, each of which begins with the size that it unpacks to."""
    blocks = list(snappy_blocks(data))
    if sum(_snappy_size(block) for block in blocks) > limit:
        raise Oversize
    return b"".join(snappy.decompress(block) for block in blocks)


def _snappy_size(block: bytes) -> int:
    size = 0
    for place, byte in enumerate(block[:5]):
        size |= (byte & 0x7F) << (7 * place)
        if byte < 0x80:
            break
    return size


UNPACK: dict[str, Callable[[bytes, int], bytes]] = {
    "gzip": lambda data, limit: gathered(gzip_parts(data), limit),
    "snappy": snappy_unpacked,
    "lz4": lambda data, limit: gathered(lz4_parts(data), limit),
    "zstd": lambda data, limit: gathered(zstd_parts(data), limit),
}
CODECS = {1: "gzip", 2: "snappy", 3: "lz4", 4: "zstd"}


class Batch(DefaultRecordBatch):  # type: ignore[misc]  # no type information
    """A batch of the record format of 2017, unpacked up to `limit` bytes."""

    limit: ClassVar[int] = UNPACKED_BYTES
    _buffer: bytearray
    _pos: int
    _decompressed: bool
    _next_record_index: int

    def __init__(self, buffer: bytes) -> None:
        super().__init__(buffer)
        self._oversize: str | None = None

    def validate_crc(self) -> bool:
        if not super().validate_crc():
            raise Damaged("its checksum is wrong", self)
        return True

    def _maybe_uncompress(self) -> None:
        if not self._decompressed and self.compression_type != self.CODEC_NONE:
            if (codec := CODECS.get(self.compression_type)) is None:
                raise Damaged(f"it is compressed by a method that is not known ({self.compression_type})", self)
            try:
                unpacked = UNPACK[codec](bytes(memoryview(self._buffer)[self._pos :]), self.limit)
            except Oversize:
                many = f"{self.records_count} record{'' if self.records_count == 1 else 's'}"
                self._oversize = f"a {codec} batch of {many} unpacks to more than {self.limit} bytes"
            except MemoryError:
                raise
            except Exception as error:
                why = str(error) or type(error).__name__
                raise Damaged(f"{codec} cannot unpack it: {why:.120}", self) from error
            else:
                self._buffer, self._pos = bytearray(unpacked), 0
        self._decompressed = True

    def __next__(self) -> Any:
        if self._oversize is None:
            try:
                return super().__next__()
            except kafka_errors.CorruptRecordError as error:
                raise Damaged(reason(error), self) from error
        if self._next_record_index:
            raise StopIteration
        self._next_record_index = 1
        value = Unread.of(self._oversize, self.base_offset)
        return DefaultRecord(0, self.last_offset, self.max_timestamp, self.timestamp_type, None, value, [])

    def _read_msg(self) -> Any:
        start = self._pos
        try:
            return super()._read_msg()
        except UnicodeDecodeError:
            mend_names(self._buffer, start)
            return super()._read_msg()


def mend_names(buffer: bytearray, at: int) -> None:
    """Replace the bytes of a record's header names that are not UTF-8 by question marks; the record begins at `at`."""
    _, at = decode_varint(buffer, at)  # its length
    _, at = decode_varint(buffer, at)  # attributes
    _, at = decode_varint(buffer, at)  # time
    _, at = decode_varint(buffer, at)  # offset
    for _ in ("key", "value"):
        size, at = decode_varint(buffer, at)
        at += max(0, size)
    count, at = decode_varint(buffer, at)
    for _ in range(count):
        size, at = decode_varint(buffer, at)
        name = bytes(buffer[at : at + size])
        kept = name.decode(errors="surrogateescape").encode(errors="replace")  # one for each byte
        buffer[at : at + size] = kept
        at += size
        size, at = decode_varint(buffer, at)
        at += max(0, size)


class PartitionRecords(Fetcher.PartitionRecords):  # type: ignore[misc]  # no type information
    """What was fetched of one partition; whatever is wrong with it says where."""

    def take(self, n: int | None = None) -> Any:
        try:
            return super().take(n)
        except MemoryError:
            raise
        except Oversize:
            self._refuse("an old batch unpacks to more than the bound")
        except Exception as error:  # noqa: BLE001 - codecs and parsers of bytes from outside have errors of every kind
            self._refuse(error.why if isinstance(error, Damaged) else reason(error), error)

    def _refuse(self, why: str, error: Exception | None = None) -> None:
        topic, partition = self.topic_partition
        begin, end = (error.begin, error.end) if isinstance(error, Damaged) else (self.next_fetch_offset, 0)
        text = f"{topic}[{partition}]: the batch at offset {begin} cannot be read: {why}"
        raise Unreadable(text, (topic, partition), begin, end) from error


def bound_unpacking(max_record_bytes: int) -> None:
    """Have batches unpacked up to a bound that leaves room for records of this size."""
    Batch.limit = max(UNPACKED_BYTES, UNPACKED_RECORDS * max_record_bytes)


def install() -> None:
    """Put the repairs in place of what kafka-python would use."""
    memory_records.DefaultRecordBatch = Batch
    Fetcher.PartitionRecords = PartitionRecords
    for codec in ("gzip", "snappy", "lz4"):  # of the record formats before 2017
        setattr(legacy_records, f"{codec}_decode", lambda data, unpack=UNPACK[codec]: unpack(bytes(data), Batch.limit))


install()
