"""Imports functions that a user names. All commands use the same search path."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamlearn.older_keys import current_module

if TYPE_CHECKING:
    from collections.abc import Callable


def import_function(name: str) -> Callable[..., Any]:
    """Return the function that `package.module:function` names. Raises whatever the import raises.

    Python's search path (installed packages, `PYTHONPATH`) comes first, the working directory last. A console script
    does not search the working directory, and `python -m` does, so without this `run` and `start` would differ.
    """
    module, _, function = name.partition(":")
    module = current_module(module)
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        found: Callable[..., Any] = getattr(importlib.import_module(module), function)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # the module exists; one that it imports does not
        raise ModuleNotFoundError(
            f"{error}: not found in installed packages, on PYTHONPATH, or in the working directory {here}",
            name=error.name,
        ) from error
    return found
