"""The loss of a batch: cross-entropy over the active outputs, for hard targets, soft targets and stored logits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from torch import Tensor

    from streamlearn.core.samples import Batch


def weighted_loss(logits: Tensor, mixed: Batch, inactive: Tensor) -> Tensor:
    """Return the weighted cross-entropy over the active outputs.

    `inactive` is a mask `[B, C]`, or `[1, C]`. Soft targets are weighted by T^2 (Hinton et al. 2015); for stored logits the
    loss is the mean squared distance (Buzzega et al. 2020).
    """
    num_hard = len(mixed) - (0 if mixed.soft_targets is None else len(mixed.soft_targets))
    masked = logits.masked_fill(inactive, -torch.inf)
    losses = functional.cross_entropy(masked[:num_hard], mixed.y[:num_hard], reduction="none")
    if mixed.soft_targets is not None and mixed.targets_are_logits:
        losses = torch.cat([losses, squared_distance(logits[num_hard:], mixed.soft_targets)])
    elif mixed.soft_targets is not None:
        log_probabilities = functional.log_softmax(masked[num_hard:] / mixed.temperature, 1)
        # inactive outputs must be filled before the product, because 0 * -inf is NaN
        terms = mixed.soft_targets * log_probabilities.masked_fill(inactive[-len(mixed.soft_targets) :], 0.0)
        losses = torch.cat([losses, -(mixed.temperature**2) * terms.sum(1)])
    assert mixed.weight is not None
    return torch.dot(losses, mixed.weight)


def squared_distance(logits: Tensor, stored: Tensor) -> Tensor:
    """Return each sample's mean squared distance `[R]` from stored logits `[R, C]`, over the finite stored logits."""
    finite = stored.isfinite()
    squares = torch.where(finite, logits - stored, 0.0).square()
    return squares.sum(1) / finite.sum(1).clamp(min=1)
