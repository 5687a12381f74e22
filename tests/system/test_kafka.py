"""What only a real broker does: recreated topics, retention, transactions."""

from __future__ import annotations

import random
import shutil
import time
import uuid
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
from kafka import KafkaAdminClient, KafkaProducer
from kafka.admin import ConfigResource, ConfigResourceType
from kafka.structs import TopicPartition

from benchmarks.kafka_broker import KafkaBroker
from streamlearn.core.errors import StreamlearnError
from streamlearn.core.positions import Position
from streamlearn.core.progress import Progress
from streamlearn.stream import log_watch
from streamlearn.stream.logs import kafka_python
from streamlearn.stream.logs.base import CONTENT_TYPE, ORIGINAL_SIZE_HEADER
from streamlearn.stream.logs.config import KafkaConfig
from streamlearn.stream.logs.kafka import KafkaReader
from streamlearn.stream.logs.kafka_writer import KafkaWriter
from tests.support import jobs
from tests.support.streams import TYPED, World, everything, places, until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from streamlearn.stream.reader import StreamReader

pytestmark = pytest.mark.kafka
SECONDS = 30


@pytest.fixture
def world(kafka: KafkaConfig) -> Iterator[World]:
    """Return a test log on the broker, with a unique prefix for topic names."""
    prefix = f"k{uuid.uuid4().hex[:8]}"
    made = World(lambda: KafkaReader(kafka, f"g-{prefix}"), KafkaWriter(kafka), prefix)
    yield made
    for stream in made.streams:
        stream.stop()
    made.sink.close()


@pytest.fixture
def admin(kafka: KafkaConfig) -> Iterator[KafkaAdminClient]:
    """Return an admin client."""
    client = KafkaAdminClient(bootstrap_servers=kafka.bootstrap_servers)
    yield client
    client.close()


def problem(stream: StreamReader) -> str:
    """Wait for a problem in a stream's status, and return it."""
    deadline = time.monotonic() + SECONDS
    while stream.status.problem is None:
        assert time.monotonic() < deadline, "no problem was seen"
        time.sleep(0.05)
    return stream.status.problem


def begun(world: World, **spec: Any) -> tuple[StreamReader, Progress, str]:
    """Return a stream that has learned the first eight samples of an open task, its progress and the topic."""
    name = world.topic("a", [0, 1] * 4, marker=False)
    progress = Progress()
    stream = world.stream(topics=[name], on_finished="wait", **spec)
    until(stream, lambda found: len(places(found)) == 2, progress)
    return stream, progress, name


def deleted(admin: KafkaAdminClient, name: str) -> None:
    """Delete a topic, and wait until the broker no longer lists it."""
    admin.delete_topics([name])
    deadline = time.monotonic() + SECONDS
    while name in admin.list_topics():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def wait_for_problem(stream: StreamReader, words: str) -> None:
    """Wait until a stream's problem contains these words."""
    deadline = time.monotonic() + SECONDS
    while words not in (stream.status.problem or ""):
        assert time.monotonic() < deadline, stream.status.problem
        time.sleep(0.05)


@pytest.mark.parametrize("samples", [3, 20], ids=["shorter", "longer"])
def test_a_recreated_topic_is_another_topic(world: World, admin: KafkaAdminClient, samples: int) -> None:
    """A topic that was deleted and created again is never taken for the old one, whatever its length."""
    stream, _, name = begun(world)
    deleted(admin, name)
    world.topic("a", [1] * samples, marker=False)
    wait_for_problem(stream, "deleted and created again")
    assert stream.next_delivery(1.0) is None


def test_a_deleted_topic_is_a_problem(world: World, admin: KafkaAdminClient) -> None:
    """`poll` would return no records for ever; the problem says that the topic is gone."""
    stream, _, name = begun(world)
    deleted(admin, name)
    wait_for_problem(stream, f"topic {name} is gone")
    assert stream.next_delivery(1.0) is None


def add_partitions(world: World, admin: KafkaAdminClient, kafka: KafkaConfig, name: str, count: int) -> None:
    """Add partitions to a topic, up to `count`; the test's writer knows them at once."""
    admin.create_partitions({name: count})
    deadline = time.monotonic() + SECONDS
    while len(admin.describe_topics([name])[0]["partitions"]) < count:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    world.sink.close()
    world.sink = KafkaWriter(kafka)  # the other would learn of them after minutes


def test_added_partitions_are_read(world: World, admin: KafkaAdminClient, kafka: KafkaConfig) -> None:
    """A partition that is added during its task is read from its beginning, and the task waits for its marker."""
    stream, progress, name = begun(world)
    add_partitions(world, admin, kafka, name, 3)
    for place in range(4):
        world.send(name, 50.0 + place, 1, partition=2)
    world.sink.flush()
    assert places(until(stream, lambda found: len(places(found)) == 1, progress)) == [[50, 51, 52, 53]]
    world.mark(name, 3)
    until(stream, lambda found: any(delivery.task_end_reason for delivery in found), progress)
    assert progress.positions.by_topic() == {name: {"0": 9, "1": 1, "2": 5}}
    assert progress.unaccounted() == {}


@pytest.mark.parametrize("how", ["next_topic", "marker", "idle"])
def test_a_partition_that_was_just_added_belongs_to_the_task(
    world: World, admin: KafkaAdminClient, kafka: KafkaConfig, how: str
) -> None:
    """Before a task ends, the topic is asked for again, so records of a new partition are learned and not late."""
    rule: dict[str, Any] = {"task_end": {"idle": 2.0}} if how == "idle" else {}
    name, later = world.topic("a", [0, 1] * 4, marker=False), world.topic("b", [], marker=False)
    progress = Progress()
    stream = world.stream(topics=[name, later], on_finished="wait", **rule)
    until(stream, lambda found: len(places(found)) == 2, progress)
    stream.poller._watch._refresh.seconds = 1e9  # by itself it would not look again
    add_partitions(world, admin, kafka, name, 2)
    for place in range(5):
        world.send(name, 50.0 + place, 1, partition=1)
    if how == "marker":
        world.mark(name, 2)
    world.sink.flush()
    if how == "next_topic":
        world.send(later, 0.0, 2)
        world.sink.flush()
    ended = until(stream, lambda found: any(delivery.task_end_reason for delivery in found), progress)
    assert [delivery.task_end_reason for delivery in ended if delivery.task_end_reason] == [how]
    assert (progress.counts_by_topic[name]["trained"], progress.totals()["late"]) == (13, 0)


def test_topics_of_a_broker_that_lost_its_disk_are_other_topics(tmp_path: Path) -> None:
    """After a restart with an empty directory and new records, no sample is learned twice or skipped."""
    with KafkaBroker(tmp_path / "kafka") as broker:
        config = jobs.kafka_config(tmp_path / "job", broker.address, "", stream={"on_finished": "wait"})
        sink = KafkaWriter(KafkaConfig.model_validate({"bootstrap_servers": broker.address}))
        jobs.publish(sink, 100, markers=False)
        sink.close()
        with jobs.Daemon(config) as daemon:
            before = daemon.until(lambda status: status.get("samples", {}).get("trained", 0) >= 500)
            broker.kill()
            shutil.rmtree(broker.directory)
            broker.start()
            daemon.until(lambda status: "is gone" in (status.get("problem") or ""))
            sink = KafkaWriter(KafkaConfig.model_validate({"bootstrap_servers": broker.address}))
            jobs.publish(sink, 200, markers=False)
            sink.close()
            status = daemon.until(lambda status: "deleted and created again" in (status.get("problem") or ""))
            assert (status["ready"], status["samples"]) == (False, before["samples"])
            assert daemon.stop() == 0


def lose(world: World, admin: KafkaAdminClient, name: str) -> None:
    """Let the broker delete unread records, as retention does: of ten records, the last three stay."""
    for number in range(10):
        world.send(name, 100.0 + number, 1)
    world.sink.flush()
    admin.delete_records({TopicPartition(name, 0): 15})


def test_lost_records_stop_the_stream(world: World, admin: KafkaAdminClient) -> None:
    """Records that retention removed before they were read are a problem, not an unnoticed gap."""
    first, progress, name = begun(world)
    first.stop()
    lose(world, admin, name)
    stream = world.stream(Progress.from_json(progress.to_json(), progress.positions), topics=[name], on_finished="wait")
    assert "begins at 15, past our position 8" in problem(stream)
    assert stream.next_delivery(1.0) is None


def test_lost_records_can_be_skipped_and_are_counted(world: World, admin: KafkaAdminClient) -> None:
    """With `earliest` reading continues at the first kept record, and every lost offset is counted."""
    first, progress, name = begun(world)
    first.stop()
    lose(world, admin, name)
    world.mark(name)
    stream = world.stream(
        Progress.from_json(progress.to_json(), progress.positions), topics=[name], on_offset_out_of_range="earliest"
    )
    found = everything(stream, progress)
    assert places(found) == [[107, 108, 109]]
    assert sum((sum(delivery.observations.lost_offsets.values()) for delivery in found), 0) == 7
    assert progress.unaccounted() == {}


def test_lost_records_can_end_the_daemon(world: World, admin: KafkaAdminClient) -> None:
    """With `exit` the loop gets the error."""
    first, progress, name = begun(world)
    first.stop()
    lose(world, admin, name)
    stream = world.stream(
        Progress.from_json(progress.to_json(), progress.positions), topics=[name], on_offset_out_of_range="exit"
    )
    with pytest.raises(StreamlearnError, match="begins at 15"):
        until(stream, lambda _: False)


def test_aborted_transactions_do_not_change_where_a_task_ends(world: World, kafka: KafkaConfig) -> None:
    """Aborted records are not learned, and their offsets do not prevent a task from reaching its end."""
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
    assert [delivery.task_end_reason for delivery in found if delivery.task_end_reason] == ["next_topic", "marker"]


def transactional(kafka: KafkaConfig, name: str) -> KafkaProducer:
    """Return a transactional producer."""
    made = KafkaProducer(bootstrap_servers=kafka.bootstrap_servers, transactional_id=f"t-{name}")
    made.init_transactions()
    return made


def test_records_behind_an_open_transaction_are_not_late(
    world: World, kafka: KafkaConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task's end offset includes all acknowledged records; it is reached after the transaction ends."""
    monkeypatch.setattr(log_watch, "OPEN_TRANSACTION_SECONDS", 0.0)
    name = world.topic("a", [0, 1], marker=False)
    producer = transactional(kafka, name)
    producer.begin_transaction()
    producer.send(name, value=b'{"x": [50], "y": 0}', partition=0, headers=[*TYPED]).get(SECONDS)
    for place in (2.0, 3.0, 4.0):
        world.send(name, place, 1)
    after = world.topic("b", [2], marker=False)
    progress = Progress()
    stream = world.stream(topics=[name, after], on_finished="wait")
    closing = until(stream, lambda found: any(delivery.end_offsets for delivery in found), progress)
    assert [dict(delivery.end_offsets) for delivery in closing if delivery.end_offsets] == [{0: 6}]
    until(stream, lambda _: stream.status.behind_open_transaction == {(name, 0): 4}, progress)
    assert (stream.status.problem, stream.status.unread()[name, 0]) == (None, 4)
    producer.abort_transaction()
    producer.close()
    ended = until(stream, lambda found: any(delivery.task_end_reason for delivery in found), progress)
    assert [place for batch in places([*closing, *ended]) for place in batch] == [0, 1, 2, 3, 4]
    until(stream, lambda _: stream.status.behind_open_transaction == {}, progress)
    assert progress.totals()["late"] == 0


def test_an_open_transaction_in_the_next_topic_begins_nothing(world: World, kafka: KafkaConfig) -> None:
    """A record that can still be aborted does not end the task before it."""
    stream, progress, name = begun(world, task_end="next_topic")
    stream.poller.config.topics.append(after := world.topic("b", [], marker=False))  # type: ignore[union-attr]
    producer = transactional(kafka, name)
    producer.begin_transaction()
    producer.send(after, value=b'{"x": [50], "y": 0}', partition=0, headers=[*TYPED]).get(SECONDS)
    deadline = time.monotonic() + 3
    until(stream, lambda _: time.monotonic() > deadline, progress)
    assert progress.tasks[0].end_offsets is None
    producer.commit_transaction()
    producer.close()
    ended = until(stream, lambda found: any(delivery.new_task for delivery in found), progress)
    assert [delivery.task_end_reason for delivery in ended if delivery.task_end_reason] == ["next_topic"]


def test_transactions_leave_no_lag(world: World, kafka: KafkaConfig) -> None:
    """Commit markers and aborted records have offsets, but they must not count as unread: alerts use these metrics."""
    name = world.topic("a", [], marker=False)
    producer = transactional(kafka, name)
    for keep in (True, False, True, False):
        producer.begin_transaction()
        for place in range(4):
            producer.send(name, value=b'{"x": [%d], "y": 0}' % place, partition=0, headers=[*TYPED])
        producer.flush()
        if keep:
            producer.commit_transaction()
        else:
            producer.abort_transaction()
    producer.close()
    progress = Progress()
    stream = world.stream(topics=[name], on_finished="wait")
    until(stream, lambda _: stream.status.lag(progress.positions.by_partition) == {(name, 0): 0}, progress)
    assert (progress.totals()["trained"], progress.positions.by_topic()) == (8, {name: {"0": 20}})
    assert stream.status.unread() == {(name, 0): 0}


def test_lag_counts_from_what_the_log_still_holds(world: World, admin: KafkaAdminClient) -> None:
    """If retention has emptied a partition that was never read, its lag is 0."""
    name = world.topic("a", [0, 1] * 6, marker=False, partitions=2)
    admin.delete_records({TopicPartition(name, 1): 6})
    stream = world.stream(topics=[name], on_finished="wait")
    until(stream, lambda found: len(places(found)) == 1)
    assert stream.status.lag({(name, 0): Position(6)}) == {(name, 0): 0, (name, 1): 0}


@pytest.mark.parametrize("codec", ["gzip", "snappy", "lz4", "zstd"])
def test_every_compression_is_read_up_to_the_limit(
    world: World, kafka: KafkaConfig, codec: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A batch beyond the limit is one rejected sample with its letter; samples before and after it are learned."""
    name = world.topic("a", [0, 1], marker=False)
    producer = KafkaProducer(
        bootstrap_servers=kafka.bootstrap_servers, compression_type=codec, max_request_size=1 << 30, linger_ms=1000
    )
    for text in (b'{"x": [2], "y": 0}', b'{"x": [3], "y": 1}'):
        producer.send(name, value=text, partition=0, headers=[*TYPED])
    producer.flush()
    producer.send(name, value=bytes(kafka_python.UNPACKED_BYTES + 1), partition=0, headers=[*TYPED]).get(SECONDS)
    producer.close()
    world.send(name, 4.0, 0)
    world.mark(name)
    progress = Progress()
    stream = world.stream(topics=[name])
    assert places(everything(stream, progress)) == [[0, 1, 2, 3], [4]]
    stream.flush_dead_letters()
    assert (progress.totals()["rejected"], progress.unaccounted()) == (1, {})
    [letter] = world.read_all("dlq")
    assert (letter.value or None, letter.header("streamlearn.errors.reason")) == (None, b"oversize")
    assert f"a {codec} batch of 1 record unpacks to more than {kafka_python.UNPACKED_BYTES} bytes" in caplog.text


def test_all_offsets_of_a_too_large_batch_are_counted(
    world: World, kafka: KafkaConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One rejected sample stands for the batch; its other offsets count as lost."""
    monkeypatch.setattr(kafka_python.BoundedBatch, "max_bytes", 1000)
    monkeypatch.setattr(kafka_python, "UNPACKED_BYTES", 1000)
    name = world.topic("a", [], marker=False)
    producer = KafkaProducer(bootstrap_servers=kafka.bootstrap_servers, compression_type="gzip", linger_ms=1000)
    for _ in range(50):
        producer.send(name, value=b'{"x": [2], "y": 0}', partition=0, headers=[*TYPED])
    producer.close()
    world.mark(name)
    progress = Progress()
    found = everything(world.stream(topics=[name], max_record_bytes=100), progress)
    assert (progress.totals()["consumed"], progress.totals()["rejected"]) == (1, 1)
    assert sum((delivery.observations.lost_offsets for delivery in found), Counter()) == {(name, "oversize"): 49}
    assert progress.positions.by_partition[name, 0] == Position(51)


def rejecting(world: World, **spec: Any) -> tuple[StreamReader, Progress, str]:
    """Return a stream that has rejected one sample of an open task, and written its letter."""
    name = world.topic("a", [0, 1, 0, 1, 99], marker=False)
    progress = Progress()
    stream = world.stream(topics=[name], on_finished="wait", classes=[0, 1], **spec)
    until(stream, lambda _: progress.totals()["rejected"] == 1, progress)
    stream.flush_dead_letters()
    return stream, progress, name


def letters_acknowledged(stream: StreamReader) -> bool:
    """Return whether the letters are acknowledged, so that a checkpoint can begin."""
    try:
        stream.flush_dead_letters()
    except StreamlearnError:
        return False
    return True


def wait_for_letters(stream: StreamReader) -> None:
    """Wait until the letters are acknowledged."""
    deadline = time.monotonic() + 2 * SECONDS
    while not letters_acknowledged(stream):
        assert time.monotonic() < deadline, stream.status.problem
        time.sleep(0.2)


def test_a_deleted_dead_letter_topic_is_created_again(world: World, admin: KafkaAdminClient) -> None:
    """The next letters are written to a new topic of the same name; no letter is lost, and reading continues."""
    stream, progress, name = rejecting(world)
    admin.delete_topics([world.name("dlq")])
    for place in (5.0, 6.0):
        world.send(name, place, 98)
    world.mark(name)
    until(stream, lambda found: any(delivery.task_end_reason for delivery in found), progress)
    wait_for_letters(stream)
    assert [letter.key for letter in world.read_all("dlq")] == [f"{name}-0-{n}-0".encode() for n in (5, 6)]
    assert (progress.totals()["rejected"], progress.unaccounted()) == (3, {})


def alter(admin: KafkaAdminClient, topic: str, **settings: str) -> None:
    """Change a topic's configuration, as an operator does."""
    changes = {name.replace("_", "."): value for name, value in settings.items()}
    admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, topic, configs=changes)])


def test_a_dead_letter_topic_that_rejects_writes_stops_the_reading(world: World, admin: KafkaAdminClient) -> None:
    """Meanwhile the status names the problem and no checkpoint begins; afterwards every letter is complete."""
    stream, progress, name = rejecting(world)
    alter(admin, world.name("dlq"), max_message_bytes="0")
    world.send(name, 5.0, 98)
    world.sink.flush()
    dead = world.name("dlq")
    assert f"dead-letter topic {dead}: 1 records: {dead}: not acknowledged: MessageSizeTooLargeError" in problem(stream)
    with pytest.raises(StreamlearnError, match="not acknowledged"):
        stream.flush_dead_letters()
    assert stream.dead_letters.failures >= 1
    world.send(name, 6.0, 97)
    alter(admin, world.name("dlq"), max_message_bytes="1000000")
    wait_for_letters(stream)
    world.mark(name)
    until(stream, lambda found: any(delivery.task_end_reason for delivery in found), progress)
    wait_for_letters(stream)
    letters = world.read_all("dlq")
    assert [letter.key for letter in letters] == [f"{name}-0-{n}-0".encode() for n in (4, 5, 6)]
    assert {letter.header(ORIGINAL_SIZE_HEADER) for letter in letters} == {None}
    assert (progress.totals()["rejected"], progress.unaccounted()) == (3, {})


def test_a_letter_that_is_too_large_for_its_topic_is_cut(world: World, admin: KafkaAdminClient) -> None:
    """Otherwise it would prevent every checkpoint: its beginning is kept, and a header has its original size."""
    stream, progress, name = rejecting(world)
    alter(admin, world.name("dlq"), max_message_bytes="3000")
    noise = random.Random(0).randbytes(100_000)  # what a codec cannot make smaller
    world.sink.append(name, 0, b"\xff" + noise)
    world.sink.append(name, 0, b"\xff", headers=(("mine", noise[:10_000]),))
    world.mark(name)
    until(stream, lambda found: any(delivery.task_end_reason for delivery in found), progress)
    wait_for_letters(stream)
    assert stream.dead_letters.failures == 0
    cut = world.read_all("dlq")[1:]
    assert [(len(letter.value or b""), letter.header(ORIGINAL_SIZE_HEADER)) for letter in cut] == [
        (1024, b"100001"),
        (0, b"1"),
    ]
    assert {len(letter.header("streamlearn.errors.message") or b"") > 0 for letter in cut} == {True}


class Raw(str):
    """A header name of any bytes, which clients in C can write."""

    __slots__ = ()

    def encode(self, *_: object) -> bytes:
        """Return the bytes that no codec made."""
        return b"\xff\xfe\xc3\xa4" + b"x" * (len(self) - 4)


def test_a_header_name_that_is_not_utf_8_does_not_stop_the_reading(world: World) -> None:
    """The record and those after it are used or rejected like any other, in compressed batches too."""
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
    stream.flush_dead_letters()
    letters = world.read_all("dlq")
    assert [letter.key for letter in letters] == [f"{name}-0-{n}-0".encode() for n in (3, 5)]
    kept = (*TYPED, ("first", b"1"), ("??\u00e4xx", b"2"), ("third", b"3"))
    assert [letter.headers[:4] for letter in letters] == [kept, kept]
