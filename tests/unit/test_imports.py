"""Where a user's module is looked for, whatever command runs."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest

from streamlearn.models import imports

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand in a directory of one's own, as a console script sees it: it is not on the import path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def test_a_module_in_the_working_directory_is_found_last(here: Path) -> None:
    """`run` as a console script finds it as `start` does, and it stands in for no installed module."""
    (here / "own_of_this_test.py").write_text("def net(): return 'mine'")
    (here / "colorsys.py").write_text("def rgb_to_hsv(): return 'mine'")
    assert imports.import_function("own_of_this_test:net")() == "mine"
    assert imports.import_function("colorsys:rgb_to_hsv")(1, 1, 1) == (0.0, 0.0, 1)


def test_a_module_that_is_not_there_says_where_it_was_looked_for(here: Path) -> None:
    """The line names the working directory; where a module of the module is what is missing, the line is about that."""
    with pytest.raises(ModuleNotFoundError) as caught:
        imports.import_function("nothing_of_this_test.inner:net")
    assert str(caught.value) == (
        "No module named 'nothing_of_this_test': not found in installed packages, on PYTHONPATH, or in the working directory "
        f"{here}"
    )
    (here / "lacking_of_this_test.py").write_text("import nothing_of_this_test")
    with pytest.raises(ModuleNotFoundError, match=r"^No module named 'nothing_of_this_test'$"):
        imports.import_function("lacking_of_this_test:net")
