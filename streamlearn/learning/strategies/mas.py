"""Memory aware synapses: Aljundi et al. 2018."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from streamlearn.learning.strategies.gradient_moments import gradient_moments
from streamlearn.learning.strategies.importance import Importance, mean_over_samples

if TYPE_CHECKING:
    from collections.abc import Iterator

    from streamlearn.learning.strategies.slots import BuildContext, EndedTask


class OutputSensitivity(Importance):
    """How much the output changes with each parameter (Aljundi et al. 2018, eq. 3, with the squared norm of the outputs).

    The mean over samples of |d ||F(x)||^2 / d theta|, where F are the logits of the task's active outputs. The magnitude is
    taken before the mean, so that samples cannot cancel each other. No labels are needed.
    """

    def __init__(self, context: BuildContext, *, samples: int) -> None:
        self.context = context
        self.samples_needed = samples

    def compute(self, ended: EndedTask) -> list[Tensor]:
        def total(network: nn.Module, x: Tensor, y: Tensor) -> Iterator[list[Tensor]]:
            active = ended.active_outputs[ended.task]

            def losses(logits: Tensor, label: Tensor) -> Tensor:
                del label
                return torch.where(active, logits, 0.0).square().sum(1)

            yield gradient_moments(network, x, y, torch.ones(len(y), device=x.device), losses, 1)

        return mean_over_samples(total, self.context, ended)
