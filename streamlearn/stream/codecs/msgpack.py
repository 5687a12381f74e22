"""Codec `msgpack`: MessagePack, smaller than JSON.

Numbers   {"x": <bin>, "dtype": "uint8", "shape": [28, 28], "y": 3}, or "x" as nested lists
Text      {"story": ["...", ...], "question": "...", "answer": "..."}
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgpack

from streamlearn.stream.codecs.base import Codec

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np

    from streamlearn.core.labels import Label


class MsgpackCodec(Codec):
    """MessagePack with one sample."""

    name = "msgpack"
    content_type = b"application/msgpack"

    def decode(self, value: bytes) -> Any:
        return unpack(value)

    def encode(self, x: np.ndarray, y: Sequence[Label]) -> bytes:
        return bytes(msgpack.packb({**pack_array(x[0]), "y": y[0]}))

    def encode_text(self, text: Mapping[str, Any], answer: Label) -> bytes:
        return bytes(msgpack.packb({"story": text["story"], "question": text["question"], "answer": answer}))


def unpack(value: bytes) -> Any:
    """Return the object in MessagePack bytes; raises `ValueError` for other bytes, and for a key that is a number."""
    try:
        return msgpack.unpackb(value, strict_map_key=True)
    except msgpack.UnpackException as error:
        raise ValueError(str(error)) from error


def pack_array(x: np.ndarray) -> dict[str, Any]:
    """Return the fields of an array: its bytes (little-endian, in C order), dtype and shape."""
    return {"x": x.astype(x.dtype.newbyteorder("<")).tobytes(), "dtype": x.dtype.name, "shape": list(x.shape)}
