"""Checkpoints: directories that are complete or absent, each with the positions in the stream.

The steps of a save, in this order:

1. a copy of the state is taken between two batches (done by the job, in the loop's thread)
2. the dead letters before the copied positions become durable (done by the checkpointer; this step and the next ones run
   in its writer thread)
3. the free disk space is checked
4. every file is written into a temporary directory and synced, several at a time. Files that never change are hard links to
   those of the previous checkpoint, or copies where the file system has no links
5. `MANIFEST.json` with the hash of every file is written, as the last file
6. the directory is synced and renamed, and its parent is synced
7. old checkpoints are removed
8. the positions are committed to the broker (done by the checkpointer, in the loop's thread)

After a crash between any two steps the previous checkpoint is still valid.
"""

from __future__ import annotations

import json
import logging
import shutil
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from streamlearn import __version__
from streamlearn.checkpoint import retention, tag_files
from streamlearn.checkpoint.files import sync, sync_directory, write
from streamlearn.checkpoint.manifest import (
    FORMAT,
    MANIFEST,
    NAME,
    BrokenCheckpoint,
    Checkpoint,
    load,
    manifest_digest,
    parse,
)
from streamlearn.checkpoint.writer import FileWriter
from streamlearn.core.errors import ConfigurationError, InputOutputError, StreamlearnError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from streamlearn.checkpoint.writer import Content

logger = logging.getLogger(__name__)

OWN_KEYS = {"format", "id", "parent", "created", "version", "files", "sha256"}
"""Keys of the manifest that `restore` does not copy, because every checkpoint has its own."""

SPARE_BYTES = 16 << 20  # left free on the disk for other files of the daemon


class Store:
    """The checkpoints of one state directory."""

    def __init__(
        self,
        state_dir: Path,
        *,
        keep: int = 3,
        hourly: int = 24,
        task_ends: int | Literal["all"] = 5,
        before_write: Callable[[], None] = lambda: None,
    ) -> None:
        """Set the directory and the retention rules (see `prune`).

        `before_write` is called before each save. It raises an error if this process may not write there any more.
        """
        self.before_write = before_write
        self.root = state_dir / "checkpoints"
        self.keep = keep
        self.hourly = hourly
        self.task_ends = task_ends
        self.num_corrupt = 0  # broken checkpoints found by this process
        self._writer = FileWriter()

    def all(self) -> list[Checkpoint]:
        """Return the checkpoints with a readable manifest, newest first."""
        return [checkpoint for path in self.paths() if (checkpoint := parse(path)) is not None]

    def newest(self) -> Checkpoint | None:
        """Return the newest checkpoint with a readable manifest; None if there is none or the directory cannot be read."""
        try:
            return next((found for path in self.paths() if (found := parse(path)) is not None), None)
        except OSError:  # the save that follows reports it
            return None

    def count(self) -> int | None:
        """Return the number of checkpoints, or None if the directory cannot be read."""
        try:
            return len(self.all())
        except OSError:
            return None

    def paths(self) -> list[Path]:
        """Return the directories of all checkpoints, newest first, including broken ones."""
        if not self.root.is_dir():
            return []
        return sorted((path for path in self.root.iterdir() if NAME.fullmatch(path.name)), reverse=True)

    def find(self, name: str, *files: str, optional: Sequence[str] = ()) -> Checkpoint:
        """Return a checkpoint by its id, number or tag; `latest` is the newest whose manifest and `files` are valid.

        The `optional` files must be valid too if the checkpoint has them. Raises `BrokenCheckpoint` if the named checkpoint is
        broken, and `StreamlearnError` if there is none, or if a later version wrote it.
        """
        paths = self.paths()
        for path in paths:
            if name in {"latest", path.name, str(int(path.name.removeprefix("ckpt-")))} or tag_files.has_tag(
                path, name
            ):
                try:
                    return load(path, *files, optional=optional)
                except BrokenCheckpoint as error:
                    if name != "latest":
                        raise
                    logger.warning("%s; using the checkpoint before it", error)
        known = ", ".join(path.name for path in paths[:5]) or "none"
        broken = "; broken: " + ", ".join(path.name for path in self._corrupt()) if any(self._corrupt()) else ""
        wanted = "valid checkpoint" if name == "latest" else f"checkpoint {name}"
        all_broken = name == "latest" and bool(paths or broken)
        kind = ConfigurationError if all_broken else StreamlearnError
        raise kind(f"{self.root}: no {wanted}; there are: {known}{broken}")

    def newest_valid(self) -> Checkpoint | None:
        """Return the newest valid checkpoint, or None if there never was one; renames newer, broken ones to `.corrupt-*`.

        Raises `ConfigurationError` if there are checkpoints and all are broken, because a silent fresh start would lose
        them. Raises it too if a later version wrote the newest one, because going back behind it would be a silent loss.
        """
        self._remove_leftovers()
        broken = 0
        for path in self.paths():
            try:
                checkpoint = load(path)
                checkpoint.verify()
            except BrokenCheckpoint as error:
                broken += 1
                self.num_corrupt += 1
                logger.error("%s; using the checkpoint before it", error)  # noqa: TRY400 - one line is enough
                path.rename(self.root / f".corrupt-{path.name}")
            else:
                return checkpoint
        if broken or any(self._corrupt()):
            kept = ", ".join(path.name for path in self._corrupt())
            raise ConfigurationError(
                f"{self.root}: no valid checkpoint is left ({kept}); to start from the beginning, move these away",
            )
        return None

    def save(
        self, files: Mapping[str, Content], info: Mapping[str, Any], num_bytes: int = 0, tags: Iterable[str] = ()
    ) -> Checkpoint:
        """Write a checkpoint, remove those that retention does not keep, and return the new one.

        A file given as None is linked to the same file of the newest checkpoint, or copied where the file system has no links.
        A file given as a function is created just before it is written, so that only one is in memory at a time. `num_bytes`
        is about the size of the files to be written. Raises `InputOutputError` if the checkpoint cannot be written, or if
        the disk has no space for it; no part of it is left then.
        """
        self.before_write()
        checkpoint = self._save(files, info, num_bytes, tags)
        try:
            self.prune()
        except OSError as error:  # the new one is durable, so the save has not failed
            logger.warning("%s: old checkpoints cannot be removed: %s", self.root, error.strerror or error)
        return checkpoint

    def _save(
        self, files: Mapping[str, Content], info: Mapping[str, Any], num_bytes: int, tags: Iterable[str] = ()
    ) -> Checkpoint:
        self._make_root()
        newest, sequence = self._newest_and_next_number()
        if self._writer.links_refused and newest is not None:
            copied = [name for name, content in files.items() if content is None]
            num_bytes += sum(newest.manifest["files"][name]["size"] for name in copied)
        self._check_space(num_bytes)
        final = self.root / f"ckpt-{sequence:012d}"
        temporary = self.root / f".tmp-{final.name}"
        try:
            temporary.mkdir(mode=0o700)
            entries = self._writer.add_all(temporary, files, newest)
            manifest = {
                "format": FORMAT,
                "id": final.name,
                "parent": newest.id if newest else None,
                "created": datetime.now(UTC).isoformat(timespec="milliseconds"),
                "version": __version__,
                **info,
                "files": entries,
            }
            manifest["sha256"] = manifest_digest(manifest)
            for tag in tags:
                if tag_files.holder(tag, self.paths(), other_than=final) is None:
                    tag_files.add(temporary, tag)
            sync(write(temporary / MANIFEST, json.dumps(manifest, indent=1, allow_nan=False).encode()))
            sync_directory(temporary)
            self.before_write()  # again, because writing takes a while
            temporary.rename(final)
            sync_directory(self.root)
            for tag in tags:  # again, because another process may have used the tag meanwhile
                tag_files.withdraw(tag, final, self.paths())
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise InputOutputError(f"{final}: cannot be written: {error.strerror or error}") from error
        except StreamlearnError:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        return Checkpoint(final, manifest)

    def newest_valid_before(self, checkpoint: Checkpoint) -> Checkpoint | None:
        """Return the newest valid checkpoint that is older than this one or, for a copy, than its original; None if none is."""
        for older in self.all():
            if older.id < checkpoint.origin:
                try:
                    older.verify()
                except BrokenCheckpoint as error:
                    logger.warning("%s; cannot be used for a rollback", error)
                else:
                    return older
        return None

    def restore(self, name: str) -> Checkpoint:
        """Copy an older checkpoint, so that the copy is the newest. No checkpoint is changed or removed."""
        old = self.find(name)
        old.verify()
        info = {key: value for key, value in old.manifest.items() if key not in OWN_KEYS}
        files = {file: partial(old.read, file) for file in old.manifest["files"]}
        return self._save(files, {**info, "restored_from": old.origin}, old.num_bytes)

    def prune(
        self,
        keep: int | None = None,
        hourly: int | None = None,
        task_ends: int | Literal["all"] | None = None,
        *,
        dry_run: bool = False,
    ) -> list[Checkpoint]:
        """Remove the checkpoints that no rule keeps, and return them (see `retention.without_rule`)."""
        keep, hourly = keep or self.keep, self.hourly if hourly is None else hourly
        task_ends = self.task_ends if task_ends is None else task_ends
        gone = retention.without_rule(self.all(), keep, hourly, task_ends)
        if not dry_run:
            for checkpoint in gone:
                self._remove(checkpoint)
        return gone

    def tag(self, name: str, tag: str) -> Checkpoint:
        """Give a checkpoint a tag, so that retention keeps it; raises `StreamlearnError` if that is not possible."""
        self.check_tag(tag)
        found = self.find(name)
        try:
            tag_files.add(found.path, tag)
            sync_directory(found.path)
            other = tag_files.withdraw(tag, found.path, self.paths())
        except OSError as error:
            raise StreamlearnError.from_os_error(error, found.path) from error
        if other is not None:
            raise tag_files.already_used(tag, other)
        return found

    def check_tag(self, tag: str) -> None:
        """Raise `UsageError` if the tag is not valid, `StreamlearnError` if another checkpoint has it."""
        tag_files.check(tag, self.paths())

    def untag(self, tag: str) -> str:
        """Remove a tag and return the id of its checkpoint, which retention may remove from now on."""
        for path in self.paths():
            if tag_files.has_tag(path, tag):
                tag_files.remove(tag, path)
                return path.name
        known = ", ".join(tag for checkpoint in self.all() for tag in checkpoint.tags) or "none"
        raise StreamlearnError(f"{self.root}: no checkpoint has the tag {tag!r:.80}; there are: {known}")

    def remove(self, name: str) -> Checkpoint:
        """Remove a checkpoint, even one with tags; raises `StreamlearnError` for the newest, from which the job continues."""
        found = self.find(name)
        if found.path == self.all()[0].path:  # not counting newer ones without a readable manifest
            raise StreamlearnError(
                f"{found.id} is the newest checkpoint, from which the job continues: it cannot be removed"
            )
        try:
            self._remove(found)
        except OSError as error:
            raise StreamlearnError.from_os_error(error) from error
        return found

    def _remove(self, checkpoint: Checkpoint) -> None:
        """Rename a directory, then remove it: a crash in between leaves no half-removed checkpoint."""
        renamed = self.root / f".del-{checkpoint.id}"
        try:
            checkpoint.path.rename(renamed)
        except FileNotFoundError:  # another process removed it
            return
        shutil.rmtree(renamed, ignore_errors=True)

    def _check_space(self, num_bytes: int) -> None:
        try:
            free = shutil.disk_usage(self.root).free
        except OSError as error:
            raise InputOutputError(f"{self.root}: cannot be read: {error.strerror or error}") from error
        if free < (needed := num_bytes + SPARE_BYTES):
            raise InputOutputError(
                f"{self.root}: a checkpoint needs {needed / 1e6:.1f} MB, and only {free / 1e6:.1f} MB are free"
            )

    def _corrupt(self) -> Iterator[Path]:
        return self.root.glob(".corrupt-*") if self.root.is_dir() else iter(())

    def _make_root(self) -> None:
        try:
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise StreamlearnError.from_os_error(error, f"{self.root}: cannot be created") from error

    def _newest_and_next_number(self) -> tuple[Checkpoint | None, int]:
        """Return the newest checkpoint and the next free number, higher than every one ever used; raises `StreamlearnError`."""
        try:
            numbers = [int(match[1]) for path in self.root.iterdir() if (match := NAME.search(path.name))]
            return next(iter(self.all()), None), max(numbers, default=0) + 1
        except OSError as error:
            raise InputOutputError(f"{self.root}: cannot be read: {error.strerror or error}") from error

    def _remove_leftovers(self) -> None:
        """Remove the directories of saves and removals that a crash has interrupted."""
        if self.root.is_dir():
            for leftover in [*self.root.glob(".tmp-*"), *self.root.glob(".del-*")]:
                shutil.rmtree(leftover, ignore_errors=True)
