"""The teacher: a frozen copy of the model from the end of a task, whose outputs are targets for later updates."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from streamlearn.learning.models import registry
from streamlearn.learning.models.module_state import load_module_state, module_state
from streamlearn.learning.tensors import padded

if TYPE_CHECKING:
    from streamlearn.learning.strategies.slots import BuildContext, EndedTask, State


class Teacher:
    """A frozen copy of the model, in evaluation mode, and the active outputs of each task.

    `active_outputs` is `[T, C]`, or `[1, C]` if one row serves all tasks.
    """

    def __init__(self, context: BuildContext, network: nn.Module, active_outputs: Tensor) -> None:
        self.context = context
        self.network = network.requires_grad_(requires_grad=False).eval()
        self.active_outputs = active_outputs

    @classmethod
    def from_ended_task(cls, context: BuildContext, ended: EndedTask) -> Teacher:
        """Return a copy of the model at the end of a task."""
        network = context.build_network(ended.active_outputs.shape[1])
        load_module_state(network, module_state(ended.network))
        active = ended.active_outputs
        one_row_serves_all = active.stride(0) == 0  # an expanded tensor repeats its only row
        return cls(context, network, (active[:1] if one_row_serves_all else active).clone())

    @torch.no_grad()
    def logits(self, x: Tensor, task: Tensor) -> Tensor:
        """Return logits `[B, C]` for `x [B, ...]`; they are -inf for outputs that are not active in a sample's `task [B]`."""
        logits: Tensor = self.network(x)
        active = self.active_outputs if len(self.active_outputs) == 1 else self.active_outputs[task.to(logits.device)]
        return logits.masked_fill(~active, -torch.inf)

    def grow(self, num_outputs: int) -> None:
        """Add outputs, up to `num_outputs`. The new outputs are never active, because the teacher has not learned them."""
        active = self.active_outputs
        self.active_outputs = padded(active, active.new_zeros(len(active), num_outputs))
        registry.grow_head(self.network, num_outputs, self.context.seed)
        self.network.requires_grad_(requires_grad=False)

    def state_dict(self) -> State:
        """Return everything from which `from_state` builds the teacher."""
        return {"solver": module_state(self.network), "allowed": self.active_outputs}

    @classmethod
    def from_state(cls, context: BuildContext, state: State) -> Teacher:
        """Build the teacher from what `state_dict` returned."""
        network = context.build_network(state["allowed"].shape[1])
        load_module_state(network, state["solver"])
        return cls(context, network, state["allowed"].to(context.device))
