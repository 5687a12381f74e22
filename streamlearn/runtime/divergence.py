"""The divergence policy: when training counts as diverged, and how often the job may roll back."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from streamlearn.core.errors import StreamlearnError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from streamlearn.learning.stats import LearnStats
    from streamlearn.runtime.config import DivergenceConfig

logger = logging.getLogger(__name__)

RECOVERY_FACTOR = 10
"""After this many times `divergence.after` batches, a divergence is a new one and not a repetition of the last."""


class Diverged(StreamlearnError):  # noqa: N818 - the name says what happened
    """Training diverged: update after update was not finite, or the accuracy on past tasks dropped too far."""


@dataclass
class DivergencePolicy:
    """Finds out that training has diverged, and decides whether a rollback may be tried."""

    spec: DivergenceConfig
    batches_without_update: int = 0  # consecutive batches without a finite update
    rollbacks: int = 0  # consecutive rollbacks that led to this job
    lost_past_tasks: bool = False  # the accuracy on past tasks fell too far since the last evaluation

    def check_updates(self, stats: LearnStats) -> None:
        """Count consecutive batches without a finite update; raises `Diverged` after `divergence.after` of them."""
        if not stats.steps:
            return  # no sample of the batch was usable, so it says nothing about training
        self.batches_without_update = 0 if stats.applied else self.batches_without_update + 1
        if self.batches_without_update >= self.spec.after and self.spec.then != "skip":
            raise Diverged(f"no update of the last {self.batches_without_update} batches was finite")

    def check_accuracy(
        self, before: Mapping[int, float], now: Mapping[int, float], ended_tasks: Sequence[int], batches: int
    ) -> None:
        """Compare the mean accuracy on past tasks with the last evaluation, which was `batches` ago.

        Raises `Diverged` if it fell by more than `divergence.drop`.
        """
        past = [task for task in ended_tasks if task in before and task in now]
        if self.spec.drop is None or not past:
            return
        old, new = (sum(row[task] for task in past) / len(past) for row in (before, now))
        if old - new <= self.spec.drop:
            return
        message = f"accuracy on past tasks fell from {old:.1%} to {new:.1%} within {batches} batches"
        if self.spec.then == "skip":
            logger.warning("%s", message)
            return
        self.lost_past_tasks = True
        raise Diverged(message)

    def rollbacks_after(self, error: Diverged, batches: int) -> int:
        """Return how many consecutive rollbacks there are with the next one; `batches` were learned since the last one.

        Raises `Diverged` if `divergence` asks for a stop, or after `divergence.attempts` rollbacks.
        """
        recovered = batches >= RECOVERY_FACTOR * self.spec.after
        rollbacks = 1 if recovered else self.rollbacks + 1
        if self.spec.then == "stop" or rollbacks > self.spec.attempts:
            attempts = "" if self.spec.then == "stop" else f" after {rollbacks - 1} rollbacks"
            raise Diverged(f"{error}{attempts}: lower learner.optimizer.lr, or check the data in the stream") from error
        return rollbacks
