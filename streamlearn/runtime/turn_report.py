"""What one turn of the loop has done, and the observers that get this report."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from streamlearn.core.deliveries import Delivery
    from streamlearn.core.states import SaveTrigger
    from streamlearn.core.tasks import Task
    from streamlearn.learning.stats import LearnStats
    from streamlearn.runtime.job import Job


@dataclass
class TurnReport:
    """What one turn has learned, evaluated and saved. A turn that raises an error has no report."""

    task: Task | None = None  # the task that was current in this turn
    delivery: Delivery | None = None  # what was applied; None in a refinement, which applies nothing new
    begun: Task | None = None  # the task that has begun
    ended: Task | None = None  # the task that has ended, after its refinement
    stats: LearnStats | None = None  # of the learned batch; None if there was none
    seconds: float = 0.0  # duration of learning the batch
    applied: float = 0.0  # Unix time at which the delivery was applied
    evaluated: bool = False  # whether the probes were evaluated
    saves: list[SaveTrigger] = field(default_factory=list)  # why checkpoints were started


class Observer(Protocol):
    """Gets the report of every turn, after the turn, in the loop's thread. It must not change the job."""

    def turn_done(self, job: Job, report: TurnReport) -> None:
        """Take a report."""
