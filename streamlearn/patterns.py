"""Regular expressions of users on names of anybody: a match takes limited time, and other threads run meanwhile."""

from __future__ import annotations

import logging
from functools import lru_cache

log = logging.getLogger(__name__)

MATCH_SECONDS = 1.0  # an ordinary pattern takes microseconds


def syntax_error(pattern: str) -> str | None:
    """Return why a text is no regular expression, or None."""
    import regex  # only where there is a pattern: most commands have none

    try:
        regex.compile(pattern)
    except regex.error as error:
        return str(error)
    return None


@lru_cache(maxsize=100_000)
def matches(pattern: str, name: str) -> bool:
    """Tell whether a pattern matches a whole name. One that takes too long does not match, and a warning says so once.

    Whoever may create a topic chooses its name, and a pattern such as `([a-z]+-?)+` backtracks for ever on some names.
    The interpreter's own `re` cannot be interrupted, and keeps every thread waiting.
    """
    import regex

    try:
        return regex.fullmatch(pattern, name, timeout=MATCH_SECONDS, concurrent=True) is not None
    except TimeoutError:
        log.warning(
            "stream.pattern %.60s backtracks for more than %.0f s on topic %.60s, which is left out: avoid a repetition "
            "inside a repetition",
            pattern,
            MATCH_SECONDS,
            ascii(name)[1:-1],
        )
        return False
