"""The importance of each parameter for an ended task: the base class, and what several methods share.

Each method has a module of its own: `l2`, `ewc`, `si`, `mas` and `rwalk`. `penalty.ImportancePenalty` uses them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from streamlearn.learning.models.modes import differentiable_eval_mode
from streamlearn.learning.tensors import copy_into, zeros

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from streamlearn.learning.strategies.slots import BuildContext, EndedTask, State

CHUNK = 256


class Importance:
    """Computes the importance of each parameter when a task ends. By default it records nothing during the task."""

    samples_needed: int = 0  # samples of the ended task that `compute` needs: 0, a number, or memory.ALL

    def begin_task(self, params: Sequence[Tensor]) -> None:
        """Prepare for a task with these parameters."""

    def see_gradient(self, grads: Sequence[Tensor]) -> None:
        """Record the gradient of the loss, without the penalty's."""

    def after_step(self, params: Sequence[Tensor], finite: Tensor) -> None:
        """Record how the parameters moved; `finite` is false if the optimizer step was dropped."""

    def compute(self, ended: EndedTask) -> list[Tensor]:
        """Return the importance of every parameter for the ended task."""
        raise NotImplementedError

    def grow(self, params: Sequence[Tensor]) -> None:
        """Adapt to parameters whose shapes have grown."""

    def state_dict(self) -> State:
        """Return everything that a restart needs to continue bit-equal."""
        return {}

    def load_state_dict(self, state: State) -> None:
        """Restore what `state_dict` returned."""


def mean_over_samples(
    total: Callable[[nn.Module, Tensor, Tensor], Iterator[list[Tensor]]], context: BuildContext, ended: EndedTask
) -> list[Tensor]:
    """Return the mean over the ended task's samples, with the network in evaluation mode.

    `total(network, x, y)` yields tensors for each parameter; their sum is the total over a chunk of samples.
    """
    sums = zeros(ended.params)
    if not len(ended.y):
        return sums
    with differentiable_eval_mode(ended.network):
        for x, y in zip(ended.x.split(CHUNK), ended.y.split(CHUNK), strict=True):
            for values in total(ended.network, context.preprocess(x), y.to(context.device)):
                torch._foreach_add_(sums, values)
    return [value / len(ended.y) for value in sums]


class PathImportance(Importance):
    """An importance that depends on the path of the parameters through a task: SI and RWalk."""

    gradient: list[Tensor]  # of the loss in the current step, without the penalty's

    @torch.no_grad()
    def see_gradient(self, grads: Sequence[Tensor]) -> None:
        copy_into(self.gradient, grads)

    def add_path_integral(
        self, path: list[Tensor], before: list[Tensor], params: Sequence[Tensor], finite: Tensor
    ) -> None:
        """Add `gradient * (before - params)` to `path`, then copy `params` into `before`.

        A dropped step adds nothing: its gradient is set to 0, in place.
        """
        zero = torch.zeros((), device=finite.device)
        for value in self.gradient:
            torch.where(finite, value, zero, out=value)  # the parameters did not move, but 0 * NaN is NaN
        torch._foreach_sub_(before, list(params))
        torch._foreach_addcmul_(path, self.gradient, before)
        copy_into(before, params)
