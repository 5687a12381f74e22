"""The four slots of a strategy: network, replay, penalty and constraint.

The class of each slot does nothing beyond plain training. A strategy whose four slots hold these classes is `naive`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from streamlearn.learning.models import registry

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from streamlearn.core.labels import Label
    from streamlearn.core.samples import Batch

State = dict[str, Any]  # tensors, numbers, strings, lists and dicts: what safetensors and JSON can store
GradientOf = Callable[["Batch"], list[Tensor]]  # see `Constraint.project_gradient`


@dataclass(frozen=True)
class BuildContext:
    """What a slot may read when it is built."""

    seed: int
    device: torch.device
    input_shape: tuple[int, ...]  # of the network's input
    num_outputs: int
    max_bytes: int  # limit on the bytes of a memory
    preprocess: Callable[[Tensor], Tensor]  # turns samples as they arrived into the network's input, on the device
    build_network: Callable[..., nn.Module]  # (num_outputs, seed_offset=0) -> an untrained network on the device
    batch_size: int = 1
    task_names: tuple[str, ...] = ()  # of all tasks; empty if the configuration does not list the topics
    token_ids: bool = False  # whether the network's input is token ids, int32; otherwise it is float32
    max_norm: float | None = None  # gradients are clipped to this norm; None: no clipping

    def zero_inputs(self, count: int) -> Tensor:
        """Return `count` network inputs of zeros: `[count, *input_shape]`."""
        dtype = torch.int32 if self.token_ids else torch.float32
        return torch.zeros(count, *self.input_shape, dtype=dtype, device=self.device)


@dataclass(frozen=True)
class EndedTask:
    """A read-only view of a task whose last record was learned. T tasks have begun; the network has C outputs."""

    task: int
    x: Tensor  # [n, ...]: samples of the task as they arrived, as many as the slot needs
    y: Tensor  # [n]: the output of each sample's label
    params: Sequence[Tensor]  # the trained parameters, with the averaged weights if there is an average
    network: nn.Module
    active_outputs: Tensor  # [T, C]: the outputs that the softmax of each task covers
    seen_outputs: Sequence[Sequence[int]]  # for each task, the outputs of the labels seen so far
    generator: torch.Generator  # for random draws at the end of a task
    output_labels: Sequence[Mapping[int, Label]] = ()  # for each task, the label of each seen output; empty: no labels


class Slot:
    """The methods that every slot has. By default they do nothing."""

    samples_needed: int = 0  # samples of an ended task that the slot needs: 0, a number, or memory.ALL
    needs_balanced_samples: bool = False  # whether it needs equally many samples of each class

    def begin_task(self, task: int, params: Sequence[Tensor]) -> None:
        """Prepare for a task with these parameters. Raises `StreamlearnError` before it changes anything."""

    def begin_refinement(self, ended: EndedTask) -> None:
        """Prepare for the refinement: further passes over the reservoir, to which no sample is added any more."""

    def end_task(self, ended: EndedTask) -> None:
        """Store what later tasks need of this task."""

    def grow(self, params: Sequence[Tensor], num_outputs: int) -> None:
        """Adapt to parameters whose shapes have grown."""

    def state_dict(self) -> State:
        """Return everything that a restart needs to continue bit-equal."""
        return {}

    def load_state_dict(self, state: State) -> None:
        """Restore what `state_dict` returned."""


class Network(Slot):
    """Slot one: computes logits from samples and their tasks. By default one network serves all tasks.

    `state_dict` has numbers only: what is needed to give `module` its shape before its tensors are loaded.
    """

    supports_forward_transfer = True  # whether a task can be evaluated with the parameters from before it began

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    @property
    def head(self) -> nn.Linear | None:
        """The last layer, with a row for each output, if it is linear and named `head`."""
        return registry.head_of(self.module)

    def trainable_parameters(self) -> dict[str, Tensor]:
        """Return the parameters that are trained now, by name."""
        return {name: param for name, param in self.module.named_parameters() if param.requires_grad}

    def forward(self, x: Tensor, task: Tensor) -> Tensor:
        """Return logits `[B, C]` for `x [B, ...]`; `task [B]` is on the host."""
        del task  # one network serves all tasks; the mask of active outputs is applied later
        logits: Tensor = self.module(x)
        return logits

    def metrics(self) -> dict[str, float]:
        """Return `parameters`, their number, and `free_ratio`, the share of weights without an owner, if tasks own weights."""
        return {"parameters": float(sum(param.numel() for param in self.module.parameters()))}


class Replay(Slot):
    """Slot two: adds samples of past tasks to a batch. By default it adds none."""

    share: float = 0.0  # of the loss, for the replayed samples of the current batch
    needs_features: bool = False  # whether `feature_loss` must be called

    def sample(self, batch: Batch) -> Batch | None:
        """Return samples of past tasks to learn with `batch`, preprocessed and on the device, or None."""
        del batch
        return None

    def feature_loss(self, mixed: Batch, features: Tensor) -> Tensor:
        """Return a loss, 0-dim, that is added to the model's. `features [B, ...]` are the inputs of the network's head."""
        raise NotImplementedError

    def after_step(self, mixed: Batch, finite: Tensor) -> None:
        """Learn from the batch of the optimizer step just taken; `finite` is false if that step was dropped."""

    def measure_agreement(self, task: int) -> None:
        """Measure at the end of a task how well past tasks are replayed. Must not use the random generators of training."""

    def agreement(self) -> dict[tuple[int, int], float]:
        """Return the last result of `measure_agreement`: a ratio from 0 to 1 by (task, output); empty if there is none."""
        return {}

    def pop_dropped_updates(self) -> int:
        """Return how many own updates were dropped as not finite since the last call. Waits for the device."""
        return 0

    def memory_usage(self) -> dict[str, Any]:
        """Return `samples` by task, `capacity`, `bytes`, `drawn` and `evicted` of the memory; empty if there is no memory."""
        return {}


class Penalty(Slot):
    """Slot three: adds a penalty to the loss for changing what past tasks need. By default it adds none."""

    def add_gradient(self, params: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
        """Add the penalty's gradient to `grads`, the gradient of the loss, in place."""

    def proximal_step(self, params: Sequence[Tensor], rate: float, finite: Tensor) -> None:
        """Take the penalty's implicit (proximal) step, if it is configured and the optimizer step was not dropped."""

    def after_step(self, params: Sequence[Tensor], finite: Tensor) -> None:
        """Record how the parameters moved; `finite` is false if the optimizer step was dropped."""

    def metrics(self) -> dict[str, float]:
        """Return `norm`, the norm of all importances; empty before a task has ended."""
        return {}


class Constraint(Slot):
    """Slot four: limits the optimizer step. By default it sets no limit."""

    def project_gradient(self, params: Sequence[Tensor], grads: Sequence[Tensor], gradient_of: GradientOf) -> None:
        """Change `grads` in place so that the step does not harm past tasks.

        `gradient_of(batch)` returns the gradient of the mean loss of a preprocessed batch, aligned with `params`.
        """

    def restore_frozen(self, params: Sequence[Tensor]) -> None:
        """Restore the parameters that the step must not change."""

    def memory_usage(self) -> dict[str, Any]:
        """Return the usage of the memory for reference gradients, as `Replay.memory_usage` does."""
        return {}

    def counters(self) -> dict[str, int]:
        """Return the totals `projected`, gradients that were projected, and `failed`, projections that could not be solved."""
        return {}


@dataclass(frozen=True)
class Strategy:
    """One object for each slot. `GradientUpdate.step` calls them, in an order that is written there and nowhere else."""

    network: Network
    replay: Replay = field(default_factory=Replay)
    penalty: Penalty = field(default_factory=Penalty)
    constraint: Constraint = field(default_factory=Constraint)
    refine_epochs: int = 0

    @property
    def slots(self) -> dict[str, Slot]:
        """The slots by name."""
        return {
            "network": self.network,
            "replay": self.replay,
            "penalty": self.penalty,
            "constraint": self.constraint,
        }

    def memory_usage(self) -> dict[str, Any]:
        """Return the usage of all memories together, as `Replay.memory_usage` does; empty if there is no memory."""
        usages = [usage for usage in (self.replay.memory_usage(), self.constraint.memory_usage()) if usage]
        if not usages:
            return {}
        capacities = [usage["capacity"] for usage in usages]
        tasks = {task for usage in usages for task in usage["samples"]}
        return {
            "samples": {task: sum(usage["samples"].get(task, 0) for usage in usages) for task in sorted(tasks)},
            "capacity": None if None in capacities else sum(capacities),
            **{key: sum(usage[key] for usage in usages) for key in ("bytes", "drawn", "evicted")},
        }
