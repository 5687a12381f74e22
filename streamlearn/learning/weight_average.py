"""The average of the weights over the steps of a task. The network with these weights is the one that is evaluated."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch

from streamlearn.learning.models.modes import flatten_recurrent
from streamlearn.learning.tensors import averaging_rate, copy_into

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from streamlearn.learning.strategies.slots import Network


class WeightAverage:
    """An exponential moving average of the weights of a live network, in a copy of it.

    Without a decay there is no average: the live network itself is evaluated.
    """

    def __init__(self, live: Network, decay: float | None) -> None:
        self.decay = decay
        self.network = live  # the evaluated network
        self.params: list[Tensor] = []  # its parameters, aligned with the trained ones
        self._live = live

    def start(self, names: Sequence[str], params: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """Start an average at `values`, for the trained parameters `params` with these names."""
        if self.decay is None:
            self.params = list(params)
            return
        self.network = frozen_copy(self._live)
        self.params = parameters_named(self.network, names)
        copy_into(self.params, values)

    @torch.no_grad()
    def after_step(self, params: Sequence[Tensor], finite: Tensor, steps: int) -> None:
        """Add the parameters after a step; `finite` is false if the step was dropped. `steps` of the task came before it."""
        if self.decay is None:
            return
        rate = averaging_rate(self.decay, steps) * finite
        for mean, param in zip(self.params, params, strict=True):
            mean.lerp_(param, rate)

    def copy_to(self, params: Sequence[Tensor]) -> None:
        """Copy the averaged weights into the live network's parameters."""
        if self.decay is not None:
            copy_into(params, self.params)


def frozen_copy(network: Network) -> Network:
    """Return a copy of a network in evaluation mode, without gradients."""
    copied = copy.deepcopy(network)
    copied.module.requires_grad_(requires_grad=False).eval()
    flatten_recurrent(copied.module)
    return copied


def parameters_named(network: Network, names: Sequence[str]) -> list[Tensor]:
    """Return the parameters of a network with these names, in this order."""
    named = dict(network.module.named_parameters())
    return [named[name] for name in names]
