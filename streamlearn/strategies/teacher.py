"""The solver as it was when a task ended: whoever learns from it gets its outputs as targets."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from streamlearn.models import registry
from streamlearn.models.module_state import load_module_state, module_state

if TYPE_CHECKING:
    from streamlearn.strategies.parts import Closing, State, World


class Teacher:
    """A frozen copy of the solver, in evaluation mode, and the outputs that competed in each task.

    `allowed [T, C]`, or `[1, C]` where one row serves all tasks.
    """

    def __init__(self, world: World, solver: nn.Module, allowed: Tensor) -> None:
        self.world = world
        self.solver = solver.requires_grad_(requires_grad=False).eval()
        self.allowed = allowed

    @classmethod
    def of(cls, world: World, closing: Closing) -> Teacher:
        """Return the solver of a task that has just ended."""
        solver = world.build_network(closing.allowed.shape[1])
        load_module_state(solver, module_state(closing.network))
        allowed = closing.allowed
        return cls(
            world, solver, (allowed if allowed.stride(0) else allowed[:1]).clone()
        )  # an expanded row has stride 0

    @torch.no_grad()
    def logits(self, x: Tensor, task: Tensor) -> Tensor:
        """Return logits `[B, C]` for `x [B, ...]`, -inf where an output did not compete in the sample's `task [B]`."""
        logits: Tensor = self.solver(x)
        allowed = self.allowed if len(self.allowed) == 1 else self.allowed[task.to(logits.device)]
        return logits.masked_fill(~allowed, -torch.inf)

    def grow(self, num_outputs: int) -> None:
        """Be asked for more outputs from now on: it knows nothing of them, and they never compete."""
        allowed = self.allowed.new_zeros(len(self.allowed), num_outputs)
        allowed[:, : self.allowed.shape[1]] = self.allowed
        registry.grow_head(self.solver, num_outputs, self.world.seed)
        self.solver.requires_grad_(requires_grad=False)
        self.allowed = allowed

    def state_dict(self) -> State:
        """Return everything needed to make it again."""
        return {"solver": module_state(self.solver), "allowed": self.allowed}

    @classmethod
    def from_state(cls, world: World, state: State) -> Teacher:
        """Return the teacher that `state_dict` described."""
        solver = world.build_network(state["allowed"].shape[1])
        load_module_state(solver, state["solver"])
        return cls(world, solver, state["allowed"].to(world.device))
