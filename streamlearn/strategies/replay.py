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
from streamlearn.strategies.replay_share import ReplayShare
from streamlearn.strategies.slots import BuildContext, EndedTask, Replay, State

if TYPE_CHECKING:
    from streamlearn.memory import EpisodicMemory

CHUNK = 512


class EpisodicReplay(Replay):
    """Replays stored samples of past tasks, drawn uniformly.

    With `balance: batch` all samples of a batch weigh the same; otherwise `ReplayShare` gives the weight of the replayed ones.
    """

    def __init__(
        self,
        context: BuildContext,
        memory: EpisodicMemory,
        *,
        ratio: float = 1.0,
        by_tasks: bool = False,
        balance: str = "batch",
    ) -> None:
        self.memory = memory
        self.preprocess = context.preprocess
        self.device = context.device
        self.ratio = ratio
        self.by_tasks = by_tasks
        self.balance = balance
        self.replay_share = ReplayShare(balance)
        self.samples_needed = memory.budget
        self.needs_balanced_samples = memory.balanced

    def sample(self, batch: Batch) -> Batch | None:
        self.replay_share.add_samples(len(batch))
        if not len(self.memory):
            self.share = 0.0
            return None
        ratio = len(self.memory.samples_by_task) if self.by_tasks else self.ratio
        count = max(1, round(ratio * len(batch)))
        self.share = count / (count + len(batch)) if self.balance == "batch" else self.replay_share.value
        return self._draw(count)

    def _draw(self, count: int) -> Batch:
        drawn = self.memory.draw(count)
        return Batch(self.preprocess(drawn["x"]), drawn["y"].to(self.device), drawn["task"])

    def end_task(self, ended: EndedTask) -> None:
        self.replay_share.end_task(ended.task)
        self.memory.store(ended.task, ended.x, ended.y, ended.output_labels)

    def state_dict(self) -> State:
        return {**self.memory.state_dict(), "shares": self.replay_share.state_dict()}

    def load_state_dict(self, state: State) -> None:
        self.memory.load_state_dict(state)
        self.replay_share.load_state_dict(state["shares"])

    def memory_usage(self) -> dict[str, Any]:
        return self.memory.usage()


class DarkReplay(EpisodicReplay):
    """Replays stored samples twice over: some toward the logits that the solver had for them when their task ended, some hard.

    The logits say nothing of outputs that did not compete then.
    """

    def __init__(
        self, context: BuildContext, memory: EpisodicMemory, *, alpha: float, beta: float, ratio: float
    ) -> None:
        super().__init__(context, memory, ratio=ratio)
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
        x, y = self.preprocess(drawn["x"]), drawn["y"].to(self.device)
        return Batch(x, y, drawn["task"], weight, soft, targets_are_logits=True)

    @torch.no_grad()
    def end_task(self, ended: EndedTask) -> None:
        forbidden = ~ended.active_outputs[ended.task]
        with eval_mode(ended.network):
            parts = [
                ended.network(self.preprocess(x)).masked_fill(forbidden, -torch.inf).cpu()
                for x in ended.x.split(CHUNK)
                if len(x)
            ]
        if parts:
            self.memory.store(ended.task, ended.x, ended.y, ended.output_labels, logits=torch.cat(parts))

    def grow(self, params: object, num_outputs: int) -> None:
        del params
        self.memory.widen("logits", num_outputs, -torch.inf)
