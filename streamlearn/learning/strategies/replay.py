"""Episodic replay: Chaudhry et al. 2019, "On tiny episodic memories in continual learning"; joint training; dark replay.

loss = (1 - share) * mean over new samples + share * mean over replayed samples.
Experience replay draws `ratio` samples for each new one, and all weigh the same (or `balance` sets the share). Joint training
draws k - 1 samples for each new one, where k is the number of tasks: the current task has 1/k of the loss, and all stored
samples divide the rest equally.
Dark experience replay (Buzzega et al. 2020, DER++): loss = CE(new) + alpha * |logits - stored logits|^2 + beta * CE(stored).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from streamlearn.core.samples import Batch
from streamlearn.learning.models.modes import eval_mode
from streamlearn.learning.strategies.replay_share import ReplayShare
from streamlearn.learning.strategies.slots import BuildContext, EndedTask, Replay, State

if TYPE_CHECKING:
    from streamlearn.learning.memory import EpisodicMemory

CHUNK = 512


class EpisodicReplay(Replay):
    """Replays stored samples of past tasks, drawn uniformly.

    `balance`: `batch` gives all samples of a batch the same weight; `tasks` and `counts` are those of `ReplayShare`.
    `by_tasks`: draw one sample for each new one and past task, instead of `ratio` samples for each new one.
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
    """Replays two sets of stored samples: one with its labels, one with the model's logits from the end of the sample's task.

    Stored logits are -inf for outputs that were not active in that task; the loss leaves those out.
    """

    def __init__(
        self, context: BuildContext, memory: EpisodicMemory, *, alpha: float, beta: float, ratio: float
    ) -> None:
        super().__init__(context, memory, ratio=ratio)
        self.alpha = alpha
        self.beta = beta

    def sample(self, batch: Batch) -> Batch | None:
        self.share = 0.0  # the new samples keep their whole weight; the replayed samples have weights of their own
        if not len(self.memory):
            return None
        count = max(1, round(self.ratio * len(batch)))
        drawn = self.memory.draw(2 * count)
        weight = torch.full((2 * count,), self.beta / count, device=self.device)
        weight[count:] = self.alpha / count
        stored_logits = drawn["logits"][count:].to(self.device)
        x, y = self.preprocess(drawn["x"]), drawn["y"].to(self.device)
        return Batch(x, y, drawn["task"], weight, stored_logits, targets_are_logits=True)

    @torch.no_grad()
    def end_task(self, ended: EndedTask) -> None:
        inactive = ~ended.active_outputs[ended.task]
        with eval_mode(ended.network):
            chunks = [
                ended.network(self.preprocess(x)).masked_fill(inactive, -torch.inf).cpu()
                for x in ended.x.split(CHUNK)
                if len(x)
            ]
        if chunks:
            self.memory.store(ended.task, ended.x, ended.y, ended.output_labels, logits=torch.cat(chunks))

    def grow(self, params: object, num_outputs: int) -> None:
        del params
        self.memory.widen("logits", num_outputs, -torch.inf)
