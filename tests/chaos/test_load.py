"""Load: a learner that is too slow, and long phases of load and silence. No resource grows, no sample is dropped."""

from __future__ import annotations

import itertools
import statistics
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from streamlearn.checkpoint.store import Store
from streamlearn.stream.codecs.registry import CODECS
from streamlearn.stream.logs.base import CONTENT_TYPE, CONTROL_HEADER, TASK_END
from streamlearn.stream.logs.sqlite import EmbeddedWriter
from streamlearn.tools import producer
from tests.support import jobs, models
from tests.support.agreement import get, scrape
from tests.support.chaos.case import FULL, Case

if TYPE_CHECKING:
    from collections.abc import Sequence

BATCH = 10
QUEUE = 1000
POLL = 500  # records that one poll of embedded topics returns at most
MEGABYTE = 1 << 20
SAMPLE_SECONDS = 1.0
FIRST_TASK_SAMPLES = 2000  # samples of the first task, which the second task replays
CHUNK = 500
BACKLOG = 20_000  # published samples that wait for the learner under load


@dataclass(frozen=True)
class ProcessStats:
    """The resources of a process at one moment."""

    second: float  # monotonic
    resident: int  # bytes
    threads: int
    descriptors: int
    series: int
    queued: int  # samples
    trained: int


def measure(daemon: jobs.Daemon) -> ProcessStats:
    """Measure a daemon from outside."""
    process = Path(f"/proc/{daemon.process.pid}")
    found = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
    descriptors = len(list((process / "fd").iterdir()))
    shown = scrape(daemon.http)
    trained = sum(value for (name, _), value in shown.items() if name == "samples_trained_total")
    queued = next(value for (name, _), value in shown.items() if name == "train_batch_queue_samples")
    resident, threads = int(found["VmRSS"].split()[0]) << 10, int(found["Threads"])
    return ProcessStats(time.monotonic(), resident, threads, descriptors, len(shown), int(queued), int(trained))


def measure_for(daemon: jobs.Daemon, seconds: float, feeder: Feeder | None = None) -> list[ProcessStats]:
    """Measure a daemon every second for so long. It must be alive each time; the feeder gives it enough to learn."""
    found = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found.append(measure(daemon))
        if feeder is not None:
            feeder.limit = found[-1].trained + BACKLOG
        assert get(f"{daemon.http}/healthz")[0] == 200
        time.sleep(SAMPLE_SECONDS)
    return found


def slope(found: Sequence[ProcessStats]) -> float:
    """Return the growth of the resident memory in bytes an hour: the slope of a fitted line."""
    seconds = np.array([v.second for v in found])
    return float(np.polyfit(seconds - seconds[0], [v.resident for v in found], 1)[0]) * 3600


@pytest.mark.parametrize(("seconds", "update_seconds"), [pytest.param(180, 2.0, id="updates of 2 s", marks=FULL)])
def test_back_pressure(case: Case, tmp_path: Path, seconds: float, update_seconds: float) -> None:
    """Under full load a slow learner's queue keeps its limit, memory is flat, and each sample is learned once."""
    samples = 20_000  # far more than can be learned in this time
    over: dict[str, Any] = {
        "stream": {"queue": {"samples": QUEUE}, "batch_size": BATCH},
        "checkpoint": {"every_batches": 5},
        "service": {"liveness_timeout": 30},
    }
    config = jobs.write_tree(tmp_path, models.settings(tmp_path, samples, update_seconds, **over))
    sink = EmbeddedWriter(tmp_path / "topics.sqlite")
    how = producer.PublishOptions(samples_per_record=1, markers=False)
    producer.publish(sink, "t1", models.numbered(0, samples), how)
    sink.close()
    with jobs.Daemon(config) as daemon:
        daemon.until(lambda status: status["state"] == "running" and status["samples"]["trained"] > 0)
        found = measure_for(daemon, seconds)
        assert daemon.stop() == 0, daemon.tail()
    fullest = max(v.queued for v in found)
    # a poll that had started before the limit was reached is still queued completely
    most = QUEUE + POLL + BATCH
    case.assert_happened("measurements with a full queue", sum(v.queued >= QUEUE // 2 for v in found), len(found) // 2)
    assert fullest <= most, f"{fullest} samples queued, expected at most {most}"
    grown = max(v.resident for v in found[len(found) // 2 :]) - max(v.resident for v in found[: len(found) // 2])
    assert grown < 16 * MEGABYTE, f"memory grew by {grown / MEGABYTE:.0f} MB"
    checkpoint = Store(daemon.state).all()[0]
    trained = checkpoint.read_json("status.json")["samples"]["trained"]
    lost, twice = models.tally(checkpoint, trained)  # samples come in order, so the learned ones are the first
    assert trained >= BATCH * 0.5 * seconds / update_seconds
    case.assert_happened("slow updates", trained // BATCH, 10)
    case.record(
        f"updates of {update_seconds:g} s under full load for {seconds / 60:g} minutes", 1, lost=lost, twice=twice
    )


class Feeder:
    """Publishes up to a limit, which the measuring loop raises; in a silent phase the limit stays."""

    def __init__(self, path: Path, topic: str) -> None:
        self.path, self.topic = path, topic
        self.published = 0
        self.limit = BACKLOG
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="feeder", daemon=True)
        self._thread.start()

    def finish(self) -> int:
        """Write the marker that ends the task, and return how many samples were published."""
        self._end.set()
        self._thread.join(60)
        return self.published

    def _run(self) -> None:
        sink = EmbeddedWriter(self.path)
        sink.create_topic(self.topic, 1)
        while not self._end.wait(0.02):
            if self.published < self.limit:
                samples = models.numbered(self.published, CHUNK)
                value = CODECS["batch"].encode(samples.x, samples.y)
                sink.append(self.topic, 0, value, headers=((CONTENT_TYPE, CODECS["batch"].content_type),))
                sink.flush()
                self.published += CHUNK
        sink.append(self.topic, 0, TASK_END, headers=((CONTROL_HEADER, TASK_END),))
        sink.flush()
        sink.close()


@pytest.mark.parametrize(("minutes", "phase"), [pytest.param(21, 90.0, id="21 minutes", marks=FULL)])
def test_soak(case: Case, tmp_path: Path, minutes: float, phase: float) -> None:
    """After phases of load and silence, memory, threads, file descriptors and series are as after the warm-up."""
    over: dict[str, Any] = {
        "stream": {"topics": ["t0", "t1"], "batch_size": 100},
        "checkpoint": {"every_batches": None, "every_seconds": 10},
        "learner": {"updates_per_batch": 2, "average": 0.998},
        "strategy": {"generative": {"hidden": 32, "latent": 8}, "si": {}},
    }
    tree = models.settings(tmp_path, 0, **over)
    config = jobs.write_tree(tmp_path, {**tree, "model": {"name": "mlp", "hidden": [32]}})
    sink = EmbeddedWriter(tmp_path / "topics.sqlite")
    producer.publish(sink, "t0", models.numbered(0, FIRST_TASK_SAMPLES), producer.PublishOptions())
    sink.close()
    feeder = Feeder(tmp_path / "topics.sqlite", "t1")
    loaded: list[ProcessStats] = []
    idle: list[ProcessStats] = []
    end = time.monotonic() + minutes * 60
    with jobs.Daemon(config) as daemon:
        while time.monotonic() < end:
            if not loaded:
                daemon.until(
                    lambda status: status["state"] == "running" and status["samples"]["trained"] > FIRST_TASK_SAMPLES
                )
            loaded += measure_for(daemon, phase, feeder)
            idle += measure_for(daemon, phase / 3)
        published = FIRST_TASK_SAMPLES + feeder.finish()
        assert daemon.finish() == 0, daemon.tail()
    trained = Store(daemon.state).all()[0].read_json("status.json")["samples"]["trained"]
    warm = [v for v in loaded if v.second > loaded[0].second + phase]
    for name in ("threads", "descriptors", "series"):
        # the median, because a request or a checkpoint may use something for a moment
        early, late = (
            statistics.median(getattr(v, name) for v in part)
            for part in (warm[: len(warm) // 3], warm[-len(warm) // 3 :])
        )
        assert late <= early, f"{name}: {early} at first, {late} in the end"
    everything = sorted(loaded + idle, key=lambda v: v.second)
    after = [v for v in everything if v.second > everything[0].second + phase]
    first, last = after[0].resident, after[-1].resident
    grown = slope(after) * minutes / 60
    assert grown < 0.05 * first, f"memory grew from {first / MEGABYTE:.0f} to {last / MEGABYTE:.0f} MB"
    silent = sum(a.trained == b.trained for a, b in itertools.pairwise(idle))
    case.assert_happened("measurements under load", len(loaded), 100)
    case.assert_happened("seconds without new samples", silent, len(idle) // 2)
    case.assert_happened("samples learned", trained, 100_000)
    case.assert_happened("resident memory, MB", round(last / MEGABYTE), 0)
    lost, twice = max(0, published - trained), max(0, trained - published)
    case.record(f"{minutes:g} minutes of alternating load and silence", 1, lost=lost, twice=twice)
