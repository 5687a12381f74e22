"""How the reader takes what a log can do to it: damaged batches, topics that do not answer, errors that stay."""

from __future__ import annotations

import threading
import time
from collections import Counter
from typing import TYPE_CHECKING

import pytest

from streamlearn.core.errors import AccessError, StreamlearnError
from streamlearn.core.positions import Position
from streamlearn.core.progress import Progress
from streamlearn.stream.logs.base import Bounds, BrokerUnavailable, TopicInfo, Unreadable
from streamlearn.stream.logs.memory import MemoryReader, MemoryStore
from streamlearn.stream.reader import MAX_BACKOFF
from streamlearn.stream.status import StreamStatus
from tests.support.streams import SECONDS, World, places, until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from streamlearn.core.positions import Partition
    from streamlearn.stream.logs.base import Record
    from streamlearn.stream.reader import StreamReader


class FlawedLog(MemoryReader):
    """A log in which batches can be damaged, and topics can be without permission or without a leader."""

    def __init__(self, store: MemoryStore) -> None:
        super().__init__(store, 2)
        self.damaged: dict[Partition, tuple[int, int]] = {}  # the first offset of a damaged batch, and the one after it
        self.refused: set[str] = set()
        self.leaderless: set[str] = set()
        self.failing: StreamlearnError | None = None
        self.connects = 0

    def connect(self) -> None:
        self.connects += 1

    def topics(self) -> dict[str, TopicInfo]:
        why = "no permission to read it (READ)"
        return {
            name: TopicInfo(name, info.topic_id, info.partitions, why if name in self.refused else None)
            for name, info in super().topics().items()
        }

    def bounds(self, partitions: Sequence[Partition]) -> dict[Partition, Bounds]:
        return super().bounds([place for place in partitions if place[0] not in self.leaderless])

    def poll(self, timeout: float) -> list[Record]:
        if self.failing is not None:
            raise self.failing
        for place, (begin, end) in self.damaged.items():
            if begin <= self._next_offsets.get(place, -1) < min(end, len(self.store.records[place])):
                raise Unreadable(f"{place[0]}[{place[1]}]: damaged at {begin}", place, begin, end)
        self.max_poll_records = 1 if self.damaged else 2  # so that nothing is taken from beyond the damage
        if not (found := super().poll(0)):  # it does not wait: what comes meanwhile may be damaged
            time.sleep(min(timeout, 0.01))
        return found


@pytest.fixture
def flawed() -> Iterator[tuple[World, FlawedLog]]:
    """Return a test log of this kind, with its reader."""
    store = MemoryStore()
    log = FlawedLog(store)
    world = World(lambda: log, store, "f")
    yield world, log
    for stream in world.streams:
        stream.stop()


def eventually(holds: Callable[[], bool]) -> None:
    """Wait until a condition is true."""
    deadline = time.monotonic() + SECONDS
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


class Waits(threading.Event):
    """A stop event that records waiting times, and does not wait."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        self.seconds.append(timeout or 0.0)
        return super().wait(0.001)


def waits(stream: StreamReader) -> list[float]:
    """Return the list to which the reader's pauses are added from now on; it does not really pause."""
    noted = Waits()
    stream._stopping = noted
    return noted.seconds


@pytest.mark.parametrize("kind", [Unreadable, BrokerUnavailable])
def test_pauses_grow_while_connecting_again_does_not_help(
    flawed: tuple[World, FlawedLog], kind: type[StreamlearnError], caplog: pytest.LogCaptureFixture
) -> None:
    """A successful connection alone does not make the pause short again; the error is logged once."""
    world, log = flawed
    a = world.topic("a", [0, 1], marker=False)
    stream = world.stream(topics=[a], on_finished="wait")
    until(stream, bool)
    seconds = waits(stream)
    log.failing = kind("what it answers makes no sense")
    eventually(lambda: len(seconds) > 9)
    grown = [round(pause, 1) for pause in seconds[:9]]
    assert all(pause <= MAX_BACKOFF for pause in grown)
    assert all(low <= pause <= 2 * low for pause, low in zip(grown, [0.5, 1, 2, 4, 8, 15, 15, 15, 15], strict=True))
    assert stream.status.problem == "what it answers makes no sense"
    assert caplog.text.count("what it answers makes no sense") == 1
    assert stream.status.connected == (kind is Unreadable)
    log.failing = None
    eventually(lambda: stream.status.problem is None)


def test_an_outage_after_a_record_is_a_new_one(flawed: tuple[World, FlawedLog]) -> None:
    """If the connection returned a record, the next pause is short again."""
    world, log = flawed
    a = world.topic("a", [0, 1], marker=False)
    stream = world.stream(topics=[a], on_finished="wait", linger=0.05)
    progress = Progress()
    until(stream, lambda _: progress.totals()["trained"] == 2, progress)
    seconds = waits(stream)
    for _ in range(3):
        log.failing = BrokerUnavailable("away")
        before = len(seconds)
        eventually(lambda: len(seconds) > before)  # noqa: B023 - it is called at once
        log.failing = None
        world.send(a, 5.0, 1)
        consumed = progress.totals()["consumed"]
        until(stream, lambda _: progress.totals()["consumed"] > consumed, progress)  # noqa: B023 - the same
        assert seconds[before] <= 1.0


def test_a_damaged_batch_stops_the_reading(flawed: tuple[World, FlawedLog]) -> None:
    """By default nothing is skipped: the problem names the place, and the log stays connected."""
    world, log = flawed
    a = world.topic("a", [0, 1, 0, 1, 0, 1], marker=False)
    log.damaged[a, 0] = (2, 4)
    progress = Progress()
    stream = world.stream(topics=[a], on_finished="wait", batch_size=2)
    assert places(until(stream, lambda found: len(places(found)) == 1, progress)) == [[0, 1]]
    eventually(lambda: stream.status.problem == f"{a}[0]: damaged at 2")
    assert stream.status.connected
    log.damaged.clear()
    assert places(until(stream, lambda found: len(places(found)) == 2, progress)) == [[2, 3], [4, 5]]


def test_a_damaged_batch_can_be_skipped_and_is_counted(flawed: tuple[World, FlawedLog]) -> None:
    """With `earliest` reading continues after it, and its offsets count as lost."""
    world, log = flawed
    a = world.topic("a", [0, 1, 0, 1, 0, 1])
    log.damaged[a, 0] = (2, 4)
    progress = Progress()
    stream = world.stream(topics=[a], batch_size=2, on_offset_out_of_range="earliest")
    found = until(stream, lambda found: any(delivery.task_end_reason for delivery in found), progress)
    assert places(found) == [[0, 1], [4, 5]]
    assert sum((delivery.observations.lost_offsets for delivery in found), Counter()) == {(a, "corrupt"): 2}
    assert progress.unaccounted() == {}


def test_a_damaged_batch_can_end_the_daemon(flawed: tuple[World, FlawedLog]) -> None:
    """With `exit` the loop gets the error."""
    world, log = flawed
    a = world.topic("a", [0, 1, 0, 1], marker=False)
    log.damaged[a, 0] = (2, 4)
    with pytest.raises(StreamlearnError, match="damaged at 2"):
        until(world.stream(topics=[a], on_finished="wait", on_offset_out_of_range="exit"), lambda _: False)


def test_a_damaged_batch_of_an_ended_task_is_skipped(flawed: tuple[World, FlawedLog]) -> None:
    """Its records would be late anyway: it is logged and counted."""
    world, log = flawed
    a, b = world.topic("a", [0, 1]), world.topic("b", [2], marker=False)
    log.damaged[a, 0] = (3, 5)
    progress = Progress()
    stream = world.stream(topics=[a, b], on_finished="wait", linger=0.1)
    until(stream, lambda _: progress.totals()["trained"] == 3, progress)
    for place in range(3):
        world.send(a, float(place), 1)  # two of them damaged
    world.send(b, 1.0, 2)
    found = until(stream, lambda _: progress.totals()["trained"] == 4 and progress.totals()["late"] == 1, progress)
    assert sum((delivery.observations.lost_offsets for delivery in found), Counter()) == {(a, "corrupt"): 2}


@pytest.mark.parametrize("how", ["refused", "leaderless"])
def test_an_ended_topic_that_does_not_answer_is_left_out(
    flawed: tuple[World, FlawedLog], how: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A withdrawn permission, or a leader that is gone, is one warning; the topic is read again later."""
    world, log = flawed
    a, b = world.topic("a", [0, 1]), world.topic("b", [2], marker=False)
    progress = Progress()
    stream = world.stream(topics=[a, b], on_finished="wait", linger=0.1)
    until(stream, lambda _: progress.totals()["trained"] == 3, progress)
    getattr(log, how).add(a)
    eventually(lambda: stream.status.num_assigned == 1)
    for place in range(3):
        world.send(b, float(place), 2)
        until(stream, lambda _: progress.totals()["trained"] == 4 + place, progress)  # noqa: B023 - it is called at once
        time.sleep(0.5)  # several refreshes
    assert (stream.status.problem, stream.status.connected) == (None, True)
    assert [record.levelname for record in caplog.records if f"topic {a}: no" in record.getMessage()] == ["WARNING"]
    world.send(a, 9.0, 0)
    getattr(log, how).clear()
    until(stream, lambda _: progress.totals()["late"] == 1, progress)


def test_idle_does_not_end_the_task_of_a_deleted_topic(
    flawed: tuple[World, FlawedLog], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A deleted topic has no records, which `idle` must not take for silence, even while another topic is refused."""
    world, log = flawed
    a, b = world.topic("a", [0, 1]), world.topic("b", [2], marker=False)
    progress = Progress()
    stream = world.stream(topics=[a, b], on_finished="wait", linger=0.1, task_end={"idle": 1000})
    until(stream, lambda _: progress.totals()["trained"] == 3, progress)

    def refuse(timeout: float) -> list[Record]:
        del timeout
        log.refused.add(a)
        log.store.infos.pop(b, None)
        stream.poller.last_record = time.monotonic() - 2000
        raise AccessError("no permission")

    monkeypatch.setattr(log, "poll", refuse)
    eventually(lambda: stream.status.problem == f"topic {b} is gone")
    assert stream.next_delivery(0.5) is None
    assert stream.assembler.task is not None


def test_the_current_topic_must_be_readable(flawed: tuple[World, FlawedLog]) -> None:
    """A missing permission for the current topic ends the daemon (77)."""
    world, log = flawed
    a = world.topic("a", [0, 1], marker=False)
    stream = world.stream(topics=[a], on_finished="wait")
    until(stream, bool)
    log.refused.add(a)
    with pytest.raises(StreamlearnError, match=f"topic {a}: no permission to read it") as caught:
        until(stream, lambda _: False)
    assert caught.value.exit_code == 77


def test_a_current_topic_without_a_leader_is_an_outage(
    flawed: tuple[World, FlawedLog], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After some time without a leader it is an outage; reading continues when there is a leader."""
    monkeypatch.setattr("streamlearn.stream.log_watch.NO_LEADER_SECONDS", 0.1)
    world, log = flawed
    a = world.topic("a", [0, 1], marker=False)
    progress = Progress()
    stream = world.stream(topics=[a], on_finished="wait", linger=0.1)
    until(stream, lambda _: progress.totals()["trained"] == 2, progress)
    log.leaderless.add(a)
    eventually(lambda: stream.status.problem == f"{a}[0]: no leader answers for it")
    assert not stream.status.connected
    log.leaderless.clear()
    world.send(a, 2.0, 0)
    until(stream, lambda _: progress.totals()["trained"] == 3, progress)
    assert stream.status.problem is None


def test_the_lag_of_an_unread_partition_is_the_number_of_kept_offsets() -> None:
    """Offsets that retention removed do not count."""
    status = StreamStatus(
        begin_offsets={("a", 0): 500, ("a", 1): 40}, end_offsets={("a", 0): 500, ("a", 1): 50, ("a", 2): 7}
    )
    assert status.lag({}) == {("a", 0): 0, ("a", 1): 10, ("a", 2): 7}
    assert status.lag({("a", 1): Position(45)}) == {("a", 0): 0, ("a", 1): 5, ("a", 2): 7}
    status.next_offsets = {("a", 1): 48}
    assert status.unread() == {("a", 0): 0, ("a", 1): 2, ("a", 2): 7}
