"""A running job: the learner, its progress in the stream, its probes and its checkpoints."""

from __future__ import annotations

import logging
import math
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from streamlearn.core.errors import ConfigurationError, StreamlearnError, is_out_of_memory
from streamlearn.core.progress import Progress
from streamlearn.core.samples import Outcome
from streamlearn.core.scenario import Scenario
from streamlearn.core.tasks import TaskState
from streamlearn.evaluation.coverage import probe_warnings, task_warnings
from streamlearn.evaluation.matrix import AccuracyMatrix
from streamlearn.evaluation.probes import Probes
from streamlearn.learning.build import make_learner
from streamlearn.runtime.checkpointer import Checkpointer
from streamlearn.runtime.compatibility import environment
from streamlearn.runtime.divergence import Diverged, DivergencePolicy
from streamlearn.runtime.recorder import MetricsRecorder
from streamlearn.runtime.snapshot import load_checkpoint, take_snapshot

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from streamlearn.checkpoint.manifest import Checkpoint
    from streamlearn.checkpoint.store import Store
    from streamlearn.config.root import Config
    from streamlearn.core.deliveries import Delivery
    from streamlearn.core.samples import HeldOut
    from streamlearn.core.states import SaveTrigger
    from streamlearn.core.tasks import Task
    from streamlearn.learning.learner import Learner
    from streamlearn.learning.stats import LearnStats
    from streamlearn.metrics import Metrics
    from streamlearn.runtime.checkpointer import PendingSave
    from streamlearn.runtime.turn_report import Observer
    from streamlearn.stream.reader import StreamReader

logger = logging.getLogger(__name__)

MIN_REPLAY_AGREEMENT = 0.75
"""Generative replay works if its mean agreement is at least this.

It was 1.00 on digits, where replay protects past tasks, and 0.3 to 0.5 on photographs, where it does not.
"""


@dataclass
class Job:
    """The state that the loop works on: learner, progress and probes, and how they are evaluated, saved and restored."""

    config: Config
    scenario: Scenario
    learner: Learner
    probes: Probes
    recorder: MetricsRecorder
    checkpointer: Checkpointer
    divergence: DivergencePolicy
    observers: list[Observer]  # of the loop's turns
    matrix: AccuracyMatrix = field(default_factory=AccuracyMatrix)
    progress: Progress = field(default_factory=Progress)
    restored_checkpoint: Checkpoint | None = None  # the one that this job started from
    newest_timestamps: dict[str, float] = field(default_factory=dict)  # of the newest applied record, by topic
    started: float = field(default_factory=time.time)
    mid_delivery: bool = False  # a delivery is half applied: model and positions do not match
    last_evaluated: float | None = None  # Unix time of the last evaluation that had a result
    last_recorded: float | None = None  # Unix time of the last evaluation that is part of the state
    _logged_warnings: set[tuple[int, str]] = field(default_factory=set)  # task index and kind
    _evaluated_at: float = field(default_factory=time.monotonic)
    _evaluated_batches: int = 0
    _evaluation_seconds: float = 0.0  # duration of the last evaluation
    _restored_batches: int = 0

    @classmethod
    def make(cls, config: Config, store: Store, metrics: Metrics) -> Job:
        """Return an untrained job; raises `ConfigurationError` if the configuration cannot be built."""
        scenario = Scenario.from_config(config.scenario, config.classes, grow=config.grow_head)
        try:
            learner = make_learner(config.learning, scenario)
        except ValueError as error:
            raise ConfigurationError(str(error)) from error
        probes = Probes(config.holdout.max, config.memory.max_bytes, config.seed)
        recorder = MetricsRecorder(metrics)
        return cls(
            config, scenario, learner, probes, recorder,
            Checkpointer(store, config.checkpoint, recorder), DivergencePolicy(config.divergence), [recorder],
        )  # fmt: skip

    @property
    def store(self) -> Store:
        """The checkpoints of the state directory."""
        return self.checkpointer.store

    # -- turns of the loop

    @contextmanager
    def applying(self) -> Iterator[None]:
        """Change model and positions in this context. After an error in it they do not match, so nothing may be saved."""
        self.mid_delivery = True
        yield
        self.mid_delivery = False

    @property
    def may_be_saved(self) -> bool:
        """Whether model and positions match, and the model has not lost past tasks."""
        return not (self.mid_delivery or self.divergence.lost_past_tasks)

    def register_labels(self, delivery: Delivery) -> None:
        """Add a delivery's labels and words, and set the active outputs. Call this before its batch is learned."""
        self.progress.register_labels(delivery.observations)
        if delivery.new_task is not None or delivery.observations.new_labels:
            self.learner.set_active_outputs(self.progress.tasks, self.progress.labels)

    def advance(self, delivery: Delivery, stats: LearnStats | None) -> None:
        """Move positions and counts past a delivery whose batch was learned, and add its held-out samples to the probes."""
        task = self.progress.current
        outcome, unusable = (stats.outcome, stats.unusable) if stats is not None else (Outcome.TRAINED, 0)
        self.progress.advance(delivery, outcome, unusable)
        self.add_held_out(task, delivery.observations.held_out)
        if task is not None and delivery.newest_timestamp is not None:
            self.newest_timestamps[task.name] = delivery.newest_timestamp

    # -- checkpoints

    def checkpoint_due(self) -> bool:
        """Return whether a checkpoint is due. A rollback to one without a finite update would not help."""
        if self.divergence.batches_without_update:
            return False
        return self.checkpointer.due(self.progress.positions, self.learner.batches)

    def save(self, stream: StreamReader, trigger: SaveTrigger, tag: str | None = None) -> PendingSave:
        """Take a snapshot, and let the checkpointer write it. Learning pauses only for the copy, never for the disk.

        A checkpoint with a tag is kept until somebody removes it. If `divergence.drop` is set, batches that were not
        evaluated yet are evaluated first: a rollback must not restore weights that have lost past tasks. Raises `Diverged` in
        this case, and saves nothing.
        """
        if self.config.divergence.drop is not None and self.learner.batches != self._evaluated_batches:
            self.evaluate(live=True)
        start = time.perf_counter()
        snapshot = take_snapshot(self)
        self.recorder.snapshot_taken(time.perf_counter() - start)
        return self.checkpointer.submit(stream, trigger, snapshot, tag)

    def restore(self) -> bool:
        """Load the newest valid checkpoint; return False if there is none.

        Raises `ConfigurationError` if the checkpoint is not compatible with the configuration, with each difference.
        """
        before = self.store.num_corrupt
        checkpoint = self.store.newest_valid()
        self.recorder.restore_begins(self.store.num_corrupt - before)
        if checkpoint is None:
            self.recorder.restored(self)
            return False
        try:
            load_checkpoint(self, checkpoint)
        except StreamlearnError:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            # the hashes match and the content is wrong: no version of this program wrote it
            raise ConfigurationError(f"{checkpoint.path}: cannot be loaded: {error!r:.200}") from error
        self.checkpointer.start_from(checkpoint, self.progress.positions, self.learner.batches)
        self.restored_checkpoint, self._restored_batches = checkpoint, self.learner.batches
        # checkpoints of earlier versions do not have this time
        self.last_evaluated = self.last_recorded = checkpoint.manifest.get("evaluated")
        self._evaluated_batches = self.matrix.batches
        self.recorder.restored(self)
        here = environment(self.config)
        if (there := checkpoint.manifest["environment"]) != here:
            changed = ", ".join(f"{key} {there.get(key)} -> {here[key]}" for key in here if there.get(key) != here[key])
            logger.warning("the environment has changed, so results are no longer bit-equal: %s", changed)
        logger.info("restored %s", checkpoint.id, extra={"checkpoint": checkpoint.id, "step": self.learner.step})
        return True

    # -- divergence

    def roll_back(self, error: Diverged) -> Job:
        """Return a new job, restored from the newest checkpoint, with a lower learning rate.

        If training diverges again soon, that checkpoint may hold bad weights: the job goes back to the one before it. Raises
        `Diverged` as `DivergencePolicy.rollbacks_after` does.
        """
        rollbacks = self.divergence.rollbacks_after(error, self.learner.batches - self._restored_batches)
        if rollbacks > 1 and self.restored_checkpoint is not None:
            # if there is no older one, take the same again: the checkpoints after it may hold bad weights
            self.store.restore(
                (self.store.newest_valid_before(self.restored_checkpoint) or self.restored_checkpoint).id
            )
        job = Job.make(self.config, self.store, self.recorder.metrics)
        job.divergence.rollbacks, job.started = rollbacks, self.started
        job.restore()
        job.learner.reduce_lr(self.config.divergence.slow_down**rollbacks)
        newest = job.checkpointer.newest
        where = newest.origin if newest is not None else "the beginning"
        logger.error("%s: rolled back to %s, with a learning rate of %.3g", error, where, job.learner.update.lr)
        self.recorder.rolled_back()
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
        over the same records would otherwise save different matrices. Raises `Diverged` as
        `DivergencePolicy.check_accuracy` does.
        """
        start = time.perf_counter()
        results = self.probes.evaluate(self.learner, self.config.probes.minimum)
        for task in [task for task, (_, loss) in results.items() if math.isnan(loss)]:
            del results[task]  # the accuracy of a model with non-finite outputs means nothing
            self.recorder.probe_failed(self.progress.tasks[task].name)
        accuracies = {task: accuracy for task, (accuracy, _) in results.items()}
        batches = self.learner.batches - self._evaluated_batches
        self.divergence.check_accuracy(self.matrix.latest_accuracy, accuracies, self.matrix.ended_tasks, batches)
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
            self.last_recorded = self.last_evaluated if results else self.last_recorded
        self._evaluation_seconds = time.perf_counter() - start
        self.recorder.evaluation_done(self, self._evaluation_seconds)

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

    def check_replay(self) -> None:
        """Log a warning if generated samples are poor: replay then protects nothing, and no other metric shows it."""
        agreement = self.replay_agreement()
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

    def replay_agreement(self) -> dict[tuple[str, str], float]:
        """Return by task name and label the share of generated samples that the teacher recognizes as this class."""
        return {
            (self.progress.tasks[task].name, str(self.learner.output_labels[task][output])): ratio
            for (task, output), ratio in self.learner.strategy.replay.agreement().items()
        }
