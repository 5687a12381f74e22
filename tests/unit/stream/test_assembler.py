"""The assembler: what it makes of records alone, without a log."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from streamlearn.data import Delivery, Position, Progress, StreamlearnError, Task
from streamlearn.scenario import Scenario
from streamlearn.stream.assembler import Assembler, AssemblerSettings
from streamlearn.stream.codec import CONTENT_TYPE_OF, Codec, encode
from streamlearn.stream.deadletter import DeadLetterWriter
from streamlearn.stream.holdout import HoldOut
from streamlearn.stream.log import CONTENT_TYPE, BrokerUnavailable, Record
from streamlearn.stream.memory import MemoryStore

BATCH = ((CONTENT_TYPE, CONTENT_TYPE_OF["batch"]),)


def made(
    progress: Progress | None = None,
    *,
    max_record_bytes: int = 1 << 20,
    classes: Any = 10,
    store: MemoryStore | None = None,
    **rules: Any,
) -> Assembler:
    """Return an assembler that stands in task a, or where progress stands."""
    letters = DeadLetterWriter(store or MemoryStore(), "dlq")
    letters.prepare()
    codec = Codec([1], "float32", "json", max_record_bytes)
    chosen = AssemblerSettings(codec, HoldOut("value", 0), Scenario("class", "seen", classes), letters, 6, **rules)
    assembler = Assembler(chosen, progress or Progress())
    if progress is None:
        assembler.begin_task(Task(0, "a"))
    return assembler


def batch_record(count: int, offset: int = 0) -> Record:
    """Return a batch record of so many samples."""
    value = encode("batch", np.arange(count, dtype=np.float32)[:, None], [0] * count)
    return Record("a", 0, offset, 0.0, None, value, BATCH)


def applied(deliveries: list[Delivery]) -> Progress:
    """Return what a checkpoint holds after these deliveries, through JSON."""
    progress = Progress(tasks=[Task(0, "a")])
    for delivery in deliveries:
        progress.register_labels(delivery.observations)
        progress.advance(delivery, "trained")
    return Progress.from_json(json.loads(json.dumps(progress.to_json())), progress.positions)


def test_a_record_that_is_cut_otherwise_than_before_is_not_read_on() -> None:
    """A stop inside a record, and then a lower bound on its bytes: its other samples may not vanish, so reading ends (78)."""
    stands = applied(list(made().feed(batch_record(10))))
    assert stands.positions.by_partition["a", 0].skip == 6
    again = made(stands, max_record_bytes=20)
    with pytest.raises(
        StreamlearnError, match=r"a\[0\] offset 0: 6 samples .* now it decodes to 1 .*max_record_bytes"
    ) as told:
        list(again.feed(batch_record(10)))
    assert told.value.code == 78
    assert not again.undelivered
    going_on = made(stands)
    assert list(going_on.feed(batch_record(10))) == []
    [delivery] = going_on.feed(batch_record(2, 1))
    assert delivery.batch is not None
    assert delivery.batch.x[:, 0].tolist() == [6, 7, 8, 9, 0, 1]


def test_a_batch_that_is_not_unpacked_any_more_does_not_hide_the_rest_of_a_record() -> None:
    """One record stands for a batch, at its last offset; a stop stood inside one of the batch's records: reading ends (78)."""
    stands = applied(list(made().feed(batch_record(10))))
    whole = Record("a", 0, 4, 0.0, None, None, (), oversize="it unpacks to more than 64 bytes", begin=0)
    with pytest.raises(StreamlearnError, match=r"6 samples .* now it decodes to 1 \(oversize: it unpacks") as told:
        list(made(stands).feed(whole))
    assert told.value.code == 78


def test_labels_that_look_alike_are_told(caplog: pytest.LogCaptureFixture) -> None:
    """1 and "1" are two labels: the second is warned of where it takes an output, and hinted at where it has none."""
    x = np.zeros((3, 1), np.float32)
    with caplog.at_level("WARNING"):
        list(made().feed(Record("a", 0, 0, 0.0, None, encode("batch", x, [1, "1", "\u0663"]), BATCH)))
    assert [record.message for record in caplog.records] == [
        "topic a: labels '1' and 1 differ in type, so they are two different labels"
    ]
    caplog.clear()
    with caplog.at_level("WARNING"):
        list(made(classes=[0, 1]).feed(Record("a", 0, 0, 0.0, None, encode("batch", x, ["1", "01", "2"]), BATCH)))
    assert "label '1' has no output; accepted: 0, 1; 1 is another label: a number" in caplog.text


@pytest.mark.parametrize("keep", [False, True], ids=["count", "dead_letter"])
def test_a_late_sample_is_logged_once_and_kept_where_configured(
    caplog: pytest.LogCaptureFixture, *, keep: bool
) -> None:
    """What comes after the task's end is counted late, also in the record that ends it; where configured it is a letter too."""
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
    told = [record.message for record in caplog.records if "late" in record.message]
    assert len(told) == 1
    assert told[0].startswith("a[0] offset 1: a late sample comes after the end of its task")
    letters = store.records["dlq", 0]
    assert [letter.key for letter in letters] == ([b"a-0-1-2", b"a-0-1-3", b"a-0-2-0", b"a-0-2-1"] if keep else [])
    assert {letter.header("streamlearn.errors.reason") for letter in letters} == ({b"late"} if keep else set())


def test_a_late_letter_that_cannot_be_sent_leaves_its_record_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is counted, so the record is read again."""
    store = MemoryStore()
    assembler = made(store=store, samples_per_task=2, dead_letter_late=True)
    list(assembler.feed(batch_record(2)))

    def full(*_: object, **__: object) -> None:
        raise StreamlearnError("the disk is full", code=74)

    with monkeypatch.context() as patched:
        patched.setattr(store, "append", full)
        with pytest.raises(BrokerUnavailable, match="the disk is full"):
            list(assembler.feed(batch_record(3, 1)))
    assert (assembler.flush_observations(), assembler.read_position(("a", 0))) == (None, Position(1))
    list(assembler.feed(batch_record(3, 1)))
    assert len(store.records["dlq", 0]) == 3
