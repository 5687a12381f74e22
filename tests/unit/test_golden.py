"""Checkpoints of earlier versions are still read."""

from __future__ import annotations

import copy
import json
import shutil
from typing import TYPE_CHECKING

import pytest
import torch

from streamlearn import older_keys, state
from streamlearn.checkpoint.manifest import FORMAT, MANIFEST
from streamlearn.checkpoint.store import Store
from streamlearn.config import loader
from streamlearn.core.errors import StreamlearnError
from streamlearn.core.progress import Progress
from streamlearn.core.samples import Batch
from streamlearn.core.states import DaemonState
from streamlearn.evaluation.matrix import FILE
from streamlearn.learning.strategies.recipes import RECIPES
from streamlearn.metrics import Metrics
from streamlearn.runtime.job import Job
from streamlearn.runtime.status import describe_model, status_of
from streamlearn.runtime.stream import open_stream_reader
from tests.golden import make
from tests.support import jobs

if TYPE_CHECKING:
    from pathlib import Path

GOLDEN = sorted(make.HERE.glob("format-*/*"))


def restored_job(tmp_path: Path, golden: Path) -> Job:
    """Return the job of a golden checkpoint, restored from a copy of it."""
    shutil.copytree(golden, tmp_path / "state")
    path = tmp_path / "job.yaml"
    path.write_text(loader.dump(make.settings(tmp_path, golden.name)))
    config = loader.load(path, RECIPES, {})
    job = Job.make(config, Store(config.state_dir), Metrics())
    assert job.restore()
    return job


def test_every_format_has_its_checkpoints() -> None:
    """Every format up to the current one has golden checkpoints."""
    assert {path.parent.name for path in GOLDEN} == {f"format-{number}" for number in range(1, FORMAT + 1)}


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_golden_checkpoint_is_restored(tmp_path: Path, golden: Path) -> None:
    """Every tensor, position and metric is restored as it was saved, and learning continues."""
    job = restored_job(tmp_path, golden)
    assert job.checkpointer.newest is not None
    files, _, _ = state.pack({**job.learner.state_dict(), "probes": job.probes.state_dict()})
    files[FILE] = state.from_bytes(FILE, job.matrix.table())
    current = {f"{file}:{key}": tensor for file, content in files.items() for key, tensor in content.items()}
    saved = jobs.tensors(job.checkpointer.newest)
    assert {name for name, tensor in saved.items() if not torch.equal(tensor, current[name])} == set()
    shown, now = (
        job.checkpointer.newest.read_json("status.json"),
        json.loads(json.dumps(status_of(job, None, DaemonState.RUNNING))),
    )
    for key in ("samples", "labels", "matrix", "positions", "step", "average_accuracy", "unaccounted"):
        assert now[key] == shown[key]
    old = job.checkpointer.newest.read_json("state.json")["progress"]
    assert Progress.from_json(old, job.progress.positions) == job.progress
    tree = json.loads(json.dumps(job.progress.to_json()))
    for task, old_task in zip(tree.pop("tasks"), old.pop("tasks"), strict=True):
        # a later version may save more of a task, and leaves out what is empty
        same = {key: task.get(key, {}) for key in older_keys.update_task_keys(old_task)}
        assert same == older_keys.update_task_keys(old_task)
    assert {key: tree[key] for key in old} == old
    stats = job.learner.learn(Batch(torch.zeros(10, 4), torch.full((10,), 2), torch.full((10,), 1)))
    assert stats.applied == 2


def test_a_parameter_added_later_is_accepted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A parameter that the older version did not have is logged; all others must agree."""
    golden = next(path for path in GOLDEN if path.name == "stored")
    with caplog.at_level("WARNING"):
        restored_job(tmp_path / "one", golden)
    assert (
        "was written by a version without the parameter epsilon of strategy.agem: it is 1e-07 from now on"
        in caplog.text
    )
    (tmp_path / "other").mkdir()
    shutil.copytree(golden, tmp_path / "other" / "state")
    tree = copy.deepcopy(make.settings(tmp_path / "other", golden.name))
    tree["strategy"]["agem"]["reference"] = 3
    path = tmp_path / "other" / "job.yaml"
    path.write_text(loader.dump(tree))
    config = loader.load(path, RECIPES, {})
    with pytest.raises(
        StreamlearnError, match=r"strategy\.agem\.reference: the checkpoint has None, the configuration 3"
    ):
        Job.make(config, Store(config.state_dir), Metrics()).restore()


def test_a_later_format_is_refused(tmp_path: Path) -> None:
    """It may be valid, and using an older checkpoint would lose data: 78, and no file changes."""
    job = restored_job(tmp_path, GOLDEN[0])
    assert job.checkpointer.newest is not None
    file = job.checkpointer.newest.path / MANIFEST
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": FORMAT + 1}))
    with pytest.raises(
        StreamlearnError, match=rf"has format {FORMAT + 1}, and this version reads up to {FORMAT}"
    ) as caught:
        job.store.newest_valid()
    assert caught.value.exit_code == 78
    for name in ("latest", job.checkpointer.newest.id):  # every command refuses it, as the daemon does
        with pytest.raises(StreamlearnError, match="Install the later version"):
            job.store.find(name)
    assert job.checkpointer.newest.path.is_dir()


def test_a_checkpoint_belongs_to_its_source(tmp_path: Path) -> None:
    """Without its `kafka` section a job would use Kafka's positions for embedded topics: 78, also for old checkpoints."""
    golden = next(path for path in GOLDEN if path.name == "default")
    shutil.copytree(golden, tmp_path / "state")
    tree = {**make.settings(tmp_path, golden.name), "kafka": {"bootstrap_servers": "127.0.0.1:1"}}
    path = tmp_path / "job.yaml"
    path.write_text(loader.dump(tree))
    config = loader.load(path, RECIPES, {})
    with pytest.raises(
        StreamlearnError, match=r"stream\.source: the checkpoint has 'embedded', the configuration 'kafka'"
    ) as caught:
        Job.make(config, Store(config.state_dir), Metrics()).restore()
    assert caught.value.exit_code == 78


def test_an_old_job_keeps_its_codec(tmp_path: Path) -> None:
    """A restored job reads samples with the codec version of the job that wrote the checkpoint."""
    job = restored_job(tmp_path, next(path for path in GOLDEN if path.name == "default"))
    stream = open_stream_reader(job)
    assert stream.assembler.settings.decoder.version == 1
    assert describe_model(job)["codec"] == 1
