"""A running job: the learner, the positions in the stream, and how both are saved, restored and shown in the status."""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import shutil
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from streamlearn import __version__, state
from streamlearn.control.statedir import LockLost
from streamlearn.core.errors import ConfigurationError, StreamlearnError, is_out_of_memory
from streamlearn.core.positions import Positions
from streamlearn.core.progress import Progress
from streamlearn.core.samples import Outcome
from streamlearn.core.scenario import Scenario
from streamlearn.core.states import DaemonState, SaveTrigger
from streamlearn.core.tasks import TaskState
from streamlearn.evaluation import matrix
from streamlearn.evaluation.coverage import probe_warnings, task_warnings
from streamlearn.evaluation.matrix import AccuracyMatrix
from streamlearn.evaluation.probes import Probes
from streamlearn.learning.build import make_learner

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from concurrent.futures import Future

    from torch import Tensor

    from streamlearn.checkpoint.manifest import Checkpoint
    from streamlearn.checkpoint.store import Store
    from streamlearn.checkpoint.writer import Content
    from streamlearn.config.root import Config
    from streamlearn.core.positions import Partition
    from streamlearn.core.samples import HeldOut
    from streamlearn.core.tasks import Task
    from streamlearn.learning.learner import Learner
    from streamlearn.learning.stats import LearnStats
    from streamlearn.metrics import Metrics
    from streamlearn.stream.reader import StreamReader

logger = logging.getLogger(__name__)

PARAMETERS_ADDED_LATER = {"strategy.agem.epsilon"}
"""Parameters added after format 1. A checkpoint without them is still compatible."""

MAX_MATRIX_TASKS = 50
"""The status contains the accuracy matrix up to this number of tasks; copying a larger one so often would be slow."""

HEARTBEAT_SECONDS = 0.5
"""How often the loop reports that it is alive while it waits for a checkpoint."""

MIN_REPLAY_AGREEMENT = 0.75
"""Generative replay works if its mean agreement is at least this.

It was 1.00 on digits, where replay protects past tasks, and 0.3 to 0.5 on photographs, where it does not.
"""

RECOVERY_FACTOR = 10
"""After this many times `divergence.after` batches, a divergence is a new one and not a repetition of the last."""


class Diverged(StreamlearnError):  # noqa: N818 - the name says what happened
    """Training diverged: update after update was not finite, or the accuracy on past tasks dropped too far."""


@dataclass(frozen=True)
class Snapshot:
    """A copy of everything that a checkpoint contains, taken between two batches."""

    files: Mapping[str, Content]
    info: Mapping[str, Any]  # for the manifest
    sizes: Mapping[str, int]  # bytes of the tensors in each file
    immutable: frozenset[str]  # files that never change: if the previous checkpoint has them, they are linked
    positions: Positions
    batches: int
    taken: float  # monotonic time


@dataclass
class PendingSave:
    """A checkpoint that the writer thread is writing, or that waits for the one before it."""

    trigger: SaveTrigger
    snapshot: Snapshot
    tags: list[str] = field(default_factory=list)
    written: Future[tuple[Checkpoint, int | None, float]] | None = None  # None while it waits
    finished: bool = False  # written, or failed
    checkpoint: Checkpoint | None = None  # set when it is finished and durable


@dataclass
class Job:
    """The state that the loop works on: learner, probes, progress and checkpoints."""

    config: Config
    scenario: Scenario
    learner: Learner
    probes: Probes
    store: Store
    metrics: Metrics
    matrix: AccuracyMatrix = field(default_factory=AccuracyMatrix)
    progress: Progress = field(default_factory=Progress)
    checkpoint: Checkpoint | None = None
    restored_checkpoint: Checkpoint | None = None  # the one that this job started from
    saved_positions: Positions = field(default_factory=Positions)  # of the newest durable checkpoint
    newest_timestamps: dict[str, float] = field(default_factory=dict)  # of the newest applied record, by topic
    state: DaemonState = DaemonState.STARTING
    started: float = field(default_factory=time.time)
    batches_without_update: int = 0  # consecutive batches without a finite update
    rollbacks: int = 0  # consecutive rollbacks that led to this job
    mid_delivery: bool = False  # a delivery is half applied: model and positions do not match, so nothing may be saved
    current_save: PendingSave | None = None  # the checkpoint that is being written
    next_save: PendingSave | None = None  # the checkpoint that waits for it
    save_failed: float | None = None  # monotonic time of the last failure, None after a success
    last_evaluated: float | None = None  # Unix time of the last evaluation that had a result
    _logged_warnings: set[tuple[int, str]] = field(default_factory=set)  # task index and kind
    _last_recorded: float | None = None  # Unix time of the last evaluation that is part of the state
    _evaluated_at: float = field(default_factory=time.monotonic)
    _evaluated_batches: int = 0
    _evaluation_seconds: float = 0.0  # duration of the last evaluation
    _saved_at: float = field(default_factory=time.monotonic)
    _saved_batches: int = 0
    _restored_batches: int = 0
    _parent: str | None = None  # id of the newest checkpoint that this job restored or wrote; only the writer uses it
    _writer: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "checkpoint"))

    @classmethod
    def make(cls, config: Config, store: Store, metrics: Metrics) -> Job:
        """Return an untrained job; raises `ConfigurationError` if the configuration cannot be built."""
        scenario = Scenario.from_config(config.scenario, config.classes, grow=config.grow_head)
        try:
            learner = make_learner(config.learning, scenario)
        except ValueError as error:
            raise ConfigurationError(str(error)) from error
        probes = Probes(config.holdout.max, config.memory.max_bytes, config.seed)
        return cls(config, scenario, learner, probes, store, metrics)

    # -- divergence

    def check_divergence(self, stats: LearnStats) -> None:
        """Count consecutive batches without a finite update; raises `Diverged` after `divergence.after` of them."""
        if not stats.steps:
            return  # no sample of the batch was usable, so it says nothing about training
        self.batches_without_update = 0 if stats.applied else self.batches_without_update + 1
        spec = self.config.divergence
        if self.batches_without_update >= spec.after and spec.then != "skip":
            raise Diverged(f"no update of the last {self.batches_without_update} batches was finite")

    def check_accuracy_drop(self, accuracies: Mapping[int, float]) -> None:
        """Compare the mean accuracy on past tasks with the last evaluation.

        Raises `Diverged` if it fell by more than `divergence.drop`.
        """
        spec, known = self.config.divergence, self.matrix.latest_accuracy
        past = [task for task in self.matrix.ended_tasks if task in known and task in accuracies]
        if spec.drop is None or not past:
            return
        before, after = (sum(row[task] for task in past) / len(past) for row in (known, accuracies))
        if before - after <= spec.drop:
            return
        batches = self.learner.batches - self._evaluated_batches
        message = f"accuracy on past tasks fell from {before:.1%} to {after:.1%} within {batches} batches"
        if spec.then == "skip":
            logger.warning("%s", message)
            return
        self.mid_delivery = True  # the weights since the last evaluation must not be saved
        raise Diverged(message)

    def roll_back(self, error: Diverged) -> Job:
        """Return a new job, restored from the newest checkpoint, with a lower learning rate.

        If training diverges again soon, that checkpoint may hold bad weights: the job goes back to the one before it. Raises
        `Diverged` if `divergence` asks for a stop, or after `divergence.attempts` rollbacks.
        """
        spec = self.config.divergence
        recovered = self.learner.batches - self._restored_batches >= RECOVERY_FACTOR * spec.after
        rollbacks = 1 if recovered else self.rollbacks + 1
        if spec.then == "stop" or rollbacks > spec.attempts:
            attempts = "" if spec.then == "stop" else f" after {rollbacks - 1} rollbacks"
            raise Diverged(f"{error}{attempts}: lower learner.optimizer.lr, or check the data in the stream") from error
        if rollbacks > 1 and self.restored_checkpoint is not None:
            # if there is no older one, take the same again: the checkpoints after it may hold bad weights
            self.store.restore(
                (self.store.newest_valid_before(self.restored_checkpoint) or self.restored_checkpoint).id
            )
        job = Job.make(self.config, self.store, self.metrics)
        job.rollbacks, job.started = rollbacks, self.started
        job.restore()
        job.learner.reduce_lr(spec.slow_down**rollbacks)
        where = job.checkpoint.origin if job.checkpoint is not None else "the beginning"
        logger.error("%s: rolled back to %s, with a learning rate of %.3g", error, where, job.learner.update.lr)
        self.metrics.count("rollbacks", 1)
        return job

    # -- evaluation

    def evaluation_due(self, *, idle: bool = False) -> bool:
        """Return whether the last evaluation is older than `probes.every_seconds`, and something was learned since.

        Evaluation by time takes at most a tenth of the loop's time. An `idle` loop does not wait: a short batch
        (`stream.linger`) may be the last one for a long time.
        """
        spec = self.config.probes.every_seconds
        if spec is None or self.learner.batches == self._evaluated_batches:
            return False
        return time.monotonic() - self._evaluated_at >= max(0.0 if idle else spec, 10 * self._evaluation_seconds)

    def evaluate(self, after: int | None = None, *, live: bool = False) -> None:
        """Evaluate every probe; `after` is the index of the task that has just ended. Only the matrix changes.

        `live` evaluations do not change the matrix in checkpoints either. Those that the clock starts must be `live`: two runs
        over the same records would otherwise save different matrices. Raises `Diverged` as `check_accuracy_drop` does.
        """
        start = time.perf_counter()
        results = self.probes.evaluate(self.learner, self.config.probes.minimum)
        for task in [task for task, (_, loss) in results.items() if math.isnan(loss)]:
            del results[task]  # the accuracy of a model with non-finite outputs means nothing
            self.metrics.count("probe_failures", 1, self.progress.tasks[task].name)
        self.check_accuracy_drop({task: accuracy for task, (accuracy, _) in results.items()})
        if after is not None and self.learner.measures_transfer and (probe := self.probes.samples(after)) is not None:
            before, _ = self.learner.evaluate(*probe, after, self.learner.task_start_params)
            untrained, _ = self.learner.evaluate(*probe, after, self.learner.initial_params)
            self.matrix.transfer_inputs[after] = (before, untrained)
        sizes = self.probes.sizes
        if results:
            self.last_evaluated = time.time()
        self._evaluated_at = time.monotonic()
        self._evaluated_batches = self.learner.batches
        if live:
            self.matrix.record_live(results)
        else:
            self.matrix.record(results, self.learner.batches, self.progress.totals()[Outcome.TRAINED], after, sizes)
            self._last_recorded = self.last_evaluated if results else self._last_recorded
        self._evaluation_seconds = time.perf_counter() - start
        self.metrics.histograms["probe_duration_seconds"].observe(self._evaluation_seconds)
        self.metrics.record_evaluation(self.matrix, self.progress, sizes, self.last_evaluated)

    @property
    def batches_since_evaluation(self) -> int | None:
        """The number of batches learned since the last evaluation; None if there was no evaluation yet."""
        return self.learner.batches - self._evaluated_batches if self.matrix.latest_accuracy else None

    def add_held_out(self, task: Task | None, held_out: Sequence[HeldOut]) -> None:
        """Add a delivery's held-out samples to the probes."""
        self.probes.resolve_names(self.progress)
        self.probes.add(held_out)
        if task is not None:
            self.check_coverage(task)

    def seal_probe(self, task: Task) -> None:
        """Freeze the probe of a task that has ended."""
        self.probes.seal(task.index)
        self.check_coverage(task)

    def check_coverage(self, task: Task) -> None:
        """Log once per task what its probe cannot measure: nothing trained, nothing held out, classes without a sample."""
        found = list(task_warnings(task, self.config.holdout))
        if (
            task.state == TaskState.ENDED
            and task.counts[Outcome.TRAINED]
            and (probe := self.probes.samples(task.index)) is not None
        ):
            outputs = [(self.scenario.output(label, task.name, self.progress.labels), label) for label in task.labels]
            trained = {output: label for output, label in outputs if output is not None}
            declared = self.scenario.kind == "domain"  # declared labels may never occur
            found += probe_warnings(*probe, None if declared else trained, self.config.holdout)
        for kind, text in found:
            if (task.index, kind) not in self._logged_warnings:
                self._logged_warnings.add((task.index, kind))
                logger.warning("task %s: %s", task.name, text, extra={"task": task.name})

    def record_strategy(self) -> None:
        """Record the metrics that change only when a task begins or ends: network size, free weights, importances, replay."""
        gauges, strategy = self.metrics.gauges, self.learner.strategy
        network = strategy.network.metrics()
        gauges.set("network_parameters", network["parameters"])
        gauges.set("network_free_weights_ratio", network.get("free_ratio"))
        gauges.set("importance_norm", strategy.penalty.metrics().get("norm"))
        self.metrics.record_agreement(self._replay_agreement())

    def check_replay(self) -> None:
        """Log a warning if generated samples are poor: replay then protects nothing, and no other metric shows it."""
        agreement = self._replay_agreement()
        mean = sum(agreement.values()) / max(1, len(agreement))
        if not agreement or mean >= MIN_REPLAY_AGREEMENT:
            return
        worst = sorted(agreement.items(), key=lambda item: item[1])[:3]
        logger.warning(
            "generative replay works poorly: only %.0f %% of the generated samples are recognized as their class (%s), so "
            "past tasks will be forgotten. Use strategy er or derpp, which store samples, or an input.encoder whose "
            "features are easier to generate",
            100 * mean,
            ", ".join(f"{label} of {task}: {ratio:.0%}" for (task, label), ratio in worst),
        )

    def _replay_agreement(self) -> dict[tuple[str, str], float]:
        """Return by task name and label the share of generated samples that the teacher recognizes as this class."""
        return {
            (self.progress.tasks[task].name, str(self.learner.output_labels[task][output])): ratio
            for (task, output), ratio in self.learner.strategy.replay.agreement().items()
        }

    # -- checkpoints

    def checkpoint_due(self) -> bool:
        """Return whether a checkpoint is due, by batches or by time. Saving changes no state, so the clock may decide."""
        spec = self.config.checkpoint
        positions = self.progress.positions
        if self.current_save is not None or positions == self.saved_positions or not positions.by_partition:
            return False
        if self.batches_without_update:  # a rollback to this checkpoint would not help
            return False
        waited = time.monotonic() - self._saved_at
        if self.save_failed is not None and time.monotonic() - self.save_failed < (spec.every_seconds or 30.0):
            return False
        by_batches = spec.every_batches is not None and self.learner.batches - self._saved_batches >= spec.every_batches
        return by_batches or (spec.every_seconds is not None and waited >= spec.every_seconds)

    def save(self, stream: StreamReader, trigger: SaveTrigger, tag: str | None = None) -> PendingSave:
        """Take a snapshot and let the writer thread write it; `finish_save` handles the result.

        Learning pauses only for the copy, never for the disk. One checkpoint is written at a time, and at most one waits. A
        newer snapshot replaces the waiting one, because it contains everything that the older one does; whoever asked for the
        older one gets the newer one. A checkpoint with a tag is kept until somebody removes it.

        If `divergence.drop` is set, batches that were not evaluated yet are evaluated first: a rollback must not restore
        weights that have lost past tasks. Raises `Diverged` in this case, and saves nothing.
        """
        if self.config.divergence.drop is not None and self.learner.batches != self._evaluated_batches:
            self.evaluate(live=True)
        start = time.perf_counter()
        snapshot = self._snapshot()
        duration = self.metrics.histograms["checkpoint_duration_seconds"]
        duration.labels("snapshot").observe(time.perf_counter() - start)
        if self.current_save is None:
            self.current_save = PendingSave(trigger, snapshot)
        elif self.next_save is None:
            self.next_save = PendingSave(trigger, snapshot)
        else:
            self.next_save.trigger, self.next_save.snapshot = trigger, snapshot
        save = self.next_save or self.current_save
        if tag is not None:
            save.tags.append(tag)
        self._write_next(stream)
        return save

    def finish_save(self, stream: StreamReader, *, seconds: float = 0.0) -> None:
        """Record the result of the save that is being written, if it ends within `seconds`, and start the next one.

        A checkpoint that could not be written is logged and counted, and training continues. Any other error is raised, and
        so is `LockLost`.
        """
        save = self.current_save
        if save is None or save.written is None or not wait([save.written], seconds).done:
            return
        self.current_save, self.next_save = self.next_save, None
        save.finished = True
        try:
            checkpoint, num_kept, write_seconds = save.written.result()
        except LockLost:
            raise
        except StreamlearnError as error:
            logger.error("checkpoint failed: %s", error, extra={"trigger": save.trigger})  # noqa: TRY400 - one line is enough
            self.metrics.count("checkpoints", 1, "failure", save.trigger)
            self.metrics.count("errors", 1, "checkpoint", type(error).__name__)
            self.save_failed = time.monotonic()
        else:
            self.metrics.histograms["checkpoint_duration_seconds"].labels("write").observe(write_seconds)
            self.metrics.count("checkpoints", 1, "success", save.trigger)
            self._set_newest_checkpoint(checkpoint, save.snapshot)
            self.metrics.gauges.set("checkpoints_kept", num_kept)
            save.checkpoint = checkpoint
            stream.commit_positions(save.snapshot.positions)
            extra = {"checkpoint": checkpoint.id, "trigger": save.trigger, "step": checkpoint.manifest["step"]}
            logger.info("saved %s", checkpoint.id, extra=extra)
        self._write_next(stream)

    def wait_for_saves(self, stream: StreamReader, heartbeat: Callable[[], None] = lambda: None) -> None:
        """Wait until no save is pending; calls `heartbeat` meanwhile, so that the liveness check passes."""
        while self.current_save is not None:
            heartbeat()
            self._write_next(stream)  # the loop may have ended before it started this one
            self.finish_save(stream, seconds=HEARTBEAT_SECONDS)

    @property
    def snapshot_positions(self) -> Positions:
        """The positions of the newest snapshot: waiting, being written, or durable."""
        newest = self.next_save or self.current_save
        return self.saved_positions if newest is None else newest.snapshot.positions

    def _write_next(self, stream: StreamReader) -> None:
        """Start to write the current save, unless that has started."""
        if (save := self.current_save) is not None and save.written is None:
            save.written = self._writer.submit(self._write, stream, save.snapshot, save.tags)

    def _write(
        self, stream: StreamReader, snapshot: Snapshot, tags: Sequence[str]
    ) -> tuple[Checkpoint, int | None, float]:
        """Write a snapshot, in the writer thread; return the checkpoint, the number of checkpoints, and the duration."""
        start = time.perf_counter()
        stream.flush_dead_letters()  # the dead letters before these positions must be durable first
        # the store links files of its newest checkpoint; that is not ours if another process wrote one
        newest = self.store.newest()
        ours = newest is not None and newest.id == self._parent
        linkable = snapshot.immutable & set(newest.manifest["files"] if newest is not None and ours else ())
        files = {name: None if name in linkable else content for name, content in snapshot.files.items()}
        num_bytes = sum(size for name, size in snapshot.sizes.items() if name not in linkable)
        checkpoint = self.store.save(files, snapshot.info, num_bytes, tags)
        self._parent = checkpoint.id
        return checkpoint, self.store.count(), time.perf_counter() - start

    def restore(self) -> bool:
        """Load the newest valid checkpoint; return False if there is none.

        Raises `ConfigurationError` if the checkpoint is not compatible with the configuration, with each difference.
        """
        before = self.store.num_corrupt
        checkpoint = self.store.newest_valid()
        self.metrics.count("checkpoint_corrupt", self.store.num_corrupt - before)
        self.metrics.clear_training_gauges()
        if checkpoint is None:
            self._show_restored()
            return False
        try:
            self._load_checkpoint(checkpoint)
        except StreamlearnError:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            # the hashes match and the content is wrong: no version of this program wrote it
            raise ConfigurationError(f"{checkpoint.path}: cannot be loaded: {error!r:.200}") from error
        self._set_newest_checkpoint(checkpoint)
        self._parent = checkpoint.id
        self.metrics.gauges.set("checkpoints_kept", self.store.count())
        self.restored_checkpoint, self._restored_batches = checkpoint, self.learner.batches
        # checkpoints of earlier versions do not have this time
        self.last_evaluated = self._last_recorded = checkpoint.manifest.get("evaluated")
        self._evaluated_batches = self.matrix.batches
        self._show_restored()
        here = environment(self.config)
        if (there := checkpoint.manifest["environment"]) != here:
            changed = ", ".join(f"{key} {there.get(key)} -> {here[key]}" for key in here if there.get(key) != here[key])
            logger.warning("the environment has changed, so results are no longer bit-equal: %s", changed)
        logger.info("restored %s", checkpoint.id, extra={"checkpoint": checkpoint.id, "step": self.learner.step})
        return True

    def _show_restored(self) -> None:
        """Record the metrics of the restored state, and set the baselines of counters to the learner's totals."""
        sizes, counts = self.learner.strategy.memory_usage(), self.learner.strategy.constraint.counters()
        for key in ("drawn", "evicted"):
            self.metrics.set_baseline(key, int(sizes.get(key, 0)))
        for key, total in counts.items():
            self.metrics.set_baseline(key, total)
        self.record_strategy()
        self.metrics.record_evaluation(self.matrix, self.progress, self.probes.sizes, self.last_evaluated)

    def _load_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Set the state to that of a checkpoint; raises `ConfigurationError` if it is not compatible."""
        self._check_compatible(checkpoint)
        files = {
            name: state.from_bytes(str(checkpoint.path / name), checkpoint.read(name))
            for name in checkpoint.manifest["files"]
            if name.endswith(state.SUFFIX) and name != matrix.FILE
        }
        rest = checkpoint.read_json("state.json")
        self.progress = Progress.from_json(rest["progress"], Positions.from_json(checkpoint.read_json("offsets.json")))
        groups = state.unpack(files, rest["groups"])
        self.probes.load_state_dict(groups.pop("probes"))
        self.probes.resolve_names(self.progress)
        self.matrix = AccuracyMatrix.from_checkpoint(checkpoint)
        self.learner.load_state_dict(groups, self.progress.tasks, self.progress.labels)

    def _snapshot(self) -> Snapshot:
        """Return a copy of the state. Immutable tensors are not copied here: the writer does that, if it must write them."""
        groups = {**self.learner.state_dict(), "probes": self.probes.state_dict()}
        tensors, rest, immutable = state.pack(groups)
        files: dict[str, Content] = {}
        for name, content in tensors.items():
            kept = content if name in immutable else state.host_copies(content)
            files[name] = partial(_to_bytes, kept) if name in immutable else partial(state.to_bytes, kept)
        sizes = {name: sum(tensor.nbytes for tensor in content.values()) for name, content in tensors.items()}
        not_tensors = {"model": rest["model"], "encoder": groups["encoder"].get("rest", {})}
        files["model.json"] = _json({**self.describe_model(), "state": not_tensors})
        files["state.json"] = _json(
            {"groups": rest, "progress": self.progress.to_json(), "matrix": self.matrix.state_dict()}
        )
        files[matrix.FILE] = self.matrix.table()
        files["offsets.json"] = _json(self.progress.positions.to_json())
        files["status.json"] = _json({**self.status(None), "state": DaemonState.STOPPED, "pid": None})
        info = {
            "step": self.learner.step,
            "batches": self.learner.batches,
            "tasks_ended": sum(task.state == TaskState.ENDED for task in self.progress.tasks),
            "ending": any(
                task.state != TaskState.ENDED and task.end_offsets is not None for task in self.progress.tasks
            ),
            "average_accuracy": self.matrix.average_accuracy,
            "evaluated": self._last_recorded,
            "config_sha256": self.config.digest(),
            "shaping": self.config.shaping(),
            "environment": environment(self.config),
        }
        return Snapshot(
            files,
            info,
            sizes,
            frozenset(immutable),
            self.progress.positions,
            self.learner.batches,
            time.monotonic(),
        )

    def _check_compatible(self, checkpoint: Checkpoint) -> None:
        """Raise `ConfigurationError` if the configuration differs where the state depends on it."""
        ours, theirs = self.config.shaping(), checkpoint.manifest["shaping"]
        if "stream.source" not in theirs:  # written by an earlier version: only its status has the source
            theirs = {
                **theirs,
                "stream.source": checkpoint.read_json("status.json").get("source", ours["stream.source"]),
            }
        for key in sorted(PARAMETERS_ADDED_LATER & set(ours) - set(theirs)):
            recipe, _, parameter = key.rpartition(".")
            if any(known.startswith(f"{recipe}.") for known in theirs):
                logger.warning(
                    "%s was written by a version without the parameter %s of %s: it is %s from now on",
                    checkpoint.id,
                    parameter,
                    recipe,
                    ours[key],
                )
                theirs = {**theirs, key: ours[key]}
        lines = _differences(theirs, ours)
        started = [task["name"] for task in checkpoint.read_json("state.json")["progress"]["tasks"]]
        listed = self.config.stream.topics
        if listed is not None and listed[: len(started)] != started:
            lines.append(
                f"stream.topics: the tasks {started} have started in this order and must stay first; "
                f"the configuration has {listed}"
            )
        if lines:
            raise ConfigurationError(
                f"{checkpoint.path}: not compatible with the configuration: {'; '.join(lines)}; "
                "restore the values of the checkpoint, or start a new job with another state_dir",
            )

    def _set_newest_checkpoint(self, checkpoint: Checkpoint, snapshot: Snapshot | None = None) -> None:
        """Remember the newest checkpoint: one that was just written, with its snapshot, or the one that was just restored."""
        self.checkpoint = checkpoint
        self.saved_positions = self.progress.positions if snapshot is None else snapshot.positions
        self.save_failed = None
        self._saved_at = time.monotonic() if snapshot is None else snapshot.taken
        self._saved_batches = self.learner.batches if snapshot is None else snapshot.batches
        gauges = self.metrics.gauges
        gauges.set("checkpoint_last_success_timestamp_seconds", checkpoint.created)
        gauges.set("checkpoint_last_size_bytes", checkpoint.num_bytes)

    # -- status and metrics

    def describe_model(self) -> dict[str, Any]:
        """Return `model.json`: all that is needed besides `model.safetensors` to use the model elsewhere."""
        progress, config = self.progress, self.config
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
            "num_outputs": int(self.learner.active_outputs.shape[1]),
            "scenario": self.scenario.kind,
            "labels": self.scenario.labels_in_output_order(progress.labels),
            # one list if all tasks share it: a list for each task would grow with the square of the tasks
            **({"outputs": self.learner.active_outputs_of(0)} if self.scenario.shares_mask and progress.tasks else {}),
            "tasks": {
                task.name: {
                    "labels": list(self.scenario.declared_classes(task.name) or task.labels),
                    **({} if self.scenario.shares_mask else {"outputs": self.learner.active_outputs_of(task.index)}),
                    "probe_accuracy": self.matrix.latest_accuracy.get(task.index),
                }
                for task in progress.tasks
            },
            "strategy": config.strategy,
            "network": self.learner.strategy.network.state_dict(),
            "step": self.learner.step,
        }

    def status(self, stream: StreamReader | None) -> dict[str, Any]:
        """Return what `status --json` prints; undefined values are None."""
        queued = stream.queued_samples if stream is not None else Counter[str]()
        sizes, ledger = self.probes.sizes, self.progress.counts_by_topic
        totals = self.progress.totals()
        samples: dict[str, int] = {**{kind: totals[kind] for kind in Outcome}, "queued": queued.total()}
        reader = stream.status if stream is not None else None
        lag = _by_topic(reader.lag(self.progress.positions.by_partition)) if reader is not None else {}
        return {
            "name": self.config.name,
            "version": __version__,
            "state": self.state,
            "pid": os.getpid(),
            "started": self.started,
            "problem": reader.problem if reader is not None else None,
            "waiting_for": reader.waiting_for if reader is not None else None,
            "strategy": " + ".join(self.config.strategy),
            "scenario": self.scenario.kind,
            "model": self.config.model.name,
            "device": str(self.learner.context.device),
            "seed": self.config.seed,
            "source": self.config.source,
            "step": self.learner.step,
            "batches": self.learner.batches,
            "samples": {"consumed": sum(samples.values()), **samples},
            "unaccounted": self.progress.unaccounted(),
            "topics": {
                topic: {
                    "consumed": count["consumed"] + queued[topic],
                    **{kind: count[kind] for kind in Outcome},
                    "queued": queued[topic],
                }
                for topic, count in {**ledger, **{t: Counter[str]() for t in queued if t not in ledger}}.items()
            },
            "labels": self.scenario.labels_in_output_order(self.progress.labels),
            "tasks": [self._describe_task(task, sizes.get(task.index, 0)) for task in self.progress.tasks],
            "evaluated": None
            if self.last_evaluated is None
            else datetime.fromtimestamp(self.last_evaluated, UTC).isoformat(timespec="seconds"),
            "batches_since_evaluation": self.batches_since_evaluation,
            # it grows with the square of the tasks, so a large one is only in `/matrix` and `status --json`
            "matrix": self.matrix.matrix() if len(self.progress.tasks) <= MAX_MATRIX_TASKS else None,
            **self.matrix.metrics(),
            "positions": self.progress.positions.by_topic(),
            "lag": lag if reader is not None and reader.connected else None,  # unknown is not 0
            "held_back": _by_topic(reader.behind_open_transaction) if reader is not None else {},
            "checkpoint": self.checkpoint.summary() if self.checkpoint is not None else None,
        }

    def _describe_task(self, task: Task, probe_size: int) -> dict[str, Any]:
        counts, index = task.counts, task.index
        return {
            "name": task.name,
            "index": index,
            "state": task.state,
            "labels": list(task.labels),
            "samples": {kind: counts[kind] for kind in ("consumed", *Outcome)},
            "probe": {
                "size": probe_size,
                "accuracy": self.matrix.latest_accuracy.get(index),
                "best": self.matrix.best_accuracy(index),
                "forgetting": self.matrix.forgetting(index),
            },
        }

    def record_gauges(self, stream: StreamReader) -> None:
        """Update every gauge that follows the stream, the memories and the device."""
        metrics, now = self.metrics, time.time()
        committed = {p: position.offset for p, position in self.saved_positions.by_partition.items()}
        metrics.record_stream(stream.status, self.progress, committed, stream.queued_samples.total())
        metrics.gauges.set("train_batch_queue_capacity_samples", self.config.stream.queue.samples)
        names = {task.index: task.name for task in self.progress.tasks}
        metrics.record_memory(self.learner.strategy.memory_usage(), names)
        metrics.record_constraint(self.learner.strategy.constraint.counters())
        metrics.add_increase("dlq_records", "dead letters", stream.dead_letters.sent, "success")
        metrics.add_increase("dlq_records", "dead letter failures", stream.dead_letters.failures, "failure")
        behind = Counter[str]()
        for (topic, _), count in stream.status.lag(self.progress.positions.by_partition).items():
            behind[topic] += count
        newest = self.newest_timestamps
        # at least 0, because a producer's clock may be ahead of ours
        ages = {(t,): (max(0.0, now - newest[t]) if n else 0.0) for t, n in behind.items() if t in newest}
        metrics.gauges.replace("consumer_lag_seconds", ages)
        try:
            free = shutil.disk_usage(self.config.state_dir).free
        except OSError:  # the directory is gone: the next checkpoint reports it
            free = None
        metrics.gauges.set("state_dir_free_bytes", free)
        metrics.gauges.set("probe_interval_batches", self.config.probes.every)
        metrics.gauges.set("probe_age_batches", self.batches_since_evaluation)
        metrics.gauges.set("train_learning_rate", self.learner.update.lr if self.learner.step else None)
        metrics.gauges.set("heartbeat_timestamp_seconds", now, "consume")
        device = self.learner.context.device
        if device.type == "cuda":
            metrics.gauges.set("device_memory_allocated_bytes", torch.cuda.memory_allocated(device), str(device))
            metrics.gauges.set("device_memory_reserved_bytes", torch.cuda.memory_reserved(device), str(device))
            metrics.gauges.set("device_memory_total_bytes", torch.cuda.mem_get_info(device)[1], str(device))


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return a line for each value that differs between two configurations, with a hint if it concerns the outputs."""
    first, second = (
        list(dict.fromkeys(key.split(".")[1] for key in shaping if key.startswith("strategy.")))
        for shaping in (before, now)
    )
    lines = [] if set(first) == set(second) else [f"strategy: {' + '.join(first)}, now {' + '.join(second)}"]
    in_one = {*first} ^ {*second}  # the line above names these methods; their parameters need no lines
    differing = [
        key
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key) and not (key.startswith("strategy.") and key.split(".")[1] in in_one)
    ]
    lines += [f"{key}: the checkpoint has {before.get(key)!r}, the configuration {now.get(key)!r}" for key in differing]
    if {"classes", "grow_head"} & {*differing}:
        lines.append(
            "a job that has started cannot get more classes or switch grow_head on: start a new job with another state_dir, "
            "which reads the topics again; with grow_head: true and classes as a number it accepts new labels by itself"
        )
    return lines


def environment(config: Config) -> dict[str, Any]:
    """Return what bit-equal results depend on, besides the configuration and the stream."""
    return {
        "torch": torch.__version__,
        "machine": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "flush_denormal": True,
        "device": config.device if config.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu"),
    }


def _by_topic(counts: Mapping[Partition, int]) -> dict[str, dict[str, int]]:
    """Return `{topic: {partition: count}}`, the form of the status."""
    tree: dict[str, dict[str, int]] = {}
    for (topic, partition), count in sorted(counts.items()):
        tree.setdefault(topic, {})[str(partition)] = count
    return tree


def _to_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    return state.to_bytes(state.host_copies(tensors))


def _json(tree: Mapping[str, Any]) -> bytes:
    return json.dumps(tree, allow_nan=False).encode()
