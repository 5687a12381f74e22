"""Measure checkpoints: throughput with one every ten seconds against none, and how long each one pauses learning."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.ingest import settings
from benchmarks.update import samples
from streamlearn.checkpoint.store import Store
from streamlearn.core.positions import Position, Positions
from streamlearn.core.states import SaveTrigger
from streamlearn.core.tasks import Task
from streamlearn.learning.tensors import configure_torch
from streamlearn.metrics import Metrics
from streamlearn.runtime.job import Job
from streamlearn.runtime.stream import make_stream_reader
from streamlearn.stream.logs.memory import MemoryReader, MemoryStore

if TYPE_CHECKING:
    from streamlearn.config.root import Config
    from streamlearn.stream.reader import StreamReader

EVERY_SECONDS, PAIRS = 10.0, 4
TARGET = 0.97
WIDTHS = {"1 M": 690, "10 M": 2790, "100 M": 9600}  # widths of two hidden layers, by number of parameters
DEFAULT: dict[str, dict[str, Any]] = {"generative": {}, "si": {}}


def make_job(directory: Path, **over: Any) -> tuple[Job, StreamReader]:
    """Return a job in its first task, and its stream."""
    config: Config = settings(directory, "t").model_copy(update=over)
    job = Job.make(config, Store(config.state_dir, keep=1, hourly=0), Metrics())
    store = MemoryStore()
    task = Task(0, "t", labels=list(range(10)))
    job.progress.tasks.append(task)
    job.progress.labels = list(range(10))
    job.progress.positions = Positions({("t", 0): Position(1)})
    job.learner.begin_task(task)
    job.learner.set_active_outputs(job.progress.tasks, job.progress.labels)
    return job, make_stream_reader(job, MemoryReader(store), store)


def throughput() -> dict[str, Any]:
    """Return the median ratio of batches learned in ten seconds with a checkpoint to those without, in alternation."""
    with tempfile.TemporaryDirectory() as name:
        job, stream = make_job(Path(name), strategy=DEFAULT)
        batch = samples(0)
        for _ in range(100):
            job.learner.learn(batch)
        ratios = []
        for _ in range(PAIRS):
            learned = []
            for saves in (False, True):
                until, count = time.perf_counter() + EVERY_SECONDS, 0
                if saves:
                    job.save(stream, SaveTrigger.INTERVAL)
                while time.perf_counter() < until:
                    job.learner.learn(batch)
                    job.checkpointer.finish(stream)
                    count += 1
                learned.append(count)
            ratios.append(learned[1] / learned[0])
    ratio = statistics.median(ratios)
    print(f"{'with one every 10 s':<20}{ratio:>8.3f} of the throughput without (target: {TARGET})", flush=True)
    return {"value": round(ratio, 3), "target": f">= {TARGET}", "met": ratio >= TARGET}


def pause(label: str, width: int) -> dict[str, Any]:
    """Return the pause, the writing time and the size of a checkpoint of a model of this width, with Adam."""
    with tempfile.TemporaryDirectory() as name:
        config = settings(Path(name), "t")
        model = config.model.model_copy(update={"hidden": [width, width]})
        job, stream = make_job(Path(name), model=model)
        job.learner.learn(samples(0))
        pauses, writes = [], []
        for _ in range(3):
            begun = time.perf_counter()
            saving = job.save(stream, SaveTrigger.INTERVAL)
            pauses.append(time.perf_counter() - begun)
            assert saving.written is not None
            writes.append(saving.written.result()[2])
            job.checkpointer.wait(stream)
        assert job.checkpointer.newest is not None
        entry = {
            "value": round(1000 * statistics.median(pauses), 1),
            "write_seconds": round(statistics.median(writes), 2),
            "megabytes": round(job.checkpointer.newest.num_bytes / 1e6),
        }
    print(
        f"{label + ' parameters':<20}{entry['value']:>8.1f} ms pause, {entry['write_seconds']:.2f} s of writing beside it, "
        f"{entry['megabytes']} MB",
        flush=True,
    )
    return entry


def run() -> dict[str, Any]:
    """Measure throughput and pauses; print and return them."""
    configure_torch(1)
    results = {"every 10 s": throughput()}
    for label, width in WIDTHS.items():
        results[f"pause, {label}"] = pause(label, width)
    return results
