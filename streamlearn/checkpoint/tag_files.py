"""Tags of checkpoints: the tag NAME is an empty file tag-NAME in the checkpoint's directory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from streamlearn.checkpoint.files import sync, write
from streamlearn.checkpoint.manifest import TAG, TAG_FILE
from streamlearn.core.errors import StreamlearnError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


def add(path: Path, tag: str) -> None:
    """Give a checkpoint a tag; raises `OSError`."""
    sync(write(path / f"{TAG_FILE}{tag}", b""))


def check(tag: str, paths: Sequence[Path]) -> None:
    """Raise `UsageError` if the tag is not valid, `StreamlearnError` if one of these checkpoints has it."""
    if not TAG.fullmatch(tag):
        raise UsageError(
            f"tag {tag!r:.80}: expected at most 64 letters, digits, dots, dashes and underscores, starting with a letter "
            "or digit; not `latest`, not only digits, and not starting with `ckpt-`",
        )
    if (other := holder(tag, paths)) is not None:
        raise already_used(tag, other)


def holder(tag: str, paths: Sequence[Path], *, other_than: Path | None = None) -> Path | None:
    """Return the checkpoint among these that has the tag, not counting `other_than`; None if none has it."""
    return next((path for path in paths if path != other_than and has_tag(path, tag)), None)


def withdraw(tag: str, path: Path, paths: Sequence[Path]) -> Path | None:
    """Remove a tag from a checkpoint again if another one has it too; return that one, or None.

    The daemon and `streamlearn checkpoint tag` may set the same tag at the same time, so each checks after it has written.
    """
    other = holder(tag, paths, other_than=path)
    if other is not None:
        (path / f"{TAG_FILE}{tag}").unlink(missing_ok=True)
    return other


def remove(tag: str, path: Path) -> None:
    """Remove a tag from its checkpoint."""
    try:
        (path / f"{TAG_FILE}{tag}").unlink()
    except OSError as error:
        raise StreamlearnError.from_os_error(error) from error


def has_tag(path: Path, tag: str) -> bool:
    """Return whether a checkpoint has a tag."""
    return TAG.fullmatch(tag) is not None and (path / f"{TAG_FILE}{tag}").is_file()


def already_used(tag: str, holder: Path) -> StreamlearnError:
    """Return the error for a tag that another checkpoint has."""
    return StreamlearnError(f"tag {tag}: {holder.name} has it; `streamlearn checkpoint untag {tag}` takes it off")
