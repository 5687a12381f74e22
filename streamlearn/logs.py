"""Log lines: one JSON object each, or plain text on a terminal. Record values are never logged."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime

FIELDS = ("command", "topic", "partition", "offset", "task", "step", "checkpoint", "trigger")


def printable(text: str) -> str:
    """Return text as one line that a terminal may show: line breaks and other control characters are escaped.

    Labels, topics and messages come from outside. An escape sequence in one would change the reader's terminal, and a
    line break would forge a line.
    """
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def printable_lines(text: str) -> str:
    """Return text whose line breaks are meant, as a terminal may show it."""
    return "\n".join(map(printable, text.split("\n")))


class TextFormatter(logging.Formatter):
    """One line for people, and below it a traceback where there is one."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the standard library's name
        return printable(super().formatMessage(record))

    def format(self, record: logging.LogRecord) -> str:
        return printable_lines(super().format(record))


class JsonFormatter(logging.Formatter):
    """`{"ts": ..., "level": ..., "logger": ..., "msg": ..., ...}`."""

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
    """Send log lines to stderr; `auto` is text on a terminal and JSON otherwise."""
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
    """Keep the client's own lines and tracebacks to who listens for the cause: what matters our checks say in one line."""
    kafka = logging.getLogger("kafka")
    kafka.setLevel(logging.ERROR)
    kafka.propagate = False
    kafka.addHandler(logging.NullHandler())  # or the last resort prints them
