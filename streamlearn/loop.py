"""THE loop: delivery -> update -> probe -> metrics -> checkpoint. One turn learns at most one batch."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from streamlearn.data import Delivery
    from streamlearn.job import Job
    from streamlearn.stream.reader import Stream

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.5


class Control(Protocol):
    """What people ask of the loop, between two turns."""

    stopping: bool
    paused: bool

    def serve(self, job: Job, stream: Stream, *, idle: bool) -> None:
        """Answer what was asked, and show where the job stands."""

    def wait(self, seconds: float) -> None:
        """Return when something was asked, or the time is over."""


def run(job: Job, stream: Stream, control: Control) -> None:
    """Learn until told to stop, or until nothing further can come."""
    if job.progress.current is not None and job.progress.current.state == "refining":
        stream.splice(job.learner.refine())  # where the last process left it
    while not (control.stopping or stream.finished):
        delivery = None
        if control.paused:
            control.wait(POLL_SECONDS)
        elif (delivery := stream.next(POLL_SECONDS)) is not None:
            turn(job, stream, delivery)
        job.finish_save(stream)
        if job.evaluation_due(idle=delivery is None):
            job.evaluate(live=True)
        if job.checkpoint_due():
            job.save(stream, "interval")
        control.serve(job, stream, idle=delivery is None)


def turn(job: Job, stream: Stream, delivery: Delivery) -> None:
    """Apply one delivery: everything between two sets of positions."""
    progress, learner = job.progress, job.learner
    if delivery.new_task is not None:
        learner.begin_task(delivery.new_task)  # first: where the strategy has no room for it, nothing has changed
        progress.tasks.append(delivery.new_task)
        job.record_strategy()
        logger.info("task %s begins", delivery.new_task.name, extra={"task": delivery.new_task.name})

    job.mid_delivery = True  # what fails from here on leaves nothing that may be saved
    progress.register_labels(delivery.observations)
    if delivery.new_task is not None or delivery.observations.new_labels:
        learner.set_active_outputs(progress.tasks, progress.labels)

    task, stats = progress.current, None
    if delivery.batch is not None:
        begun = time.perf_counter()
        stats = learner.learn(delivery.batch)
        job.metrics.histograms["train_batch_duration_seconds"].observe(time.perf_counter() - begun)
        if stats.applied < stats.steps:
            logger.warning(
                "%d of %d updates were not finite and were dropped", stats.steps - stats.applied, stats.steps
            )
        if stats.unusable:
            logger.warning("%d samples have features that are not finite, and were skipped", stats.unusable)
        job.check_divergence(stats)

    outcome, unusable = (stats.outcome, stats.unusable) if stats is not None else ("trained", 0)
    progress.advance(delivery, outcome, unusable)
    job.add_held_out(task, delivery.observations.held_out)
    if task is not None and delivery.newest_timestamp is not None:
        job.newest_timestamps[task.name] = delivery.newest_timestamp
    job.metrics.record_delivery(delivery, stats, task.name if task is not None else "", time.time())

    if delivery.end_offsets is not None:
        # before the short last batch is learned. A newer copy that takes this one's place holds the decision too. So no
        # checkpoint holds what was learned after it without it, and no restart from one decides again
        job.save(stream, "task_end")

    if delivery.forgives_below is not None:
        job.save(stream, "burst")  # a restart reads on, though samples may wait for their batch from before the burst

    if delivery.task_end_reason is not None and task is not None:
        task.state = "refining"
        logger.info("task %s has ended (%s)", task.name, delivery.task_end_reason, extra={"task": task.name})
        stream.splice(learner.refine())  # usually no batches, then the delivery that consolidates

    if delivery.ends_refinement and task is not None:
        learner.end_task()
        task.state = "ended"
        job.seal_probe(task)
        job.evaluate(after=task.index)
        job.record_strategy()
        job.check_replay()
        if learner.strategy.penalty.metrics():
            job.metrics.gauges.set("importance_last_update_timestamp_seconds", time.time())
        job.save(stream, "task_end")
        logger.info(
            "accuracy %s, forgetting %s",
            _figure(job.matrix.average_accuracy),
            _figure(job.matrix.average_forgetting),
            extra={"task": task.name},
        )
    elif stats is not None and stats.samples and learner.batches % job.config.probes.every == 0:
        job.evaluate()
    job.mid_delivery = False


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
