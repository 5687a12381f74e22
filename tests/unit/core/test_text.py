"""Tests of the order of names."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from streamlearn.core.text import natural_key

ORDERED = ["007", "08", "9²", "10²", "9" * 5000]


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
