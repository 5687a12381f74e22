"""Read letters back from the dead-letter topic, and send their samples again."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from streamlearn.core.errors import StreamlearnError
from streamlearn.core.text import TOPIC_NAME, parse_digits
from streamlearn.stream.codecs.registry import record_subset
from streamlearn.stream.deadletter import HEADER_PREFIX, original_headers, unpack_indices
from streamlearn.stream.logs.base import (
    ATTEMPT_HEADER,
    CONTENT_TYPE,
    CONTROL_HEADER,
    ORIGINAL_SIZE_HEADER,
    BrokerUnavailable,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from streamlearn.stream.logs.base import Headers, LogReader, LogWriter, Record

    SampleId = tuple[str | None, str]  # the topic's id and the letter's key; letters of earlier versions have no id
    Group = list[tuple[Record, bytes, list["Letter"]]]  # records, each with the bytes to send and its letters

LATEST_SECONDS = (2**63 - 1) / 1000  # Kafka's timestamps are milliseconds in 64 bits
POLL_SECONDS = 0.5
SILENCE_SECONDS = 30.0
REPLAYED = HEADER_PREFIX + "replayed-to"  # header of a mark: the letter with the same key was sent to this topic
GROUP_RECORDS = 100  # records sent before their letters are marked: a crash in between sends so many records twice
GROUP_BYTES = 8 << 20
# headers of a mark, of a value that was cut, and of a control record
NEVER_SENT = (REPLAYED, ORIGINAL_SIZE_HEADER, CONTROL_HEADER)


@dataclass(frozen=True, slots=True)
class Letter:
    """The facts of one letter. `rejected` and `timestamp` (of the original record) are in Unix seconds."""

    key: str
    topic: str
    topic_id: str | None  # changes when a topic is deleted and created again; None in letters of earlier versions
    partition: int
    offset: int
    index: int  # of the sample in its record
    samples: int  # in the record
    reason: str
    message: str
    rejected: float
    timestamp: float
    attempts: int  # how often the sample was sent again before
    value_key: str  # the key of the letter that has the record's bytes
    letter_partition: int  # of the dead-letter topic
    replayed: bool = False
    further: bytes = b""  # packed indices of further samples of the record that share this letter

    @property
    def indices(self) -> list[int]:
        """The indices of this letter's samples in their record."""
        return [self.index, *(unpack_indices(self.further, self.samples) if self.further else ())]

    @property
    def sample_id(self) -> SampleId:
        """An identity that no other sample has."""
        return self.topic_id, self.key

    @property
    def record_id(self) -> tuple[str | None, str, int, int, int]:
        """The sample's record: topic id, topic, partition, offset, and number of samples."""
        return self.topic_id, self.topic, self.partition, self.offset, self.samples

    @classmethod
    def from_record(cls, record: Record) -> Letter | None:
        """Return the letter that a record is, or None if it is not a valid one: anybody may write to the topic."""
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
                partition=_parse_number(facts["partition"]),
                offset=_parse_number(facts["offset"]),
                index=_parse_number(facts["index"]),
                samples=_parse_number(facts["samples"]),
                reason=facts["reason"].decode(errors="replace"),
                message=facts["message"].decode(errors="replace"),
                rejected=record.timestamp,
                timestamp=float(facts["timestamp"]),
                attempts=replay_attempts(record),
                value_key=facts.get("value-in", key.encode()).decode(),
                letter_partition=record.partition,
                further=facts.get("further", b""),
            )
            _ = letter.indices  # raises if they are invalid
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
    """The letters of a topic, oldest first, and the number of records that look like letters but are not valid."""

    letters: list[Letter]
    skipped: int


def _parse_number(data: bytes) -> int:
    """Return a number of digits only; raises `ValueError` for other text."""
    if (number := parse_digits(data, 19)) is None:
        raise ValueError(f"{data!r:.40} is not a number")
    return number


def _topic_id(record: Record) -> str | None:
    """Return the topic id in a letter or a mark, or None if it has none."""
    data = record.header(HEADER_PREFIX + "topic-id")
    return None if data is None else data.decode(errors="replace")


def replay_attempts(record: Record) -> int:
    """Return how often a record was sent again."""
    return parse_digits(record.header(ATTEMPT_HEADER) or b"", 9) or 0


def read_records(reader: LogReader, topic: str) -> Iterator[Record]:
    """Yield the records of a topic up to its present end; none if the topic does not exist.

    Raises `BrokerUnavailable` if nothing can be read for `SILENCE_SECONDS`.
    """
    info = reader.topics().get(topic)
    partitions = [(topic, p) for p in info.partitions] if info is not None else []
    bounds, last_progress = reader.bounds(partitions), time.monotonic()
    while len(bounds) < len(partitions):  # the client does not know a topic that was created a moment ago
        _check_silence(topic, last_progress)
        time.sleep(POLL_SECONDS)
        bounds = reader.bounds(partitions)
    reader.assign({place: bounds[place].begin for place in partitions})
    ends = [bounds[place].end for place in partitions]
    previous: list[int] = []
    while (current := [min(reader.position(place), bounds[place].end) for place in partitions]) != ends:
        if current != previous:
            previous, last_progress = current, time.monotonic()
        _check_silence(topic, last_progress)
        for record in reader.poll(POLL_SECONDS):
            if record.offset < bounds[record.topic, record.partition].end:
                yield record


def _check_silence(topic: str, last_progress: float) -> None:
    if time.monotonic() - last_progress > SILENCE_SECONDS:
        raise BrokerUnavailable(f"{topic}: nothing was read for {SILENCE_SECONDS:.0f} s")


def list_letters(reader: LogReader, topic: str) -> LetterList:
    """Return the letters of a topic, oldest first: only the newest letter of each sample, and whether it was replayed."""
    newest: dict[SampleId, Letter] = {}
    replayed: set[SampleId] = set()
    skipped = 0
    for record in read_records(reader, topic):
        if record.header(REPLAYED) is not None:
            replayed.add((_topic_id(record), (record.key or b"").decode(errors="replace")))
        elif (letter := Letter.from_record(record)) is not None:
            # after a change of the configuration a later letter may have another reason
            newest[letter.sample_id] = letter
        else:
            skipped += any(name.startswith(HEADER_PREFIX) for name, _ in record.headers)
    letters = sorted(newest.values(), key=lambda letter: letter.rejected)
    return LetterList([replace(letter, replayed=letter.sample_id in replayed) for letter in letters], skipped)


def find_letter(reader: LogReader, topic: str, key: str) -> tuple[Record, Record | None]:
    """Return the newest letter with a key, and the letter that has its bytes, or None if retention removed that one.

    Raises `StreamlearnError` if there is no such letter.
    """
    holders: dict[SampleId, Record] = {}
    found: tuple[Record, Letter] | None = None
    for record in read_records(reader, topic):
        letter = Letter.from_record(record)
        if letter is None or record.header(REPLAYED) is not None:
            continue
        if letter.key == letter.value_key and letter.key.rpartition("-")[0] == key.rpartition("-")[0]:
            holders.setdefault(letter.sample_id, record)
        if letter.key == key:
            found = record, letter
    if found is not None:
        return found[0], holders.get((found[1].topic_id, found[1].value_key))
    raise StreamlearnError(f"no letter {key} in topic {topic}")


def original_key(record: Record) -> bytes | None:
    """Return the key of the original record of a letter."""
    return record.header(HEADER_PREFIX + "key")


def records_to_send(
    reader: LogReader, topic: str, chosen: Iterable[Letter]
) -> Iterator[tuple[Record, bytes, list[Letter]]]:
    """Yield the records for which the samples of the chosen letters can be sent again.

    Each comes with the bytes to send and those of the chosen letters that it contains. A letter is left out if its record's
    bytes no longer exist, were cut, never existed (a tombstone), or contradict the letter.
    """
    wanted: dict[SampleId, list[Letter]] = {}
    for letter in chosen:
        wanted.setdefault((letter.topic_id, letter.value_key), []).append(letter)
    for record in read_records(reader, topic):
        holder = Letter.from_record(record)
        if holder is None or holder.value_key != holder.key or holder.sample_id not in wanted:
            continue
        letters = [letter for letter in wanted[holder.sample_id] if letter.record_id == holder.record_id]
        if not letters or record.value is None or any(record.header(name) is not None for name in NEVER_SENT):
            continue
        try:
            value = _value_to_send(record.value, record.header(CONTENT_TYPE), letters)
        except ValueError:
            continue
        del wanted[holder.sample_id]
        yield record, value, letters


def target_partitions(
    writer: LogWriter, topic: str, chosen: Iterable[Letter], to: str | None
) -> tuple[dict[str, int], dict[str, StreamlearnError]]:
    """Return the number of partitions of each topic that letters go to, and why the other topics cannot be written to.

    Letters go to their own topics, or all to the topic `to`. Raises `StreamlearnError` if `to` cannot be written to, or if no
    broker answers.
    """
    if to is not None:
        return {to: writer.partitions(to)}, {}
    partitions: dict[str, int] = {}
    refused: dict[str, StreamlearnError] = {}
    for name in sorted({letter.topic for letter in chosen}):
        if name == topic or name.startswith("__"):  # our samples never come from there: the letter is forged
            refused[name] = StreamlearnError(f"{name} is not a topic of samples")
            continue
        try:
            partitions[name] = writer.partitions(name)
        except BrokerUnavailable:
            raise
        except StreamlearnError as error:
            refused[name] = error
    return partitions, refused


def replay(
    reader: LogReader,
    writer: LogWriter,
    topic: str,
    chosen: Sequence[Letter],
    to: str | None,
    partitions: Mapping[str, int],
) -> Iterator[Letter]:
    """Send the samples of letters to their own topics, or all to the topic `to`, and mark the letters; yield the sent ones.

    `partitions` is the result of `target_partitions`: letters of other topics are ignored. Raises `StreamlearnError` if a
    record cannot be sent.
    """
    group: Group = []
    size = 0
    reachable = [letter for letter in chosen if (to or letter.topic) in partitions]
    for record, value, letters in records_to_send(reader, topic, reachable):
        group.append((record, value, letters))
        size += len(value)
        if len(group) == GROUP_RECORDS or size >= GROUP_BYTES:
            yield from _send(writer, topic, group, partitions, to)
            group, size = [], 0
    yield from _send(writer, topic, group, partitions, to)


def _send(
    writer: LogWriter, topic: str, group: Group, partitions: Mapping[str, int], to: str | None
) -> Iterator[Letter]:
    """Send a group of records, and mark their letters after all of them are acknowledged."""
    for record, value, letters in group:
        target = to or letters[0].topic
        headers = tuple(header for header in original_headers(record) if header[0] != ATTEMPT_HEADER)
        count = str(max(letter.attempts for letter in letters) + 1).encode()
        writer.append(
            target,
            letters[0].partition % partitions[target],
            value,
            key=original_key(record),
            headers=(*headers, (ATTEMPT_HEADER, count)),
        )
    writer.flush()
    sent = [letter for _, _, letters in group for letter in letters]
    for letter in sent:
        mark: Headers = ((REPLAYED, (to or letter.topic).encode()),)
        if letter.topic_id is not None:
            mark += ((HEADER_PREFIX + "topic-id", letter.topic_id.encode()),)
        writer.append(topic, letter.letter_partition, None, key=letter.key.encode(), headers=mark)
    writer.flush()
    yield from sent


def _value_to_send(value: bytes, content_type: bytes | None, letters: list[Letter]) -> bytes:
    """Return the bytes to send. Of a record with many samples these are only the letters' samples: the others were learned.

    Raises `ValueError` if the bytes are not a record with as many samples as the letters say.
    """
    if letters[0].samples == 1:
        return value
    indices = sorted({index for letter in letters for index in letter.indices})
    return record_subset(value, indices, letters[0].samples, content_type)
