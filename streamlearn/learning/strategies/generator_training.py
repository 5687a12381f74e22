"""Trains a generator: its optimizer steps, the moving average of its weights, and the updates that were dropped."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from streamlearn.learning.optimizers import Optimizer
from streamlearn.learning.tensors import (
    averaging_rate,
    clip_norm,
    clones,
    copy_into,
    dense,
    finite_norm,
    from_numbered,
    numbered,
    padded_all,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from streamlearn.learning.models.feedback import Feedback
    from streamlearn.learning.models.vae import VAE
    from streamlearn.learning.strategies.slots import State

    Generator = VAE | Feedback

logger = logging.getLogger(__name__)

LARGE_VALUES = 10.0
"""Root mean square above which a generator of variance 1 uses its latent codes for the size of the values."""


@dataclass(frozen=True)
class GeneratorSpec:
    """The generator's size and training."""

    conditional: bool
    hidden: int
    latent: int
    lr: float
    likelihood: str
    average: float | None
    moments: bool  # draw codes from the distribution of each class's codes, not from N(0, I)
    gated: float = 0.0  # brain-inspired: share of the decoder's units that a class switches off


class GeneratorTraining:
    """A generator that is trained, and the moving average of its weights, which `end_task` keeps.

    `build` returns an untrained generator for a number of outputs; gradients are clipped to `max_norm`, if it is not None.
    """

    def __init__(
        self,
        build: Callable[[int], Generator],
        num_outputs: int,
        spec: GeneratorSpec,
        max_norm: float | None,
        device: torch.device,
    ) -> None:
        self.build = build
        self.num_outputs = num_outputs
        self.spec = spec
        self.max_norm = max_norm
        self.device = device
        self.generator = build(num_outputs)
        self.average = clones(self._params)
        self.optimizer = self._make_optimizer()
        self.steps = 0  # in the current task
        self._dropped = torch.zeros((), dtype=torch.int64, device=device)  # see `pop_dropped_updates`
        self._drop_logged = False  # for the current task

    @property
    def _params(self) -> list[Tensor]:
        return list(self.generator.parameters())

    def _make_optimizer(self) -> Optimizer:
        return Optimizer(self._params, "adam", self.spec.lr)

    def begin_task(self) -> None:
        """Allow one warning about dropped updates in the task that begins."""
        self._drop_logged = False

    def step(self, finite: Tensor) -> Tensor:
        """Take an optimizer step with the gradients computed so far; return whether it was applied, 0-dim, on the device.

        `finite` is false if the model's own step was dropped; then the generator's is dropped, too.
        """
        params = self._params
        grads = [dense(param.grad, param) for param in params]
        norm, own_finite = finite_norm(grads)
        if self.max_norm is not None:
            clip_norm(grads, norm, self.max_norm)
        applied = own_finite & finite
        self._dropped += finite & ~own_finite
        self.optimizer.step(grads, applied)
        self.generator.zero_grad()
        if self.spec.average is not None:
            rate = averaging_rate(self.spec.average, self.steps) * applied
            with torch.no_grad():
                for mean, param in zip(self.average, params, strict=True):
                    mean.lerp_(param, rate)
        self.steps += 1
        return applied

    def pop_dropped_updates(self) -> int:
        """Return how many updates were dropped as not finite since the last call. Waits for the device."""
        dropped = int(self._dropped)
        self._dropped.zero_()
        if dropped and not self._drop_logged:
            self._drop_logged = True
            advice = "lower strategy.generative.lr, set learner.max_norm, or bring the values to about -1 to 1 by input.scale"
            logger.warning(
                "an update of the generator was not finite and was dropped; further ones in this task are only counted; %s",
                advice,
            )
        return dropped

    @torch.no_grad()
    def end_task(self) -> Generator:
        """Continue from the averaged weights, if there is an average, and return a copy of the generator."""
        if self.spec.average is not None:
            copy_into(self._params, self.average)
        generator = self.build(self.num_outputs)
        copy_into(list(generator.parameters()), self._params)
        self.steps = 0
        return generator

    def grow(self, num_outputs: int) -> None:
        """Add outputs, up to `num_outputs`."""
        self.num_outputs = num_outputs
        self.generator.grow(num_outputs)
        self.optimizer.set_parameters(self._params)
        self.average = padded_all(self.average, self._params, copy_rest=True)

    def state_dict(self) -> State:
        """Return everything that `load_state_dict` needs."""
        return {
            "steps": self.steps,
            "generator": dict(self.generator.state_dict()),
            "average": numbered(self.average),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: State, num_outputs: int) -> None:
        """Restore what `state_dict` returned, for a generator of this many outputs."""
        self.num_outputs, self.steps = num_outputs, state["steps"]
        self.generator = self.build(num_outputs)
        self.generator.load_state_dict(state["generator"])
        self.average = from_numbered(state["average"], self.device)
        self.optimizer = self._make_optimizer()
        self.optimizer.load_state_dict(state["optimizer"])


def warn_of_unsuitable_values(x: Tensor, likelihood: str) -> None:
    """Warn if the values of a batch cannot be generated well. Waits for the device."""
    low, high, size = float(x.min()), float(x.max()), float(x.square().mean().sqrt())
    problem = None
    if likelihood == "bernoulli" and (low < 0 or high > 1):
        problem = (
            "are clipped to 0..1 in replayed samples, because of likelihood: bernoulli; set input.scale so that they are "
            "from 0 to 1, or bring them to about -1 to 1 (input.scale, or an input.encoder) and choose likelihood: gaussian"
        )
    elif likelihood == "gaussian" and size > LARGE_VALUES:
        problem = (
            "are too large for likelihood: gaussian, whose variance is 1: samples would be generated badly; bring them to "
            "about -1 to 1 by input.scale, or by an input.encoder that standardises them"
        )
    if problem is not None:
        logger.warning("strategy.generative: values from %.3g to %.3g %s", low, high, problem)
