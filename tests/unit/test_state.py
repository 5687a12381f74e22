"""State through bytes: whatever a module's `state_dict` may hold comes back bit by bit, or is refused."""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from typing import Any

import pytest
import torch

from streamlearn import state

TENSORS = {
    "block/1.weight": torch.arange(4.0),
    "block": torch.zeros(()),
    "a/b/c": torch.ones(2, 2).T,
    "50%/%2F.weight": torch.zeros(0, 3),
    " é.\N{SNOWMAN} ": torch.tensor([True, False]),
    "$tuple": torch.tensor([math.nan, -math.inf, -0.0], dtype=torch.float64),
    "view": torch.arange(12.0).reshape(3, 4)[:, 1],
    "half": torch.tensor([1.5], dtype=torch.bfloat16),
    "complex": torch.tensor([[1 + 2j], [3 - 4j]]).conj(),
    "complex/128": torch.tensor(1j, dtype=torch.complex128),
    "empty complex": torch.zeros(2, 0, dtype=torch.complex64),
    "eight": torch.tensor([1.0, 2.0]).to(torch.float8_e4m3fnuz),
    "unsigned": torch.tensor([1, 65535], dtype=torch.uint16),
}
OTHERS: list[Any] = [
    None,
    {"a": {"b": torch.ones(1), "b/c": torch.zeros(2)}, "a/b": [1, [2.5, "x", None, True]]},
    {1: "one", "two": 2, (3, 4): [torch.ones(2, dtype=torch.complex64), {"deep": (1, {2})}]},
    (math.inf, -math.inf, math.nan, b"\x00\xff", "", [], {}, ()),
    {"$tuple": {"0": 1}},
    {"$dict": 1, "x": frozenset({1})},
    OrderedDict(x=torch.arange(3)),
]


def test_tensors_of_any_name_and_type_come_back() -> None:
    """Names with slashes and other characters, all types, views, shared and empty tensors: equal bit by bit."""
    shared = {**TENSORS, "again": TENSORS["a/b/c"]}
    found = state.round_trip(shared)
    assert found.keys() == shared.keys()
    assert [name for name in shared if not state.equal(found[name], shared[name])] == []


@pytest.mark.parametrize("value", OTHERS)
def test_state_that_is_no_tensor_comes_back(value: Any) -> None:
    """What `get_extra_state` may return keeps its types, and its tensors, and JSON holds the rest."""
    tree = {"layer._extra_state": value, "layer.weight": torch.ones(1)}
    assert state.equal(state.round_trip(tree), tree)


def test_groups_keep_names_with_slashes_apart_from_places() -> None:
    """A group of nested dicts and odd names survives, and so does one that a version before wrote."""
    groups: dict[str, state.Tree] = {
        "replay": {"teacher": {"solver": dict(TENSORS), "allowed": torch.ones(1)}, "count": 3},
        "model": dict(TENSORS),
    }
    files, rest, _ = state.pack(groups)
    found = state.unpack(files, json.loads(json.dumps(rest, allow_nan=False)))
    assert state.equal(found, groups)


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (object(), "a value of type object; expected tensors"),
        (torch.eye(2).to_sparse(), "a tensor of layout torch.sparse_coo and type torch.float32; expected a dense one"),
        (torch.zeros(2, device="meta"), "expected a dense one"),
    ],
)
def test_what_cannot_be_saved_is_refused(value: Any, why: str) -> None:
    """A type that no checkpoint can hold is named."""
    with pytest.raises(TypeError, match=why):
        state.split_tensors({"x": value})


def test_a_lone_tensor_with_the_name_of_a_tag_comes_back() -> None:
    """The mark of what JSON cannot hold is no special name to a module."""
    tree = {"$float": torch.ones(2)}
    assert state.equal(state.round_trip(tree), tree)


def test_bits_are_compared() -> None:
    """Equal means equal bits: of numbers, of types, and of what is not a number."""
    assert state.equal(torch.tensor(math.nan), torch.tensor(math.nan))
    assert not state.equal(torch.tensor(0.0), torch.tensor(-0.0))
    assert not state.equal(torch.zeros(1), torch.zeros(1, dtype=torch.int32))
    assert not state.equal({"a": 1}, {"a": 1.0})
    assert not state.equal((1,), [1])
