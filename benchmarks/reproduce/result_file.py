"""Store finished cells in a JSON file: one line for each cell, written as soon as it is finished."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from streamlearn.core.text import natural_key

if TYPE_CHECKING:
    from pathlib import Path


class ResultFile:
    """Results by key. A result is valid while its digest equals that of the cell's configuration."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}

    def has_result(self, key: str, digest: str) -> bool:
        """Tell whether there is a result with this digest."""
        return self.entries.get(key, {}).get("digest") == digest

    def add(self, key: str, entry: dict[str, Any]) -> None:
        """Store the result of a finished cell. The file is complete at any moment."""
        self.entries[key] = entry
        lines = [
            f"{json.dumps(name)}: {json.dumps(self.entries[name])}" for name in sorted(self.entries, key=natural_key)
        ]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("{\n" + ",\n".join(lines) + "\n}\n")
        temporary.replace(self.path)
