"""System test of text: publish, learn, kill, resume and predict, with a real daemon."""

from __future__ import annotations

import gzip
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from benchmarks.common import DATA
from streamlearn.config import loader
from streamlearn.core.errors import StreamlearnError
from streamlearn.tools import producer
from streamlearn.tools.predict import Model
from tests.support import jobs
from tests.support.commands import cli

if TYPE_CHECKING:
    from pathlib import Path

TASKS = (1, 20)  # single supporting fact, motivations
TRAIN, TEST = 200, 60
KEYS: dict[str, Any] = {
    "classes": 12,
    "strategy": {"er": {"budget": 200}},
    "learner": {"updates_per_batch": 12, "optimizer": {"lr": 0.005}},
    "model": {"name": "memnet", "embedding": 24, "hops": 1},
    "stream": {"topics": ["t1", "t2"], "batch_size": 20},
}


def write_lines(directory: Path) -> None:
    """Write some lines of two bAbI tasks to a file."""
    path = DATA / "babi_en.jsonl.gz"
    jobs.require(path.is_file(), str(path))
    chosen: dict[tuple[int, str], list[dict[str, Any]]] = {}
    with gzip.open(path, "rt") as file:
        for line in map(json.loads, file):
            few = chosen.setdefault((line["task"], line["split"]), [])
            if line["task"] in TASKS and len(few) < (TRAIN if line["split"] == "train" else TEST):
                few.append(line)
    with gzip.open(directory / "babi.jsonl.gz", "wt") as packed:
        packed.writelines(json.dumps(line) + "\n" for few in chosen.values() for line in few)


def write_config(directory: Path, topics: Path) -> Path:
    """Write a configuration of the two tasks."""
    directory.mkdir()
    own = {"input": {"kind": "text", "sentences": 12, "words": 8, "vocabulary": 60}, "embedded": {"path": str(topics)}}
    path = directory / "job.yaml"
    path.write_text(loader.dump({**jobs.settings(directory, **KEYS), **own}))
    return path


@pytest.mark.usefixtures("daemon_mode")
def test_text_is_learned_and_used(tmp_path: Path) -> None:
    """Word ids are the same after a kill, and `predict` gives the accuracy of the status."""
    write_lines(tmp_path)
    files = {name: write_config(tmp_path / name, tmp_path / "topics.sqlite") for name in ("whole", "killed")}
    done = cli("produce", tmp_path / "babi.jsonl.gz", "--config", files["whole"], "--by", "task", "--probe", "test")
    assert done.stdout.splitlines() == [f"t{n}: {TRAIN} samples, {TEST} for the probe" for n in (1, 2)], done.stderr
    whole = jobs.run_to_end(files["whole"])
    with jobs.Daemon(files["killed"]) as daemon:
        daemon.until(lambda status: status.get("batches", 0) >= 2)
        daemon.kill()
    assert jobs.differences(whole, jobs.run_to_end(files["killed"])) == []

    status = whole.read_json("status.json")
    model = whole.read_json("model.json")
    assert status["samples"]["trained"] == len(TASKS) * TRAIN
    assert jobs.all_accounted_for(status)
    assert len(status["labels"]) == 10
    assert model["vocabulary"] == whole.read_json("state.json")["progress"]["vocabulary"]
    assert model["input"]["shape"] == [13, 8]
    assert status["average_accuracy"] > 0.5
    done = cli("predict", tmp_path / "babi.jsonl.gz", "--state", tmp_path / "whole" / "state", "--json")
    tree = json.loads(done.stdout)
    assert (tree["samples"], tree["accuracy"]) == (2 * TEST, pytest.approx(status["average_accuracy"])), done.stderr
    with pytest.raises(StreamlearnError, match="x is numbers; the model expects text"):
        Model(whole).predict(np.zeros((1, 13, 8), np.int32))
    broken = producer.read_samples(str(tmp_path / "babi.jsonl.gz")).x[:2]
    broken[1] = {"story": [], "question": "?"}
    found = Model(whole).predict(broken)
    assert found.labels[0] is not None
    assert [(n, error.reason) for n, error in found.rejected.items()] == [(1, "schema")]
