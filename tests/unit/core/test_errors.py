"""Tests of errors and their exit codes."""

from __future__ import annotations

import errno

import pytest

from streamlearn.core.errors import (
    AccessError,
    InputOutputError,
    StreamlearnError,
    TemporaryError,
    error_with_exit_code,
)
from streamlearn.stream.logs.base import Unreadable


@pytest.mark.parametrize(
    ("number", "code"),
    [(errno.EACCES, 77), (errno.EPERM, 77), (errno.EROFS, 77), (errno.ENOSPC, 74), (errno.ENOENT, 74)],
)
def test_an_os_error_becomes_one_line_and_an_exit_code(number: int, code: int) -> None:
    """A missing permission has another code than an input/output error, and the message names the file."""
    failure = StreamlearnError.from_os_error(OSError(number, "why", "a/file"))
    assert (str(failure), failure.exit_code) == ("a/file: why", code)
    assert str(StreamlearnError.from_os_error(OSError(number, "why", "a/file"), "a state")) == "a state: why"
    assert str(StreamlearnError.from_os_error(OSError(number, "why"))) == "why"


def test_an_exit_code_becomes_an_error_of_its_class() -> None:
    """The answer of the daemon, or a child process, has only a code; an unknown code is kept."""
    assert type(error_with_exit_code(77, "why")) is AccessError
    assert type(error_with_exit_code(1, "why")) is StreamlearnError
    error = error_with_exit_code(-9, "why")
    assert (type(error), error.exit_code, str(error)) == (StreamlearnError, -9, "why")


def test_another_message_keeps_the_class_and_the_attributes() -> None:
    """A caller adds a prefix to a message, and nothing else of the error changes."""
    error = Unreadable("damaged", ("a", 0), 3, 5)
    other = error.with_message("task a: damaged")
    assert (type(other), other.exit_code, str(other), other.end) == (Unreadable, 74, "task a: damaged", 5)
    assert (error.with_message("x") is not error, str(error)) == (True, "damaged")


def test_memory_that_ran_out_is_temporary() -> None:
    """The message keeps how much memory was requested."""
    error = StreamlearnError.from_out_of_memory(MemoryError("9 GB"))
    assert (type(error), str(error)) == (TemporaryError, "out of memory: MemoryError('9 GB')")
    assert isinstance(StreamlearnError.from_os_error(OSError(errno.EIO, "why")), InputOutputError)
