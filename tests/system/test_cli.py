"""Commands under faults: closed streams, missing permissions, full disks, broken checkpoints, wrong options."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import stat
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from streamlearn.checkpoint.manifest import MANIFEST
from streamlearn.checkpoint.store import Store
from streamlearn.cli import lifecycle
from streamlearn.runtime import daemon
from streamlearn.stream import letters
from streamlearn.stream.logs.base import PROBE, USE_HEADER
from streamlearn.stream.logs.sqlite import EmbeddedReader, EmbeddedWriter
from tests.support import jobs
from tests.support.commands import cli, one_line

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

COMMAND = [sys.executable, "-m", "streamlearn"]
PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 24, 1, 2


def obey_modes() -> None:
    """Drop the capabilities that ignore file modes, before the program starts."""
    for capability in (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH):
        ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)


def run_without_privileges(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a command that must obey file modes, even as root."""
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, preexec_fn=obey_modes)


@contextmanager
def changed_mode(path: Path, bits: int) -> Iterator[None]:
    """Change the mode of a directory during the context."""
    before = stat.S_IMODE(path.stat().st_mode)
    path.chmod(bits)
    yield
    path.chmod(before)


def save_status(directory: Path, count: int = 2) -> Store:
    """Return a store with small checkpoints that only have a status."""
    store = Store(directory)
    for number in range(count):
        status = {"name": f"status {number + 1}", "state": "stopped", "pid": None}
        store.save({"status.json": json.dumps(status).encode()}, {"step": number})
    return store


def test_a_missing_permission_is_77(tmp_path: Path) -> None:
    """For every command a file that may not be read or written is named in one line."""
    state, config = tmp_path / "state", jobs.write_config(tmp_path)
    save_status(state)
    (state / "LOCK").touch(0o600)
    with changed_mode(state, 0o000):
        for arguments in (["status", "--state", str(state)], ["run", str(config)], ["start", str(config)]):
            done = run_without_privileges(*arguments)
            assert (done.returncode, one_line(done)) == (77, f"streamlearn: {state}/LOCK: Permission denied")
    with changed_mode(state / "checkpoints", 0o500):
        done = run_without_privileges("checkpoint", "prune", "--keep-last", "1", "--hourly", "0", "--state", state)
        assert (done.returncode, "ckpt-000000000001: Permission denied" in one_line(done)) == (77, True)
    (state / "run").mkdir(0o700)
    with changed_mode(state, 0o500):
        done = run_without_privileges("run", config)
        assert (done.returncode, one_line(done)) == (77, f"streamlearn: {state}/daemon.json: Permission denied")


def test_a_state_directory_that_cannot_be_written_is_74(tmp_path: Path) -> None:
    """An error that is not about permissions, such as a full disk, has its own exit code."""
    config = jobs.write_config(tmp_path)
    (tmp_path / "state" / "daemon.tmp").mkdir(parents=True)
    done = cli("run", config)
    assert (done.returncode, one_line(done)) == (74, f"streamlearn: {tmp_path}/state/daemon.json: Is a directory")


def test_closed_and_full_standard_streams(tmp_path: Path) -> None:
    """With a closed stdout a command does its work; with a full one it ends with 74 and one line."""
    save_status(tmp_path / "state")
    wrong = jobs.write_config(tmp_path, service={"host": "192.0.2.1"})
    for arguments, redirection, code, message in (
        (f"status --state {tmp_path / 'state'}", ">&-", 3, ""),
        (f"run {wrong}", ">&-", 78, "192.0.2.1"),
        (f"run {wrong}", "<&- >&- 2>&-", 78, ""),
        (f"status --json --state {tmp_path / 'state'}", ">/dev/full", 74, "No space left on device"),
    ):
        shell = f"{' '.join(COMMAND)} {arguments} {redirection}"
        done = subprocess.run(shell, shell=True, stderr=subprocess.PIPE, text=True, check=False, timeout=60)
        assert done.returncode == code, (shell, done.stderr)
        assert message in done.stderr
        assert len(done.stderr.splitlines()) == bool(message)


def test_broken_checkpoints_are_reported(tmp_path: Path) -> None:
    """`verify` and `list` name a broken checkpoint, and `status` shows the one before it."""
    store = save_status(tmp_path)
    assert cli("checkpoint", "verify", "--all", "--state", tmp_path).returncode == 0
    (store.root / "ckpt-000000000002" / MANIFEST).write_text("{")
    for arguments in (["--all"], [], ["2"]):
        done = cli("checkpoint", "verify", *arguments, "--state", tmp_path)
        assert (done.returncode, "ckpt-000000000002/MANIFEST.json: cannot be read" in one_line(done)) == (74, True)
    listed = cli("checkpoint", "list", "--state", tmp_path)
    assert "ckpt-000000000001" in listed.stdout
    assert "ckpt-000000000002: broken" in one_line(listed)
    shown = cli("status", "--state", tmp_path)
    assert (shown.returncode, shown.stdout) == (3, "status 1: stopped\n")
    assert "using the checkpoint before it" in one_line(shown)
    for path in store.paths():
        path.rename(store.root / f".corrupt-{path.name}")
    shown = cli("status", "--state", tmp_path)
    assert (shown.returncode, "broken: .corrupt-ckpt-000000000001" in one_line(shown)) == (3, True)


def test_queries_do_not_create_the_state_directory(tmp_path: Path) -> None:
    """A missing daemon is reported as not running."""
    missing = tmp_path / "missing"
    assert "no checkpoint 1" in one_line(cli("checkpoint", "restore", "1", "--state", missing))
    for verb in (["pause"], ["checkpoint", "create"]):
        done = cli(*verb, "--state", missing)
        assert (done.returncode, one_line(done)) == (3, f"streamlearn: {missing}: not running")
    assert not missing.exists()


def test_start_reports_the_signal_that_killed_its_daemon(tmp_path: Path) -> None:
    """If the daemon is killed, `start` names the signal and the log."""
    (tmp_path / "dying.py").write_text("import os\ndef model(*_):\n    os.kill(os.getpid(), 9)\n")
    config = jobs.write_config(tmp_path, model={"name": "dying:model"}, strategy="naive")
    done = cli("start", config, environment={"PYTHONPATH": str(tmp_path)})
    assert (done.returncode, "the daemon was killed by signal 9; see " in one_line(done)) == (1, True)


def test_run_sends_every_error_to_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unexpected exception is sent through the pipe too, as one line with its exit code."""
    reading, writing = os.pipe()

    def fail(*_: Any, **__: Any) -> None:
        raise KeyError("x")

    monkeypatch.setattr(daemon, "run", fail)
    monkeypatch.setattr("streamlearn.logs.set_up", lambda *_: None)
    with pytest.raises(KeyError):
        lifecycle.run(jobs.write_config(tmp_path), ready_fd=writing)
    event = json.loads(os.read(reading, 4096))
    os.close(reading)
    assert (event["event"], event["code"], "KeyError: 'x' (this is a bug in streamlearn" in event["error"]) == (
        "failed",
        1,
        True,
    )


def test_a_waiting_daemon_names_the_missing_topic(tmp_path: Path) -> None:
    """One log line and the status name it; a stop that cannot record its clean end still ends with 0."""
    config = jobs.write_config(tmp_path, stream={"on_finished": "wait"})
    with jobs.Daemon(config) as daemon:
        status = daemon.until(lambda status: status.get("waiting_for") is not None)
        assert (status["waiting_for"], status["ready"]) == ("t1", True)
        state = ["--state", str(daemon.state)]
        assert "waiting for topic t1\n" in cli("status", *state).stdout
        with subprocess.Popen([*COMMAND, "status", "--watch", "--json", *state], stdout=subprocess.PIPE) as watching:
            assert watching.stdout is not None
            assert [json.loads(watching.stdout.readline())["waiting_for"] for _ in range(2)] == ["t1", "t1"]
            watching.send_signal(signal.SIGINT)
            watching.communicate(timeout=60)  # a pipe that is closed too early would be another end
        assert watching.returncode == 0
        (daemon.state / "daemon.tmp").mkdir()
        assert daemon.stop() == 0, daemon.tail()
    log = daemon.log.read_text()
    assert log.count("waiting for topic t1, which does not exist yet") == 1
    assert "the next start will count this stop as a crash" in log


def test_ctrl_c_while_importing_is_silent(tmp_path: Path) -> None:
    """An interrupt during imports ends the command without a traceback."""
    (tmp_path / "typer.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    done = cli("status", environment={"PYTHONPATH": str(tmp_path)})
    assert (done.returncode, done.stderr) == (130, "")


def test_topics_lists_only_those_of_the_configuration(tmp_path: Path) -> None:
    """Other topics of the cluster need `--all`; a topic that does not exist yet is named."""
    sink = EmbeddedWriter(tmp_path / "topics.sqlite")
    for name in ("t1", "t2", "job.dlq", "others"):
        sink.create_topic(name, 1)
    sink.close()
    config = jobs.write_config(tmp_path, stream={"topics": ["t1", "t3"]})
    own = cli("topics", "--config", config)
    assert [line.split()[0] for line in own.stdout.splitlines()] == ["TOPIC", "job.dlq", "t1"]
    assert one_line(own) == "listed in stream.topics, but not created yet: t3"
    tree = jobs.settings(tmp_path)
    del tree["stream"]["topics"]
    tree["stream"]["pattern"] = "t[0-9]"
    pattern = jobs.write_tree(tmp_path, tree)
    assert list(json.loads(cli("topics", "--config", pattern, "--json").stdout)) == ["job.dlq", "t1", "t2"]
    everything = cli("topics", "--config", pattern, "--all", "--json")
    assert list(json.loads(everything.stdout)) == ["job.dlq", "others", "t1", "t2"]


def test_a_probe_is_divided_by_the_training_classes(tmp_path: Path) -> None:
    """Each probe sample goes to the task that trains its class, even if the probe lacks a class."""
    for name, labels in (("train", "0123"), ("probe", "0233")):
        rows = "".join(f"{place}.5,{label}\n" for place, label in enumerate(labels))
        (tmp_path / f"{name}.csv").write_text(f"x,label\n{rows}")
    where = ["--embedded", str(tmp_path / "topics.sqlite"), "--codec", "json", "--no-markers"]
    done = cli("produce", tmp_path / "train.csv", "--tasks", "2", "--probe", tmp_path / "probe.csv", *where)
    assert done.stdout.splitlines() == ["task-1: 2 samples, 1 for the probe", "task-2: 2 samples, 3 for the probe"]
    log = EmbeddedReader(tmp_path / "topics.sqlite")
    log.connect()
    for topic, expected in (("task-1", [0]), ("task-2", [2, 3, 3])):
        found = [record for record in letters.read_records(log, topic) if record.header(USE_HEADER) == PROBE]
        assert [json.loads(record.value or b"")["y"] for record in found] == expected
    log.close()


WRONG = [
    (["--by", "file", "--probe", "missing.npz"], "--probe accepts only `test`"),
    (["--probe", "test"], "has no test split"),
    (["--header", "--probe", "a.npz"], "--header and --no-header are for .csv files"),
    (["--groups", "0/1", "--tasks", "5"], "--tasks is 5, but --groups has 2 groups"),
    (["--topic", "a b"], "topic 'a b': expected 1 to 249 letters"),
    (["--seed", "-1"], "Invalid value for '--seed'"),
    (["--bootstrap-servers", ""], "--bootstrap-servers is ''; expected HOST:PORT"),
    (["--bootstrap-servers", "foo:bar:baz"], "--bootstrap-servers is 'foo:bar:baz'; expected HOST:PORT"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=[" ".join(options) for options, _ in WRONG])
def test_a_wrong_option_of_produce_is_2(tmp_path: Path, options: list[str], message: str) -> None:
    """A wrong or contradictory option publishes nothing."""
    (tmp_path / "a.csv").write_text("1,2,0\n3,4,1\n")
    where = [] if "--bootstrap-servers" in options else ["--embedded", str(tmp_path / "topics")]
    done = cli("produce", tmp_path / "a.csv", *where, *options)
    assert (done.returncode, message in done.stderr.splitlines()[-1]) == (2, True), done.stderr
