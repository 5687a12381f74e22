"""A log of any kind with topics of one-number samples, and stream readers over it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from kafka import KafkaAdminClient

from streamlearn.core.errors import InputOutputError
from streamlearn.core.progress import Progress
from streamlearn.core.samples import Outcome
from streamlearn.core.scenario import Scenario
from streamlearn.core.tasks import TaskState
from streamlearn.stream.assembler import Assembler, AssemblerSettings
from streamlearn.stream.codecs.registry import CODECS
from streamlearn.stream.config import StreamConfig
from streamlearn.stream.deadletter import DeadLetterWriter
from streamlearn.stream.decoder import RecordDecoder
from streamlearn.stream.holdout import HoldOut
from streamlearn.stream.logs.base import CONTENT_TYPE, CONTROL_HEADER, TASK_END
from streamlearn.stream.logs.memory import MemoryStore
from streamlearn.stream.logs.sqlite import EmbeddedWriter
from streamlearn.stream.reader import StreamReader

if TYPE_CHECKING:
    from collections.abc import Callable

    from streamlearn.core.config import TextInputConfig
    from streamlearn.core.deliveries import Delivery
    from streamlearn.stream.logs.base import LogReader, LogWriter, Record


TYPED = ((CONTENT_TYPE, CODECS["json"].content_type),)


SECONDS = 30


@dataclass
class World:
    """A log under test, a unique prefix for topic names, and the stream readers of the test."""

    open_log: Callable[[], LogReader]
    sink: LogWriter
    prefix: str
    streams: list[StreamReader] = field(default_factory=list)

    def name(self, topic: str) -> str:
        """Return a topic's name with the prefix."""
        return f"{self.prefix}-{topic}"

    def topic(self, topic: str, labels: list[Any], *, marker: bool = True, partitions: int = 1) -> str:
        """Publish a topic of one-number samples. x is the sample's index; the partitions take turns."""
        name = self.name(topic)
        self.sink.create_topic(name, partitions)
        for index, label in enumerate(labels):
            self.send(name, float(index), label, partition=index % partitions)
        if marker:
            self.mark(name, partitions)
        self.sink.flush()
        return name

    def send(
        self, name: str, x: float, label: Any, *, partition: int = 0, headers: tuple[tuple[str, bytes], ...] = ()
    ) -> None:
        """Publish one sample."""
        value = CODECS["json"].encode(np.array([[x]], np.float32), [label])
        self.sink.append(name, partition, value, headers=(*TYPED, *headers))

    def send_text(self, name: str, sentence: str, question: str = "who?", answer: str = "me") -> None:
        """Publish a text of one sentence."""
        text = {"story": [sentence], "question": question}
        self.sink.append(name, 0, CODECS["json"].encode_text(text, answer), headers=TYPED)

    def mark(self, name: str, partitions: int = 1) -> None:
        """Publish a task-end marker in each partition."""
        for partition in range(partitions):
            self.sink.append(name, partition, TASK_END, headers=((CONTROL_HEADER, TASK_END),))
        self.sink.flush()

    def recreate(self, name: str) -> None:
        """Delete a topic and create it again, empty."""
        if isinstance(self.sink, MemoryStore):
            with self.sink.changed:
                del self.sink.infos[name]
        elif isinstance(self.sink, EmbeddedWriter):
            for table, column in (("records", "topic"), ("topics", "name")):
                self.sink._database.execute(f"DELETE FROM {table} WHERE {column} = ?", (name,))
        else:
            admin = KafkaAdminClient(bootstrap_servers=self.sink.kafka.bootstrap_servers)  # type: ignore[attr-defined]  # of Kafka here
            admin.delete_topics([name])
            deadline = time.monotonic() + SECONDS
            while name in admin.list_topics():
                assert time.monotonic() < deadline
                time.sleep(0.1)
            admin.close()
        assert self.sink.create_topic(name, 1)

    def stream(
        self,
        progress: Progress | None = None,
        *,
        fraction: float = 0.0,
        classes: Any = 10,
        text: TextInputConfig | None = None,
        scenario: Scenario | None = None,
        sink: Any = None,
        **spec: Any,
    ) -> StreamReader:
        """Return a stream reader that has been started."""
        full = StreamConfig.model_validate({"on_finished": "exit", "batch_size": 4, **spec})
        dead = DeadLetterWriter(sink or self.sink, self.name("dlq"))
        decoder = RecordDecoder([1], "float32", "json", full.max_record_bytes)
        if text is not None:
            decoder = RecordDecoder(text.shape, text.dtype, "json", full.max_record_bytes, text)
        rules = AssemblerSettings(
            decoder,
            HoldOut("value", fraction),
            scenario or Scenario("class", "seen", classes),
            dead,
            full.batch_size,
            full.task_end.records,
        )
        made = StreamReader(
            self.open_log(), Assembler(rules, progress or Progress()), full, dead, f"g-{self.prefix}", 0.2
        )
        self.streams.append(made)
        made.start()
        return made

    def read_all(self, topic: str) -> list[Record]:
        """Return every record of a topic's first partition."""
        log = self.open_log()
        log.connect()
        place = (self.name(topic), 0)
        log.assign({place: 0})
        end, found = log.bounds([place])[place].end, list[Any]()
        deadline = time.monotonic() + SECONDS
        while log.position(place) < end and time.monotonic() < deadline:
            found += log.poll(0.2)
        log.close()
        return found


def until(
    stream: StreamReader, holds: Callable[[list[Delivery]], bool], progress: Progress | None = None
) -> list[Delivery]:
    """Apply deliveries, as the loop does, until a condition is true; return them."""
    progress = progress if progress is not None else Progress()
    found: list[Delivery] = []
    deadline = time.monotonic() + SECONDS
    while not holds(found):
        assert time.monotonic() < deadline, f"not reached: {found}"
        if (delivery := stream.next_delivery(0.2)) is not None:
            found.append(delivery)
            apply(progress, delivery)
        elif stream.finished:
            break
    return found


def apply(progress: Progress, delivery: Delivery) -> None:
    """Apply a delivery to the progress as the loop does, but without a model."""
    if delivery.new_task is not None:
        progress.tasks.append(delivery.new_task)
    progress.register_labels(delivery.observations)
    progress.advance(delivery, Outcome.TRAINED)
    if delivery.task_end_reason is not None and progress.current is not None:
        progress.current.state = TaskState.ENDED


def everything(stream: StreamReader, progress: Progress | None = None) -> list[Delivery]:
    """Return every delivery until the stream is finished."""
    return until(stream, lambda _: False, progress)


def places(deliveries: list[Delivery]) -> list[list[int]]:
    """Return the sample indices of each batch."""
    return [delivery.batch.x.flatten().int().tolist() for delivery in deliveries if delivery.batch is not None]


class Unwilling:
    """A writer whose `flush` fails until `willing` is set; it keeps all records until then."""

    def __init__(self, sink: LogWriter) -> None:
        self.sink = sink
        self.willing = False
        self.kept: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def append(self, *arguments: Any, **named: Any) -> None:
        """Take a record."""
        self.kept.append((arguments, named))

    def flush(self, timeout: float = 60.0) -> None:
        """Refuse, or write what was kept."""
        if not self.willing:
            raise InputOutputError("the topic is full")
        for arguments, named in self.kept:
            self.sink.append(*arguments, **named)
        self.kept.clear()
        self.sink.flush(timeout)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sink, name)
