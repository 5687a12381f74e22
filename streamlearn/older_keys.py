"""Maps keys and names of older versions to those of this version. No other module knows the older ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

TASK_KEYS = {"excused": "forgiven_below"}
"""Keys of a task in `state.json`, up to version 0.1.0 -> keys of this version."""

MODULES = {"streamlearn.models": "streamlearn.learning.models"}
"""Packages whose functions a configuration may name (`package.module:function`), up to version 0.1.0 -> this version."""


def update_task_keys(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return a task's JSON tree with the keys of this version. Values do not change."""
    return {TASK_KEYS.get(key, key): value for key, value in tree.items()}


def current_module(name: str) -> str:
    """Return the name that a module of this package has in this version; other names do not change."""
    for older, current in MODULES.items():
        if f"{name}.".startswith(f"{older}."):
            return current + name.removeprefix(older)
    return name
