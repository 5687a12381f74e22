"""Measure the cost of many tasks: the time of each task and of `/status`, and the files and JSON of a checkpoint.

`python -m benchmarks tasks`, or `python -m benchmarks.tasks 200` with another number of tasks. The default strategy learns
tasks of 200 samples from embedded topics, in a daemon of its own. Each task has two of ten labels, so labels repeat.
"""

from __future__ import annotations

import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from streamlearn.checkpoint.store import Store
from streamlearn.config import loader
from streamlearn.control.client import Client
from streamlearn.core.errors import StreamlearnError
from streamlearn.stream.logs.sqlite import EmbeddedWriter
from streamlearn.tools import producer
from streamlearn.tools.producer import PublishOptions, Samples

if TYPE_CHECKING:
    from collections.abc import Iterator

TASKS = 1000
SAMPLES = 200
NEIGHBOURS = 10  # tasks in each median, so that a single pause of the machine has no influence
TARGETS = {"ratio": 2.0, "status_seconds": 0.1, "files": 50}


def publish(path: Path, tasks: int) -> None:
    """Publish tasks of two separable classes."""
    sink = EmbeddedWriter(path)
    for task in range(tasks):
        rng = np.random.default_rng(task)
        y = rng.integers(0, 2, SAMPLES)
        x = rng.normal(size=(SAMPLES, 16)).astype(np.float32)
        x[np.arange(SAMPLES), (2 * task + y) % 10] += 3
        labels = ((2 * task + y) % 10).tolist()
        producer.publish(sink, f"t-{task + 1}", Samples(x, labels), PublishOptions(samples_per_record=100))
    sink.close()


def settings(directory: Path) -> dict[str, Any]:
    """Return a configuration with a small model and otherwise defaults."""
    return {
        "name": "tasks",
        "state_dir": str(directory / "state"),
        "embedded": {"path": str(directory / "topics.sqlite")},
        "device": "cpu",
        "input": {"shape": [16]},
        "classes": 10,
        "stream": {"pattern": "t-[0-9]+", "on_finished": "exit"},
        "strategy": {"generative": {"likelihood": "gaussian"}, "si": {}},
        "service": {"port": 0},
    }


def status_times(process: subprocess.Popen[bytes], state: Path) -> Iterator[tuple[int, float]]:
    """Yield, while the daemon runs, the number of tasks and the seconds that `/status` took."""
    while process.poll() is None:
        time.sleep(0.5)
        begun = time.perf_counter()
        try:
            status = Client(state, timeout=60).get("/status")
        except StreamlearnError:
            continue
        yield len(status.get("tasks", [])), time.perf_counter() - begun


def durations(log: Path) -> list[float]:
    """Return the seconds from the begin of each task to the begin of the next."""
    lines = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    begins = [datetime.fromisoformat(line["ts"]).timestamp() for line in lines if line["msg"].endswith(" starts")]
    return [later - earlier for earlier, later in itertools.pairwise(begins)]


def measure(tasks: int) -> dict[str, Any]:
    """Learn so many tasks and return the measurements."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        publish(directory / "topics.sqlite", tasks)
        config, log = directory / "job.yaml", directory / "job.log"
        config.write_text(loader.dump(settings(directory)))
        with log.open("wb") as out:
            command = [sys.executable, "-m", "streamlearn", "run", str(config), "--quiet"]
            process = subprocess.Popen(command, stdout=out, stderr=out)
            answers = list(status_times(process, directory / "state"))
        if process.returncode:
            raise RuntimeError(log.read_text()[-2000:])
        seconds = durations(log)
        newest = Store(directory / "state").all()[0]
        half = NEIGHBOURS // 2
        tenth = statistics.median(seconds[10 - half : 10 + half])
        medians = [statistics.median(seconds[n - half : n + half]) for n in range(10, len(seconds) - half)]
        late = [taken for count, taken in answers if count > 0.9 * tasks]
        json_bytes = sum(path.stat().st_size for path in newest.path.glob("*.json"))
        found = {
            "tasks": tasks,
            "tenth_seconds": round(tenth, 3),
            "last_seconds": round(medians[-1], 3),
            "ratio": round(max(medians) / tenth, 2),
            "status_seconds": round(statistics.median(late), 4),
            "files": len(list(newest.path.iterdir())),
            "json_bytes_per_task": round(json_bytes / tasks),
            "checkpoint_megabytes": round(newest.num_bytes / 1e6, 2),
        }
    print(", ".join(f"{key} {value}" for key, value in found.items()), flush=True)
    return found


def run(tasks: int = TASKS) -> dict[str, Any]:
    """Measure, print, and return the results with their targets."""
    found = measure(tasks)
    return {
        **{
            key: {"value": found[key], "target": f"<= {most}", "met": found[key] <= most}
            for key, most in TARGETS.items()
        },
        **{key: value for key, value in found.items() if key not in TARGETS},
    }


if __name__ == "__main__":
    run(int(sys.argv[1]) if len(sys.argv) > 1 else TASKS)
