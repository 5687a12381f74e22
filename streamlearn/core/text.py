"""Text that users write: names of topics and their order, and numbers."""

from __future__ import annotations

import re

TOPIC_NAME = re.compile(r"(?!\.{1,2}$)[a-zA-Z0-9._-]{1,249}")
"""A whole topic name that Kafka accepts."""

INTEGER = re.compile(r"0|-?[1-9][0-9]*")
"""A whole text that is an integer in its usual form: 007 and +7 are not."""


def parse_digits(text: str | bytes, max_digits: int) -> int | None:
    """Return a number that is written with at most `max_digits` of the digits 0 to 9 alone, or None for other text."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= max_digits else None


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Return a sort key that compares the digits 0 to 9 as numbers: `task-2` comes before `task-10`."""
    # every second part is a number; of two numbers, the one with fewer digits is smaller
    parts = re.split(r"([0-9]+)", name)
    parts[1::2] = [digits.lstrip("0") for digits in parts[1::2]]
    return [(n % 2, len(part) if n % 2 else 0, part) for n, part in enumerate(parts)]
