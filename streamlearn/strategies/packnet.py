"""PackNet: Mallya & Lazebnik 2018, "PackNet: adding multiple tasks to a single network by iterative pruning".

A task trains every weight that no task owns. At its end the smallest `prune` of these, layer by layer, are set to zero and
stay free; the survivors are trained on (the refinement: further passes over the reservoir) and then belong to the task.
Weights of linear and convolution layers are packed; biases, normalisation and all else belong to the first task and then hold.
Of a layer named `head`, a task competes only for the rows of its own outputs.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from streamlearn.data import StreamlearnError
from streamlearn.models import registry
from streamlearn.strategies.slots import BuildContext, Constraint, EndedTask, GradientOf, Network, State

if TYPE_CHECKING:
    from collections.abc import Sequence

MASKED_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)
FREE = 255  # owner of a weight that belongs to no task


class PackedModule(nn.Module):
    """A network and, for each of its packed weights, the task that owns it (uint8, so at most 255 tasks)."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.packed: dict[str, str] = {}  # parameter -> buffer of its owners
        names = {name for name, param in self.named_parameters() if param.requires_grad}
        uses = Counter(
            id(layer.weight) for layer in net.modules() if isinstance(getattr(layer, "weight", None), Tensor)
        )
        for name, layer in net.named_modules():
            if isinstance(layer, MASKED_LAYERS) and (layer.weight.requires_grad or not layer.weight.is_leaf):
                key = f"net.{name}.weight" if name else "net.weight"
                if key not in names or uses[id(layer.weight)] > 1:
                    raise StreamlearnError(
                        f"strategy.packnet: the weight of layer {name} is computed of others, or another layer's, too",
                        code=78,
                    )
                self.packed[key] = f"owner_{len(self.packed)}"
                self.register_buffer(self.packed[key], torch.full_like(layer.weight, FREE, dtype=torch.uint8))

    def owners(self, name: str) -> Tensor:
        """Return who owns each entry of a packed weight."""
        return self.get_buffer(self.packed[name])

    def forward(self, x: Tensor) -> Tensor:
        """Return logits `[B, C]`: the current task runs unmasked, since what was pruned is zero."""
        logits: Tensor = self.net(x)
        return logits

    def forward_for_task(self, x: Tensor, task: int) -> Tensor:
        """Return the logits that a task's own weights, and those of the tasks before it, give."""
        named = dict(self.named_parameters())
        masked = {
            name.removeprefix("net."): torch.where(self.owners(name) <= task, named[name], 0.0) for name in self.packed
        }
        logits: Tensor = torch.func.functional_call(self.net, masked, (x,))
        return logits


class PackedNetwork(Network):
    """One network that tasks share out among themselves, weight by weight; none can change what another owns."""

    module: PackedModule

    def __init__(self, context: BuildContext, *, prune: float, samples: int) -> None:
        super().__init__(PackedModule(context.build_network(context.num_outputs)))
        self.prune = prune
        self.samples_needed = samples  # to be trained on after pruning
        self.task = 0
        self.refining = False
        if not self.module.packed:
            kinds = ", ".join(kind.__name__ for kind in MASKED_LAYERS)
            raise StreamlearnError(f"strategy.packnet: the model has no layer that it can mask ({kinds})", code=78)
        if any(getattr(layer, "track_running_stats", False) for layer in self.module.modules()):
            message = "strategy.packnet: the model keeps statistics of batches, which every later task would change"
            raise StreamlearnError(message, code=78)

    @property
    def head(self) -> nn.Linear | None:
        return registry.head_of(self.module.net)

    def begin_task(self, task: int, params: Sequence[Tensor]) -> None:
        del params
        for name in self.module.packed:
            if not bool((self.module.owners(name) == FREE).any()) or task >= FREE:
                layer = name.removeprefix("net.").removesuffix(".weight")
                raise StreamlearnError(f"strategy.packnet: no weight of layer {layer} is free any more", code=78)
        self.task, self.refining = task, False

    @torch.no_grad()
    def begin_refinement(self, ended: EndedTask) -> None:
        self.refining = True
        if not len(ended.y):
            return  # a task without a usable sample claims nothing
        named = dict(self.module.named_parameters())
        for name in self.module.packed:
            weight, owner = named[name], self.module.owners(name)
            free = owner == FREE
            own = free & ended.active_outputs[ended.task][:, None] if name == "net.head.weight" else free
            count = round(self.prune * int(own.sum()))
            sizes = torch.where(own, weight.abs(), torch.inf).flatten()
            own = own.flatten().index_fill(0, sizes.argsort(stable=True)[:count], value=False).reshape(weight.shape)
            owner[own] = ended.task
            weight[free & ~own] = 0.0

    def forward(self, x: Tensor, task: Tensor) -> Tensor:
        found = task.unique().tolist()
        if found == [self.task]:
            return self.module(x)  # type: ignore[no-any-return]  # modules are typed to return anything
        parts = {number: (task == number).to(x.device) for number in found}
        logits = {
            n: self.module(x[rows]) if n == self.task else self.module.forward_for_task(x[rows], n)
            for n, rows in parts.items()
        }
        together = torch.zeros(len(x), next(iter(logits.values())).shape[1], device=x.device)
        for number, rows in parts.items():
            together[rows] = logits[number]
        return together

    def trainable_entries(self) -> dict[str, Tensor]:
        """Return, for each parameter, which of its entries the current task may move, as booleans of its shape."""
        mine = self.task if self.refining else FREE
        owners = [self.module.owners(name) for name in self.module.packed]
        first = not any(bool(((owner != FREE) & (owner != self.task)).any()) for owner in owners)
        return {
            name: self.module.owners(name) == mine
            if name in self.module.packed
            else torch.full_like(param, first, dtype=torch.bool)
            for name, param in self.trainable_parameters().items()
        }

    def metrics(self) -> dict[str, float]:
        owners = [self.module.owners(name) for name in self.module.packed]
        free = sum(int((owner == FREE).sum()) for owner in owners)
        return {**super().metrics(), "free_ratio": free / sum(owner.numel() for owner in owners)}

    def state_dict(self) -> State:
        return {"task": self.task, "refining": self.refining}

    def load_state_dict(self, state: State) -> None:
        self.task, self.refining = state["task"], state["refining"]


class OwnershipConstraint(Constraint):
    """Keeps every entry that the current task may not move where it was, whatever momentum and weight decay would do to it."""

    def __init__(self, network: PackedNetwork) -> None:
        self.network = network
        self._trainable: list[Tensor] = []  # found anew at every boundary: it follows from the owners
        self._frozen_values: list[Tensor] = []

    def begin_task(self, task: int, params: Sequence[Tensor]) -> None:
        del task, params
        self._trainable = []

    def begin_refinement(self, ended: EndedTask) -> None:
        del ended
        self._trainable = []

    @torch.no_grad()
    def project_gradient(self, params: Sequence[Tensor], grads: Sequence[Tensor], gradient_of: GradientOf) -> None:
        del gradient_of
        if not self._trainable:
            self._trainable = list(self.network.trainable_entries().values())
            self._frozen_values = [param.detach().clone() for param in params]
        for grad, learns in zip(grads, self._trainable, strict=True):
            grad.masked_fill_(~learns, 0.0)

    @torch.no_grad()
    def restore_frozen(self, params: Sequence[Tensor]) -> None:
        for param, learns, held in zip(params, self._trainable, self._frozen_values, strict=True):
            param.copy_(torch.where(learns, param, held))
