"""Learn the 20 bAbI tasks in sequence with naive, joint and er, and draw their accuracy along the stream.

`python -m benchmarks.babi` uses `configs/babi.yaml`, writes `docs/data/babi.json` and draws `docs/images/babi.png`.
`--quick` learns a tenth of the samples and writes nothing, `--draw` only draws.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.common import DATA
from benchmarks.ingest import NoCommands
from streamlearn.checkpoint.store import Store
from streamlearn.config import loader
from streamlearn.learning.strategies.recipes import RECIPES
from streamlearn.learning.tensors import configure_torch
from streamlearn.metrics import Metrics
from streamlearn.runtime import loop
from streamlearn.runtime.job import Job
from streamlearn.runtime.stream import make_stream_reader
from streamlearn.stream.logs.memory import MemoryReader, MemoryStore
from streamlearn.tools import producer

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes

    from streamlearn.config.root import Config

ROOT = Path(__file__).parents[1]
RESULTS, PICTURE = ROOT / "docs" / "data" / "babi.json", ROOT / "docs" / "images" / "babi.png"
METHODS = {"naive": "naive: {}", "er": None, "joint": "joint: {}"}  # er as configs/babi.yaml has it
COLOURS = {"naive": "#c1483c", "joint": "#8a8f98", "er": "#2a6fb0"}
SHOWN_TASK = 4  # task 5


def settings(directory: str, strategy: str | None, **over: str) -> Config:
    """Return the shipped configuration with another strategy. `over` has more keys, named as in the environment."""
    environ = {"STATE_DIR": f"{directory}/state", "STREAM__ON_FINISHED": "exit", "DEVICE": "cpu", **over}
    environ |= {"CHECKPOINT__EVERY_SECONDS": "null", "PROBES__EVERY": "10"}
    if strategy is not None:
        environ["STRATEGY"] = strategy
    named = {f"{loader.ENV_PREFIX}{key}": value for key, value in environ.items()}
    return loader.load(ROOT / "configs" / "babi.yaml", RECIPES, named)


def publish_tasks(topics: Sequence[str], limit: int | None) -> MemoryStore:
    """Publish all tasks to a log in memory, each with its test questions as its probe, and return the log's store."""
    path = str(DATA / "babi_en.jsonl.gz")
    train, test = producer.read_samples(path), producer.read_samples(path, "test")
    names = producer.task_names(train, len(topics))
    store = MemoryStore()
    pairs = zip(topics, producer.split_by_task(train, names), producer.split_by_task(test, names), strict=True)
    for number, (topic, part, probe) in enumerate(pairs):
        chosen = producer.shuffle(part, number)
        few = chosen.select(np.arange(len(chosen))[:limit]), probe.select(np.arange(len(probe))[:limit])
        producer.publish(store, topic, few[0], producer.PublishOptions("json"), probe=few[1])
    return store


def learn(store: MemoryStore, config: Config) -> dict[str, Any]:
    """Learn the whole log, and return the history of accuracies, the matrix and the CPU seconds."""
    job = Job.make(config, Store(config.state_dir, keep=1, hourly=0), Metrics())
    stream = make_stream_reader(job, MemoryReader(store), store)
    begun = time.process_time()
    stream.start()
    loop.run(job, stream, NoCommands())
    stream.stop()
    assert job.progress.totals()["trained"] == job.progress.totals()["consumed"] - job.progress.totals()["held_out"]
    return {
        "history": [[trained, json_keys(row)] for _, trained, row in job.matrix.history],
        "matrix": job.matrix.matrix(),
        "average_accuracy": job.matrix.average_accuracy,
        "average_forgetting": job.matrix.average_forgetting,
        "words": len(job.progress.vocabulary),
        "labels": len(job.progress.labels),
        "cpu_seconds": round(time.process_time() - begun),
    }


def json_keys(row: Mapping[int, float]) -> dict[str, float]:
    """Return a row of accuracies with keys that JSON can hold."""
    return {str(task): round(value, 4) for task, value in sorted(row.items())}


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Draw the accuracy on task 5 (left) and the average over the tasks seen so far (right) along the stream."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), sharey=True, layout="constrained")
    for axes, single_task in ((left, True), (right, False)):
        ends = {}
        for name in METHODS:
            rows = [
                (trained, row) for trained, row in results[name]["history"] if not single_task or str(SHOWN_TASK) in row
            ]
            values = [row[str(SHOWN_TASK)] if single_task else sum(row.values()) / len(row) for _, row in rows]
            axes.plot([trained for trained, _ in rows], values, color=COLOURS[name], linewidth=1.6)
            ends[name] = (rows[-1][0], values[-1])
        label(axes, ends)
    tasks = len(results["er"]["matrix"])
    per_task = results["er"]["history"][-1][0] / tasks
    for axes, title in (
        (left, "Accuracy on task 5 (three-argument relations)"),
        (right, "Average over the tasks seen"),
    ):
        decorate(axes, title, tasks, per_task)
    left.set_ylabel("accuracy on 1,000 test questions a task")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def label(axes: Axes, ends: Mapping[str, tuple[float, float]]) -> None:
    """Write each method's name and last value beside its curve, without overlap."""
    lowest = -1.0
    for name, (x, y) in sorted(ends.items(), key=lambda end: end[1][1]):
        lowest = max(y, lowest + 0.055)
        axes.annotate(f" {name} {100 * y:.0f} %", (x, lowest), color=COLOURS[name], va="center", fontsize=9)


def decorate(axes: Axes, title: str, tasks: int, per_task: float) -> None:
    """Add titles, axis labels, and lines where tasks begin."""
    axes.set_title(title, fontsize=11)
    axes.set_xlim(0, tasks * per_task * 1.14)
    axes.set_ylim(-0.02, 1.03)
    axes.set_xticks([(n + 0.5) * per_task for n in range(tasks)], [str(n + 1) for n in range(tasks)], fontsize=8)
    axes.tick_params(axis="x", length=0)
    for n in range(1, tasks + 1):
        axes.axvline(n * per_task, color="#dddddd", linewidth=0.6, zorder=0)
    axes.set_xlabel("task being learned")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def main() -> None:
    """Learn and draw, or with `--draw` only draw."""
    quick = "--quick" in sys.argv
    if "--draw" not in sys.argv:
        configure_torch(1)
        results: dict[str, Any] = {}
        for name, strategy in METHODS.items():
            with tempfile.TemporaryDirectory() as directory:
                config = settings(directory, strategy)
                topics = config.stream.topics or []
                results[name] = learn(publish_tasks(topics, 100 if quick else None), config)
            last = results[name]["matrix"][-1]
            print(f"{name:<6} average {results[name]['average_accuracy']:.3f}, forgetting "
                  f"{results[name]['average_forgetting']:.3f}, {results[name]['cpu_seconds']} s: "
                  + " ".join(f"{100 * value:.0f}" for value in last), flush=True)  # fmt: skip
            if not quick:
                RESULTS.parent.mkdir(parents=True, exist_ok=True)
                RESULTS.write_text(json.dumps(results) + "\n")
    if not quick:
        draw(json.loads(RESULTS.read_text()), PICTURE)


if __name__ == "__main__":
    main()
