"""Text to token ids: a question and its story become rows of words, and words become ids in order of first appearance.

Row 0 is the question, row 1 the story's newest sentence, row 2 the one before it, and so on: what is nearest to the
question has the same place in every story. 0 is padding, 1 an unknown word, and the first word of a log is 2.
"""

from __future__ import annotations

import re
import unicodedata
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from streamlearn.data import CODEC_VERSION, Rejected

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Rows = list[list[str]]

PADDING_ID, UNKNOWN_ID, FIRST_WORD_ID = 0, 1, 2
MAX_WORD_LENGTH = 64  # what is longer is no word, and would be kept for ever

WORD = re.compile(r"[^\W_]+")
MARKS = (range(0x20000), range(0xE0000, 0xE0200))  # code points among which Unicode has combining marks


class Vocabulary:
    """Words to ids, append-only: an id never changes, so samples that are stored as ids keep their meaning.

    Words of probes take no id. A word that only probes contain so far is stored as a negative number, -1 less its place
    among such words, until a trained text contains it.
    """

    def __init__(self, words: Sequence[str], size: int, probe_words: Sequence[str] = ()) -> None:
        self.size = size
        self.full = False  # a word has found no room
        self._ids = {word: FIRST_WORD_ID + place for place, word in enumerate(words)}
        self._apart = {word: -1 - place for place, word in enumerate(probe_words)}

    def add_probe_words(self, rows: Rows) -> list[str]:
        """Give the unknown words of a held-out text numbers of their own, while ids have room; return the new ones."""
        new: list[str] = []
        for word in (word for row in rows for word in row if len(word) <= MAX_WORD_LENGTH):
            room = len(self._ids) < self.size and len(self._apart) < self.size
            if room and word not in self._ids and word not in self._apart:
                self._apart[word] = -1 - len(self._apart)
                new.append(word)
        return new

    def add_words(self, rows: Rows) -> list[str]:
        """Take in a text's new words, as far as there is room; return them in the order in which they are read."""
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
        """Return a text's ids, `[1 + sentences, words]`; of a held-out text, with the numbers of words set apart."""
        ids = np.full(shape, PADDING_ID, np.int32)
        apart = self._apart if held_out else {}
        for place, row in enumerate(rows):
            ids[place, : len(row)] = [self._ids.get(word, apart.get(word, UNKNOWN_ID)) for word in row]
        return ids


def parse_text(tree: Mapping[str, Any], sentences: int, words: int, version: int = CODEC_VERSION) -> Rows:
    """Return a text's words, lower-cased: the question, then the newest `sentences` of its story, the newest first.

    Older sentences are left out, and those without a word. Raises `Rejected` where it is no text, or a row is too long.
    """
    question, story = tree.get("question"), tree.get("story")
    if not isinstance(question, str) or not (asked := split_words(question, version)):
        raise Rejected("schema", f"question is {question!r:.80}; expected a string with a word in it")
    if not isinstance(story, list) or not all(isinstance(sentence, str) for sentence in story):
        raise Rejected("schema", f"story is {story!r:.80}; expected a list of strings")
    rows = [asked]
    for sentence in reversed(story):
        if len(rows) > sentences:
            break
        if row := split_words(sentence, version):
            rows.append(row)
    if (longest := max(map(len, rows))) > words:
        raise Rejected("shape", f"a sentence has {longest} words; expected at most {words}")
    return rows


def split_words(text: str, version: int = CODEC_VERSION) -> list[str]:
    """Return a text's words, lower-cased: runs of letters and digits with the marks on them, in Unicode's form NFC.

    These are Unicode's word characters (UTS 18, annex C) less the underscore. Version 1 cut words at combining marks.
    """
    if version == 1 or text.isascii():
        return WORD.findall(text.lower())
    return _marked_word().findall(unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).lower()))


@cache
def _marked_word() -> re.Pattern[str]:
    """Return the pattern of a word in which marks, and joiners before a letter, stand; Python's own class has neither."""
    marks = "".join(chr(code) for codes in MARKS for code in codes if unicodedata.category(chr(code))[0] == "M")
    return re.compile(rf"[^\W_](?:[^\W_]|[{marks}]|[\u200c\u200d](?=[^\W_]))*")


def fingerprint(rows: Rows) -> np.ndarray:
    """Return bytes that are equal exactly where two texts have the same words in the same places."""
    return np.frombuffer("\n".join(map(" ".join, rows)).encode(), np.uint8)
