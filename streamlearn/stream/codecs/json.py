"""Codec `json`: easy for people to read and write.

Numbers   {"x": [...], "y": 3}
Text      {"story": ["...", ...], "question": "...", "answer": "..."}
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import orjson

from streamlearn.stream.codecs.base import Codec

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np

    from streamlearn.core.labels import Label

NOT_FINITE = (b"NaN", b"Infinity")  # JSON has no such numbers, but many programs write them


class JsonCodec(Codec):
    """JSON. NaN and Infinity are accepted, so that the sample is rejected for its value and not as invalid JSON."""

    name = "json"
    content_type = b"application/json"

    def decode(self, value: bytes) -> Any:
        try:
            return orjson.loads(value)
        except ValueError:
            if not any(word in value for word in NOT_FINITE):
                raise
            found: set[str] = set()

            def parse_constant(word: str) -> float:
                found.add(word)
                return math.nan

            fields = json.loads(value, parse_constant=parse_constant)
            if not found:  # the error has another cause: Python's parser only accepts more than orjson
                raise
            return fields

    def encode(self, x: np.ndarray, y: Sequence[Label]) -> bytes:
        return orjson.dumps({"x": x[0].tolist(), "y": y[0]})

    def encode_text(self, text: Mapping[str, Any], answer: Label) -> bytes:
        return orjson.dumps({"story": text["story"], "question": text["question"], "answer": answer})
