"""Models whose first weights matter to a published figure: SGD at 0.003 hardly gets away from torch's own small ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from streamlearn.models.mlp import MLP

if TYPE_CHECKING:
    from collections.abc import Sequence


def glorot(input_shape: Sequence[int], num_outputs: int, *, hidden: Sequence[int]) -> nn.Module:
    """Return a perceptron with the initial weights of Glorot & Bengio 2010 and no biases, as GEM's authors have it."""
    model = MLP(input_shape, num_outputs, hidden)
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    return model
