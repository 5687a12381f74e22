"""System tests of `streamlearn dlq`, and of a burst of rejected samples."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import yaml

from streamlearn.stream.codecs.registry import CODECS
from streamlearn.stream.logs.base import CONTENT_TYPE, CONTROL_HEADER, TASK_END
from streamlearn.stream.logs.config import KafkaConfig
from streamlearn.stream.logs.kafka_writer import KafkaWriter
from streamlearn.stream.logs.sqlite import EmbeddedWriter
from tests.support import jobs
from tests.support.agreement import get, scrape
from tests.support.commands import cli, one_line

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from streamlearn.stream.logs.base import LogWriter

SMALL: dict[str, Any] = {
    "input": {"shape": [2], "dtype": "float32", "scale": 1},
    "classes": [0, 1],
    "model": {"name": "mlp", "hidden": [8]},
    "strategy": "er",
}
BATCH = ((CONTENT_TYPE, CODECS["batch"].content_type),)
BAD = b'{"x": [1, 2], "y": 7, "note": "\xc2\x9b2J"}'


def send(sink: LogWriter, topic: str, labels: list[int]) -> None:
    """Publish samples, one in each record."""
    for place, label in enumerate(labels):
        sink.append(topic, 0, CODECS["json"].encode(np.array([[label, place / 100]], np.float32), [label]))


def mark(sink: LogWriter, topic: str) -> None:
    """Publish a task-end marker."""
    sink.append(topic, 0, TASK_END, headers=((CONTROL_HEADER, TASK_END),))
    sink.flush()


@dataclass
class Rejecting:
    """A configuration whose daemon learned four samples of topic `a` and rejected three; topic `b` is empty."""

    config: Path
    over: dict[str, Any]
    sink: LogWriter
    a: str
    b: str
    dead: str


@pytest.fixture(params=["embedded", pytest.param("kafka", marks=pytest.mark.kafka)])
def rejecting(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Rejecting]:
    """Run a daemon that rejects one sample of a single record, and two samples of a batch record."""
    prefix = f"dlq{time.time_ns()}-"
    a, b, dead = prefix + "a", prefix + "b", prefix + "dlq"
    over = {**SMALL, "stream": {"topics": [a], "dead_letter": {"topic": dead}}}
    if request.param == "kafka":
        over["kafka"] = {"bootstrap_servers": request.getfixturevalue("bootstrap"), "metadata_refresh_seconds": 1}
    config = jobs.write_config(tmp_path, **over)
    sink: LogWriter = EmbeddedWriter(tmp_path / "topics.sqlite")
    if request.param == "kafka":
        sink = KafkaWriter(KafkaConfig.model_validate(over["kafka"]))
    none = cli("dlq", "list", config)
    assert (none.returncode, none.stdout, one_line(none)) == (0, "", f"no dead letters in topic {dead}")

    for name in (a, b):
        sink.create_topic(name, 1)
    send(sink, a, [0, 1])
    sink.append(a, 0, BAD, key=b"k", headers=(("mine", b"\x1b[1m"),))
    sink.append(a, 0, CODECS["batch"].encode(np.zeros((4, 2), np.float32), [0, 8, 1, 9]), headers=BATCH)
    mark(sink, a)
    checkpoint = jobs.run_to_end(config)
    assert checkpoint.read_json("status.json")["samples"]["trained"] == 4

    yield Rejecting(config, over, sink, a, b, dead)
    sink.close()


def test_letters_are_listed_and_shown(rejecting: Rejecting, tmp_path: Path) -> None:
    """The commands show the rejected samples and the original bytes of their records; no daemon runs."""
    config, a, dead = rejecting.config, rejecting.a, rejecting.dead
    listed = cli("dlq", "list", config)
    assert listed.returncode == 0, listed.stderr
    *lines, summary = listed.stdout.splitlines()
    assert [line.split("  ")[0] for line in lines] == [f"{a}-0-2-0", f"{a}-0-3-1", f"{a}-0-3-3"]
    assert summary == f"{a}: 3 label_range"
    tree = json.loads(cli("dlq", "list", config, "--json", "--limit", "1").stdout)
    letter = tree["letters"].pop()
    assert tree == {
        "topic": dead,
        "letters": [],
        "summary": [{"topic": a, "reason": "label_range", "letters": 3}],
        "hidden": 0,
        "skipped": 0,
    }
    assert {key: letter[key] for key in ("key", "index", "samples", "attempts", "replayed")} == {
        "key": f"{a}-0-3-3", "index": 3, "samples": 4, "attempts": 0, "replayed": False,
    }  # fmt: skip

    shown = cli("dlq", "show", config, f"{a}-0-2-0").stdout
    assert "label 7 has no output; accepted: 0, 1" in shown
    assert r"header     mine: \x1b[1m" in shown
    assert r"\x9b2J" in shown  # nothing that a terminal obeys
    assert "\x9b" not in shown
    command = [sys.executable, "-m", "streamlearn", "dlq", "show", str(config), f"{a}-0-2-0", "--value"]
    assert subprocess.run(command, capture_output=True, check=True).stdout == BAD
    cli("dlq", "show", config, f"{a}-0-3-3", "--output", tmp_path / "value")
    assert (tmp_path / "value").read_bytes() == CODECS["batch"].encode(np.zeros((4, 2), np.float32), [0, 8, 1, 9])
    unknown = cli("dlq", "show", config, f"{a}-0-9-0")
    assert (unknown.returncode, one_line(unknown)) == (1, f"streamlearn: no letter {a}-0-9-0 in topic {dead}")


def test_letters_are_replayed_once(rejecting: Rejecting, tmp_path: Path) -> None:
    """Only samples that were not learned are sent, only after confirmation, and never twice."""
    config, over, b = rejecting.config, rejecting.over, rejecting.b
    assert cli("dlq", "replay", config, "--to", b, "--dry-run").stdout == f"3 samples would be sent to {b}\n"
    nowhere = cli("dlq", "replay", config, "--to", b + "x", "--dry-run")
    assert (nowhere.returncode, one_line(nowhere)) == (1, f"streamlearn: no topic {b}x")
    alone = cli("dlq", "replay", config, "--to", b, stdin=subprocess.DEVNULL)
    assert (alone.returncode, "--yes sends them" in one_line(alone)) == (2, True)
    assert cli("dlq", "replay", config, "--to", b, "--yes").stdout == f"3 samples sent to {b}\n"
    assert cli("dlq", "replay", config, "--to", b, "--yes").stdout == "nothing to send\n"
    assert cli("dlq", "list", config).stdout == "3 replayed letters are not shown (--all shows them)\n"
    assert len(cli("dlq", "list", config, "--all").stdout.splitlines()) == 4
    over["stream"]["topics"] = [b]
    other = jobs.write_config(tmp_path / "other", **{**over, "classes": [7, 8, 9], "name": "other"})
    tree = yaml.safe_load(other.read_text())
    tree["embedded"]["path"] = str(tmp_path / "topics.sqlite")
    other.write_text(yaml.safe_dump(tree))
    mark(rejecting.sink, b)
    again = jobs.run_to_end(other).read_json("status.json")
    assert (again["samples"]["trained"], again["samples"]["rejected"], again["labels"]) == (3, 0, [7, 8, 9])


def test_a_tombstone_is_not_counted_as_sendable(tmp_path: Path) -> None:
    """A tombstone's letter has no bytes: `replay` and `replay --dry-run` say so, and exit with 1."""
    config = jobs.write_config(tmp_path, **SMALL, stream={"topics": ["a"]})
    sink = EmbeddedWriter(tmp_path / "topics.sqlite")
    sink.create_topic("a", 1)
    send(sink, "a", [0, 9])
    sink.append("a", 0, None, key=b"k")
    mark(sink, "a")
    sink.close()
    jobs.run_to_end(config)
    rest = "their bytes no longer exist, were cut, never existed, or contradict the letter"
    ended = (
        "warning: the task of topic a has ended: what is sent there counts as late and is not learned; "
        "--to sends it to a topic that can still be learned"
    )
    would = cli("dlq", "replay", config, "--dry-run")
    assert (would.returncode, would.stdout) == (1, "1 samples would be sent to a\n")
    assert would.stderr.splitlines() == [ended, f"streamlearn: 1 letters cannot be sent: {rest}"]
    did = cli("dlq", "replay", config, "--yes")
    assert (did.returncode, did.stdout) == (1, "1 samples sent to a\n")
    assert did.stderr.splitlines() == [ended, f"streamlearn: 1 letters were not sent: {rest}"]


def test_letters_with_any_content_are_shown(tmp_path: Path) -> None:
    """Impossible dates and forged letters do not make `list`, `show` or `replay` fail."""
    config = jobs.write_config(tmp_path, **SMALL, stream={"topics": ["a"]})
    sink = EmbeddedWriter(tmp_path / "topics.sqlite")
    for name in ("a", "job.dlq"):
        sink.create_topic(name, 1)
    for offset, (seconds, topic) in enumerate(
        (("9223372036854775.807", "a"), ("253402300800.000", "a"), ("-5.000", "a"), ("nan", "a"), ("1.000", "gone"))
    ):
        facts = {"topic": topic, "partition": 0, "offset": offset, "index": 0, "samples": 1, "timestamp": seconds}
        facts |= {"reason": "\x1b[31m" if seconds == "1.000" else "decode", "message": "m"}
        headers = tuple((f"streamlearn.errors.{name}", str(fact).encode()) for name, fact in facts.items())
        sink.append("job.dlq", 0, b"x", key=f"{topic}-0-{offset}-0".encode(), headers=headers)
    sink.close()
    listed = cli("dlq", "list", config, "--json")
    tree = json.loads(listed.stdout)
    assert [letter["timestamp"] for letter in tree["letters"]] == [
        "+292278994-08-17T07:12:55.807+00:00",
        "+10000-01-01T00:00:00.000+00:00",
        "1969-12-31T23:59:55.000+00:00",
        "1970-01-01T00:00:01.000+00:00",
    ]
    assert tree["skipped"] == 1
    text = cli("dlq", "list", config)
    assert (text.returncode, "\x1b" in text.stdout, r"gone: 1 \x1b[31m" in text.stdout) == (0, False, True)
    skipped = "1 records of topic job.dlq look like letters but are not valid: skipped"
    assert one_line(text) == skipped
    assert "timestamp  +292278994-08-17T07:12:55.807+00:00" in cli("dlq", "show", config, "a-0-0-0").stdout
    replayed = cli("dlq", "replay", config, "--yes")
    assert (replayed.returncode, replayed.stdout) == (1, "3 samples sent to a\n")
    assert replayed.stderr.splitlines() == [skipped, "streamlearn: 1 letters were not sent: no topic gone"]


def test_replay_asks_for_confirmation(tmp_path: Path) -> None:
    """On a terminal `replay` says how many samples go where, and sends nothing without a yes."""
    config = jobs.write_config(tmp_path, **SMALL, stream={"topics": ["a"]})
    sink = EmbeddedWriter(tmp_path / "topics.sqlite")
    sink.create_topic("a", 1)
    send(sink, "a", [0, 9])
    mark(sink, "a")
    sink.close()
    jobs.run_to_end(config)
    for answer, code, message in ((b"n\n", 1, "Aborted"), (b"y\n", 0, "1 samples sent to a")):
        ours, theirs = pty.openpty()
        command = [sys.executable, "-m", "streamlearn", "dlq", "replay", str(config)]
        with subprocess.Popen(command, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
            os.write(ours, answer)
            text = process.communicate(timeout=60)[0].decode()
        os.close(ours)
        os.close(theirs)
        assert (process.returncode, "Send 1 samples to a?" in text, message in text) == (code, True, True), text


def test_wrong_options_give_one_line(tmp_path: Path) -> None:
    """A missing file or letter gives one line and the right exit code, and nothing is created."""
    config = jobs.write_config(tmp_path, **SMALL, stream={"topics": ["a"]})
    missing = cli("dlq", "list", config)
    path = tmp_path / "topics.sqlite"
    assert (missing.returncode, one_line(missing)) == (74, f"streamlearn: {path}: no such file")
    assert not path.exists()
    EmbeddedWriter(path).close()
    mistakes: list[tuple[list[Path | str], int, str]] = [
        (["list", config, "--reason", "bad"], 2, "--reason is 'bad'; expected one of decode, schema"),
        (["replay", config, "--key", "a-0-0-0"], 1, "no letter a-0-0-0 to be sent in topic job.dlq"),
        (["replay", config, "--to", "job.dlq"], 2, "that is the dead-letter topic itself"),
    ]
    for arguments, code, text in mistakes:
        done = cli("dlq", *arguments)
        assert (done.returncode, text in one_line(done)) == (code, True), done.stderr


def test_a_run_that_rejects_everything_exits_with_65(tmp_path: Path) -> None:
    """A run that ends with only rejected samples says so; samples that `produce --config` publishes are learned."""
    config = jobs.write_config(tmp_path, **SMALL, stream={"topics": ["a"]})
    np.savez(tmp_path / "data.npz", x=np.zeros((8, 2, 1)), y=np.array(["0", "1"] * 4))
    made = cli("produce", tmp_path / "data.npz", "--config", config)
    assert (made.returncode, made.stdout) == (0, "a: 8 samples\n")
    assert made.stderr.splitlines() == [
        "samples have shape [2, 1]: published as [2], the configuration's input.shape",
        "x is float64: published as float32, the configuration's input.dtype",
        "the label '0' is published as 0, the class in classes; other labels are converted in the same way",
    ]
    assert jobs.run_to_end(config).read_json("status.json")["samples"]["trained"] == 8
    other = tmp_path / "other"
    config = jobs.write_config(other, **SMALL, stream={"topics": ["a"]})
    assert cli("produce", tmp_path / "data.npz", "--embedded", other / "topics.sqlite", "--topic", "a").returncode == 0
    ended = cli("run", config)
    assert (ended.returncode, ended.stderr.splitlines()[-1]) == (
        65,
        "streamlearn: nothing was learned: every sample was rejected (1); `streamlearn dlq list CONFIG` says why",
    )


@pytest.mark.parametrize("how", ["resume", "kill"])
def test_a_burst_makes_the_daemon_unready_until_resume(tmp_path: Path, how: str) -> None:
    """A changed schema pauses reading with one line; after `resume` or a restart the result is as without a pause."""
    spec = {"topics": ["a"], "batch_size": 20}
    paused = jobs.write_config(tmp_path / "a", **SMALL, stream={**spec, "dead_letter": {"burst": 25}})
    plain = jobs.write_config(tmp_path / "b", **SMALL, stream={**spec, "dead_letter": {"burst": None}})
    for directory in ("a", "b"):
        sink = EmbeddedWriter(tmp_path / directory / "topics.sqlite")
        sink.create_topic("a", 1)
        send(sink, "a", [0, 1] * 35 + [5] * 40 + [1, 0] * 40)  # ten samples wait for their batch at the burst
        mark(sink, "a")
        sink.close()
    expected = jobs.run_to_end(plain)
    with jobs.Daemon(paused) as daemon:
        status = daemon.until(lambda status: status.get("problem") is not None)
        assert status["problem"] == (
            "a[0] offset 94: 25 samples in a row were rejected, mostly label_range (label 5 has no output; "
            "accepted: 0, 1); repair the producer or the configuration, then run `streamlearn resume`, "
            "or start the daemon again if it has ended"
        )
        code, checks = get(f"{daemon.http}/readyz")
        assert (code, checks["checks"]["stream"]["ok"]) == (503, False)
        assert get(f"{daemon.http}/healthz")[0] == 200
        assert scrape(daemon.http)["up_ready", ()] == 0
        assert cli("dlq", "list", paused).stdout.splitlines()[-1] == "a: 25 label_range"
        if how == "resume":
            assert cli("resume", "--state", daemon.state).stdout == "running\n"
            assert daemon.finish() == 0, daemon.tail()
        else:
            daemon.until(lambda status: status.get("checkpoint") is not None)
            daemon.kill()
    actual = jobs.run_to_end(paused)
    assert jobs.differences(expected, actual) == []
    assert actual.read_json("status.json")["samples"]["rejected"] == 40
    assert cli("dlq", "list", paused).stdout.splitlines()[-1] == "a: 40 label_range"
