"""What reaches the log, and what only those who ask for it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import pytest

from streamlearn import logs

if TYPE_CHECKING:
    from collections.abc import Iterator


class Heard(logging.Handler):
    """Keeps what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.fixture
def kafka() -> Iterator[logging.Logger]:
    """Give the client's logger, and put everything back."""
    root, logger = logging.getLogger(), logging.getLogger("kafka")
    before = (root.handlers[:], root.level, logger.handlers[:], logger.level, logger.propagate)
    yield logger
    root.handlers[:], logger.handlers[:] = before[0], before[2]
    root.setLevel(before[1])
    logger.setLevel(before[3])
    logger.propagate = before[4]


def test_the_client_is_heard_only_by_who_asks_for_the_cause(
    kafka: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    """Kafka's errors, which repeat for as long as an outage lasts, are in no log line; a handler on its logger gets them."""
    logs.set_up("debug", "json")
    logs.quiet_kafka()
    kafka.addHandler(heard := Heard())
    logging.getLogger("kafka.net.transport").error("connection refused")
    logging.getLogger("streamlearn.test").info("ours")
    assert heard.lines == ["connection refused"]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "ours" in lines[0]
