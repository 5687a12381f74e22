"""Match topic names against the user's regular expressions, within a time limit and without blocking other threads."""

from __future__ import annotations

import logging
from functools import lru_cache

logger = logging.getLogger(__name__)

MATCH_SECONDS = 1.0  # an ordinary match takes microseconds


def syntax_error(pattern: str) -> str | None:
    """Return what is wrong with a regular expression, or None if it is valid."""
    import regex  # imported late: most commands use no pattern

    try:
        regex.compile(pattern)
    except regex.error as error:
        return str(error)
    return None


@lru_cache(maxsize=100_000)
def matches(pattern: str, name: str) -> bool:
    """Return whether a pattern matches a whole name. A match that takes too long counts as no match, and is logged once.

    Anybody who may create a topic chooses its name, and a pattern such as `([a-z]+-?)+` takes exponential time on some
    names. Python's own `re` cannot be interrupted, and blocks all threads meanwhile.
    """
    import regex

    try:
        return regex.fullmatch(pattern, name, timeout=MATCH_SECONDS, concurrent=True) is not None
    except TimeoutError:
        logger.warning(
            "stream.pattern %.60s backtracks for more than %.0f s on topic %.60s, so the topic is ignored: do not put a "
            "repetition inside a repetition",
            pattern,
            MATCH_SECONDS,
            ascii(name)[1:-1],
        )
        return False
