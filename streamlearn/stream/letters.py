"""Dead letters read back: what each of them says, and the records that send their samples again."""

from __future__ import annotations

import math
import re
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from streamlearn.data import TOPIC_NAME, StreamlearnError
from streamlearn.stream.codec import batch_subset
from streamlearn.stream.deadletter import HEADER_PREFIX, unpack_indices
from streamlearn.stream.log import ATTEMPT, CONTROL, CUT, BrokerUnavailable

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from streamlearn.stream.log import Headers, Log, Record, Sink

    Identity = tuple[str | None, str]  # the topic's id and the key; letters of earlier versions have no id
    Group = list[tuple[Record, bytes, list["Letter"]]]

NUMBER = re.compile(rb"[0-9]{1,19}")
LATEST_SECONDS = (2**63 - 1) / 1000  # Kafka's timestamps are milliseconds of 64 bits
POLL_SECONDS = 0.5
SILENCE_SECONDS = 30.0
REPLAYED = HEADER_PREFIX + "replayed-to"  # header of a mark: the letter of the same key was sent to this topic
GROUP_RECORDS = 100  # that are sent, acknowledged and then marked: so many are sent twice after a crash between the two
GROUP_BYTES = 8 << 20
NEVER_SENT = (REPLAYED, CUT, CONTROL)  # headers of a mark, of bytes that were cut, and of a record that is no sample


@dataclass(frozen=True, slots=True)
class Letter:
    """What one letter says of its sample; `rejected` and `timestamp`, the record's own, in Unix seconds."""

    key: str
    topic: str
    topic_id: str | None  # a topic that is deleted and created again has another; None in letters of earlier versions
    partition: int
    offset: int
    index: int  # of the sample in its record
    samples: int  # of the record
    reason: str
    message: str
    rejected: float
    timestamp: float
    attempts: int  # how often it was sent again before
    value_key: str  # key of the letter that has the record's bytes
    letter_partition: int  # partition of the dead-letter topic
    replayed: bool = False
    further: bytes = b""  # packed: further samples of the record that this letter is about

    @property
    def indices(self) -> list[int]:
        """The samples of the record that this letter is about."""
        return [self.index, *(unpack_indices(self.further, self.samples) if self.further else ())]

    @property
    def sample_id(self) -> Identity:
        """What tells this letter's sample from every other sample."""
        return self.topic_id, self.key

    @property
    def record_id(self) -> tuple[str | None, str, int, int, int]:
        """The record of the sample: topic id, topic, partition, offset, and how many samples it has."""
        return self.topic_id, self.topic, self.partition, self.offset, self.samples

    @classmethod
    def from_record(cls, record: Record) -> Letter | None:
        """Return what a record of the dead-letter topic says, or None if it is no letter: anybody may write there."""
        facts = {
            name.removeprefix(HEADER_PREFIX): data or b""
            for name, data in record.headers
            if name.startswith(HEADER_PREFIX)
        }
        try:
            key = (record.key or b"").decode()
            letter = cls(
                key=key,
                topic=facts["topic"].decode(),
                topic_id=_topic_id(record),
                partition=_number(facts["partition"]),
                offset=_number(facts["offset"]),
                index=_number(facts["index"]),
                samples=_number(facts["samples"]),
                reason=facts["reason"].decode(errors="replace"),
                message=facts["message"].decode(errors="replace"),
                rejected=record.timestamp,
                timestamp=float(facts["timestamp"]),
                attempts=replay_attempts(record),
                value_key=facts.get("value-in", key.encode()).decode(),
                letter_partition=record.partition,
                further=facts.get("further", b""),
            )
            _ = letter.indices  # raises where they are none
        except (KeyError, ValueError):
            return None
        return letter if letter.is_consistent else None

    @property
    def is_consistent(self) -> bool:
        """Whether the letter's facts agree with each other, as in every letter that a daemon writes."""
        return (
            TOPIC_NAME.fullmatch(self.topic) is not None
            and self.key == f"{self.topic}-{self.partition}-{self.offset}-{self.index}"
            and self.index < self.samples
            and math.isfinite(self.timestamp)
            and abs(self.timestamp) <= LATEST_SECONDS
        )


@dataclass(frozen=True)
class LetterList:
    """The letters of a topic, oldest first, and how many records look like letters and are none."""

    letters: list[Letter]
    skipped: int


def _number(data: bytes) -> int:
    """Return a number in plain digits; raises `ValueError` for anything else."""
    if not NUMBER.fullmatch(data):
        raise ValueError(f"{data!r:.40} is no number")
    return int(data)


def _topic_id(record: Record) -> str | None:
    """Return the id of the topic of a letter's or a mark's sample, or None if it has none."""
    data = record.header(HEADER_PREFIX + "topic-id")
    return None if data is None else data.decode(errors="replace")


def replay_attempts(record: Record) -> int:
    """Return how often a record was sent again."""
    count = record.header(ATTEMPT) or b""
    return int(count) if count.isdigit() and len(count) < 10 else 0  # bytes.isdigit: 0 to 9 alone


def read_records(log: Log, topic: str) -> Iterator[Record]:
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


def list_letters(log: Log, topic: str) -> LetterList:
    """Return the letters of a topic, oldest first, each sample's newest letter alone, and whether it was replayed."""
    found: dict[Identity, Letter] = {}
    replayed: set[Identity] = set()
    skipped = 0
    for record in read_records(log, topic):
        if record.header(REPLAYED) is not None:
            replayed.add((_topic_id(record), (record.key or b"").decode(errors="replace")))
        elif (letter := Letter.from_record(record)) is not None:
            found[letter.sample_id] = letter  # a later letter, under another configuration, may give another reason
        else:
            skipped += any(name.startswith(HEADER_PREFIX) for name, _ in record.headers)
    letters = sorted(found.values(), key=lambda letter: letter.rejected)
    return LetterList([replace(letter, replayed=letter.sample_id in replayed) for letter in letters], skipped)


def find_letter(log: Log, topic: str, key: str) -> tuple[Record, Record | None]:
    """Return a key's newest letter, and the letter that has its bytes or None if retention removed that one.

    Raises `StreamlearnError` if there is no such letter.
    """
    known: dict[Identity, Record] = {}
    found: tuple[Record, Letter] | None = None
    for record in read_records(log, topic):
        letter = Letter.from_record(record)
        if letter is None or record.header(REPLAYED) is not None:
            continue
        if letter.key == letter.value_key and letter.key.rpartition("-")[0] == key.rpartition("-")[0]:
            known.setdefault(letter.sample_id, record)
        if letter.key == key:
            found = record, letter
    if found is not None:
        return found[0], known.get((found[1].topic_id, found[1].value_key))
    raise StreamlearnError(f"no letter {key} in topic {topic}")


def original_headers(carrier: Record) -> tuple[tuple[str, bytes], ...]:
    """Return the headers that the record had when it was rejected."""
    # Kafka allows null, its client does not
    return tuple((name, data or b"") for name, data in carrier.headers if not name.startswith(HEADER_PREFIX))


def original_key(carrier: Record) -> bytes | None:
    """Return the key that the record had."""
    return carrier.header(HEADER_PREFIX + "key")


def records_to_send(log: Log, topic: str, chosen: Iterable[Letter]) -> Iterator[tuple[Record, bytes, list[Letter]]]:
    """Give the records whose samples can be sent again, each with the bytes to send and its letters among those chosen.

    Some letters cannot be sent: their record's bytes are gone, were cut, never were (a tombstone), or contradict the letter.
    """
    wanted: dict[Identity, list[Letter]] = {}
    for letter in chosen:
        wanted.setdefault((letter.topic_id, letter.value_key), []).append(letter)
    for record in read_records(log, topic):
        carrier = Letter.from_record(record)
        if carrier is None or carrier.value_key != carrier.key or carrier.sample_id not in wanted:
            continue
        letters = [letter for letter in wanted[carrier.sample_id] if letter.record_id == carrier.record_id]
        if not letters or record.value is None or any(record.header(name) is not None for name in NEVER_SENT):
            continue
        try:
            value = _value(record.value, letters)
        except ValueError:
            continue
        del wanted[carrier.sample_id]
        yield record, value, letters


def target_partitions(
    sink: Sink, topic: str, chosen: Iterable[Letter], to: str | None
) -> tuple[dict[str, int], dict[str, StreamlearnError]]:
    """Return the partitions of each topic that letters go to, and why the other topics cannot be written.

    Raises `StreamlearnError` if that one topic is given (`to`), or if no broker answers.
    """
    if to is not None:
        return {to: sink.partitions(to)}, {}
    partitions: dict[str, int] = {}
    refused: dict[str, StreamlearnError] = {}
    for name in sorted({letter.topic for letter in chosen}):
        if name == topic or name.startswith("__"):  # no sample comes from there: somebody else wrote the letter
            refused[name] = StreamlearnError(f"{name} is no topic of samples")
            continue
        try:
            partitions[name] = sink.partitions(name)
        except BrokerUnavailable:
            raise
        except StreamlearnError as error:
            refused[name] = error
    return partitions, refused


def replay(
    log: Log, sink: Sink, topic: str, chosen: Sequence[Letter], to: str | None, partitions: Mapping[str, int]
) -> Iterator[Letter]:
    """Send what is sendable of letters to their own topic or another, and mark the letters; give those that were sent.

    `partitions` is what `targets` returned: letters of other topics are left alone. Raises `StreamlearnError` where a record
    cannot be sent.
    """
    group: Group = []
    size = 0
    for record, value, letters in records_to_send(log, topic, [e for e in chosen if (to or e.topic) in partitions]):
        group.append((record, value, letters))
        size += len(value)
        if len(group) == GROUP_RECORDS or size >= GROUP_BYTES:
            yield from _send(sink, topic, group, partitions, to)
            group, size = [], 0
    yield from _send(sink, topic, group, partitions, to)


def _send(sink: Sink, topic: str, group: Group, partitions: Mapping[str, int], to: str | None) -> Iterator[Letter]:
    """Send some records, and mark their letters only when they are acknowledged."""
    for record, value, letters in group:
        target = to or letters[0].topic
        headers = tuple(header for header in original_headers(record) if header[0] != ATTEMPT)
        count = str(max(letter.attempts for letter in letters) + 1).encode()
        sink.append(
            target,
            letters[0].partition % partitions[target],
            value,
            key=original_key(record),
            headers=(*headers, (ATTEMPT, count)),
        )
    sink.flush()
    sent = [letter for _, _, letters in group for letter in letters]
    for letter in sent:
        mark: Headers = ((REPLAYED, (to or letter.topic).encode()),)
        if letter.topic_id is not None:
            mark += ((HEADER_PREFIX + "topic-id", letter.topic_id.encode()),)
        sink.append(topic, letter.letter_partition, None, key=letter.key.encode(), headers=mark)
    sink.flush()
    yield from sent


def _value(value: bytes, letters: list[Letter]) -> bytes:
    """Return the bytes to be sent: of a record of many samples those alone that were rejected, the others were learned.

    Raises `ValueError` if they are not a record of so many samples.
    """
    if letters[0].samples == 1:
        return value
    return batch_subset(value, sorted({index for letter in letters for index in letter.indices}), letters[0].samples)
