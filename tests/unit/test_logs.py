"""Which lines reach the log."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import pytest

from streamlearn import logs

if TYPE_CHECKING:
    from collections.abc import Iterator


class RecordingHandler(logging.Handler):
    """Keeps the messages that it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.fixture
def kafka() -> Iterator[logging.Logger]:
    """Give kafka-python's logger; restore the logging configuration afterwards."""
    root, logger = logging.getLogger(), logging.getLogger("kafka")
    before = (root.handlers[:], root.level, logger.handlers[:], logger.level, logger.propagate)
    yield logger
    root.handlers[:], logger.handlers[:] = before[0], before[2]
    root.setLevel(before[1])
    logger.setLevel(before[3])
    logger.propagate = before[4]


def test_errors_of_kafka_reach_only_handlers_of_its_own_logger(
    kafka: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    """They repeat for as long as an outage lasts, so they are not in the log."""
    logs.set_up("debug", "json")
    logs.quiet_kafka()
    kafka.addHandler(handler := RecordingHandler())
    logging.getLogger("kafka.net.transport").error("connection refused")
    logging.getLogger("streamlearn.test").info("ours")
    assert handler.lines == ["connection refused"]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "ours" in lines[0]
