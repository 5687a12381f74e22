"""The merge of several partitions into one order."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from streamlearn.stream.logs.base import Record
from streamlearn.stream.merge import MAX_RECORDS, PartitionMerge


def record(partition: int, offset: int) -> Record:
    """Return a record of one byte."""
    return Record("t", partition, offset, 0.0, None, b"x")


@given(
    st.lists(st.lists(st.integers(0, 30), unique=True, max_size=12), min_size=1, max_size=4),
    st.randoms(use_true_random=False),
)
def test_the_order_is_a_function_of_the_log(offsets: list[list[int]], chance: object) -> None:
    """However records are polled, they come by offset, then by partition; offsets can have gaps."""
    assert hasattr(chance, "choice")
    left = {p: sorted(each) for p, each in enumerate(offsets)}
    ends = {p: max(each, default=-1) + 1 for p, each in left.items()}
    merge, merged, at = PartitionMerge(), [], dict.fromkeys(left, 0)
    while any(left.values()):
        p = chance.choice([p for p, each in left.items() if each])
        polled = left[p][: chance.choice([1, 2, 5])]
        left[p] = left[p][len(polled) :]
        at[p] = polled[-1] + 1
        merge.add([record(p, offset) for offset in polled])
        awaited = [("t", q) for q in left if at[q] < ends[q]]
        merged += [(r.offset, r.partition) for r in merge.pop_ready(awaited, lambda partition: at[partition[1]])]
    assert merged == sorted((offset, p) for p, each in enumerate(offsets) for offset in each)
    assert not merge


def test_a_partition_with_too_many_waiting_records_is_full() -> None:
    """It is full until its records are taken or discarded."""
    merge = PartitionMerge()
    merge.add([record(0, offset) for offset in range(MAX_RECORDS)])
    assert merge.full == {("t", 0)}
    assert list(merge.pop_ready([("t", 1)], lambda _: 0)) == [record(0, 0)]
    assert merge.full == set()
    merge.clear()
    assert not merge
