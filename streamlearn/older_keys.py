"""Maps JSON keys of older checkpoints to the keys of this version. No other module knows the older keys."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

TASK_KEYS = {"excused": "forgiven_below"}
"""Keys of a task in `state.json`, up to version 0.1.0 -> keys of this version."""


def update_task_keys(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return a task's JSON tree with the keys of this version. Values do not change."""
    return {TASK_KEYS.get(key, key): value for key, value in tree.items()}
