"""Records in the metrics what the loop, the evaluations and the checkpoints have done."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from streamlearn.checkpoint.manifest import Checkpoint
    from streamlearn.core.errors import StreamlearnError
    from streamlearn.core.states import SaveTrigger
    from streamlearn.metrics import Metrics
    from streamlearn.runtime.job import Job
    from streamlearn.runtime.turn_report import TurnReport
    from streamlearn.stream.reader import StreamReader


class MetricsRecorder:
    """The only part of the runtime that knows the names of metrics. An observer of the loop."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics

    # -- the loop

    def turn_done(self, job: Job, report: TurnReport) -> None:
        """Record what a turn has applied and learned, and which task has begun or ended."""
        task = report.task.name if report.task is not None else ""
        if report.stats is not None:
            self.metrics.histograms["train_batch_duration_seconds"].observe(report.seconds)
        if report.delivery is not None:
            self.metrics.record_delivery(report.delivery, report.stats, task, report.applied)
        elif report.stats is not None:
            self.metrics.record_learned(report.stats, task)
        if report.begun is not None or report.ended is not None:
            self.record_strategy(job)
        if report.ended is not None and job.learner.strategy.penalty.metrics():
            self.metrics.gauges.set("importance_last_update_timestamp_seconds", time.time())

    def record_strategy(self, job: Job) -> None:
        """Record what changes only when a task begins or ends: network size, free weights, importances, replay."""
        gauges, strategy = self.metrics.gauges, job.learner.strategy
        network = strategy.network.metrics()
        gauges.set("network_parameters", network["parameters"])
        gauges.set("network_free_weights_ratio", network.get("free_ratio"))
        gauges.set("importance_norm", strategy.penalty.metrics().get("norm"))
        self.metrics.record_agreement(job.replay_agreement())

    def record_gauges(self, job: Job, stream: StreamReader) -> None:
        """Update every gauge that follows the stream, the memories and the device."""
        metrics, now = self.metrics, time.time()
        committed = {p: position.offset for p, position in job.checkpointer.saved_positions.by_partition.items()}
        metrics.record_stream(stream.status, job.progress, committed, stream.queued_samples.total())
        metrics.gauges.set("train_batch_queue_capacity_samples", job.config.stream.queue.samples)
        names = {task.index: task.name for task in job.progress.tasks}
        metrics.record_memory(job.learner.strategy.memory_usage(), names)
        metrics.record_constraint(job.learner.strategy.constraint.counters())
        metrics.add_increase("dlq_records", "dead letters", stream.dead_letters.sent, "success")
        metrics.add_increase("dlq_records", "dead letter failures", stream.dead_letters.failures, "failure")
        behind = Counter[str]()
        for (topic, _), count in stream.status.lag(job.progress.positions.by_partition).items():
            behind[topic] += count
        newest = job.newest_timestamps
        # at least 0, because a producer's clock may be ahead of ours
        ages = {(t,): (max(0.0, now - newest[t]) if n else 0.0) for t, n in behind.items() if t in newest}
        metrics.gauges.replace("consumer_lag_seconds", ages)
        metrics.gauges.set("state_dir_free_bytes", _free_bytes(job.config.state_dir))
        metrics.gauges.set("probe_interval_batches", job.config.probes.every)
        metrics.gauges.set("probe_age_batches", job.batches_since_evaluation)
        metrics.gauges.set("train_learning_rate", job.learner.update.lr if job.learner.step else None)
        metrics.gauges.set("heartbeat_timestamp_seconds", now, "consume")
        device = job.learner.context.device
        if device.type == "cuda":
            metrics.gauges.set("device_memory_allocated_bytes", torch.cuda.memory_allocated(device), str(device))
            metrics.gauges.set("device_memory_reserved_bytes", torch.cuda.memory_reserved(device), str(device))
            metrics.gauges.set("device_memory_total_bytes", torch.cuda.mem_get_info(device)[1], str(device))

    def stream_made(self, topics: Iterable[str]) -> None:
        """Create the counters of topics. A new reader's dead-letter writer counts from 0."""
        self.metrics.declare_topics(topics)
        for key in ("dead letters", "dead letter failures"):
            self.metrics.set_baseline(key, 0)

    def out_of_memory(self) -> None:
        """Count an error because of missing memory."""
        self.metrics.count("out_of_memory", 1)

    # -- evaluations

    def evaluation_done(self, job: Job, seconds: float) -> None:
        """Record the results of an evaluation, and its duration."""
        self.metrics.histograms["probe_duration_seconds"].observe(seconds)
        self.record_evaluation(job)

    def record_evaluation(self, job: Job) -> None:
        """Record the results of the newest evaluation."""
        self.metrics.record_evaluation(job.matrix, job.progress, job.probes.sizes, job.last_evaluated)

    def probe_failed(self, task: str) -> None:
        """Count an evaluation whose result is not finite."""
        self.metrics.count("probe_failures", 1, task)

    # -- checkpoints

    def snapshot_taken(self, seconds: float) -> None:
        """Record how long learning paused for a snapshot."""
        self.metrics.histograms["checkpoint_duration_seconds"].labels("snapshot").observe(seconds)

    def checkpoint_written(self, trigger: SaveTrigger, seconds: float) -> None:
        """Count a checkpoint, and record how long it took to write it."""
        self.metrics.histograms["checkpoint_duration_seconds"].labels("write").observe(seconds)
        self.metrics.count("checkpoints", 1, "success", trigger)

    def checkpoint_failed(self, trigger: SaveTrigger, error: StreamlearnError) -> None:
        """Count a checkpoint that could not be written."""
        self.metrics.count("checkpoints", 1, "failure", trigger)
        self.metrics.count("errors", 1, "checkpoint", type(error).__name__)

    def newest_checkpoint(self, checkpoint: Checkpoint, num_kept: int | None) -> None:
        """Record time and size of the newest checkpoint, and how many there are."""
        gauges = self.metrics.gauges
        gauges.set("checkpoint_last_success_timestamp_seconds", checkpoint.created)
        gauges.set("checkpoint_last_size_bytes", checkpoint.num_bytes)
        gauges.set("checkpoints_kept", num_kept)

    def restore_begins(self, num_corrupt: int) -> None:
        """Count broken checkpoints, and remove the gauges of learning that the restored state does not contain."""
        self.metrics.count("checkpoint_corrupt", num_corrupt)
        self.metrics.clear_training_gauges()

    def restored(self, job: Job) -> None:
        """Record the restored state, and set the baselines of counters to the learner's totals."""
        sizes, counts = job.learner.strategy.memory_usage(), job.learner.strategy.constraint.counters()
        for key in ("drawn", "evicted"):
            self.metrics.set_baseline(key, int(sizes.get(key, 0)))
        for key, total in counts.items():
            self.metrics.set_baseline(key, total)
        self.record_strategy(job)
        self.record_evaluation(job)

    def rolled_back(self) -> None:
        """Count a rollback."""
        self.metrics.count("rollbacks", 1)


def _free_bytes(path: Path) -> int | None:
    """Return the free space of a directory's disk, or None if the directory is gone: the next checkpoint reports it."""
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return None
