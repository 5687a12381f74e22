"""PackNet: Mallya & Lazebnik 2018, "PackNet: adding multiple tasks to a single network by iterative pruning".

A task trains every weight that has no owner. At the end of the task, the smallest of these weights (a share `prune` of each
layer) are set to zero and stay free. The task owns the others, and trains them on in the refinement: further passes over the
reservoir. Weights of linear and convolution layers can be owned. Biases, normalisation and all other parameters are trained by
the first task only. In a layer named `head`, a task can only own rows of its own outputs.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from streamlearn.core.errors import ConfigurationError
from streamlearn.learning.models import registry
from streamlearn.learning.strategies.slots import BuildContext, Constraint, EndedTask, GradientOf, Network, State
from streamlearn.learning.tensors import clones

if TYPE_CHECKING:
    from collections.abc import Sequence

MASKED_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)
FREE = 255  # in place of an owner: no task owns the weight


class PackedModule(nn.Module):
    """A network and, for each weight of its masked layers, the task that owns it (uint8, so at most 255 tasks)."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.packed: dict[str, str] = {}  # name of a parameter -> name of the buffer with its owners
        names = {name for name, param in self.named_parameters() if param.requires_grad}
        uses = Counter(
            id(layer.weight) for layer in net.modules() if isinstance(getattr(layer, "weight", None), Tensor)
        )
        for name, layer in net.named_modules():
            if isinstance(layer, MASKED_LAYERS) and (layer.weight.requires_grad or not layer.weight.is_leaf):
                key = f"net.{name}.weight" if name else "net.weight"
                if key not in names or uses[id(layer.weight)] > 1:
                    raise ConfigurationError(
                        f"strategy.packnet: layer {name} shares its weight with another layer, or computes it from other "
                        "parameters; accepted: layers with weights of their own",
                    )
                self.packed[key] = f"owner_{len(self.packed)}"
                self.register_buffer(self.packed[key], torch.full_like(layer.weight, FREE, dtype=torch.uint8))

    def owners(self, name: str) -> Tensor:
        """Return the owner of each entry of a weight, by the parameter's name."""
        return self.get_buffer(self.packed[name])

    def forward(self, x: Tensor) -> Tensor:
        """Return the current task's logits `[B, C]`. No mask is needed, since pruned weights are zero."""
        logits: Tensor = self.net(x)
        return logits

    def forward_for_task(self, x: Tensor, task: int) -> Tensor:
        """Return a task's logits `[B, C]`, computed with the weights that this task and the tasks before it own."""
        named = dict(self.named_parameters())
        masked = {
            name.removeprefix("net."): torch.where(self.owners(name) <= task, named[name], 0.0) for name in self.packed
        }
        logits: Tensor = torch.func.functional_call(self.net, masked, (x,))
        return logits


class PackedNetwork(Network):
    """One network whose weights are divided among the tasks. No task can change what another owns."""

    module: PackedModule

    def __init__(self, context: BuildContext, *, prune: float, samples: int) -> None:
        super().__init__(PackedModule(context.build_network(context.num_outputs)))
        self.prune = prune
        self.samples_needed = samples  # for training after the pruning
        self.task = 0
        self.refining = False
        if not self.module.packed:
            kinds = ", ".join(kind.__name__ for kind in MASKED_LAYERS)
            raise ConfigurationError(f"strategy.packnet: the model has no layer that it can mask ({kinds})")
        if any(getattr(layer, "track_running_stats", False) for layer in self.module.modules()):
            message = (
                "strategy.packnet: the model keeps statistics of batches, which every later task would change; "
                "accepted: models without batch normalisation"
            )
            raise ConfigurationError(message)

    @property
    def head(self) -> nn.Linear | None:
        return registry.head_of(self.module.net)

    def begin_task(self, task: int, params: Sequence[Tensor]) -> None:
        del params
        for name in self.module.packed:
            if not bool((self.module.owners(name) == FREE).any()) or task >= FREE:
                layer = name.removeprefix("net.").removesuffix(".weight")
                raise ConfigurationError(f"strategy.packnet: no weight of layer {layer} is free any more")
        self.task, self.refining = task, False

    @torch.no_grad()
    def begin_refinement(self, ended: EndedTask) -> None:
        self.refining = True
        if not len(ended.y):
            return  # a task without a usable sample owns nothing
        named = dict(self.module.named_parameters())
        for name in self.module.packed:
            weight, owners = named[name], self.module.owners(name)
            free = owners == FREE
            own = free & ended.active_outputs[ended.task][:, None] if name == "net.head.weight" else free
            count = round(self.prune * int(own.sum()))
            sizes = torch.where(own, weight.abs(), torch.inf).flatten()
            own = own.flatten().index_fill(0, sizes.argsort(stable=True)[:count], value=False).reshape(weight.shape)
            owners[own] = ended.task
            weight[free & ~own] = 0.0

    def forward(self, x: Tensor, task: Tensor) -> Tensor:
        tasks = task.unique().tolist()
        if tasks == [self.task]:
            return self.module(x)  # type: ignore[no-any-return]  # modules are typed to return anything
        rows_of = {one: (task == one).to(x.device) for one in tasks}
        logits_of = {
            one: self.module(x[rows]) if one == self.task else self.module.forward_for_task(x[rows], one)
            for one, rows in rows_of.items()
        }
        logits = torch.zeros(len(x), next(iter(logits_of.values())).shape[1], device=x.device)
        for one, rows in rows_of.items():
            logits[rows] = logits_of[one]
        return logits

    def trainable_entries(self) -> dict[str, Tensor]:
        """Return, for each parameter, which entries the current task may change: booleans of its shape."""
        trained_owner = self.task if self.refining else FREE
        all_owners = [self.module.owners(name) for name in self.module.packed]
        is_first = not any(bool(((owners != FREE) & (owners != self.task)).any()) for owners in all_owners)
        return {
            name: self.module.owners(name) == trained_owner
            if name in self.module.packed
            else torch.full_like(param, is_first, dtype=torch.bool)
            for name, param in self.trainable_parameters().items()
        }

    def metrics(self) -> dict[str, float]:
        all_owners = [self.module.owners(name) for name in self.module.packed]
        free = sum(int((owners == FREE).sum()) for owners in all_owners)
        return {**super().metrics(), "free_ratio": free / sum(owners.numel() for owners in all_owners)}

    def state_dict(self) -> State:
        return {"task": self.task, "refining": self.refining}

    def load_state_dict(self, state: State) -> None:
        self.task, self.refining = state["task"], state["refining"]


class OwnershipConstraint(Constraint):
    """Keeps every entry that the current task may not change at its value, against momentum and weight decay."""

    def __init__(self, network: PackedNetwork) -> None:
        self.network = network
        self._trainable: list[Tensor] = []  # empty: compute it at the next step; the owners decide it
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
            self._frozen_values = clones(params)
        for grad, trainable in zip(grads, self._trainable, strict=True):
            grad.masked_fill_(~trainable, 0.0)

    @torch.no_grad()
    def restore_frozen(self, params: Sequence[Tensor]) -> None:
        for param, trainable, frozen in zip(params, self._trainable, self._frozen_values, strict=True):
            param.copy_(torch.where(trainable, param, frozen))
