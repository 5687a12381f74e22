"""Any value of a `state_dict` is saved and loaded bit by bit, or refused."""

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


def test_tensors_of_any_name_and_dtype_are_restored() -> None:
    """Names with slashes and other characters, all dtypes, views, shared and empty tensors are equal bit by bit."""
    shared = {**TENSORS, "again": TENSORS["a/b/c"]}
    found = state.round_trip(shared)
    assert found.keys() == shared.keys()
    assert [name for name in shared if not state.equal(found[name], shared[name])] == []


@pytest.mark.parametrize("value", OTHERS)
def test_values_other_than_tensors_are_restored(value: Any) -> None:
    """Values of `get_extra_state` keep their Python types; its tensors are saved as tensors, the rest as JSON."""
    tree = {"layer._extra_state": value, "layer.weight": torch.ones(1)}
    assert state.equal(state.round_trip(tree), tree)


def test_names_with_slashes_are_not_mistaken_for_paths() -> None:
    """A group of nested dicts and odd names is restored, also when an older version saved it."""
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
        (torch.eye(2).to_sparse(), r"a tensor of layout torch.sparse_coo; store value.to_dense\(\)"),
        (torch.zeros(2, device="meta"), "a tensor on the device meta, which has no values; create it on a real device"),
    ],
)
def test_unsupported_types_are_refused(value: Any, why: str) -> None:
    """The error says what cannot be saved, and what to store instead."""
    with pytest.raises(TypeError, match=why):
        state.split_tensors({"x": value})


def test_a_single_tensor_with_the_name_of_a_tag_is_restored() -> None:
    """A module may use a name that begins with `$`, which marks encoded values."""
    tree = {"$float": torch.ones(2)}
    assert state.equal(state.round_trip(tree), tree)


def test_equal_compares_bits() -> None:
    """Equal means the same dtypes and the same bits, also for NaN."""
    assert state.equal(torch.tensor(math.nan), torch.tensor(math.nan))
    assert not state.equal(torch.tensor(0.0), torch.tensor(-0.0))
    assert not state.equal(torch.zeros(1), torch.zeros(1, dtype=torch.int32))
    assert not state.equal({"a": 1}, {"a": 1.0})
    assert not state.equal((1,), [1])
