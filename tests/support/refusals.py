"""How the program refuses a user's configuration or code."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from streamlearn.core.errors import StreamlearnError

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def refused(begin: str, message: str) -> Iterator[None]:
    """Expect a refusal: exit code 78 and one line that begins with the text `begin` and matches `message`."""
    with pytest.raises(StreamlearnError, match=message) as caught:
        yield
    assert caught.value.exit_code == 78
    assert str(caught.value).startswith(begin)
    assert "\n" not in str(caught.value)
