"""Gradient projection: GEM (Lopez-Paz & Ranzato 2017) and A-GEM (Chaudhry et al. 2019).

GEM: find the g~ nearest to g with <g~, g_k> >= 0 for the gradient g_k on the memory of every past task k. With G the matrix of
these gradients, g~ = G^T v + g, where v minimises 1/2 v^T G G^T v + (G g)^T v subject to v >= margin (eq. 11, 13).
A-GEM: one reference gradient r, drawn from all of the memory; where <g, r> < 0, g~ = g - <g, r> / (<r, r> + epsilon) * r
(eq. 11, and epsilon as van de Ven et al. 2022 have it: where the memory is fitted almost perfectly, r is what is left of its
hardest samples, and the step passes).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from streamlearn.data import Batch
from streamlearn.strategies.slots import BuildContext, Constraint, EndedTask, GradientOf, State

if TYPE_CHECKING:
    from collections.abc import Sequence

    from streamlearn.memory import EpisodicMemory

RIDGE = 1e-3
"""Added to GEM's program, whose gradients of neighbouring tasks may be parallel: absolute, as its authors have it."""


class AverageProjection(Constraint):
    """A-GEM: one reference gradient a step, on samples drawn from all past tasks; branch-free, nothing waits."""

    def __init__(self, context: BuildContext, memory: EpisodicMemory, *, reference: int | None, epsilon: float) -> None:
        self.context = context
        self.memory = memory
        self.reference = context.batch_size if reference is None else reference
        self.epsilon = epsilon
        self.samples_needed = memory.budget
        self.needs_balanced_samples = memory.balanced
        self._projected = torch.zeros((), dtype=torch.int64, device=context.device)

    def project_gradient(self, params: Sequence[Tensor], grads: Sequence[Tensor], gradient_of: GradientOf) -> None:
        del params
        if not len(self.memory):
            return
        drawn = self.memory.draw(self.reference)
        batch = Batch(self.context.preprocess(drawn["x"]), drawn["y"].to(self.context.device), drawn["task"])
        reference = gradient_of(batch)
        along = dot_product(grads, reference)
        square = dot_product(reference, reference)
        factor = along.clamp(max=0) / (square + self.epsilon)
        torch._foreach_addcmul_(list(grads), reference, [-factor] * len(reference))
        self._projected += (along < 0) & (square > self.epsilon)

    def end_task(self, ended: EndedTask) -> None:
        self.memory.store(ended.task, ended.x, ended.y, ended.output_labels)

    def state_dict(self) -> State:
        return {**self.memory.state_dict(), "projected": int(self._projected)}

    def load_state_dict(self, state: State) -> None:
        self.memory.load_state_dict(state)
        self._projected.fill_(state["projected"])

    def memory_usage(self) -> dict[str, Any]:
        return self.memory.usage()

    def counters(self) -> dict[str, int]:
        return {"projected": int(self._projected), "failed": 0}


class EpisodicProjection(Constraint):
    """GEM: a gradient for every past task, on all of its memory, so a step costs more with every task.

    The program is solved on the host, in float64; where it fails, the step goes on as it was, and is counted.
    """

    def __init__(self, context: BuildContext, memory: EpisodicMemory, *, per_task: int, margin: float) -> None:
        self.context = context
        self.memory = memory
        self.margin = margin
        self.samples_needed = per_task
        self.projected = 0
        self.failed = 0

    def project_gradient(self, params: Sequence[Tensor], grads: Sequence[Tensor], gradient_of: GradientOf) -> None:
        del params
        if not len(self.memory):
            return
        past = torch.stack([flatten(gradient_of(self._samples(task))) for task in self.memory.samples_by_task]).double()
        new = flatten(grads).double()
        along = (past @ new).cpu().numpy()
        if not (along < 0).any():  # false for NaN, too: a step that is not finite is dropped anyway
            return
        self.projected += 1
        if (weights := solve_weights((past @ past.T).cpu().numpy(), along, self.margin)) is None:
            self.failed += 1
            return
        change = torch.from_numpy(weights).to(past.device) @ past
        for grad, part in zip(grads, change.split([grad.numel() for grad in grads]), strict=True):
            grad.add_(part.reshape(grad.shape).to(grad.dtype))

    def end_task(self, ended: EndedTask) -> None:
        self.memory.store(ended.task, ended.x, ended.y, ended.output_labels)

    def state_dict(self) -> State:
        return {**self.memory.state_dict(), "projected": self.projected, "failed": self.failed}

    def load_state_dict(self, state: State) -> None:
        self.memory.load_state_dict(state)
        self.projected, self.failed = state["projected"], state["failed"]

    def memory_usage(self) -> dict[str, Any]:
        return self.memory.usage()

    def counters(self) -> dict[str, int]:
        return {"projected": self.projected, "failed": self.failed}

    def _samples(self, task: int) -> Batch:
        slot = self.memory.samples_by_task[task]
        return Batch(
            self.context.preprocess(slot["x"]), slot["y"].to(self.context.device), torch.full((len(slot["y"]),), task)
        )


def solve_weights(gram: np.ndarray, along: np.ndarray, margin: float) -> np.ndarray | None:
    """Return the v >= margin that minimises 1/2 v^T `gram` v + `along`^T v, or None where it cannot be found.

    With v = u + margin and P = gram + ridge = L L^T it is the non-negative least squares problem
    |L^T u + L^-1 (P margin + along)|.
    """
    from scipy.optimize import nnls

    size = len(along)
    ridged = gram + RIDGE * np.eye(size)
    try:
        root = np.linalg.cholesky(ridged)
        shifted = ridged @ np.full(size, margin) + along
        solution, _ = nnls(root.T, -np.linalg.solve(root, shifted))
    except (np.linalg.LinAlgError, RuntimeError, ValueError):
        return None
    found: np.ndarray = solution + margin
    return found if bool(np.isfinite(found).all()) else None


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """Return all entries in one vector."""
    return torch.cat([tensor.flatten() for tensor in tensors])


def dot_product(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """Return the inner product of two aligned lists, 0-dim, on their device."""
    return torch.stack([torch.dot(x.flatten(), y.flatten()) for x, y in zip(a, b, strict=True)]).sum()
