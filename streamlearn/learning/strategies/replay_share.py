"""The share of the loss that replayed samples get."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from streamlearn.learning.strategies.slots import State


class ReplayShare:
    """Computes the replayed samples' share of the loss, by the number of tasks or by the number of samples.

    `tasks`: 1 - 1/k with k tasks begun. `counts`: the past tasks' share of all samples, where the current task counts as at
    least an average task. Otherwise the share would be almost 1 when a task begins, and its first samples would teach nothing.
    """

    def __init__(self, balance: str) -> None:
        self.balance = balance
        self.ended_tasks = 0
        self.past_samples = 0  # samples of ended tasks; a sample counts once for each update
        self.current_samples = 0

    def add_samples(self, count: int) -> None:
        """Count new samples of the current task."""
        self.current_samples += count

    @property
    def value(self) -> float:
        """The share, from 0 (no task has ended) to 1."""
        if not self.ended_tasks:
            return 0.0
        if self.balance == "tasks" or not self.past_samples:
            return self.ended_tasks / (self.ended_tasks + 1)
        current = max(self.current_samples, self.past_samples / self.ended_tasks)
        return self.past_samples / (self.past_samples + current)

    def end_task(self, task: int) -> None:
        """Count the current task, whose index is `task`, and its samples as past."""
        self.ended_tasks = task + 1
        self.past_samples += self.current_samples
        self.current_samples = 0

    def state_dict(self) -> State:
        """Return the counts."""
        return {"tasks": self.ended_tasks, "past": self.past_samples, "current": self.current_samples}

    def load_state_dict(self, state: State) -> None:
        """Restore what `state_dict` returned."""
        self.ended_tasks, self.past_samples, self.current_samples = state["tasks"], state["past"], state["current"]
