"""The loop: its turns, and the refinement of a task between two of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from streamlearn.core.deliveries import Delivery
from streamlearn.core.samples import Batch
from streamlearn.core.states import SaveTrigger
from streamlearn.core.tasks import Task, TaskEndReason
from streamlearn.runtime import loop
from tests.support.in_process import made

if TYPE_CHECKING:
    from pathlib import Path

    from streamlearn.runtime.job import Job
    from streamlearn.runtime.turn_report import TurnReport
    from streamlearn.stream.reader import StreamReader

PACKNET: dict[str, Any] = {
    "strategy": {"packnet": {"retrain_epochs": 3}},
    "scenario": "task",
    "stream": {"topics": ["a", "b"], "batch_size": 4},
}


def ended(tmp_path: Path) -> tuple[Job, StreamReader]:
    """Return a job whose only task has ended and is not refined yet: 12 samples, so 9 batches of 4 samples."""
    job, stream = made(tmp_path, **PACKNET)
    for number in range(3):
        x, y = torch.rand(4, 1, generator=torch.Generator().manual_seed(number)), torch.tensor([0, 1, 0, 1])
        loop.turn(
            job,
            stream,
            Delivery(
                new_task=Task(0, "a", labels=[0, 1]) if number == 0 else None,
                batch=Batch(x, y, torch.zeros(4, dtype=torch.int64)),
                task_end_reason=TaskEndReason.MARKER if number == 2 else None,
            ),
        )
    return job, stream


class Script:
    """A control that pauses for one wait after the second turn, saves after the third, and stops after `stop_after`."""

    def __init__(self, stop_after: int) -> None:
        self.stopping = self.paused = False
        self.stop_after = stop_after
        self.turns: list[bool] = []  # whether each one was idle

    def serve(self, job: Job, stream: StreamReader, *, idle: bool) -> None:
        """Give the commands of the script."""
        self.turns.append(idle)
        learned = self.turns.count(False)
        self.paused = learned == 2 and not idle
        if learned == 3:
            job.save(stream, SaveTrigger.MANUAL)
        self.stopping = learned >= self.stop_after

    def wait(self, seconds: float) -> None:
        """Return at once."""


def test_a_refinement_can_be_paused_saved_stopped_and_continued(tmp_path: Path) -> None:
    """Each of its batches is a turn, and one that was interrupted ends with the same bits as one that was not."""
    whole, stream = ended(tmp_path / "whole")
    loop.refine_task(whole, stream, Script(99))
    job, stream = ended(tmp_path / "parts")
    script = Script(5)
    loop.refine_task(job, stream, script)
    assert script.turns == [False, False, True, False, False, False]
    assert (job.learner.task.batches_refined, job.progress.tasks[0].state, job.mid_delivery) == (5, "refining", False)
    job.save(stream, SaveTrigger.SHUTDOWN)
    job.checkpointer.wait(stream)
    again, stream = made(tmp_path / "parts", **PACKNET)
    assert again.restore()
    assert again.learner.task.batches_refined == 5
    loop.refine_task(again, stream, rest := Script(99))
    assert rest.turns.count(False) == 9 - 5 + 1  # the last turn ends the task
    for one, other in zip(whole.learner.params, again.learner.params, strict=True):
        assert torch.equal(one, other)
    assert [job.progress.tasks[0].state for job in (whole, again)] == ["ended", "ended"]
    assert whole.learner.step == again.learner.step


class Collector:
    """An observer that keeps every report."""

    def __init__(self) -> None:
        self.reports: list[TurnReport] = []

    def turn_done(self, job: Job, report: TurnReport) -> None:
        """Keep a report."""
        del job
        self.reports.append(report)


def test_every_turn_of_a_refinement_is_reported_once(tmp_path: Path) -> None:
    """Observers get one report a batch and one for the end of the task, none while paused; the metrics count the same."""
    job, stream = ended(tmp_path)
    job.observers.append(collector := Collector())
    loop.refine_task(job, stream, Script(99))
    *batches, last = collector.reports
    steps = [report.stats.applied for report in batches if report.stats is not None]
    assert (len(batches), len(steps)) == (9, 9)
    assert [report.ended for report in batches] == [None] * 9
    assert (last.stats, last.ended, last.evaluated, last.saves) == (
        None, job.progress.tasks[0], True, [SaveTrigger.TASK_END],
    )  # fmt: skip
    shown = job.recorder.metrics.expose("")[0].decode().splitlines()
    assert "streamlearn_train_batch_duration_seconds_count 9.0" in shown
    assert f'streamlearn_train_steps_total{{task="a"}} {float(sum(steps))}' in shown
    assert [line for line in shown if line.startswith("streamlearn_network_free_weights_ratio ")] != []
