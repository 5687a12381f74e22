"""The format of log lines: one JSON object each, or plain text on a terminal. Values of records are never logged."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

FIELDS = ("command", "topic", "partition", "offset", "task", "step", "checkpoint", "trigger")


def printable(text: str) -> str:
    """Return text as one line that is safe on a terminal: line breaks and other control characters are escaped.

    Labels, topics and messages come from outside. An escape sequence in one of them would change the terminal, and a line
    break would forge a log line.
    """
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def printable_lines(text: str) -> str:
    """Return text of several lines that is safe on a terminal; only its line breaks are kept."""
    return "\n".join(map(printable, text.split("\n")))


def format_outcomes(topics: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Return one line for each topic of a status: the samples consumed, as the sum of their outcomes."""
    return [
        f"{topic}: {count['consumed']} samples = "
        + " + ".join(f"{number} {kind.replace('_', ' ')}" for kind, number in count.items() if kind != "consumed")
        for topic, count in topics.items()
    ]


class TextFormatter(logging.Formatter):
    """Formats a record as one line of plain text, with a traceback below it if there is one."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the standard library's name
        return printable(super().formatMessage(record))

    def format(self, record: logging.LogRecord) -> str:
        return printable_lines(super().format(record))


class JsonFormatter(logging.Formatter):
    """Formats a record as a JSON object: `ts`, `level`, `logger`, `msg`, the `FIELDS` that it has, and the error if any."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "ts": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "msg": record.getMessage(),
        }
        line |= {field: getattr(record, field) for field in FIELDS if hasattr(record, field)}
        if record.exc_info and record.exc_info[0] is not None:
            line |= {"error.type": record.exc_info[0].__name__, "error.stack": self.formatException(record.exc_info)}
        return json.dumps(line)


def set_up(level: str, style: str) -> None:
    """Write log lines to stderr. `style`: json, console, or auto (plain text on a terminal, otherwise JSON)."""
    handler = logging.StreamHandler(sys.stderr)
    if style == "json" or (style == "auto" and not sys.stderr.isatty()):
        handler.setFormatter(JsonFormatter())
    else:
        handler.setFormatter(TextFormatter("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for noisy in ("uvicorn", "asyncio", "httpx", "httpcore"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    quiet_kafka()


def quiet_kafka() -> None:
    """Keep kafka-python's lines and tracebacks out of the log: our own lines report a fault once.

    Its errors still reach a handler that somebody adds to the logger `kafka` to look for a cause.
    """
    kafka = logging.getLogger("kafka")
    kafka.setLevel(logging.ERROR)
    kafka.propagate = False
    kafka.addHandler(logging.NullHandler())  # otherwise logging's last-resort handler prints them
