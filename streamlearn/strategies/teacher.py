"""The solver as it was when a task ended: whoever learns from it gets its outputs as targets."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from streamlearn.models import registry
from streamlearn.models.module_state import load_module_state, module_state

if TYPE_CHECKING:
    from streamlearn.strategies.slots import BuildContext, EndedTask, State


class Teacher:
    """A frozen copy of the solver, in evaluation mode, and the outputs that competed in each task.

    `allowed [T, C]`, or `[1, C]` where one row serves all tasks.
    """

    def __init__(self, context: BuildContext, solver: nn.Module, active_outputs: Tensor) -> None:
        self.context = context
        self.solver = solver.requires_grad_(requires_grad=False).eval()
        self.active_outputs = active_outputs

    @classmethod
    def from_ended_task(cls, context: BuildContext, ended: EndedTask) -> Teacher:
        """Return the solver of a task that has just ended."""
        solver = context.build_network(ended.active_outputs.shape[1])
        load_module_state(solver, module_state(ended.network))
        allowed = ended.active_outputs
        return cls(
            context, solver, (allowed if allowed.stride(0) else allowed[:1]).clone()
        )  # an expanded row has stride 0

    @torch.no_grad()
    def logits(self, x: Tensor, task: Tensor) -> Tensor:
        """Return logits `[B, C]` for `x [B, ...]`, -inf where an output did not compete in the sample's `task [B]`."""
        logits: Tensor = self.solver(x)
        allowed = self.active_outputs if len(self.active_outputs) == 1 else self.active_outputs[task.to(logits.device)]
        return logits.masked_fill(~allowed, -torch.inf)

    def grow(self, num_outputs: int) -> None:
        """Be asked for more outputs from now on: it knows nothing of them, and they never compete."""
        allowed = self.active_outputs.new_zeros(len(self.active_outputs), num_outputs)
        allowed[:, : self.active_outputs.shape[1]] = self.active_outputs
        registry.grow_head(self.solver, num_outputs, self.context.seed)
        self.solver.requires_grad_(requires_grad=False)
        self.active_outputs = allowed

    def state_dict(self) -> State:
        """Return everything needed to make it again."""
        return {"solver": module_state(self.solver), "allowed": self.active_outputs}

    @classmethod
    def from_state(cls, context: BuildContext, state: State) -> Teacher:
        """Return the teacher that `state_dict` described."""
        solver = context.build_network(state["allowed"].shape[1])
        load_module_state(solver, state["solver"])
        return cls(context, solver, state["allowed"].to(context.device))
