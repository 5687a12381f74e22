"""Immutable dicts share files, so that a checkpoint of many tasks has few files."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest
import torch

from streamlearn import state
from streamlearn.core.immutable import Immutable
from streamlearn.learning.memory import EpisodicMemory

if TYPE_CHECKING:
    from torch import Tensor


def tree(count: int, size: int = 3) -> dict[str, Any]:
    """Return a group with this many sealed probes, in an order without meaning."""
    made = {str(n): Immutable(x=torch.full((size,), n), y=torch.tensor([n])) for n in reversed(range(count))}
    return {"probes": {"sealed": made, "open": {}}}


def restored(groups: dict[str, Any]) -> dict[str, Any]:
    """Return a state restored from its files, read in the order of their names."""
    files, rest, _ = state.pack(groups)
    through = {name: state.from_bytes(name, state.to_bytes(state.host_copies(files[name]))) for name in sorted(files)}
    return state.unpack(through, rest)


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 16, 63, 64, 999])
def test_every_member_is_restored(count: int) -> None:
    """Each member gets its own tensors, whatever the number of files."""
    sealed = restored(tree(count))["probes"]["sealed"]
    assert {int(name) for name in sealed} == set(range(count))
    for name, member in sealed.items():
        assert (member["x"].tolist(), member["y"].tolist()) == ([int(name)] * 3, [int(name)])


def test_files_grow_with_the_logarithm_of_the_members() -> None:
    """1000 probes need at most 15 files; while 256 probes come one after another, each is written at most 5 times."""
    written: dict[str, int] = {}
    before: set[str] = set()
    for count in range(1, 257):
        files, _, immutable = state.pack(tree(count))
        assert set(files) == immutable
        assert len(files) <= 12
        for name in set(files) - before:
            written[name] = len(files[name]) // 2
        before = set(files)
    assert sum(written.values()) <= 5 * 256
    assert len(before) == 1
    assert len(state.pack(tree(1000))[0]) <= 15


def test_the_name_of_a_merged_file_depends_on_its_members(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other members give another name, so a link never has the wrong content; large members keep files of their own."""

    def names(*members: str) -> set[str]:
        return set(state.pack({"replay": {"slots": {name: Immutable(x=torch.zeros(4)) for name in members}}})[0])

    assert names("0-4-16", "1-4-16", "2-4-16", "3-4-16") != names("0-4-16", "1-4-16", "2-4-16", "3-3-12")
    assert names("0-4-16") == {"replay.slots.0-4-16.safetensors"}
    monkeypatch.setattr(state, "BLOCK_BYTES", 63)
    assert len(names("0-4-16", "1-4-16", "2-4-16", "3-4-16")) == 4


def test_a_memory_of_many_tasks_draws_the_same_after_a_restart() -> None:
    """Task 10 does not come before task 2, whatever the order of the files."""
    one = EpisodicMemory(240, 1 << 20, 0)
    for task in range(12):
        one.store(task, torch.full((20, 1), task), torch.zeros(20, dtype=torch.int64))
    other = EpisodicMemory(240, 1 << 20, 0)
    other.load_state_dict(restored({"replay": one.state_dict()})["replay"])
    assert list(other.samples_by_task) == list(one.samples_by_task)
    for _ in range(3):
        a: dict[str, Tensor] = one.draw(50)
        b = other.draw(50)
        assert torch.equal(a["x"], b["x"])
        assert torch.equal(a["task"], b["task"])


def test_names_of_merged_files_are_valid_in_a_manifest() -> None:
    """A checkpoint accepts the name of a merged file."""
    from streamlearn.checkpoint.manifest import FILE

    files, _, _ = state.pack(tree(100))
    assert all(FILE.fullmatch(name) and os.sep not in name for name in files)
