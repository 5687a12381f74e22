"""Episodic replay: Chaudhry et al. 2019, "On tiny episodic memories in continual learning"; and joint training.

loss = (1 - share) * mean over new samples + share * mean over replayed samples.
ER draws `ratio` samples for each new one, and all weigh the same. Joint training draws k - 1 for each new one, where k
is the number of tasks, so that every task has the same share of the loss.
"""

from __future__ import annotations

from typing import Any

from streamlearn.data import Batch
from streamlearn.memory import EpisodicMemory
from streamlearn.strategies.parts import Closing, Replay, State, World


class EpisodicReplay(Replay):
    """Replays stored samples of past tasks, drawn uniformly."""

    def __init__(self, world: World, *, budget: int, ratio: float = 1.0, by_tasks: bool = False) -> None:
        self.memory = EpisodicMemory(budget, world.max_bytes, world.seed)
        self.scale = world.scale
        self.device = world.device
        self.ratio = ratio
        self.by_tasks = by_tasks
        self.samples_needed = budget

    def sample(self, batch: Batch) -> Batch | None:
        if not len(self.memory):
            self.share = 0.0
            return None
        ratio = len(self.memory.slots) if self.by_tasks else self.ratio
        count = max(1, round(ratio * len(batch)))
        self.share = count / (count + len(batch))
        x, y, task = self.memory.draw(count)
        return Batch(self.scale(x), y.to(self.device), task)

    def end_task(self, closing: Closing) -> None:
        self.memory.store(closing.task, closing.x, closing.y)

    def state_dict(self) -> State:
        return self.memory.state_dict()

    def load_state_dict(self, state: State) -> None:
        self.memory.load_state_dict(state)

    def sizes(self) -> dict[str, Any]:
        memory = self.memory
        return {
            "samples": {task: len(y) for task, (_, y) in memory.slots.items()},
            "capacity": memory.budget if memory.budget > 0 else None,
            "bytes": memory.num_bytes,
            "drawn": memory.drawn,
            "evicted": memory.evicted,
        }
