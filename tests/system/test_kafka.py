"""What only a real broker can do to us: topics made anew, retention, transactions."""

from __future__ import annotations

import random
import time
import uuid
from typing import TYPE_CHECKING, Any

import pytest
from kafka import KafkaAdminClient, KafkaProducer
from kafka.admin import ConfigResource, ConfigResourceType
from kafka.structs import TopicPartition

from streamlearn.data import Progress, StreamlearnError
from streamlearn.stream.kafka import KafkaLog, KafkaSink
from streamlearn.stream.log import CONTENT_TYPE, CUT
from tests.contract.test_streams import TYPED, World, everything, places, until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from streamlearn.config import Kafka
    from streamlearn.stream.reader import Stream

pytestmark = pytest.mark.kafka
SECONDS = 30


@pytest.fixture
def world(kafka: Kafka) -> Iterator[World]:
    """Give a broker's topics with a prefix of their own."""
    prefix = f"k{uuid.uuid4().hex[:8]}"
    made = World(lambda: KafkaLog(kafka, f"g-{prefix}"), KafkaSink(kafka), prefix)
    yield made
    for stream in made.streams:
        stream.stop()
    made.sink.close()


@pytest.fixture
def admin(kafka: Kafka) -> Iterator[KafkaAdminClient]:
    """Give an operator's client."""
    client = KafkaAdminClient(bootstrap_servers=kafka.bootstrap_servers)
    yield client
    client.close()


def problem(stream: Stream) -> str:
    """Return the problem that a stream shows, once it does."""
    deadline = time.monotonic() + SECONDS
    while stream.status.problem is None:
        assert time.monotonic() < deadline, "no problem was seen"
        time.sleep(0.05)
    return stream.status.problem


def begun(world: World, **spec: Any) -> tuple[Stream, Progress, str]:
    """Return a stream that has learned the first eight samples of an open task, its progress and the topic."""
    name = world.topic("a", [0, 1] * 4, marker=False)
    progress = Progress()
    stream = world.stream(topics=[name], on_finished="wait", **spec)
    until(stream, lambda found: len(places(found)) == 2, progress)
    return stream, progress, name


def test_a_topic_made_anew_is_another_topic(world: World, admin: KafkaAdminClient) -> None:
    """A topic that was deleted and created again under its name is never taken for the old one."""
    stream, _, name = begun(world)
    admin.delete_topics([name])
    deadline = time.monotonic() + SECONDS
    while name in admin.list_topics():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    world.topic("a", [1] * 20, marker=False)
    deadline = time.monotonic() + SECONDS
    while "deleted and created again" not in (stream.status.problem or ""):
        assert time.monotonic() < deadline, stream.status.problem
        time.sleep(0.05)
    assert stream.next(1.0) is None


def lose(world: World, admin: KafkaAdminClient, name: str) -> None:
    """Have the broker drop what was not read yet, as retention does: ten records, of which the last three stay."""
    for number in range(10):
        world.send(name, 100.0 + number, 1)
    world.sink.flush()
    admin.delete_records({TopicPartition(name, 0): 15})


def test_lost_records_stop_the_stream(world: World, admin: KafkaAdminClient) -> None:
    """Records that retention took before they were read are an error that says so, not a gap in silence."""
    first, progress, name = begun(world)
    first.stop()
    lose(world, admin, name)
    stream = world.stream(Progress.from_json(progress.to_json(), progress.positions), topics=[name], on_finished="wait")
    assert "begins at 15, past our position 8" in problem(stream)
    assert stream.next(1.0) is None


def test_lost_records_may_be_jumped_over_and_are_counted(world: World, admin: KafkaAdminClient) -> None:
    """With `earliest` reading goes on at what is left, and every lost offset is counted."""
    first, progress, name = begun(world)
    first.stop()
    lose(world, admin, name)
    world.mark(name)
    stream = world.stream(
        Progress.from_json(progress.to_json(), progress.positions), topics=[name], on_offset_out_of_range="earliest"
    )
    found = everything(stream, progress)
    assert places(found) == [[107, 108, 109]]
    assert sum((sum(delivery.found.gaps.values()) for delivery in found), 0) == 7
    assert progress.unaccounted() == {}


def test_lost_records_may_end_the_daemon(world: World, admin: KafkaAdminClient) -> None:
    """With `exit` the loop gets the error."""
    first, progress, name = begun(world)
    first.stop()
    lose(world, admin, name)
    stream = world.stream(
        Progress.from_json(progress.to_json(), progress.positions), topics=[name], on_offset_out_of_range="exit"
    )
    with pytest.raises(StreamlearnError, match="begins at 15"):
        until(stream, lambda _: False)


def test_aborted_transactions_leave_holes_that_end_no_task_early(world: World, kafka: Kafka) -> None:
    """What a transaction aborted is not learned, and its offsets do not keep a task from reaching its end."""
    name = world.topic("a", [0, 1], marker=False)
    producer = KafkaProducer(bootstrap_servers=kafka.bootstrap_servers, transactional_id=f"t-{name}")
    producer.init_transactions()
    for text, keep in ((b'{"x": [50], "y": 0}', False), (b'{"x": [2], "y": 1}', True), (b'{"x": [60], "y": 0}', False)):
        producer.begin_transaction()
        producer.send(name, value=text, partition=0, headers=[(CONTENT_TYPE, b"application/json")])
        producer.flush()
        if keep:
            producer.commit_transaction()
        else:
            producer.abort_transaction()
    producer.close()
    after = world.topic("b", [2])
    progress = Progress()
    found = everything(world.stream(topics=[name, after]), progress)
    assert places(found) == [[0, 1, 2], [0]]
    assert [delivery.ends for delivery in found if delivery.ends] == ["next_topic", "marker"]


def rejecting(world: World, **spec: Any) -> tuple[Stream, Progress, str]:
    """Return a stream that has rejected one sample of an open task, and written its letter."""
    name = world.topic("a", [0, 1, 0, 1, 99], marker=False)
    progress = Progress()
    stream = world.stream(topics=[name], on_finished="wait", classes=[0, 1], **spec)
    until(stream, lambda _: progress.totals()["rejected"] == 1, progress)
    stream.settle()
    return stream, progress, name


def settles(stream: Stream) -> bool:
    """Tell whether the letters are acknowledged; a checkpoint is refused where they are not."""
    try:
        stream.settle()
    except StreamlearnError:
        return False
    return True


def settled(stream: Stream) -> None:
    """Return when the letters are acknowledged."""
    deadline = time.monotonic() + 2 * SECONDS
    while not settles(stream):
        assert time.monotonic() < deadline, stream.status.problem
        time.sleep(0.2)


def test_a_dead_letter_topic_that_is_deleted_is_made_anew(world: World, admin: KafkaAdminClient) -> None:
    """The next letters are written to a new topic of that name; none is lost, and reading goes on."""
    stream, progress, name = rejecting(world)
    admin.delete_topics([world.name("dlq")])
    for place in (5.0, 6.0):
        world.send(name, place, 98)
    world.mark(name)
    until(stream, lambda found: any(delivery.ends for delivery in found), progress)
    settled(stream)
    assert [letter.key for letter in world.read_all("dlq")] == [f"{name}-0-{n}-0".encode() for n in (5, 6)]
    assert (progress.totals()["rejected"], progress.unaccounted()) == (3, {})


def alter(admin: KafkaAdminClient, topic: str, **settings: str) -> None:
    """Change a topic's configuration, as an operator does."""
    changes = {name.replace("_", "."): value for name, value in settings.items()}
    admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, topic, configs=changes)])


def test_a_dead_letter_topic_that_takes_nothing_stops_the_reading(world: World, admin: KafkaAdminClient) -> None:
    """While it takes nothing, status says so and no checkpoint is begun; then every letter is there, with its bytes."""
    stream, progress, name = rejecting(world)
    alter(admin, world.name("dlq"), max_message_bytes="0")
    world.send(name, 5.0, 98)
    world.sink.flush()
    dead = world.name("dlq")
    assert f"dead-letter topic {dead}: 1 records: {dead}: not acknowledged: MessageSizeTooLargeError" in problem(stream)
    with pytest.raises(StreamlearnError, match="not acknowledged"):
        stream.settle()
    assert stream.dead_letters.failures >= 1
    world.send(name, 6.0, 97)
    alter(admin, world.name("dlq"), max_message_bytes="1000000")
    settled(stream)
    world.mark(name)
    until(stream, lambda found: any(delivery.ends for delivery in found), progress)
    settled(stream)
    letters = world.read_all("dlq")
    assert [letter.key for letter in letters] == [f"{name}-0-{n}-0".encode() for n in (4, 5, 6)]
    assert {letter.header(CUT) for letter in letters} == {None}
    assert (progress.totals()["rejected"], progress.unaccounted()) == (3, {})


def test_a_letter_that_is_too_large_for_its_topic_is_cut(world: World, admin: KafkaAdminClient) -> None:
    """What the topic never takes stands in the way of no checkpoint: the beginning is kept, and its size said."""
    stream, progress, name = rejecting(world)
    alter(admin, world.name("dlq"), max_message_bytes="3000")
    noise = random.Random(0).randbytes(100_000)  # what a codec cannot make smaller
    world.sink.append(name, 0, b"\xff" + noise)
    world.sink.append(name, 0, b"\xff", headers=(("mine", noise[:10_000]),))
    world.mark(name)
    until(stream, lambda found: any(delivery.ends for delivery in found), progress)
    settled(stream)
    assert stream.dead_letters.failures == 0
    cut = world.read_all("dlq")[1:]
    assert [(len(letter.value or b""), letter.header(CUT)) for letter in cut] == [(1024, b"100001"), (0, b"1")]
    assert {len(letter.header("streamlearn.errors.message") or b"") > 0 for letter in cut} == {True}


class Raw(str):
    """A header's name as clients in C write it: any bytes."""

    __slots__ = ()

    def encode(self, *_: object) -> bytes:
        """Return the bytes that no codec made."""
        return b"\xff\xfe\xc3\xa4" + b"x" * (len(self) - 4)


def test_a_header_name_that_is_no_text_stops_nothing(world: World) -> None:
    """The record is used, or rejected, like any other, in batches that are compressed or not; so are those after it."""
    name = world.topic("a", [0, 1], marker=False)
    odd = (("first", b"1"), (Raw("xxxxxx"), b"2"), ("third", b"3"))
    world.send(name, 2.0, 0, headers=odd)
    world.send(name, 3.0, 99, headers=odd)
    world.sink.flush()
    plain = KafkaProducer(bootstrap_servers=world.sink.kafka.bootstrap_servers)  # type: ignore[attr-defined]  # of Kafka here
    for text in (b'{"x": [4], "y": 1}', b'{"x": [5], "y": 98}'):
        plain.send(name, value=text, key=b"k" * 300, partition=0, headers=[*TYPED, *odd])
    plain.close()
    world.mark(name)
    stream = world.stream(topics=[name], classes=[0, 1])
    assert places(everything(stream)) == [[0, 1, 2, 4]]
    stream.settle()
    letters = world.read_all("dlq")
    assert [letter.key for letter in letters] == [f"{name}-0-{n}-0".encode() for n in (3, 5)]
    kept = (*TYPED, ("first", b"1"), ("??\u00e4xx", b"2"), ("third", b"3"))
    assert [letter.headers[:4] for letter in letters] == [kept, kept]
