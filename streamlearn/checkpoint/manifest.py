"""One checkpoint: its manifest, with the hash of every file, and reading it."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from streamlearn.core.errors import ConfigurationError, InputOutputError
from streamlearn.core.files import read_plain_file

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

FORMAT = 2  # 2: one file may contain the tensors of several tasks, and the accuracy matrix has its own file
MANIFEST = "MANIFEST.json"
NAME = re.compile(r"ckpt-([0-9]{12})")
FILE = re.compile(r"[a-z0-9][a-z0-9_.-]{0,120}\.(safetensors|json)")
TAG = re.compile(r"(?!latest$|ckpt-|\d+$)[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
TAG_FILE = "tag-"  # a checkpoint with the tag NAME has an empty file tag-NAME
MAX_MANIFEST_BYTES = 16 << 20


class BrokenCheckpoint(InputOutputError):  # noqa: N818 - the name says what the checkpoint is
    """A checkpoint has a missing file, or one that does not match its hash."""


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


def load(path: Path, *files: str, optional: Sequence[str] = (), named: bool = True) -> Checkpoint:
    """Return the checkpoint in a directory, after checking the hashes of `files`, and of the `optional` ones that it has.

    `named`: see `parse`. Raises `BrokenCheckpoint` if the manifest or a file is not valid, `ConfigurationError` if its format
    is a later one.
    """
    _check_format(path)
    if (checkpoint := parse(path, named=named)) is None:
        hint = "" if named else "; the directory of a checkpoint must have this file"
        raise BrokenCheckpoint(f"{path / MANIFEST}: cannot be read{hint}")
    for file in (*files, *(file for file in optional if file in checkpoint.manifest["files"])):
        checkpoint.read(file)
    return checkpoint


def parse(path: Path, *, named: bool = True) -> Checkpoint | None:
    """Return the checkpoint in a directory, or None if its manifest is not valid.

    With `named`, the directory must have the name that the manifest gives.
    """
    try:
        manifest = json.loads(read_plain_file(path / MANIFEST, MAX_MANIFEST_BYTES))
        if manifest["sha256"] != manifest_digest(manifest):
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


def manifest_digest(manifest: Mapping[str, Any]) -> str:
    """Return the hash of a manifest without its own hash."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
