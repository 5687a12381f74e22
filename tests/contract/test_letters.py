"""Contract of reading and replaying dead letters: the same for memory, embedded topics and Apache Kafka."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from streamlearn.core.progress import Progress
from streamlearn.stream import deadletter, letters
from streamlearn.stream.codecs.registry import CODECS
from streamlearn.stream.logs.base import ATTEMPT_HEADER, CONTENT_TYPE, CONTROL_HEADER, ORIGINAL_SIZE_HEADER, TASK_END
from tests.support.streams import TYPED, World, everything, places

if TYPE_CHECKING:
    from collections.abc import Callable

    import pytest

    from streamlearn.stream.letters import Letter
    from streamlearn.stream.logs.base import LogReader, Record


T = TypeVar("T")
BATCH = ((CONTENT_TYPE, CODECS["batch"].content_type),)


def reject(world: World, classes: list[Any], topic: str, times: int = 1) -> Progress:
    """Learn a topic that ends with a marker from its beginning, `times` times, and write its dead letters."""
    progress = Progress()
    for _ in range(times):
        progress = Progress()
        stream = world.stream(topics=[topic], classes=classes)
        everything(stream, progress)
        stream.flush_dead_letters()
    return progress


def read_with(world: World, function: Callable[[LogReader], T]) -> T:
    """Call a function with a newly opened log, and return its result."""
    log = world.open_log()
    log.connect()
    try:
        return function(log)
    finally:
        log.close()


def all_letters(world: World) -> list[Letter]:
    """Return all letters of the dead-letter topic."""
    return read_with(world, lambda log: letters.list_letters(log, world.name("dlq"))).letters


def replay(world: World, chosen: list[Letter], to: str | None = None) -> list[Letter]:
    """Replay letters, and return those that were sent."""
    dead = world.name("dlq")
    partitions, _ = letters.target_partitions(world.sink, dead, chosen, to)
    return read_with(world, lambda log: list(letters.replay(log, world.sink, dead, chosen, to, partitions)))


def records_of(world: World, topic: str) -> list[Record]:
    """Return a topic's records."""
    return read_with(world, lambda log: list(letters.read_records(log, topic)))


def test_a_letter_has_the_place_and_the_reason(world: World) -> None:
    """Letters are in the order of their records, each once, even if it was written twice because of a crash."""
    a = world.topic("a", [0, 99, 0, "x"])
    reject(world, [0, 1], a, times=2)
    world.sink.append(world.name("dlq"), 0, b"not ours")
    world.sink.append(world.name("dlq"), 0, b"", key=b"\xff", headers=(("streamlearn.errors.topic", b"\xff"),))
    world.sink.flush()
    found = all_letters(world)
    assert [(letter.key, letter.topic, letter.partition, letter.offset) for letter in found] == [
        (f"{a}-0-1-0", a, 0, 1),
        (f"{a}-0-3-0", a, 0, 3),
    ]
    assert [(letter.index, letter.samples, letter.attempts, letter.replayed) for letter in found] == [
        (0, 1, 0, False)
    ] * 2
    assert [(letter.reason, letter.message) for letter in found] == [
        ("label_range", "label 99 has no output; accepted: 0, 1"),
        ("label_range", "label 'x' has no output; accepted: 0, 1"),
    ]


def test_only_the_newest_letter_of_a_sample_is_listed(world: World) -> None:
    """After a topic was read again with another configuration, the letter has the new reason."""
    a = world.topic("a", [0, 99])
    reject(world, [0, 1], a)
    reject(world, [0, 2], a)
    (letter,) = all_letters(world)
    assert letter.message == "label 99 has no output; accepted: 0, 2"
    record, _ = read_with(world, lambda log: letters.find_letter(log, world.name("dlq"), letter.key))
    assert letters.Letter.from_record(record) == letter


def test_without_a_dead_letter_topic_there_are_no_letters(world: World) -> None:
    """The list is empty at once, and the topic is not created."""
    assert all_letters(world) == []
    assert read_with(world, lambda log: world.name("dlq") in log.topics()) is False


def test_only_the_rejected_samples_of_a_batch_are_replayed(world: World) -> None:
    """After a replay to a topic that accepts the labels, every sample was learned exactly once."""
    a, b = world.name("a"), world.topic("b", [], marker=False)
    world.sink.create_topic(a, 1)
    x = np.arange(6, dtype=np.float32)[:, None]
    world.sink.append(a, 0, CODECS["batch"].encode(x, [0, 7, 1, 8, 7, 0]), key=b"k", headers=(*BATCH, ("mine", b"1")))
    world.sink.append(a, 0, CODECS["batch"].encode(x + 10, ["a", 0, "b", 1, 0, 1]), headers=BATCH)
    world.mark(a)
    progress = reject(world, [0, 1], a)
    assert (progress.totals()["trained"], progress.totals()["rejected"]) == (7, 5)
    sent = replay(world, all_letters(world), b)
    assert [letter.key for letter in sent] == [f"{a}-0-0-{n}" for n in (1, 3, 4)] + [f"{a}-0-1-{n}" for n in (0, 2)]
    first, second = records_of(world, b)
    assert (first.key, first.headers) == (b"k", (*BATCH, ("mine", b"1"), (ATTEMPT_HEADER, b"1")))
    assert (second.key, second.headers) == (None, (*BATCH, (ATTEMPT_HEADER, b"1")))
    world.mark(b)
    again = Progress()
    assert places(everything(world.stream(topics=[b], classes=[7, 8, "a", "b"]), again)) == [[1, 3, 4, 10], [12]]
    assert again.labels == [7, 8, "a", "b"]


def test_a_record_that_cannot_be_decoded_is_replayed_whole(world: World) -> None:
    """It goes to its own topic with its bytes, key and headers and a count of attempts; a tombstone is not sent."""
    a = world.name("a")
    world.sink.create_topic(a, 1)
    hostile: list[tuple[bytes | None, bytes | None]] = [(b"\xff\xfe", b"k"), (b'{"x": [1]}', None), (None, b"")]
    for value, key in hostile:
        world.sink.append(a, 0, value, key=key, headers=(*TYPED, ("odd", b"\xff"), ("odd", b"")))
    world.mark(a)
    reject(world, [0, 1], a)
    assert [letter.offset for letter in replay(world, all_letters(world))] == [0, 1]
    again = records_of(world, a)[4:]
    assert [(record.value, record.key) for record in again] == hostile[:2]
    assert {record.headers for record in again} == {(*TYPED, ("odd", b"\xff"), ("odd", b""), (ATTEMPT_HEADER, b"1"))}


def test_a_letter_is_replayed_once(world: World) -> None:
    """A mark says that a letter was sent. It is not a letter, and still counts if the letter is written again after a crash."""
    a, b = world.topic("a", [99, 98, 97]), world.topic("b", [], marker=False)
    reject(world, [0, 1], a)
    one, two, three = all_letters(world)
    assert replay(world, [two], b) == [two]
    reject(world, [0, 1], a)
    assert [(letter.key, letter.replayed) for letter in all_letters(world)] == [
        (one.key, False),
        (two.key, True),
        (three.key, False),
    ]
    assert len(records_of(world, b)) == 1
    replay(world, [one, three], b)
    assert [letter.replayed for letter in all_letters(world)] == [True] * 3


def forge(world: World, key: str, value: bytes | None, **facts: str) -> None:
    """Write a forged letter to the dead-letter topic; `facts` replace the headers that a daemon would write."""
    topic, partition, offset, index = key.rsplit("-", 3)
    known = {"topic": topic, "partition": partition, "offset": offset, "index": index, "samples": "1"}
    known |= {"timestamp": "1.0", "reason": "decode", "message": "m", **facts}
    headers = tuple((f"streamlearn.errors.{name}", text.encode()) for name, text in known.items())
    world.sink.append(world.name("dlq"), 0, value, key=key.encode(), headers=headers)
    world.sink.flush()


def test_a_topic_created_again_has_other_letters(world: World) -> None:
    """A mark belongs to a topic id: after a topic was created again, the same offset is another sample."""
    a, b = world.topic("a", [99]), world.topic("b", [], marker=False)
    reject(world, [0, 1], a)
    (first,) = all_letters(world)
    replay(world, [first], b)
    record = records_of(world, world.name("dlq"))[0]
    assert record.header("streamlearn.errors.topic-id") == (first.topic_id or "").encode() != b""
    others = [header for header in record.headers if header[0] != "streamlearn.errors.topic-id"]
    for headers, value in (((*others, ("streamlearn.errors.topic-id", b"other")), b"second"), (others, b"of no id")):
        world.sink.append(world.name("dlq"), 0, value, key=record.key, headers=tuple(headers))
    world.sink.flush()
    found = all_letters(world)
    assert [(letter.key, letter.topic_id, letter.replayed) for letter in found] == [
        (first.key, first.topic_id, True),
        (first.key, "other", False),
        (first.key, None, False),  # as earlier versions wrote it
    ]
    assert replay(world, found[1:], b) == found[1:]
    assert [record.value for record in records_of(world, b)[1:]] == [b"second", b"of no id"]
    assert [letter.replayed for letter in all_letters(world)] == [True] * 3


def test_invalid_letters_are_skipped_and_counted(world: World) -> None:
    """A record with a letter's headers but inconsistent facts is skipped; the valid letters are listed."""
    a = world.topic("a", [0, 99])
    reject(world, [0, 1], a)
    forge(world, f"{a}-0-5-0", b"x", timestamp="nan")
    forge(world, f"{a}-0-5-0", b"x", timestamp="1e300")
    forge(world, f"{a}-0-5-0", b"x", partition="٣")
    forge(world, f"{a}-0-5-0", b"x", offset="-5")
    forge(world, f"{a}-0-5-0", b"x", index="1_0")
    forge(world, f"{a}-0-5-5", b"x", samples="5")
    forge(world, f"{a}-0-5-0", b"x", topic="a topic")
    forge(world, f"{a}-0-5-0", b"x", offset="6")
    found = read_with(world, lambda log: letters.list_letters(log, world.name("dlq")))
    assert ([letter.key for letter in found.letters], found.skipped) == ([f"{a}-0-1-0"], 8)


def test_a_forged_letter_does_not_stop_a_replay(world: World) -> None:
    """Letters whose bytes contradict them, or whose topic does not exist or has no samples, are left out; the rest is sent."""
    a, b = world.topic("a", [99]), world.topic("b", [], marker=False)
    reject(world, [0, 1], a)
    batch = CODECS["batch"].encode(np.zeros((2, 1), np.float32), [0, 1])
    for offset, value in enumerate((b"\xc1", b"\x80", b"\xff", batch, b"\x93\x01\x02\x03", b"\x81\xa1x\xc0"), start=5):
        forge(world, f"{a}-0-{offset}-0", value, samples="5")
    forge(world, f"{a}-0-11-0", None, samples="5")
    forge(world, f"{a}-0-12-0", b"x", **{"value-in": f"{a}-0-0-0"})
    gone, dead = world.name("gone"), world.name("dlq")
    forge(world, f"{gone}-0-1-0", b"x")
    forge(world, f"{dead}-0-1-0", b"x")
    forge(world, "__consumer_offsets-0-1-0", b"x")
    headers = records_of(world, dead)[-1].headers
    ends = tuple((name, b"0" if name.endswith("offset") else data) for name, data in headers)
    world.sink.append(dead, 0, TASK_END, key=b"__consumer_offsets-0-0-0", headers=(*ends, (CONTROL_HEADER, TASK_END)))
    world.sink.flush()
    chosen = all_letters(world)
    assert len(chosen) == 13
    partitions, refused = letters.target_partitions(world.sink, dead, chosen, None)
    assert (list(partitions), sorted(refused)) == ([a], sorted([gone, dead, "__consumer_offsets"]))
    assert [letter.key for letter in replay(world, chosen, b)] == [
        f"{a}-0-0-0",
        f"{gone}-0-1-0",  # it may have been deleted: where `to` says so it is sent
        f"{dead}-0-1-0",
        "__consumer_offsets-0-1-0",
    ]
    assert [record.header(CONTROL_HEADER) for record in records_of(world, b)] == [None] * 4


def test_attempts_are_counted(world: World) -> None:
    """A sample that is rejected again gets a new letter, which says how often it was sent."""
    names = [world.topic("a", [99]), world.topic("b", [], marker=False), world.topic("c", [], marker=False)]
    for n in range(2):
        reject(world, [0, 1], names[n])
        (letter,) = [letter for letter in all_letters(world) if not letter.replayed]
        assert letter.attempts == n
        replay(world, [letter], names[n + 1])
        world.mark(names[n + 1])
    assert [record.header(ATTEMPT_HEADER) for record in records_of(world, names[2])] == [b"2", None]


def test_a_cut_value_is_not_replayed(world: World) -> None:
    """A letter that was too large for its topic has only a part of the record's bytes, which is never sent."""
    a, b = world.topic("a", [99, 98]), world.topic("b", [], marker=False)
    reject(world, [0, 1], a)
    one, two = all_letters(world)
    record = records_of(world, world.name("dlq"))[0]
    dead = world.name("cut")
    world.sink.create_topic(dead, 1)
    world.sink.append(dead, 0, b"{", key=record.key, headers=(*record.headers, (ORIGINAL_SIZE_HEADER, b"900")))
    world.sink.flush()
    assert read_with(world, lambda log: list(letters.replay(log, world.sink, dead, [one, two], b, {b: 1}))) == []
    assert records_of(world, b) == []


def test_many_letters_are_replayed_in_groups(world: World) -> None:
    """All letters are sent, in their order, even if they are more than one group."""
    a, b = world.topic("a", list(range(100, 350))), world.topic("b", [], marker=False)
    reject(world, [0, 1], a)
    assert len(replay(world, all_letters(world), b)) == 250
    world.mark(b)
    taken = everything(world.stream(topics=[b], classes=list(range(100, 350))))
    assert [place for batch in places(taken) for place in batch] == list(range(250))


def test_many_rejected_samples_of_a_record_share_letters(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond a limit the samples with one reason share a letter; a replay still sends each sample once."""
    monkeypatch.setattr(deadletter, "MAX_SINGLE_LETTERS", 3)
    a, b = world.name("a"), world.topic("b", [], marker=False)
    world.sink.create_topic(a, 1)
    x = np.arange(40, dtype=np.float32)[:, None]
    x[[20, 30]] = np.nan
    world.sink.append(a, 0, CODECS["batch"].encode(x, [0, *[7] * 38, 1]), headers=BATCH)
    world.mark(a)
    progress = reject(world, [0, 1], a, times=2)
    assert (progress.totals()["trained"], progress.totals()["rejected"]) == (2, 38)
    found = all_letters(world)
    assert [letter.key for letter in found] == [f"{a}-0-0-{n}" for n in (1, 2, 3, 4, 20)]
    assert [len(letter.indices) for letter in found] == [1, 1, 1, 33, 2]
    assert found[4].message == "x has a value that is not finite (and 1 further samples of this record)"
    chosen = [letter for letter in found if letter.reason == "label_range"]
    assert replay(world, chosen, b) == chosen
    world.mark(b)
    again = Progress()
    [batch] = places(everything(world.stream(topics=[b], classes=[7], batch_size=99), again))
    assert batch == [n for n in range(1, 39) if n not in {20, 30}]
    assert [letter.key for letter in all_letters(world) if not letter.replayed] == [f"{a}-0-0-20"]
