"""Optimizers: torch's own fused kernels, on lists of tensors.

The functions behind `torch.optim.Adam` and its kin are called directly. The classes import torch's compiler at their first
step, which takes four seconds at every start of a daemon that never compiles anything; and here a step takes a flag.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from streamlearn.tensors import clones, padded, zeros

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
        kept = {"sgd": ["momentum"] if momentum else []}.get(name, ["mean", "square"])
        self.moments = {moment: zeros(self.params) for moment in kept}
        self.steps = [] if name == "sgd" else [torch.zeros((), device=param.device) for param in self.params]
        self.steps_before: dict[
            int, Tensor
        ] = {}  # of a grown parameter, by its place: the steps before each entry was there

    @torch.no_grad()
    def step(
        self, grads: Sequence[Tensor], finite: Tensor, frozen_entries: Mapping[int, Tensor] = MappingProxyType({})
    ) -> None:
        """Take a step; where `finite` (0-dim, bool) is false, parameters and moments stay exactly as they were.

        `frozen_entries` names entries, by the place of the parameter, that stay as they were where they have no gradient.
        """
        before = [
            (tensor, tensor.clone(), entries & (grads[place] == 0))
            for place, entries in frozen_entries.items()
            for tensor in (self.params[place], *(values[place] for values in self.moments.values()))
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
        before = {place: self.params[place].clone() for place in self.steps_before}
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
        for place, old in before.items():
            self._correct(place, old)

    def _correct(self, place: int, old: Tensor) -> None:
        """Correct the step of a grown parameter as if each entry had a step count of its own (Kingma & Ba 2015, section 3).

        The kernel corrects the bias of the moments with one count for the whole parameter. A new entry, whose moments
        begin at zero, would take up to three times the step of a new parameter.
        """
        param, count = self.params[place], self.steps[place].clamp(min=1)
        own = (count - self.steps_before[place]).clamp(min=1)
        mean, square = ((1 - beta**count) / (1 - beta**own) for beta in BETAS)
        # entries that were always there have the factor 1 and keep their bits
        param.copy_(torch.lerp(old, param, mean / square.sqrt()))

    def set_parameters(self, params: Sequence[Tensor], places: Sequence[int | None] | None = None) -> None:
        """Go on with other parameters; `places` says which old one each was, None for a new one; default: the same.

        What has grown keeps its moments, and its new entries have no past.
        """
        self.params = list(params)
        places = range(len(self.params)) if places is None else places
        if self.steps:
            self.steps_before = dict(self._steps_before_entries(places))
        self.moments = {
            moment: [
                torch.zeros_like(param) if place is None else padded(values[place], param)
                for place, param in zip(places, self.params, strict=True)
            ]
            for moment, values in self.moments.items()
        }
        if self.steps:
            none = self.params[0].new_zeros(())
            self.steps = [none.clone() if place is None else self.steps[place] for place in places]

    def _steps_before_entries(self, places: Sequence[int | None]) -> Iterator[tuple[int, Tensor]]:
        """Return, for each parameter that has ever grown, the steps taken before each of its entries was there."""
        for now, (place, param) in enumerate(zip(places, self.params, strict=True)):
            if place is None:
                continue
            shape = self.moments["mean"][place].shape
            if place in self.steps_before or shape != param.shape:
                known = self.steps_before.get(place, param.new_zeros(shape))
                yield now, padded(known, self.steps[place].expand(param.shape), copy_rest=True)

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to go on bit-equal."""
        named = {"steps": self.steps, **self.moments}
        state = {key: {str(n): value for n, value in enumerate(values)} for key, values in named.items()}
        return {**state, "missed": {str(n): value for n, value in self.steps_before.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned, for the same parameters."""
        device = self.params[0].device
        self.steps = clones([state["steps"][str(n)].to(device) for n in range(len(state["steps"]))])
        missed = state.get("missed", {})  # older checkpoints have none
        self.steps_before = {int(n): value.to(device, copy=True) for n, value in missed.items()}
        for name in self.moments.keys() & state.keys():
            # in the parameter's own layout: fused kernels go through memory, and files are contiguous
            self.moments[name] = [
                torch.empty_like(param).copy_(state[name][str(n)]) for n, param in enumerate(self.params)
            ]
