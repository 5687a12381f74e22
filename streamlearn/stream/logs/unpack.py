"""Unpack compressed data up to a limit, so that a few kilobytes cannot fill the memory."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

import lz4.frame
import snappy
import zstandard

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

STEP_BYTES = 1 << 20  # unpacked at a time
XERIAL_MAGIC = b"\x82SNAPPY\x00"  # the first bytes of the Snappy framing of Java clients
XERIAL_HEADER = 16  # bytes before the first block in the Snappy framing of Java clients
XERIAL_LENGTH = 4  # bytes of a block's length


class OversizeBatch(Exception):  # noqa: N818 - an outcome, not a fault of the program
    """A batch unpacks to more bytes than the limit."""


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
    if len(data) <= XERIAL_HEADER or not data.startswith(XERIAL_MAGIC):
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
