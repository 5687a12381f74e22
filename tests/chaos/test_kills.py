"""`kill -9` at random: while it starts, learns, and writes a checkpoint. Nothing is lost, nothing is learned twice."""

from __future__ import annotations

import shutil
import time
from typing import TYPE_CHECKING, Any

import pytest

from streamlearn import producer
from streamlearn.stream.embedded import EmbeddedWriter
from tests.chaos.case import FULL, Case
from tests.faults.test_kill import STRATEGIES
from tests.support import jobs, models

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from streamlearn.checkpoint import Checkpoint

FAULT = "`kill -9` of the daemon at random"
SAMPLES = 3000
WHEN = ["writing", "learning", "starting"]


def strike(config: Path, when: str, chance: random.Random) -> tuple[bool, bool]:
    """Start a daemon and kill it; return whether it still ran, and whether a torn checkpoint is left."""
    with jobs.Daemon(config) as daemon:
        if when == "starting":
            time.sleep(chance.uniform(0, 5))
        else:
            while daemon.process.poll() is None and (daemon.status() or {"state": "starting"})["state"] != "running":
                time.sleep(0.02)
        if when == "learning":
            time.sleep(chance.uniform(0, 0.5))
        while when == "writing" and daemon.process.poll() is None and not torn(daemon.state):
            time.sleep(0.0005)
        hit = daemon.process.poll() is None
        assert daemon.process.poll() in {None, 0}, daemon.tail()
        daemon.kill()
    return hit, torn(daemon.state)


def torn(state: Path) -> bool:
    """Tell whether a checkpoint is half written."""
    return any((state / "checkpoints").glob(".tmp-*"))


def killed_runs(
    case: Case, directory: Path, kills: int, config: Callable[[Path], Path], judge: Callable[[Checkpoint], None]
) -> int:
    """Kill runs of a job, one after the other, until so many kills have hit; judge how each run ends. Return the kills."""
    hits = tears = number = 0
    needed = max(1, kills // 10)  # of torn checkpoints
    while hits < kills or tears < needed:
        assert number < 10 * kills, "hardly any kill hits"
        path = config(directory / f"run{number}")
        ended = False
        while not ended and (hits < kills or tears < needed):
            hit, tear = strike(path, WHEN[number % len(WHEN)], case.chance)
            hits, tears, ended = hits + hit, tears + tear, not hit
            number += 1
        judge(jobs.run_to_end(path))
        shutil.rmtree(path.parent)
    case.sometimes("torn checkpoints left", tears, needed)
    return hits


def gaps(expected: Mapping[str, Any], actual: Mapping[str, Any]) -> tuple[int, int]:
    """Return by how many samples a status has learned less and more than another, topic by topic."""
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
    """Whatever the strategy, every run that was killed ends bit-equal to the one that was not."""
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

    def judge(actual: Checkpoint) -> None:
        status = actual.read_json("status.json")
        lost, twice = gaps(expected.read_json("status.json"), status)
        found[0] += lost
        found[1] += twice
        assert jobs.all_accounted_for(status)
        assert jobs.differences(expected, actual) == [], f"seed {case.seed}"

    tried = killed_runs(case, tmp_path, kills, config, judge)
    case.report(FAULT, tried, lost=found[0], twice=found[1])


@pytest.mark.parametrize("kills", [pytest.param(25, id="counted", marks=FULL)])
def test_kills_counted(case: Case, tmp_path: Path, kills: int) -> None:
    """A model that counts was trained on each sample once, whatever the daemon's own books say."""

    def config(directory: Path) -> Path:
        path = jobs.write_tree(directory, models.settings(directory, SAMPLES, checkpoint={"every_batches": 1}))
        sink = EmbeddedWriter(directory / "topics.sqlite")
        producer.publish(sink, "t1", models.numbered(0, SAMPLES), producer.PublishOptions(samples_per_record=7))
        sink.close()
        return path

    found = [0, 0]

    def judge(actual: Checkpoint) -> None:
        lost, twice = models.tally(actual, SAMPLES)
        found[0] += lost
        found[1] += twice

    tried = killed_runs(case, tmp_path, kills, config, judge)
    case.report(FAULT, tried, lost=found[0], twice=found[1])
