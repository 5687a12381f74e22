"""Unusual models as users write them: layers that draw numbers, are frozen, tied, recurrent, sparse or strided."""

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
    """A body of layers, and a head."""

    def __init__(self, body: nn.Module, width: int, num_outputs: int) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Linear(width, num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        logits: Tensor = self.head(self.body(x))
        return logits


class Recurrent(nn.Module):
    """A GRU that reads four numbers at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRU(4, WIDTH, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return the last state."""
        _, last = self.cell(x.reshape(len(x), -1, 4))
        state: Tensor = last[0]
        return state


class Table(nn.Module):
    """An embedding with sparse gradients: looks up a row for each number."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Embedding(10, WIDTH, sparse=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return the mean of the rows."""
        mean: Tensor = self.rows((9 * x).long().clamp(0, 9)).mean(1)
        return mean


class Folded(nn.Module):
    """A layer that treats parts of samples as samples, and a layer whose output is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Linear(4, 4)
        self.idle = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs of the parts, concatenated."""
        parts = x.reshape(-1, 4)
        self.idle(parts)
        return torch.tanh(self.part(parts)).reshape(len(x), -1)


class Reused(nn.Module):
    """Uses a layer's weight a second time without the layer, and calls a layer with a keyword argument."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.square = nn.Linear(size, size)
        self.named = nn.Linear(size, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the layers."""
        h = torch.tanh(self.square(x)) @ self.square.weight
        return torch.tanh(self.named(input=h))


class Sequence(nn.Module):
    """Has positions in dimension 0 and samples in dimension 1, as recurrent layers have by default."""

    def __init__(self) -> None:
        super().__init__()
        self.each = nn.Linear(4, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Return the mean over positions."""
        return torch.tanh(self.each(x.reshape(len(x), -1, 4).transpose(0, 1))).mean(0)


def drawing(size: int, num_outputs: int) -> nn.Module:
    """Build a model with dropout, an in-place activation, and a layer that is always in evaluation mode."""
    still = nn.BatchNorm1d(WIDTH).eval().requires_grad_(requires_grad=False)
    layers = nn.Sequential(nn.Linear(size, WIDTH), still, nn.ReLU(inplace=True), nn.Dropout(0.3))
    return Body(layers, WIDTH, num_outputs)


def frozen(size: int, num_outputs: int) -> nn.Module:
    """Build a model whose first layer is frozen."""
    first = nn.Linear(size, WIDTH).requires_grad_(requires_grad=False)
    return Body(nn.Sequential(first, nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh()), WIDTH, num_outputs)


def transposed(size: int, num_outputs: int) -> nn.Module:
    """Build a model with a column-major weight."""
    layer = nn.Linear(size, WIDTH)
    layer.weight = nn.Parameter(layer.weight.detach().T.contiguous().T)
    return Body(nn.Sequential(layer, nn.Tanh()), WIDTH, num_outputs)


def tied(size: int, num_outputs: int) -> nn.Module:
    """Build a model in which two layers share a weight."""
    layers = [nn.Linear(size, size), nn.Linear(size, size)]
    layers[1].weight = layers[0].weight
    return Body(nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh()), size, num_outputs)


def normed(size: int, num_outputs: int) -> nn.Module:
    """Build a model with a parametrised weight (weight norm)."""
    layer = torch.nn.utils.parametrizations.weight_norm(nn.Linear(size, WIDTH))
    return Body(nn.Sequential(layer, nn.Tanh()), WIDTH, num_outputs)


def statistics(size: int, num_outputs: int) -> nn.Module:
    """Build a model that cannot learn a single sample in training mode."""
    return Body(nn.Sequential(nn.Linear(size, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU()), WIDTH, num_outputs)


class Spread(nn.Module):
    """Divides by the standard deviation of the batch, undefined for one sample, and keeps it in a buffer that it replaces."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("spread", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        """Divide by the standard deviation of the batch, or in evaluation mode by the running one."""
        spread = self.get_buffer("spread")
        if self.training:
            own = (x.var(0).mean() + 1e-3).sqrt()
            self.spread = 0.9 * spread + 0.1 * own.detach()
            return x / own
        return x / spread


class Odd(nn.Module):
    """Has every kind of state: odd names and dtypes, values other than tensors, a non-persistent buffer. Draws numbers."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"block/1": nn.Linear(size, WIDTH), "a/b/%2F $é": nn.Linear(WIDTH, WIDTH)})
        weight = np.random.normal(size=(WIDTH, WIDTH)).astype(np.float32)  # noqa: NPY002 - as users do it
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
        """Return activations minus their running mean, with noise from numpy and Python."""
        h = torch.tanh(self.parts["a/b/%2F $é"](torch.tanh(self.parts["block/1"](x))))
        if self.training and torch.is_grad_enabled():
            self.mean = 0.9 * self.get_buffer("mean") + 0.1 * h.detach().mean(0)
            self.seen["calls", 1] += 1
            self.seen["last"] = random.random()
            noise = np.random.normal(size=h.shape).astype(np.float32)  # noqa: NPY002 - as users do it
            h = h + 0.1 * torch.from_numpy(noise).to(h.device) * random.random()
        return h - self.get_buffer("mean")

    def get_extra_state(self) -> dict[Any, Any]:
        """Return values of several types, and tensors."""
        return {**self.seen, "table": torch.ones(2, dtype=torch.int8), "tensors": (torch.zeros(1),)}

    def set_extra_state(self, state: dict[Any, Any]) -> None:
        """Restore the values of `get_extra_state`."""
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
