"""Codec `batch`: MessagePack with many samples in a record, the fastest codec. For numbers only.

{"x": <bin>, "dtype": "uint8", "shape": [N, 28, 28], "y": <bin of int64> or [labels]}
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgpack

from streamlearn.stream.codecs.base import Codec
from streamlearn.stream.codecs.msgpack import pack_array, unpack

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from streamlearn.core.labels import Label


class BatchCodec(Codec):
    """MessagePack with many samples. Labels are bytes of int64 if all are integers, otherwise a list."""

    name = "batch"
    content_type = b"application/vnd.streamlearn.batch"
    holds_many = True
    holds_text = False

    def decode(self, value: bytes) -> Any:
        return unpack(value)

    def encode(self, x: np.ndarray, y: Sequence[Label]) -> bytes:
        import numpy as np

        labels: Any = y
        if all(type(label) is int for label in y):
            labels = np.asarray(y, "<i8").tobytes()
        return bytes(msgpack.packb({**pack_array(x), "y": labels}))

    def subset(self, value: bytes, indices: Sequence[int], samples: int) -> bytes:
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
