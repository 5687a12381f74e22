"""Finds what a user has named: one rule for every command."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable


def import_function(name: str) -> Callable[..., Any]:
    """Return what `package.module:function` names; raises what its import raises.

    The module is looked for as Python does it (installed packages, `PYTHONPATH`), and last in the working directory. A
    console script does not look there, and `python -m` does, so without this `run` and `start` would differ.
    """
    module, _, function = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        found: Callable[..., Any] = getattr(importlib.import_module(module), function)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # the module is there, and one that it imports is not
        raise ModuleNotFoundError(
            f"{error}: it is looked for among installed packages, on PYTHONPATH, and last in the working directory {here}",
            name=error.name,
        ) from error
    return found
