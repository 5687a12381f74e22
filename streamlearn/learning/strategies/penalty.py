"""The quadratic penalty of EWC, SI, MAS, RWalk and L2, for any importance, in closed form.

T penalties of strength/2 * sum_k b_k (theta - theta_k)^2 are exactly equal to one penalty with two vectors,
`precision = sum b_k` and `weighted_anchor = sum b_k theta_k`. Its gradient is
strength * (precision * theta - weighted_anchor). Neither memory nor time grows with the number of tasks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from streamlearn.learning.strategies.slots import BuildContext, EndedTask, Penalty, State
from streamlearn.learning.tensors import from_numbered, numbered, padded_all, zeros

if TYPE_CHECKING:
    from collections.abc import Sequence

    from streamlearn.learning.strategies.importance import Importance


class ImportancePenalty(Penalty):
    """Penalises the distance of each parameter from its value after past tasks, weighted by its importance.

    `anchor`: `all` keeps the value after each task (Huszar 2018); `last` uses the newest value for all tasks (online EWC and
    SI, Schwarz et al. 2018). `decay` multiplies the older importances at the end of each task. `proximal` takes the implicit
    step theta <- (theta' + rate * strength * weighted_anchor) / (1 + rate * strength * precision), which is stable at any
    strength, instead of adding the penalty's gradient.
    """

    def __init__(
        self,
        context: BuildContext,
        importance: Importance,
        strength: float,
        *,
        anchor: str,
        decay: float,
        proximal: bool,
    ) -> None:
        self.device = context.device
        self.importance = importance
        self.strength = strength
        self.anchor = anchor
        self.decay = decay
        self.proximal = proximal
        self.samples_needed = importance.samples_needed
        self.precision: list[Tensor] = []  # empty until a task has ended
        self.weighted_anchor: list[Tensor] = []

    def begin_task(self, task: int, params: Sequence[Tensor]) -> None:
        del task
        self.importance.begin_task(params)

    @torch.no_grad()
    def add_gradient(self, params: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
        self.importance.see_gradient(grads)
        if not self.precision or self.proximal:
            return
        torch._foreach_sub_(list(grads), self.weighted_anchor, alpha=self.strength)
        torch._foreach_addcmul_(list(grads), self.precision, list(params), self.strength)

    @torch.no_grad()
    def proximal_step(self, params: Sequence[Tensor], rate: float, finite: Tensor) -> None:
        if self.precision and self.proximal:
            factor = rate * self.strength * finite  # 0 leaves every bit as it was
            for param, precision, anchor in zip(params, self.precision, self.weighted_anchor, strict=True):
                param.add_(factor * anchor).div_(1 + factor * precision)

    def after_step(self, params: Sequence[Tensor], finite: Tensor) -> None:
        self.importance.after_step(params, finite)

    @torch.no_grad()
    def end_task(self, ended: EndedTask) -> None:
        # a sample far out of range can overflow; an importance that is not finite would spoil every later update
        new = [torch.where(value.isfinite(), value, 0.0) for value in self.importance.compute(ended)]
        old_precision = self.precision or zeros(new)
        old_anchor = self.weighted_anchor or zeros(new)
        self.precision = [self.decay * old + value for old, value in zip(old_precision, new, strict=True)]
        if self.anchor == "last":
            self.weighted_anchor = [b * param for b, param in zip(self.precision, ended.params, strict=True)]
        else:
            self.weighted_anchor = [
                self.decay * old + value * param
                for old, value, param in zip(old_anchor, new, ended.params, strict=True)
            ]

    def grow(self, params: Sequence[Tensor], num_outputs: int) -> None:
        del num_outputs
        self.importance.grow(params)
        if self.precision:
            self.precision = padded_all(self.precision, params)
            self.weighted_anchor = padded_all(self.weighted_anchor, params)

    def metrics(self) -> dict[str, float]:
        if not self.precision:
            return {}
        return {"norm": float(torch.linalg.vector_norm(torch.stack([p.norm() for p in self.precision])))}

    def state_dict(self) -> State:
        return {
            "importance": self.importance.state_dict(),
            "precision": numbered(self.precision),
            "weighted_anchor": numbered(self.weighted_anchor),
        }

    def load_state_dict(self, state: State) -> None:
        self.importance.load_state_dict(state["importance"])
        self.precision = from_numbered(state["precision"], self.device)
        self.weighted_anchor = from_numbered(state["weighted_anchor"], self.device)
