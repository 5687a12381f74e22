"""Synaptic intelligence: Zenke, Poole & Ganguli 2017, "Continual learning through synaptic intelligence"."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from streamlearn.learning.strategies.importance import PathImportance
from streamlearn.learning.tensors import clones, from_numbered, numbered, padded_all, zeros

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from streamlearn.learning.strategies.slots import BuildContext, EndedTask, State


class PathIntegral(PathImportance):
    """How much each parameter's path through a task has lowered the task's loss.

    `w -= g * (theta - before)` at every step, where g is the gradient of the loss *without* the penalty (eq. 3). At the end
    of the task `omega = relu(w) / (moved^2 + xi)` (eq. 5).
    """

    def __init__(self, context: BuildContext, *, xi: float) -> None:
        self.device = context.device
        self.xi = xi
        self.path: list[Tensor] = []  # w
        self.start: list[Tensor] = []  # the parameters when the task began
        self._before: list[Tensor] = []  # the parameters before the current step
        self.gradient: list[Tensor] = []

    def begin_task(self, params: Sequence[Tensor]) -> None:
        self.path, self.start, self._before = zeros(params), clones(params), clones(params)
        self.gradient = zeros(params)

    @torch.no_grad()
    def after_step(self, params: Sequence[Tensor], finite: Tensor) -> None:
        self.add_path_integral(self.path, self._before, params, finite)

    @torch.no_grad()
    def compute(self, ended: EndedTask) -> list[Tensor]:
        moved = [(param - start).square() for param, start in zip(ended.params, self.start, strict=True)]
        return [path.relu() / (square + self.xi) for path, square in zip(self.path, moved, strict=True)]

    def grow(self, params: Sequence[Tensor]) -> None:
        if self.path:
            self.path, self.gradient = padded_all(self.path, params), padded_all(self.gradient, params)
            self.start = padded_all(self.start, params, copy_rest=True)
            self._before = padded_all(self._before, params, copy_rest=True)

    def state_dict(self) -> State:
        return {"path": numbered(self.path), "start": numbered(self.start), "before": numbered(self._before)}

    def load_state_dict(self, state: State) -> None:
        self.path, self.start, self._before = (
            from_numbered(state[key], self.device) for key in ("path", "start", "before")
        )
        self.gradient = zeros(self.path)
