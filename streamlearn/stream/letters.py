"""Dead letters read back: what each of them says, and the records that send their samples again."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from streamlearn.data import StreamlearnError
from streamlearn.stream.codec import cut_batch
from streamlearn.stream.deadletter import PREFIX
from streamlearn.stream.log import ATTEMPT, CUT, BrokerUnavailable

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from streamlearn.stream.log import Log, Record, Sink

    Group = list[tuple[Record, list["Letter"]]]

POLL_SECONDS = 0.5
SILENCE_SECONDS = 30.0
REPLAYED = PREFIX + "replayed-to"  # header of a mark: the letter of the same key was sent to this topic
GROUP_RECORDS = 100  # that are sent, acknowledged and then marked: so many are sent twice after a crash between the two
GROUP_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Letter:
    """What one letter says of its sample; `rejected` and `timestamp`, the record's own, in Unix seconds."""

    key: str
    topic: str
    partition: int
    offset: int
    index: int  # of the sample in its record
    samples: int  # of the record
    reason: str
    message: str
    rejected: float
    timestamp: float
    attempts: int  # how often it was sent again before
    carrier: str  # key of the letter that has the record's bytes
    lies_in: int  # partition of the dead-letter topic
    replayed: bool = False

    @classmethod
    def of(cls, record: Record) -> Letter | None:
        """Return what a record of the dead-letter topic says, or None where it is no letter of ours."""
        facts = {name.removeprefix(PREFIX): data for name, data in record.headers if name.startswith(PREFIX)}
        try:
            key = (record.key or b"").decode()
            return cls(
                key=key,
                topic=facts["topic"].decode(),
                partition=int(facts["partition"]),
                offset=int(facts["offset"]),
                index=int(facts["index"]),
                samples=int(facts["samples"]),
                reason=facts["reason"].decode(),
                message=facts["message"].decode(),
                rejected=record.timestamp,
                timestamp=float(facts["timestamp"]),
                attempts=attempts(record),
                carrier=facts.get("value-in", key.encode()).decode(),
                lies_in=record.partition,
            )
        except (KeyError, ValueError):
            return None


def attempts(record: Record) -> int:
    """Return how often a record was sent again."""
    told = record.header(ATTEMPT) or b""
    return int(told) if told.isdigit() and len(told) < 10 else 0


def read(log: Log, topic: str) -> Iterator[Record]:
    """Give a topic's records up to where it ends now; none where there is no such topic.

    Raises `BrokerUnavailable` when nothing comes for long.
    """
    info = log.topics().get(topic)
    places = [(topic, p) for p in info.partitions] if info is not None else []
    bounds, silent_since = log.bounds(places), time.monotonic()
    while len(bounds) < len(places):  # a topic of a moment ago, of which the client has yet to learn
        _give_up(topic, silent_since)
        time.sleep(POLL_SECONDS)
        bounds = log.bounds(places)
    log.assign({place: bounds[place].begin for place in places})
    at: list[int] = []
    while (now := [min(log.position(place), bounds[place].end) for place in places]) != [bounds[p].end for p in places]:
        if now != at:
            at, silent_since = now, time.monotonic()
        _give_up(topic, silent_since)
        for record in log.poll(POLL_SECONDS):
            if record.offset < bounds[record.topic, record.partition].end:
                yield record


def _give_up(topic: str, silent_since: float) -> None:
    if time.monotonic() - silent_since > SILENCE_SECONDS:
        raise BrokerUnavailable(f"{topic}: nothing was read for {SILENCE_SECONDS:.0f} s")


def index(log: Log, topic: str) -> list[Letter]:
    """Return the letters of a topic in the order in which they were written, each key once, and whether it was replayed."""
    found: dict[str, Letter] = {}
    replayed: set[str] = set()
    for record in read(log, topic):
        if record.header(REPLAYED) is not None:
            replayed.add((record.key or b"").decode(errors="replace"))
        elif (letter := Letter.of(record)) is not None:
            found[letter.key] = letter  # one that is there again, under another configuration, may say something else
    letters = sorted(found.values(), key=lambda letter: letter.rejected)
    return [replace(letter, replayed=letter.key in replayed) for letter in letters]


def find(log: Log, topic: str, key: str) -> tuple[Record, Record | None]:
    """Return the letter of a key, and the one that has its bytes, None where retention took it; raises `StreamlearnError`."""
    known: dict[str, Record] = {}
    found: tuple[Record, str] | None = None
    for record in read(log, topic):
        letter = Letter.of(record)
        if letter is None or record.header(REPLAYED) is not None:
            continue
        if letter.key == letter.carrier and letter.key.rpartition("-")[0] == key.rpartition("-")[0]:
            known.setdefault(letter.key, record)
        if letter.key == key:
            found = record, letter.carrier
    if found is not None:
        return found[0], known.get(found[1])
    raise StreamlearnError(f"no letter {key} in topic {topic}")


def original_headers(carrier: Record) -> tuple[tuple[str, bytes], ...]:
    """Return the headers that the record had when it was rejected."""
    return tuple((name, data) for name, data in carrier.headers if not name.startswith(PREFIX))


def original_key(carrier: Record) -> bytes | None:
    """Return the key that the record had."""
    return carrier.header(PREFIX + "key")


def sendable(log: Log, topic: str, chosen: Iterable[Letter]) -> Iterator[tuple[Record, list[Letter]]]:
    """Give the records whose samples can be sent again, each with its letters among those chosen.

    A letter without its record's bytes is not among them: they are gone, were cut, or never were (a tombstone).
    """
    wanted: dict[str, list[Letter]] = {}
    for letter in chosen:
        wanted.setdefault(letter.carrier, []).append(letter)
    for record in read(log, topic):
        key = (record.key or b"").decode(errors="replace")
        if key in wanted and record.header(REPLAYED) is None and record.header(PREFIX + "value-in") is None:
            letters = wanted.pop(key)
            if record.value is not None and record.header(CUT) is None:
                yield record, letters


def targets(sink: Sink, chosen: Iterable[Letter], to: str | None) -> dict[str, int]:
    """Return the topics that letters go to, with their partitions; raises `StreamlearnError` where one is not there."""
    return {name: sink.partitions(name) for name in {to or letter.topic for letter in chosen}}


def replay(log: Log, sink: Sink, topic: str, chosen: Sequence[Letter], to: str | None) -> Iterator[Letter]:
    """Send what is sendable of letters to their own topic or another, and mark the letters; give those that were sent.

    Raises `StreamlearnError` where something cannot be sent.
    """
    partitions = targets(sink, chosen, to)
    group: Group = []
    size = 0
    for record, letters in sendable(log, topic, chosen):
        group.append((record, letters))
        size += len(record.value or b"")
        if len(group) == GROUP_RECORDS or size >= GROUP_BYTES:
            yield from _send(sink, topic, group, partitions, to)
            group, size = [], 0
    yield from _send(sink, topic, group, partitions, to)


def _send(sink: Sink, topic: str, group: Group, partitions: Mapping[str, int], to: str | None) -> Iterator[Letter]:
    """Send some records, and mark their letters only when they are acknowledged."""
    for record, letters in group:
        target = to or letters[0].topic
        headers = tuple(header for header in original_headers(record) if header[0] != ATTEMPT)
        count = str(max(letter.attempts for letter in letters) + 1).encode()
        sink.append(
            target,
            letters[0].partition % partitions[target],
            _value(record, letters),
            key=original_key(record),
            headers=(*headers, (ATTEMPT, count)),
        )
    sink.flush()
    sent = [letter for _, letters in group for letter in letters]
    for letter in sent:
        mark = ((REPLAYED, (to or letter.topic).encode()),)
        sink.append(topic, letter.lies_in, None, key=letter.key.encode(), headers=mark)
    sink.flush()
    yield from sent


def _value(record: Record, letters: list[Letter]) -> bytes:
    """Return the bytes to be sent: of a record of many samples those alone that were rejected, the others were learned."""
    assert record.value is not None
    if letters[0].samples == 1:
        return record.value
    return cut_batch(record.value, sorted(letter.index for letter in letters))
