"""Decode records into samples of the configured shape and dtype. The formats of the bytes are in `codecs/`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from streamlearn.core.config import TextInputConfig
from streamlearn.core.labels import MAX_LABEL_BYTES
from streamlearn.core.samples import CODEC_VERSION, Rejected
from streamlearn.stream.codecs.registry import CODECS, TEXT_CODECS, find_codec
from streamlearn.stream.codecs.text import fingerprint, parse_text
from streamlearn.stream.logs.base import CONTENT_TYPE, Record

if TYPE_CHECKING:
    from collections.abc import Sequence

    from streamlearn.core.config import InputConfig
    from streamlearn.core.labels import Label
    from streamlearn.stream.codecs.base import Codec
    from streamlearn.stream.codecs.text import Rows
    from streamlearn.stream.config import StreamConfig

FLOAT32_MAX = float(np.finfo(np.float32).max)


@dataclass
class DecodedRecord:
    """The samples of one record: `x [n, ...]`, n labels, and the samples that are rejected, by index.

    A record that cannot be decoded counts as one rejected sample. For text, `text` has the words of each sample, and `x`
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


class RecordDecoder:
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
    ) -> RecordDecoder:
        """Return the decoder of a configuration, in the version with which the job was started."""
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
            decoded = DecodedRecord(np.ascontiguousarray(x.astype(self.dtype)), [0] * len(x))
        self._check(decoded)
        return decoded.x, decoded.rejected | rejected

    def decode(self, record: Record) -> DecodedRecord:
        """Return the samples of a record. Never raises: a problem becomes a rejected sample."""
        try:
            codec, fields = self._read_fields(record)
            if self.text is not None:
                return self._decode_text(self.text, codec, fields, record)
            return self._decode_numbers(codec, fields, record)
        except Rejected as rejected:
            return DecodedRecord(self._empty, [None], {0: rejected})
        except (TypeError, ValueError, OverflowError, RecursionError, MemoryError) as error:
            # shapes that are not numbers, labels nested a thousand levels deep: no input may end the reader
            return DecodedRecord(
                self._empty, [None], {0: Rejected("schema", f"cannot be read: {type(error).__name__}")}
            )

    def _decode_numbers(self, codec: Codec, fields: dict[str, Any], record: Record) -> DecodedRecord:
        if "y" not in fields or fields["y"] is None:
            raise Rejected("missing_label", "no label: expected a field y")
        if "x" not in fields:
            found = ", ".join(repr(name) for name in list(fields)[:8])
            raise Rejected("schema", f"no field x; found {found or 'nothing'}")
        _check_task(fields, record)
        if codec.holds_many:
            return self._decode_many(codec, fields)
        x = self._read_binary(fields, self.shape) if isinstance(fields["x"], bytes) else self._read_nested(fields["x"])
        decoded = DecodedRecord(x[np.newaxis], [fields["y"]])
        self._check(decoded)
        return decoded

    def _decode_text(
        self, text: TextInputConfig, codec: Codec, fields: dict[str, Any], record: Record
    ) -> DecodedRecord:
        if not codec.holds_text:
            raise Rejected(
                "schema", f"a {codec.name} record is for numbers; expected text as {' or '.join(TEXT_CODECS)}"
            )
        answer = fields.get("answer")
        if answer is None or answer == "":
            raise Rejected("missing_label", "no label: expected a field answer")
        if type(answer) is not str:
            raise Rejected("schema", f"answer is {answer!r:.80}; expected a string")
        if (too_long := _check_length("answer", answer)) is not None:
            raise too_long
        _check_task(fields, record)
        rows = parse_text(fields, text.sentences, text.words, self.version)
        return DecodedRecord(self._empty.copy(), [answer], text={0: rows})

    def _read_fields(self, record: Record) -> tuple[Codec, dict[str, Any]]:
        """Return a record's codec and its fields; raises `Rejected` if it has no fields, or is too large."""
        if record.oversize is not None:
            raise Rejected("oversize", record.oversize)
        if record.value is None:
            raise Rejected("decode", "a tombstone: expected a value")
        if len(record.value) > self.max_record_bytes:
            raise Rejected("oversize", f"{len(record.value)} bytes; expected at most {self.max_record_bytes}")
        content_type = record.header(CONTENT_TYPE)
        codec = CODECS[self.default_codec] if content_type is None else find_codec(content_type)
        if codec is None:
            raise Rejected("decode", f"content type {content_type!r:.80}; expected {', '.join(CODECS)}")
        try:
            fields = codec.decode(record.value)
        except (ValueError, RecursionError) as error:
            raise Rejected("decode", f"not {codec.name}: {error!s:.160}") from error
        if not isinstance(fields, dict):
            expected = "x and y" if self.text is None else "story, question and answer"
            raise Rejected("schema", f"expected an object with {expected}, got {type(fields).__name__}")
        return codec, fields

    def _decode_many(self, codec: Codec, fields: dict[str, Any]) -> DecodedRecord:
        if not isinstance(fields["x"], bytes):
            raise Rejected("schema", f"x of a {codec.name} record: expected binary data")
        shape = fields.get("shape")
        if not isinstance(shape, list) or tuple(shape[1:]) != self.shape or not _is_count(shape[0]):
            raise Rejected("shape", f"shape is {shape!r:.80}; expected [N, {', '.join(map(str, self.shape))}]")
        x = self._read_binary(fields, tuple(shape))
        y = fields["y"]
        if isinstance(y, bytes):
            if len(y) != 8 * len(x):
                raise Rejected("schema", f"y has {len(y)} bytes; expected {8 * len(x)}: int64 for {len(x)} samples")
            labels = np.frombuffer(y, "<i8").tolist()
        elif isinstance(y, list) and len(y) == len(x):
            labels = y
        else:
            raise Rejected("schema", f"y: expected {len(x)} labels")
        decoded = DecodedRecord(x, labels)
        self._check(decoded)
        return decoded

    def _read_binary(self, fields: dict[str, Any], shape: tuple[int, ...]) -> np.ndarray:
        """Return the array of binary data; raises `Rejected` if its dtype, shape or size is wrong."""
        dtype = fields.get("dtype", self.dtype.name)
        if dtype != self.dtype.name:
            raise Rejected("schema", f"dtype is {dtype!r:.40}; expected {self.dtype.name}")
        if tuple(fields.get("shape", shape)) != shape:
            raise Rejected("shape", f"shape is {fields['shape']!r:.80}; expected {list(shape)}")
        if len(fields["x"]) != (expected := math.prod(shape) * self.dtype.itemsize):
            raise Rejected("shape", f"x has {len(fields['x'])} bytes; expected {expected}")
        return np.frombuffer(fields["x"], self.dtype.newbyteorder("<")).astype(self.dtype, copy=False).reshape(shape)

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

    def _check(self, decoded: DecodedRecord) -> None:
        """Reject samples with values that are not finite or too large, and samples with invalid labels."""
        if self.dtype.kind == "f":
            finite = np.isfinite(decoded.x).reshape(len(decoded), -1).all(axis=1)
            for index in np.flatnonzero(~finite).tolist():
                decoded.rejected[index] = Rejected("nonfinite", "x has a value that is not finite")
        if self.dtype == np.float64 or self.max_magnitude < FLOAT32_MAX:
            # models compute in float32: there the value would be infinite, perhaps only after the division by input.scale
            too_large = (np.abs(decoded.x, dtype=np.float64) > self.max_magnitude).reshape(len(decoded), -1).any(axis=1)
            for index in np.flatnonzero(too_large).tolist():
                why = f"x has a value that is too large for float32: expected at most {self.max_magnitude:.3g}"
                decoded.rejected.setdefault(index, Rejected("nonfinite", why))
        for index, label in enumerate(decoded.y):
            if label is None:
                decoded.rejected[index] = Rejected("missing_label", "no label")
            elif type(label) is not int and type(label) is not str:
                decoded.rejected[index] = Rejected("schema", f"y is {label!r:.80}; expected an integer or a string")
            elif (too_long := _check_length("y", label)) is not None:
                decoded.rejected[index] = too_long


def _check_task(fields: dict[str, Any], record: Record) -> None:
    if fields.get("task", record.topic) != record.topic:
        raise Rejected("unknown_task", f"task is {fields['task']!r:.80}; expected {record.topic!r}, the topic's name")


def _check_length(name: str, label: Label) -> Rejected | None:
    """Return the rejection of a label that is too long, or None."""
    if isinstance(label, int) or (size := len(label.encode(errors="surrogatepass"))) <= MAX_LABEL_BYTES:
        return None
    return Rejected(
        "schema", f"{name} is a string of {size} bytes, {label[:20]!r}...; expected at most {MAX_LABEL_BYTES}"
    )


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0
