"""What benchmarks and tests share: where the data sets are, and configurations that replace parts of others."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

DATA = Path(os.environ.get("STREAMLEARN_DATA", Path(__file__).parents[2] / "shared" / "data"))


def merged(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tree in which the values of `over` replace those of `base`, at any depth."""
    out = dict(base)
    for key, value in over.items():
        known = out.get(key)
        out[key] = merged(known, value) if isinstance(value, dict) and isinstance(known, dict) else value
    return out
