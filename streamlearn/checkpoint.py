"""Checkpoints: directories that either exist or do not, each with the stream's positions inside.

A save, in order: (1) a copy of everything is taken between two batches, and from here on a thread beside the loop works
(the job's part), (2) the dead letters before its positions are acknowledged (the job's part), (3) space is checked, (4)
every file is written under a temporary name and synced, side by side; files that never change are linked from the parent
(or copied, where the file system has no links), (5) MANIFEST.json with every file's hash is written last, (6) the
directory is synced, renamed and its parent synced, (7) old checkpoints are removed, (8) positions are reported to the
broker (the job's part). A crash between any two leaves the previous one in force.
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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from streamlearn import __version__
from streamlearn.data import StreamlearnError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from concurrent.futures import Future
    from pathlib import Path

    Content = bytes | Callable[[], bytes] | None

logger = logging.getLogger(__name__)

FORMAT = 2  # 2: files of several members, and the accuracy matrix apart
MANIFEST = "MANIFEST.json"
NAME = re.compile(r"ckpt-([0-9]{12})")
FILE = re.compile(r"[a-z0-9][a-z0-9_.-]{0,120}\.(safetensors|json)")
TAG = re.compile(r"(?!latest$|ckpt-|\d+$)[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
TAG_FILE = "tag-"  # a checkpoint that has a tag has an empty file of this name followed by the tag
OWN_KEYS = {"format", "id", "parent", "created", "version", "files", "sha256"}  # of a manifest: what no copy takes over
MAX_MANIFEST_BYTES = 16 << 20
SPARE_BYTES = 16 << 20  # left on the disk, for what else the daemon writes there
COPY_BYTES = 1 << 20  # read and written at once where a file is copied
SYNC_THREADS = 32  # files of a checkpoint that are synced at the same time


class BrokenCheckpoint(StreamlearnError):  # noqa: N818 - it says what the checkpoint is
    """A checkpoint that verification refuses."""


class LockLost(StreamlearnError):  # noqa: N818 - it says what happened
    """The state directory is not this process's any more: nothing may be written there, and the daemon ends."""


@dataclass(frozen=True)
class Checkpoint:
    """A durable checkpoint and what its manifest says."""

    path: Path
    manifest: Mapping[str, Any]

    @property
    def id(self) -> str:
        """Its name, `ckpt-` and a sequence number."""
        return self.path.name

    @property
    def sequence(self) -> int:
        """Its place in the order of saving."""
        return int(self.path.name.removeprefix("ckpt-"))

    @property
    def origin(self) -> str:
        """The id of the one whose copy it is, or its own."""
        return str(self.manifest.get("restored_from", self.id))

    @property
    def created(self) -> float:
        """When it was saved, Unix seconds."""
        return datetime.fromisoformat(self.manifest["created"]).timestamp()

    @property
    def num_bytes(self) -> int:
        """Bytes of its files, linked ones included."""
        return sum(entry["size"] for entry in self.manifest["files"].values())

    @property
    def tags(self) -> list[str]:
        """The names that people gave it; retention does not remove a checkpoint that has one."""
        return sorted(path.name.removeprefix(TAG_FILE) for path in self.path.glob(f"{TAG_FILE}*"))

    def summary(self) -> dict[str, Any]:
        """Return what `status` shows of it."""
        return {
            "id": self.id,
            "step": self.manifest["step"],
            "created": self.manifest["created"],
            "bytes": self.num_bytes,
        }

    def read(self, name: str) -> bytes:
        """Return a file's content; raises `BrokenCheckpoint` where it does not match the manifest."""
        entry = self.manifest["files"].get(name)
        if entry is None:
            raise BrokenCheckpoint(f"{self.path}: has no {name}", code=74)
        try:
            content = read_plain_file(self.path / name, entry["size"])
        except OSError as error:
            raise BrokenCheckpoint(f"{self.path / name}: {error.strerror}", code=74) from error
        if len(content) != entry["size"] or hashlib.sha256(content).hexdigest() != entry["sha256"]:
            raise BrokenCheckpoint(f"{self.path / name}: does not match its hash in {MANIFEST}", code=74)
        return content

    def read_json(self, name: str) -> dict[str, Any]:
        """Return a JSON file's tree."""
        tree: dict[str, Any] = json.loads(self.read(name))
        return tree

    def verify(self) -> None:
        """Read every file; raises `BrokenCheckpoint` at the first that does not match."""
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
        """Say where checkpoints lie and which are kept; `before_write` raises where nothing may be written any more."""
        self.before_write = before_write
        self.root = state_dir / "checkpoints"
        self.keep = keep
        self.hourly = hourly
        self.task_ends = task_ends
        self.corrupt = 0  # refused since the start
        self.copies = False  # the file system has refused a hard link

    def all(self) -> list[Checkpoint]:
        """Return the checkpoints whose manifest can be read, newest first."""
        return [checkpoint for path in self.paths() if (checkpoint := _parse(path)) is not None]

    def newest(self) -> Checkpoint | None:
        """Return the newest checkpoint whose manifest can be read, or None, also where they cannot be listed now."""
        try:
            return next((found for path in self.paths() if (found := _parse(path)) is not None), None)
        except OSError:  # the save that follows says why
            return None

    def count(self) -> int | None:
        """Return the number of checkpoints, or None where they cannot be listed now."""
        try:
            return len(self.all())
        except OSError:
            return None

    def paths(self) -> list[Path]:
        """Return every checkpoint's directory, newest first, broken ones too."""
        if not self.root.is_dir():
            return []
        return sorted((path for path in self.root.iterdir() if NAME.fullmatch(path.name)), reverse=True)

    def find(self, name: str, *files: str, optional: Sequence[str] = ()) -> Checkpoint:
        """Return a checkpoint by id, number or tag, or as `latest` the newest whose manifest and `files` are sound.

        The `optional` files must be sound too, if the checkpoint has them. Raises `BrokenCheckpoint` if the checkpoint that
        is named is broken, and `StreamlearnError` if there is none or a later version wrote it.
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
                    logger.warning("%s; falling back to the one before it", error)
                else:
                    return checkpoint
        known = ", ".join(path.name for path in paths[:5]) or "none"
        broken = "; broken: " + ", ".join(path.name for path in self._corrupt()) if any(self._corrupt()) else ""
        what = "sound checkpoint" if name == "latest" else f"checkpoint {name}"
        code = 78 if name == "latest" and (paths or broken) else 1  # there was something, and none of it is sound
        raise StreamlearnError(f"{self.root}: no {what}; there are: {known}{broken}", code=code)

    def newest_sound(self) -> Checkpoint | None:
        """Return the newest checkpoint that verifies; broken ones before it are set aside as `.corrupt-`.

        Raises `StreamlearnError` (78) if there were checkpoints and none is sound: a fresh start is never silent. So too if
        a later version has written one: falling back behind it would be a silent loss.
        """
        self._sweep()
        broken = 0
        for path in self.paths():
            try:
                checkpoint = _load(path)
                checkpoint.verify()
            except BrokenCheckpoint as error:
                broken += 1
                self.corrupt += 1
                logger.error("%s; falling back to the one before it", error)  # noqa: TRY400 - the line says all there is
                path.rename(self.root / f".corrupt-{path.name}")
            else:
                return checkpoint
        if broken or any(self._corrupt()):
            kept = ", ".join(path.name for path in self._corrupt())
            raise StreamlearnError(
                f"{self.root}: no sound checkpoint is left ({kept}); move them away to start afresh", code=78
            )
        return None

    def save(
        self, files: Mapping[str, Content], info: Mapping[str, Any], num_bytes: int = 0, tags: Iterable[str] = ()
    ) -> Checkpoint:
        """Write a checkpoint, remove those that retention does not keep, and return the new one.

        A file given as None is taken over from the newest checkpoint: it is linked, or copied where links are refused. A file
        given as a function is made when its turn comes, so that one at a time is held. `num_bytes`: about how much will be
        written. Raises `StreamlearnError` (74) when it cannot be, or there is no room for it; nothing is left behind then.
        """
        self.before_write()
        checkpoint = self._save(files, info, num_bytes, tags)
        try:
            self.prune()
        except OSError as error:  # the new one is durable: an old one too many is no failure
            logger.warning("%s: old checkpoints cannot be removed: %s", self.root, error.strerror or error)
        return checkpoint

    def _save(
        self, files: Mapping[str, Content], info: Mapping[str, Any], num_bytes: int, tags: Iterable[str] = ()
    ) -> Checkpoint:
        self._make_root()
        newest, sequence = self._next()
        if self.copies and newest is not None:
            copied = [name for name, content in files.items() if content is None]
            num_bytes += sum(newest.manifest["files"][name]["size"] for name in copied)
        self._check_space(num_bytes)
        final = self.root / f"ckpt-{sequence:012d}"
        temporary = self.root / f".tmp-{final.name}"
        try:
            temporary.mkdir(mode=0o700)
            entries = self._put_all(temporary, files, newest)
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
            self.before_write()  # once more: writing takes a while
            temporary.rename(final)
            _sync_directory(self.root)
            for tag in tags:  # once more: another process may have given it away meanwhile
                self._withdraw(tag, final)
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise StreamlearnError(f"{final}: cannot be written: {error.strerror or error}", code=74) from error
        except StreamlearnError:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        return Checkpoint(final, manifest)

    def before(self, checkpoint: Checkpoint) -> Checkpoint | None:
        """Return the newest sound checkpoint that is older than what this one holds, or None."""
        for older in self.all():
            if older.id < checkpoint.origin:
                try:
                    older.verify()
                except BrokenCheckpoint as error:
                    logger.warning("%s; not to be gone back to", error)
                else:
                    return older
        return None

    def restore(self, name: str) -> Checkpoint:
        """Make a copy of an older checkpoint the newest; nothing is rewound in place, and nothing is removed."""
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

        Kept are: the newest `keep`; of those before them the newest of each of the last `hourly` hours; the first one after
        the end of each of the last `task_ends` tasks; and every one that has a tag. To the first two rules, one that repeats
        the next newer one (see `_repeats`) is none of its own.
        """
        keep, hourly = keep or self.keep, self.hourly if hourly is None else hourly
        task_ends = self.task_ends if task_ends is None else task_ends
        checkpoints = self.all()
        newer = [None, *checkpoints]
        apart = [c for c, next_ in zip(checkpoints, newer, strict=False) if next_ is None or not _repeats(c, next_)]
        hours: dict[int, Checkpoint] = {}
        for checkpoint in apart[keep:]:
            hours.setdefault(int(checkpoint.created // 3600), checkpoint)
        ends = _after_task_ends(checkpoints)
        kept = {c.id for c in [*apart[:keep], *list(hours.values())[:hourly]]}
        kept |= {c.id for c in (ends if task_ends == "all" else ends[:task_ends])}
        gone = [checkpoint for checkpoint in checkpoints if checkpoint.id not in kept and not checkpoint.tags]
        if not dry_run:
            for checkpoint in gone:
                self._remove(checkpoint)
        return gone

    def tag(self, name: str, tag: str) -> Checkpoint:
        """Give a checkpoint a name, so that retention keeps it; raises `StreamlearnError` where that cannot be."""
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
        """Raise `StreamlearnError` where no checkpoint can be given this tag."""
        if not TAG.fullmatch(tag):
            raise StreamlearnError(
                f"tag {tag!r:.80}: expected up to 64 letters, digits, dots, dashes and underscores, a letter or digit first; "
                "not `latest`, a number alone, or what begins like an id",
                code=2,
            )
        if (other := self._other_with(tag)) is not None:
            raise _tag_is_taken(tag, other)

    def _other_with(self, tag: str, than: Path | None = None) -> Path | None:
        """Return the checkpoint that has a tag, `than` apart, or None."""
        return next((path for path in self.paths() if path != than and _has_tag(path, tag)), None)

    def _withdraw(self, tag: str, path: Path) -> Path | None:
        """Take a tag off a checkpoint again where another one has it too; return that one, or None.

        The daemon and `streamlearn checkpoint tag` may give the same tag at the same time. Each looks after it has written.
        """
        other = self._other_with(tag, path)
        if other is not None:
            (path / f"{TAG_FILE}{tag}").unlink(missing_ok=True)
        return other

    def untag(self, tag: str) -> str:
        """Take a tag off its checkpoint and return that one's id: from now on retention may remove it."""
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
        """Remove a checkpoint, whatever tags it has; raises `StreamlearnError` for the newest: the job goes on from it."""
        found = self.find(name)
        if found.path == self.all()[0].path:  # a newer one that cannot be read does not count
            raise StreamlearnError(f"{found.id} is the newest checkpoint: the job goes on from it, so it stays")
        try:
            self._remove(found)
        except OSError as error:
            raise StreamlearnError.from_os_error(error) from error
        return found

    def _remove(self, checkpoint: Checkpoint) -> None:
        """Remove a directory, renamed first: a crash between the two leaves nothing that looks like a checkpoint."""
        doomed = self.root / f".del-{checkpoint.id}"
        try:
            checkpoint.path.rename(doomed)
        except FileNotFoundError:  # another process was faster
            return
        shutil.rmtree(doomed, ignore_errors=True)

    def _check_space(self, num_bytes: int) -> None:
        try:
            free = shutil.disk_usage(self.root).free
        except OSError as error:
            raise StreamlearnError(f"{self.root}: cannot be read: {error.strerror or error}", code=74) from error
        if free < (needed := num_bytes + SPARE_BYTES):
            raise StreamlearnError(
                f"{self.root}: {free / 1e6:.1f} MB are free, and a checkpoint needs {needed / 1e6:.1f} MB here", code=74
            )

    def _corrupt(self) -> Iterator[Path]:
        return self.root.glob(".corrupt-*") if self.root.is_dir() else iter(())

    def _make_root(self) -> None:
        try:
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise StreamlearnError(f"{self.root}: cannot be made: {error.strerror}", code=77) from error

    def _next(self) -> tuple[Checkpoint | None, int]:
        """Return the newest checkpoint, and the number that follows every one that ever was; raises `StreamlearnError`."""
        try:
            numbers = [int(match[1]) for path in self.root.iterdir() if (match := NAME.search(path.name))]
            return next(iter(self.all()), None), max(numbers, default=0) + 1
        except OSError as error:
            raise StreamlearnError(f"{self.root}: cannot be read: {error.strerror or error}", code=74) from error

    def _sweep(self) -> None:
        if self.root.is_dir():
            for leftover in [*self.root.glob(".tmp-*"), *self.root.glob(".del-*")]:
                shutil.rmtree(leftover, ignore_errors=True)

    def _put_all(self, directory: Path, files: Mapping[str, Content], parent: Checkpoint | None) -> dict[str, Any]:
        """Put every file into a directory, and return the manifest's entries when all of them are on the disk.

        They are synced side by side, for one sync may take seconds; the error of any is raised, when all are done.
        """
        syncs: list[Future[None]] = []
        with ThreadPoolExecutor(SYNC_THREADS, "sync") as pool:
            entries = {
                name: self._put(directory, name, content, parent, lambda file: syncs.append(pool.submit(_sync, file)))
                for name, content in sorted(files.items())
            }
        for each in syncs:
            each.result()
        return entries

    def _put(
        self,
        directory: Path,
        name: str,
        content: Content,
        parent: Checkpoint | None,
        sync: Callable[[int], None],
    ) -> dict[str, Any]:
        """Put one file into a directory, `sync` its descriptor where it is written, and return the manifest's entry."""
        if content is not None:
            content = content() if callable(content) else content
            sync(_write(directory / name, content))
            return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        if parent is None:
            raise OSError(errno.ENOENT, f"the checkpoint that holds {name} cannot be read")
        entry: dict[str, Any] = parent.manifest["files"][name]
        try:
            os.link(parent.path / name, directory / name)
        except OSError as error:  # for whatever reason: where the file cannot be copied either, the copy says why
            sync(_copy(parent.path / name, directory / name, entry["sha256"]))
            if not self.copies:
                self.copies = True
                logger.warning(
                    "%s: files cannot be linked here (%s): each checkpoint gets its own copies, and needs more room and time",
                    self.root,
                    error.strerror or error,
                )
        return entry


def _repeats(checkpoint: Checkpoint, newer: Checkpoint) -> bool:
    """Tell whether a checkpoint adds nothing to the next newer one.

    Either no step lies between the two, or it was saved while a task was ending, and the newer one holds the end of this
    task alone: where saves were merged it may hold the ends of several.
    """
    old, new = checkpoint.manifest, newer.manifest
    if old["step"] == new["step"]:
        return True
    return bool(old.get("ending")) and new.get("tasks_ended", 0) == old.get("tasks_ended", 0) + 1


def _after_task_ends(checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
    """Return the first checkpoint after each end of a task, newest first, as `checkpoints` are.

    Where an older state was restored and a task has ended again, only the later end counts.
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
    """Raise `StreamlearnError` (78) for a checkpoint of a later version, which is not broken: it is not ours to judge."""
    try:
        found = json.loads(read_plain_file(path / MANIFEST, MAX_MANIFEST_BYTES))["format"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return
    if isinstance(found, int) and found > FORMAT:
        raise StreamlearnError(
            f"{path}: has format {found}, of a later streamlearn; this one reads up to {FORMAT}. Install that version, or move "
            "the checkpoint away to go on from the one before it",
            code=78,
        )


def open_checkpoint(path: Path, *files: str, optional: Sequence[str] = ()) -> Checkpoint:
    """Return the checkpoint in a directory of any name, with these files verified.

    Raises `BrokenCheckpoint` where the manifest or a file is not sound, `StreamlearnError` (78) of a later format.
    """
    _check_format(path)
    if (checkpoint := _parse(path, named=False)) is None:
        raise BrokenCheckpoint(
            f"{path / MANIFEST}: cannot be read: a checkpoint's directory holds it beside the model's files", code=74
        )
    for file in (*files, *(file for file in optional if file in checkpoint.manifest["files"])):
        checkpoint.read(file)
    return checkpoint


def _load(path: Path) -> Checkpoint:
    """Return the checkpoint in a directory.

    Raises `BrokenCheckpoint` if its manifest cannot be read, `StreamlearnError` (78) if its format is a later one.
    """
    _check_format(path)
    if (checkpoint := _parse(path)) is None:
        raise BrokenCheckpoint(f"{path / MANIFEST}: cannot be read", code=74)
    return checkpoint


def _parse(path: Path, *, named: bool = True) -> Checkpoint | None:
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
    """Return the hash of everything else that a manifest says."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_plain_file(path: Path, limit: int) -> bytes:
    """Return what a plain file holds, if that is no more than `limit` bytes; a link, a pipe or a device is an error.

    Raises `OSError`.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "not a plain file")
        if found.st_size > limit:
            raise OSError(errno.EFBIG, f"has {found.st_size} bytes, expected at most {limit}")
        return file.read(limit)


def _create(path: Path) -> int:
    """Return a descriptor of a new file, for its owner alone."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def _copy(source: Path, target: Path, sha256: str) -> int:
    """Copy a file and return a descriptor of it, to be synced; raises `OSError`, also where the hash differs."""
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
    """Write a new file and return a descriptor of it, to be synced; raises `OSError`."""
    descriptor = _create(path)
    try:
        with os.fdopen(descriptor, "wb", closefd=False) as file:
            file.write(content)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _sync(descriptor: int) -> None:
    """Return when a file is on the disk, and close it; an error of `fsync` is an error of the checkpoint."""
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_directory(path: Path) -> None:
    """Have the names in a directory on the disk; a file system that cannot sync directories says so by EINVAL or ENOTSUP."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in {errno.EINVAL, errno.ENOTSUP}:
            raise
    finally:
        os.close(descriptor)
