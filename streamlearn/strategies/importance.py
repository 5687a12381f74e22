"""What each parameter is worth to a finished task.

Fisher information (EWC), output sensitivity (MAS), path integrals (SI), both of the first and last (RWalk), or the same (L2).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from streamlearn.models.modes import differentiable_eval_mode
from streamlearn.strategies.gradient_moments import gradient_moments
from streamlearn.tensors import clones, copy_into, padded_all, zeros

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from streamlearn.strategies.slots import BuildContext, EndedTask, State

CHUNK = 256


class Importance:
    """One importance: `samples_needed` of the finished task, and what it watches while learning; by default nothing."""

    samples_needed: int = 0

    def begin_task(self, params: Sequence[Tensor]) -> None:
        """Start to watch a task whose parameters are these."""

    def see_gradient(self, grads: Sequence[Tensor]) -> None:
        """See the gradient of the task's loss alone."""

    def after_step(self, params: Sequence[Tensor], finite: Tensor) -> None:
        """See where the step led; `finite` is false where it was dropped."""

    def compute(self, ended: EndedTask) -> list[Tensor]:
        """Return the finished task's importance of every parameter."""
        raise NotImplementedError

    def grow(self, params: Sequence[Tensor]) -> None:
        """Follow parameters whose shapes have grown."""

    def state_dict(self) -> State:
        """Return everything needed to go on bit-equal."""
        return {}

    def load_state_dict(self, state: State) -> None:
        """Take over what `state_dict` returned."""


class Uniform(Importance):
    """Every parameter is worth the same: the penalty is then plain L2 toward the last task's parameters."""

    def compute(self, ended: EndedTask) -> list[Tensor]:
        return [torch.ones_like(param) for param in ended.params]


class Fisher(Importance):
    """Diagonal of the Fisher information: the mean of *per-sample* squared gradients of the log likelihood.

    Kirkpatrick et al. 2017, eq. 3. `exact`: the expectation over the network's own distribution of labels; `sampled`:
    one label drawn from it; `empirical`: the true label. The square of a batch's mean gradient would keep 1/B of it.
    """

    def __init__(self, context: BuildContext, *, kind: str, samples: int) -> None:
        self.context = context
        self.kind = kind
        self.samples_needed = samples

    def compute(self, ended: EndedTask) -> list[Tensor]:
        def total(network: nn.Module, x: Tensor, y: Tensor) -> Iterator[list[Tensor]]:
            forbidden = ~ended.active_outputs[ended.task]

            def losses(logits: Tensor, label: Tensor) -> Tensor:
                return functional.cross_entropy(logits.masked_fill(forbidden, -torch.inf), label, reduction="none")

            with torch.no_grad():
                probabilities = torch.softmax(network(x).masked_fill(forbidden, -torch.inf), 1)
            for label, weight in self._labels(probabilities, y, ended):
                yield gradient_moments(network, x, label, weight, losses, 2)

        return mean_over_samples(total, self.context, ended)

    def _labels(self, probabilities: Tensor, y: Tensor, ended: EndedTask) -> Iterator[tuple[Tensor, Tensor]]:
        """Give the labels over which the expectation runs, each with its samples' weights."""
        if self.kind == "exact":
            for output in torch.nonzero(ended.active_outputs[ended.task]).flatten().tolist():
                yield torch.full_like(y, output), probabilities[:, output]
        elif self.kind == "sampled":
            draws = torch.rand(len(y), 1, generator=ended.generator).to(y.device)
            label = (probabilities.cumsum(1) < draws).sum(1).clamp(max=probabilities.shape[1] - 1)
            yield label, torch.ones_like(probabilities[:, 0])
        else:
            yield y, torch.ones_like(probabilities[:, 0])


class OutputSensitivity(Importance):
    """Memory aware synapses: how much the output would change (Aljundi et al. 2018, eq. 3, squared norm of the outputs).

    The mean over samples of each sample's |d ||F(x)||^2 / d theta|; the gradient of the batch's mean would let samples cancel.
    Needs no labels. `F` are the logits of the task's outputs.
    """

    def __init__(self, context: BuildContext, *, samples: int) -> None:
        self.context = context
        self.samples_needed = samples

    def compute(self, ended: EndedTask) -> list[Tensor]:
        def total(network: nn.Module, x: Tensor, y: Tensor) -> Iterator[list[Tensor]]:
            competes = ended.active_outputs[ended.task]

            def losses(logits: Tensor, label: Tensor) -> Tensor:
                del label
                return torch.where(competes, logits, 0.0).square().sum(1)

            yield gradient_moments(network, x, y, torch.ones(len(y), device=x.device), losses, 1)

        return mean_over_samples(total, self.context, ended)


class PathIntegral(Importance):
    """Synaptic intelligence: how much each parameter's way lowered the task's loss (Zenke, Poole & Ganguli 2017).

    `w -= g * (theta - before)` at every step, with the gradient of the task's loss *alone* (eq. 3); at the task's end
    `omega = relu(w) / (moved^2 + xi)` (eq. 5).
    """

    def __init__(self, context: BuildContext, *, xi: float) -> None:
        self.device = context.device
        self.xi = xi
        self.path: list[Tensor] = []
        self.start: list[Tensor] = []
        self._before: list[Tensor] = []
        self._gradient: list[Tensor] = []

    def begin_task(self, params: Sequence[Tensor]) -> None:
        self.path, self.start, self._before = zeros(params), clones(params), clones(params)
        self._gradient = zeros(params)

    @torch.no_grad()
    def see_gradient(self, grads: Sequence[Tensor]) -> None:
        copy_into(self._gradient, grads)

    @torch.no_grad()
    def after_step(self, params: Sequence[Tensor], finite: Tensor) -> None:
        add_path_integral(self.path, self._gradient, self._before, params, finite)

    @torch.no_grad()
    def compute(self, ended: EndedTask) -> list[Tensor]:
        moved = [(param - start).square() for param, start in zip(ended.params, self.start, strict=True)]
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


class RiemannianWalk(Importance):
    """Fisher information along the way, and how much the way lowered the loss by it (Chaudhry et al. 2018).

    Every step: `F <- keep * F + (1 - keep) * B * g^2`, where B, the batch size, makes the square of a batch's mean gradient
    comparable to the mean of squares; and the loss's decrease `-g * (theta - before)`. Every `interval` steps (eq. 8):
    `score += relu(decrease) / (F * moved^2 / 2 + epsilon)`. At a task's end both are divided by their largest value; the
    score is averaged with that of the tasks before; their sum is the importance of all tasks so far (eq. 9).
    """

    def __init__(self, context: BuildContext, *, keep: float, interval: int, epsilon: float = 1e-3) -> None:
        self.device = context.device
        self.batch_size = context.batch_size
        self.keep = keep
        self.interval = interval
        self.epsilon = epsilon
        self.steps = 0  # since the mark
        self.fisher: list[Tensor] = []
        self.past: list[Tensor] = []  # the normalised score of the tasks before
        self._walk: dict[str, list[Tensor]] = {}  # score, decrease, before, mark of the current task
        self._gradient: list[Tensor] = []

    def begin_task(self, params: Sequence[Tensor]) -> None:
        self.fisher = self.fisher or zeros(params)
        self.past = self.past or zeros(params)
        self.steps = 0
        self._walk = {
            "score": zeros(params), "decrease": zeros(params), "before": clones(params), "mark": clones(params)
        }  # fmt: skip
        self._gradient = zeros(params)

    @torch.no_grad()
    def see_gradient(self, grads: Sequence[Tensor]) -> None:
        copy_into(self._gradient, grads)

    @torch.no_grad()
    def after_step(self, params: Sequence[Tensor], finite: Tensor) -> None:
        add_path_integral(self._walk["decrease"], self._gradient, self._walk["before"], params, finite)
        torch._foreach_mul_(self.fisher, 1 - (1 - self.keep) * finite)  # a dropped step says nothing: its gradient is 0
        torch._foreach_addcmul_(self.fisher, self._gradient, self._gradient, (1 - self.keep) * self.batch_size)
        self.steps += 1
        if self.steps == self.interval:
            self._score(params)

    def _score(self, params: Sequence[Tensor]) -> None:
        walk = self._walk
        for score, decrease, mark, fisher, param in zip(
            walk["score"], walk["decrease"], walk["mark"], self.fisher, params, strict=True
        ):
            distance = 0.5 * fisher * (param - mark).square() + self.epsilon
            score.add_(decrease.relu_().div_(distance))
            decrease.zero_()
            mark.copy_(param)
        self.steps = 0

    @torch.no_grad()
    def compute(self, ended: EndedTask) -> list[Tensor]:
        if self.steps:
            self._score(ended.params)
        score, fisher = _normalised(self._walk["score"]), _normalised(self.fisher)
        # the first task has no score before it to be averaged with
        self.past = score if ended.task == 0 else [(old + new) / 2 for old, new in zip(self.past, score, strict=True)]
        return [a + b for a, b in zip(fisher, self.past, strict=True)]

    def grow(self, params: Sequence[Tensor]) -> None:
        if not self.fisher:
            return
        self.fisher, self.past = padded_all(self.fisher, params), padded_all(self.past, params)
        self._gradient = padded_all(self._gradient, params)
        for name, values in self._walk.items():
            self._walk[name] = padded_all(values, params, copy_rest=name in {"before", "mark"})

    def state_dict(self) -> State:
        named = {"fisher": self.fisher, "past": self.past, **self._walk}
        state: State = {name: {str(n): value for n, value in enumerate(values)} for name, values in named.items()}
        return {**state, "steps": self.steps}

    def load_state_dict(self, state: State) -> None:
        self.steps = state["steps"]
        loaded = {
            name: [values[str(n)].to(self.device, copy=True) for n in range(len(values))]
            for name, values in state.items()
            if name != "steps"
        }
        self.fisher, self.past = loaded.pop("fisher"), loaded.pop("past")
        self._walk = loaded
        self._gradient = zeros(self.fisher)


def add_path_integral(
    path: list[Tensor], gradient: list[Tensor], before: list[Tensor], params: Sequence[Tensor], finite: Tensor
) -> None:
    """Add `gradient * (before - params)` to `path`, and let `before` follow; a dropped step adds nothing, its gradient is 0."""
    nothing = torch.zeros((), device=finite.device)
    for value in gradient:
        torch.where(finite, value, nothing, out=value)  # it moves nothing, but 0 * NaN is NaN
    torch._foreach_sub_(before, list(params))
    torch._foreach_addcmul_(path, gradient, before)
    copy_into(before, params)


def _normalised(values: Sequence[Tensor]) -> list[Tensor]:
    """Return values divided by the largest of all, or as they are where none is above 0."""
    largest = torch.stack([value.max() for value in values]).max()
    return [value / torch.where(largest > 0, largest, 1.0) for value in values]


def mean_over_samples(
    total: Callable[[nn.Module, Tensor, Tensor], Iterator[list[Tensor]]], context: BuildContext, ended: EndedTask
) -> list[Tensor]:
    """Return the mean over the reservoir of what `total(network, x, y)` sums over a chunk of it, in evaluation mode."""
    sums = zeros(ended.params)
    if not len(ended.y):
        return sums
    with differentiable_eval_mode(ended.network):
        for x, y in zip(ended.x.split(CHUNK), ended.y.split(CHUNK), strict=True):
            for part in total(ended.network, context.preprocess(x), y.to(context.device)):
                torch._foreach_add_(sums, part)
    return [value / len(ended.y) for value in sums]
