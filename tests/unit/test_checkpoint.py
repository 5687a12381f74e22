"""Checkpoints: directories that exist or do not, verified by hash, linked, pruned, restored."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest

from streamlearn.checkpoint import MANIFEST, Broken, Checkpoint, Store, _digest
from streamlearn.data import StreamlearnError

if TYPE_CHECKING:
    from pathlib import Path


def save(store: Store, content: bytes = b"1", **files: bytes | None) -> Checkpoint:
    """Save a small checkpoint."""
    named = {f"{name}.safetensors": value for name, value in files.items()}
    return store.save({"state.json": content, **named}, {"step": 1})


def test_what_is_saved_is_found_and_sound(tmp_path: Path) -> None:
    """A checkpoint is found by id, number and `latest`, and its files are its owner's alone."""
    store = Store(tmp_path)
    first, second = save(store, b"1"), save(store, b"2")
    assert [c.id for c in store.all()] == [second.id, first.id]
    assert store.find("latest").id == store.find("2").id == store.find(second.id).id == second.id
    assert store.newest_sound() == store.all()[0]
    assert (second.path / "state.json").stat().st_mode & 0o777 == 0o600
    assert (second.manifest["parent"], store.all()[0].read("state.json")) == (first.id, b"2")


@pytest.mark.parametrize(
    "damage", ["flip", "truncate", "remove", "manifest", "manifest hash", "step", "nested", "link", "device", "pipe"]
)
def test_a_broken_checkpoint_is_set_aside(tmp_path: Path, damage: str) -> None:
    """Whatever breaks in the newest, the one before it is used and the evidence is kept."""
    store = Store(tmp_path)
    good, bad = save(store, b"good"), save(store, b"bad!")
    file, manifest = bad.path / "state.json", bad.path / MANIFEST
    if damage == "flip":
        file.write_bytes(b"bad?")
    elif damage == "truncate":
        file.write_bytes(b"ba")
    elif damage == "remove":
        file.unlink()
    elif damage == "manifest":
        manifest.write_bytes(manifest.read_bytes()[:-5])
    elif damage == "nested":
        manifest.write_bytes(b"[" * 100_000)
    elif damage in {"link", "device", "pipe"}:
        file.unlink()
        if damage == "pipe":
            os.mkfifo(file)
        else:
            file.symlink_to("/dev/zero" if damage == "device" else good.path / "state.json")
    else:
        tree = json.loads(manifest.read_bytes())
        if damage == "step":
            tree["step"] = 2
        else:
            tree["files"]["state.json"]["sha256"] = "0" * 64
        manifest.write_text(json.dumps(tree))
    found = store.newest_sound()
    assert found is not None
    assert (found.id, store.corrupt) == (good.id, 1)
    assert (store.root / f".corrupt-{bad.id}").is_dir()


def test_a_fresh_start_is_never_silent(tmp_path: Path) -> None:
    """When no sound checkpoint is left, the answer is an error with 78, now and at every later start."""
    store = Store(tmp_path)
    (save(store).path / "state.json").write_bytes(b"?")
    for _ in range(2):
        with pytest.raises(StreamlearnError, match="no sound checkpoint is left") as caught:
            store.newest_sound()
        assert caught.value.code == 78
    assert Store(tmp_path / "new").newest_sound() is None


def test_a_crash_while_writing_leaves_the_last_one_in_force(tmp_path: Path) -> None:
    """A temporary directory of a killed process is swept at the next start."""
    store = Store(tmp_path)
    good = save(store)
    (store.root / ".tmp-ckpt-000000000002").mkdir()
    (store.root / ".tmp-ckpt-000000000002" / "state.json").write_bytes(b"half")
    assert store.newest_sound() == store.all()[0]
    assert not (store.root / ".tmp-ckpt-000000000002").exists()
    assert store.all()[0].id == good.id


def test_what_never_changes_is_linked(tmp_path: Path) -> None:
    """A file given as None is the parent's own, by inode, and verifies."""
    store = Store(tmp_path)
    first = save(store, b"1", memory=b"x" * 1000)
    second = save(store, b"2", memory=None)
    inodes = [(c.path / "memory.safetensors").stat().st_ino for c in (first, second)]
    assert inodes[0] == inodes[1]
    second.verify()


def test_what_cannot_be_listed_or_linked_fails_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A save that cannot see the checkpoints before it fails with 74; one that cannot remove an old one does not."""
    store = Store(tmp_path, keep=1, hourly=0)
    first = save(store, b"1", memory=b"x")
    (first.path / MANIFEST).rename(tmp_path / MANIFEST)
    with pytest.raises(
        StreamlearnError, match=r"the checkpoint that holds memory\.safetensors cannot be read"
    ) as caught:
        save(store, b"2", memory=None)
    assert caught.value.code == 74
    (tmp_path / MANIFEST).rename(first.path / MANIFEST)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(store, "all", refuse)
    with pytest.raises(StreamlearnError, match="cannot be read: Too many open files") as caught:
        save(store, b"3")
    assert caught.value.code == 74
    monkeypatch.undo()
    monkeypatch.setattr(store, "prune", refuse)
    fourth = save(store, b"4")
    assert store.all()[0].id == fourth.id


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the disk refuses to sync, the save fails with 74 and no trace."""
    store = Store(tmp_path)
    save(store)

    def refuse(_: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(StreamlearnError, match="Input/output error") as caught:
        save(store)
    assert caught.value.code == 74
    assert [path.name for path in store.root.iterdir()] == ["ckpt-000000000001"]


def test_retention_keeps_the_newest_and_one_an_hour(tmp_path: Path) -> None:
    """Of what is older than the newest three, the last of each hour stays."""
    store = Store(tmp_path, keep=100)
    start = datetime(2026, 1, 1, tzinfo=UTC)
    for number in range(12):
        checkpoint = save(store)
        tree = json.loads((checkpoint.path / MANIFEST).read_bytes())
        tree["created"] = (start + timedelta(minutes=20 * number)).isoformat()
        tree["sha256"] = _digest(tree)
        (checkpoint.path / MANIFEST).write_text(json.dumps(tree))
    gone = store.prune(3, 2, dry_run=True)
    assert len(store.all()) == 12
    store.prune(3, 2)
    assert [c.sequence for c in store.all()] == [12, 11, 10, 9, 6]
    assert {c.sequence for c in gone} == {1, 2, 3, 4, 5, 7, 8}


def test_restore_makes_a_new_generation(tmp_path: Path) -> None:
    """An older state comes back as the newest checkpoint; nothing is rewound in place."""
    store = Store(tmp_path)
    first = save(store, b"old")
    save(store, b"new")
    restored = store.restore("1")
    assert (restored.sequence, restored.read("state.json"), restored.manifest["restored_from"]) == (3, b"old", first.id)
    assert len(store.all()) == 3


def test_latest_is_the_newest_that_can_be_used(tmp_path: Path) -> None:
    """What cannot be read is passed over where no checkpoint is named, and told where one is, or where none is left."""
    store = Store(tmp_path)
    good, flipped, garbled = save(store, b"1"), save(store, b"2"), save(store, b"3")
    (flipped.path / "state.json").write_bytes(b"?")
    (garbled.path / MANIFEST).write_bytes(b"{")
    assert [path.name for path in store.paths()] == [garbled.id, flipped.id, good.id]
    assert store.find("latest").id == flipped.id
    assert store.find("latest", "state.json").id == good.id
    for name in ("3", garbled.id):
        with pytest.raises(Broken, match=r"3/MANIFEST\.json: cannot be read"):
            store.find(name)
    (good.path / "state.json").write_bytes(b"?")
    with pytest.raises(StreamlearnError, match="no sound checkpoint is left"):
        store.newest_sound()
    with pytest.raises(
        StreamlearnError, match=r"no sound checkpoint; there are: none; broken: .*\.corrupt-ckpt-0"
    ) as caught:
        store.find("latest")
    assert caught.value.code == 78
    with pytest.raises(StreamlearnError, match="no sound checkpoint; there are: none") as caught:
        Store(tmp_path / "elsewhere").find("latest")
    assert caught.value.code == 1


def test_names_that_leave_the_directory_are_refused(tmp_path: Path) -> None:
    """A manifest that names a path outside its directory is no checkpoint."""
    store = Store(tmp_path)
    checkpoint = save(store)
    tree = json.loads((checkpoint.path / MANIFEST).read_bytes())
    tree["files"]["../../etc/passwd.json"] = {"size": 1, "sha256": "0"}
    (checkpoint.path / MANIFEST).write_text(json.dumps(tree))
    assert store.all() == []


def test_reading_what_is_not_there(tmp_path: Path) -> None:
    """A missing name is an error that says so."""
    with pytest.raises(Broken, match=r"has no other\.json"):
        save(Store(tmp_path)).read("other.json")
    with pytest.raises(StreamlearnError, match="no checkpoint 9; there are: ckpt-000000000001"):
        Store(tmp_path).find("9")
