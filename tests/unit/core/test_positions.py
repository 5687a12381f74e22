"""Tests of positions."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamlearn.core.errors import StreamlearnError
from streamlearn.core.positions import Position, Positions

partitions = st.tuples(st.sampled_from(["a", "b"]), st.integers(0, 3))


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
