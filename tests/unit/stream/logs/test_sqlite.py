"""Embedded topics: the cost of asking for bounds, and the error messages."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from streamlearn.core.errors import StreamlearnError
from streamlearn.stream.logs.base import Bounds, BrokerUnavailable
from streamlearn.stream.logs.sqlite import EmbeddedReader, EmbeddedWriter

if TYPE_CHECKING:
    from pathlib import Path


def steps(path: Path, records: int) -> list[int]:
    """Return SQLite's virtual-machine steps for the bounds and for the first timestamp of a topic of this size."""
    sink = EmbeddedWriter(path)
    sink.create_topic("a", 2)
    for number in range(records):
        sink.append("a", number % 2, b"x" * 10)
    sink.close()
    log = EmbeddedReader(path)
    log.connect()
    info, taken = log.topics()["a"], [0]

    def count() -> int:
        taken[-1] += 1
        return 0

    log.database.set_progress_handler(count, 1)
    assert log.bounds([("a", 0), ("a", 1), ("a", 7)]) == {
        ("a", 0): Bounds(0, records // 2),
        ("a", 1): Bounds(0, records // 2),
        ("a", 7): Bounds(0, 0),
    }
    taken.append(0)
    assert log.first_timestamp(info) is not None
    log.close()
    return taken


def test_the_cost_of_bounds_does_not_depend_on_the_topic_size(tmp_path: Path) -> None:
    """Bounds are asked for every second, so they must not read every record."""
    assert steps(tmp_path / "few", 4) == steps(tmp_path / "many", 4000)


def test_a_full_disk_is_reported_and_loses_no_record(tmp_path: Path) -> None:
    """The message is SQLite's first error, for topics, records and positions; later each record is written once."""
    sink, log = EmbeddedWriter(tmp_path / "a"), EmbeddedReader(tmp_path / "a")
    sink.create_topic("a", 1)
    log.connect()
    for database in (sink._database, log.database):
        database.execute("PRAGMA max_page_count = 20")
    for _ in range(30):
        sink.append("a", 0, b"x" * 5000)
    for _ in range(2):
        with pytest.raises(StreamlearnError, match="database or disk is full") as caught:
            sink.flush()
        assert caught.value.exit_code == 74
    with pytest.raises(StreamlearnError, match="positions cannot be written: database or disk is full"):
        log.commit("g", {(f"{'t' * 200}{number}", 0): number for number in range(1000)})

    def fill() -> None:
        for number in range(1000):
            sink.create_topic(f"{'t' * 200}{number}", 1)

    with pytest.raises(StreamlearnError, match="cannot be created: database or disk is full"):
        fill()
    for database in (sink._database, log.database):
        database.execute("PRAGMA max_page_count = 100000")
    sink.close()
    assert log.bounds([("a", 0)]) == {("a", 0): Bounds(0, 30)}
    log.close()


@pytest.mark.parametrize("recreated", [False, True])
def test_a_removed_file_is_noticed_at_once(tmp_path: Path, *, recreated: bool) -> None:
    """Reader and writer, which have the removed file open, raise, and then use the new file."""
    path = tmp_path / "a"
    sink, log = EmbeddedWriter(path), EmbeddedReader(path)
    sink.create_topic("a", 1)
    log.connect()
    old = log.topics()["a"].topic_id
    for file in tmp_path.iterdir():
        file.unlink()
    if recreated:
        other = EmbeddedWriter(path)
        other.create_topic("a", 1)
        other.close()
    with pytest.raises(BrokerUnavailable, match="was removed or replaced while it was read"):
        log.topics()
    sink.append("dlq", 0, b"letter")
    with pytest.raises(StreamlearnError, match="was removed or replaced while it was written") as caught:
        sink.flush()
    assert caught.value.exit_code == 74
    log.connect()
    sink.create_topic("dlq", 1)
    sink.flush()
    assert set(log.topics()) == ({"a", "dlq"} if recreated else {"dlq"})
    assert old not in {info.topic_id for info in log.topics().values()}
    assert log.bounds([("dlq", 0)]) == {("dlq", 0): Bounds(0, 1)}, "the letter is where people look for it"
    sink.close()
    log.close()
