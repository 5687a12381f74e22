"""What each parameter is worth to a finished task: Fisher information (EWC) and path integrals (SI)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from streamlearn.tensors import clones, copy_into, padded_all, zeros

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from streamlearn.strategies.parts import Closing, State, World

CHUNK = 256


class Importance(Protocol):
    """One importance: `samples_needed` of the finished task, and what it watches while learning."""

    samples_needed: int

    def begin_task(self, params: Sequence[Tensor]) -> None:
        """Start to watch a task whose parameters are these."""

    def note(self, grads: Sequence[Tensor]) -> None:
        """See the gradient of the task's loss alone."""

    def accumulate(self, params: Sequence[Tensor], finite: Tensor) -> None:
        """See where the step led; `finite` is false where it was dropped."""

    def consolidate(self, closing: Closing) -> list[Tensor]:
        """Return the finished task's importance of every parameter."""

    def grow(self, params: Sequence[Tensor]) -> None:
        """Follow parameters whose shapes have grown."""

    def state_dict(self) -> State:
        """Return everything needed to go on bit-equal."""

    def load_state_dict(self, state: State) -> None:
        """Take over what `state_dict` returned."""


class Fisher:
    """Diagonal of the Fisher information: the mean of *per-sample* squared gradients of the log likelihood.

    Kirkpatrick et al. 2017, eq. 3. `exact`: the expectation over the network's own distribution of labels; `sampled`:
    one label drawn from it; `empirical`: the true label. The square of a batch's mean gradient would keep 1/B of it.
    """

    def __init__(self, world: World, *, kind: str, samples: int) -> None:
        self.world = world
        self.kind = kind
        self.samples_needed = samples

    def begin_task(self, params: Sequence[Tensor]) -> None:
        """Nothing is watched."""

    def note(self, grads: Sequence[Tensor]) -> None:
        """Nothing is watched."""

    def accumulate(self, params: Sequence[Tensor], finite: Tensor) -> None:
        """Nothing is watched."""

    def consolidate(self, closing: Closing) -> list[Tensor]:
        total = zeros(closing.params)
        if not len(closing.y):
            return total
        training = closing.network.training
        closing.network.eval()
        squares = _squares_by_layer if _has_closed_form(closing.network) else _squares_by_sample
        for x, y in zip(closing.x.split(CHUNK), closing.y.split(CHUNK), strict=True):
            scaled = self.world.scale(x)
            forbidden = ~closing.allowed[closing.task]
            with torch.no_grad():
                logits = closing.network(scaled).masked_fill(forbidden, -torch.inf)
                probabilities = torch.softmax(logits, 1)
            for label, weight in self._labels(probabilities, y.to(logits.device), closing):
                torch._foreach_add_(total, squares(closing.network, scaled, label, weight, forbidden))
        closing.network.train(training)
        return [sum_ / len(closing.y) for sum_ in total]

    def grow(self, params: Sequence[Tensor]) -> None:
        """Nothing is kept."""

    def state_dict(self) -> State:
        return {}

    def load_state_dict(self, state: State) -> None:
        """Nothing is kept."""

    def _labels(self, probabilities: Tensor, y: Tensor, closing: Closing) -> Iterator[tuple[Tensor, Tensor]]:
        """Give the labels over which the expectation runs, each with its samples' weights."""
        if self.kind == "exact":
            for output in torch.nonzero(closing.allowed[closing.task]).flatten().tolist():
                yield torch.full_like(y, output), probabilities[:, output]
        elif self.kind == "sampled":
            draws = torch.rand(len(y), 1, generator=closing.generator).to(y.device)
            label = (probabilities.cumsum(1) < draws).sum(1).clamp(max=probabilities.shape[1] - 1)
            yield label, torch.ones_like(probabilities[:, 0])
        else:
            yield y, torch.ones_like(probabilities[:, 0])


class PathIntegral:
    """Synaptic intelligence: how much each parameter's way lowered the task's loss (Zenke, Poole & Ganguli 2017).

    `w -= g * (theta - before)` at every step, with the gradient of the task's loss *alone* (eq. 3); at the task's end
    `omega = relu(w) / (moved^2 + xi)` (eq. 5).
    """

    samples_needed = 0

    def __init__(self, world: World, *, xi: float) -> None:
        self.device = world.device
        self.xi = xi
        self.path: list[Tensor] = []
        self.start: list[Tensor] = []
        self._before: list[Tensor] = []
        self._gradient: list[Tensor] = []

    def begin_task(self, params: Sequence[Tensor]) -> None:
        self.path, self.start, self._before = zeros(params), clones(params), clones(params)
        self._gradient = zeros(params)

    @torch.no_grad()
    def note(self, grads: Sequence[Tensor]) -> None:
        copy_into(self._gradient, grads)

    @torch.no_grad()
    def accumulate(self, params: Sequence[Tensor], finite: Tensor) -> None:
        nothing = torch.zeros((), device=finite.device)
        for gradient in self._gradient:
            torch.where(finite, gradient, nothing, out=gradient)  # a dropped step moves nothing, but 0 * NaN is NaN
        # before - after, so that path += gradient * way down
        torch._foreach_sub_(self._before, list(params))
        torch._foreach_addcmul_(self.path, self._gradient, self._before)
        copy_into(self._before, params)

    @torch.no_grad()
    def consolidate(self, closing: Closing) -> list[Tensor]:
        moved = [(param - start).square() for param, start in zip(closing.params, self.start, strict=True)]
        return [path.relu() / (square + self.xi) for path, square in zip(self.path, moved, strict=True)]

    def grow(self, params: Sequence[Tensor]) -> None:
        if self.path:
            self.path, self._gradient = padded_all(self.path, params), padded_all(self._gradient, params)
            self.start = padded_all(self.start, params, copy_rest=True)
            self._before = padded_all(self._before, params, copy_rest=True)

    def state_dict(self) -> State:
        return {
            "path": {str(n): value for n, value in enumerate(self.path)},
            "start": {str(n): value for n, value in enumerate(self.start)},
            "before": {str(n): value for n, value in enumerate(self._before)},
        }

    def load_state_dict(self, state: State) -> None:
        size = len(state["path"])
        self.path, self.start, self._before = (
            [state[key][str(n)].to(self.device, copy=True) for n in range(size)] for key in ("path", "start", "before")
        )
        self._gradient = zeros(self.path)


def _has_closed_form(network: nn.Module) -> bool:
    """Tell whether all parameters belong to linear layers that see `[B, features]`."""
    layers = [m for m in network.modules() if next(m.parameters(recurse=False), None) is not None]
    return all(type(layer) is nn.Linear for layer in layers)


@torch.enable_grad()
def _squares_by_layer(network: nn.Module, x: Tensor, y: Tensor, weight: Tensor, forbidden: Tensor) -> list[Tensor]:
    """Return the weighted sum of per-sample squared gradients from activations `a` and deltas: `(delta^2)^T a^2`."""
    seen: list[tuple[nn.Module, Tensor, Tensor]] = []

    def keep(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append((layer, inputs[0].detach(), output))

    handles = [m.register_forward_hook(keep) for m in network.modules() if type(m) is nn.Linear]
    try:
        loss = functional.cross_entropy(network(x).masked_fill(forbidden, -torch.inf), y, reduction="none")
    finally:
        for handle in handles:
            handle.remove()
    deltas = torch.autograd.grad(loss.sum(), [output for _, _, output in seen])
    squares: dict[int, Tensor] = {}
    for (layer, a, _), delta in zip(seen, deltas, strict=True):
        weighted = delta.square() * weight[:, None]
        squares[id(layer.weight)] = weighted.T @ a.square()
        if layer.bias is not None:
            squares[id(layer.bias)] = weighted.sum(0)
    return [squares[id(param)] for param in network.parameters()]


def _squares_by_sample(network: nn.Module, x: Tensor, y: Tensor, weight: Tensor, forbidden: Tensor) -> list[Tensor]:
    """Return the same for any network, one gradient a sample."""
    names = [name for name, _ in network.named_parameters()]
    params = {name: param.detach() for name, param in network.named_parameters()}

    def loss(values: dict[str, Tensor], one: Tensor, label: Tensor) -> Tensor:
        logits: Tensor = torch.func.functional_call(network, values, (one[None],))
        return functional.cross_entropy(logits.masked_fill(forbidden, -torch.inf), label[None])

    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
    total = [torch.zeros_like(params[name]) for name in names]
    for xs, ys, ws in zip(x.split(16), y.split(16), weight.split(16), strict=True):
        by_name = gradients(params, xs, ys)
        parts = [torch.einsum("b...,b->...", by_name[name].square(), ws) for name in names]
        torch._foreach_add_(total, parts)
    return total
