"""Tests of the packed indices of samples that share a letter."""

from __future__ import annotations

import tracemalloc
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamlearn.stream import deadletter


@given(samples=st.integers(1, 99), data=st.data())
def test_packed_indices_are_unpacked(samples: int, data: st.DataObject) -> None:
    """Any set of sample indices is unpacked unchanged; bytes that are not such a set are refused."""
    chosen = sorted(data.draw(st.sets(st.integers(0, samples - 1))))
    packed = deadletter.pack_indices(chosen, samples)
    assert deadletter.unpack_indices(packed, samples) == chosen
    for forged, count in ((packed, samples + 8), (packed[:2], samples), (b"", samples), (packed, 1 << 40)):
        with pytest.raises(ValueError, match=r"not a set of indices|incomplete|incorrect|samples"):
            deadletter.unpack_indices(forged, count)


def test_a_forged_set_takes_little_memory() -> None:
    """A few forged bytes can mean a billion indices: more than one span is refused before a list is made."""
    span = deadletter.SHARED_SPAN
    far = [3 * span, 3 * span + 5, 4 * span - 1]
    assert deadletter.unpack_indices(deadletter.pack_indices(far, 5 * span), 5 * span) == far
    forged = zlib.compress(b"\xff" * (1 << 21))
    tracemalloc.start()
    with pytest.raises(ValueError, match="not a set of indices"):
        deadletter.unpack_indices(forged, 1 << 24)
    assert tracemalloc.get_traced_memory()[1] < 64 << 20
    tracemalloc.stop()
