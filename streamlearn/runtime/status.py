"""The status of a job, as `status --json` prints it, and the description of its model in a checkpoint."""

from __future__ import annotations

import os
from collections import Counter
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from streamlearn import __version__
from streamlearn.core.samples import Outcome

if TYPE_CHECKING:
    from collections.abc import Mapping

    from streamlearn.core.positions import Partition
    from streamlearn.core.states import DaemonState
    from streamlearn.core.tasks import Task
    from streamlearn.evaluation.matrix import AccuracyMatrix
    from streamlearn.runtime.job import Job
    from streamlearn.stream.reader import StreamReader

MAX_MATRIX_TASKS = 50
"""The status contains the accuracy matrix up to this number of tasks; copying a larger one so often would be slow."""


def status_of(job: Job, stream: StreamReader | None, state: DaemonState) -> dict[str, Any]:
    """Return what `status --json` prints; undefined values are None."""
    queued = stream.queued_samples if stream is not None else Counter[str]()
    sizes, ledger = job.probes.sizes, job.progress.counts_by_topic
    totals, newest = job.progress.totals(), job.checkpointer.newest
    samples: dict[str, int] = {**{kind: totals[kind] for kind in Outcome}, "queued": queued.total()}
    reader = stream.status if stream is not None else None
    lag = _by_topic(reader.lag(job.progress.positions.by_partition)) if reader is not None else {}
    return {
        "name": job.config.name,
        "version": __version__,
        "state": state,
        "pid": os.getpid(),
        "started": job.started,
        "problem": reader.problem if reader is not None else None,
        "waiting_for": reader.waiting_for if reader is not None else None,
        "strategy": " + ".join(job.config.strategy),
        "scenario": job.scenario.kind,
        "model": job.config.model.name,
        "device": str(job.learner.context.device),
        "seed": job.config.seed,
        "source": job.config.source,
        "step": job.learner.step,
        "batches": job.learner.batches,
        "samples": {"consumed": sum(samples.values()), **samples},
        "unaccounted": job.progress.unaccounted(),
        "topics": {
            topic: {
                "consumed": count["consumed"] + queued[topic],
                **{kind: count[kind] for kind in Outcome},
                "queued": queued[topic],
            }
            for topic, count in {**ledger, **{t: Counter[str]() for t in queued if t not in ledger}}.items()
        },
        "labels": job.scenario.labels_in_output_order(job.progress.labels),
        "tasks": [_describe_task(job.matrix, task, sizes.get(task.index, 0)) for task in job.progress.tasks],
        "evaluated": None
        if job.last_evaluated is None
        else datetime.fromtimestamp(job.last_evaluated, UTC).isoformat(timespec="seconds"),
        "batches_since_evaluation": job.batches_since_evaluation,
        # it grows with the square of the tasks, so a large one is only in `/matrix` and `status --json`
        "matrix": job.matrix.matrix() if len(job.progress.tasks) <= MAX_MATRIX_TASKS else None,
        **job.matrix.metrics(),
        "positions": job.progress.positions.by_topic(),
        "lag": lag if reader is not None and reader.connected else None,  # unknown is not 0
        "held_back": _by_topic(reader.behind_open_transaction) if reader is not None else {},
        "checkpoint": newest.summary() if newest is not None else None,
    }


def _describe_task(matrix: AccuracyMatrix, task: Task, probe_size: int) -> dict[str, Any]:
    counts, index = task.counts, task.index
    return {
        "name": task.name,
        "index": index,
        "state": task.state,
        "labels": list(task.labels),
        "samples": {kind: counts[kind] for kind in ("consumed", *Outcome)},
        "probe": {
            "size": probe_size,
            "accuracy": matrix.latest_accuracy.get(index),
            "best": matrix.best_accuracy(index),
            "forgetting": matrix.forgetting(index),
        },
    }


def describe_model(job: Job) -> dict[str, Any]:
    """Return `model.json`: all that is needed besides `model.safetensors` to use the model elsewhere."""
    progress, config = job.progress, job.config
    return {
        "format": 1,
        "model": config.model.model_dump(),
        "input": {
            **config.input.model_dump(),
            **{key: getattr(config.input, key) for key in ("shape", "dtype", "scale")},
        },
        "vocabulary": progress.vocabulary,
        "codec": progress.codec_version,
        "seed": config.seed,
        "num_outputs": int(job.learner.active_outputs.shape[1]),
        "scenario": job.scenario.kind,
        "labels": job.scenario.labels_in_output_order(progress.labels),
        # one list if all tasks share it: a list for each task would grow with the square of the tasks
        **({"outputs": job.learner.active_outputs_of(0)} if job.scenario.shares_mask and progress.tasks else {}),
        "tasks": {
            task.name: {
                "labels": list(job.scenario.declared_classes(task.name) or task.labels),
                **({} if job.scenario.shares_mask else {"outputs": job.learner.active_outputs_of(task.index)}),
                "probe_accuracy": job.matrix.latest_accuracy.get(task.index),
            }
            for task in progress.tasks
        },
        "strategy": config.strategy,
        "network": job.learner.strategy.network.state_dict(),
        "step": job.learner.step,
    }


def _by_topic(counts: Mapping[Partition, int]) -> dict[str, dict[str, int]]:
    """Return `{topic: {partition: count}}`, the form of the status."""
    tree: dict[str, dict[str, int]] = {}
    for (topic, partition), count in sorted(counts.items()):
        tree.setdefault(topic, {})[str(partition)] = count
    return tree
