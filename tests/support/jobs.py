"""Run real daemons in tests: write configurations, publish tasks, start processes, read status and checkpoints."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import yaml

from benchmarks.common import DATA, merged
from streamlearn import state
from streamlearn.checkpoint.store import Store
from streamlearn.control.client import Client
from streamlearn.control.statedir import read_process_record
from streamlearn.core.errors import StreamlearnError
from streamlearn.stream.logs.sqlite import EmbeddedWriter
from streamlearn.tools import producer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from streamlearn.checkpoint.manifest import Checkpoint
    from streamlearn.stream.logs.base import LogWriter

DEVICE = os.environ.get("STREAMLEARN_TEST_DEVICE", "cpu")  # `cuda` runs the same tests on a GPU
TOPICS = ["t1", "t2", "t3", "t4", "t5"]
DEADLINE = 240


def require(present: object, what: str) -> None:
    """If something is missing, fail the test with CI=1, otherwise skip it with one line."""
    if not present:
        if os.environ.get("CI"):
            pytest.fail(f"{what} is missing, and CI must not skip what needs it")
        pytest.skip(f"{what} is missing")


def mnist() -> Path:
    """Return the path of the MNIST file; fail or skip the test if it is missing."""
    path = DATA / "mnist.npz"
    require(path.is_file(), str(path))
    return path


def settings(directory: Path, **over: Any) -> dict[str, Any]:
    """Return a small configuration of MNIST tasks over embedded topics."""
    base: dict[str, Any] = {
        "name": "job",
        "state_dir": str(directory / "state"),
        "embedded": {"path": str(directory / "topics.sqlite")},
        "device": DEVICE,
        "input": {"shape": [28, 28], "dtype": "uint8", "scale": 255},
        "classes": 10,
        "holdout": {"fraction": 0.0, "max": None},
        "stream": {"topics": TOPICS, "on_finished": "exit", "batch_size": 50},
        "model": {} if "model" in over else {"hidden": [64, 64]},
        "learner": {"updates_per_batch": 4},
        "strategy": over.pop("strategy", {"generative": {"hidden": 64, "latent": 16}, "si": {}}),
        "checkpoint": {"every_seconds": None, "every_batches": 3},
        "service": {"port": 0},
    }
    return merged(base, over)


def write_config(directory: Path, **over: Any) -> Path:
    """Write the configuration of `settings` and return its path."""
    return write_tree(directory, settings(directory, **over))


def write_tree(directory: Path, tree: Mapping[str, Any]) -> Path:
    """Write a configuration and return its path."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "job.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def tasks(per_task: int, probe_size: int | None = 200) -> list[tuple[producer.Samples, producer.Samples]]:
    """Return five MNIST tasks of two digits each, each with its probe."""
    train, test = producer.read_samples(str(mnist())), producer.read_samples(str(mnist()), "test")
    groups = producer.equal_class_groups(train, 5)
    cut: list[tuple[producer.Samples, producer.Samples]] = []
    for number, (part, probe) in enumerate(
        zip(producer.split_by_classes(train, groups), producer.split_by_classes(test, groups), strict=True)
    ):
        chosen = producer.shuffle(part, number)
        cut.append((first(chosen, per_task), probe if probe_size is None else first(probe, probe_size)))
    return cut


def first(samples: producer.Samples, count: int) -> producer.Samples:
    """Return the first `count` samples."""
    return samples.select(np.arange(min(count, len(samples))))


def publish(sink: LogWriter, per_task: int, prefix: str = "", **how: Any) -> None:
    """Publish the five MNIST tasks."""
    for topic, (samples, probe) in zip(TOPICS, tasks(per_task), strict=True):
        producer.publish(
            sink, prefix + topic, samples, producer.PublishOptions(**{"samples_per_record": 20, **how}), probe=probe
        )


def kafka_config(directory: Path, bootstrap: str, prefix: str, **over: Any) -> Path:
    """Write a configuration that reads the topics with this prefix from Kafka."""
    on_kafka = {
        "kafka": {"bootstrap_servers": bootstrap, "metadata_refresh_seconds": 1, "group_id": prefix + directory.name},
        "stream": {
            "topics": [prefix + topic for topic in TOPICS],
            "dead_letter": {"topic": f"{prefix}{directory.name}.dlq"},
        },
    }
    return write_config(directory, **merged(on_kafka, over))


def publish_embedded(path: Path, per_task: int, **how: Any) -> None:
    """Publish the five MNIST tasks to embedded topics."""
    sink = EmbeddedWriter(path)
    publish(sink, per_task, **how)
    sink.close()


class Daemon:
    """A `streamlearn run` process."""

    def __init__(
        self,
        config: Path,
        state_dir: Path | None = None,
        environment: Mapping[str, str] = {},
        python: str = sys.executable,
    ) -> None:
        self.config = config
        self.state = state_dir or Path(yaml.safe_load(config.read_text())["state_dir"])
        self.log = config.with_suffix(".log")
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [python, "-m", "streamlearn", "run", str(config)],
                stdout=log,
                stderr=log,
                env={**os.environ, **environment},
                start_new_session=True,
            )

    def __enter__(self) -> Daemon:  # noqa: PYI034 - nothing inherits from it
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.kill()

    def status(self) -> dict[str, Any] | None:
        """Return the daemon's status, or None while it does not answer."""
        record = read_process_record(self.state)
        if record is None or record.pid != self.process.pid:
            return None
        try:
            tree: dict[str, Any] = Client(self.state, timeout=5).get("/status")
        except StreamlearnError:
            return None
        return tree

    @property
    def http(self) -> str:
        """The address of the read-only listener."""
        record = read_process_record(self.state)
        assert record is not None
        return record.http

    def until(self, condition: Callable[[dict[str, Any]], bool], seconds: float = DEADLINE) -> dict[str, Any]:
        """Return the first status that fulfils a condition; fail if the process ends or the time is over."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if (status := self.status()) is not None and condition(status):
                return status
            if self.process.poll() is not None:
                pytest.fail(f"the daemon ended with {self.process.returncode}:\n{self.tail()}")
            time.sleep(0.05)
        pytest.fail(f"not reached within {seconds} s; status {self.status()}\n{self.tail()}")

    def kill(self) -> None:
        """Kill the process with SIGKILL, as a power cut would."""
        self.process.kill()
        self.process.wait(30)

    def finish(self, seconds: float = DEADLINE) -> int:
        """Wait until the daemon ends by itself, and return its exit code."""
        return self.process.wait(seconds)

    def stop(self) -> int:
        """Send SIGTERM, and return the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    def tail(self) -> str:
        """Return the end of the log."""
        return self.log.read_text()[-3000:]


def run_to_end(config: Path, seconds: float = DEADLINE) -> Checkpoint:
    """Run a daemon until it ends by itself with 0, and return its last checkpoint."""
    with Daemon(config) as daemon:
        code = daemon.finish(seconds)
        assert code == 0, daemon.tail()
        return Store(daemon.state).all()[0]


def tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Return all tensors of a checkpoint, by file and name."""
    return {
        f"{name}:{key}": tensor
        for name in checkpoint.manifest["files"]
        if name.endswith(".safetensors")
        for key, tensor in state.from_bytes(name, checkpoint.read(name)).items()
    }


def differences(one: Checkpoint, other: Checkpoint) -> list[str]:
    """Return the names of tensors and keys that differ between two checkpoints, bit by bit; empty if they are equal."""
    a, b = tensors(one), tensors(other)
    found = sorted(set(a) ^ set(b))
    found += [name for name in a if name in b and a[name].numpy().tobytes() != b[name].numpy().tobytes()]
    x, y = one.read_json("state.json"), other.read_json("state.json")
    found += [f"state.json:{key}" for key in x if x[key] != y.get(key)]
    return found


def all_accounted_for(status: Mapping[str, Any]) -> bool:
    """Return whether each consumed sample has exactly one outcome."""
    samples = dict(status["samples"])
    return bool(samples.pop("consumed") == sum(samples.values()) and status["unaccounted"] == {})
