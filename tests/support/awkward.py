"""Models as their authors have them: with layers that draw, are frozen, shared, recurrent, sparse, or laid out otherwise."""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING, Any

import numpy as np
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


def statistics(size: int, num_outputs: int) -> nn.Module:
    """Make a model that cannot learn a single sample in training mode."""
    return Body(nn.Sequential(nn.Linear(size, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU()), WIDTH, num_outputs)


class Spread(nn.Module):
    """Divides by the spread of a batch, which a single sample does not have, and notes it in buffers that it replaces."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("spread", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        """Return what is scaled by the batch's spread, or in evaluation mode by the noted one."""
        spread = self.get_buffer("spread")
        if self.training:
            own = (x.var(0).mean() + 1e-3).sqrt()
            self.spread = 0.9 * spread + 0.1 * own.detach()
            return x / own
        return x / spread


class Odd(nn.Module):
    """Has state of every kind: odd names and types, state that is no tensor, a buffer that is not persistent; draws numbers."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"block/1": nn.Linear(size, WIDTH), "a/b/%2F $é": nn.Linear(WIDTH, WIDTH)})
        weight = np.random.normal(size=(WIDTH, WIDTH)).astype(np.float32)  # noqa: NPY002 - as authors do it
        self.parts["a/b/%2F $é"].load_state_dict(
            {"weight": torch.from_numpy(weight) / WIDTH, "bias": torch.zeros(WIDTH)}
        )
        self.register_buffer("$list", torch.tensor([1 + 2j, 3 - 4j]).conj())
        self.register_buffer("none", torch.zeros(0, 3))
        self.register_buffer("wide", torch.arange(6.0, dtype=torch.float64).reshape(2, 3).T)
        self.register_buffer("bits", torch.ones(3, dtype=torch.complex128)[1])
        self.register_buffer("mean", torch.zeros(WIDTH), persistent=False)
        self.seen: dict[Any, Any] = {
            ("calls", 1): 0,
            "last": math.nan,
            "raw": b"\x00\xff",
            "parts": [(1, None), {2, 3}],
        }

    def forward(self, x: Tensor) -> Tensor:
        """Return activations less their running mean, with noise from numpy and from Python."""
        h = torch.tanh(self.parts["a/b/%2F $é"](torch.tanh(self.parts["block/1"](x))))
        if self.training and torch.is_grad_enabled():
            self.mean = 0.9 * self.get_buffer("mean") + 0.1 * h.detach().mean(0)
            self.seen["calls", 1] += 1
            self.seen["last"] = random.random()
            noise = np.random.normal(size=h.shape).astype(np.float32)  # noqa: NPY002 - as authors do it
            h = h + 0.1 * torch.from_numpy(noise).to(h.device) * random.random()
        return h - self.get_buffer("mean")

    def get_extra_state(self) -> dict[Any, Any]:
        """Return what is no tensor, and a tensor."""
        return {**self.seen, "table": torch.ones(2, dtype=torch.int8), "tensors": (torch.zeros(1),)}

    def set_extra_state(self, state: dict[Any, Any]) -> None:
        """Take it over."""
        assert torch.equal(state["table"], torch.ones(2, dtype=torch.int8))
        self.seen = {key: value for key, value in state.items() if key not in {"table", "tensors"}}


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
    "statistics": statistics,
    "spread": lambda size, outputs: Body(nn.Sequential(nn.Linear(size, WIDTH), Spread()), WIDTH, outputs),
    "odd": lambda size, outputs: Body(Odd(size), WIDTH, outputs),
    "folded": lambda size, outputs: Body(Folded(), size, outputs),
}


def make(input_shape: list[int], num_outputs: int, *, kind: str) -> nn.Module:
    """Return the model of this kind."""
    return MAKERS[kind](input_shape[0], num_outputs)


def headless(input_shape: list[int], num_outputs: int) -> nn.Module:
    """Return a model whose last layer has another name."""
    return nn.Sequential(nn.Linear(input_shape[0], num_outputs))
