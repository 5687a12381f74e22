"""One kill, and one refusal, at every system call of the checkpoint writer: the old checkpoint or the new one is in force."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from streamlearn.checkpoint import MANIFEST, Checkpoint, Store
from tests.chaos.case import FULL, ROOT, Case
from tests.support import jobs

if TYPE_CHECKING:
    from pathlib import Path

CALLS = ["mkdir", "openat", "write", "fsync", "close", "link", "rename", "unlink", "unlinkat", "rmdir"]
LINE = re.compile(r"^(?:\d+ +)?(\w+)\((.*)$")  # a call that another thread interrupts ends on a second line
ERRORS = {
    "mkdir": "EROFS", "openat": "EMFILE", "write": "ENOSPC", "fsync": "EIO", "link": "EMLINK", "rename": "EROFS",
}  # fmt: skip
# run by an interpreter that imports no torch: its only threads are those that sync; what it saves is a daemon's own
WRITER = """
import json, sys
from pathlib import Path
from streamlearn.checkpoint import OWN_KEYS, Store
from streamlearn.data import StreamlearnError
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
    """The n-th call of its kind that the writer makes on one path of the state directory.

    Files are synced in threads, in any order, and strace counts the calls of each thread apart. The calls of one kind on
    one path are made by one thread, one after another.
    """

    name: str
    path: str
    number: int

    def strike(self, how: str) -> tuple[str, ...]:
        """Return the options of strace that do something to this call alone."""
        return ("-o", "/dev/null", "-P", self.path, "-e", f"trace={self.name}", "-e",
                f"inject={self.name}:{how}:when={self.number}")  # fmt: skip


class Writer:
    """A state directory with one checkpoint, and a process that saves the next over it; both are a real daemon's."""

    def __init__(self, directory: Path, daemon: Path) -> None:
        self.directory = directory
        self.kept = daemon / "checkpoints"
        self.old, self.new = sorted(path for path in self.kept.iterdir() if path.name.startswith("ckpt-"))[-2:]
        self.state = directory / "state"
        self.root = self.state / "checkpoints"

    def fresh(self) -> None:
        """Put the old checkpoint alone in force."""
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
        """Return every call that an undisturbed save makes on the state directory, in order."""
        self.fresh()
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

    def in_force(self) -> str:
        """Return which checkpoint the next start takes, `old` or `new`; fails where it is neither, bit for bit."""
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
    """Give the configuration of a stopped daemon that has several checkpoints, and how it ends undisturbed."""
    jobs.require(shutil.which("strace"), "strace")
    directory = tmp_path_factory.mktemp("daemon")
    strategy = {"er": {"budget": 200}, "ewc": {}}
    over = {"checkpoint": {"every_batches": 2, "keep": 1000}, "stream": {"batch_size": 20}}
    config = jobs.write_config(directory, strategy=strategy, **over)
    jobs.publish_embedded(directory / "topics.sqlite", 200)
    return config, jobs.run_to_end(config)


@pytest.fixture
def writer(daemon: tuple[Path, Checkpoint], tmp_path: Path) -> Writer:
    """Give a writer whose new checkpoint is one of the middle of the run, with files that are linked."""
    state = tmp_path / "daemon"
    source = daemon[0].parent / "state" / "checkpoints"
    names = sorted(path.name for path in source.iterdir() if path.name.startswith("ckpt-"))
    later = names[max(2, len(names) // 2) :]  # on a busy machine saves are merged, and there are few
    shutil.copytree(source, state / "checkpoints", ignore=lambda _, found: [n for n in found if n in later])
    return Writer(tmp_path, state)


def ends_equal(daemon: tuple[Path, Checkpoint], checkpoint: Path, directory: Path) -> None:
    """Fail unless a run that goes on from this checkpoint ends as the undisturbed one."""
    config, expected = daemon
    (directory / "checkpoints").mkdir(parents=True)
    shutil.copytree(checkpoint, directory / "checkpoints" / checkpoint.name)
    again = directory / config.name
    again.write_text(config.read_text().replace(str(config.parent / "state"), str(directory)))
    assert jobs.differences(expected, jobs.run_to_end(again)) == []


@pytest.mark.parametrize("every", [pytest.param(5, id="short"), pytest.param(1, id="every", marks=FULL)])
def test_killed_at_every_call(case: Case, daemon: tuple[Path, Checkpoint], writer: Writer, every: int) -> None:
    """Whichever call the writer dies at, the old checkpoint or the new one is in force, whole; both end bit-equal."""
    calls = writer.calls()
    outcomes, kinds = Counter[str](), Counter[str]()
    for call in calls[case.chance.randrange(every) :: every]:
        writer.fresh()
        done = writer.run(*call.strike("signal=KILL"))
        assert done.returncode == -9, f"{call}: not killed: {done.stdout}{done.stderr}"
        which = writer.in_force()
        assert ("new" if done.stdout else which) == which, f"{call}: reported as saved, and not there"
        outcomes[which] += 1
        kinds[call.name] += 1
    for which in ("old", "new"):
        case.sometimes(f"the {which} one in force", outcomes[which], 1 if every == 1 else 0)
        if every == 1:
            ends_equal(daemon, getattr(writer, which), writer.directory / which)
    case.sometimes("kinds of calls", len(kinds), 8 if every == 1 else 2)
    case.report("`kill -9` at every system call of the checkpoint writer", outcomes.total())


@pytest.mark.parametrize("every", [pytest.param(5, id="short"), pytest.param(1, id="every", marks=FULL)])
def test_refused_at_every_call(case: Case, writer: Writer, every: int) -> None:
    """Whichever call fails, the save says so in one line, the old checkpoint stays in force, and the next save succeeds.

    Where only the sync after the rename fails, the new one is there, whole, but may not outlive a power cut: that is a
    failure too, and either may be in force.
    """
    every_call = writer.calls()
    renamed = next(place for place, call in enumerate(every_call) if call.name == "rename")
    calls = [call for call in every_call if call.name in ERRORS]
    failed = harmless = 0
    for call in calls[case.chance.randrange(every) :: every]:
        how = call.strike(f"error={ERRORS[call.name]}")
        writer.fresh()
        first = writer.run(*how).stdout.splitlines()
        assert len(first) == 1, f"{call}: {first}"
        if first[0].startswith("ckpt-"):  # what failed was no part of the save: reading, or removing what is old
            assert writer.in_force() == "new", call
            harmless += 1
            continue
        assert "cannot be " in first[0], first
        assert writer.in_force() == "old" or every_call.index(call) > renamed, call
        if call.name == "fsync":  # of another thread, and so counted from one again: the next save is another process's
            both = [*first, *writer.run("-e", "trace=none").stdout.splitlines()]
        else:
            writer.fresh()
            both = writer.run(*how, attempts=2).stdout.splitlines()
        assert [line.startswith("ckpt-") for line in both] == [False, True], f"{call}: {both}"
        assert writer.in_force() == "new", call
        failed += 1
    case.sometimes("saves that failed", failed, 20 if every == 1 else 1)
    case.sometimes("refusals that no save depends on", harmless, 0)
    case.report("a full disk, an I/O error, a read-only file system at every call of the writer", failed + harmless)
