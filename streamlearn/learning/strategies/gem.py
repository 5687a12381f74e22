"""Gradient projection: GEM (Lopez-Paz & Ranzato 2017) and A-GEM (Chaudhry et al. 2019).

GEM finds the gradient g~ nearest to g with <g~, g_k> >= 0, for the gradient g_k on the memory of every past task k. With G the
matrix of these gradients, g~ = G^T v + g, where v minimises 1/2 v^T G G^T v + (G g)^T v subject to v >= margin (eq. 11, 13).
A-GEM uses one reference gradient r, on samples drawn from the whole memory. If <g, r> < 0, then
g~ = g - <g, r> / (<r, r> + epsilon) * r (eq. 11, with epsilon as in van de Ven et al. 2022). If the model fits the memory
almost perfectly, r is small and comes from a few hard samples; epsilon then leaves the gradient almost unchanged.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from streamlearn.core.samples import Batch
from streamlearn.learning.strategies.slots import BuildContext, Constraint, EndedTask, GradientOf, State

if TYPE_CHECKING:
    from collections.abc import Sequence

    from streamlearn.learning.memory import EpisodicMemory

RIDGE = 1e-3
"""Added to the diagonal of G G^T, because gradients of neighbouring tasks may be parallel. Absolute, as in GEM's own code."""


class AGEMConstraint(Constraint):
    """A-GEM: one reference gradient for each step, on samples drawn from all past tasks. Never waits for the device."""

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
        product = dot_product(grads, reference)
        square = dot_product(reference, reference)
        # 0 if there is nothing to project: a branch would wait for the device
        factor = product.clamp(max=0) / (square + self.epsilon)
        torch._foreach_addcmul_(list(grads), reference, [-factor] * len(reference))
        self._projected += (product < 0) & (square > self.epsilon)

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


class GEMConstraint(Constraint):
    """GEM: one gradient for every past task, on all of its stored samples, so a step costs more with every task.

    The quadratic program is solved on the host in float64. If it cannot be solved, the gradient stays as it is, and the
    failure is counted.
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
        past = torch.stack(
            [flatten(gradient_of(self._batch_of(task))) for task in self.memory.samples_by_task]
        ).double()
        products = (past @ flatten(grads).double()).cpu().numpy()
        if not (products < 0).any():  # also false for NaN: a step that is not finite is dropped anyway
            return
        self.projected += 1
        if (weights := solve_weights((past @ past.T).cpu().numpy(), products, self.margin)) is None:
            self.failed += 1
            return
        change = torch.from_numpy(weights).to(past.device) @ past
        for grad, values in zip(grads, change.split([grad.numel() for grad in grads]), strict=True):
            grad.add_(values.reshape(grad.shape).to(grad.dtype))

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

    def _batch_of(self, task: int) -> Batch:
        """Return all stored samples of a task as one batch."""
        stored = self.memory.samples_by_task[task]
        x, y = self.context.preprocess(stored["x"]), stored["y"].to(self.context.device)
        return Batch(x, y, torch.full((len(stored["y"]),), task))


def solve_weights(gram: np.ndarray, products: np.ndarray, margin: float) -> np.ndarray | None:
    """Return the v >= margin that minimises 1/2 v^T `gram` v + `products`^T v, or None if it cannot be found.

    With v = u + margin and P = gram + ridge = L L^T, this is the non-negative least squares problem
    |L^T u + L^-1 (P margin + products)|.
    """
    from scipy.optimize import nnls

    size = len(products)
    ridged = gram + RIDGE * np.eye(size)
    try:
        root = np.linalg.cholesky(ridged)
        shifted = ridged @ np.full(size, margin) + products
        solution, _ = nnls(root.T, -np.linalg.solve(root, shifted))
    except (np.linalg.LinAlgError, RuntimeError, ValueError):
        return None
    weights: np.ndarray = solution + margin
    return weights if bool(np.isfinite(weights).all()) else None


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """Return the entries of all tensors in one vector."""
    return torch.cat([tensor.flatten() for tensor in tensors])


def dot_product(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """Return the inner product of two aligned lists of tensors, 0-dim, on their device."""
    return torch.stack([torch.dot(x.flatten(), y.flatten()) for x, y in zip(a, b, strict=True)]).sum()
