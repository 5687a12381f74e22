"""The hashes that prove that a change of form has changed no number."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks import hashes
from benchmarks.common import merged

if TYPE_CHECKING:
    from pathlib import Path


def test_a_hash_changes_with_what_was_learned_and_with_nothing_else(tmp_path: Path) -> None:
    """The same case has the same hashes, also from its own checkpoint; another learning rate changes what is learned."""
    known = hashes.cases()
    faster: dict[str, Any] = merged(known["si"], {"learner": {"optimizer": {"name": "adam", "lr": 0.01}}})
    first = hashes.run(hashes.ROOT, tmp_path / "first", {"si": known["si"], "faster": faster, "er": known["er"]})
    second = hashes.run(hashes.ROOT, tmp_path / "second", {"si": known["si"]}, tmp_path / "first")
    assert second["si"] == second["si (from the other's checkpoint)"] == first["si"]
    assert all("error" not in found for found in first.values()), first
    assert "-" not in {first["si"][group] for group in first["si"] if group != "generator"}
    changed = {group for group in first["si"] if first["si"][group] != first["faster"][group]}
    assert {"weights", "optimizer", "importances"} <= changed
    assert "positions" not in changed
    assert first["er"]["memories"] != first["si"]["memories"]  # whose reservoir is empty at a task's end
