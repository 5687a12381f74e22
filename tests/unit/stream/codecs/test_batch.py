"""Tests of batch records."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from streamlearn.stream.codecs.registry import CODECS
from streamlearn.stream.decoder import RecordDecoder
from streamlearn.stream.logs.base import Record

labels = st.one_of(st.integers(-(2**62), 2**62), st.text(max_size=8))


@given(y=st.one_of(st.lists(st.integers(-(2**60), 2**60), min_size=1, max_size=6), st.lists(labels, min_size=1, max_size=6)),
       data=st.data())  # fmt: skip
def test_a_subset_of_a_batch_keeps_its_bits(y: list[Any], data: st.DataObject) -> None:
    """`subset` keeps exactly the chosen samples and labels, including the payload bits of NaN."""
    x = data.draw(arrays(np.uint32, (len(y), 3))).view(np.float32)
    chosen = sorted(data.draw(st.sets(st.integers(0, len(y) - 1), min_size=1)))
    y = [label % 2**62 if isinstance(label, int) else label for label in y]
    value = CODECS["batch"].subset(CODECS["batch"].encode(x, y), chosen, len(y))
    decoded = RecordDecoder([3], "float32", "batch", 1 << 20).decode(Record("t", 0, 0, 0.0, None, value))
    assert decoded.x.tobytes() == x[chosen].tobytes()
    assert decoded.y == [y[place] for place in chosen]
