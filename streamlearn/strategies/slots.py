"""The four slots of a strategy and their null objects: naive is what remains when every slot holds its default."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from streamlearn.models import registry

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from streamlearn.data import Batch, Label

State = dict[str, Any]  # tensors, numbers, strings, lists and dicts: what safetensors and JSON can hold
GradientOf = Callable[["Batch"], list[Tensor]]


@dataclass(frozen=True)
class BuildContext:
    """What a part may know when it is made."""

    seed: int
    device: torch.device
    input_shape: tuple[int, ...]  # of what the network sees
    num_outputs: int
    max_bytes: int
    preprocess: Callable[[Tensor], Tensor]  # samples as they arrived -> what the network sees, on the device
    build_network: Callable[..., nn.Module]  # (outputs, offset of the seed = 0) -> an untrained network, there
    batch_size: int = 1
    task_names: tuple[str, ...] = ()  # the names of all tasks to come, where they are listed
    token_ids: bool = False  # whether the network sees token ids, and not numbers
    max_norm: float | None = None  # bound on the norm of a gradient, the solver's and a generator's

    def zero_inputs(self, count: int) -> Tensor:
        """Return what the network sees of so many samples of nothing: `[count, *input_shape]`."""
        dtype = torch.int32 if self.token_ids else torch.float32
        return torch.zeros(count, *self.input_shape, dtype=dtype, device=self.device)


@dataclass(frozen=True)
class EndedTask:
    """A read-only view of a task at its end."""

    task: int
    x: Tensor  # of the reservoir, as many samples as the part needs, as they arrived
    y: Tensor
    params: Sequence[Tensor]
    network: nn.Module
    active_outputs: Tensor  # [T, C]: which outputs compete in each task
    seen_outputs: Sequence[Sequence[int]]  # the outputs met in each task so far
    generator: torch.Generator  # for draws that belong to the task's end
    output_labels: Sequence[Mapping[int, Label]] = ()  # the label of each of these outputs; empty: an output is a class


class Slot:
    """What every slot has; all of it defaults to nothing."""

    samples_needed: int = 0  # of the finished task: 0, a number, or memory.ALL
    needs_balanced_samples: bool = False  # whether of each class as many as of any other

    def begin_task(self, task: int, params: Sequence[Tensor]) -> None:
        """Prepare for a task whose parameters are these; raises `StreamlearnError` before anything is changed."""

    def begin_refinement(self, ended: EndedTask) -> None:
        """Prepare for further passes over the reservoir, which is whole by now."""

    def end_task(self, ended: EndedTask) -> None:
        """Make what was learned last."""

    def grow(self, params: Sequence[Tensor], num_outputs: int) -> None:
        """Follow parameters whose shapes have grown."""

    def state_dict(self) -> State:
        """Return everything needed to go on bit-equal."""
        return {}

    def load_state_dict(self, state: State) -> None:
        """Take over what `state_dict` returned."""


class Network(Slot):
    """Slot one: from samples and their tasks to logits. The default is one net for all tasks.

    Its `state_dict` holds numbers only: what `module` needs to get the shape into which its tensors are loaded.
    """

    supports_forward_transfer = True  # whether its parameters as they were before a task can answer for that task

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    @property
    def head(self) -> nn.Linear | None:
        """The last layer, a row an output, where it is linear and named `head`."""
        return registry.head_of(self.module)

    def trainable_parameters(self) -> dict[str, Tensor]:
        """Return the parameters that learn now, by name."""
        return {name: param for name, param in self.module.named_parameters() if param.requires_grad}

    def forward(self, x: Tensor, task: Tensor) -> Tensor:
        """Return logits `[B, C]` for `x [B, ...]`; `task [B]` lives on the host."""
        del task  # class masks do the rest
        logits: Tensor = self.module(x)
        return logits

    def metrics(self) -> dict[str, float]:
        """Return the number of parameters, and the share of weights that no task owns, where tasks own weights."""
        return {"parameters": float(sum(param.numel() for param in self.module.parameters()))}


class Replay(Slot):
    """Slot two: past samples that join a batch. The default has none."""

    share: float = 0.0  # of the loss, that goes to the replayed samples
    needs_features: bool = False  # whether `feature_loss` is asked, with what the network's last layer was given

    def sample(self, batch: Batch) -> Batch | None:
        """Return samples of past tasks to learn beside `batch`, scaled and on the device, or None."""
        del batch
        return None

    def feature_loss(self, mixed: Batch, features: Tensor) -> Tensor:
        """Return a further loss, 0-dim, on what the network has computed; `features [B, ...]` are its head's input."""
        raise NotImplementedError

    def after_step(self, mixed: Batch, finite: Tensor) -> None:
        """Learn from the batch that the solver has just learned; `finite` is false where its update was dropped."""

    def measure_agreement(self, task: int) -> None:
        """Measure, when a task has ended, how well it replays. Must draw from nothing that training draws from."""

    def agreement(self) -> dict[tuple[int, int], float]:
        """Return the last result of `measure_agreement`: a ratio from 0 to 1 by (task, output); empty if there is none."""
        return {}

    def pop_dropped_updates(self) -> int:
        """Return how many updates of its own were not finite and were dropped since the last call; waits for the device."""
        return 0

    def memory_usage(self) -> dict[str, Any]:
        """Return what is stored: samples by task, capacity, bytes, drawn and evicted; empty where nothing is."""
        return {}


class Penalty(Slot):
    """Slot three: a pull toward what past tasks need. The default does not pull."""

    def add_gradient(self, params: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
        """Add the penalty's gradient to the data gradients `grads`, in place."""

    def proximal_step(self, params: Sequence[Tensor], rate: float, finite: Tensor) -> None:
        """Take the penalty's implicit (proximal) step, where that was chosen and the update was not dropped."""

    def after_step(self, params: Sequence[Tensor], finite: Tensor) -> None:
        """Note how the parameters moved; `finite` is false where the update was dropped."""

    def metrics(self) -> dict[str, float]:
        """Return the norm of the importances, for metrics; empty before a task has ended."""
        return {}


class Constraint(Slot):
    """Slot four: limits on the step. The default has none."""

    def project_gradient(self, params: Sequence[Tensor], grads: Sequence[Tensor], gradient_of: GradientOf) -> None:
        """Change `grads` in place so that the step respects past tasks."""

    def restore_frozen(self, params: Sequence[Tensor]) -> None:
        """Put back what must not have moved."""

    def memory_usage(self) -> dict[str, Any]:
        """Return what is stored for reference gradients, as `Replay.memory_usage` does."""
        return {}

    def counters(self) -> dict[str, int]:
        """Return how many steps were projected, and how often the solver failed, in all."""
        return {}


@dataclass(frozen=True)
class Strategy:
    """One object for each slot. The update calls them at fixed lines; the order is written there, once."""

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
        """Return what all parts store together; empty where nothing is. See `Replay.memory_usage`."""
        kept = [sizes for sizes in (self.replay.memory_usage(), self.constraint.memory_usage()) if sizes]
        if not kept:
            return {}
        bounds = [sizes["capacity"] for sizes in kept]
        tasks = {task for sizes in kept for task in sizes["samples"]}
        return {
            "samples": {task: sum(sizes["samples"].get(task, 0) for sizes in kept) for task in sorted(tasks)},
            "capacity": None if None in bounds else sum(bounds),
            **{key: sum(sizes[key] for sizes in kept) for key in ("bytes", "drawn", "evicted")},
        }
