"""The end of a daemon: SIGTERM at any moment, the grace period, dead threads, a jumping clock, no memory."""

from __future__ import annotations

import random
import sqlite3
import time
import urllib.request
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from benchmarks.kafka_broker import KafkaBroker
from streamlearn.checkpoint.store import Store
from streamlearn.control.api import read_only_app
from streamlearn.control.server import Server, bind_tcp
from streamlearn.core.errors import StreamlearnError
from streamlearn.learning.models.mlp import MLP
from streamlearn.metrics import Metrics
from streamlearn.runtime.control_desk import ControlDesk
from streamlearn.runtime.daemon import learn
from streamlearn.stream.logs.config import KafkaConfig
from streamlearn.stream.logs.kafka_writer import KafkaWriter
from tests.support import jobs
from tests.support.commands import cli, one_line
from tests.support.in_process import made

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

SEED = random.randrange(10_000)
GRACE = 25
DAY = 86_400
CLOCK = """
import os, pathlib, time
real, file = time.time, pathlib.Path(os.environ["MOVED_BY"])
time.time = lambda: real() + float(file.read_text() or 0)
"""


class Slow(MLP):
    """A model whose forward pass takes a minute, except in the trial at the start, which has at most two samples."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) > 2:
            time.sleep(60)
        return super().forward(x)


def has_reached(how_far: str, status: Mapping[str, Any]) -> bool:
    """Return whether a daemon answers, or has reached a state."""
    return how_far == "starting" or bool(status["state"] == how_far)


def has_trained(least: int, status: Mapping[str, Any]) -> bool:
    """Return whether at least this number of samples is learned."""
    return bool(status.get("samples", {}).get("trained", 0) >= least)


def slow_model(input_shape: Sequence[int], num_outputs: int) -> nn.Module:
    """Build a slow model."""
    return Slow(input_shape, num_outputs, [4])


@pytest.mark.parametrize(
    "strategy", [{"generative": {"hidden": 64, "latent": 16}, "si": {}}, {"packnet": {}}], ids="+".join
)
def test_sigterm_at_any_moment_saves_everything(tmp_path: Path, strategy: dict[str, Any]) -> None:
    """Stopped six times, while it starts, learns, refines or saves, it ends with 0 in time; the final state is bit-equal."""
    print(f"seed {SEED}")
    scenario = "task" if "packnet" in strategy else "class"
    over: dict[str, Any] = {"strategy": strategy, "scenario": scenario}
    configs = [jobs.write_config(tmp_path / name, **over) for name in ("a", "b")]
    waiting = jobs.write_config(tmp_path / "b", stream={"on_finished": "wait"}, **over)  # it never ends by itself
    for config in configs:
        jobs.publish_embedded(config.parent / "topics.sqlite", 1000)
    expected = jobs.run_to_end(configs[0])
    chance, learned = random.Random(SEED), set()
    for number in range(6):
        with jobs.Daemon(waiting) as daemon:
            # every other time while it starts
            daemon.until(partial(has_reached, "starting" if number % 2 else "running"))
            time.sleep(chance.uniform(0, 1))
            asked = time.monotonic()
            assert daemon.stop() == 0, daemon.tail()
            assert time.monotonic() - asked < GRACE
            assert "Traceback" not in daemon.log.read_text()
        learned |= {checkpoint.manifest["step"] for checkpoint in Store(daemon.state).all()[:1]}
    assert len(learned) > 1, "no stop came while it learned"
    jobs.write_config(tmp_path / "b", **over)
    actual = jobs.run_to_end(configs[1])
    assert jobs.differences(expected, actual) == []


@pytest.mark.kafka
def test_sigterm_while_the_broker_is_gone_saves_everything(tmp_path: Path) -> None:
    """Everything learned before the outage is saved in time, although no position can be committed."""
    with KafkaBroker(tmp_path / "kafka") as broker:
        config = jobs.kafka_config(tmp_path / "job", broker.address, "", stream={"on_finished": "wait"})
        sink = KafkaWriter(KafkaConfig.model_validate({"bootstrap_servers": broker.address}))
        jobs.publish(sink, 200)
        sink.close()
        with jobs.Daemon(config) as daemon:
            status = daemon.until(partial(has_trained, 100))
            broker.kill()
            asked = time.monotonic()
            assert daemon.stop() == 0, daemon.tail()
            assert time.monotonic() - asked < GRACE
        kept = Store(daemon.state).all()[0].read_json("status.json")
    assert kept["samples"]["trained"] >= status["samples"]["trained"]
    assert jobs.all_accounted_for(kept)


def test_the_end_of_the_grace_period_ends_the_process(tmp_path: Path) -> None:
    """If an update takes too long, the daemon ends with 1, and the previous checkpoint stays valid."""
    first = jobs.write_config(tmp_path, strategy={"naive": {}}, stream={"on_finished": "wait"})
    jobs.publish_embedded(tmp_path / "topics.sqlite", 100)
    with jobs.Daemon(first) as daemon:
        daemon.until(
            lambda status: status.get("waiting_for") is None and status.get("samples", {}).get("trained", 0) > 0
        )
        assert daemon.stop() == 0
    kept = Store(daemon.state).all()[0]
    over: dict[str, Any] = {"model": {"name": "tests.faults.test_stop:slow_model"}, "shutdown_grace": 0.5}
    second = jobs.write_config(tmp_path / "slow", strategy={"naive": {}}, **over)
    jobs.publish_embedded(tmp_path / "slow" / "topics.sqlite", 100)
    with jobs.Daemon(second) as daemon:
        daemon.until(lambda status: "tasks" in status)  # the loop runs
        time.sleep(2)
        assert daemon.stop() == 1
        assert "the stop took more than 0 s (shutdown_grace): ending without a new checkpoint" in daemon.log.read_text()
    assert Store(tmp_path / "state").newest_valid() == kept


def test_a_broken_log_ends_the_daemon(tmp_path: Path) -> None:
    """The reader thread fails; the daemon saves what it has learned, and ends with 74 and one line."""
    config = jobs.write_config(tmp_path, stream={"on_finished": "wait"}, strategy={"naive": {}})
    path = tmp_path / "topics.sqlite"
    jobs.publish_embedded(path, 100)
    with jobs.Daemon(config) as daemon:
        status = daemon.until(partial(has_trained, 500))
        with sqlite3.connect(path) as database:
            database.execute("DROP TABLE records")
        assert daemon.finish(60) == 74, daemon.tail()
        assert "Traceback" not in daemon.log.read_text()
        assert f"streamlearn: {path}: cannot be read: no such table: records" in daemon.log.read_text()
    assert Store(daemon.state).all()[0].read_json("status.json")["samples"] == status["samples"]


def test_a_dead_listener_ends_the_loop(tmp_path: Path) -> None:
    """Without its listeners a daemon could not be controlled, so the next turn of the loop raises."""
    job, stream = made(tmp_path)
    desk = ControlDesk(job.config, Metrics())
    server = Server(read_only_app(desk), bind_tcp("127.0.0.1", 0), "http")
    desk.servers = [server]
    server.start()
    desk.serve(job, stream, idle=True)
    server.stop()
    with pytest.raises(StreamlearnError, match="1 of the HTTP listeners ended unexpectedly"):
        desk.serve(job, stream, idle=True)


def from_torch(*_: object) -> None:
    """Allocate more memory with torch than there is."""
    torch.empty(1 << 60)


def from_python(*_: object) -> None:
    """Raise a MemoryError without a message, as the interpreter does."""
    raise MemoryError


@pytest.mark.parametrize("fail", [from_torch, from_python])
def test_out_of_memory_is_75_and_saves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fail: object) -> None:
    """The failed update may have changed a part of the model, so the previous checkpoint stays the newest."""
    job, stream = made(tmp_path)
    job.mid_delivery = True
    monkeypatch.setattr("streamlearn.runtime.loop.run", fail)
    desk = ControlDesk(job.config, Metrics())
    with pytest.raises(StreamlearnError, match="out of memory: ") as caught:
        learn(job, stream, desk)
    assert caught.value.exit_code == 75
    assert job.store.all() == []


def test_a_clock_that_jumps_changes_nothing(tmp_path: Path) -> None:
    """The clock jumps a day back and a day ahead while learning: always ready, no negative metric, bit-equal state."""
    configs = [
        jobs.write_config(tmp_path / name, stream={"on_finished": "wait"}, checkpoint={"every_seconds": 0.2})
        for name in ("a", "b")
    ]
    for config in configs:
        jobs.publish_embedded(config.parent / "topics.sqlite", 1000)
    moved = tmp_path / "moved"
    moved.write_text("0")
    (tmp_path / "sitecustomize.py").write_text(CLOCK)
    jumping = {"PYTHONPATH": str(tmp_path), "MOVED_BY": str(moved)}
    ends = []
    for config, environment in zip(configs, ({}, jumping), strict=True):
        with jobs.Daemon(config, environment=environment) as daemon:
            for least, jump in ((500, -DAY), (2000, DAY), (3500, 0)):
                daemon.until(partial(has_trained, least))
                moved.write_text(str(jump))
                assert daemon.until(partial(has_reached, "running"))["ready"]
            daemon.until(partial(has_trained, 5000))
            series = urllib.request.urlopen(f"{daemon.http}/metrics", timeout=10).read().decode().splitlines()
            delays = [
                line for line in series if line.startswith(("streamlearn_record_delay", "streamlearn_consumer_lag"))
            ]
            assert len(delays) > 1
            assert [line for line in delays if float(line.rpartition(" ")[2]) < 0] == []
            assert daemon.stop() == 0
        ends.append(Store(daemon.state).all()[0])
    assert jobs.differences(*ends) == []


def test_a_stop_that_cannot_save_is_reported(tmp_path: Path) -> None:
    """If the last checkpoint cannot be written, daemon and `stop` end with 74 and one line."""
    config = jobs.write_config(tmp_path, stream={"on_finished": "wait"}, checkpoint={"every_batches": 10_000})
    jobs.publish_embedded(tmp_path / "topics.sqlite", 100, markers=False)
    with jobs.Daemon(config) as daemon:
        daemon.until(partial(has_trained, 500))
        checkpoints = daemon.state / "checkpoints"
        checkpoints.rename(daemon.state / "aside")
        checkpoints.write_text("in the way")
        done = cli("stop", "--state", daemon.state)
        assert (done.returncode, one_line(done)) == (
            74,
            "streamlearn: the daemon ended with an error: see its log for the reason and for what was not saved",
        )
        assert daemon.finish(60) == 74
    log = daemon.log.read_text()
    assert "the batches since " in log
    assert "could not be saved, and will be learned again" in log
    assert "Traceback" not in log
