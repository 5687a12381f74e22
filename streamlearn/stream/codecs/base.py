"""What a codec is: the format of a record's value."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np

    from streamlearn.core.labels import Label


class Codec(ABC):
    """One format: it turns the bytes of a record into fields, and samples into bytes.

    A codec knows nothing of the configuration. `RecordDecoder` checks the fields, and makes arrays of the stream's shape and
    dtype of them.
    """

    name: ClassVar[str]
    """The value of `stream.codec` and of `produce --codec`."""

    content_type: ClassVar[bytes]
    """The value of the content-type header, in lower case and without parameters."""

    holds_many: ClassVar[bool] = False
    """Whether a record holds many samples. `encode` then gets many, and `subset` is needed to send some of them again."""

    holds_text: ClassVar[bool] = True
    """Whether a record can hold text: a story, a question and an answer. If so, `encode_text` is needed."""

    @abstractmethod
    def decode(self, value: bytes) -> Any:
        """Return the fields of a record as a dict; raises `ValueError` (or `Rejected`) for bytes in another format.

        Numbers: `x` and `y`, where `x` is nested lists, or bytes (little-endian, in C order) with `dtype` and `shape`.
        If the codec holds many samples, `x` is bytes, `shape` is a list that begins with their number N, and `y` is a list of N
        labels or the bytes of N int64. Text: `story`, `question` and `answer`. Always optional: `task`, the topic's name.
        What else is in the fields is ignored, and a result that is not a dict is rejected.
        """

    @abstractmethod
    def encode(self, x: np.ndarray, y: Sequence[Label]) -> bytes:
        """Return the bytes of samples `x [n, ...]` with n labels; n is 1 if a record holds one sample."""

    def encode_text(self, text: Mapping[str, Any], answer: Label) -> bytes:
        """Return the bytes of a text sample: the `story` and `question` of `text`, and the answer."""
        raise ValueError(f"a {self.name} record is for numbers, not for {len(text)} fields of text with {answer!r:.20}")

    def subset(self, value: bytes, indices: Sequence[int], samples: int) -> bytes:
        """Return a record with only the samples at these indices, bit by bit unchanged, and all its other fields.

        Raises `ValueError` if `value` is not a record of so many `samples`.
        """
        raise ValueError(
            f"a {self.name} record of {len(value)} bytes holds one sample, not {samples} with {indices!r:.20}"
        )
