"""The main loop: delivery -> update -> probe -> metrics -> checkpoint. One turn learns at most one batch.

It is the only loop that learns: refinement at a task's end passes through it as well, batch by batch.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Protocol

from streamlearn.core.states import SaveTrigger

if TYPE_CHECKING:
    from streamlearn.data import Delivery
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
    if job.progress.current is not None and job.progress.current.state == "refining":
        stream.prepend(job.learner.refine())  # continue where the last process stopped
    while not (control.stopping or stream.finished):
        delivery = None
        if control.paused:
            control.wait(POLL_SECONDS)
        elif (delivery := stream.next_delivery(POLL_SECONDS)) is not None:
            turn(job, stream, delivery)
        job.finish_save(stream)
        if job.evaluation_due(idle=delivery is None):
            job.evaluate(live=True)
        if job.checkpoint_due():
            job.save(stream, SaveTrigger.INTERVAL)
        control.serve(job, stream, idle=delivery is None)


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

    task, stats = progress.current, None
    if delivery.batch is not None:
        start = time.perf_counter()
        stats = learner.learn(delivery.batch)
        job.metrics.histograms["train_batch_duration_seconds"].observe(time.perf_counter() - start)
        if stats.applied < stats.steps:
            dropped = stats.steps - stats.applied
            logger.warning("%d of %d updates were not finite and were dropped", dropped, stats.steps)
        if stats.unusable:
            logger.warning("%d samples were skipped, because their features are not finite", stats.unusable)
        job.check_divergence(stats)

    outcome, unusable = (stats.outcome, stats.unusable) if stats is not None else ("trained", 0)
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
        task.state = "refining"
        logger.info("task %s has ended (%s)", task.name, delivery.task_end_reason, extra={"task": task.name})
        stream.prepend(learner.refine())  # usually only the delivery that ends the refinement

    if delivery.ends_refinement and task is not None:
        learner.end_task()
        task.state = "ended"
        job.seal_probe(task)
        job.evaluate(after=task.index)
        job.record_strategy()
        job.check_replay()
        if learner.strategy.penalty.metrics():
            job.metrics.gauges.set("importance_last_update_timestamp_seconds", time.time())
        job.save(stream, SaveTrigger.TASK_END)
        logger.info(
            "accuracy %s, forgetting %s",
            _four_digits(job.matrix.average_accuracy),
            _four_digits(job.matrix.average_forgetting),
            extra={"task": task.name},
        )
    elif stats is not None and stats.samples and learner.batches % job.config.probes.every == 0:
        job.evaluate()
    job.mid_delivery = False


def _four_digits(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
