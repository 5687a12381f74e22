"""A running job: everything learned and where the stream stands; how it is saved, restored and described."""

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
from streamlearn.checkpoint import LockLost
from streamlearn.data import OUTCOMES, Positions, Progress, StreamlearnError, is_out_of_memory
from streamlearn.evaluation import matrix
from streamlearn.evaluation.coverage import probe_warnings, task_warnings
from streamlearn.evaluation.matrix import AccuracyMatrix
from streamlearn.evaluation.probes import Probes
from streamlearn.learner import Learner, make_learner
from streamlearn.scenario import Scenario

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from concurrent.futures import Future

    from torch import Tensor

    from streamlearn.checkpoint import Checkpoint, Content, Store
    from streamlearn.config import Config
    from streamlearn.data import HeldOut, Partition, Task
    from streamlearn.learner import LearnStats
    from streamlearn.metrics import Metrics
    from streamlearn.stream.reader import Stream

logger = logging.getLogger(__name__)

PARAMETERS_ADDED_LATER = {"strategy.agem.epsilon"}
"""Parameters added after format 1. A checkpoint without them is still compatible."""

MAX_MATRIX_TASKS = 50  # whose matrix is in the status; each evaluation and each checkpoint would copy a larger one
HEARTBEAT_SECONDS = 0.5  # between two signs of life while a checkpoint is waited for
MIN_REPLAY_AGREEMENT = (
    0.75  # mean agreement: 1.00 on digits, where replay protects; 0.3 to 0.5 on photographs, where it does not
)
RECOVERY_FACTOR = 10  # times as many batches as make a divergence: after so many it is not the same one any more


class Diverged(StreamlearnError):  # noqa: N818 - it says what training has done
    """Update after update is not finite, or what past tasks taught is lost at once."""


@dataclass(frozen=True)
class Snapshot:
    """Everything that a checkpoint holds, as it was between two batches."""

    files: Mapping[str, Content]
    info: Mapping[str, Any]
    sizes: Mapping[str, int]  # bytes of the tensors in each file
    immutable: frozenset[str]  # files that need not be written where the checkpoint before has them
    positions: Positions
    batches: int
    taken: float  # monotonic


@dataclass
class PendingSave:
    """A checkpoint that is being written beside the loop, or waits for that."""

    trigger: str
    snapshot: Snapshot
    tags: list[str] = field(default_factory=list)
    written: Future[tuple[Checkpoint, int | None, float]] | None = None  # None while it waits
    finished: bool = False
    checkpoint: Checkpoint | None = None  # once it is collected, if it is durable


@dataclass
class Job:
    """What the loop works on."""

    config: Config
    scenario: Scenario
    learner: Learner
    probes: Probes
    store: Store
    metrics: Metrics
    matrix: AccuracyMatrix = field(default_factory=AccuracyMatrix)
    progress: Progress = field(default_factory=Progress)
    checkpoint: Checkpoint | None = None
    restored_checkpoint: Checkpoint | None = None  # the one that it began from
    saved_positions: Positions = field(default_factory=Positions)  # those of the newest checkpoint
    newest_timestamps: dict[str, float] = field(
        default_factory=dict
    )  # timestamp of the newest applied record, by topic
    state: str = "starting"
    started: float = field(default_factory=time.time)
    batches_without_update: int = 0  # batches in a row without a finite update
    rollbacks: int = 0  # in a row, before this job began
    mid_delivery: bool = False  # in the middle of a delivery: model and positions do not belong together
    current_save: PendingSave | None = None  # the checkpoint that is being written
    next_save: PendingSave | None = None  # the one after it
    save_failed: float | None = None  # when a save last failed, monotonic
    last_evaluated: float | None = None  # when an evaluation last gave a figure, Unix seconds
    _logged_warnings: set[tuple[int, str]] = field(default_factory=set)  # that were logged, by task
    _last_recorded: float | None = None  # when the newest evaluation was that is part of the state, Unix seconds
    _evaluated_at: float = field(default_factory=time.monotonic)
    _evaluated_batches: int = 0
    _evaluation_seconds: float = 0.0  # that the last evaluation took
    _saved_at: float = field(default_factory=time.monotonic)
    _saved_batches: int = 0
    _restored_batches: int = 0
    _parent: str | None = None  # id of the newest checkpoint that this job restored or wrote; of the writer's thread
    _writer: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "checkpoint"))

    @classmethod
    def make(cls, config: Config, store: Store, metrics: Metrics) -> Job:
        """Return an untrained job; raises `StreamlearnError` (78) when the configuration cannot be built."""
        scenario = Scenario.from_config(config)
        try:
            learner = make_learner(config, scenario)
        except ValueError as error:
            raise StreamlearnError(str(error), code=78) from error
        probes = Probes(config.holdout.max, config.memory.max_bytes, config.seed)
        return cls(config, scenario, learner, probes, store, metrics)

    # -- divergence

    def check_divergence(self, stats: LearnStats) -> None:
        """Count batches without a finite update; raises `Diverged` when the configuration says that there were enough."""
        if not stats.steps:
            return  # no sample of the batch could be used, which says nothing about training
        self.batches_without_update = 0 if stats.applied else self.batches_without_update + 1
        spec = self.config.divergence
        if self.batches_without_update >= spec.after and spec.then != "skip":
            raise Diverged(f"no update of the last {self.batches_without_update} batches was finite")

    def check_accuracy_drop(self, accuracies: Mapping[int, float]) -> None:
        """Compare past tasks with the last evaluation; raises `Diverged` where their mean fell by more than it may."""
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
        self.mid_delivery = True  # what was learned since must not be saved
        raise Diverged(message)

    def roll_back(self, error: Diverged) -> Job:
        """Return a job that stands at the newest checkpoint and learns more slowly; raises `Diverged` where it may not.

        Where training diverges again soon, that checkpoint may be what is wrong: then to the one before it.
        """
        spec = self.config.divergence
        recovered = self.learner.batches - self._restored_batches >= RECOVERY_FACTOR * spec.after
        rollbacks = 1 if recovered else self.rollbacks + 1
        if spec.then == "stop" or rollbacks > spec.attempts:
            what = "" if spec.then == "stop" else f" after {rollbacks - 1} rollbacks"
            raise Diverged(f"{error}{what}: lower learner.optimizer.lr, or see what the stream holds") from error
        if (
            rollbacks > 1 and self.restored_checkpoint is not None
        ):  # where none is older, to it again: nothing since is to be trusted
            self.store.restore((self.store.before(self.restored_checkpoint) or self.restored_checkpoint).id)
        job = Job.make(self.config, self.store, self.metrics)
        job.rollbacks, job.started = rollbacks, self.started
        job.restore()
        job.learner.reduce_lr(spec.slow_down**rollbacks)
        where = job.checkpoint.origin if job.checkpoint is not None else "the beginning"
        logger.error("%s: back to %s, with a learning rate of %.3g", error, where, job.learner.optimizer.lr)
        self.metrics.count("rollbacks", 1)
        return job

    # -- evaluation

    def evaluation_due(self, *, idle: bool = False) -> bool:
        """Tell whether what was learned has waited long enough to be evaluated, with less than a tenth of the time for it.

        Where the loop is `idle` it need not wait: a short batch (`linger`) may be the last for long.
        """
        spec = self.config.probes.every_seconds
        if spec is None or self.learner.batches == self._evaluated_batches:
            return False
        return time.monotonic() - self._evaluated_at >= max(0.0 if idle else spec, 10 * self._evaluation_seconds)

    def evaluate(self, after: int | None = None, *, live: bool = False) -> None:
        """Evaluate every probe; `after` names the task that has just ended. Moves no state but the matrix.

        With `live` not even that: for an evaluation at a moment that the clock chooses, and not the records.
        """
        begun = time.perf_counter()
        results = self.probes.evaluate(self.learner, self.config.probes.minimum)
        for task in [task for task, (_, loss) in results.items() if math.isnan(loss)]:
            del results[task]  # the accuracy of a model that is not finite means nothing
            self.metrics.count("probe_failures", 1, self.progress.tasks[task].name)
        self.check_accuracy_drop({task: accuracy for task, (accuracy, _) in results.items()})
        if after is not None and self.learner.measures_transfer and (probe := self.probes.samples(after)) is not None:
            before, _ = self.learner.evaluate(*probe, after, self.learner.task_start_params)
            untrained, _ = self.learner.evaluate(*probe, after, self.learner.initial_params)
            self.matrix.transfer_inputs[after] = (before, untrained)
        sizes = self.probes.sizes
        if results:  # else it gave no figure: the last one that did stays the last
            self.last_evaluated = time.time()
        self._evaluated_at = time.monotonic()
        self._evaluated_batches = self.learner.batches
        if live:
            self.matrix.record_live(results)
        else:
            self.matrix.record(results, self.learner.batches, self.progress.totals()["trained"], after, sizes)
            self._last_recorded = self.last_evaluated if results else self._last_recorded
        self._evaluation_seconds = time.perf_counter() - begun
        self.metrics.histograms["probe_duration_seconds"].observe(self._evaluation_seconds)
        self.metrics.record_evaluation(self.matrix, self.progress, sizes, self.last_evaluated)

    @property
    def batches_since_evaluation(self) -> int | None:
        """How many batches the weights are ahead of the figures of probes; None where there are none."""
        return self.learner.batches - self._evaluated_batches if self.matrix.latest_accuracy else None

    def add_held_out(self, task: Task | None, held_out: Sequence[HeldOut]) -> None:
        """Offer a delivery's held-out samples to the probes."""
        self.probes.resolve_names(self.progress)
        self.probes.add(held_out)
        if task is not None:
            self.check_coverage(task)

    def seal_probe(self, task: Task) -> None:
        """Fix the probe of a task that has ended."""
        self.probes.seal(task.index)
        self.check_coverage(task)

    def check_coverage(self, task: Task) -> None:
        """Warn once of what a task and its probe cannot show: nothing trained, nothing measured, classes without a probe."""
        found = list(task_warnings(task, self.config.holdout))
        if task.state == "ended" and task.counts["trained"] and (probe := self.probes.samples(task.index)) is not None:
            outputs = [(self.scenario.output(label, task.name, self.progress.labels), label) for label in task.labels]
            trained = {output: label for output, label in outputs if output is not None}
            declared = self.scenario.kind == "domain"  # labels that may never come
            found += probe_warnings(*probe, None if declared else trained, self.config.holdout)
        for kind, text in found:
            if (task.index, kind) not in self._logged_warnings:
                self._logged_warnings.add((task.index, kind))
                logger.warning("task %s: %s", task.name, text, extra={"task": task.name})

    def record_strategy(self) -> None:
        """Show what changes only where a task begins or ends: the network's size and what is free of it, and importances."""
        gauges, strategy = self.metrics.gauges, self.learner.strategy
        network = strategy.network.figures()
        gauges.set("network_parameters", network["parameters"])
        gauges.set("network_free_weights_ratio", network.get("free_ratio"))
        gauges.set("importance_norm", strategy.penalty.figures().get("norm"))
        self.metrics.record_agreement(self._replay_agreement())

    def check_replay(self) -> None:
        """Warn where what is replayed is not what it should be: then it protects nothing, and nothing else says so."""
        agreement = self._replay_agreement()
        mean = sum(agreement.values()) / max(1, len(agreement))
        if not agreement or mean >= MIN_REPLAY_AGREEMENT:
            return
        worst = sorted(agreement.items(), key=lambda item: item[1])[:3]
        logger.warning(
            "replay does not work well here: %.0f %% of what is generated is taken for its class (%s): what past tasks "
            "taught will be lost. Ways out: strategy er or derpp, which store samples, or an input.encoder whose "
            "features are easier to generate",
            100 * mean,
            ", ".join(f"{label} of {task}: {ratio:.0%}" for (task, label), ratio in worst),
        )

    def _replay_agreement(self) -> dict[tuple[str, str], float]:
        """Return how well a generator replays each class, by the names of task and label."""
        return {
            (self.progress.tasks[task].name, str(self.learner.output_labels[task][output])): ratio
            for (task, output), ratio in self.learner.strategy.replay.agreement().items()
        }

    # -- checkpoints

    def checkpoint_due(self) -> bool:
        """Tell whether batches or the clock ask for a checkpoint. Saving changes nothing, so the clock may decide."""
        spec = self.config.checkpoint
        positions = self.progress.positions
        if self.current_save is not None or positions == self.saved_positions or not positions.by_partition:
            return False
        if self.batches_without_update:  # perhaps nothing to go back to
            return False
        waited = time.monotonic() - self._saved_at
        if self.save_failed is not None and time.monotonic() - self.save_failed < (spec.every_seconds or 30.0):
            return False
        by_batches = spec.every_batches is not None and self.learner.batches - self._saved_batches >= spec.every_batches
        return by_batches or (spec.every_seconds is not None and waited >= spec.every_seconds)

    def save(self, stream: Stream, trigger: str, tag: str | None = None) -> PendingSave:
        """Copy everything and have it written beside the loop, which pauses for the copy alone; `finish_save` sees it end.

        One checkpoint is written at a time. While it is, one more may wait, and a newer copy takes the place of the one that
        waits: it holds everything that the other would have held. Whoever asked for that one gets the newer one. So learning
        never waits for a disk. A checkpoint with a tag is kept until somebody removes it.

        Where a drop of accuracy counts as divergence, what is not evaluated yet is evaluated first, or a checkpoint to go back
        to could hold lost weights; raises `Diverged` then, and nothing is saved.
        """
        if self.config.divergence.drop is not None and self.learner.batches != self._evaluated_batches:
            self.evaluate(live=True)
        begun = time.perf_counter()
        snapshot = self._snapshot()
        seconds = self.metrics.histograms["checkpoint_duration_seconds"]
        seconds.labels("snapshot").observe(time.perf_counter() - begun)
        if self.current_save is None:
            self.current_save = PendingSave(trigger, snapshot)
        elif self.next_save is None:
            self.next_save = PendingSave(trigger, snapshot)
        else:
            self.next_save.trigger, self.next_save.snapshot = trigger, snapshot
        saving = self.next_save or self.current_save
        if tag is not None:
            saving.tags.append(tag)
        self._write_next(stream)
        return saving

    def finish_save(self, stream: Stream, *, seconds: float = 0.0) -> None:
        """Take over what became of the checkpoint that is being written, if it is done within `seconds`; begin the next one.

        That it could not be written is logged and counted, and training goes on; any other failure is raised, and so is the
        loss of the state directory.
        """
        saving = self.current_save
        if saving is None or saving.written is None or not wait([saving.written], seconds).done:
            return
        self.current_save, self.next_save = self.next_save, None
        saving.finished = True
        try:
            checkpoint, kept, took = saving.written.result()
        except LockLost:
            raise
        except StreamlearnError as error:
            logger.error("checkpoint failed: %s", error, extra={"trigger": saving.trigger})  # noqa: TRY400 - the line says all
            self.metrics.count("checkpoints", 1, "failure", saving.trigger)
            self.metrics.count("errors", 1, "checkpoint", type(error).__name__)
            self.save_failed = time.monotonic()
        else:
            self.metrics.histograms["checkpoint_duration_seconds"].labels("write").observe(took)
            self.metrics.count("checkpoints", 1, "success", saving.trigger)
            self._set_newest_checkpoint(checkpoint, saving.snapshot)
            self.metrics.gauges.set("checkpoints_kept", kept)
            saving.checkpoint = checkpoint
            stream.report(saving.snapshot.positions)
            extra = {"checkpoint": checkpoint.id, "trigger": saving.trigger, "step": checkpoint.manifest["step"]}
            logger.info("saved %s", checkpoint.id, extra=extra)
        self._write_next(stream)

    def wait_for_saves(self, stream: Stream, heartbeat: Callable[[], None] = lambda: None) -> None:
        """Return when nothing is being written any more; `heartbeat` is called meanwhile, so that a watcher sees it go on."""
        while self.current_save is not None:
            heartbeat()
            self._write_next(stream)  # where the loop ended before it could
            self.finish_save(stream, seconds=HEARTBEAT_SECONDS)

    @property
    def snapshot_positions(self) -> Positions:
        """The positions of the newest copy, whether it is durable, being written or waiting."""
        newest = self.next_save or self.current_save
        return self.saved_positions if newest is None else newest.snapshot.positions

    def _write_next(self, stream: Stream) -> None:
        """Begin to write the checkpoint whose turn it is, unless that has begun."""
        if (saving := self.current_save) is not None and saving.written is None:
            saving.written = self._writer.submit(self._write, stream, saving.snapshot, saving.tags)

    def _write(self, stream: Stream, snapshot: Snapshot, tags: Sequence[str]) -> tuple[Checkpoint, int | None, float]:
        """Make a snapshot durable, in the writer's thread; return the checkpoint, how many are kept, and the seconds taken."""
        begun = time.perf_counter()
        stream.settle()  # the dead letters before these positions are acknowledged first
        # what the store links is its newest, which is this job's unless another process has written there
        newest = self.store.newest()
        ours = newest is not None and newest.id == self._parent
        linkable = snapshot.immutable & set(newest.manifest["files"] if newest is not None and ours else ())
        files = {name: None if name in linkable else content for name, content in snapshot.files.items()}
        num_bytes = sum(size for name, size in snapshot.sizes.items() if name not in linkable)
        checkpoint = self.store.save(files, snapshot.info, num_bytes, tags)
        self._parent = checkpoint.id
        return checkpoint, self.store.count(), time.perf_counter() - begun

    def restore(self) -> bool:
        """Take over the newest sound checkpoint; return False where there is none.

        Raises `StreamlearnError` (78) when it does not fit the configuration, with a line for each difference.
        """
        before = self.store.corrupt
        checkpoint = self.store.newest_sound()
        self.metrics.count("checkpoint_corrupt", self.store.corrupt - before)
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
            # its hashes are right and its content is not: no version of this program wrote it
            raise StreamlearnError(f"{checkpoint.path}: makes no sense: {error!r:.200}", code=78) from error
        self._set_newest_checkpoint(checkpoint)
        self._parent = checkpoint.id
        self.metrics.gauges.set("checkpoints_kept", self.store.count())
        self.restored_checkpoint, self._restored_batches = checkpoint, self.learner.batches
        self.last_evaluated = self._last_recorded = checkpoint.manifest.get(
            "evaluated"
        )  # unknown of an earlier version
        self._evaluated_batches = self.matrix.batches
        self._show_restored()
        here = environment(self.config)
        if (there := checkpoint.manifest["environment"]) != here:
            changed = ", ".join(f"{key} {there.get(key)} -> {here[key]}" for key in here if there.get(key) != here[key])
            logger.warning("going on in another environment, so not bit-equal: %s", changed)
        logger.info("restored %s", checkpoint.id, extra={"checkpoint": checkpoint.id, "step": self.learner.step})
        return True

    def _show_restored(self) -> None:
        """Show what the state says, and let the counters of this process begin where the learner's own totals stand."""
        sizes, counts = self.learner.strategy.sizes(), self.learner.strategy.constraint.counts()
        for key in ("drawn", "evicted"):
            self.metrics.set_baseline(key, int(sizes.get(key, 0)))
        for key, total in counts.items():
            self.metrics.set_baseline(key, total)
        self.record_strategy()
        self.metrics.record_evaluation(self.matrix, self.progress, self.probes.sizes, self.last_evaluated)

    def _load_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Take over the state that a checkpoint holds."""
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
        groups = {**self.learner.state_dict(), "probes": self.probes.state_dict()}
        tensors, rest, immutable = state.pack(groups)
        files: dict[str, Content] = {}
        for name, content in tensors.items():
            # what never changes is copied only if it must be written, and by the writer
            kept = content if name in immutable else state.host_copies(content)
            files[name] = partial(_to_bytes, kept) if name in immutable else partial(state.to_bytes, kept)
        sizes = {name: sum(tensor.nbytes for tensor in content.values()) for name, content in tensors.items()}
        odd = {"model": rest["model"], "encoder": groups["encoder"].get("rest", {})}  # state that is no tensor
        files["model.json"] = _json({**self.describe_model(), "state": odd})
        files["state.json"] = _json(
            {"groups": rest, "progress": self.progress.to_json(), "matrix": self.matrix.state_dict()}
        )
        files[matrix.FILE] = self.matrix.table()
        files["offsets.json"] = _json(self.progress.positions.to_json())
        files["status.json"] = _json({**self.status(None), "state": "stopped", "pid": None})
        info = {
            "step": self.learner.step,
            "batches": self.learner.batches,
            "tasks_ended": sum(task.state == "ended" for task in self.progress.tasks),
            "ending": any(task.state != "ended" and task.end_offsets is not None for task in self.progress.tasks),
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
        ours, theirs = self.config.shaping(), checkpoint.manifest["shaping"]
        if "stream.source" not in theirs:  # of an earlier version: its status says where it read
            theirs = {
                **theirs,
                "stream.source": checkpoint.read_json("status.json").get("source", ours["stream.source"]),
            }
        for key in sorted(PARAMETERS_ADDED_LATER & set(ours) - set(theirs)):
            recipe, _, parameter = key.rpartition(".")
            if any(known.startswith(f"{recipe}.") for known in theirs):
                logger.warning(
                    "%s was written by a version without %s of %s: %s from here on",
                    checkpoint.id,
                    parameter,
                    recipe,
                    ours[key],
                )
                theirs = {**theirs, key: ours[key]}
        lines = _differences(theirs, ours)
        begun = [task["name"] for task in checkpoint.read_json("state.json")["progress"]["tasks"]]
        listed = self.config.stream.topics
        if listed is not None and listed[: len(begun)] != begun:
            lines.append(
                f"stream.topics: {begun} have begun, in this order, and may not move; the configuration has {listed}"
            )
        if lines:
            raise StreamlearnError(
                f"{checkpoint.path}: does not fit the configuration: {'; '.join(lines)}; "
                "put back what the checkpoint has, or give a new job a state_dir of its own",
                code=78,
            )

    def _set_newest_checkpoint(self, checkpoint: Checkpoint, snapshot: Snapshot | None = None) -> None:
        """Take a checkpoint for the newest: one that was just written, or the one that was just restored."""
        self.checkpoint = checkpoint
        self.saved_positions = self.progress.positions if snapshot is None else snapshot.positions
        self.save_failed = None
        self._saved_at = time.monotonic() if snapshot is None else snapshot.taken
        self._saved_batches = self.learner.batches if snapshot is None else snapshot.batches
        gauges = self.metrics.gauges
        gauges.set("checkpoint_last_success_timestamp_seconds", checkpoint.created)
        gauges.set("checkpoint_last_size_bytes", checkpoint.num_bytes)

    # -- description

    def describe_model(self) -> dict[str, Any]:
        """Return what is needed, besides `model.safetensors`, to use the model elsewhere."""
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
            # once where all tasks share them: a list for each task would grow with their square
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

    def status(self, stream: Stream | None) -> dict[str, Any]:
        """Return what `status --json` shows; figures that are undefined are None."""
        queued = stream.queued if stream is not None else Counter[str]()
        sizes, ledger = self.probes.sizes, self.progress.counts_by_topic
        totals = self.progress.totals()
        samples = {**{kind: totals[kind] for kind in OUTCOMES}, "queued": queued.total()}
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
                    **{kind: count[kind] for kind in OUTCOMES},
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
            # it grows with the square of the tasks: above a bound only `/matrix` and `status --json` have it
            "matrix": self.matrix.matrix() if len(self.progress.tasks) <= MAX_MATRIX_TASKS else None,
            **self.matrix.metrics(),
            "positions": self.progress.positions.by_topic(),
            "lag": lag if reader is not None and reader.connected else None,  # unknown is not 0
            "held_back": _by_topic(reader.held_back) if reader is not None else {},
            "checkpoint": self.checkpoint.summary() if self.checkpoint is not None else None,
        }

    def _describe_task(self, task: Task, probe_size: int) -> dict[str, Any]:
        counts, index = task.counts, task.index
        return {
            "name": task.name,
            "index": index,
            "state": task.state,
            "labels": list(task.labels),
            "samples": {kind: counts[kind] for kind in ("consumed", *OUTCOMES)},
            "probe": {
                "size": probe_size,
                "accuracy": self.matrix.latest_accuracy.get(index),
                "best": self.matrix.best_accuracy(index),
                "forgetting": self.matrix.forgetting(index),
            },
        }

    def record_gauges(self, stream: Stream) -> None:
        """Bring all gauges up to date."""
        metrics, now = self.metrics, time.time()
        committed = {p: position.offset for p, position in self.saved_positions.by_partition.items()}
        metrics.record_stream(stream.status, self.progress, committed, stream.queued.total())
        metrics.gauges.set("train_batch_queue_capacity_samples", self.config.stream.queue.samples)
        names = {task.index: task.name for task in self.progress.tasks}
        metrics.record_memory(self.learner.strategy.sizes(), names)
        metrics.record_constraint(self.learner.strategy.constraint.counts())
        metrics.add_increase("dlq_records", "dead letters", stream.dead_letters.sent, "success")
        metrics.add_increase("dlq_records", "dead letter failures", stream.dead_letters.failures, "failure")
        behind = Counter[str]()
        for (topic, _), count in stream.status.lag(self.progress.positions.by_partition).items():
            behind[topic] += count
        # a producer's clock may be ahead of ours
        known = self.newest_timestamps
        ages = {(t,): (max(0.0, now - known[t]) if n else 0.0) for t, n in behind.items() if t in known}
        metrics.gauges.replace("consumer_lag_seconds", ages)
        try:
            free = shutil.disk_usage(self.config.state_dir).free
        except OSError:  # it is gone: the next checkpoint will say so
            free = None
        metrics.gauges.set("state_dir_free_bytes", free)
        metrics.gauges.set("probe_interval_batches", self.config.probes.every)
        metrics.gauges.set("probe_age_batches", self.batches_since_evaluation)
        metrics.gauges.set("train_learning_rate", self.learner.optimizer.lr if self.learner.step else None)
        metrics.gauges.set("heartbeat_timestamp_seconds", now, "consume")
        device = self.learner.context.device
        if device.type == "cuda":
            metrics.gauges.set("device_memory_allocated_bytes", torch.cuda.memory_allocated(device), str(device))
            metrics.gauges.set("device_memory_reserved_bytes", torch.cuda.memory_reserved(device), str(device))
            metrics.gauges.set("device_memory_total_bytes", torch.cuda.mem_get_info(device)[1], str(device))


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return a line for each value that differs between two configurations, and what to do about those of the outputs."""
    first, second = (
        list(dict.fromkeys(key.split(".")[1] for key in shaping if key.startswith("strategy.")))
        for shaping in (before, now)
    )
    lines = [] if set(first) == set(second) else [f"strategy: {' + '.join(first)}, now {' + '.join(second)}"]
    in_one = {*first} ^ {*second}  # their parameters say nothing more
    differing = [
        key
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key) and not (key.startswith("strategy.") and key.split(".")[1] in in_one)
    ]
    lines += [f"{key}: the checkpoint has {before.get(key)!r}, the configuration {now.get(key)!r}" for key in differing]
    if {"classes", "grow_head"} & {*differing}:
        lines.append(
            "classes are not added to a job that has begun, and grow_head is not switched on: begin a new job, with another "
            "state_dir, that reads the topics again; with grow_head: true and classes as a number it takes new labels by itself"
        )
    return lines


def environment(config: Config) -> dict[str, Any]:
    """Return what bit-equality depends on besides configuration and stream."""
    return {
        "torch": torch.__version__,
        "machine": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "flush_denormal": True,
        "device": config.device if config.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu"),
    }


def _by_topic(counts: Mapping[Partition, int]) -> dict[str, dict[str, int]]:
    """Return `{topic: {partition: count}}`, as shown to people."""
    tree: dict[str, dict[str, int]] = {}
    for (topic, partition), count in sorted(counts.items()):
        tree.setdefault(topic, {})[str(partition)] = count
    return tree


def _to_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    return state.to_bytes(state.host_copies(tensors))


def _json(tree: Mapping[str, Any]) -> bytes:
    return json.dumps(tree, allow_nan=False).encode()
