"""Tests of text records: how they are read, when they are rejected, and how words get ids."""

from __future__ import annotations

import unicodedata
from typing import Any

import msgpack
import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamlearn.core.config import TextInputConfig
from streamlearn.core.positions import Positions
from streamlearn.core.progress import Progress
from streamlearn.core.samples import FIRST_WORD_ID, PADDING_ID, REJECT_REASONS, UNKNOWN_ID
from streamlearn.stream.codecs.registry import CODECS
from streamlearn.stream.codecs.text import (
    MAX_WORD_LENGTH,
    Vocabulary,
    fingerprint,
    parse_text,
    split_words,
)
from streamlearn.stream.decoder import RecordDecoder
from streamlearn.stream.holdout import HoldOut
from streamlearn.stream.logs.base import CONTENT_TYPE, Record

SENTENCES, WORDS = 3, 5
DECODER = RecordDecoder(
    [1 + SENTENCES, WORDS], "int32", "json", 1 << 16,
    TextInputConfig(kind="text", sentences=SENTENCES, words=WORDS, vocabulary=9),
)  # fmt: skip

sentences = st.lists(st.text("ab1Ä", min_size=1, max_size=3), min_size=1, max_size=WORDS).map(" ".join)
rows = st.lists(st.lists(st.text("ab1", min_size=1, max_size=2), min_size=1, max_size=WORDS), min_size=1, max_size=4)


def record(value: bytes, codec: str | None = None) -> Record:
    """Return a record with a value, and a content type if a codec is given."""
    headers = () if codec is None else ((CONTENT_TYPE, CODECS[codec].content_type),)
    return Record("t", 0, 0, 0.0, None, value, headers)


@given(story=st.lists(sentences, max_size=6), question=sentences, answer=st.text(min_size=1, max_size=9),
       codec=st.sampled_from(["json", "msgpack"]))  # fmt: skip
def test_an_encoded_text_is_decoded(story: list[str], question: str, answer: str, codec: str) -> None:
    """The question comes first, then the newest sentences, newest first; the answer is the label, unchanged."""
    value = CODECS[codec].encode_text({"story": story, "question": question}, answer)
    decoded = DECODER.decode(record(value, codec))
    assert (decoded.rejected, decoded.y) == ({}, [answer])
    assert decoded.text[0] == [split_words(question), *[split_words(sentence) for sentence in story[::-1][:SENTENCES]]]


trees = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**40), 2**40), st.floats(), st.text(max_size=5), st.binary(max_size=9)),
    lambda inner: st.lists(inner, max_size=4),
    max_leaves=8,
)  # fmt: skip


@given(tree=st.fixed_dictionaries({}, optional=dict.fromkeys(("story", "question", "answer", "task", "x", "y"), trees)),
       codec=st.sampled_from(["msgpack", "batch"]))  # fmt: skip
def test_malformed_texts_never_raise(tree: dict[str, Any], codec: str) -> None:
    """Valid MessagePack with any content gives one sample or one rejection, never an exception."""
    decoded = DECODER.decode(record(msgpack.packb(tree), codec))
    assert all(rejected.reason in REJECT_REASONS for rejected in decoded.rejected.values())
    assert (len(decoded), decoded.x.shape) == (1, (1, 1 + SENTENCES, WORDS))
    assert set(decoded.rejected) | set(decoded.text) == {0}


@given(value=st.binary(max_size=100), codec=st.sampled_from([None, "json", "msgpack", "batch"]))
def test_random_bytes_are_rejected_and_never_raise(value: bytes, codec: str | None) -> None:
    """Any bytes give one rejected sample with a known reason."""
    assert DECODER.decode(record(value, codec)).rejected[0].reason in REJECT_REASONS


GOOD: dict[str, Any] = {"story": ["Mary went home."], "question": "Where is Mary?", "answer": "home"}
CASES: list[tuple[dict[str, Any], str, str]] = [
    ({"answer": None}, "missing_label", "no label: expected a field answer"),
    ({"answer": ""}, "missing_label", "no label"),
    ({"answer": ["a", "b"]}, "schema", r"answer is \['a', 'b'\]; expected a string"),
    ({"question": None}, "schema", "question is None; expected a string with a word in it"),
    ({"question": " ?"}, "schema", "question is"),
    ({"story": "Mary went home."}, "schema", "expected a list of strings"),
    ({"story": ["a", 1]}, "schema", "expected a list of strings"),
    ({"story": ["a b c d e f"]}, "shape", "a sentence has 6 words; expected at most 5"),
    ({"question": "a b c d e f?"}, "shape", "a sentence has 6 words"),
    ({"task": 1}, "unknown_task", "task is 1; expected 't', the topic's name"),
]


@pytest.mark.parametrize(("change", "reason", "message"), CASES)
def test_each_fault_has_its_reason(change: dict[str, Any], reason: str, message: str) -> None:
    """An invalid text is rejected with the reason of its fault and a message that says what was expected."""
    bad = DECODER.decode(record(orjson.dumps({**GOOD, **change}))).rejected[0]
    assert bad.reason == reason
    with pytest.raises(type(bad), match=message):
        raise bad


def test_old_and_empty_sentences_are_left_out() -> None:
    """Only the newest sentences that have a word are used: an old sentence that is too long rejects nothing."""
    story = ["a b c d e f g", "one", "...", "Two!", "three-3"]
    assert parse_text({"story": story, "question": "WHO?"}, SENTENCES, WORDS) == [
        ["who"],
        ["three", "3"],
        ["two"],
        ["one"],
    ]
    assert parse_text({"story": [], "question": "who"}, SENTENCES, WORDS) == [["who"]]


@given(texts=st.lists(rows, max_size=6), size=st.integers(1, 8), cut=st.integers(0, 6))
def test_word_ids_never_change(texts: list[list[list[str]]], size: int, cut: int) -> None:
    """A vocabulary that is restored from its words gives every word the same id as before."""
    words: list[str] = []
    whole = Vocabulary([], size)
    for text in texts:
        words += whole.add_words(text)
    assert len(words) == len(set(words)) <= size
    first = Vocabulary([], size)
    known = [word for text in texts[:cut] for word in first.add_words(text)]
    second = Vocabulary(known, size)
    for text in texts[cut:]:
        known += second.add_words(text)
    assert known == words
    for text in texts:
        x = whole.encode(text, (4, WORDS))
        np.testing.assert_array_equal(x, second.encode(text, (4, WORDS)))
        for row, ids in zip(text, x, strict=False):
            expected = [FIRST_WORD_ID + words.index(word) if word in words else UNKNOWN_ID for word in row]
            assert ids.tolist() == expected + [PADDING_ID] * (WORDS - len(row))


def test_words_get_ids_in_reading_order() -> None:
    """The story is read from its oldest sentence that is used, then the question; a word that is too long gets no id."""
    text = parse_text(
        {"story": ["Mary went.", "John " + "x" * (MAX_WORD_LENGTH + 1)], "question": "Where is Mary?"}, 3, 5
    )
    vocabulary = Vocabulary([], 5)
    assert vocabulary.add_words(text) == ["mary", "went", "john", "where", "is"]
    assert vocabulary.encode(text, (4, 5)).tolist()[:2] == [[5, 6, 2, 0, 0], [4, UNKNOWN_ID, 0, 0, 0]]
    assert not vocabulary.full
    assert vocabulary.add_words([["new"]]) == []
    assert vocabulary.full


@given(one=rows, other=rows)
def test_a_fingerprint_distinguishes_texts(one: list[list[str]], other: list[list[str]]) -> None:
    """Fingerprints are equal if and only if the words and their places are equal."""
    assert (fingerprint(one).tobytes() == fingerprint(other).tobytes()) == (one == other)


@given(story=st.lists(sentences, max_size=4), question=sentences, fraction=st.floats(0, 0.99))
def test_hold_out_depends_only_on_the_words(story: list[str], question: str, fraction: float) -> None:
    """The hold-out does not depend on the codec, on upper or lower case, or on the vocabulary."""
    hold_out, fates = HoldOut("value", fraction), set()
    for codec, tell in (("json", story), ("msgpack", [f"{sentence.upper()} ." for sentence in story])):
        decoded = DECODER.decode(record(CODECS[codec].encode_text({"story": tell, "question": question}, "a"), codec))
        fates.add(hold_out.is_held_out(decoded.hash_input(0), decoded.y[0], None))
        decoded.x[0] = 7
        fates.add(hold_out.is_held_out(decoded.hash_input(0), decoded.y[0], None))
    assert len(fates) == 1


def test_words_keep_their_marks() -> None:
    """Vowel signs, accents and joiners are part of their word in every script; canonically equal texts have equal words."""
    expected = {
        "नमस्ते, दुनिया!": ["नमस्ते", "दुनिया"],
        "தமிழ் மொழி": ["தமிழ்", "மொழி"],
        "שָׁלוֹם עולם": ["שָׁלוֹם", "עולם"],
        "Cafe\u0301 E\u0301TE\u0301": ["caf\u00e9", "\u00e9t\u00e9"],
        "Caf\u00e9 \u00c9T\u00c9": ["caf\u00e9", "\u00e9t\u00e9"],
        "می\u200cخواهم\u200c ": ["می\u200cخواهم"],  # noqa: RUF001 - Persian, with a joiner that keeps letters apart
        "\u0301 a_b don't x\u00b2 \u0663": ["a", "b", "don", "t", "x\u00b2", "\u0663"],
    }
    words = {text: split_words(text) for text in expected}
    assert words == {text: [unicodedata.normalize("NFC", word) for word in some] for text, some in expected.items()}


@given(text=st.text())
def test_equal_texts_have_equal_words(text: str) -> None:
    """A text in composed and in decomposed form has the same words, so its hold-out is the same."""
    forms = [split_words(unicodedata.normalize(form, text)) for form in ("NFC", "NFD")]
    assert forms[0] == forms[1]
    assert all(unicodedata.is_normalized("NFC", word) for word in forms[0])


@given(text=st.text(st.characters(max_codepoint=127)))
def test_ascii_text_has_the_words_of_version_1(text: str) -> None:
    """Text without combining marks is split as in version 1."""
    assert split_words(text) == split_words(text, 1)


def test_a_job_of_version_1_keeps_its_word_splitting() -> None:
    """A job that was started with version 1 still splits words at combining marks: its hold-out may not change."""
    assert split_words("नमस्ते Cafe\u0301", 1) == ["नमस", "त", "cafe"]
    old = RecordDecoder(DECODER.shape, "int32", "json", 1 << 16, DECODER.text, version=1)
    text = {"story": ["Cafe\u0301"], "question": "who"}
    value = CODECS["json"].encode_text(text, "me")
    assert (old.decode(record(value)).text[0][1], DECODER.decode(record(value)).text[0][1]) == (["cafe"], ["caf\u00e9"])
    tree = Progress().to_json()
    assert Progress.from_json(tree, Positions()).codec_version == 2
    del tree["codec"]
    assert Progress.from_json(tree, Positions()).codec_version == 1
