"""A kill, and an error, at every system call of the checkpoint writer: the old or the new checkpoint is valid."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from streamlearn.checkpoint.manifest import MANIFEST, Checkpoint
from streamlearn.checkpoint.store import Store
from tests.support import jobs
from tests.support.chaos.case import FULL, ROOT, Case

if TYPE_CHECKING:
    from pathlib import Path

CALLS = ["mkdir", "openat", "write", "fsync", "close", "link", "rename", "unlink", "unlinkat", "rmdir"]
LINE = re.compile(r"^(?:\d+ +)?(\w+)\((.*)$")  # a call that another thread interrupts ends on a second line
ERRORS = {
    "mkdir": "EROFS", "openat": "EMFILE", "write": "ENOSPC", "fsync": "EIO", "link": "EMLINK", "rename": "EROFS",
}  # fmt: skip
# runs in an interpreter without torch, whose only other threads sync files; it saves the files of a real daemon
WRITER = """
import json, sys
from pathlib import Path
from streamlearn.checkpoint.store import OWN_KEYS, Store
from streamlearn.core.errors import StreamlearnError
state, source, parent, attempts = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
manifest = json.loads((source / "MANIFEST.json").read_bytes())
info = {k: v for k, v in manifest.items() if k not in OWN_KEYS}
linked = {n for n, e in json.loads((parent / "MANIFEST.json").read_bytes())["files"].items() if n.count(".") > 1}
files = {n: None if n in linked else (source / n).read_bytes() for n in manifest["files"]}
store = Store(state, keep=1, hourly=0)
for attempt in range(attempts):
    try:
        print(store.save(files, info).id, flush=True)
    except StreamlearnError as error:
        print(error, flush=True)
"""


@dataclass(frozen=True)
class Call:
    """The n-th system call of this name that the writer makes on one path of the state directory.

    Files are synced in threads, in any order, and strace counts the calls of each thread separately. The calls of one name
    on one path are made by one thread, one after another.
    """

    name: str
    path: str
    number: int

    def inject(self, how: str) -> tuple[str, ...]:
        """Return the strace options that inject `how` into this call only."""
        return ("-o", "/dev/null", "-P", self.path, "-e", f"trace={self.name}", "-e",
                f"inject={self.name}:{how}:when={self.number}")  # fmt: skip


class Writer:
    """A state directory with one checkpoint, and a process that saves the next one; both come from a real daemon."""

    def __init__(self, directory: Path, daemon: Path) -> None:
        self.directory = directory
        self.kept = daemon / "checkpoints"
        self.old, self.new = sorted(path for path in self.kept.iterdir() if path.name.startswith("ckpt-"))[-2:]
        self.state = directory / "state"
        self.root = self.state / "checkpoints"

    def reset(self) -> None:
        """Reset the state directory to the old checkpoint alone."""
        shutil.rmtree(self.state, ignore_errors=True)
        self.root.mkdir(parents=True)
        shutil.copytree(self.old, self.root / self.old.name)

    def run(self, *strace: str, attempts: int = 1) -> subprocess.CompletedProcess[str]:
        """Save under strace."""
        command = ["strace", "-f", "-qq", *strace, sys.executable, "-c", WRITER]
        arguments = [str(self.state), str(self.new), str(self.old), str(attempts)]
        return subprocess.run(
            [*command, *arguments], capture_output=True, text=True, cwd=ROOT, timeout=120, check=False
        )

    def calls(self) -> list[Call]:
        """Return all calls that an undisturbed save makes on the state directory, in order."""
        self.reset()
        log = self.directory / "strace.log"
        done = self.run("-y", "-s", "4096", "-o", str(log), "-e", f"trace={','.join(CALLS)}")
        assert done.returncode == 0, done.stderr
        count = Counter[tuple[str, str]]()
        found = []
        for line in log.read_text().splitlines():
            paths = list(dict.fromkeys(re.findall(rf'["<]({re.escape(str(self.root))}[^">]*)[">]', line)))
            if (match := LINE.match(line)) is None or match[1] not in CALLS or not paths:
                continue
            count.update((match[1], path) for path in paths)  # a rename has two
            found.append(Call(match[1], paths[0], count[match[1], paths[0]]))
        return found

    def valid_checkpoint(self) -> str:
        """Return which checkpoint the next start uses, `old` or `new`; fail if it equals neither, bit for bit."""
        found = Store(self.state).newest_valid()
        assert found is not None, "no checkpoint is left"
        assert not list(self.root.glob(".tmp-*"))
        assert not list(self.root.glob(".corrupt-*"))
        contents = {name: found.read(name) for name in found.manifest["files"]}
        for which, path in (("new", self.new), ("old", self.old)):
            if contents == {file.name: file.read_bytes() for file in path.iterdir() if file.name != MANIFEST}:
                return which
        pytest.fail(f"{found.id} is neither the old checkpoint nor the new one")


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Checkpoint]:
    """Return the configuration of a stopped daemon with several checkpoints, and its undisturbed end."""
    jobs.require(shutil.which("strace"), "strace")
    directory = tmp_path_factory.mktemp("daemon")
    strategy = {"er": {"budget": 200}, "ewc": {}}
    over = {"checkpoint": {"every_batches": 2, "keep": 1000}, "stream": {"batch_size": 20}}
    config = jobs.write_config(directory, strategy=strategy, **over)
    jobs.publish_embedded(directory / "topics.sqlite", 200)
    return config, jobs.run_to_end(config)


@pytest.fixture
def writer(daemon: tuple[Path, Checkpoint], tmp_path: Path) -> Writer:
    """Return a writer whose new checkpoint is from the middle of the run and has linked files."""
    state = tmp_path / "daemon"
    source = daemon[0].parent / "state" / "checkpoints"
    names = sorted(path.name for path in source.iterdir() if path.name.startswith("ckpt-"))
    later = names[max(2, len(names) // 2) :]  # on a busy machine saves are merged, so there are few checkpoints
    shutil.copytree(source, state / "checkpoints", ignore=lambda _, found: [n for n in found if n in later])
    return Writer(tmp_path, state)


def check_same_end(daemon: tuple[Path, Checkpoint], checkpoint: Path, directory: Path) -> None:
    """Fail unless a run from this checkpoint ends as the undisturbed run."""
    config, expected = daemon
    (directory / "checkpoints").mkdir(parents=True)
    shutil.copytree(checkpoint, directory / "checkpoints" / checkpoint.name)
    again = directory / config.name
    again.write_text(config.read_text().replace(str(config.parent / "state"), str(directory)))
    assert jobs.differences(expected, jobs.run_to_end(again)) == []


@pytest.mark.parametrize("every", [pytest.param(5, id="short"), pytest.param(1, id="every", marks=FULL)])
def test_killed_at_every_call(case: Case, daemon: tuple[Path, Checkpoint], writer: Writer, every: int) -> None:
    """At whichever call the writer dies, the old or the new checkpoint is valid and complete; both runs end bit-equal."""
    calls = writer.calls()
    outcomes, kinds = Counter[str](), Counter[str]()
    for call in calls[case.rng.randrange(every) :: every]:
        writer.reset()
        done = writer.run(*call.inject("signal=KILL"))
        assert done.returncode == -9, f"{call}: not killed: {done.stdout}{done.stderr}"
        which = writer.valid_checkpoint()
        assert ("new" if done.stdout else which) == which, f"{call}: reported as saved, but missing"
        outcomes[which] += 1
        kinds[call.name] += 1
    for which in ("old", "new"):
        case.assert_happened(f"the {which} checkpoint was valid", outcomes[which], 1 if every == 1 else 0)
        if every == 1:
            check_same_end(daemon, getattr(writer, which), writer.directory / which)
    case.assert_happened("kinds of calls", len(kinds), 8 if every == 1 else 2)
    case.record("`kill -9` at every system call of the checkpoint writer", outcomes.total())


@pytest.mark.parametrize("every", [pytest.param(5, id="short"), pytest.param(1, id="every", marks=FULL)])
def test_refused_at_every_call(case: Case, writer: Writer, every: int) -> None:
    """Whichever call fails, the save reports it in one line, the old checkpoint stays valid, and the next save succeeds.

    If only the sync after the rename fails, the new checkpoint is complete but may not survive a power cut. That counts
    as a failure too, and either checkpoint may be valid.
    """
    every_call = writer.calls()
    renamed = next(place for place, call in enumerate(every_call) if call.name == "rename")
    calls = [call for call in every_call if call.name in ERRORS]
    failed = harmless = 0
    for call in calls[case.rng.randrange(every) :: every]:
        how = call.inject(f"error={ERRORS[call.name]}")
        writer.reset()
        first = writer.run(*how).stdout.splitlines()
        assert len(first) == 1, f"{call}: {first}"
        if first[0].startswith("ckpt-"):  # the failed call was not part of the save: it read, or removed old files
            assert writer.valid_checkpoint() == "new", call
            harmless += 1
            continue
        assert "cannot be " in first[0], first
        assert writer.valid_checkpoint() == "old" or every_call.index(call) > renamed, call
        if call.name == "fsync":  # of another thread, and so counted from one again: the next save is another process's
            both = [*first, *writer.run("-e", "trace=none").stdout.splitlines()]
        else:
            writer.reset()
            both = writer.run(*how, attempts=2).stdout.splitlines()
        assert [line.startswith("ckpt-") for line in both] == [False, True], f"{call}: {both}"
        assert writer.valid_checkpoint() == "new", call
        failed += 1
    case.assert_happened("saves that failed", failed, 20 if every == 1 else 1)
    case.assert_happened("errors that did not affect a save", harmless, 0)
    case.record(
        "a full disk, an I/O error or a read-only file system at every system call of the checkpoint writer",
        failed + harmless,
    )
