"""Repairs of kafka-python 3.0. Importing this module installs those that concern batches (see `install_repairs`).

What the client does wrong, and what is done here instead:

- It repeats a refused login until the bootstrap time is over, and then reports only that no broker answered
  (dpkp/kafka-python#2994 did not change that). See `ConnectionManager`.
- It drops the last bytes of a connection, which contain the reason of a refusal. See `ConnectionManager`.
- It uses Python's global random generator, which belongs to the model that learns. See `use_own_random_generator`.
- It unpacks a compressed batch without a limit, so that a few kilobytes can fill the memory. Here a batch is unpacked up to
  `BoundedBatch.max_bytes`. If it is larger, one record stands for the whole batch, with an `OversizeValue` as its value.
- Its error for a damaged batch (`CorruptRecordError`) names neither partition nor offset. Here the error is `Unreadable`,
  with the partition and the offsets of the batch.
- It decodes header names as UTF-8, but clients in C can write any bytes. It then reads nothing from that record on. Here
  the bytes that are not UTF-8 become question marks.

What else it does wrong is handled where it matters: a constructor that fails leaves sockets open (`create_client` in
`kafka_connection`), `flush` does not report failed records (dpkp/kafka-python#2426, `KafkaWriter`), and the consumer can
stop without an error (dpkp/kafka-python#2605, `LogWatch.check_for_stall`).
"""

from __future__ import annotations

import random
import sys
from typing import Any, ClassVar, Self

from kafka import errors as kafka_errors
from kafka.consumer.fetcher import Fetcher
from kafka.net.manager import KafkaConnectionManager
from kafka.record import legacy_records, memory_records
from kafka.record.default_records import DefaultRecord, DefaultRecordBatch
from kafka.record.util import decode_varint

from streamlearn.stream.logs.base import Unreadable
from streamlearn.stream.logs.kafka_failures import error_text, is_refusal
from streamlearn.stream.logs.unpack import UNPACK, OversizeBatch

CLIENT_RANDOM = random.Random()  # noqa: S311 - the client uses it to choose brokers and waiting times
UNPACKED_BYTES = 64 << 20  # the least limit of the unpacked size of a compressed batch
UNPACKED_RECORDS = 4  # the limit also leaves room for this many records of the largest accepted size
CODECS = {1: "gzip", 2: "snappy", 3: "lz4", 4: "zstd"}


def use_own_random_generator() -> None:
    """Give the modules of kafka-python a random generator of their own.

    They draw numbers in the reader thread from Python's global generator. The draws of a model that uses this generator
    would then depend on the network.
    """
    # `copy` is one step of the interpreter; `list(...items())` is not, and another thread may import a module meanwhile
    for name, module in sys.modules.copy().items():
        if name.startswith("kafka.") and getattr(module, "random", None) is random:
            module.random = CLIENT_RANDOM  # type: ignore[attr-defined]  # modules have any attributes


class ConnectionManager(KafkaConnectionManager):  # type: ignore[misc]  # the package has no types
    """Keeps the reason for which a broker refused us, and raises it instead of another attempt.

    The base class has a dictionary for this since dpkp/kafka-python#2994, but fills it only if `conn.initialize()` raises.
    In version 3.0 that method does not raise: it puts the error into `conn.init_future`.
    """

    def __init__(self, net: Any, **settings: Any) -> None:
        super().__init__(net, **settings)
        self.failure: BaseException | None = None  # the last error of any connection

    async def _connect(self, node: Any, conn: Any, **how: Any) -> None:
        conn.close_future.add_errback(self._keep_failure)
        await super()._connect(node, conn, **how)
        if conn.init_future.failed() and is_refusal(conn.init_future.exception):
            # the base class raises it at the next request for a connection to this broker
            self._auth_failures[node.node_id] = conn.init_future.exception

    async def _build_transport(self, node: Any, timeout_at: float | None = None) -> Any:
        transport = await super()._build_transport(node, timeout_at)
        receive = transport._sock_recv  # noqa: SLF001 - no public method does this

        def receive_data_first() -> tuple[bytes, Exception | None]:
            # the client ignores data if an error comes with it: a broker sends the reason of a refusal, then disconnects
            data, error = receive()
            return data, None if data else error

        transport._sock_recv = receive_data_first  # noqa: SLF001
        return transport

    def _keep_failure(self, error: BaseException) -> None:
        if not isinstance(error, kafka_errors.KafkaTimeoutError):  # the end of the bootstrap time is not a cause
            self.failure = error


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
