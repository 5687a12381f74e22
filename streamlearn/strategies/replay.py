"""Episodic replay: Chaudhry et al. 2019, "On tiny episodic memories in continual learning"; joint training; dark replay.

loss = (1 - share) * mean over new samples + share * mean over replayed samples.
ER draws `ratio` samples for each new one, and all weigh the same (or by tasks, or by counts). Joint training draws k - 1 for
each new one, where k is the number of tasks: the current one has 1/k of the loss, and all stored samples share the rest.
Dark experience replay (Buzzega et al. 2020, DER++): loss = CE(new) + alpha * |logits - stored logits|^2 + beta * CE(stored).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from streamlearn.data import Batch
from streamlearn.models.modes import eval_mode
from streamlearn.strategies.parts import Closing, Replay, State, World
from streamlearn.strategies.shares import Shares

if TYPE_CHECKING:
    from streamlearn.memory import EpisodicMemory

CHUNK = 512


class EpisodicReplay(Replay):
    """Replays stored samples of past tasks, drawn uniformly; `balance`: `batch` (all weigh the same), or as `Shares` has it."""

    def __init__(
        self,
        world: World,
        memory: EpisodicMemory,
        *,
        ratio: float = 1.0,
        by_tasks: bool = False,
        balance: str = "batch",
    ) -> None:
        self.memory = memory
        self.scale = world.scale
        self.device = world.device
        self.ratio = ratio
        self.by_tasks = by_tasks
        self.balance = balance
        self.shares = Shares(balance)
        self.samples_needed = memory.budget
        self.samples_balanced = memory.balanced

    def sample(self, batch: Batch) -> Batch | None:
        self.shares.see(len(batch))
        if not len(self.memory):
            self.share = 0.0
            return None
        ratio = len(self.memory.samples_by_task) if self.by_tasks else self.ratio
        count = max(1, round(ratio * len(batch)))
        self.share = count / (count + len(batch)) if self.balance == "batch" else self.shares.of_the_past
        return self._draw(count)

    def _draw(self, count: int) -> Batch:
        drawn = self.memory.draw(count)
        return Batch(self.scale(drawn["x"]), drawn["y"].to(self.device), drawn["task"])

    def end_task(self, closing: Closing) -> None:
        self.shares.end_task(closing.task)
        self.memory.store(closing.task, closing.x, closing.y, closing.classes)

    def state_dict(self) -> State:
        return {**self.memory.state_dict(), "shares": self.shares.state_dict()}

    def load_state_dict(self, state: State) -> None:
        self.memory.load_state_dict(state)
        self.shares.load_state_dict(state["shares"])

    def sizes(self) -> dict[str, Any]:
        return self.memory.usage()


class DarkReplay(EpisodicReplay):
    """Replays stored samples twice over: some toward the logits that the solver had for them when their task ended, some hard.

    The logits say nothing of outputs that did not compete then.
    """

    def __init__(self, world: World, memory: EpisodicMemory, *, alpha: float, beta: float, ratio: float) -> None:
        super().__init__(world, memory, ratio=ratio)
        self.alpha = alpha
        self.beta = beta

    def sample(self, batch: Batch) -> Batch | None:
        self.share = 0.0  # the new samples keep their whole weight, and the replayed ones have their own beside it
        if not len(self.memory):
            return None
        count = max(1, round(self.ratio * len(batch)))
        drawn = self.memory.draw(2 * count)
        weight = torch.full((2 * count,), self.beta / count, device=self.device)
        weight[count:] = self.alpha / count
        soft = drawn["logits"][count:].to(self.device)
        x, y = self.scale(drawn["x"]), drawn["y"].to(self.device)
        return Batch(x, y, drawn["task"], weight, soft, targets_are_logits=True)

    @torch.no_grad()
    def end_task(self, closing: Closing) -> None:
        forbidden = ~closing.allowed[closing.task]
        with eval_mode(closing.network):
            parts = [
                closing.network(self.scale(x)).masked_fill(forbidden, -torch.inf).cpu()
                for x in closing.x.split(CHUNK)
                if len(x)
            ]
        if parts:
            self.memory.store(closing.task, closing.x, closing.y, closing.classes, logits=torch.cat(parts))

    def grow(self, params: object, num_outputs: int) -> None:
        del params
        self.memory.widen("logits", num_outputs, -torch.inf)
