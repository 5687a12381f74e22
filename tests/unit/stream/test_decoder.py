"""Tests of the decoder of records: each fault has its reason, and decoding never raises."""

from __future__ import annotations

from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from streamlearn.core.config import TextInputConfig
from streamlearn.core.samples import REJECT_REASONS
from streamlearn.stream.codecs.registry import CODECS
from streamlearn.stream.decoder import RecordDecoder
from streamlearn.stream.holdout import HoldOut
from streamlearn.stream.logs.base import CONTENT_TYPE, Record

labels = st.one_of(st.integers(-(2**62), 2**62), st.text(max_size=8))


def record(value: bytes | None, codec: str | None = None) -> Record:
    """Return a record with a value, and a content type if a codec is given."""
    headers = () if codec is None else ((CONTENT_TYPE, CODECS[codec].content_type),)
    return Record("t", 0, 0, 0.0, None, value, headers)


@given(x=arrays(np.uint8, (2, 3)), y=labels, codec=st.sampled_from(["json", "msgpack"]))
def test_an_encoded_sample_is_decoded(x: np.ndarray, y: Any, codec: str) -> None:
    """Shape, dtype, all values and the label are unchanged."""
    decoded = RecordDecoder([2, 3], "uint8", "json", 1 << 20).decode(record(CODECS[codec].encode(x[None], [y]), codec))
    assert (decoded.rejected, decoded.y) == ({}, [y])
    np.testing.assert_array_equal(decoded.x[0], x)


@given(n=st.integers(1, 5), data=st.data(), dtype=st.sampled_from(["float32", "float64", "int16", "uint8"]))
def test_an_encoded_batch_is_decoded(n: int, data: st.DataObject, dtype: str) -> None:
    """Batch records of any dtype, label type and byte order are decoded unchanged."""
    elements = st.floats(-1000, 1000, width=32) if "float" in dtype else None
    x = data.draw(arrays(np.dtype(dtype), (n, 3), elements=elements))
    y = data.draw(st.lists(labels, min_size=n, max_size=n))
    if all(isinstance(label, int) for label in y):
        y = [label % 2**62 for label in y]
    big_endian = x.astype(x.dtype.newbyteorder(">"))
    decoded = RecordDecoder([3], dtype, "json", 1 << 20).decode(record(CODECS["batch"].encode(big_endian, y), "batch"))
    assert (decoded.rejected, decoded.y) == ({}, y)
    np.testing.assert_array_equal(decoded.x, x)


@given(value=st.one_of(st.none(), st.binary(max_size=200)), codec=st.sampled_from([None, "json", "msgpack", "batch"]))
def test_random_bytes_are_rejected_and_never_raise(value: bytes | None, codec: str | None) -> None:
    """Any bytes give one rejected sample with a known reason."""
    decoded = RecordDecoder([4], "float32", "json", 100).decode(record(value, codec))
    assert len(decoded) == 1
    assert decoded.rejected[0].reason in REJECT_REASONS


trees = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-(2**40), 2**40), st.floats(), st.text(max_size=5), st.binary(max_size=9)
    ),
    lambda inner: st.lists(inner, max_size=4),
    max_leaves=8,
)


@given(tree=st.fixed_dictionaries({"x": trees, "y": trees}, optional={"dtype": trees, "shape": trees, "task": trees}),
       codec=st.sampled_from(["msgpack", "batch"]))  # fmt: skip
def test_malformed_trees_never_raise(tree: dict[str, Any], codec: str) -> None:
    """Valid MessagePack with any content gives samples or rejections, never an exception."""
    decoded = RecordDecoder([2], "float32", "json", 1 << 20).decode(record(msgpack.packb(tree), codec))
    assert all(rejected.reason in REJECT_REASONS for rejected in decoded.rejected.values())
    assert decoded.x.shape == (len(decoded), 2)


def test_invalid_shapes_and_nested_labels_are_rejected() -> None:
    """A shape that is not a list, a count that is not an integer and a deeply nested label reject one sample each."""
    decoder = RecordDecoder([1], "float32", "json", 1 << 20)
    data = b"\0" * 4
    shapes: list[Any] = [4, None, [1.0], [True], "x", [[1]]]
    values = [("msgpack", msgpack.packb({"x": data, "y": 1, "shape": shape})) for shape in shapes[:1] + shapes[4:]]
    values += [
        ("batch", msgpack.packb({"x": data, "y": [1], "shape": shape})) for shape in ([1, 1.5], [1, "x"], [None, 1], 3)
    ]
    values.append(("json", b'{"x": [1], "y": ' + b"[" * 900 + b"]" * 900 + b"}"))
    for name, value in values:
        assert set(decoder.decode(record(value, name)).rejected) == {0}, value


CASES = [
    (b"{", "decode"), (b"[]", "schema"), (b'{"y": 1}', "schema"), (b'{"x": [1, 2]}', "missing_label"),
    (b'{"x": [1], "y": 1}', "shape"), (b'{"x": [[1], [2, 3]], "y": 1}', "shape"), (b'{"x": [1, "a"], "y": 1}', "schema"),
    (b'{"x": [1, 2], "y": true}', "schema"), (b'{"x": [1, 1e300], "y": 1}', "nonfinite"),
    (b'{"x": [1, 2], "y": 1, "task": "other"}', "unknown_task"), (b'{"x": [1, 2], "y": 1}' + b" " * 300, "oversize"),
]  # fmt: skip


@pytest.mark.parametrize(("value", "reason"), CASES)
def test_each_fault_has_its_reason(value: bytes, reason: str) -> None:
    """An invalid record is rejected with the reason of its fault."""
    decoded = RecordDecoder([2], "float32", "json", 256).decode(record(value))
    assert decoded.rejected[0].reason == reason


def test_a_field_named_codec_belongs_to_the_user() -> None:
    """A record's own field `codec` is a field like any other: it changes nothing, and the message names it."""
    decoder = RecordDecoder([2], "float32", "json", 256)
    assert decoder.decode(record(b'{"x": [1, 2], "y": 1, "codec": "batch"}')).rejected == {}
    rejected = decoder.decode(record(b'{"codec": "h264", "y": 1}')).rejected[0]
    assert (rejected.reason, str(rejected)) == ("schema", "no field x; found 'codec', 'y'")


def test_an_integer_out_of_range_is_rejected() -> None:
    """A value that the dtype cannot hold is rejected; it does not wrap around."""
    decoded = RecordDecoder([2], "uint8", "json", 256).decode(record(b'{"x": [1, 256], "y": 1}'))
    assert decoded.rejected[0].reason == "schema"


@given(x=arrays(np.float32, 4, elements=st.floats(-9, 9, width=32)), y=st.integers(0, 9), fraction=st.floats(0, 0.99))
def test_hold_out_is_the_same_in_every_codec(x: np.ndarray, y: int, fraction: float) -> None:
    """Only the decoded value decides the hold-out; a sample that is held out stays so with a larger fraction."""
    decoder, hold_out = RecordDecoder([4], "float32", "json", 1 << 20), HoldOut("value", fraction)
    fates = set()
    for name in CODECS:
        value = CODECS[name].encode(x[None], [y])
        decoded = decoder.decode(record(value, name))
        fates.add(hold_out.is_held_out(decoded.x[0], decoded.y[0], None))
    assert len(fates) == 1
    assert not fates.pop() or HoldOut("value", min(fraction + 0.005, 0.999)).is_held_out(x, y, None)


def test_a_value_too_large_for_float32_rejects_its_sample() -> None:
    """Models compute in float32: a value that only float64 can hold rejects its sample, not the whole batch."""
    decoder = RecordDecoder([2], "float64", "json", 1 << 20)
    x = np.array([[1.0, 2.0], [1e39, 0.0], [0.0, -1e300], [3.4e38, -3.4e38], [np.inf, 1e39]])
    decoded = decoder.decode(record(CODECS["batch"].encode(x, [0, 1, 2, 3, 4]), "batch"))
    assert {index: rejected.reason for index, rejected in decoded.rejected.items()} == dict.fromkeys(
        (1, 2, 4), "nonfinite"
    )
    assert "too large for float32" in str(decoded.rejected[1])
    assert "not finite" in str(decoded.rejected[4])
    assert decoder.decode(record(b'{"x": [1e39, 0], "y": 1}')).rejected[0].reason == "nonfinite"


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity"])
def test_a_nonfinite_json_number_has_its_own_reason(word: str) -> None:
    """JSON has no such number, but many programs write it: the reason is nonfinite, not decode."""
    decoder = RecordDecoder([2], "float32", "json", 1 << 20)
    expected = {
        '{"x": [%s, 1], "y": 1}': "nonfinite",
        '{"x": [0, 1], "y": %s}': "schema",
        '{"x": [0, %s]}': "missing_label",
        '{"x": [0, 1], "y": "%s"': "decode",
        '{"x": [0, 1,], "y": "%s"}': "decode",
        '{"x": [0, %s], "y": 1': "decode",
        "%s": "schema",
    }
    found = {text: decoder.decode(record((text % word).encode())).rejected[0].reason for text in expected}
    assert found == expected


def test_a_label_has_at_most_256_bytes() -> None:
    """A longer label rejects its sample, in every codec and as an answer: all checkpoints and status pages contain labels."""
    decoder = RecordDecoder([1], "float32", "json", 1 << 20)
    fits, long = "\u00e9" * 128, "\u00e9" * 128 + "a"
    x = np.zeros((3, 1), np.float32)
    decoded = decoder.decode(record(CODECS["batch"].encode(x, [fits, long, "a"]), "batch"))
    assert {index: rejected.reason for index, rejected in decoded.rejected.items()} == {1: "schema"}
    assert "a string of 257 bytes" in str(decoded.rejected[1])
    assert decoder.decode(record(CODECS["json"].encode(x[:1], [long]), "json")).rejected[0].reason == "schema"
    text_decoder = RecordDecoder(
        [3, 4], "int32", "json", 1 << 20, TextInputConfig(kind="text", sentences=2, words=4, vocabulary=9)
    )
    for answer, bad in ((fits, False), (long, True)):
        value = CODECS["json"].encode_text({"story": [], "question": "who"}, answer)
        assert bool(text_decoder.decode(record(value)).rejected) == bad


@pytest.mark.parametrize("dtype", ["float32", "float64", "int64"])
def test_a_value_too_large_after_scaling_rejects_its_sample(dtype: str) -> None:
    """The model sees `x / scale`: a scale below 1 makes smaller values too large. The rest of the batch is accepted."""
    decoder = RecordDecoder([2], dtype, "json", 1 << 20, scale=1e-25)
    x = np.array([[1, 2], [1e15, 0], [3, -1e15]]).astype(dtype)
    decoded = decoder.decode(record(CODECS["batch"].encode(x, [0, 1, 2]), "batch"))
    assert {index: rejected.reason for index, rejected in decoded.rejected.items()} == {1: "nonfinite", 2: "nonfinite"}
    assert "expected at most 3.4e+13" in str(decoded.rejected[1])
    with np.errstate(over="ignore"):
        fine = np.isfinite(x.astype(np.float32) / np.float32(1e-25)).all(axis=1)
    assert fine.tolist() == [True, False, False]
