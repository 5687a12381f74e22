"""Log lines: one JSON object each, or plain text on a terminal. Record values are never logged."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime

FIELDS = ("command", "topic", "partition", "offset", "task", "step", "checkpoint", "trigger")


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
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S"))
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
