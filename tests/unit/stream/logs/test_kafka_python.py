"""The limit of unpacking record batches, and the errors of damaged ones."""

from __future__ import annotations

import contextlib
import gzip
import tracemalloc
from typing import TYPE_CHECKING

import lz4.frame
import pytest
import snappy
import zstandard
from kafka import TopicPartition
from kafka.codec import snappy_encode
from kafka.record import MemoryRecords
from kafka.record.default_records import DefaultRecordBatchBuilder

from streamlearn.stream.logs import kafka_python, unpack
from streamlearn.stream.logs.base import Unreadable

if TYPE_CHECKING:
    from collections.abc import Callable

HEADER_BYTES = 61
PACK: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "gzip": ("gzip", gzip.compress),
    "gzip, two members": ("gzip", lambda data: gzip.compress(data[:1000]) + gzip.compress(data[1000:])),
    "snappy": ("snappy", snappy.compress),
    "snappy of Java clients": ("snappy", snappy_encode),
    "lz4": ("lz4", lz4.frame.compress),
    "lz4 without its size": ("lz4", lambda data: lz4.frame.compress(data, store_size=False)),
    "zstd": ("zstd", zstandard.ZstdCompressor().compress),
    "zstd without its size": ("zstd", zstandard.ZstdCompressor(write_content_size=False).compress),
    "zstd, two frames": (
        "zstd",
        lambda data: b"".join(map(zstandard.ZstdCompressor().compress, (data[:1000], data[1000:]))),
    ),
}


@pytest.mark.parametrize("how", PACK)
def test_data_within_the_limit_is_unpacked(how: str) -> None:
    """Every form that clients write is unpacked, up to exactly the limit."""
    codec, pack = PACK[how]
    data = bytes(range(256)) * 12_000  # several steps
    assert unpack.UNPACK[codec](pack(data), len(data)) == data


@pytest.mark.parametrize("how", PACK)
def test_data_beyond_the_limit_is_not_unpacked(how: str) -> None:
    """One byte too many is an error, and a hundred megabytes never are in memory."""
    codec, pack = PACK[how]
    with pytest.raises(unpack.OversizeBatch):
        unpack.UNPACK[codec](pack(bytes(10_001)), 10_000)
    packed = pack(bytes(100 << 20))
    tracemalloc.start()
    with pytest.raises(unpack.OversizeBatch):
        unpack.UNPACK[codec](packed, 1 << 20)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 40 << 20


@pytest.mark.parametrize("how", PACK)
def test_incomplete_data_never_loops_for_ever(how: str) -> None:
    """Incomplete data gives an error or fewer bytes."""
    codec, pack = PACK[how]
    data = bytes(range(256)) * 40
    packed = pack(data)
    unpacked = None
    with contextlib.suppress(Exception):  # each codec has its own
        unpacked = unpack.UNPACK[codec](packed[: len(packed) * 2 // 3], 1 << 20)
    assert unpacked != data


def batch(codec: int = 0, records: int = 3, value: bytes = b"x" * 100) -> bytearray:
    """Return the bytes of a batch that begins at offset 0."""
    builder = DefaultRecordBatchBuilder(2, codec, 0, -1, -1, -1, 1 << 30)
    for offset in range(records):
        assert builder.append(offset, timestamp=1, key=None, value=value, headers=[]) is not None
    return bytearray(builder.build())


def read_batches(*parts: bytearray) -> list[object]:
    """Return the values and the error that the client gets from these batches, in order."""
    fetched = kafka_python.PartitionRecords(0, TopicPartition("t", 5), MemoryRecords(b"".join(map(bytes, parts))))
    found: list[object] = []
    try:
        while records := fetched.take(100):
            found += [record.value for record in records]
            if fetched.record_iterator is None:
                break
    except Unreadable as error:
        found.append(error)
    return found


def test_the_error_of_a_damaged_batch_has_its_place() -> None:
    """The error has partition and offsets for every kind of damage; records before it are read."""
    wrong_sum, wrong_codec, no_gzip = batch(), batch(), batch(codec=1)
    wrong_sum[-3] ^= 1
    assert [str(error) for error in read_batches(wrong_sum)] == [
        "t[5]: the batch at offset 0 cannot be read: its checksum is wrong"
    ]
    *values, error = read_batches(batch(), shifted(wrong_sum, 3))
    assert values == [b"x" * 100] * 3
    assert isinstance(error, Unreadable)
    assert (error.partition, error.begin, error.end) == (("t", 5), 3, 6)
    wrong_codec[22] |= 6
    [error] = read_batches(signed(wrong_codec))
    assert "its compression method is unknown (6)" in str(error)
    no_gzip[HEADER_BYTES + 4] ^= 0xFF
    no_gzip[HEADER_BYTES + 12] ^= 0xFF
    [error] = read_batches(signed(no_gzip))
    assert "t[5]: the batch at offset 0 cannot be read: " in str(error)


def test_a_batch_beyond_the_limit_becomes_one_record(monkeypatch: pytest.MonkeyPatch) -> None:
    """The record has the batch's last offset, so that the position moves past the whole batch."""
    monkeypatch.setattr(kafka_python.BoundedBatch, "max_bytes", 1000)
    before, value, after = read_batches(batch(1, 1), shifted(batch(1, 50), 1), shifted(batch(0, 1, b"after"), 51))
    assert (before, after) == (b"x" * 100, b"after")
    assert isinstance(value, kafka_python.OversizeValue)
    assert (value.why, value.begin) == ("a gzip batch of 50 records unpacks to more than 1000 bytes", 1)


def shifted(data: bytearray, offset: int) -> bytearray:
    """Return a batch that begins at another offset; the checksum does not cover the offset."""
    return bytearray(offset.to_bytes(8, "big")) + data[8:]


def signed(data: bytearray) -> bytearray:
    """Return a batch with a correct checksum."""
    from kafka.record.util import calc_crc32c

    data[17:21] = calc_crc32c(memoryview(data)[21:]).to_bytes(4, "big")
    return data
