"""Models as their authors have them: with layers that draw, are frozen, shared, recurrent, sparse, or laid out otherwise."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable

WIDTH = 8


class Body(nn.Module):
    """Some layers before a head."""

    def __init__(self, body: nn.Module, width: int, num_outputs: int) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Linear(width, num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        logits: Tensor = self.head(self.body(x))
        return logits


class Recurrent(nn.Module):
    """Reads four numbers at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRU(4, WIDTH, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return the last state."""
        _, last = self.cell(x.reshape(len(x), -1, 4))
        state: Tensor = last[0]
        return state


class Table(nn.Module):
    """Looks up a row for each number; gradients are sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Embedding(10, WIDTH, sparse=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return the rows' mean."""
        mean: Tensor = self.rows((9 * x).long().clamp(0, 9)).mean(1)
        return mean


class Folded(nn.Module):
    """A layer that sees parts of samples as samples, and another whose output nobody uses."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Linear(4, 4)
        self.idle = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Return the parts together."""
        parts = x.reshape(-1, 4)
        self.idle(parts)
        return torch.tanh(self.part(parts)).reshape(len(x), -1)


class Reused(nn.Module):
    """Uses a layer's weight once more, past the layer, and calls a layer with its input by name."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.square = nn.Linear(size, size)
        self.named = nn.Linear(size, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Return what the layers make of it."""
        h = torch.tanh(self.square(x)) @ self.square.weight
        return torch.tanh(self.named(input=h))


class Sequence(nn.Module):
    """Positions first, samples second, as recurrent layers had it for long."""

    def __init__(self) -> None:
        super().__init__()
        self.each = nn.Linear(4, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Return the mean over positions."""
        return torch.tanh(self.each(x.reshape(len(x), -1, 4).transpose(0, 1))).mean(0)


def drawing(size: int, num_outputs: int) -> nn.Module:
    """Make a model with dropout, an activation in place, and a layer in evaluation mode for good."""
    still = nn.BatchNorm1d(WIDTH).eval().requires_grad_(requires_grad=False)
    layers = nn.Sequential(nn.Linear(size, WIDTH), still, nn.ReLU(inplace=True), nn.Dropout(0.3))
    return Body(layers, WIDTH, num_outputs)


def frozen(size: int, num_outputs: int) -> nn.Module:
    """Make a model whose first layer does not learn."""
    first = nn.Linear(size, WIDTH).requires_grad_(requires_grad=False)
    return Body(nn.Sequential(first, nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh()), WIDTH, num_outputs)


def transposed(size: int, num_outputs: int) -> nn.Module:
    """Make a model one of whose weights lies column by column."""
    layer = nn.Linear(size, WIDTH)
    layer.weight = nn.Parameter(layer.weight.detach().T.contiguous().T)
    return Body(nn.Sequential(layer, nn.Tanh()), WIDTH, num_outputs)


def tied(size: int, num_outputs: int) -> nn.Module:
    """Make a model two of whose layers have one weight."""
    layers = [nn.Linear(size, size), nn.Linear(size, size)]
    layers[1].weight = layers[0].weight
    return Body(nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh()), size, num_outputs)


def normed(size: int, num_outputs: int) -> nn.Module:
    """Make a model one of whose weights is computed of others."""
    layer = torch.nn.utils.parametrizations.weight_norm(nn.Linear(size, WIDTH))
    return Body(nn.Sequential(layer, nn.Tanh()), WIDTH, num_outputs)


MAKERS: dict[str, Callable[[int, int], nn.Module]] = {
    "drawing": drawing,
    "frozen": frozen,
    "transposed": transposed,
    "tied": tied,
    "normed": normed,
    "recurrent": lambda _, outputs: Body(Recurrent(), WIDTH, outputs),
    "sparse": lambda _, outputs: Body(Table(), WIDTH, outputs),
    "reused": lambda size, outputs: Body(Reused(size), WIDTH, outputs),
    "sequence": lambda _, outputs: Body(Sequence(), WIDTH, outputs),
    "folded": lambda size, outputs: Body(Folded(), size, outputs),
}


def make(input_shape: list[int], num_outputs: int, *, kind: str) -> nn.Module:
    """Return the model of this kind."""
    return MAKERS[kind](input_shape[0], num_outputs)


def headless(input_shape: list[int], num_outputs: int) -> nn.Module:
    """Return a model whose last layer has another name."""
    return nn.Sequential(nn.Linear(input_shape[0], num_outputs))
