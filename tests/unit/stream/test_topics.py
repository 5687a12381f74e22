"""The reader and its topics: what it says of them. Mostly on a log in memory, with a real thread."""

from __future__ import annotations

import json
import logging
import time
from typing import TYPE_CHECKING, Any

import pytest

from streamlearn.core.progress import Progress
from streamlearn.core.samples import Outcome
from streamlearn.core.scenario import Scenario
from streamlearn.core.tasks import TaskState
from streamlearn.stream import schedule
from streamlearn.stream.assembler import Assembler, AssemblerSettings
from streamlearn.stream.config import StreamConfig
from streamlearn.stream.deadletter import DeadLetterWriter
from streamlearn.stream.decoder import RecordDecoder
from streamlearn.stream.holdout import HoldOut
from streamlearn.stream.logs.memory import MemoryReader, MemoryStore
from streamlearn.stream.logs.sqlite import EmbeddedReader, EmbeddedWriter
from streamlearn.stream.reader import StreamReader

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from streamlearn.core.deliveries import Delivery
    from streamlearn.stream.logs.base import LogReader, LogWriter

SECONDS = 20


class Reading:
    """A reader of JSON samples over a log (in memory by default), and its deliveries."""

    def __init__(self, source: LogReader | None = None, sink: LogWriter | None = None) -> None:
        self.store = MemoryStore()
        self.source: LogReader = source or MemoryReader(self.store, 5)
        self.sink: LogWriter = sink or self.store
        self.progress = Progress()
        self.found: list[Delivery] = []
        self.stream: StreamReader | None = None

    def publish(self, topic: str, count: int) -> None:
        """Append samples of label 0 to a topic."""
        self.store.create_topic(topic, 1)
        for _ in range(count):
            self.store.append(topic, 0, b'{"x": [1], "y": 0}')

    def start(self, scenario: Scenario | None = None, **spec: Any) -> StreamReader:
        """Begin to read, from where the progress stands."""
        full = StreamConfig.model_validate({"batch_size": 4, **spec})
        letters = DeadLetterWriter(self.sink, "dlq")
        decoder = RecordDecoder([1], "float32", "json", full.max_record_bytes)
        rules = AssemblerSettings(
            decoder, HoldOut("value", 0), scenario or Scenario("class", "seen", 2), letters, full.batch_size
        )
        copied = Progress.from_json(self.progress.to_json(), self.progress.positions)
        self.stream = StreamReader(self.source, Assembler(rules, copied), full, letters, "g", 0.2)
        self.stream.start()
        return self.stream

    def until(self, holds: Callable[[], bool]) -> None:
        """Apply deliveries, as the loop does, until something holds."""
        assert self.stream is not None
        deadline = time.monotonic() + SECONDS
        while not holds():
            assert time.monotonic() < deadline, self.found
            if (delivery := self.stream.next_delivery(0.05)) is None:
                continue
            self.found.append(delivery)
            if delivery.new_task is not None:
                self.progress.tasks.append(delivery.new_task)
            self.progress.register_labels(delivery.observations)
            self.progress.advance(delivery, Outcome.TRAINED)
            if delivery.task_end_reason is not None:
                self.progress.tasks[-1].state = TaskState.ENDED

    def consumed(self) -> int:
        """Return the samples that were delivered."""
        return self.progress.totals()["consumed"]


@pytest.fixture
def reading() -> Iterator[Reading]:
    """Return a `Reading` that is stopped after the test."""
    made = Reading()
    yield made
    if made.stream is not None:
        made.stream.stop()


def test_a_deleted_topic_is_logged_once(reading: Reading, caplog: pytest.LogCaptureFixture) -> None:
    """Reading stops with one error line, however often the log is checked."""
    reading.publish("a", 4)
    with caplog.at_level(logging.ERROR):
        stream = reading.start(topics=["a"])
        reading.until(lambda: reading.consumed() == 4)
        with reading.store.changed:
            del reading.store.infos["a"]
        reading.until(lambda: stream.status.problem == "topic a is gone")
        checked = stream.status.last_contact_monotonic
        reading.until(lambda: stream.status.last_contact_monotonic != checked)
    messages = [record.message for record in caplog.records if "is gone" in record.message]
    assert messages == ["topic a is gone: reading stops"]


def test_a_recreated_file_of_topics_stops_the_reading(tmp_path: Path) -> None:
    """Records of another file are never taken for those of the first, neither while running nor at a start."""
    path = tmp_path / "topics.sqlite"

    def publish() -> None:
        sink = EmbeddedWriter(path)
        sink.create_topic("a", 1)
        for _ in range(4):
            sink.append("a", 0, b'{"x": [1], "y": 0}')
        sink.close()

    publish()
    reading = Reading(EmbeddedReader(path), EmbeddedWriter(path))
    stream = reading.start(topics=["a"])
    reading.until(lambda: reading.consumed() == 4)
    for file in tmp_path.iterdir():
        file.unlink()
    publish()
    reading.until(lambda: "topic a was deleted and created again" in (stream.status.problem or ""))
    stream.stop()
    assert reading.consumed() == 4


def test_end_task_ends_a_task_at_its_read_positions(reading: Reading) -> None:
    """Samples that were read are learned as a short batch, later ones are late, and the next task begins."""
    reading.publish("a", 6)
    stream = reading.start(topics=["a", "b"])
    reading.until(lambda: stream.queued_samples.total() == 2)
    stream.end_task("b")  # not the current one
    stream.end_task("a")
    stream.end_task("a")
    reading.until(lambda: bool(reading.progress.tasks) and reading.progress.tasks[0].state == "ended")
    assert [len(delivery.batch) for delivery in reading.found if delivery.batch is not None] == [4, 2]
    assert [delivery.task_end_reason for delivery in reading.found if delivery.task_end_reason is not None] == [
        "command"
    ]
    assert reading.progress.tasks[0].end_offsets == {0: 6}
    reading.publish("a", 3)
    reading.publish("b", 4)
    reading.until(lambda: reading.consumed() == 13)
    assert (reading.progress.counts_of("a")["late"], reading.progress.counts_of("b")["trained"]) == (3, 4)
    assert reading.progress.unaccounted() == {}


def test_a_restart_ends_a_task_at_the_same_place(reading: Reading) -> None:
    """The end offsets are saved before the last batch is learned, so later records do not belong to the task."""
    reading.publish("a", 6)
    stream = reading.start(topics=["a"])
    reading.until(lambda: stream.queued_samples.total() == 2)
    stream.end_task("a")
    reading.until(lambda: reading.progress.tasks[0].end_offsets is not None)  # as far as a crash may let it come
    stream.stop()
    reading.progress = Progress.from_json(
        json.loads(json.dumps(reading.progress.to_json())), reading.progress.positions
    )
    reading.publish("a", 5)
    reading.start(topics=["a"])
    reading.until(lambda: reading.progress.tasks[0].state == "ended")
    assert reading.found[-1].task_end_reason == "command"
    assert reading.found[-1].batch is not None
    assert len(reading.found[-1].batch) == 2
    reading.until(lambda: reading.progress.counts_of("a")["late"] == 5)


def test_a_silent_task_that_only_a_marker_can_end_is_logged(
    reading: Reading, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last listed topic has no later topic; one log line says how its task can end."""
    monkeypatch.setattr(schedule, "OPEN_TASK_SECONDS", 0.3)
    reading.publish("a", 4)
    with caplog.at_level(logging.WARNING):
        stream = reading.start(topics=["a"])
        for _ in range(2):
            reading.until(lambda: stream.status.last_contact_monotonic is not None)
            checked = stream.status.last_contact_monotonic
            reading.until(lambda before=checked: stream.status.last_contact_monotonic != before)  # type: ignore[misc]
    messages = [record.message for record in caplog.records if "stays open" in record.message]
    assert len(messages) == 1
    assert "task a has had no record for" in messages[0]
    assert "streamlearn task end" in messages[0]


def test_a_domain_learns_topics_that_are_not_declared(reading: Reading) -> None:
    """All tasks have the same classes, so a topic that is found later is learned with the same outputs."""
    reading.publish("d1", 4)
    reading.start(Scenario("domain", "seen", [1, 0]), pattern="d.*")
    reading.until(lambda: reading.consumed() == 4)
    reading.publish("d2", 4)
    reading.until(lambda: reading.progress.counts_of("d2")["trained"] == 4)
    assert [task.labels for task in reading.progress.tasks] == [[1, 0], [1, 0]]
    learned = [delivery.batch.y.tolist() for delivery in reading.found if delivery.batch is not None]
    assert learned == [[1] * 4] * 2
