"""The demonstration: three real daemons learn five digit tasks, each with another strategy. It ends by itself."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

from streamlearn.checkpoint.store import Store
from streamlearn.config import loader
from streamlearn.control.client import Client
from streamlearn.core.errors import StreamlearnError, error_with_exit_code
from streamlearn.evaluation.matrix import AccuracyMatrix
from streamlearn.tools import producer, report

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

TASKS = 5
RUNS: dict[str, tuple[str, Any]] = {
    "naive": ("one task after the other, no memory", "naive"),
    "joint": ("keeps and relearns every sample", "joint"),
    "default": ("remembers by generative replay", {"generative": {}, "si": {}}),
}

# A daemon of the demo ends with it, even if the demo is killed: its standard input is a pipe that the demo never writes to.
RUN_UNTIL_PIPE_CLOSES = """
import os, signal, sys, threading

def wait():
    os.read(0, 1)
    os.kill(os.getpid(), signal.SIGTERM)

threading.Thread(target=wait, daemon=True).start()
sys.argv = ["streamlearn", "run", sys.argv[1]]
from streamlearn.__main__ import main
main()
"""


def make_config(directory: Path, name: str) -> dict[str, Any]:
    """Return the configuration of a run."""
    return {
        "name": f"demo-{name}",
        "state_dir": str(directory / "state" / name),
        "embedded": {"path": str(directory / "topics.sqlite")},
        "input": {"shape": [8, 8], "dtype": "uint8", "scale": 16.0},
        "classes": 10,
        # there are few digits, so a fixed quarter is published as the probe
        "holdout": {"fraction": 0.0, "max": None},
        "stream": {"topics": topics(), "batch_size": 10, "on_finished": "exit"},
        "strategy": RUNS[name][1],
        "device": "cpu",
        "learner": {"updates_per_batch": 20},
        "probes": {"every": 3},
        "service": {"port": 0},
    }


def topics() -> list[str]:
    """Return the topics; each is a task."""
    return [f"digits-{2 * n}-{2 * n + 1}" for n in range(TASKS)]


def run(output: Path) -> None:
    """Publish the tasks, learn them, and write `report.html`, `accuracy.png` and `summary.json` to `output`.

    Prints a line for each task that a run has finished. Raises `StreamlearnError` if a run fails.
    """
    started = time.monotonic()
    work = output / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    print(f"Publishing scikit-learn's handwritten digits to {TASKS} topics, two digits each ...", flush=True)
    _publish(work)
    print("Three daemons learn them, one task after the other:", flush=True)
    processes = {name: _start(work, name) for name in RUNS}
    try:
        _print_progress(work, processes)
    finally:
        for process in processes.values():
            if process.poll() is None:
                process.terminate()
                process.wait(30)
            assert process.stdin is not None
            process.stdin.close()
    runs = [
        report.Run.from_checkpoint(Store(work / "state" / name).all()[0], f"{name}: {RUNS[name][0]}") for name in RUNS
    ]
    report.write(output, runs)
    report.write_json(
        output / "summary.json", {name: report.summary(learned) for name, learned in zip(RUNS, runs, strict=True)}
    )
    _print_summary(output, runs, time.monotonic() - started)


def _publish(work: Path) -> None:
    """Write each task's training samples and probe into its topic."""
    from streamlearn.stream.logs.sqlite import EmbeddedWriter

    train, test = producer.read_samples("digits"), producer.read_samples("digits", "test")
    groups = producer.equal_class_groups(train, TASKS)
    writer = EmbeddedWriter(work / "topics.sqlite")
    tasks, probes = producer.split_by_classes(train, groups), producer.split_by_classes(test, groups)
    for number, (topic, samples, probe) in enumerate(zip(topics(), tasks, probes, strict=True)):
        options = producer.PublishOptions(samples_per_record=10)
        producer.publish(writer, topic, producer.shuffle(samples, number), options, probe=probe)
    writer.close()


def _start(work: Path, name: str) -> subprocess.Popen[bytes]:
    """Start the daemon of a run. It ends when its standard input is closed; its output goes to a log file."""
    path = work / f"{name}.yaml"
    path.write_text(loader.dump(make_config(work, name)))
    with (work / f"{name}.log").open("wb") as log:
        command = [sys.executable, "-c", RUN_UNTIL_PIPE_CLOSES, str(path)]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log)  # noqa: S603 - the command is this interpreter and this package


def _print_progress(work: Path, processes: dict[str, subprocess.Popen[bytes]]) -> None:
    """Print a line for each task that a run has finished, until all runs end. Raises `StreamlearnError` if one fails."""
    printed: dict[str, int] = dict.fromkeys(processes, 0)
    print(
        f"\n{'':<8}" + "".join(f"{topic.removeprefix('digits-'):>8}" for topic in topics()) + f"{'average':>10}",
        flush=True,
    )
    while True:
        running = [name for name, process in processes.items() if process.poll() is None]
        for name in processes:
            rows = _read_matrix(work / "state" / name)
            for row in rows[printed[name] :]:
                known = [value for value in row if value is not None]
                cells = "".join(f"{'' if value is None else f'{100 * value:.0f} %':>8}" for value in row)
                print(f"{name:<8}{cells:<{8 * TASKS}}{100 * sum(known) / len(known):>8.1f} %", flush=True)
            printed[name] = len(rows)
        for name, process in processes.items():
            if process.returncode:
                lines = (work / f"{name}.log").read_text().splitlines()
                raise error_with_exit_code(
                    process.returncode, f"the {name} run failed: {lines[-1] if lines else 'no output'}"
                )
        if not running:
            return
        time.sleep(0.3)


def _read_matrix(state: Path) -> list[list[float | None]]:
    """Return the accuracy matrix so far: from the daemon, or from its last checkpoint if it has ended."""
    try:
        matrix: list[list[float | None]] = Client(state, timeout=2).get("/matrix")["matrix"]
    except StreamlearnError:
        checkpoints = Store(state).all()
        matrix = AccuracyMatrix.from_checkpoint(checkpoints[0]).matrix() if checkpoints else []
    return matrix


def _print_summary(output: Path, runs: Sequence[report.Run], seconds: float) -> None:
    """Print the average accuracy and forgetting of each run."""
    print(f"\n{'':<44}{'average accuracy':>18}{'forgotten':>12}")
    for run in runs:
        accuracy, forgetting = run.status["average_accuracy"], run.status["average_forgetting"]
        print(f"{run.name:<44}{100 * accuracy:>16.1f} %{100 * forgetting:>10.1f} %")
    print(f"\n{seconds:.0f} s. Open {output / 'report.html'} and {output / 'accuracy.png'}.")
