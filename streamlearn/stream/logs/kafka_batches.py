"""Repairs of how kafka-python 3.0 reads record batches. Importing this module installs them (see `install_repairs`).

What the client does wrong, and what is done here instead:

- It unpacks a compressed batch without a limit, so that a few kilobytes can fill the memory. Here a batch is unpacked up to
  `BoundedBatch.max_bytes`. If it is larger, one record stands for the whole batch, with an `OversizeValue` as its value.
- Its error for a damaged batch (`CorruptRecordError`) names neither partition nor offset. Here the error is `Unreadable`,
  with the partition and the offsets of the batch.
- It decodes header names as UTF-8, but clients in C can write any bytes. It then reads nothing from that record on. Here
  the bytes that are not UTF-8 become question marks.
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

from streamlearn.stream.logs.base import Unreadable
from streamlearn.stream.logs.kafka_connection import error_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

UNPACKED_BYTES = 64 << 20  # the least limit of the unpacked size of a compressed batch
UNPACKED_RECORDS = 4  # the limit also leaves room for this many records of the largest accepted size
STEP_BYTES = 1 << 20  # unpacked at a time
XERIAL_HEADER = 16  # bytes before the first block in the Snappy framing of Java clients
XERIAL_LENGTH = 4  # bytes of a block's length


class OversizeBatch(Exception):  # noqa: N818 - an outcome, not a fault of the program
    """A batch unpacks to more bytes than the limit."""


class DamagedBatch(kafka_errors.CorruptRecordError):  # type: ignore[misc]  # the package has no types
    """A batch cannot be read. `begin` is its first offset, `end` the offset after its last one."""

    def __init__(self, why: str, batch: DefaultRecordBatch) -> None:
        super().__init__(why)
        self.why = why
        self.begin = batch.base_offset
        self.end = batch.base_offset + max(0, batch.last_offset_delta) + 1


class OversizeValue(bytes):
    """The empty value of a record that stands for a batch that was not unpacked.

    `why` is the reason as a text, `begin` the first offset of the batch.
    """

    why: str
    begin: int

    @classmethod
    def create(cls, why: str, begin: int) -> Self:
        """Return an empty value with these two attributes."""
        value = cls()
        value.why, value.begin = why, begin
        return value


def join_up_to(parts: Iterator[bytes], limit: int) -> bytes:
    """Return the concatenated parts; raises `OversizeBatch` as soon as they have more than `limit` bytes."""
    joined, size = [], 0
    for part in parts:
        joined.append(part)
        size += len(part)
        if size > limit:
            raise OversizeBatch
    return b"".join(joined)


def unpack_gzip(data: bytes) -> Iterator[bytes]:
    """Yield the unpacked content of one or several gzip members."""
    while data:
        member = zlib.decompressobj(wbits=31)
        while not member.eof:
            if not (part := member.decompress(data, STEP_BYTES)) and not member.eof:
                raise ValueError("the data ends too early")
            yield part
            data = member.unconsumed_tail
        data = member.unused_data.lstrip(b"\0")


def unpack_lz4(data: bytes) -> Iterator[bytes]:
    """Yield the unpacked content of an LZ4 frame."""
    frame = lz4.frame.LZ4FrameDecompressor()
    while not frame.eof:
        if not (part := frame.decompress(data, STEP_BYTES)) and not frame.eof and frame.needs_input:
            raise ValueError("the data ends too early")
        yield part
        data = b""


def unpack_zstd(data: bytes) -> Iterator[bytes]:
    """Yield the unpacked content of one or several Zstandard frames."""
    with zstandard.ZstdDecompressor().stream_reader(data, read_across_frames=True) as reader:
        while part := reader.read(STEP_BYTES):
            yield part


def snappy_blocks(data: bytes) -> Iterator[bytes]:
    """Yield the compressed blocks: those of the framing that Java clients write, or else the whole data as one block."""
    if not _detect_xerial_stream(data):
        yield data
        return
    at = XERIAL_HEADER
    while at < len(data):
        size = int.from_bytes(data[at : at + XERIAL_LENGTH], "big")
        at += XERIAL_LENGTH
        yield data[at : at + size]
        at += size


def unpack_snappy(data: bytes, limit: int) -> bytes:
    """Return the unpacked content of Snappy blocks; raises `OversizeBatch` before it unpacks more than `limit` bytes."""
    blocks = list(snappy_blocks(data))
    if sum(_snappy_size(block) for block in blocks) > limit:
        raise OversizeBatch
    return b"".join(snappy.decompress(block) for block in blocks)


def _snappy_size(block: bytes) -> int:
    """Return the unpacked size, with which every Snappy block begins (as a varint)."""
    size = 0
    for index, byte in enumerate(block[:5]):
        size |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            break
    return size


UNPACK: dict[str, Callable[[bytes, int], bytes]] = {
    "gzip": lambda data, limit: join_up_to(unpack_gzip(data), limit),
    "snappy": unpack_snappy,
    "lz4": lambda data, limit: join_up_to(unpack_lz4(data), limit),
    "zstd": lambda data, limit: join_up_to(unpack_zstd(data), limit),
}
CODECS = {1: "gzip", 2: "snappy", 3: "lz4", 4: "zstd"}


class BoundedBatch(DefaultRecordBatch):  # type: ignore[misc]  # the package has no types
    """A batch in record format 2 (of the year 2017), which unpacks to at most `max_bytes`."""

    max_bytes: ClassVar[int] = UNPACKED_BYTES
    _buffer: bytearray
    _pos: int
    _decompressed: bool
    _next_record_index: int

    def __init__(self, buffer: bytes) -> None:
        super().__init__(buffer)
        self._oversize: str | None = None

    def validate_crc(self) -> bool:
        if not super().validate_crc():
            raise DamagedBatch("its checksum is wrong", self)
        return True

    def _maybe_uncompress(self) -> None:
        if not self._decompressed and self.compression_type != self.CODEC_NONE:
            if (codec := CODECS.get(self.compression_type)) is None:
                raise DamagedBatch(f"its compression method is unknown ({self.compression_type})", self)
            try:
                unpacked = UNPACK[codec](bytes(memoryview(self._buffer)[self._pos :]), self.max_bytes)
            except OversizeBatch:
                records = f"{self.records_count} record{'' if self.records_count == 1 else 's'}"
                self._oversize = f"a {codec} batch of {records} unpacks to more than {self.max_bytes} bytes"
            except MemoryError:
                raise
            except Exception as error:
                why = str(error) or type(error).__name__
                raise DamagedBatch(f"{codec} cannot unpack it: {why:.120}", self) from error
            else:
                self._buffer, self._pos = bytearray(unpacked), 0
        self._decompressed = True

    def __next__(self) -> Any:
        if self._oversize is None:
            try:
                return super().__next__()
            except kafka_errors.CorruptRecordError as error:
                raise DamagedBatch(error_text(error), self) from error
        if self._next_record_index:
            raise StopIteration
        self._next_record_index = 1
        value = OversizeValue.create(self._oversize, self.base_offset)
        return DefaultRecord(0, self.last_offset, self.max_timestamp, self.timestamp_type, None, value, [])

    def _read_msg(self) -> Any:
        start = self._pos
        try:
            return super()._read_msg()
        except UnicodeDecodeError:
            replace_invalid_header_names(self._buffer, start)
            return super()._read_msg()


def replace_invalid_header_names(buffer: bytearray, at: int) -> None:
    """In the names of a record's headers, replace each byte that is not UTF-8 by `?`; the record begins at index `at`."""
    _, at = decode_varint(buffer, at)  # length of the record
    _, at = decode_varint(buffer, at)  # attributes
    _, at = decode_varint(buffer, at)  # timestamp, relative to the batch
    _, at = decode_varint(buffer, at)  # offset, relative to the batch
    for _ in ("key", "value"):
        size, at = decode_varint(buffer, at)
        at += max(0, size)
    count, at = decode_varint(buffer, at)
    for _ in range(count):
        size, at = decode_varint(buffer, at)
        name = bytes(buffer[at : at + size])
        # one `?` for each byte, so that the size stays the same
        buffer[at : at + size] = name.decode(errors="surrogateescape").encode(errors="replace")
        at += size
        size, at = decode_varint(buffer, at)
        at += max(0, size)


class PartitionRecords(Fetcher.PartitionRecords):  # type: ignore[misc]  # the package has no types
    """The records that were fetched from one partition. Every error names the partition and the offset."""

    def take(self, n: int | None = None) -> Any:
        try:
            return super().take(n)
        except MemoryError:
            raise
        except OversizeBatch:
            self._raise_unreadable("a batch in an old record format unpacks to more bytes than the limit")
        except Exception as error:  # noqa: BLE001 - codecs and parsers raise errors of many kinds for wrong bytes
            self._raise_unreadable(error.why if isinstance(error, DamagedBatch) else error_text(error), error)

    def _raise_unreadable(self, why: str, error: Exception | None = None) -> None:
        topic, partition = self.topic_partition
        begin, end = (error.begin, error.end) if isinstance(error, DamagedBatch) else (self.next_fetch_offset, 0)
        text = f"{topic}[{partition}]: the batch at offset {begin} cannot be read: {why}"
        raise Unreadable(text, (topic, partition), begin, end) from error


def set_unpack_limit(max_record_bytes: int) -> None:
    """Set the limit of the unpacked size so that records of this size are accepted."""
    BoundedBatch.max_bytes = max(UNPACKED_BYTES, UNPACKED_RECORDS * max_record_bytes)


def install_repairs() -> None:
    """Replace the classes and functions of kafka-python by those of this module."""
    memory_records.DefaultRecordBatch = BoundedBatch
    Fetcher.PartitionRecords = PartitionRecords
    for codec in ("gzip", "snappy", "lz4"):  # for the record formats before 2017
        setattr(
            legacy_records,
            f"{codec}_decode",
            lambda data, unpack=UNPACK[codec]: unpack(bytes(data), BoundedBatch.max_bytes),
        )


install_repairs()
