"""Decode the bytes of records into samples, and encode samples: JSON, MessagePack, batch records, text.

JSON          {"x": [...], "y": 3}
MessagePack   {"x": <bin>, "dtype": "uint8", "shape": [28, 28], "y": 3}, or "x" as nested lists
batch         MessagePack {"x": <bin>, "dtype": "uint8", "shape": [N, 28, 28], "y": <bin of int64> or [labels]}
text          JSON or MessagePack {"story": ["...", ...], "question": "...", "answer": "..."}

JSON is easy to write and read for people, MessagePack is smaller, and batch records are the fastest. Every record may have
a field "task", which must be the topic's name. Binary data is little-endian and in C order.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgpack
import numpy as np
import orjson

from streamlearn.core.config import TextInputConfig
from streamlearn.core.labels import MAX_LABEL_BYTES
from streamlearn.core.samples import CODEC_VERSION, Rejected
from streamlearn.stream.logs.base import CONTENT_TYPE, Record
from streamlearn.stream.text import fingerprint, parse_text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from streamlearn.core.config import InputConfig
    from streamlearn.core.labels import Label
    from streamlearn.stream.config import StreamConfig
    from streamlearn.stream.text import Rows

CONTENT_TYPES = {
    b"application/json": "json",
    b"application/msgpack": "msgpack",
    b"application/vnd.streamlearn.batch": "batch",
}
CONTENT_TYPE_OF = {codec: content_type for content_type, codec in CONTENT_TYPES.items()}
NOT_FINITE = (b"NaN", b"Infinity")  # JSON has no such numbers, but many programs write them
FLOAT32_MAX = float(np.finfo(np.float32).max)


@dataclass
class Chunk:
    """The samples of one record: `x [n, ...]`, n labels, and the samples that are rejected, by index.

    A record that cannot be decoded is a chunk of one rejected sample. For text, `text` has the words of each sample, and `x`
    is padding; the assembler, which has the vocabulary, writes the word ids into it.
    """

    x: np.ndarray
    y: list[Any]
    rejected: dict[int, Rejected] = field(default_factory=dict)
    text: dict[int, Rows] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.y)

    def hash_input(self, index: int) -> np.ndarray:
        """Return the value whose hash decides the hold-out: the sample itself, or the words of a text.

        Word ids would not do: they depend on the texts before.
        """
        return fingerprint(self.text[index]) if index in self.text else self.x[index]


class Codec:
    """Decodes records into samples of one shape and dtype."""

    def __init__(
        self,
        shape: Sequence[int],
        dtype: str,
        default_codec: str,
        max_record_bytes: int,
        text: TextInputConfig | None = None,
        version: int = CODEC_VERSION,
        *,
        scale: float = 1.0,
    ) -> None:
        self.text = text
        self.max_magnitude = FLOAT32_MAX * min(1.0, scale)  # the model sees x / scale, which must be finite in float32
        self.version = version
        self.shape = tuple(shape)
        self.dtype = np.dtype(dtype)
        self.default_codec = default_codec
        self.max_record_bytes = max_record_bytes
        self._empty = np.zeros((1, *self.shape), self.dtype)

    @classmethod
    def from_config(
        cls, spec: InputConfig | TextInputConfig, stream: StreamConfig, version: int = CODEC_VERSION
    ) -> Codec:
        """Return the codec of a configuration, in the version with which the job was started."""
        text = spec if isinstance(spec, TextInputConfig) else None
        return cls(spec.shape, spec.dtype, stream.codec, stream.max_record_bytes, text, version, scale=spec.scale)

    def convert(self, x: np.ndarray) -> tuple[np.ndarray, dict[int, Rejected]]:
        """Convert samples `[n, ...]` of any numeric type to the stream's dtype; also return the rejected ones, by index.

        A float without a fraction counts as an integer. Raises `Rejected` if the samples have another shape.
        """
        if x.shape[1:] != self.shape:
            raise Rejected("shape", f"x has shape {list(x.shape[1:])}; expected {list(self.shape)}")
        rejected: dict[int, Rejected] = {}
        if not len(x):
            return x.astype(self.dtype), rejected
        if self.dtype.kind in "iu" and x.dtype != self.dtype:
            limits = np.iinfo(self.dtype)
            high = x < float(limits.max) + 1 if x.dtype.kind == "f" else x <= limits.max
            fits = (x >= limits.min) & high & (x == np.trunc(x))
            for index in np.flatnonzero(~fits.reshape(len(x), -1).all(axis=1)).tolist():
                rejected[index] = Rejected("schema", f"x: expected integers from {limits.min} to {limits.max}")
            x = np.where(fits, x, 0)
        with np.errstate(over="ignore"):  # a number that is too large becomes infinite, and is rejected for that
            chunk = Chunk(np.ascontiguousarray(x.astype(self.dtype)), [0] * len(x))
        self._check(chunk)
        return chunk.x, chunk.rejected | rejected

    def decode(self, record: Record) -> Chunk:
        """Return the samples of a record. Never raises: a problem becomes a rejected sample of the chunk."""
        try:
            return self._decode_samples(self._parse(record), record)
        except Rejected as rejected:
            return Chunk(self._empty, [None], {0: rejected})
        except (TypeError, ValueError, OverflowError, RecursionError, MemoryError) as error:
            # shapes that are not numbers, labels nested a thousand levels deep: no input may end the reader
            return Chunk(self._empty, [None], {0: Rejected("schema", f"cannot be read: {type(error).__name__}")})

    def _decode_samples(self, tree: dict[str, Any], record: Record) -> Chunk:
        if self.text is not None:
            return self._decode_text(self.text, tree, record)
        if "y" not in tree or tree["y"] is None:
            raise Rejected("missing_label", "no label: expected a field y")
        if "x" not in tree:
            found = ", ".join(repr(name) for name in list(tree)[:8] if name != "codec")  # `_parse` added the codec
            raise Rejected("schema", f"no field x; found {found or 'nothing'}")
        _check_task(tree, record)
        if tree["codec"] == "batch":
            return self._decode_batch(tree)
        x = self._read_binary(tree, self.shape) if isinstance(tree["x"], bytes) else self._read_nested(tree["x"])
        chunk = Chunk(x[np.newaxis], [tree["y"]])
        self._check(chunk)
        return chunk

    def _decode_text(self, text: TextInputConfig, tree: dict[str, Any], record: Record) -> Chunk:
        if tree["codec"] == "batch":
            raise Rejected("schema", "a batch record is for numbers; expected text as JSON or MessagePack")
        answer = tree.get("answer")
        if answer is None or answer == "":
            raise Rejected("missing_label", "no label: expected a field answer")
        if type(answer) is not str:
            raise Rejected("schema", f"answer is {answer!r:.80}; expected a string")
        if (too_long := _check_length("answer", answer)) is not None:
            raise too_long
        _check_task(tree, record)
        rows = parse_text(tree, text.sentences, text.words, self.version)
        return Chunk(self._empty.copy(), [answer], text={0: rows})

    def _parse(self, record: Record) -> dict[str, Any]:
        """Return the record's object with its codec added; raises `Rejected` if it has none, or is too large."""
        if record.oversize is not None:
            raise Rejected("oversize", record.oversize)
        if record.value is None:
            raise Rejected("decode", "a tombstone: expected a value")
        if len(record.value) > self.max_record_bytes:
            raise Rejected("oversize", f"{len(record.value)} bytes; expected at most {self.max_record_bytes}")
        content_type = record.header(CONTENT_TYPE)
        if content_type is None:
            codec: str | None = self.default_codec
        else:
            codec = CONTENT_TYPES.get(content_type.split(b";")[0].strip().lower())
        if codec is None:
            raise Rejected("decode", f"content type {content_type!r:.80}; expected {', '.join(CONTENT_TYPE_OF)}")
        try:
            tree = _load_json(record.value) if codec == "json" else msgpack.unpackb(record.value, strict_map_key=True)
        except (ValueError, msgpack.UnpackException, RecursionError) as error:
            raise Rejected("decode", f"not {codec}: {error!s:.160}") from error
        if not isinstance(tree, dict):
            fields = "x and y" if self.text is None else "story, question and answer"
            raise Rejected("schema", f"expected an object with {fields}, got {type(tree).__name__}")
        return {**tree, "codec": codec}

    def _decode_batch(self, tree: dict[str, Any]) -> Chunk:
        if not isinstance(tree["x"], bytes):
            raise Rejected("schema", "x of a batch record: expected binary data")
        shape = tree.get("shape")
        if not isinstance(shape, list) or tuple(shape[1:]) != self.shape or not _is_count(shape[0]):
            raise Rejected("shape", f"shape is {shape!r:.80}; expected [N, {', '.join(map(str, self.shape))}]")
        x = self._read_binary(tree, tuple(shape))
        y = tree["y"]
        if isinstance(y, bytes):
            if len(y) != 8 * len(x):
                raise Rejected("schema", f"y has {len(y)} bytes; expected {8 * len(x)}: int64 for {len(x)} samples")
            labels = np.frombuffer(y, "<i8").tolist()
        elif isinstance(y, list) and len(y) == len(x):
            labels = y
        else:
            raise Rejected("schema", f"y: expected {len(x)} labels")
        chunk = Chunk(x, labels)
        self._check(chunk)
        return chunk

    def _read_binary(self, tree: dict[str, Any], shape: tuple[int, ...]) -> np.ndarray:
        """Return the array of binary data; raises `Rejected` if its dtype, shape or size is wrong."""
        dtype = tree.get("dtype", self.dtype.name)
        if dtype != self.dtype.name:
            raise Rejected("schema", f"dtype is {dtype!r:.40}; expected {self.dtype.name}")
        if tuple(tree.get("shape", shape)) != shape:
            raise Rejected("shape", f"shape is {tree['shape']!r:.80}; expected {list(shape)}")
        if len(tree["x"]) != (expected := math.prod(shape) * self.dtype.itemsize):
            raise Rejected("shape", f"x has {len(tree['x'])} bytes; expected {expected}")
        return np.frombuffer(tree["x"], self.dtype.newbyteorder("<")).astype(self.dtype, copy=False).reshape(shape)

    def _read_nested(self, x: Any) -> np.ndarray:
        """Return the array of nested lists; raises `Rejected` if its type, shape or range is wrong."""
        try:
            array = np.asarray(x)
        except (ValueError, OverflowError) as error:
            raise Rejected("shape", f"x is ragged: {error!s:.120}") from error
        if array.dtype.kind not in "iuf" and array.size:
            raise Rejected("schema", "x: expected only numbers")
        if array.shape != self.shape:
            raise Rejected("shape", f"x has shape {list(array.shape)}; expected {list(self.shape)}")
        if self.dtype.kind in "iu":
            limits = np.iinfo(self.dtype)
            if array.dtype.kind == "f" or array.min() < limits.min or array.max() > limits.max:
                raise Rejected("schema", f"x: expected integers from {limits.min} to {limits.max}")
        with np.errstate(over="ignore"):  # a number that is too large becomes infinite, and is rejected for that
            return array.astype(self.dtype)

    def _check(self, chunk: Chunk) -> None:
        """Reject samples with values that are not finite or too large, and samples with invalid labels."""
        if self.dtype.kind == "f":
            finite = np.isfinite(chunk.x).reshape(len(chunk), -1).all(axis=1)
            for index in np.flatnonzero(~finite).tolist():
                chunk.rejected[index] = Rejected("nonfinite", "x has a value that is not finite")
        if self.dtype == np.float64 or self.max_magnitude < FLOAT32_MAX:
            # models compute in float32: there the value would be infinite, perhaps only after the division by input.scale
            too_large = (np.abs(chunk.x, dtype=np.float64) > self.max_magnitude).reshape(len(chunk), -1).any(axis=1)
            for index in np.flatnonzero(too_large).tolist():
                why = f"x has a value that is too large for float32: expected at most {self.max_magnitude:.3g}"
                chunk.rejected.setdefault(index, Rejected("nonfinite", why))
        for index, label in enumerate(chunk.y):
            if label is None:
                chunk.rejected[index] = Rejected("missing_label", "no label")
            elif type(label) is not int and type(label) is not str:
                chunk.rejected[index] = Rejected("schema", f"y is {label!r:.80}; expected an integer or a string")
            elif (too_long := _check_length("y", label)) is not None:
                chunk.rejected[index] = too_long


def encode(codec: str, x: np.ndarray, y: Label | Sequence[Label]) -> bytes:
    """Return the bytes of one sample (`json`, `msgpack`), or of many (`batch`, with `x [N, ...]`)."""
    if codec == "json":
        return orjson.dumps({"x": x.tolist(), "y": y})
    dtype = x.dtype.newbyteorder("<")
    labels: Any = y
    if codec == "batch" and all(type(label) is int for label in y):  # type: ignore[union-attr]  # a batch has many
        labels = np.asarray(y, "<i8").tobytes()
    tree = {"x": x.astype(dtype).tobytes(), "dtype": x.dtype.name, "shape": list(x.shape), "y": labels}
    return bytes(msgpack.packb(tree))


def batch_subset(value: bytes, indices: Sequence[int], samples: int) -> bytes:
    """Return a batch record with only the samples at these indices, bit by bit unchanged, and all its other fields.

    Raises `ValueError` if `value` is not a batch record of so many `samples`.
    """
    try:
        tree = msgpack.unpackb(value)
        (count, *rest), x, y = tree["shape"], tree["x"], tree["y"]
        size = len(x) // samples
        if count != samples or len(x) != samples * size or len(y) != samples * (8 if isinstance(y, bytes) else 1):
            raise ValueError(f"not a batch record of {samples} samples")
        if isinstance(y, bytes):
            labels: Any = b"".join(y[8 * index : 8 * (index + 1)] for index in indices)
        else:
            labels = [y[index] for index in indices]
        x = b"".join(x[size * index : size * (index + 1)] for index in indices)
        return bytes(msgpack.packb({**tree, "x": x, "shape": [len(indices), *rest], "y": labels}))
    except (msgpack.UnpackException, TypeError, LookupError, RecursionError, OverflowError) as error:
        raise ValueError(f"not a batch record: {error!r:.80}") from error


def encode_text(codec: str, text: Mapping[str, Any], answer: Label) -> bytes:
    """Return the bytes of a text sample (`json`, `msgpack`): the `story` and `question` of `text`, and the answer."""
    tree = {"story": text["story"], "question": text["question"], "answer": answer}
    return orjson.dumps(tree) if codec == "json" else bytes(msgpack.packb(tree))


def _check_task(tree: dict[str, Any], record: Record) -> None:
    if tree.get("task", record.topic) != record.topic:
        raise Rejected("unknown_task", f"task is {tree['task']!r:.80}; expected {record.topic!r}, the topic's name")


def _load_json(value: bytes) -> Any:
    """Parse JSON. NaN and Infinity are accepted, so that the sample is rejected for its value and not as invalid JSON."""
    try:
        return orjson.loads(value)
    except ValueError:
        if not any(word in value for word in NOT_FINITE):
            raise
        found: set[str] = set()

        def parse_constant(word: str) -> float:
            found.add(word)
            return math.nan

        tree = json.loads(value, parse_constant=parse_constant)
        if not found:  # the error has another cause: Python's parser only accepts more than orjson
            raise
        return tree


def _check_length(name: str, label: Label) -> Rejected | None:
    """Return the rejection of a label that is too long, or None."""
    if isinstance(label, int) or (size := len(label.encode(errors="surrogatepass"))) <= MAX_LABEL_BYTES:
        return None
    return Rejected(
        "schema", f"{name} is a string of {size} bytes, {label[:20]!r}...; expected at most {MAX_LABEL_BYTES}"
    )


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0
