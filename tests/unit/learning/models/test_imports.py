"""The search path for a user's module is the same for every command."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest

from streamlearn.learning.models import imports
from streamlearn.learning.models.mlp import MLP

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change into a new directory that is not on the import path, as for a console script."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def test_a_module_in_the_working_directory_is_found_last(here: Path) -> None:
    """`run` as a console script finds it, as `start` does; it never replaces an installed module."""
    (here / "own_of_this_test.py").write_text("def net(): return 'mine'")
    (here / "colorsys.py").write_text("def rgb_to_hsv(): return 'mine'")
    assert imports.import_function("own_of_this_test:net")() == "mine"
    assert imports.import_function("colorsys:rgb_to_hsv")(1, 1, 1) == (0.0, 0.0, 1)


def test_a_missing_module_is_an_error_that_names_the_search_path(here: Path) -> None:
    """The error names the working directory. If the user's module imports a missing module, the error names that one."""
    with pytest.raises(ModuleNotFoundError) as caught:
        imports.import_function("nothing_of_this_test.inner:net")
    assert str(caught.value) == (
        "No module named 'nothing_of_this_test': not found in installed packages, on PYTHONPATH, or in the working directory "
        f"{here}"
    )
    (here / "lacking_of_this_test.py").write_text("import nothing_of_this_test")
    with pytest.raises(ModuleNotFoundError, match=r"^No module named 'nothing_of_this_test'$"):
        imports.import_function("lacking_of_this_test:net")


def test_a_model_is_found_under_its_older_name() -> None:
    """Configurations and checkpoints of version 0.1.0 may name a model of the package by its older module."""
    assert imports.import_function("streamlearn.models.mlp:MLP") is MLP
