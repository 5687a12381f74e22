"""Models whose initial weights influence a published figure: with torch's small ones, SGD at 0.003 hardly learns."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from streamlearn.learning.models.mlp import MLP

if TYPE_CHECKING:
    from collections.abc import Sequence


def glorot(input_shape: Sequence[int], num_outputs: int, *, hidden: Sequence[int]) -> nn.Module:
    """Return a perceptron with the initial weights of Glorot & Bengio 2010 and no biases, as in the code of GEM's authors."""
    model = MLP(input_shape, num_outputs, hidden)
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    return model
