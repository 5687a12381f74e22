"""The errors that a user may see: a message of one line, and an exit code for the process. One class an exit code.

The codes follow sysexits.h where it has one. Any part of the program raises the class that fits; a caller that handles one
kind of failure catches its class.
"""

from __future__ import annotations

import copy
import errno
import os
from typing import Self

OUT_OF_MEMORY_MESSAGES = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


class StreamlearnError(Exception):
    """An expected failure: a message for the user, and `exit_code`, with which the process ends."""

    exit_code = 1

    def with_message(self, message: str) -> Self:
        """Return the same error with another message: the same class, exit code and attributes."""
        error = copy.copy(self)
        error.args = (message,)
        return error

    @staticmethod
    def from_os_error(error: OSError, what: object = None) -> StreamlearnError:
        """Convert an `OSError` to an `AccessError` or an `InputOutputError`. The message names the file, or `what`."""
        name = what if what is not None else error.filename
        reason = error.strerror or str(error)
        kind = AccessError if error.errno in {errno.EACCES, errno.EPERM, errno.EROFS} else InputOutputError
        return kind(reason if name is None else f"{name}: {reason}")

    @staticmethod
    def from_out_of_memory(error: Exception) -> TemporaryError:
        """Convert an out-of-memory error; the original message often says how much memory was requested."""
        return TemporaryError(f"out of memory: {error!r:.200}")


class UsageError(StreamlearnError):
    """The command line or a control command is wrong. The code is that of typer, not `EX_USAGE`."""

    exit_code = 2


class NotRunningError(StreamlearnError):
    """No daemon runs in the state directory. `status` of a service has the same code in the Linux Standard Base."""

    exit_code = 3


class DataError(StreamlearnError):
    """The samples are wrong: too many were rejected, or a task has none that can be used."""

    exit_code = os.EX_DATAERR


class UnavailableError(StreamlearnError):
    """A service that is needed does not answer, for example the broker."""

    exit_code = os.EX_UNAVAILABLE


class AlreadyRunningError(StreamlearnError):
    """Another daemon runs in the state directory."""

    exit_code = os.EX_CANTCREAT


class InputOutputError(StreamlearnError):
    """A file or a topic cannot be read or written, or what it contains is damaged."""

    exit_code = os.EX_IOERR


class TemporaryError(StreamlearnError):
    """It does not work now, but may work later: not enough memory, or a daemon that starts or stops."""

    exit_code = os.EX_TEMPFAIL


class AccessError(StreamlearnError):
    """A permission is missing, or the broker refuses the credentials."""

    exit_code = os.EX_NOPERM


class ConfigurationError(StreamlearnError):
    """The configuration is wrong, or does not fit the model, the checkpoint or the stream."""

    exit_code = os.EX_CONFIG


CLASS_OF_EXIT_CODE = {kind.exit_code: kind for kind in StreamlearnError.__subclasses__()}


def error_with_exit_code(exit_code: int, message: str) -> StreamlearnError:
    """Return an error for the exit code of another process: of the fitting class, or with that code if no class has it."""
    error = CLASS_OF_EXIT_CODE.get(exit_code, StreamlearnError)(message)
    error.exit_code = exit_code
    return error


def one_line(error: Exception) -> str:
    """Return the type and the message of an exception, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def is_out_of_memory(error: Exception) -> bool:
    """Return whether the host or the device was out of memory. Torch reports it by an error type, or only in the message."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or any(words in str(error) for words in OUT_OF_MEMORY_MESSAGES)
    )
