"""A safetensors file of one-dimensional arrays, read and written without torch: `status` and `report` do not import it."""

from __future__ import annotations

import json
from array import array
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

TYPES = {"f": "F32", "q": "I64"}
"""Type codes of arrays, and the names of these types in a safetensors file."""


def concatenated(rows: Iterable[array[float]]) -> array[float]:
    """Return the values of all rows in one float32 array."""
    joined = array("f")
    for row in rows:
        joined.extend(row)
    return joined


def split(values: array[float], lengths: Iterable[int]) -> list[array[float]]:
    """Return the rows of these lengths that were given to `concatenated`."""
    rows, start = [], 0
    for length in lengths:
        rows.append(values[start : start + length])
        start += length
    return rows


def to_bytes(tensors: Mapping[str, array[Any]]) -> bytes:
    """Return a safetensors file with these arrays as its tensors."""
    header: dict[str, Any] = {}
    end = 0
    for name, values in tensors.items():
        start, end = end, end + len(values) * values.itemsize
        header[name] = {"dtype": TYPES[values.typecode], "shape": [len(values)], "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # align the tensors to 8 bytes
    return b"".join([len(text).to_bytes(8, "little"), text, *(values.tobytes() for values in tensors.values())])


def from_bytes(content: bytes) -> dict[str, array[Any]]:
    """Return the tensors of a file that `to_bytes` returned."""
    begin = 8 + int.from_bytes(content[:8], "little")
    codes = {dtype: code for code, dtype in TYPES.items()}
    tensors = {}
    for name, entry in json.loads(content[8:begin]).items():
        start, end = entry["data_offsets"]
        tensors[name] = array(codes[entry["dtype"]])
        tensors[name].frombytes(content[begin + start : begin + end])
    return tensors
