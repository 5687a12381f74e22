"""The checkpoint store: save, verify, link, prune, tag and restore."""

from __future__ import annotations

import errno
import itertools
import json
import os
import stat
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from typer.testing import CliRunner

from streamlearn.checkpoint.manifest import MANIFEST, BrokenCheckpoint, Checkpoint, manifest_digest
from streamlearn.checkpoint.store import Store
from streamlearn.cli.checkpoints import app
from streamlearn.core.errors import StreamlearnError

STEPS = itertools.count(1)


def save(store: Store, content: bytes = b"1", **files: bytes | None) -> Checkpoint:
    """Save a small checkpoint, one step after the last."""
    named = {f"{name}.safetensors": value for name, value in files.items()}
    return store.save({"state.json": content, **named}, {"step": next(STEPS)})


def save_at(store: Store, step: int, ended: int = 0, *, ending: bool = False, tags: tuple[str, ...] = ()) -> Checkpoint:
    """Save a checkpoint with this step and this number of ended tasks."""
    info = {"step": step, "tasks_ended": ended, "ending": ending}
    return store.save({"state.json": str(step).encode()}, info, tags=tags)


def steps(store: Store) -> list[tuple[int, int]]:
    """Return step and number of ended tasks of every checkpoint, oldest first."""
    return [(c.manifest["step"], c.manifest["tasks_ended"]) for c in reversed(store.all())]


def open_files(directory: Path) -> list[Path]:
    """Return the files below a directory that this process has open."""
    links = [path.readlink() for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    return [path for path in links if directory in path.parents]


def test_a_saved_checkpoint_is_found_and_valid(tmp_path: Path) -> None:
    """It is found by id, number and `latest`, and only its owner can read its files."""
    store = Store(tmp_path)
    first, second = save(store, b"1"), save(store, b"2")
    assert [c.id for c in store.all()] == [second.id, first.id]
    assert store.find("latest").id == store.find("2").id == store.find(second.id).id == second.id
    assert store.newest_valid() == store.all()[0]
    assert (second.path / "state.json").stat().st_mode & 0o777 == 0o600
    assert (second.manifest["parent"], store.all()[0].read("state.json")) == (first.id, b"2")


@pytest.mark.parametrize(
    "damage", ["flip", "truncate", "remove", "manifest", "manifest hash", "step", "nested", "link", "device", "pipe"]
)
def test_a_broken_checkpoint_is_set_aside(tmp_path: Path, damage: str) -> None:
    """If the newest is broken in any way, the one before it is used, and the broken one is renamed."""
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
    found = store.newest_valid()
    assert found is not None
    assert (found.id, store.num_corrupt) == (good.id, 1)
    assert (store.root / f".corrupt-{bad.id}").is_dir()


def test_a_fresh_start_is_never_silent(tmp_path: Path) -> None:
    """If no valid checkpoint is left, this start and every later one ends with an error (78)."""
    store = Store(tmp_path)
    (save(store).path / "state.json").write_bytes(b"?")
    for _ in range(2):
        with pytest.raises(StreamlearnError, match="no valid checkpoint is left") as caught:
            store.newest_valid()
        assert caught.value.exit_code == 78
    assert Store(tmp_path / "new").newest_valid() is None


def test_a_crash_while_writing_leaves_the_last_one_valid(tmp_path: Path) -> None:
    """The next start removes the temporary directory of a killed process."""
    store = Store(tmp_path)
    good = save(store)
    (store.root / ".tmp-ckpt-000000000002").mkdir()
    (store.root / ".tmp-ckpt-000000000002" / "state.json").write_bytes(b"half")
    assert store.newest_valid() == store.all()[0]
    assert not (store.root / ".tmp-ckpt-000000000002").exists()
    assert store.all()[0].id == good.id


def test_immutable_files_are_linked(tmp_path: Path) -> None:
    """A file given as None has the inode of the previous checkpoint's file, and a valid hash."""
    store = Store(tmp_path)
    first = save(store, b"1", memory=b"x" * 1000)
    second = save(store, b"2", memory=None)
    inodes = [(c.path / "memory.safetensors").stat().st_ino for c in (first, second)]
    assert inodes[0] == inodes[1]
    second.verify()


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOTSUP, errno.EXDEV, errno.EMLINK, errno.ENOSYS, errno.EACCES])
def test_files_are_copied_without_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    """On a file system without hard links every checkpoint has its own files, and one log line says so."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", refuse)
    store = Store(tmp_path, keep=9)
    content = os.urandom(3 << 20)  # more than is copied at once
    first = save(store, b"1", memory=content)
    second, third = save(store, b"2", memory=None), save(store, b"3", memory=None)
    files = [c.path / "memory.safetensors" for c in (first, second, third)]
    assert len({file.stat().st_ino for file in files}) == 3
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}
    third.verify()
    assert third.read("memory.safetensors") == content
    lines = [record.message for record in caplog.records]
    assert len(lines) == 1
    assert f"{store.root}: the file system has no hard links ({os.strerror(code)}): checkpoints copy files" in lines[0]


def test_a_damaged_file_is_not_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy whose hash differs fails the save with 74, and leaves no file."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    store = Store(tmp_path)
    first = save(store, b"1", memory=b"x" * 100)
    (first.path / "memory.safetensors").write_bytes(b"y" * 100)
    with pytest.raises(StreamlearnError, match=r"memory\.safetensors does not match its hash") as caught:
        save(store, b"2", memory=None)
    assert caught.value.exit_code == 74
    assert [path.name for path in store.root.iterdir()] == [first.id]


def test_copies_count_for_the_free_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that will be copied are part of the space that a checkpoint needs."""
    store = Store(tmp_path)
    save(store, b"1", memory=b"x" * 1000)
    asked: list[int] = []
    monkeypatch.setattr(store, "_check_space", asked.append)
    save(store, b"2", memory=None)
    store._writer.links_refused = True
    save(store, b"3", memory=None)
    assert asked == [0, 1000]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_cannot_sync_directories_is_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """EINVAL and ENOTSUP are ignored; any other error fails the save."""
    sync = os.fsync
    answer = code

    def refuse_directories(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(answer, os.strerror(answer))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse_directories)
    store = Store(tmp_path)
    save(store).verify()
    answer = errno.EIO
    with pytest.raises(StreamlearnError, match="Input/output error"):
        save(store)


def test_an_unreadable_directory_fails_the_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A save that cannot list the checkpoints fails with 74; one that cannot remove an old one succeeds."""
    store = Store(tmp_path, keep=1, hourly=0)
    first = save(store, b"1", memory=b"x")
    (first.path / MANIFEST).rename(tmp_path / MANIFEST)
    with pytest.raises(
        StreamlearnError, match=r"the previous checkpoint, which has memory\.safetensors, cannot be read"
    ) as caught:
        save(store, b"2", memory=None)
    assert caught.value.exit_code == 74
    (tmp_path / MANIFEST).rename(first.path / MANIFEST)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(store, "all", refuse)
    with pytest.raises(StreamlearnError, match="cannot be read: Too many open files") as caught:
        save(store, b"3")
    assert caught.value.exit_code == 74
    monkeypatch.undo()
    monkeypatch.setattr(store, "prune", refuse)
    fourth = save(store, b"4")
    assert store.all()[0].id == fourth.id


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a sync fails, the save fails with 74 and leaves no file."""
    store = Store(tmp_path)
    save(store)

    def refuse(_: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(StreamlearnError, match="Input/output error") as caught:
        save(store)
    assert caught.value.exit_code == 74
    assert [path.name for path in store.root.iterdir()] == ["ckpt-000000000001"]


def test_files_are_synced_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every sync waits until all have started; the manifest is synced after them."""
    sync, together, order = os.fsync, threading.Barrier(17), []

    def wait_for_others(descriptor: int) -> None:
        name = Path(f"/proc/self/fd/{descriptor}").readlink().name
        if name.endswith(".safetensors") or name == "state.json":
            together.wait(60)
        order.append(name)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", wait_for_others)
    store = Store(tmp_path)
    save(store, b"1", **{f"part{number}": b"x" for number in range(16)}).verify()
    assert order[17:] == [MANIFEST, ".tmp-ckpt-000000000001", "checkpoints"]


def test_without_threads_files_are_synced_one_after_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a limit on processes no thread starts; the checkpoint is complete, and no descriptor stays open."""
    store = Store(tmp_path)
    synced: list[int] = []

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    monkeypatch.setattr(os, "fsync", synced.append)
    store.save({f"part-{n}.json": b"{}" for n in range(3)}, {"step": 1}).verify()
    assert len(synced) >= 3
    assert open_files(tmp_path) == []


def test_a_directory_that_cannot_be_created_has_the_code_of_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk is an input or output error; only a missing permission is 77."""
    for number, code in ((errno.ENOSPC, 74), (errno.EACCES, 77)):

        def refuse(*_: object, number: int = number, **__: object) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(Path, "mkdir", refuse)
        with pytest.raises(StreamlearnError, match="checkpoints: cannot be created: ") as caught:
            Store(tmp_path).save({}, {"step": 1})
        assert caught.value.exit_code == code


def test_the_error_of_one_sync_fails_the_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever sync fails, no file is left, and no descriptor stays open."""
    sync, refused = os.fsync, [""]

    def refuse(descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").readlink().name == refused[0]:
            raise OSError(5, "Input/output error")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    store = Store(tmp_path)
    for refused[0] in ("a.safetensors", "b.safetensors", "state.json", MANIFEST):
        with pytest.raises(StreamlearnError, match="Input/output error"):
            save(store, b"1", a=b"x", b=b"y")
        assert (list(store.root.iterdir()), open_files(tmp_path)) == ([], [])


def test_two_processes_cannot_set_the_same_tag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If another process sets the tag while a checkpoint is written, only the other checkpoint has it."""
    first = save(Store(tmp_path))
    store, other = Store(tmp_path), Store(tmp_path)
    other.tag(first.id, "before")
    assert save_at(store, 10, tags=("before",)).tags == []
    writes = itertools.count()

    def tag_in_between() -> None:
        if next(writes) == 1:
            other.tag(first.id, "now")

    monkeypatch.setattr(store, "before_write", tag_in_between)
    assert save_at(store, 11, tags=("now", "mine")).tags == ["mine"]
    assert [c.id for c in store.all() if "now" in c.tags] == [first.id]
    # the other order: the daemon's checkpoint appears after `checkpoint tag` has checked the tag
    monkeypatch.setattr(other, "check_tag", lambda _: save_at(Store(tmp_path), 12, tags=("late",)))
    with pytest.raises(StreamlearnError, match=r"tag late: ckpt-0+4 has it"):
        other.tag(first.id, "late")
    assert [c.sequence for c in store.all() if "late" in c.tags] == [4]


def test_retention_keeps_the_newest_and_one_an_hour(tmp_path: Path) -> None:
    """Among checkpoints older than the newest three, the last of each hour is kept."""
    store = Store(tmp_path, keep=100)
    start = datetime(2026, 1, 1, tzinfo=UTC)
    for number in range(12):
        checkpoint = save(store)
        tree = json.loads((checkpoint.path / MANIFEST).read_bytes())
        tree["created"] = (start + timedelta(minutes=20 * number)).isoformat()
        tree["sha256"] = manifest_digest(tree)
        (checkpoint.path / MANIFEST).write_text(json.dumps(tree))
    gone = store.prune(3, 2, dry_run=True)
    assert len(store.all()) == 12
    store.prune(3, 2)
    assert [c.sequence for c in store.all()] == [12, 11, 10, 9, 6]
    assert {c.sequence for c in gone} == {1, 2, 3, 4, 5, 7, 8}


def test_checkpoints_of_one_step_count_as_one(tmp_path: Path) -> None:
    """`keep` does not count a checkpoint with the step of the next one, or one saved while a task was ending."""
    store = Store(tmp_path, keep=3, hourly=0, task_ends=0)
    save_at(store, 10)
    save_at(store, 20)
    save_at(store, 30)
    save_at(store, 30, 1)
    assert steps(store) == [(10, 0), (20, 0), (30, 1)]
    save_at(store, 40, 1, ending=True)
    assert steps(store) == [(20, 0), (30, 1), (40, 1)]
    save_at(store, 50, 2)
    assert steps(store) == [(20, 0), (30, 1), (50, 2)]
    save_at(store, 60, 2, ending=True)
    save_at(store, 80, 4)  # on a slow disk saves are merged: a whole task lies between
    assert steps(store) == [(50, 2), (60, 2), (80, 4)]


def test_checkpoints_of_task_ends_are_kept(tmp_path: Path) -> None:
    """The first checkpoint after each of the last `task_ends` task ends is kept; with `all`, every one."""
    for task_ends, kept in ((2, [3, 4]), ("all", [1, 2, 3, 4]), (0, [])):
        store = Store(tmp_path / str(task_ends), keep=1, hourly=0, task_ends=task_ends)  # type: ignore[arg-type]
        for task in range(1, 5):
            for step in range(10):
                save_at(store, 10 * task + step, task - 1)
            save_at(store, 10 * task + 9, task)
        save_at(store, 51, 4)
        assert steps(store) == [*((10 * task + 9, task) for task in kept), (51, 4)]


def test_a_task_that_ended_again_counts_once(tmp_path: Path) -> None:
    """After a restore only the later end of a task counts, and the restore itself removes nothing."""
    store = Store(tmp_path, keep=1, hourly=0, task_ends=2)
    for task in range(3):
        save_at(store, 10 * task, task)
    assert steps(store) == [(10, 1), (20, 2)]
    store.restore("2")
    assert steps(store) == [(10, 1), (20, 2), (10, 1)]
    save_at(store, 15, 1)
    save_at(store, 21, 2)
    save_at(store, 25, 2)
    assert steps(store) == [(10, 1), (21, 2), (25, 2)]


def test_tagged_checkpoints_are_kept(tmp_path: Path) -> None:
    """Retention never removes a checkpoint with a tag; the tag can be removed, and so can the checkpoint."""
    store = Store(tmp_path, keep=1, hourly=0, task_ends=0)
    first = save_at(store, 1, tags=("before-deploy",))
    second = save_at(store, 2)
    assert (store.tag("latest", "v2").id, second.tags) == (second.id, ["v2"])
    for step in range(3, 6):
        save_at(store, step)
    assert steps(store) == [(1, 0), (2, 0), (5, 0)]
    assert (store.find("before-deploy").id, store.find("v2").id, first.tags) == (first.id, second.id, ["before-deploy"])
    store.find("v2").verify()
    with pytest.raises(StreamlearnError, match=f"tag v2: {second.id} has it"):
        store.tag("1", "v2")
    assert store.untag("before-deploy") == first.id
    save_at(store, 6)
    assert steps(store) == [(2, 0), (6, 0)]
    store.remove("v2")
    assert steps(store) == [(6, 0)]
    with pytest.raises(StreamlearnError, match="is the newest checkpoint"):
        store.remove("latest")
    with pytest.raises(StreamlearnError, match="no checkpoint has the tag 'v2'; there are: none"):
        store.untag("v2")
    for tag in ("latest", "7", "ckpt-1", "../x", "", ".x", "a/b", "a" * 65, "x\n"):
        with pytest.raises(StreamlearnError, match="expected at most 64 letters") as caught:
            store.tag("latest", tag)
        assert caught.value.exit_code == 2


def test_the_newest_readable_checkpoint_cannot_be_removed(tmp_path: Path) -> None:
    """If a newer one is broken, the job continues from the one before it, so that one stays."""
    store = Store(tmp_path)
    first, second, third = (save_at(store, step) for step in (1, 2, 3))
    (third.path / "MANIFEST.json").write_text("{}")
    for name in ("latest", second.id):
        with pytest.raises(StreamlearnError, match=f"{second.id} is the newest checkpoint"):
            store.remove(name)
    assert store.remove(first.id).id == first.id
    assert second.path.is_dir()


def test_tags_on_the_command_line(tmp_path: Path) -> None:
    """`tag`, `list`, `show`, `prune`, `untag` and `remove` work on the files, without a daemon."""
    store = Store(tmp_path, keep=9)
    for step in range(1, 5):
        info = {"step": step, "batches": step, "average_accuracy": None}
        store.save({"state.json": b"{}", "offsets.json": b'{"topics": {}}'}, info)

    def run(*command: str, code: int = 0) -> str:
        done = CliRunner().invoke(app, [*command, "--state", str(tmp_path)])
        assert done.exit_code == code, done.output
        return done.output

    assert run("tag", "1", "before-deploy") == "ckpt-000000000001 has the tag before-deploy\n"
    assert run("list").splitlines()[-1].endswith("before-deploy")
    assert json.loads(run("list", "--json"))[-1]["tags"] == ["before-deploy"]
    assert "tag        before-deploy\n" in run("show", "before-deploy")
    assert run("verify", "before-deploy") == "ckpt-000000000001: valid\n"
    gone = run("prune", "--keep-last", "1", "--hourly", "0", "--task-ends", "all", "--dry-run").splitlines()
    assert gone == ["ckpt-000000000003 would be removed", "ckpt-000000000002 would be removed"]
    assert run("untag", "before-deploy") == "ckpt-000000000001 no longer has the tag before-deploy\n"
    assert run("remove", "1") == "ckpt-000000000001 removed\n"
    run("remove", "latest", code=1)
    run("prune", "--task-ends", "some", code=1)
    assert [checkpoint.sequence for checkpoint in store.all()] == [4, 3, 2]


def test_restore_adds_a_new_checkpoint(tmp_path: Path) -> None:
    """An older state becomes the newest checkpoint; no checkpoint is changed."""
    store = Store(tmp_path)
    first = save(store, b"old")
    save(store, b"new")
    restored = store.restore("1")
    assert (restored.sequence, restored.read("state.json"), restored.manifest["restored_from"]) == (3, b"old", first.id)
    assert len(store.all()) == 3


def test_latest_is_the_newest_valid_checkpoint(tmp_path: Path) -> None:
    """Broken ones are skipped for `latest`; a broken one that is named, or the last one, is an error."""
    store = Store(tmp_path)
    good, flipped, garbled = save(store, b"1"), save(store, b"2"), save(store, b"3")
    (flipped.path / "state.json").write_bytes(b"?")
    (garbled.path / MANIFEST).write_bytes(b"{")
    assert [path.name for path in store.paths()] == [garbled.id, flipped.id, good.id]
    assert store.find("latest").id == flipped.id
    assert store.find("latest", "state.json").id == good.id
    for name in ("3", garbled.id):
        with pytest.raises(BrokenCheckpoint, match=r"3/MANIFEST\.json: cannot be read"):
            store.find(name)
    (good.path / "state.json").write_bytes(b"?")
    with pytest.raises(StreamlearnError, match="no valid checkpoint is left"):
        store.newest_valid()
    with pytest.raises(
        StreamlearnError, match=r"no valid checkpoint; there are: none; broken: .*\.corrupt-ckpt-0"
    ) as caught:
        store.find("latest")
    assert caught.value.exit_code == 78
    with pytest.raises(StreamlearnError, match="no valid checkpoint; there are: none") as caught:
        Store(tmp_path / "elsewhere").find("latest")
    assert caught.value.exit_code == 1


def test_a_manifest_with_paths_outside_is_refused(tmp_path: Path) -> None:
    """A manifest that names a file outside its directory is not valid."""
    store = Store(tmp_path)
    checkpoint = save(store)
    tree = json.loads((checkpoint.path / MANIFEST).read_bytes())
    tree["files"]["../../etc/passwd.json"] = {"size": 1, "sha256": "0"}
    (checkpoint.path / MANIFEST).write_text(json.dumps(tree))
    assert store.all() == []


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    """The error names the missing file."""
    with pytest.raises(BrokenCheckpoint, match=r"has no other\.json"):
        save(Store(tmp_path)).read("other.json")
    with pytest.raises(StreamlearnError, match="no checkpoint 9; there are: ckpt-000000000001"):
        Store(tmp_path).find("9")
