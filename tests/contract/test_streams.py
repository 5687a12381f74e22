"""The contract of a stream. Every test runs over memory, over embedded topics and over Apache Kafka."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from streamlearn.core.config import TextInputConfig
from streamlearn.core.errors import InputOutputError, StreamlearnError
from streamlearn.core.positions import Position, Positions
from streamlearn.core.progress import Progress
from streamlearn.core.scenario import Scenario
from streamlearn.core.tasks import Task
from streamlearn.stream.codecs.registry import CODECS
from streamlearn.stream.logs.base import CONTENT_TYPE, PROBE, USE_HEADER, BrokerUnavailable
from tests.support.streams import SECONDS, TYPED, Unwilling, World, everything, places, until

if TYPE_CHECKING:
    from streamlearn.core.deliveries import Delivery
    from streamlearn.stream.logs.base import Record

TEXT = TextInputConfig(kind="text", sentences=2, words=4, vocabulary=8)


def test_batches_are_the_next_samples_in_offset_order(world: World) -> None:
    """A batch is the next `batch_size` samples in order, however they were polled; the last batch of a task can be short."""
    a, b = world.topic("a", [0, 1] * 5), world.topic("b", [2, 3])
    progress = Progress()
    found = everything(world.stream(topics=[a, b]), progress)
    assert places(found) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9], [0, 1]]
    assert [delivery.new_task.name for delivery in found if delivery.new_task is not None] == [a, b]
    assert [delivery.task_end_reason for delivery in found if delivery.task_end_reason is not None] == [
        "marker",
        "marker",
    ]
    assert progress.labels == [0, 1, 2, 3]
    assert progress.positions.by_topic() == {a: {"0": 11}, b: {"0": 3}}
    assert progress.unaccounted() == {}


@pytest.mark.parametrize("cut", range(1, 6))
def test_any_restart_gives_the_same_batches(world: World, cut: int) -> None:
    """A new reader that starts from the progress of any delivery continues with the next sample."""
    topics = [world.topic("a", [0, 1] * 5), world.topic("b", [2, 3])]
    expected = places(everything(world.stream(topics=topics)))
    progress = Progress()
    first = world.stream(topics=topics)
    begun = until(first, lambda found: len(found) >= cut, progress)
    first.stop()
    copied = Progress.from_json(progress.to_json(), Positions.from_json(progress.positions.to_json()))
    rest = everything(world.stream(copied, topics=topics), progress)
    assert places(begun) + places(rest) == expected
    assert progress.totals()["consumed"] == progress.totals()["trained"] == 12


def test_next_topic_ends_a_task_at_its_end_offsets_of_that_moment(world: World) -> None:
    """Once a later topic has a record, the current task's end offsets are fixed; records after them are late."""
    a = world.topic("a", [0, 1, 0], marker=False)
    stream = world.stream(topics=[a, world.name("b")], task_end="next_topic", on_finished="wait")
    progress = Progress()
    until(stream, lambda found: bool(found and found[0].new_task), progress)
    b = world.topic("b", [2], marker=False)
    found = until(stream, lambda found: any(d.task_end_reason for d in found), progress)
    assert [dict(d.end_offsets) for d in found if d.end_offsets is not None] == [{0: 3}]
    assert [d.task_end_reason for d in found if d.task_end_reason] == ["next_topic"]
    world.send(a, 9.0, 1)
    world.mark(b)
    until(stream, lambda _: progress.totals()["late"] == 1, progress)
    assert progress.counts_by_topic[a]["late"] == 1


def test_a_count_ends_a_task(world: World) -> None:
    """`records: N` ends a task after N samples of any outcome; further samples are late."""
    a, b = world.topic("a", [0] * 7, marker=False), world.topic("b", [1] * 5, marker=False)
    progress = Progress()
    stream = world.stream(topics=[a, b], task_end={"records": 5}, on_finished="wait")
    until(stream, lambda _: progress.totals()["consumed"] == 12, progress)
    assert [task.counts["trained"] for task in progress.tasks] == [5, 5]
    assert progress.totals()["late"] == 2


def test_silence_ends_a_task(world: World) -> None:
    """`idle: SECONDS` ends a task when no record has arrived for that time."""
    a = world.topic("a", [0, 1, 0], marker=False)
    found = everything(world.stream(topics=[a], task_end={"idle": 0.5}))
    assert [delivery.task_end_reason for delivery in found if delivery.task_end_reason is not None] == ["idle"]
    assert places(found) == [[0, 1, 2]]


def test_invalid_records_become_dead_letters_unchanged(world: World) -> None:
    """An invalid record becomes a dead letter with its bytes, headers and reason; the other samples are learned."""
    a = world.name("a")
    world.sink.create_topic(a, 1)
    world.send(a, 0.0, 0)
    garbage = {
        b"\xff\xfe": "decode",
        b'{"x": [1, 2], "y": 1}': "shape",
        b'{"x": [1]}': "missing_label",
        b'{"x": ["a"], "y": 1}': "schema",
        b'{"x": [1e60], "y": 1}': "nonfinite",
        b'{"x": [1], "y": 1.5}': "schema",
    }
    for value in garbage:
        world.sink.append(a, 0, value, key=b"k", headers=(("mine", b"1"),))
    world.send(a, 1.0, 1)
    world.mark(a)
    progress = Progress()
    stream = world.stream(topics=[a])
    assert places(everything(stream, progress)) == [[0, 1]]
    stream.flush_dead_letters()
    assert progress.totals()["rejected"] == len(garbage)
    assert progress.unaccounted() == {}
    letters = world.read_all("dlq")
    assert {letter.value: letter.header("streamlearn.errors.reason") for letter in letters} == {
        value: reason.encode() for value, reason in garbage.items()
    }
    assert [letter.key for letter in letters] == [f"{a}-0-{n}-0".encode() for n in range(1, len(garbage) + 1)]
    assert {letter.header("mine") for letter in letters} == {b"1"}
    assert {letter.header("streamlearn.errors.key") for letter in letters} == {b"k"}


def test_one_invalid_sample_does_not_reject_its_record(world: World) -> None:
    """In a batch record, a label that is not a class rejects only its own sample."""
    a = world.name("a")
    world.sink.create_topic(a, 1)
    value = CODECS["batch"].encode(np.arange(5, dtype=np.float32)[:, None], [0, 1, 2, 0, 1])
    world.sink.append(a, 0, value, headers=((CONTENT_TYPE, CODECS["batch"].content_type),))
    world.mark(a)
    progress = Progress()
    assert places(everything(world.stream(topics=[a], classes=2), progress)) == [[0, 1, 3, 4]]
    assert progress.totals()["rejected"] == 1


def test_a_probe_header_holds_a_sample_out(world: World) -> None:
    """A sample that was published as a probe is never trained on."""
    a = world.topic("a", [0, 1], marker=False)
    world.send(a, 7.0, 1, headers=((USE_HEADER, PROBE),))
    world.mark(a)
    progress = Progress()
    found = everything(world.stream(topics=[a]), progress)
    held = [part for delivery in found for part in delivery.observations.held_out]
    assert [part.x.flatten().tolist() for part in held] == [[7.0]]
    assert places(found) == [[0, 1]]


def test_a_hash_holds_a_fraction_out_and_duplicates_with_it(world: World) -> None:
    """Equal samples are all held out or all trained, so that no copy of a probe sample is trained."""
    a = world.topic("a", [0, 1] * 20 + [0, 1] * 20, marker=True)
    progress = Progress()
    everything(world.stream(topics=[a], fraction=0.3), progress)
    held = progress.totals()["held_out"]
    assert 0 < held < 80
    assert held + progress.totals()["trained"] == 80


def test_several_partitions_are_one_task(world: World) -> None:
    """A task ends when every partition has delivered its marker, and every sample is learned once."""
    a = world.topic("a", list(range(9)), partitions=3)
    progress = Progress()
    found = everything(world.stream(topics=[a]), progress)
    assert sorted(place for batch in places(found) for place in batch) == list(range(9))
    assert progress.positions.by_topic() == {a: {"0": 4, "1": 4, "2": 4}}


def uneven(world: World, *, marker: bool = True) -> str:
    """Publish a topic of three partitions, of seven, three and no samples; x is 10 times the partition plus the offset."""
    name = world.name("a")
    world.sink.create_topic(name, 3)
    for partition, count in ((1, 3), (0, 7)):
        for place in range(count):
            world.send(name, 10.0 * partition + place, place % 2, partition=partition)
        world.sink.flush()
    if marker:
        world.mark(name, 3)
    return name


IN_ORDER = [[0, 10, 1, 11], [2, 12, 3, 4], [5, 6]]


def test_merged_partitions_come_in_one_order(world: World) -> None:
    """With `merge: fixed` records are taken by offset, then partition, whatever arrives first."""
    progress = Progress()
    assert places(everything(world.stream(topics=[uneven(world)], merge="fixed"), progress)) == IN_ORDER
    assert progress.positions.by_topic() == {world.name("a"): {"0": 8, "1": 4, "2": 1}}


@pytest.mark.parametrize("cut", range(1, 4))
def test_a_restart_continues_a_merge(world: World, cut: int) -> None:
    """A new reader that starts in the middle of a merge continues with the next sample of the same order."""
    topics = [uneven(world)]
    progress = Progress()
    first = world.stream(topics=topics, merge="fixed")
    begun = until(first, lambda found: len(found) >= cut, progress)
    first.stop()
    copied = Progress.from_json(progress.to_json(), Positions.from_json(progress.positions.to_json()))
    rest = everything(world.stream(copied, topics=topics, merge="fixed"), progress)
    assert places(begun) + places(rest) == IN_ORDER
    assert progress.totals()["consumed"] == progress.totals()["trained"] == 10


def test_a_merge_waits_only_while_an_earlier_record_can_come(world: World) -> None:
    """A record waits while another partition can still have an earlier one; a later topic ends the waiting."""
    name = uneven(world, marker=False)
    stream = world.stream(topics=[name, world.name("b")], task_end="next_topic", merge="fixed", batch_size=1)
    progress = Progress()
    begun = until(stream, lambda found: len(places(found)) == 2, progress)
    # the next record may still be offset 0 of partition 2
    assert (places(begun), stream.next_delivery(1.0)) == ([[0], [10]], None)
    world.send(name, 20.0, 1, partition=2)
    world.sink.flush()
    begun += until(stream, lambda found: len(places(found)) == 3, progress)
    assert (places(begun), stream.next_delivery(1.0)) == ([[0], [10], [20], [1], [11]], None)
    world.topic("b", [0])
    rest = everything(stream, progress)
    assert places(rest) == [[2], [12], [3], [4], [5], [6], [0]]
    assert progress.unaccounted() == {}


def test_a_pattern_orders_topics_by_their_numbers(world: World) -> None:
    """Digits in topic names are compared as numbers."""
    names = [world.topic(f"t-{n}", [n]) for n in (10, 2, 1)]
    found = everything(world.stream(pattern=f"{world.prefix}-t.*"))
    assert [d.new_task.name for d in found if d.new_task is not None] == [names[2], names[1], names[0]]


def test_the_dead_letter_topic_is_never_a_task(world: World) -> None:
    """The dead-letter topic is not learned even if the pattern matches its name."""
    world.topic("dlq", [5])
    a = world.topic("a", [0])
    progress = Progress()
    everything(world.stream(pattern=f"{world.prefix}-.*"), progress)
    assert [task.name for task in progress.tasks] == [a]


def test_the_topic_that_is_waited_for_is_named(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """One log line and the status name a topic that is missing or empty; reading continues when it has a record."""
    caplog.set_level("INFO", "streamlearn.stream")
    a = world.topic("a", [0])
    progress = Progress()
    stream = world.stream(topics=[a, world.name("missing")], on_finished="wait")
    until(stream, lambda found: any(d.task_end_reason for d in found), progress)
    until(stream, lambda _: stream.status.waiting_for is not None, progress)
    assert stream.status.waiting_for == world.name("missing")
    assert stream.status.problem is None
    time.sleep(1.2)  # the next check of the log must not log it again
    lines = [record.getMessage() for record in caplog.records if "waiting for topic" in record.getMessage()]
    assert lines == [f"waiting for topic {world.name('missing')}, which does not exist yet"]
    world.topic("missing", [1])
    until(stream, lambda found: any(d.new_task for d in found), progress)
    assert stream.status.waiting_for is None


def test_a_pattern_that_matches_nothing_is_waited_for(world: World) -> None:
    """If no topic is known, the status names the pattern."""
    stream = world.stream(pattern=f"{world.prefix}-t.*", on_finished="wait")
    until(stream, lambda _: stream.status.waiting_for is not None)
    assert stream.status.waiting_for == f"{world.prefix}-t.*"


def test_a_domain_without_classes_is_not_begun(world: World) -> None:
    """A topic that matches the pattern but is not in scenario.tasks is an error, and is not learned."""
    domain = Scenario("domain", "seen", 10, {world.name("t-1"): [0]})
    world.topic("t-1", [0])
    other = world.topic("t-2", [0])
    stream = world.stream(pattern=f"{world.prefix}-t.*", scenario=domain)
    progress = Progress()
    with pytest.raises(
        StreamlearnError, match=f"topic {other}: scenario.tasks has no classes for it, only for"
    ) as caught:
        everything(stream, progress)
    assert caught.value.exit_code == 78
    assert [task.name for task in progress.tasks] == [world.name("t-1")]
    assert progress.totals()["trained"] == 1


def test_a_topic_found_later_is_learned_too(world: World) -> None:
    """New topics are found while running."""
    progress = Progress()
    stream = world.stream(pattern=f"{world.prefix}-t.*", on_finished="wait")
    world.topic("t-1", [0])
    until(stream, lambda found: any(d.task_end_reason for d in found), progress)
    world.topic("t-2", [1])
    until(stream, lambda found: any(d.task_end_reason for d in found), progress)
    assert [task.name for task in progress.tasks] == [world.name("t-1"), world.name("t-2")]


def test_a_small_queue_pauses_the_reader_and_loses_nothing(world: World) -> None:
    """The queue is bounded: a slow learner stops the reader, and still sees every sample in order."""
    a = world.topic("a", [0, 1] * 100)
    stream = world.stream(topics=[a], queue={"samples": 8})
    deadline = time.monotonic() + SECONDS
    while not stream.status.paused:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert [place for batch in places(everything(stream)) for place in batch] == list(range(200))


def test_a_short_batch_is_learned_after_linger(world: World) -> None:
    """With `linger`, batches can be short but are learned sooner; every record still counts once."""
    a = world.topic("a", [0, 1], marker=False)
    found = until(world.stream(topics=[a], linger=0.3), lambda found: bool(places(found)))
    assert places(found) == [[0, 1]]


def test_committing_positions_does_not_change_the_reading(world: World) -> None:
    """Committed positions are for lag graphs only."""
    a = world.topic("a", [0] * 8)
    stream = world.stream(topics=[a], on_finished="wait")
    progress = Progress()
    until(stream, lambda found: bool(places(found)), progress)
    stream.commit_positions(progress.positions)
    until(stream, lambda found: any(d.task_end_reason for d in found), progress)
    assert progress.totals()["trained"] == 8


def test_end_offsets_below_a_position_do_not_move_it_back(world: World) -> None:
    """A partition with late records after its task's end keeps its position, also after a restart."""
    a = world.topic("a", [0, 1] * 8, marker=False, partitions=2)
    later = world.topic("b", [2], marker=False)
    progress = Progress(
        Positions({(a, 0): Position(7), (a, 1): Position(1)}),
        [Task(0, a, end_offsets={0: 3, 1: 4}, labels=[0, 1])],
        [0, 1],
    )
    found = until(
        world.stream(progress, topics=[a, later], on_finished="wait"),
        lambda found: any(d.task_end_reason for d in found),
        progress,
    )
    assert [delivery.task_end_reason for delivery in found if delivery.task_end_reason] == ["next_topic"]
    assert progress.positions.by_partition[a, 0] >= Position(7)


def test_a_recreated_topic_of_an_ended_task_stops_the_reading(world: World) -> None:
    """Its records would not be learned, so this must not stay unnoticed; a topic that is only deleted is no problem."""
    a, b = world.topic("a", [0, 1]), world.topic("b", [2, 3], marker=False)
    progress = Progress()
    stream = world.stream(topics=[a, b], on_finished="wait", linger=0.1)
    until(stream, lambda _: progress.totals()["trained"] == 4, progress)
    world.recreate(a)
    why = f"topic {a} was deleted and created again"
    until(stream, lambda _: (stream.status.problem or "").startswith(why), progress)
    assert "its task has ended" in str(stream.status.problem)


def test_the_lag_is_0_when_everything_is_learned(world: World) -> None:
    """When all samples are learned, nothing is unread and the applied positions are the log end offsets."""
    a = world.topic("a", [0, 1, 0, 1], marker=False, partitions=2)
    progress = Progress()
    stream = world.stream(topics=[a], on_finished="wait", linger=0.1)
    until(stream, lambda _: set(stream.status.lag(progress.positions.by_partition).values()) == {0}, progress)
    assert progress.totals()["trained"] == 4
    assert set(stream.status.unread().values()) == {0}


def test_a_lowered_count_ends_the_task_at_once(world: World) -> None:
    """A count below the number of consumed samples ends the task; labels after it take no output."""
    a = world.topic("a", [0] * 8 + [7] * 4, marker=False)
    progress = Progress()
    first = world.stream(topics=[a], task_end={"records": 11}, on_finished="wait")
    until(first, lambda found: len(places(found)) == 2, progress)
    first.stop()
    copied = Progress.from_json(json.loads(json.dumps(progress.to_json())), progress.positions)
    rest = until(world.stream(copied, topics=[a], task_end={"records": 3}, on_finished="wait"),
                 lambda _: progress.totals()["late"] == 4, progress)  # fmt: skip
    assert (places(rest), progress.labels, progress.unaccounted()) == ([], [0], {})


def test_an_outage_is_not_silence(world: World) -> None:
    """An outage does not end a task with `idle`: the silence counts from the end of the outage."""
    idle, connected, ends, progress = 1.5, list[float](), dict[Any, int](), Progress()
    a = world.topic("a", [0, 1], marker=False)
    stream = world.stream(topics=[a], task_end={"idle": idle}, on_finished="wait")
    until(stream, lambda found: bool(found) and stream.status.end_offsets == {(a, 0): 2}, progress)
    connect, poll, away = stream.log_reader.connect, stream.log_reader.poll, time.monotonic() + 2 * idle

    def reconnect() -> None:
        connected.append(time.monotonic())
        ends.update(stream.status.end_offsets)
        connect()

    def fail(timeout: float) -> list[Record]:
        if time.monotonic() < away:
            raise BrokerUnavailable("away")
        return poll(timeout)

    assert stream.status.end_offsets == {(a, 0): 2}
    # simulates an outage
    stream.log_reader.connect, stream.log_reader.poll = reconnect, fail  # type: ignore[method-assign]
    until(stream, lambda found: any(delivery.task_end_reason == "idle" for delivery in found), progress)
    assert len(connected) > 1, "there was no outage"
    assert ends == {}, "the log end is unknown during an outage"
    assert time.monotonic() - connected[-1] >= idle


def test_a_rejected_batch_record_is_written_once(world: World) -> None:
    """Fifty rejected samples of one record are fifty letters; only the first one has the record's bytes."""
    a = world.name("a")
    world.sink.create_topic(a, 1)
    value = CODECS["batch"].encode(np.arange(50, dtype=np.float32)[:, None], [99] * 50)
    world.sink.append(a, 0, value, headers=((CONTENT_TYPE, CODECS["batch"].content_type),))
    world.mark(a)
    stream = world.stream(topics=[a], classes=[1, 2])
    everything(stream)
    stream.flush_dead_letters()
    letters = world.read_all("dlq")
    assert [letter.value for letter in letters] == [value] + [None] * 49
    assert {letter.header("streamlearn.errors.value-in") for letter in letters[1:]} == {letters[0].key}


def test_dead_letters_that_cannot_be_written_stop_the_reading(world: World) -> None:
    """No checkpoint moves past an unacknowledged letter, and the status names the problem; later, no letter is lost."""
    a = world.topic("a", [0, 1, 99, 98] * 2, marker=False)
    unwilling = Unwilling(world.sink)
    stream = world.stream(topics=[a], on_finished="wait", classes=[0, 1], sink=unwilling)
    progress = Progress()
    until(stream, lambda _: stream.status.problem is not None, progress)
    assert stream.status.problem == f"dead-letter topic {world.name('dlq')}: the topic is full"
    with pytest.raises(StreamlearnError, match="the topic is full") as caught:
        stream.flush_dead_letters()
    assert caught.value.exit_code == 74
    assert stream.dead_letters.failures > 0
    world.mark(a)  # beyond what is read
    unwilling.willing = True
    until(stream, lambda found: any(delivery.task_end_reason for delivery in found), progress)
    stream.flush_dead_letters()
    assert (progress.totals()["trained"], progress.totals()["rejected"], progress.unaccounted()) == (4, 4, {})
    assert [letter.key for letter in world.read_all("dlq")] == [f"{a}-0-{n}-0".encode() for n in (2, 3, 6, 7)]
    assert stream.status.problem is None


def test_a_letter_that_could_not_be_appended_keeps_its_bytes(world: World) -> None:
    """If the first letter of a batch record cannot be appended, the next attempt still has the record's bytes."""
    a = world.name("a")
    world.sink.create_topic(a, 1)
    value = CODECS["batch"].encode(np.arange(3, dtype=np.float32)[:, None], [99] * 3)
    world.sink.append(a, 0, value, headers=((CONTENT_TYPE, CODECS["batch"].content_type),))
    world.mark(a)

    class Full(Unwilling):
        """A writer that fails at its first record."""

        def append(self, *arguments: Any, **named: Any) -> None:
            """Take a record, but fail at the first one."""
            if not self.willing:
                self.willing = True
                raise InputOutputError("disk full")
            super().append(*arguments, **named)

    stream = world.stream(topics=[a], classes=[1, 2], sink=Full(world.sink))
    progress = Progress()
    everything(stream, progress)
    stream.flush_dead_letters()
    assert progress.totals()["rejected"] == 3
    assert [letter.value for letter in world.read_all("dlq")] == [value, None, None]


def test_a_repeat_after_a_crash_has_the_same_key_and_bytes(world: World) -> None:
    """Samples that were rejected after the last checkpoint are rejected again, and their letters are identical."""
    a = world.topic("a", [0, 99, 0, 98])
    for _ in range(2):
        stream = world.stream(topics=[a], classes=[0, 1])
        everything(stream)
        stream.flush_dead_letters()
    letters = [(letter.key, letter.value, letter.headers) for letter in world.read_all("dlq")]
    assert len(letters) == 4
    assert letters[:2] == letters[2:]


def test_a_record_cannot_forge_the_headers_of_a_letter(world: World) -> None:
    """Headers named streamlearn.errors.* are replaced; all other headers are kept, also repeated ones."""
    a = world.topic("a", [0], marker=False)
    odd = (("", b""), ("twice", b"1"), ("twice", b"2"), ("n\u00e4me", b"\xff\x00"))
    world.send(a, 1.0, 99, headers=(*odd, ("streamlearn.errors.topic", b"other"), ("streamlearn.errors.key", b"k")))
    world.mark(a)
    stream = world.stream(topics=[a], classes=[0, 1])
    everything(stream)
    stream.flush_dead_letters()
    (letter,) = world.read_all("dlq")
    assert [value for name, value in letter.headers if name == "streamlearn.errors.topic"] == [a.encode()]
    assert letter.header("streamlearn.errors.key") is None
    assert letter.headers[: 1 + len(odd)] == (*TYPED, *odd)


BURST: list[Any] = [
    0,
    1,
    0,
    1,
    0,
    *range(90, 97),
    1,
    0,
    1,
    99,
    0,
]  # a full batch, one sample that waits, seven rejects, then more samples


@pytest.mark.parametrize("how", ["resumed", "restarted"])
def test_a_burst_of_rejects_stops_the_reading_until_a_resume_or_restart(world: World, how: str) -> None:
    """The batches are the same as without the stop, and no letter is written twice."""
    a = world.topic("a", BURST)
    spec: dict[str, Any] = {"topics": [a], "classes": [0, 1]}
    whole = Progress()
    expected = places(everything(world.stream(**spec, dead_letter={"burst": None}), whole))
    letters = len(world.read_all("dlq"))

    progress = Progress()
    stream = world.stream(**spec, dead_letter={"burst": 5})
    begun = until(
        stream, lambda found: any(d.forgives_below for d in found) and stream.status.problem is not None, progress
    )
    assert stream.next_delivery(0.5) is None
    stream.flush_dead_letters()
    assert len(world.read_all("dlq")) == letters + 5
    assert stream.status.problem == (
        f"{a}[0] offset 9: 5 samples in a row were rejected, mostly label_range (label 90 has no output; "
        "accepted: 0, 1); repair the producer or the configuration, then run `streamlearn resume`, "
        "or start the daemon again if it has ended"
    )
    if how == "restarted":
        stream.stop()
        tree = json.loads(json.dumps(progress.to_json()))
        copied = Progress.from_json(tree, Positions.from_json(progress.positions.to_json()))
        stream = world.stream(copied, **spec, dead_letter={"burst": 5})
    else:
        stream.resume_after_burst()
    rest = everything(stream, progress)
    assert places(begun) + places(rest) == expected
    assert progress.to_json() == whole.to_json()
    assert progress.positions == whole.positions
    assert progress.unaccounted() == {}


def test_a_burst_does_not_outlive_the_end_of_its_task(world: World) -> None:
    """`task end` ends a task whose reading a burst has stopped, and the next topic is read without a `resume`."""
    a, b = world.topic("a", BURST, marker=False), world.topic("b", [0, 1])
    progress = Progress()
    stream = world.stream(topics=[a, b], classes=[0, 1], dead_letter={"burst": 5})
    until(stream, lambda found: any(d.forgives_below for d in found) and stream.status.problem is not None, progress)
    stream.end_task(a)
    everything(stream, progress)
    assert [(task.name, task.state) for task in progress.tasks] == [(a, "ended"), (b, "ended")]
    assert stream.status.problem is None


def test_on_burst_continue_only_logs_and_exit_raises(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """With `continue` every burst is one log line; with `exit` the loop gets an error with code 65."""
    a = world.topic("a", BURST)
    spec: dict[str, Any] = {"topics": [a], "classes": [0, 1]}
    progress = Progress()
    everything(world.stream(**spec, dead_letter={"burst": 3, "on_burst": "continue"}), progress)
    assert progress.totals()["rejected"] == 8
    lines = [record.getMessage() for record in caplog.records if "3 samples in a row" in record.getMessage()]
    assert [line.split(":")[0] for line in lines] == [f"{a}[0] offset 7", f"{a}[0] offset 10"]
    with pytest.raises(StreamlearnError, match="offset 9: 5 samples in a row were rejected") as caught:
        everything(world.stream(**spec, dead_letter={"burst": 5, "on_burst": "exit"}))
    assert caught.value.exit_code == 65


def test_the_first_rejected_sample_of_a_topic_is_logged(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """Further rejected samples are only counted."""
    a = world.topic("a", [0, 98, 99])
    everything(world.stream(topics=[a], classes=[0, 1]))
    lines = [record.getMessage() for record in caplog.records if "is rejected" in record.getMessage()]
    message = "a sample is rejected: label 98 has no output; accepted: 0, 1; further ones in this topic are counted, not logged"
    assert lines == [f"{a}[0] offset 1: {message}"]


def test_an_accepted_sample_ends_a_burst(world: World) -> None:
    """Rejected samples between accepted ones are not a burst, however many there are."""
    a = world.topic("a", [90, 91, 92, 0] * 5)
    progress = Progress()
    everything(world.stream(topics=[a], classes=[0, 1], dead_letter={"burst": 4}), progress)
    assert (progress.totals()["trained"], progress.totals()["rejected"]) == (5, 15)


def test_a_batch_record_that_is_rejected_as_a_whole_is_a_burst(world: World) -> None:
    """Each sample of the record counts, and reading stops after the record."""
    a = world.name("a")
    world.sink.create_topic(a, 1)
    for label in (0, 9, 0):
        value = CODECS["batch"].encode(np.zeros((6, 1), np.float32), [label] * 6)
        world.sink.append(a, 0, value, headers=((CONTENT_TYPE, CODECS["batch"].content_type),))
    world.mark(a)
    stream = world.stream(topics=[a], classes=[0, 1], dead_letter={"burst": 6})
    progress = Progress()
    until(stream, lambda _: stream.status.problem is not None, progress)
    assert "offset 1: 6 samples in a row" in (stream.status.problem or "")
    stream.resume_after_burst()
    everything(stream, progress)
    assert (progress.totals()["trained"], progress.totals()["rejected"]) == (12, 6)


def publish_texts(world: World) -> list[str]:
    """Publish two topics of texts, most with a new word; some are rejected, and one is late."""
    a, b = world.name("a"), world.name("b")
    for name in (a, b):
        world.sink.create_topic(name, 1)
    for n in range(6):
        world.send_text(a, f"w{n} w0")
        world.send_text(a, f"bad{n}", question="?")
    world.send_text(a, "unlabelled", answer="one too many")
    world.mark(a)
    world.send_text(a, "late")
    for n in range(4, 9):
        world.send_text(b, f"w{n} w1")
    world.mark(b)
    return [a, b]


def ids(deliveries: list[Delivery]) -> list[Any]:
    """Return the token ids of each batch."""
    return [delivery.batch.x.tolist() for delivery in deliveries if delivery.batch is not None]


WORDS = [
    "w1",
    "w0",
    "who",
    "w3",
    "w4",
    "w5",
    "w6",
    "w7",
]  # the first texts with w0 and w2 are held out; w8 comes when the vocabulary is full


@pytest.mark.parametrize("cut", [1, 2, 4, 6])
def test_words_keep_their_ids_after_any_restart(world: World, cut: int) -> None:
    """Words get ids in the order in which trained texts contain them, and keep them."""
    topics = publish_texts(world)
    spec: dict[str, Any] = {"topics": topics, "text": TEXT, "classes": ["me"], "batch_size": 2, "fraction": 0.3}
    whole = Progress()
    expected = everything(world.stream(**spec), whole)
    assert whole.vocabulary == WORDS
    assert (whole.totals()["rejected"], whole.totals()["late"], whole.unaccounted()) == (7, 1, {})
    assert whole.totals()["held_out"] > 0

    progress = Progress()
    first = world.stream(**spec)
    begun = until(first, lambda found: len(found) >= cut, progress)
    first.stop()
    at = progress.positions.by_partition.get((topics[0], 0), Position(0)).offset
    if len(progress.tasks) == 1:  # words that were read but not applied are not in the progress
        trained = [f"w{n}" for n in (1, 3, 4, 5) if 2 * n < at]
        assert [word for word in progress.vocabulary if word not in {"who", "w0"}] == trained
        assert set(progress.probe_words) <= {"who", "w0", "w2"}
    tree = json.loads(json.dumps(progress.to_json()))
    copied = Progress.from_json(tree, Positions.from_json(progress.positions.to_json()))
    rest = everything(world.stream(copied, **spec), progress)
    assert ids(begun) + ids(rest) == ids(expected)
    assert progress.to_json() == whole.to_json()


def test_a_text_is_held_out_with_its_duplicates(world: World) -> None:
    """Equal texts are all held out or all trained, whatever words were added between them."""
    a = world.name("a")
    world.sink.create_topic(a, 1)
    for _ in range(2):
        for n in range(20):
            world.send_text(a, f"w{n} came")
    world.mark(a)
    progress = Progress()
    found = everything(world.stream(topics=[a], text=TEXT, fraction=0.3), progress)
    held = [row.tobytes() for delivery in found for part in delivery.observations.held_out for row in part.x]
    assert 0 < len(held) < 40
    assert len(held) + progress.totals()["trained"] == 40
    assert len(progress.vocabulary) == TEXT.vocabulary
