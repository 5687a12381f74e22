"""Elastic weight consolidation: Kirkpatrick et al. 2017; its online form: Schwarz et al. 2018."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from streamlearn.learning.strategies.gradient_moments import gradient_moments
from streamlearn.learning.strategies.importance import Importance, mean_over_samples

if TYPE_CHECKING:
    from collections.abc import Iterator

    from streamlearn.learning.strategies.slots import BuildContext, EndedTask


class FisherImportance(Importance):
    """Diagonal of the Fisher information: the mean of *per-sample* squared gradients of the log likelihood.

    Kirkpatrick et al. 2017, eq. 3. `exact`: the expectation over the model's own distribution of labels; `sampled`: one label
    drawn from that distribution; `empirical`: the true label. The squared mean gradient of a batch of B would be 1/B of it.
    """

    def __init__(self, context: BuildContext, *, kind: str, samples: int) -> None:
        self.context = context
        self.kind = kind
        self.samples_needed = samples

    def compute(self, ended: EndedTask) -> list[Tensor]:
        def total(network: nn.Module, x: Tensor, y: Tensor) -> Iterator[list[Tensor]]:
            inactive = ~ended.active_outputs[ended.task]

            def losses(logits: Tensor, label: Tensor) -> Tensor:
                return functional.cross_entropy(logits.masked_fill(inactive, -torch.inf), label, reduction="none")

            with torch.no_grad():
                probabilities = torch.softmax(network(x).masked_fill(inactive, -torch.inf), 1)
            for label, weight in self._labels(probabilities, y, ended):
                yield gradient_moments(network, x, label, weight, losses, 2)

        return mean_over_samples(total, self.context, ended)

    def _labels(self, probabilities: Tensor, y: Tensor, ended: EndedTask) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the labels of the expectation, each as a label `[B]` and a weight `[B]` for every sample."""
        if self.kind == "exact":
            for output in torch.nonzero(ended.active_outputs[ended.task]).flatten().tolist():
                yield torch.full_like(y, output), probabilities[:, output]
        elif self.kind == "sampled":
            draws = torch.rand(len(y), 1, generator=ended.generator).to(y.device)
            label = (probabilities.cumsum(1) < draws).sum(1).clamp(max=probabilities.shape[1] - 1)
            yield label, torch.ones_like(probabilities[:, 0])
        else:
            yield y, torch.ones_like(probabilities[:, 0])
