"""Riemannian walk: Chaudhry et al. 2018, "Riemannian walk for incremental learning"."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from streamlearn.learning.strategies.importance import PathImportance
from streamlearn.learning.tensors import clones, from_numbered, numbered, padded_all, zeros

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from streamlearn.learning.strategies.slots import BuildContext, EndedTask, State


class RiemannianWalk(PathImportance):
    """A moving Fisher information, plus a score of how much each parameter's path has lowered the loss.

    Every step: `F <- keep * F + (1 - keep) * B * g^2`, where the factor B, the batch size, makes the squared mean gradient of
    a batch comparable to the mean of squared gradients; and the decrease of the loss, `-g * (theta - before)`, is summed.
    Every `interval` steps (eq. 8): `score += relu(decrease) / (F * moved^2 / 2 + epsilon)`. At the end of a task, Fisher
    information and score are each divided by their largest value; the score is averaged with that of the tasks before; the
    sum of both is the importance for all tasks so far (eq. 9).
    """

    def __init__(self, context: BuildContext, *, keep: float, interval: int, epsilon: float = 1e-3) -> None:
        self.device = context.device
        self.batch_size = context.batch_size
        self.keep = keep
        self.interval = interval
        self.epsilon = epsilon
        self.steps = 0  # since the last score
        self.fisher: list[Tensor] = []
        self.past: list[Tensor] = []  # the normalised score of the tasks before
        # of the current task: `score`, `decrease`, `before` (the parameters before the current step), and `mark` (the
        # parameters at the last score)
        self._walk: dict[str, list[Tensor]] = {}
        self.gradient: list[Tensor] = []

    def begin_task(self, params: Sequence[Tensor]) -> None:
        self.fisher = self.fisher or zeros(params)
        self.past = self.past or zeros(params)
        self.steps = 0
        self._walk = {
            "score": zeros(params), "decrease": zeros(params), "before": clones(params), "mark": clones(params)
        }  # fmt: skip
        self.gradient = zeros(params)

    @torch.no_grad()
    def after_step(self, params: Sequence[Tensor], finite: Tensor) -> None:
        self.add_path_integral(self._walk["decrease"], self._walk["before"], params, finite)
        # a dropped step changes nothing: the factor is 1, and its gradient was set to 0
        torch._foreach_mul_(self.fisher, 1 - (1 - self.keep) * finite)
        torch._foreach_addcmul_(self.fisher, self.gradient, self.gradient, (1 - self.keep) * self.batch_size)
        self.steps += 1
        if self.steps == self.interval:
            self._add_score(params)

    def _add_score(self, params: Sequence[Tensor]) -> None:
        walk = self._walk
        for score, decrease, mark, fisher, param in zip(
            walk["score"], walk["decrease"], walk["mark"], self.fisher, params, strict=True
        ):
            distance = 0.5 * fisher * (param - mark).square() + self.epsilon
            score.add_(decrease.relu_().div_(distance))
            decrease.zero_()
            mark.copy_(param)
        self.steps = 0

    @torch.no_grad()
    def compute(self, ended: EndedTask) -> list[Tensor]:
        if self.steps:
            self._add_score(ended.params)
        score, fisher = _normalised(self._walk["score"]), _normalised(self.fisher)
        # the first task has no earlier score to be averaged with
        self.past = score if ended.task == 0 else [(old + new) / 2 for old, new in zip(self.past, score, strict=True)]
        return [a + b for a, b in zip(fisher, self.past, strict=True)]

    def grow(self, params: Sequence[Tensor]) -> None:
        if not self.fisher:
            return
        self.fisher, self.past = padded_all(self.fisher, params), padded_all(self.past, params)
        self.gradient = padded_all(self.gradient, params)
        for name, values in self._walk.items():
            self._walk[name] = padded_all(values, params, copy_rest=name in {"before", "mark"})

    def state_dict(self) -> State:
        named = {"fisher": self.fisher, "past": self.past, **self._walk}
        return {**{name: numbered(values) for name, values in named.items()}, "steps": self.steps}

    def load_state_dict(self, state: State) -> None:
        self.steps = state["steps"]
        loaded = {name: from_numbered(values, self.device) for name, values in state.items() if name != "steps"}
        self.fisher, self.past = loaded.pop("fisher"), loaded.pop("past")
        self._walk = loaded
        self.gradient = zeros(self.fisher)


def _normalised(values: Sequence[Tensor]) -> list[Tensor]:
    """Return values divided by the largest of all, or unchanged if none is above 0."""
    largest = torch.stack([value.max() for value in values]).max()
    return [value / torch.where(largest > 0, largest, 1.0) for value in values]
