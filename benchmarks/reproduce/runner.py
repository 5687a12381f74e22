"""Run a cell: one method, scenario and seed of a table, with the stream, loop and learner of the daemon."""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import platform
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from pydantic import ValidationError

from benchmarks.common import merged
from benchmarks.reproduce import streams
from streamlearn.checkpoint.store import Store
from streamlearn.config.root import Config
from streamlearn.core.errors import StreamlearnError
from streamlearn.core.positions import Positions
from streamlearn.learning.strategies.recipes import RECIPES
from streamlearn.learning.tensors import configure_torch
from streamlearn.metrics import Metrics
from streamlearn.runtime import loop
from streamlearn.runtime.checkpointer import PendingSave, Snapshot
from streamlearn.runtime.job import Job
from streamlearn.runtime.stream import make_stream_reader
from streamlearn.stream.logs.memory import MemoryReader

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.reproduce.cells import Row, Settings, Table
    from benchmarks.reproduce.streams import Curriculum
    from streamlearn.core.states import SaveTrigger
    from streamlearn.stream.reader import StreamReader

ROOT = Path(__file__).parents[2]
NEVER = 10**9
POLLED = 16  # records in a poll, one batch each, so that few encoded records wait
FROM_FILE = ("strategy", "model", "learner", "scenario")
SHAPING = ("seed", "input", "classes", "grow_head", "scenario", "holdout", "model", "strategy", "learner", "probes")


class RecipeUnavailable(StreamlearnError):  # noqa: N818 - it names what this version cannot do
    """This version does not have a cell's recipe, or does not accept its parameters."""


@dataclass(frozen=True)
class Cell:
    """One run. `scale`: the part of its samples that is learned, 1 except with `--quick`."""

    table: Table
    row: Row
    scenario: str
    seed: int
    scale: float = 1.0

    @property
    def key(self) -> str:
        """Its name in the result file and for `--only`."""
        return "/".join([self.table.name, self.row.method, self.scenario, str(self.seed)])

    @property
    def curriculum(self) -> Curriculum:
        """The tasks that it learns."""
        return self.row.curriculum or self.table.curriculum

    def config(self, device: str = "cpu") -> Config:
        """Return its configuration. Raises `RecipeUnavailable` if this version has no such recipe or parameter."""
        tree = merged(self._protocol(), {**self.table.settings})
        tree = merged(merged(tree, self._own()), {"device": device, "seed": self.seed})
        try:
            return Config.model_validate(tree, context={"recipes": RECIPES})
        except ValidationError as error:
            lines = [f"{'.'.join(map(str, details['loc']))}: {details['msg']}" for details in error.errors()]
            raise RecipeUnavailable("; ".join(lines)) from error

    def digest(self) -> str:
        """Return the SHA-256 of everything that shapes its result, but not of the device or the reading.

        Keys without a value are left out, so an optional key of a later version does not invalidate results. The key
        "course" has its first name, because another name would invalidate all results.
        """
        config = self.config()
        effective = config.effective()
        shaping = {key: without_none(effective[key]) for key in SHAPING}
        data = {"course": asdict(self.curriculum), "scale": self.scale, "batch_size": config.stream.batch_size}
        return hashlib.sha256(json.dumps([shaping, data], sort_keys=True).encode()).hexdigest()

    def _protocol(self) -> Settings:
        topics = streams.topics(self.curriculum)
        declared = dict(zip(topics, streams.classes(self.curriculum, self.seed), strict=True))
        scenarios: dict[str, Settings] = {
            "class": {"kind": "class", "active": "all"},
            "domain": {"kind": "domain", "tasks": declared},
            "task": {"kind": "task", "tasks": declared},
        }
        return {
            "name": "reproduce",
            "input": {"shape": [28, 28], "dtype": "uint8", "scale": 255},
            "classes": list(range(10)),
            "scenario": scenarios[self.scenario],
            "holdout": {"fraction": 0.0, "max": None},
            # markers end the tasks, never silence
            "stream": {
                "topics": topics,
                "on_finished": "exit",
                "task_end": {"idle": NEVER},
                "queue": {"samples": 4000},
            },
            "probes": {"every": NEVER, "every_seconds": None},
            "checkpoint": {"every_seconds": None},
        }

    def _own(self) -> Settings:
        found = next((path for name in self.row.files if (path := ROOT / name).exists()), None)
        tree: Settings = yaml.safe_load(found.read_text()) if found is not None else {}
        own = {key: tree[key] for key in FROM_FILE if key in tree}
        if (scenario := own.get("scenario")) is not None:
            own["scenario"] = {"active": "seen"} | ({"kind": scenario} if isinstance(scenario, str) else scenario)
        if "stream" in tree:
            own["stream"] = {"batch_size": tree["stream"].get("batch_size", 100)}
        own = merged(own, self.row.settings)
        if self.row.strategy:
            own["strategy"] = self.row.strategy
        return merged(own, self.row.by_scenario.get(self.scenario, {}))


class JobWithoutCheckpoints(Job):
    """A job that writes no checkpoints: an interrupted cell starts again."""

    def save(self, stream: StreamReader, trigger: SaveTrigger, tag: str | None = None) -> PendingSave:
        del stream, tag
        return PendingSave(trigger, Snapshot({}, {}, {}, frozenset(), Positions(), 0, 0.0), finished=True)


class ProgressControl:
    """Gives the loop no commands, and reports its progress: the part of the batches that was learned."""

    stopping = False
    paused = False

    def __init__(self, batches: int, progress: Callable[[float], None]) -> None:
        self.batches = batches
        self.progress = progress

    def serve(self, job: Job, stream: StreamReader, *, idle: bool) -> None:
        del stream, idle
        self.progress(job.learner.batches / self.batches)

    def wait(self, seconds: float) -> None:
        """Wait for nobody."""


def run(cell: Cell, device: str = "cpu", progress: Callable[[float], None] = lambda _: None) -> dict[str, Any]:
    """Run a cell and return its result for the result file."""
    config = cell.config(device)
    configure_torch(config.threads)
    task_data = streams.task_data(cell.curriculum, cell.seed)
    totals = streams.sizes(cell.curriculum, task_data, cell.scale)
    store = streams.publish(
        cell.curriculum, task_data, per_record=config.stream.batch_size, seed=cell.seed, scale=cell.scale
    )
    job = JobWithoutCheckpoints.make(config, Store(config.state_dir), Metrics())
    stream = make_stream_reader(job, MemoryReader(store, POLLED), store)
    batches = sum(-(-total // config.stream.batch_size) for total in totals)
    begun, used = time.perf_counter(), time.process_time()
    stream.start()
    try:
        loop.run(job, stream, ProgressControl(batches, progress))
    finally:
        stream.stop()
    seconds, used = time.perf_counter() - begun, time.process_time() - used
    counted = job.progress.totals()
    if counted["trained"] + counted["skipped"] != sum(totals):
        raise StreamlearnError(f"{cell.key}: {dict(counted)}; expected {sum(totals)} samples to be learned")
    return {
        "digest": cell.digest(),
        **_figures(job, curve=config.probes.every != NEVER),
        "samples": sum(totals),
        "skipped": counted["skipped"],  # samples without a finite update: the strength was too large
        "steps": job.learner.step,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(used, 1),
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(str(job.learner.context.device)),
    }


def without_none(tree: Any) -> Any:
    """Return a tree without keys whose value is None."""
    if isinstance(tree, dict):
        return {key: without_none(value) for key, value in tree.items() if value is not None}
    return tree


def quiet() -> None:
    """Log errors only: skipped samples are counted in the result."""
    logging.getLogger("streamlearn").setLevel(logging.ERROR)


def start_worker() -> None:
    """Prepare a worker process. It ends when its parent process ends, for whatever reason."""
    quiet()
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)


def _figures(job: Job, *, curve: bool) -> dict[str, Any]:
    matrix = job.matrix
    last = matrix.row(max(matrix.rows))
    # with one task there is nothing to forget
    figures: dict[str, Any] = {
        "average_accuracy": matrix.average_accuracy,
        "backward_transfer": matrix.backward_transfer or 0.0,
        "average_forgetting": matrix.average_forgetting or 0.0,
        "learned": [round(matrix.row(task)[task], 4) for task in matrix.ended_tasks],
        "last": [round(value, 4) for _, value in sorted(last.items())],
    }
    if curve:
        figures["curve"] = [[samples, round(row[0], 4)] for _, samples, row in matrix.history]
    return figures


def machine(device: str) -> str:
    """Return one line with the hardware and the torch version of a result."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        processor = next(iter(names), processor)
    where = torch.cuda.get_device_name(device) if device.startswith("cuda") else "one thread"
    return f"{processor}, {os.cpu_count()} cores, {where}, torch {torch.__version__}"
