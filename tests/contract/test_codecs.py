"""The contract of every codec. The tests find a codec by themselves, from the table and from the files of the package."""

from __future__ import annotations

import importlib
import json
import pkgutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from streamlearn.config.loader import load
from streamlearn.core.config import TextInputConfig
from streamlearn.core.errors import StreamlearnError
from streamlearn.core.samples import REJECT_REASONS
from streamlearn.learning.strategies.recipes import RECIPES
from streamlearn.stream import codecs
from streamlearn.stream.codecs.base import Codec
from streamlearn.stream.codecs.registry import CODECS, find_codec, record_subset
from streamlearn.stream.codecs.text import split_words
from streamlearn.stream.decoder import RecordDecoder
from streamlearn.stream.logs.base import CONTENT_TYPE, Headers, Record
from streamlearn.stream.logs.memory import MemoryStore
from streamlearn.tools import producer

ROOT = Path(__file__).parents[2]
LIMIT = 1 << 20
TEXT = TextInputConfig(kind="text", sentences=3, words=5, vocabulary=9)
STORY = {"story": ["Mary went home."], "question": "Where is Mary?"}

every_codec = pytest.mark.parametrize("codec", CODECS.values(), ids=list(CODECS))
labels = st.one_of(st.integers(-(2**62), 2**62), st.text(max_size=8))
words = st.lists(st.text("ab1", min_size=1, max_size=3), min_size=1, max_size=5).map(" ".join)


def record(value: bytes, codec: Codec, content_type: bytes | None = None) -> Record:
    """Return a record with a value of a codec, and with its content type unless another one is given."""
    headers: Headers = ((CONTENT_TYPE, content_type or codec.content_type),)
    return Record("t", 0, 0, 0.0, None, value, headers)


def other_than(codec: Codec) -> str:
    """Return the name of another codec."""
    return next(name for name in CODECS if name != codec.name)


def configuration(tmp_path: Path, codec: Codec, **change: Any) -> Any:
    """Return a configuration whose stream has this codec."""
    tree = {"name": "a", "stream": {"topics": ["t"], "codec": codec.name}, "input": {"shape": [4]}, "classes": 2}
    path = tmp_path / "a.yaml"
    path.write_text(json.dumps({**tree, **change}))
    return load(path, RECIPES, {})


def test_every_codec_is_in_the_table() -> None:
    """A class in a file of the package is in the table under its name, with a content type of its own."""
    modules = [
        importlib.import_module(f"{codecs.__name__}.{info.name}") for info in pkgutil.iter_modules(codecs.__path__)
    ]
    found = {value for module in modules for value in vars(module).values() if isinstance(value, type)}
    classes = {kind for kind in found if issubclass(kind, Codec) and kind is not Codec}
    assert classes == {type(codec) for codec in CODECS.values()}
    assert all(name == codec.name for name, codec in CODECS.items())
    assert len({codec.content_type for codec in CODECS.values()}) == len(CODECS)


@every_codec
@given(data=st.data(), dtype=st.sampled_from(["float32", "float64", "int16", "uint8"]))
def test_samples_are_decoded_unchanged(codec: Codec, data: st.DataObject, dtype: str) -> None:
    """Shape, dtype, values and labels come back as they were, from arrays of either byte order."""
    n = data.draw(st.integers(1, 4)) if codec.holds_many else 1
    elements = st.floats(-1000, 1000, width=32) if "float" in dtype else None
    x = data.draw(arrays(np.dtype(dtype), (n, 2, 3), elements=elements))
    y = data.draw(st.lists(labels, min_size=n, max_size=n))
    decoder = RecordDecoder([2, 3], dtype, other_than(codec), LIMIT)
    for same in (x, x.astype(x.dtype.newbyteorder("S"))):
        decoded = decoder.decode(record(codec.encode(same, y), codec))
        assert (decoded.rejected, decoded.y, decoded.x.dtype) == ({}, y, np.dtype(dtype))
        np.testing.assert_array_equal(decoded.x, x)


@every_codec
@given(story=st.lists(words, max_size=3), question=words, answer=st.text(min_size=1, max_size=9))
def test_text_is_decoded_unchanged_or_rejected(codec: Codec, story: list[str], question: str, answer: str) -> None:
    """A codec that holds text gives its words back; another one refuses to write it, and its records are rejected."""
    text = {"story": story, "question": question}
    decoder = RecordDecoder(TEXT.shape, TEXT.dtype, other_than(codec), LIMIT, TEXT)
    if codec.holds_text:
        decoded = decoder.decode(record(codec.encode_text(text, answer), codec))
        assert (decoded.rejected, decoded.y) == ({}, [answer])
        assert decoded.text[0] == [split_words(question), *[split_words(sentence) for sentence in story[::-1]]]
    else:
        with pytest.raises(ValueError, match="is for numbers"):
            codec.encode_text(text, answer)
        rejected = decoder.decode(record(codec.encode(np.zeros((1, *TEXT.shape), np.int32), [1]), codec)).rejected[0]
        assert (rejected.reason, "is for numbers" in str(rejected)) == ("schema", True)


@every_codec
@given(data=st.data())
def test_bad_bytes_are_rejected_with_one_line(codec: Codec, data: st.DataObject) -> None:
    """Random, cut and changed bytes never raise: they give samples, or reasons with one line each."""
    good = codec.encode(data.draw(arrays(np.float32, (1, 4))), [data.draw(labels)])
    at = data.draw(st.integers(0, len(good) - 1))
    bad = [data.draw(st.binary(max_size=200)), good[:at], good[:at] + data.draw(st.binary(max_size=4)) + good[at + 1 :]]
    for value in (*bad, b"", b"\n", b"[" * 5000, b"\x91" * 5000):
        for text in (None, TEXT):
            shape = [4] if text is None else text.shape
            decoded = RecordDecoder(shape, "float32", other_than(codec), LIMIT, text).decode(record(value, codec))
            assert decoded.x.shape == (len(decoded), *shape)
            assert len(decoded) >= 1
            for rejected in decoded.rejected.values():
                assert rejected.reason in REJECT_REASONS
                assert len(str(rejected).splitlines()) == 1


@every_codec
def test_the_content_type_selects_the_codec(codec: Codec) -> None:
    """Upper and lower case, parameters and the configured codec do not matter; without a header, the configured codec does."""
    value = codec.encode(np.ones((1, 4), np.float32), ["a"])
    other = RecordDecoder([4], "float32", other_than(codec), LIMIT)
    for content_type in (codec.content_type, codec.content_type.upper() + b" ; charset=utf-8"):
        assert find_codec(content_type) is codec
        assert other.decode(record(value, codec, content_type)).y == ["a"]
    plain = Record("t", 0, 0, 0.0, None, value)
    assert RecordDecoder([4], "float32", codec.name, LIMIT).decode(plain).y == ["a"]


@every_codec
def test_produce_writes_what_the_decoder_reads(codec: Codec) -> None:
    """Published records have the content type; text is refused by a codec that cannot hold it."""
    store = MemoryStore()
    samples = producer.Samples(np.arange(20, dtype=np.float32).reshape(5, 4), [0, 1, 2, 3, 4])
    options = producer.PublishOptions(codec.name, samples_per_record=3, markers=False)
    producer.publish(store, "t", samples, options)
    records = store.records["t", 0]
    assert len(records) == (2 if codec.holds_many else 5)
    decoder = RecordDecoder([4], "float32", other_than(codec), LIMIT)
    assert [label for found in records for label in decoder.decode(found).y] == samples.y
    text = producer.Samples(np.array([STORY], object), ["home"])
    if codec.holds_text:
        producer.publish(store, "u", text, options)
    else:
        with pytest.raises(StreamlearnError, match=f"codec {codec.name} is for numbers"):
            producer.publish(store, "u", text, options)


@every_codec
def test_some_samples_of_a_record_can_be_sent_again(codec: Codec) -> None:
    """Of a record with many samples the chosen ones remain; a record with one sample, or another count, is refused."""
    n = 3 if codec.holds_many else 1
    x = np.arange(4 * n, dtype=np.float32).reshape(n, 4)
    value = codec.encode(x, list(range(n)))
    if not codec.holds_many:
        with pytest.raises(ValueError, match="holds one sample"):
            codec.subset(value, [0], 2)
        return
    for content_type in (codec.content_type, None):
        decoded = RecordDecoder([4], "float32", codec.name, LIMIT).decode(
            record(record_subset(value, [0, 2], n, content_type), codec)
        )
        assert (decoded.rejected, decoded.y) == ({}, [0, 2])
        np.testing.assert_array_equal(decoded.x, x[[0, 2]])
    with pytest.raises(ValueError, match=r".+"):
        codec.subset(value, [0], n + 1)


@every_codec
def test_the_configuration_accepts_the_codec(codec: Codec, tmp_path: Path) -> None:
    """The key takes every name; with text it takes those that hold text, and the message lists them."""
    assert configuration(tmp_path, codec).stream.codec == codec.name
    text = {
        "input": {"kind": "text", "sentences": 3, "words": 5, "vocabulary": 9},
        "model": "memnet",
        "strategy": "naive",
    }
    if codec.holds_text:
        assert configuration(tmp_path, codec, **text).stream.codec == codec.name
    else:
        with pytest.raises(StreamlearnError, match=rf"stream\.codec {codec.name} contains numbers.*accepted: json"):
            configuration(tmp_path, codec, **text)


@every_codec
def test_the_manual_names_the_content_type(codec: Codec) -> None:
    """docs/configure.md has a row for the content type."""
    assert f"| `{codec.content_type.decode()}` |" in (ROOT / "docs/configure.md").read_text()
