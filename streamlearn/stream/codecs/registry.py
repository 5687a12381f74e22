"""The codecs by name. To add a codec, write its file and add a line to `CODECS`.

The configuration imports this module, so a codec imports numpy only when it is called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from streamlearn.stream.codecs.batch import BatchCodec
from streamlearn.stream.codecs.json import JsonCodec
from streamlearn.stream.codecs.msgpack import MsgpackCodec

if TYPE_CHECKING:
    from streamlearn.stream.codecs.base import Codec

CODECS: dict[str, Codec] = {
    codec.name: codec
    for codec in (
        JsonCodec(),
        MsgpackCodec(),
        BatchCodec(),
    )
}
TEXT_CODECS = [codec.name for codec in CODECS.values() if codec.holds_text]

if TYPE_CHECKING:
    CodecName = str
else:
    CodecName = Literal[tuple(CODECS)]  # the type of a configuration key or an option that accepts each codec


def find_codec(content_type: bytes) -> Codec | None:
    """Return the codec of a content type, whatever its upper and lower case and its parameters; None if there is none."""
    essence = content_type.split(b";")[0].strip().lower()
    return next((codec for codec in CODECS.values() if codec.content_type == essence), None)


def record_subset(value: bytes, indices: list[int], samples: int, content_type: bytes | None) -> bytes:
    """Return a record of many samples with only those at these indices.

    If the content type names no codec that holds many samples, all such codecs are tried. Raises `ValueError` if `value` is
    not a record of so many `samples`.
    """
    named = None if content_type is None else find_codec(content_type)
    errors = []
    for codec in [named] if named is not None and named.holds_many else CODECS.values():
        try:
            return codec.subset(value, indices, samples)
        except ValueError as error:
            errors.append(str(error))
    raise ValueError("; ".join(errors))
