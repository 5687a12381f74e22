"""The main loop: delivery -> update -> probe -> metrics -> checkpoint. One turn learns at most one batch.

At a task's end an inner loop refines the task in the same way, batch by batch. Nothing else learns.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Protocol

from streamlearn.core.samples import Outcome
from streamlearn.core.states import SaveTrigger
from streamlearn.core.tasks import TaskState

if TYPE_CHECKING:
    from streamlearn.core.deliveries import Delivery
    from streamlearn.core.samples import Batch
    from streamlearn.core.tasks import Task
    from streamlearn.learning.stats import LearnStats
    from streamlearn.runtime.job import Job
    from streamlearn.stream.reader import StreamReader

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.5  # the longest wait for a delivery or a command


class Control(Protocol):
    """The commands of users, which the loop executes between two turns."""

    stopping: bool
    paused: bool

    def serve(self, job: Job, stream: StreamReader, *, idle: bool) -> None:
        """Execute the waiting commands, and publish the status."""

    def wait(self, seconds: float) -> None:
        """Return after `seconds`, or earlier if a command arrives."""


def run(job: Job, stream: StreamReader, control: Control) -> None:
    """Learn until a stop is requested, or the stream is finished."""
    refine_task(job, stream, control)  # continue where the last process stopped
    while not (control.stopping or stream.finished):
        delivery = None
        if control.paused:
            control.wait(POLL_SECONDS)
        elif (delivery := stream.next_delivery(POLL_SECONDS)) is not None:
            turn(job, stream, delivery)
        between_turns(job, stream, control, idle=delivery is None)
        refine_task(job, stream, control)


def refine_task(job: Job, stream: StreamReader, control: Control) -> None:
    """Refine the current task if its last record was learned, and end it; return early if a stop is requested.

    Each batch is a turn of its own, and between two of them the loop does all that it does between two deliveries. So a
    pause, a checkpoint and a stop are possible at every batch, and a restart continues with the next one.
    """
    batches = job.learner.refine()
    while (task := job.progress.current) is not None and task.state == TaskState.REFINING and not control.stopping:
        if control.paused:
            control.wait(POLL_SECONDS)
        else:
            job.mid_delivery = True
            if (batch := next(batches, None)) is not None:
                refine(job, batch)
            else:
                end_task(job, stream, task)
            job.mid_delivery = False
        between_turns(job, stream, control, idle=control.paused)


def between_turns(job: Job, stream: StreamReader, control: Control, *, idle: bool) -> None:
    """Finish, evaluate and save what is due, and execute the commands of users. `idle`: nothing was learned."""
    job.finish_save(stream)
    if job.evaluation_due(idle=idle):
        job.evaluate(live=True)
    if job.checkpoint_due():
        job.save(stream, SaveTrigger.INTERVAL)
    control.serve(job, stream, idle=idle)


def turn(job: Job, stream: StreamReader, delivery: Delivery) -> None:
    """Apply one delivery. All state changes between two sets of positions happen here.

    Raises `Diverged` as `Job.check_divergence`, `Job.evaluate` and `Job.save` do. After an error the job stays `mid_delivery`,
    and nothing is saved.
    """
    progress, learner = job.progress, job.learner
    if delivery.new_task is not None:
        learner.begin_task(delivery.new_task)  # first, because it raises if the strategy has no room for a task
        progress.tasks.append(delivery.new_task)
        job.record_strategy()
        logger.info("task %s starts", delivery.new_task.name, extra={"task": delivery.new_task.name})

    job.mid_delivery = True  # after an error below this line nothing may be saved
    progress.register_labels(delivery.observations)
    if delivery.new_task is not None or delivery.observations.new_labels:
        learner.set_active_outputs(progress.tasks, progress.labels)

    task = progress.current
    stats = learn(job, delivery.batch) if delivery.batch is not None else None
    outcome, unusable = (stats.outcome, stats.unusable) if stats is not None else (Outcome.TRAINED, 0)
    progress.advance(delivery, outcome, unusable)
    job.add_held_out(task, delivery.observations.held_out)
    if task is not None and delivery.newest_timestamp is not None:
        job.newest_timestamps[task.name] = delivery.newest_timestamp
    job.metrics.record_delivery(delivery, stats, task.name if task is not None else "", time.time())

    if delivery.end_offsets is not None:
        # Save the end offsets before the last, short batch is learned. A newer snapshot that replaces this one contains them
        # too. So every checkpoint with later batches has the end offsets, and a restart does not choose others.
        job.save(stream, SaveTrigger.TASK_END)

    if delivery.forgives_below is not None:
        # a restart must read on after the burst, although samples from before it may still wait for their batch
        job.save(stream, SaveTrigger.BURST)

    if delivery.task_end_reason is not None and task is not None:
        task.state = TaskState.REFINING
        logger.info("task %s has ended (%s)", task.name, delivery.task_end_reason, extra={"task": task.name})

    evaluate_after(job, stats)
    job.mid_delivery = False


def refine(job: Job, batch: Batch) -> None:
    """Learn a batch of samples that were learned before. Positions and counts do not change."""
    assert job.progress.current is not None
    stats = learn(job, batch)
    job.metrics.record_learned(stats, job.progress.current.name)
    evaluate_after(job, stats)


def learn(job: Job, batch: Batch) -> LearnStats:
    """Learn a batch, and log what was left out of it. Raises `Diverged` as `Job.check_divergence` does."""
    start = time.perf_counter()
    stats = job.learner.learn(batch)
    job.metrics.histograms["train_batch_duration_seconds"].observe(time.perf_counter() - start)
    if stats.applied < stats.steps:
        logger.warning("%d of %d updates were not finite and were dropped", stats.steps - stats.applied, stats.steps)
    if stats.unusable:
        logger.warning("%d samples were skipped, because their features are not finite", stats.unusable)
    job.check_divergence(stats)
    return stats


def evaluate_after(job: Job, stats: LearnStats | None) -> None:
    """Evaluate if this batch is one of those after which `probes.every` asks for it."""
    if stats is not None and stats.samples and job.learner.batches % job.config.probes.every == 0:
        job.evaluate()


def end_task(job: Job, stream: StreamReader, task: Task) -> None:
    """End a task after its refinement: consolidate it, seal its probe, evaluate every task, and save."""
    job.learner.end_task()
    task.state = TaskState.ENDED
    job.seal_probe(task)
    job.evaluate(after=task.index)
    job.record_strategy()
    job.check_replay()
    if job.learner.strategy.penalty.metrics():
        job.metrics.gauges.set("importance_last_update_timestamp_seconds", time.time())
    job.save(stream, SaveTrigger.TASK_END)
    logger.info(
        "accuracy %s, forgetting %s",
        _four_digits(job.matrix.average_accuracy),
        _four_digits(job.matrix.average_forgetting),
        extra={"task": task.name},
    )


def _four_digits(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
