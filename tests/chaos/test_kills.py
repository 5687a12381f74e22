"""`kill -9` at random moments: at the start, while learning, while writing a checkpoint. Nothing is lost or repeated."""

from __future__ import annotations

import shutil
import time
from typing import TYPE_CHECKING, Any

import pytest

from streamlearn.stream.logs.sqlite import EmbeddedWriter
from streamlearn.tools import producer
from tests.support import jobs, models
from tests.support.chaos.case import FULL, Case
from tests.support.kills import STRATEGIES

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from streamlearn.checkpoint.manifest import Checkpoint

FAULT = "`kill -9` of the daemon at random"
SAMPLES = 3000
WHEN = ["writing", "learning", "starting"]


def start_and_kill(config: Path, when: str, rng: random.Random) -> tuple[bool, bool]:
    """Start a daemon and kill it; return whether it was still running, and whether an unfinished checkpoint is left."""
    with jobs.Daemon(config) as daemon:
        if when == "starting":
            time.sleep(rng.uniform(0, 5))
        else:
            while daemon.process.poll() is None and (daemon.status() or {"state": "starting"})["state"] != "running":
                time.sleep(0.02)
        if when == "learning":
            time.sleep(rng.uniform(0, 0.5))
        while when == "writing" and daemon.process.poll() is None and not has_unfinished_checkpoint(daemon.state):
            time.sleep(0.0005)
        hit = daemon.process.poll() is None
        assert daemon.process.poll() in {None, 0}, daemon.tail()
        daemon.kill()
    return hit, has_unfinished_checkpoint(daemon.state)


def has_unfinished_checkpoint(state: Path) -> bool:
    """Tell whether a checkpoint is only partly written."""
    return any((state / "checkpoints").glob(".tmp-*"))


def killed_runs(
    case: Case, directory: Path, kills: int, config: Callable[[Path], Path], check: Callable[[Checkpoint], None]
) -> int:
    """Kill runs of a job until so many kills met a running daemon; check each run's end. Return the number of kills."""
    hits = unfinished = number = 0
    needed = max(1, kills // 10)  # unfinished checkpoints
    while hits < kills or unfinished < needed:
        assert number < 10 * kills, "hardly any kill meets a running daemon"
        path = config(directory / f"run{number}")
        ended = False
        while not ended and (hits < kills or unfinished < needed):
            hit, is_unfinished = start_and_kill(path, WHEN[number % len(WHEN)], case.rng)
            hits, unfinished, ended = hits + hit, unfinished + is_unfinished, not hit
            number += 1
        check(jobs.run_to_end(path))
        shutil.rmtree(path.parent)
    case.assert_happened("unfinished checkpoints left", unfinished, needed)
    return hits


def count_differences(expected: Mapping[str, Any], actual: Mapping[str, Any]) -> tuple[int, int]:
    """Return how many samples the actual status has learned less and more than the expected one, summed over topics."""
    pairs = [
        (count["trained"], actual["topics"].get(name, {}).get("trained", 0))
        for name, count in expected["topics"].items()
    ]
    return sum(max(0, a - b) for a, b in pairs), sum(max(0, b - a) for a, b in pairs)


@pytest.mark.parametrize(
    ("strategy", "kills", "per_task"),
    [
        pytest.param(STRATEGIES[0], 3, 100, id="short"),
        *(pytest.param(strategy, 35, 600, id="+".join(strategy), marks=FULL) for strategy in STRATEGIES),
    ],
)
def test_kills(case: Case, tmp_path: Path, strategy: dict[str, object], kills: int, per_task: int) -> None:
    """For every strategy, a run that was killed ends bit-equal to one that was not."""
    scenario = "task" if {"pnn", "packnet"} & set(strategy) else "class"

    def config(directory: Path) -> Path:
        path = jobs.write_config(
            directory,
            strategy=strategy,
            scenario=scenario,
            stream={"batch_size": 20},
            checkpoint={"every_batches": 1},
        )
        jobs.publish_embedded(directory / "topics.sqlite", per_task)
        return path

    expected = jobs.run_to_end(config(tmp_path / "undisturbed"))
    found = [0, 0]

    def check(actual: Checkpoint) -> None:
        status = actual.read_json("status.json")
        lost, twice = count_differences(expected.read_json("status.json"), status)
        found[0] += lost
        found[1] += twice
        assert jobs.all_accounted_for(status)
        assert jobs.differences(expected, actual) == [], f"seed {case.seed}"

    tried = killed_runs(case, tmp_path, kills, config, check)
    case.record(FAULT, tried, lost=found[0], twice=found[1])


@pytest.mark.parametrize("kills", [pytest.param(25, id="counted", marks=FULL)])
def test_kills_counted(case: Case, tmp_path: Path, kills: int) -> None:
    """A counting model shows that it was trained on each sample once, independent of the daemon's counters."""

    def config(directory: Path) -> Path:
        path = jobs.write_tree(directory, models.settings(directory, SAMPLES, checkpoint={"every_batches": 1}))
        sink = EmbeddedWriter(directory / "topics.sqlite")
        producer.publish(sink, "t1", models.numbered(0, SAMPLES), producer.PublishOptions(samples_per_record=7))
        sink.close()
        return path

    found = [0, 0]

    def check(actual: Checkpoint) -> None:
        lost, twice = models.tally(actual, SAMPLES)
        found[0] += lost
        found[1] += twice

    tried = killed_runs(case, tmp_path, kills, config, check)
    case.record(FAULT, tried, lost=found[0], twice=found[1])
