"""What a checkpoint contains: a snapshot of a job, and how a job is loaded from it."""

from __future__ import annotations

import json
import time
from functools import partial
from typing import TYPE_CHECKING, Any

from streamlearn import state
from streamlearn.core.positions import Positions
from streamlearn.core.progress import Progress
from streamlearn.core.states import DaemonState
from streamlearn.core.tasks import TaskState
from streamlearn.evaluation import matrix
from streamlearn.evaluation.matrix import AccuracyMatrix
from streamlearn.runtime.checkpointer import Snapshot
from streamlearn.runtime.compatibility import check_compatible, environment
from streamlearn.runtime.status import describe_model, status_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from streamlearn.checkpoint.manifest import Checkpoint
    from streamlearn.checkpoint.writer import Content
    from streamlearn.runtime.job import Job


def take_snapshot(job: Job) -> Snapshot:
    """Return a copy of the state. Immutable tensors are not copied here: the writer does that, if it must write them."""
    groups = {**job.learner.state_dict(), "probes": job.probes.state_dict()}
    tensors, rest, immutable = state.pack(groups)
    files: dict[str, Content] = {}
    for name, content in tensors.items():
        kept = content if name in immutable else state.host_copies(content)
        files[name] = partial(_to_bytes, kept) if name in immutable else partial(state.to_bytes, kept)
    sizes = {name: sum(tensor.nbytes for tensor in content.values()) for name, content in tensors.items()}
    not_tensors = {"model": rest["model"], "encoder": groups["encoder"].get("rest", {})}
    files["model.json"] = _json({**describe_model(job), "state": not_tensors})
    files["state.json"] = _json({"groups": rest, "progress": job.progress.to_json(), "matrix": job.matrix.state_dict()})
    files[matrix.FILE] = job.matrix.table()
    files["offsets.json"] = _json(job.progress.positions.to_json())
    files["status.json"] = _json({**status_of(job, None, DaemonState.STOPPED), "pid": None})
    info = {
        "step": job.learner.step,
        "batches": job.learner.batches,
        "tasks_ended": sum(task.state == TaskState.ENDED for task in job.progress.tasks),
        "ending": any(task.state != TaskState.ENDED and task.end_offsets is not None for task in job.progress.tasks),
        "average_accuracy": job.matrix.average_accuracy,
        "evaluated": job.last_recorded,
        "config_sha256": job.config.digest(),
        "shaping": job.config.shaping(),
        "environment": environment(job.config),
    }
    return Snapshot(
        files,
        info,
        sizes,
        frozenset(immutable),
        job.progress.positions,
        job.learner.batches,
        time.monotonic(),
    )


def load_checkpoint(job: Job, checkpoint: Checkpoint) -> None:
    """Set the state to that of a checkpoint; raises `ConfigurationError` if it is not compatible."""
    check_compatible(job.config, checkpoint)
    files = {
        name: state.from_bytes(str(checkpoint.path / name), checkpoint.read(name))
        for name in checkpoint.manifest["files"]
        if name.endswith(state.SUFFIX) and name != matrix.FILE
    }
    rest = checkpoint.read_json("state.json")
    job.progress = Progress.from_json(rest["progress"], Positions.from_json(checkpoint.read_json("offsets.json")))
    groups = state.unpack(files, rest["groups"])
    job.probes.load_state_dict(groups.pop("probes"))
    job.probes.resolve_names(job.progress)
    job.matrix = AccuracyMatrix.from_checkpoint(checkpoint)
    job.learner.load_state_dict(groups, job.progress.tasks, job.progress.labels)


def _to_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    return state.to_bytes(state.host_copies(tensors))


def _json(tree: Mapping[str, Any]) -> bytes:
    return json.dumps(tree, allow_nan=False).encode()
