"""The assembler alone, without a log."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from streamlearn.core.errors import InputOutputError, StreamlearnError
from streamlearn.core.positions import Position
from streamlearn.core.progress import Progress
from streamlearn.core.samples import Outcome
from streamlearn.core.scenario import Scenario
from streamlearn.core.tasks import Task
from streamlearn.stream.assembler import Assembler, AssemblerSettings
from streamlearn.stream.codecs.registry import CODECS
from streamlearn.stream.deadletter import DeadLetterWriter
from streamlearn.stream.decoder import RecordDecoder
from streamlearn.stream.holdout import HoldOut
from streamlearn.stream.logs.base import CONTENT_TYPE, BrokerUnavailable, Record
from streamlearn.stream.logs.memory import MemoryStore

if TYPE_CHECKING:
    from streamlearn.core.deliveries import Delivery

BATCH = ((CONTENT_TYPE, CODECS["batch"].content_type),)


def made(
    progress: Progress | None = None,
    *,
    max_record_bytes: int = 1 << 20,
    classes: Any = 10,
    store: MemoryStore | None = None,
    **rules: Any,
) -> Assembler:
    """Return an assembler in task a, or with the given progress."""
    letters = DeadLetterWriter(store or MemoryStore(), "dlq")
    letters.prepare()
    decoder = RecordDecoder([1], "float32", "json", max_record_bytes)
    chosen = AssemblerSettings(decoder, HoldOut("value", 0), Scenario("class", "seen", classes), letters, 6, **rules)
    assembler = Assembler(chosen, progress or Progress())
    if progress is None:
        assembler.begin_task(Task(0, "a"))
    return assembler


def batch_record(count: int, offset: int = 0) -> Record:
    """Return a batch record with this number of samples."""
    value = CODECS["batch"].encode(np.arange(count, dtype=np.float32)[:, None], [0] * count)
    return Record("a", 0, offset, 0.0, None, value, BATCH)


def applied(deliveries: list[Delivery]) -> Progress:
    """Apply deliveries and return the progress as a checkpoint has it, through JSON."""
    progress = Progress(tasks=[Task(0, "a")])
    for delivery in deliveries:
        progress.register_labels(delivery.observations)
        progress.advance(delivery, Outcome.TRAINED)
    return Progress.from_json(json.loads(json.dumps(progress.to_json())), progress.positions)


def test_a_record_that_now_decodes_to_fewer_samples_is_an_error() -> None:
    """After a stop inside a record, a lower size limit would lose the record's other samples, so the code is 78."""
    stands = applied(list(made().feed(batch_record(10))))
    assert stands.positions.by_partition["a", 0].skip == 6
    again = made(stands, max_record_bytes=20)
    with pytest.raises(
        StreamlearnError, match=r"a\[0\] offset 0: 6 samples .* now it decodes to 1 .*max_record_bytes"
    ) as message:
        list(again.feed(batch_record(10)))
    assert message.value.exit_code == 78
    assert not again.undelivered
    going_on = made(stands)
    assert list(going_on.feed(batch_record(10))) == []
    [delivery] = going_on.feed(batch_record(2, 1))
    assert delivery.batch is not None
    assert delivery.batch.x[:, 0].tolist() == [6, 7, 8, 9, 0, 1]


def test_a_batch_that_is_no_longer_unpacked_is_an_error_inside_its_records() -> None:
    """One record stands for the whole batch; if the stop was inside one of its records, the code is 78."""
    stands = applied(list(made().feed(batch_record(10))))
    whole = Record("a", 0, 4, 0.0, None, None, (), oversize="it unpacks to more than 64 bytes", begin=0)
    with pytest.raises(StreamlearnError, match=r"6 samples .* now it decodes to 1 \(oversize: it unpacks") as message:
        list(made(stands).feed(whole))
    assert message.value.exit_code == 78


def test_labels_that_differ_only_in_type_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    """For 1 and "1" there is a warning if both take an output, and a hint if one is rejected."""
    x = np.zeros((3, 1), np.float32)
    with caplog.at_level("WARNING"):
        list(made().feed(Record("a", 0, 0, 0.0, None, CODECS["batch"].encode(x, [1, "1", "\u0663"]), BATCH)))
    assert [record.message for record in caplog.records] == [
        "topic a: labels '1' and 1 differ in type, so they are two different labels"
    ]
    caplog.clear()
    with caplog.at_level("WARNING"):
        list(
            made(classes=[0, 1]).feed(Record("a", 0, 0, 0.0, None, CODECS["batch"].encode(x, ["1", "01", "2"]), BATCH))
        )
    assert "label '1' has no output; accepted: 0, 1; 1 is another label: a number" in caplog.text


@pytest.mark.parametrize("keep", [False, True], ids=["count", "dead_letter"])
def test_a_late_sample_is_logged_once_and_can_be_a_dead_letter(caplog: pytest.LogCaptureFixture, *, keep: bool) -> None:
    """Samples after the task's end are late, also within the record that ends it; they can be dead letters too."""
    store = MemoryStore()
    assembler = made(store=store, samples_per_task=7, dead_letter_late=keep)
    with caplog.at_level("WARNING"):
        found = [
            delivery
            for offset, count in enumerate((5, 4, 2))
            for delivery in assembler.feed(batch_record(count, offset))
        ]
        last = assembler.flush_observations()
    assert last is not None
    progress = applied([*found, last])
    assert (progress.counts_of("a")["trained"], progress.counts_of("a")["late"], progress.unaccounted()) == (7, 4, {})
    assert progress.counts_of("a")["rejected"] == 0
    message = [record.message for record in caplog.records if "late" in record.message]
    assert len(message) == 1
    assert message[0].startswith("a[0] offset 1: a late sample comes after the end of its task")
    letters = store.records["dlq", 0]
    assert [letter.key for letter in letters] == ([b"a-0-1-2", b"a-0-1-3", b"a-0-2-0", b"a-0-2-1"] if keep else [])
    assert {letter.header("streamlearn.errors.reason") for letter in letters} == ({b"late"} if keep else set())


def test_a_late_record_counts_as_unread_if_its_letter_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """No sample is counted, so that the record is read again."""
    store = MemoryStore()
    assembler = made(store=store, samples_per_task=2, dead_letter_late=True)
    list(assembler.feed(batch_record(2)))

    def full(*_: object, **__: object) -> None:
        raise InputOutputError("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(store, "append", full)
        with pytest.raises(BrokerUnavailable, match="the disk is full"):
            list(assembler.feed(batch_record(3, 1)))
    assert (assembler.flush_observations(), assembler.read_position(("a", 0))) == (None, Position(1))
    list(assembler.feed(batch_record(3, 1)))
    assert len(store.records["dlq", 0]) == 3
