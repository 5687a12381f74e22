"""The main loop: delivery -> update -> probe -> checkpoint -> observers. One turn learns at most one batch.

At a task's end an inner loop refines the task in the same way, batch by batch. Nothing else learns.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Protocol

from streamlearn.core.states import SaveTrigger
from streamlearn.core.tasks import TaskState
from streamlearn.runtime.turn_report import TurnReport

if TYPE_CHECKING:
    from streamlearn.core.deliveries import Delivery
    from streamlearn.core.samples import Batch
    from streamlearn.core.tasks import Task
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
        report = None
        if control.paused:
            control.wait(POLL_SECONDS)
        elif (delivery := stream.next_delivery(POLL_SECONDS)) is not None:
            report = turn(job, stream, delivery)
        between_turns(job, stream, control, report)
        refine_task(job, stream, control)


def refine_task(job: Job, stream: StreamReader, control: Control) -> None:
    """Refine the current task if its last record was learned, and end it; return early if a stop is requested.

    Each batch is a turn of its own, and between two of them the loop does all that it does between two deliveries. So a
    pause, a checkpoint and a stop are possible at every batch, and a restart continues with the next one.
    """
    batches = job.learner.refine()
    while (task := job.progress.current) is not None and task.state == TaskState.REFINING and not control.stopping:
        report = None
        if control.paused:
            control.wait(POLL_SECONDS)
        else:
            with job.applying():
                batch = next(batches, None)
                report = end_task(job, stream, task) if batch is None else refine(job, task, batch)
        between_turns(job, stream, control, report)


def between_turns(job: Job, stream: StreamReader, control: Control, report: TurnReport | None) -> None:
    """Report the turn, evaluate and save what is due, and execute the commands of users. No report: the loop is idle."""
    if report is not None:
        for observer in job.observers:
            observer.turn_done(job, report)
    job.checkpointer.finish(stream)
    if job.evaluation_due(idle=report is None):
        job.evaluate(live=True)
    if job.checkpoint_due():
        job.save(stream, SaveTrigger.INTERVAL)
    control.serve(job, stream, idle=report is None)


def turn(job: Job, stream: StreamReader, delivery: Delivery) -> TurnReport:
    """Apply one delivery, in the order of its fields. All state changes between two sets of positions happen here.

    Raises `Diverged` as `DivergencePolicy`, `Job.evaluate` and `Job.save` do. After an error nothing is saved.
    """
    if delivery.new_task is not None:
        begin_task(job, delivery.new_task)
    report = TurnReport(job.progress.current, delivery, begun=delivery.new_task)
    with job.applying():
        job.register_labels(delivery)
        if delivery.batch is not None:
            learn(job, delivery.batch, report)
        job.advance(delivery, report.stats)
        report.applied = time.time()
        save_decisions(job, stream, delivery, report)
        if delivery.task_end_reason is not None and report.task is not None:
            report.task.state = TaskState.REFINING
            name = report.task.name
            logger.info("task %s has ended (%s)", name, delivery.task_end_reason, extra={"task": name})
        evaluate_if_due(job, report)
    return report


def begin_task(job: Job, task: Task) -> None:
    """Begin a task. Raises `StreamlearnError` if the strategy has no room for it; then nothing has changed."""
    job.learner.begin_task(task)
    job.progress.tasks.append(task)
    logger.info("task %s starts", task.name, extra={"task": task.name})


def learn(job: Job, batch: Batch, report: TurnReport) -> None:
    """Learn a batch, and log what was left out of it. Raises `Diverged` as `DivergencePolicy.check_updates` does."""
    start = time.perf_counter()
    report.stats = stats = job.learner.learn(batch)
    report.seconds = time.perf_counter() - start
    if stats.applied < stats.steps:
        logger.warning("%d of %d updates were not finite and were dropped", stats.steps - stats.applied, stats.steps)
    if stats.unusable:
        logger.warning("%d samples were skipped, because their features are not finite", stats.unusable)
    job.divergence.check_updates(stats)


def save_decisions(job: Job, stream: StreamReader, delivery: Delivery, report: TurnReport) -> None:
    """Save at once what the reader has decided and a restart must not decide differently."""
    if delivery.end_offsets is not None:
        # Save the end offsets before the last, short batch is learned. A newer snapshot that replaces this one contains them
        # too. So every checkpoint with later batches has the end offsets, and a restart does not choose others.
        job.save(stream, SaveTrigger.TASK_END)
        report.saves.append(SaveTrigger.TASK_END)
    if delivery.forgives_below is not None:
        # a restart must read on after the burst, although samples from before it may still wait for their batch
        job.save(stream, SaveTrigger.BURST)
        report.saves.append(SaveTrigger.BURST)


def evaluate_if_due(job: Job, report: TurnReport) -> None:
    """Evaluate if the batch of this turn is one of those after which `probes.every` asks for it."""
    stats = report.stats
    if stats is not None and stats.samples and job.learner.batches % job.config.probes.every == 0:
        job.evaluate()
        report.evaluated = True


def refine(job: Job, task: Task, batch: Batch) -> TurnReport:
    """Learn a batch of samples that were learned before. Positions and counts do not change."""
    report = TurnReport(task)
    learn(job, batch, report)
    evaluate_if_due(job, report)
    return report


def end_task(job: Job, stream: StreamReader, task: Task) -> TurnReport:
    """End a task after its refinement: consolidate it, seal its probe, evaluate every task, and save."""
    job.learner.end_task()
    task.state = TaskState.ENDED
    job.seal_probe(task)
    job.evaluate(after=task.index)
    job.check_replay()
    job.save(stream, SaveTrigger.TASK_END)
    logger.info(
        "accuracy %s, forgetting %s",
        _four_digits(job.matrix.average_accuracy),
        _four_digits(job.matrix.average_forgetting),
        extra={"task": task.name},
    )
    return TurnReport(task, ended=task, evaluated=True, saves=[SaveTrigger.TASK_END])


def _four_digits(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
