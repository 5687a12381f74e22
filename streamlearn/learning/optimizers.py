"""Optimizers: torch's own fused kernels, on lists of tensors.

This module calls the functions behind `torch.optim.Adam`, `AdamW` and `SGD` directly, for two reasons. The classes import
torch's compiler at their first step, which takes four seconds at every start. And a step here can be dropped by a flag on the
device.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from streamlearn.learning.tensors import from_numbered, numbered, padded, zeros

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

BETAS = (0.9, 0.999)


class Optimizer:
    """`adam` (Kingma & Ba 2015), `adamw` (Loshchilov & Hutter 2019) or `sgd`; betas 0.9 and 0.999, epsilon 1e-8."""

    def __init__(
        self, params: Sequence[Tensor], name: str, lr: float, *, momentum: float = 0.0, weight_decay: float = 0.0
    ) -> None:
        self.params = list(params)
        self.name = name
        self.lr = lr
        self.momentum = momentum
        self.weight_decay = weight_decay
        moments = ["mean", "square"] if name != "sgd" else ["momentum"] if momentum else []
        self.moments = {moment: zeros(self.params) for moment in moments}
        self.steps = [] if name == "sgd" else [torch.zeros((), device=param.device) for param in self.params]
        # for each parameter that has grown, by index: the number of steps before each of its entries was added
        self.steps_before: dict[int, Tensor] = {}

    @torch.no_grad()
    def step(
        self, grads: Sequence[Tensor], finite: Tensor, fixed_entries: Mapping[int, Tensor] = MappingProxyType({})
    ) -> None:
        """Take a step. If `finite` (0-dim, bool) is false, parameters and moments stay exactly as they were.

        `fixed_entries` maps the index of a parameter to a mask: masked entries whose gradient is 0 also stay as they were.
        """
        before = [
            (tensor, tensor.clone(), entries & (grads[index] == 0))
            for index, entries in fixed_entries.items()
            for tensor in (self.params[index], *(values[index] for values in self.moments.values()))
        ]
        self._step(grads, finite)
        for tensor, old, entries in before:
            tensor.copy_(torch.where(entries, old, tensor))

    def _step(self, grads: Sequence[Tensor], finite: Tensor) -> None:
        found_inf = (~finite).float()
        if self.name == "sgd":
            sgd(
                self.params,
                list(grads),
                list(self.moments.get("momentum", [None] * len(self.params))),
                fused=True,
                foreach=False,
                found_inf=found_inf,
                weight_decay=self.weight_decay,
                momentum=self.momentum,
                lr=self.lr,
                dampening=0.0,
                nesterov=False,
                maximize=False,
            )
            return
        before = {index: self.params[index].clone() for index in self.steps_before}
        adam(
            self.params,
            list(grads),
            self.moments["mean"],
            self.moments["square"],
            [],
            self.steps,
            fused=True,
            foreach=False,
            found_inf=found_inf,
            decoupled_weight_decay=self.name == "adamw",
            amsgrad=False,
            beta1=BETAS[0],
            beta2=BETAS[1],
            lr=self.lr,
            weight_decay=self.weight_decay,
            eps=1e-8,
            maximize=False,
        )
        for index, old in before.items():
            self._correct_bias(index, old)

    def _correct_bias(self, index: int, old: Tensor) -> None:
        """Correct the step of a grown parameter as if each entry had its own step count (Kingma & Ba 2015, section 3).

        The kernel corrects the bias of the moments with one count for the whole parameter. The moments of a new entry start
        at zero, so without this its steps would be up to three times as large as those of a new parameter.
        """
        param, count = self.params[index], self.steps[index].clamp(min=1)
        own = (count - self.steps_before[index]).clamp(min=1)
        mean, square = ((1 - beta**count) / (1 - beta**own) for beta in BETAS)
        # for entries that were always there the factor is 1, which keeps every bit
        param.copy_(torch.lerp(old, param, mean / square.sqrt()))

    def set_parameters(self, params: Sequence[Tensor], old_indices: Sequence[int | None] | None = None) -> None:
        """Replace the parameters, and carry over their moments and step counts.

        `old_indices` gives the former index of each parameter, None for a new one; by default all indices stay the same. A
        parameter that has grown keeps its moments; those of its new entries are zero.
        """
        self.params = list(params)
        old_indices = range(len(self.params)) if old_indices is None else old_indices
        if self.steps:
            self.steps_before = dict(self._steps_before_entries(old_indices))
        self.moments = {
            moment: [
                torch.zeros_like(param) if old is None else padded(values[old], param)
                for old, param in zip(old_indices, self.params, strict=True)
            ]
            for moment, values in self.moments.items()
        }
        if self.steps:
            zero = self.params[0].new_zeros(())
            self.steps = [zero.clone() if old is None else self.steps[old] for old in old_indices]

    def _steps_before_entries(self, old_indices: Sequence[int | None]) -> Iterator[tuple[int, Tensor]]:
        """Yield, for each parameter that has grown, its index and the number of steps before each entry was added."""
        for index, (old, param) in enumerate(zip(old_indices, self.params, strict=True)):
            if old is None:
                continue
            shape = self.moments["mean"][old].shape
            if old in self.steps_before or shape != param.shape:
                known = self.steps_before.get(old, param.new_zeros(shape))
                yield index, padded(known, self.steps[old].expand(param.shape), copy_rest=True)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that a restart needs to continue bit-equal."""
        state = {key: numbered(values) for key, values in {"steps": self.steps, **self.moments}.items()}
        return {**state, "missed": {str(n): value for n, value in self.steps_before.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, for the same parameters."""
        device = self.params[0].device
        self.steps = from_numbered(state["steps"], device)
        steps_before = state.get("missed", {})  # older checkpoints do not have it
        self.steps_before = {int(n): value.to(device, copy=True) for n, value in steps_before.items()}
        for name in self.moments.keys() & state.keys():
            # copied into the parameter's memory layout, which fused kernels need; tensors from files are contiguous
            self.moments[name] = [
                torch.empty_like(param).copy_(state[name][str(n)]) for n, param in enumerate(self.params)
            ]
