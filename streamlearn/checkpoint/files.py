"""Writing the files of a checkpoint, durably; all functions raise `OSError`."""

from __future__ import annotations

import errno
import hashlib
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

COPY_BYTES = 1 << 20  # size of a chunk when a file is copied


def create(path: Path) -> int:
    """Create a file that only its owner can read, and return its descriptor."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def copy(source: Path, target: Path, sha256: str) -> int:
    """Copy a file, and return the descriptor of the copy for `sync`; raises `OSError`, also if the hash differs."""
    found = hashlib.sha256()
    origin = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(origin, "rb") as read:
        descriptor = create(target)
        try:
            with os.fdopen(descriptor, "wb", closefd=False) as file:
                while piece := read.read(COPY_BYTES):
                    found.update(piece)
                    file.write(piece)
        except OSError:
            os.close(descriptor)
            raise
    if found.hexdigest() != sha256:
        os.close(descriptor)
        raise OSError(errno.EIO, f"{source} does not match its hash")
    return descriptor


def write(path: Path, content: bytes) -> int:
    """Write a new file, and return its descriptor for `sync`; raises `OSError`."""
    descriptor = create(path)
    try:
        with os.fdopen(descriptor, "wb", closefd=False) as file:
            file.write(content)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def sync(descriptor: int) -> None:
    """Wait until a file is on the disk, and close it; raises `OSError`."""
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_directory(path: Path) -> None:
    """Wait until the entries of a directory are on the disk; raises `OSError`.

    Some file systems cannot sync directories: EINVAL and ENOTSUP are ignored.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in {errno.EINVAL, errno.ENOTSUP}:
            raise
    finally:
        os.close(descriptor)
