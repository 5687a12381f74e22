"""Convert text to word ids: split a question and its story into rows of words, and give each word an id.

Row 0 is the question, row 1 the newest sentence of the story, row 2 the sentence before it, and so on. So the sentence that
is nearest to the question has the same row in every story. Id 0 is padding, 1 an unknown word, and 2 the first word.
"""

from __future__ import annotations

import re
import unicodedata
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from streamlearn.core.samples import CODEC_VERSION, FIRST_WORD_ID, PADDING_ID, UNKNOWN_ID, Rejected

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Rows = list[list[str]]

MAX_WORD_LENGTH = 64  # longer runs of letters are unlikely to be words, and the vocabulary would keep them for ever

WORD = re.compile(r"[^\W_]+")
MARK_RANGES = (range(0x20000), range(0xE0000, 0xE0200))  # code points among which Unicode has combining marks


class Vocabulary:
    """Maps words to ids. It is append-only: an id never changes, so samples that are stored as ids keep their meaning.

    Words of probes take no id. A word that only probes contain so far is stored as a negative number, -1 minus its index
    among these words, until a trained text contains it.
    """

    def __init__(self, words: Sequence[str], size: int, probe_words: Sequence[str] = ()) -> None:
        self.size = size
        self.full = False  # whether a new word got no id, because all ids were taken
        self._ids = {word: FIRST_WORD_ID + index for index, word in enumerate(words)}
        self._probe_ids = {word: -1 - index for index, word in enumerate(probe_words)}

    def add_probe_words(self, rows: Rows) -> list[str]:
        """Give the unknown words of a held-out text negative numbers, as long as ids are free; return the new words."""
        new: list[str] = []
        for word in (word for row in rows for word in row if len(word) <= MAX_WORD_LENGTH):
            has_room = len(self._ids) < self.size and len(self._probe_ids) < self.size
            if has_room and word not in self._ids and word not in self._probe_ids:
                self._probe_ids[word] = -1 - len(self._probe_ids)
                new.append(word)
        return new

    def add_words(self, rows: Rows) -> list[str]:
        """Give the new words of a text ids, as long as ids are free; return the new words in reading order."""
        new = []
        for row in (*reversed(rows[1:]), rows[0]):
            for word in row:
                if word in self._ids or len(word) > MAX_WORD_LENGTH:
                    continue
                if len(self._ids) == self.size:
                    self.full = True
                    continue
                self._ids[word] = FIRST_WORD_ID + len(self._ids)
                new.append(word)
        return new

    def encode(self, rows: Rows, shape: Sequence[int], *, held_out: bool = False) -> np.ndarray:
        """Return the ids of a text, `[1 + sentences, words]`; for a held-out text with the negative numbers of probe words."""
        ids = np.full(shape, PADDING_ID, np.int32)
        probe_ids = self._probe_ids if held_out else {}
        for index, row in enumerate(rows):
            ids[index, : len(row)] = [self._ids.get(word, probe_ids.get(word, UNKNOWN_ID)) for word in row]
        return ids


def parse_text(tree: Mapping[str, Any], sentences: int, words: int, version: int = CODEC_VERSION) -> Rows:
    """Return the words of a text in lower case: the question, then the newest `sentences` of its story, newest first.

    Older sentences, and sentences without a word, are left out. Raises `Rejected` if the fields are invalid, or if a row has
    more than `words` words.
    """
    question, story = tree.get("question"), tree.get("story")
    if not isinstance(question, str) or not (question_words := split_words(question, version)):
        raise Rejected("schema", f"question is {question!r:.80}; expected a string with a word in it")
    if not isinstance(story, list) or not all(isinstance(sentence, str) for sentence in story):
        raise Rejected("schema", f"story is {story!r:.80}; expected a list of strings")
    rows = [question_words]
    for sentence in reversed(story):
        if len(rows) > sentences:
            break
        if row := split_words(sentence, version):
            rows.append(row)
    if (longest := max(map(len, rows))) > words:
        raise Rejected("shape", f"a sentence has {longest} words; expected at most {words}")
    return rows


def split_words(text: str, version: int = CODEC_VERSION) -> list[str]:
    """Return the words of a text in lower case: runs of letters and digits with their marks, in Unicode's form NFC.

    These are Unicode's word characters (UTS 18, annex C) without the underscore. Version 1 splits words at combining marks.
    """
    if version == 1 or text.isascii():
        return WORD.findall(text.lower())
    return _marked_word().findall(unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).lower()))


@cache
def _marked_word() -> re.Pattern[str]:
    """Return the pattern of a word that may contain marks, and joiners before a letter; the standard word class has neither."""
    marks = "".join(chr(code) for codes in MARK_RANGES for code in codes if unicodedata.category(chr(code))[0] == "M")
    return re.compile(rf"[^\W_](?:[^\W_]|[{marks}]|[\u200c\u200d](?=[^\W_]))*")


def fingerprint(rows: Rows) -> np.ndarray:
    """Return bytes that are equal if and only if two texts have the same words in the same rows."""
    return np.frombuffer("\n".join(map(" ".join, rows)).encode(), np.uint8)
