"""The files of a new checkpoint: written, or linked to those of the checkpoint before it."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from streamlearn.checkpoint.files import copy, sync, write

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from streamlearn.checkpoint.manifest import Checkpoint

logger = logging.getLogger(__name__)

Content = bytes | Callable[[], bytes] | None
"""The content of a file, or a function that makes it; None: the file of the checkpoint before."""

SYNC_THREADS = 32  # files of a checkpoint that are synced at the same time


class FileWriter:
    """Writes the files of checkpoints, and remembers whether the file system has hard links."""

    def __init__(self) -> None:
        self.links_refused = False  # the file system has no hard links, so files are copied

    def add_all(self, directory: Path, files: Mapping[str, Content], parent: Checkpoint | None) -> dict[str, Any]:
        """Write or link every file into a directory, wait until all are durable, and return their entries of the manifest.

        Several files are synced at the same time, because one sync may take seconds; where no thread can start, one after
        another. If a sync fails, its error is raised after all of them have ended.
        """
        written: deque[int] = deque()  # descriptors to sync
        errors: list[OSError] = []

        def sync_next() -> None:
            with suppress(IndexError):
                try:
                    sync(written.popleft())
                except OSError as error:
                    errors.append(error)

        def start_sync(pool: ThreadPoolExecutor, descriptor: int) -> None:
            written.append(descriptor)
            with suppress(RuntimeError):  # no thread can start, for example at a limit on processes
                pool.submit(sync_next)

        try:
            with ThreadPoolExecutor(SYNC_THREADS, "sync") as pool:
                entries = {
                    name: self._add_file(directory, name, content, parent, partial(start_sync, pool))
                    for name, content in sorted(files.items())
                }
        finally:
            while written:
                sync_next()
        if errors:
            raise errors[0]
        return entries

    def _add_file(
        self,
        directory: Path,
        name: str,
        content: Content,
        parent: Checkpoint | None,
        on_written: Callable[[int], None],
    ) -> dict[str, Any]:
        """Write or link one file; return its entry of the manifest. `on_written` gets the descriptor of a written file."""
        if content is not None:
            content = content() if callable(content) else content
            on_written(write(directory / name, content))
            return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        if parent is None:
            raise OSError(errno.ENOENT, f"the previous checkpoint, which has {name}, cannot be read")
        entry: dict[str, Any] = parent.manifest["files"][name]
        try:
            os.link(parent.path / name, directory / name)
        except OSError as error:  # for any reason: if the file cannot be copied either, the copy raises
            on_written(copy(parent.path / name, directory / name, entry["sha256"]))
            if not self.links_refused:
                self.links_refused = True
                logger.warning(
                    "%s: the file system has no hard links (%s): checkpoints copy files, which takes more space and time",
                    directory.parent,
                    error.strerror or error,
                )
        return entry
