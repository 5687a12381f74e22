"""How much of the loss the past has, beside a new batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from streamlearn.strategies.slots import State


class ReplayShare:
    """The past's share of the loss: `tasks`, 1 - 1/k with k tasks begun; `counts`, by the samples seen.

    By counts, a task that has just begun weighs as much as an average one: a share that began at 1 would teach it nothing.
    """

    def __init__(self, by: str) -> None:
        self.by = by
        self.tasks = 0  # ended
        self.past = 0  # samples of ended tasks, once for each update
        self.current = 0

    def add_samples(self, samples: int) -> None:
        """Count new samples."""
        self.current += samples

    @property
    def value(self) -> float:
        """The share, from 0 (nothing has ended) to 1."""
        if not self.tasks:
            return 0.0
        if self.by == "tasks" or not self.past:
            return self.tasks / (self.tasks + 1)
        return self.past / (self.past + max(self.current, self.past / self.tasks))

    def end_task(self, task: int) -> None:
        """Count the task of this index, and its samples, to the past."""
        self.tasks = task + 1
        self.past, self.current = self.past + self.current, 0

    def state_dict(self) -> State:
        """Return what was counted."""
        return {"tasks": self.tasks, "past": self.past, "current": self.current}

    def load_state_dict(self, state: State) -> None:
        """Take over what `state_dict` returned."""
        self.tasks, self.past, self.current = state["tasks"], state["past"], state["current"]
