"""Tests of positions, progress, the order of names, and errors of the operating system."""

from __future__ import annotations

import errno
import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamlearn.core.errors import StreamlearnError
from streamlearn.data import Delivery, Observations, Position, Positions, Progress, Task, natural_key

partitions = st.tuples(st.sampled_from(["a", "b"]), st.integers(0, 3))
ORDERED = ["007", "08", "9²", "10²", "9" * 5000]
positions = st.dictionaries(partitions, st.builds(Position, st.integers(0, 99), st.integers(0, 9)))


@given(at=positions, ids=st.dictionaries(st.sampled_from(["a", "b"]), st.text(max_size=3)))
def test_positions_survive_json(at: dict[tuple[str, int], Position], ids: dict[str, str]) -> None:
    """Positions that were written as JSON are read back unchanged."""
    known = {topic: value for topic, value in ids.items() if topic in {topic for topic, _ in at}}
    one = Positions(at, known, "cluster")
    assert Positions.from_json(json.loads(json.dumps(one.to_json()))) == one


@given(one=positions, other=positions)
def test_positions_never_go_back(one: dict[tuple[str, int], Position], other: dict[tuple[str, int], Position]) -> None:
    """`advance` takes the later position of each partition, and raises if one would go backwards."""
    behind = [p for p in other if p in one and other[p] < one[p]]
    if behind:
        with pytest.raises(StreamlearnError, match="would go back"):
            Positions(one).advance(Positions(other))
    else:
        assert Positions(one).advance(Positions(other)).by_partition == {**one, **other}


def test_progress_counts_every_sample() -> None:
    """A delivery updates totals, the task's counts and its marked partitions; JSON keeps them."""
    progress = Progress(tasks=[Task(0, "a")])
    found = Observations(
        consumed=Counter(a=5, b=1),
        outcomes=Counter({("a", "held_out"): 2, ("a", "rejected"): 3, ("b", "late"): 1}),
        new_labels=[(0, 7), (0, "x"), (0, 7)],
        new_words=["mary", "went"],
        task_end_markers=[("a", 0)],
    )
    progress.register_labels(found)
    progress.advance(Delivery(Positions({("a", 0): Position(5)}), found, end_offsets={0: 9}), "trained")
    assert progress.unaccounted() == {}
    assert (progress.labels, progress.tasks[0].labels, progress.tasks[0].marked_partitions) == ([7, "x"], [7, "x"], [0])
    assert progress.tasks[0].end_offsets == {0: 9}
    progress.register_labels(Observations(new_words=["home"]))
    assert progress.vocabulary == ["mary", "went", "home"]
    tree = json.loads(json.dumps(progress.to_json()))
    assert Progress.from_json(tree, progress.positions) == progress
    progress.counts_by_topic["a"]["consumed"] += 1
    assert progress.unaccounted() == {"a": 1}


def test_digits_in_names_are_compared_as_numbers() -> None:
    """t-2 comes before t-10."""
    assert sorted(["t-10", "t-2", "t", "a9", "t-1"], key=natural_key) == ["a9", "t", "t-1", "t-2", "t-10"]


@given(
    st.lists(st.text(alphabet="123²٣५a-", max_size=6), max_size=9).flatmap(st.permutations), st.permutations(ORDERED)
)
def test_the_order_of_names_is_total(names: list[str], known: list[str]) -> None:
    """Digits of other scripts and superscripts are text. Numbers may have any length; leading zeros do not count."""
    assert sorted(names, key=natural_key) == sorted(sorted(names), key=natural_key)
    assert sorted(known, key=natural_key) == ORDERED


@pytest.mark.parametrize(
    ("number", "code"),
    [(errno.EACCES, 77), (errno.EPERM, 77), (errno.EROFS, 77), (errno.ENOSPC, 74), (errno.ENOENT, 74)],
)
def test_an_os_error_becomes_one_line_and_an_exit_code(number: int, code: int) -> None:
    """A missing permission has another code than an input/output error, and the message names the file."""
    failure = StreamlearnError.from_os_error(OSError(number, "why", "a/file"))
    assert (str(failure), failure.exit_code) == ("a/file: why", code)
    assert str(StreamlearnError.from_os_error(OSError(number, "why", "a/file"), "a state")) == "a state: why"
    assert str(StreamlearnError.from_os_error(OSError(number, "why"))) == "why"
