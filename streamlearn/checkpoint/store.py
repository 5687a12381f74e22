"""Checkpoints: directories that are complete or absent, each with the positions in the stream.

The steps of a save, in this order:

1. a copy of the state is taken between two batches; all later steps run in the writer thread (done by the job)
2. the dead letters before the copied positions become durable (done by the job)
3. the free disk space is checked
4. every file is written into a temporary directory and synced, several at a time. Files that never change are hard links to
   those of the previous checkpoint, or copies where the file system has no links
5. `MANIFEST.json` with the hash of every file is written, as the last file
6. the directory is synced and renamed, and its parent is synced
7. old checkpoints are removed
8. the positions are committed to the broker (done by the job)

After a crash between any two steps the previous checkpoint is still valid.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import stat
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from streamlearn import __version__
from streamlearn.core.errors import (
    AlreadyRunningError,
    ConfigurationError,
    InputOutputError,
    StreamlearnError,
    UsageError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    Content = bytes | Callable[[], bytes] | None

logger = logging.getLogger(__name__)

FORMAT = 2  # 2: one file may contain the tensors of several tasks, and the accuracy matrix has its own file
MANIFEST = "MANIFEST.json"
NAME = re.compile(r"ckpt-([0-9]{12})")
FILE = re.compile(r"[a-z0-9][a-z0-9_.-]{0,120}\.(safetensors|json)")
TAG = re.compile(r"(?!latest$|ckpt-|\d+$)[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
TAG_FILE = "tag-"  # a checkpoint with the tag NAME has an empty file tag-NAME
OWN_KEYS = {"format", "id", "parent", "created", "version", "files", "sha256"}
"""Keys of the manifest that `restore` does not copy, because every checkpoint has its own."""

MAX_MANIFEST_BYTES = 16 << 20
SPARE_BYTES = 16 << 20  # left free on the disk for other files of the daemon
COPY_BYTES = 1 << 20  # size of a chunk when a file is copied
SYNC_THREADS = 32  # files of a checkpoint that are synced at the same time


class BrokenCheckpoint(InputOutputError):  # noqa: N818 - the name says what the checkpoint is
    """A checkpoint has a missing file, or one that does not match its hash."""


class LockLost(StreamlearnError):  # noqa: N818 - the name says what happened
    """This process no longer holds the lock of the state directory: it may not write there, and the daemon ends."""


class LockRemoved(LockLost, InputOutputError):  # noqa: N818 - as `LockLost`
    """The file of the lock is no longer there."""


class LockReplaced(LockLost, AlreadyRunningError):  # noqa: N818 - as `LockLost`
    """The file of the lock is another one, which another daemon may hold."""


@dataclass(frozen=True)
class Checkpoint:
    """A durable checkpoint and its manifest."""

    path: Path
    manifest: Mapping[str, Any]

    @property
    def id(self) -> str:
        """Its directory's name: `ckpt-` and a sequence number."""
        return self.path.name

    @property
    def sequence(self) -> int:
        """Its number: later checkpoints have higher ones."""
        return int(self.path.name.removeprefix("ckpt-"))

    @property
    def origin(self) -> str:
        """The id of the checkpoint that `restore` copied it from, or its own id."""
        return str(self.manifest.get("restored_from", self.id))

    @property
    def created(self) -> float:
        """The Unix time at which it was saved."""
        return datetime.fromisoformat(self.manifest["created"]).timestamp()

    @property
    def num_bytes(self) -> int:
        """The size of its files, including linked ones."""
        return sum(entry["size"] for entry in self.manifest["files"].values())

    @property
    def tags(self) -> list[str]:
        """The tags that users gave it. Retention never removes a checkpoint with a tag."""
        return sorted(path.name.removeprefix(TAG_FILE) for path in self.path.glob(f"{TAG_FILE}*"))

    def summary(self) -> dict[str, Any]:
        """Return the part of it that `status` shows."""
        return {
            "id": self.id,
            "step": self.manifest["step"],
            "created": self.manifest["created"],
            "bytes": self.num_bytes,
        }

    def read(self, name: str) -> bytes:
        """Return a file's content; raises `BrokenCheckpoint` if it does not match the manifest."""
        entry = self.manifest["files"].get(name)
        if entry is None:
            raise BrokenCheckpoint(f"{self.path}: has no {name}")
        try:
            content = read_plain_file(self.path / name, entry["size"])
        except OSError as error:
            raise BrokenCheckpoint(f"{self.path / name}: {error.strerror}") from error
        if len(content) != entry["size"] or hashlib.sha256(content).hexdigest() != entry["sha256"]:
            raise BrokenCheckpoint(f"{self.path / name}: does not match its hash in {MANIFEST}")
        return content

    def read_json(self, name: str) -> dict[str, Any]:
        """Return the content of a JSON file; raises `BrokenCheckpoint` if it does not match the manifest."""
        tree: dict[str, Any] = json.loads(self.read(name))
        return tree

    def verify(self) -> None:
        """Check the hash of every file; raises `BrokenCheckpoint` for the first that does not match."""
        for name in self.manifest["files"]:
            self.read(name)


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
        self.links_refused = False  # the file system has no hard links, so files are copied

    def all(self) -> list[Checkpoint]:
        """Return the checkpoints with a readable manifest, newest first."""
        return [checkpoint for path in self.paths() if (checkpoint := _parse(path)) is not None]

    def newest(self) -> Checkpoint | None:
        """Return the newest checkpoint with a readable manifest; None if there is none or the directory cannot be read."""
        try:
            return next((found for path in self.paths() if (found := _parse(path)) is not None), None)
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
            if name in {"latest", path.name, str(int(path.name.removeprefix("ckpt-")))} or _has_tag(path, name):
                try:
                    checkpoint = _load(path)
                    for file in (*files, *(file for file in optional if file in checkpoint.manifest["files"])):
                        checkpoint.read(file)
                except BrokenCheckpoint as error:
                    if name != "latest":
                        raise
                    logger.warning("%s; using the checkpoint before it", error)
                else:
                    return checkpoint
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
                checkpoint = _load(path)
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
        if self.links_refused and newest is not None:
            copied = [name for name, content in files.items() if content is None]
            num_bytes += sum(newest.manifest["files"][name]["size"] for name in copied)
        self._check_space(num_bytes)
        final = self.root / f"ckpt-{sequence:012d}"
        temporary = self.root / f".tmp-{final.name}"
        try:
            temporary.mkdir(mode=0o700)
            entries = self._add_files(temporary, files, newest)
            manifest = {
                "format": FORMAT,
                "id": final.name,
                "parent": newest.id if newest else None,
                "created": datetime.now(UTC).isoformat(timespec="milliseconds"),
                "version": __version__,
                **info,
                "files": entries,
            }
            manifest["sha256"] = _digest(manifest)
            for tag in tags:
                if self._other_with(tag, final) is None:
                    _sync(_write(temporary / f"{TAG_FILE}{tag}", b""))
            _sync(_write(temporary / MANIFEST, json.dumps(manifest, indent=1, allow_nan=False).encode()))
            _sync_directory(temporary)
            self.before_write()  # again, because writing takes a while
            temporary.rename(final)
            _sync_directory(self.root)
            for tag in tags:  # again, because another process may have used the tag meanwhile
                self._withdraw(tag, final)
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
        """Remove the checkpoints that no rule keeps, and return them.

        These are kept: the newest `keep`; among older ones, the newest of each hour for the last `hourly` hours that have one;
        the first one after the end of each of the last `task_ends` tasks; and every one with a tag. The first two rules skip
        a checkpoint that adds nothing to the next newer one (see `_repeats`).
        """
        keep, hourly = keep or self.keep, self.hourly if hourly is None else hourly
        task_ends = self.task_ends if task_ends is None else task_ends
        checkpoints = self.all()
        newer = [None, *checkpoints]
        distinct = [c for c, next_ in zip(checkpoints, newer, strict=False) if next_ is None or not _repeats(c, next_)]
        hours: dict[int, Checkpoint] = {}
        for checkpoint in distinct[keep:]:
            hours.setdefault(int(checkpoint.created // 3600), checkpoint)
        ends = _after_task_ends(checkpoints)
        kept = {c.id for c in [*distinct[:keep], *list(hours.values())[:hourly]]}
        kept |= {c.id for c in (ends if task_ends == "all" else ends[:task_ends])}
        gone = [checkpoint for checkpoint in checkpoints if checkpoint.id not in kept and not checkpoint.tags]
        if not dry_run:
            for checkpoint in gone:
                self._remove(checkpoint)
        return gone

    def tag(self, name: str, tag: str) -> Checkpoint:
        """Give a checkpoint a tag, so that retention keeps it; raises `StreamlearnError` if that is not possible."""
        self.check_tag(tag)
        found = self.find(name)
        try:
            _sync(_write(found.path / f"{TAG_FILE}{tag}", b""))
            _sync_directory(found.path)
            other = self._withdraw(tag, found.path)
        except OSError as error:
            raise StreamlearnError.from_os_error(error, found.path) from error
        if other is not None:
            raise _tag_is_taken(tag, other)
        return found

    def check_tag(self, tag: str) -> None:
        """Raise `StreamlearnError` if the tag is not valid (2), or another checkpoint has it."""
        if not TAG.fullmatch(tag):
            raise UsageError(
                f"tag {tag!r:.80}: expected at most 64 letters, digits, dots, dashes and underscores, starting with a letter "
                "or digit; not `latest`, not only digits, and not starting with `ckpt-`",
            )
        if (other := self._other_with(tag)) is not None:
            raise _tag_is_taken(tag, other)

    def _other_with(self, tag: str, than: Path | None = None) -> Path | None:
        """Return a checkpoint with this tag, other than `than`, or None."""
        return next((path for path in self.paths() if path != than and _has_tag(path, tag)), None)

    def _withdraw(self, tag: str, path: Path) -> Path | None:
        """Remove a tag from a checkpoint again if another one has it too; return that one, or None.

        The daemon and `streamlearn checkpoint tag` may set the same tag at the same time, so each checks after it has written.
        """
        other = self._other_with(tag, path)
        if other is not None:
            (path / f"{TAG_FILE}{tag}").unlink(missing_ok=True)
        return other

    def untag(self, tag: str) -> str:
        """Remove a tag and return the id of its checkpoint, which retention may remove from now on."""
        for path in self.paths():
            if _has_tag(path, tag):
                try:
                    (path / f"{TAG_FILE}{tag}").unlink()
                except OSError as error:
                    raise StreamlearnError.from_os_error(error) from error
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

    def _add_files(self, directory: Path, files: Mapping[str, Content], parent: Checkpoint | None) -> dict[str, Any]:
        """Write or link every file into a directory, wait until all are durable, and return their entries of the manifest.

        Several files are synced at the same time, because one sync may take seconds; where no thread can start, one after
        another. If a sync fails, its error is raised after all of them have ended.
        """
        written: deque[int] = deque()  # descriptors to sync
        errors: list[OSError] = []

        def sync_next() -> None:
            with suppress(IndexError):
                try:
                    _sync(written.popleft())
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
        sync: Callable[[int], None],
    ) -> dict[str, Any]:
        """Write or link one file; return its entry of the manifest. The descriptor of a written file is passed to `sync`."""
        if content is not None:
            content = content() if callable(content) else content
            sync(_write(directory / name, content))
            return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        if parent is None:
            raise OSError(errno.ENOENT, f"the previous checkpoint, which has {name}, cannot be read")
        entry: dict[str, Any] = parent.manifest["files"][name]
        try:
            os.link(parent.path / name, directory / name)
        except OSError as error:  # for any reason: if the file cannot be copied either, the copy raises
            sync(_copy(parent.path / name, directory / name, entry["sha256"]))
            if not self.links_refused:
                self.links_refused = True
                logger.warning(
                    "%s: the file system has no hard links (%s): checkpoints copy files, which takes more space and time",
                    self.root,
                    error.strerror or error,
                )
        return entry


def _repeats(checkpoint: Checkpoint, newer: Checkpoint) -> bool:
    """Return whether a checkpoint adds nothing to the next newer one.

    Either both have the same step; or the older one was saved while a task was ending, and the newer one after the end of
    this task only. If saves were merged, the newer one may contain the ends of several tasks.
    """
    old, new = checkpoint.manifest, newer.manifest
    if old["step"] == new["step"]:
        return True
    return bool(old.get("ending")) and new.get("tasks_ended", 0) == old.get("tasks_ended", 0) + 1


def _after_task_ends(checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
    """Return the first checkpoint after each end of a task, newest first; `checkpoints` are newest first.

    If an older checkpoint was restored and a task has ended again, only its later end counts.
    """
    found: dict[int, Checkpoint] = {}
    before = 0
    for checkpoint in reversed(checkpoints):
        ended = checkpoint.manifest.get("tasks_ended", 0)
        if ended > before:
            found[ended] = checkpoint
        before = ended
    return sorted(found.values(), key=lambda checkpoint: checkpoint.sequence, reverse=True)


def _tag_is_taken(tag: str, holder: Path) -> StreamlearnError:
    return StreamlearnError(f"tag {tag}: {holder.name} has it; `streamlearn checkpoint untag {tag}` takes it off")


def _has_tag(path: Path, tag: str) -> bool:
    return TAG.fullmatch(tag) is not None and (path / f"{TAG_FILE}{tag}").is_file()


def _check_format(path: Path) -> None:
    """Raise `ConfigurationError` for a checkpoint of a later version: it may be valid, and we cannot know."""
    try:
        found = json.loads(read_plain_file(path / MANIFEST, MAX_MANIFEST_BYTES))["format"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return
    if isinstance(found, int) and found > FORMAT:
        raise ConfigurationError(
            f"{path}: has format {found}, and this version reads up to {FORMAT}. Install the later version that wrote it, or "
            "move the checkpoint away to continue from the one before it",
        )


def open_checkpoint(path: Path, *files: str, optional: Sequence[str] = ()) -> Checkpoint:
    """Return the checkpoint in a directory of any name, after checking the hashes of these files.

    Raises `BrokenCheckpoint` if the manifest or a file is not valid, `ConfigurationError` if its format is a later one.
    """
    _check_format(path)
    if (checkpoint := _parse(path, named=False)) is None:
        raise BrokenCheckpoint(f"{path / MANIFEST}: cannot be read; the directory of a checkpoint must have this file")
    for file in (*files, *(file for file in optional if file in checkpoint.manifest["files"])):
        checkpoint.read(file)
    return checkpoint


def _load(path: Path) -> Checkpoint:
    """Return the checkpoint in a directory.

    Raises `BrokenCheckpoint` if its manifest cannot be read, `ConfigurationError` if its format is a later one.
    """
    _check_format(path)
    if (checkpoint := _parse(path)) is None:
        raise BrokenCheckpoint(f"{path / MANIFEST}: cannot be read")
    return checkpoint


def _parse(path: Path, *, named: bool = True) -> Checkpoint | None:
    """Return the checkpoint in a directory, or None if its manifest is not valid.

    With `named`, the directory must have the name that the manifest gives.
    """
    try:
        manifest = json.loads(read_plain_file(path / MANIFEST, MAX_MANIFEST_BYTES))
        if manifest["sha256"] != _digest(manifest):
            return None
        names = manifest["files"]
        if (
            manifest["format"] not in range(1, FORMAT + 1)
            or (named and manifest["id"] != path.name)
            or not all(FILE.fullmatch(name) for name in names)
        ):
            return None
        manifest["step"], datetime.fromisoformat(manifest["created"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return Checkpoint(path, manifest)


def _digest(manifest: Mapping[str, Any]) -> str:
    """Return the hash of a manifest without its own hash."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_plain_file(path: Path, limit: int) -> bytes:
    """Return the content of a regular file of at most `limit` bytes.

    Raises `OSError`, also for a larger file, a link, a pipe or a device.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        if found.st_size > limit:
            raise OSError(errno.EFBIG, f"has {found.st_size} bytes, expected at most {limit}")
        return file.read(limit)


def _create(path: Path) -> int:
    """Create a file that only its owner can read, and return its descriptor."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def _copy(source: Path, target: Path, sha256: str) -> int:
    """Copy a file, and return the descriptor of the copy for `_sync`; raises `OSError`, also if the hash differs."""
    found = hashlib.sha256()
    origin = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(origin, "rb") as read:
        descriptor = _create(target)
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


def _write(path: Path, content: bytes) -> int:
    """Write a new file, and return its descriptor for `_sync`; raises `OSError`."""
    descriptor = _create(path)
    try:
        with os.fdopen(descriptor, "wb", closefd=False) as file:
            file.write(content)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _sync(descriptor: int) -> None:
    """Wait until a file is on the disk, and close it; raises `OSError`."""
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_directory(path: Path) -> None:
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
