"""The update: one step that changes the weights. It is the only place of the program where a batch changes the model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch

from streamlearn.learning.loss import weighted_loss
from streamlearn.learning.models import registry
from streamlearn.learning.models.modes import differentiable_eval_mode
from streamlearn.learning.optimizers import Optimizer
from streamlearn.learning.tensors import clip_norm, dense, finite_norm

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from streamlearn.core.samples import Batch
    from streamlearn.learning.active_outputs import ActiveOutputs
    from streamlearn.learning.augment import RandomAffine
    from streamlearn.learning.config import OptimizerConfig
    from streamlearn.learning.strategies.slots import Strategy


class StepResult(NamedTuple):
    """The result of one step. Its tensors stay on the device until the end of the batch, so that no step waits for it."""

    loss: Tensor  # mean over the samples
    gradient_norm: Tensor
    finite: Tensor  # false: the gradient was not finite, and the step was dropped
    clipped: Tensor | None  # whether the gradient was clipped; None if no gradient ever is


class Update(Protocol):
    """One way to change the weights by a batch. The learner knows no more of it than this."""

    @property
    def lr(self) -> float:
        """The learning rate now."""

    def step(self, batch: Batch, weight: float) -> StepResult:
        """Take one step on a preprocessed batch on the device; `weight` is the weight of its loss.

        Nothing in it may wait for the device.
        """

    def set_parameters(self, params: Sequence[Tensor], old_indices: Sequence[int | None]) -> None:
        """Replace the parameters. `old_indices` gives the former index of each, None for a new one."""

    def reduce_lr(self, factor: float) -> None:
        """Multiply the learning rate by `factor`, permanently: it is part of the state."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a restart needs to continue bit-equal: `optimizer`, `lr_factor` and `distort`."""

    def load_state_dict(self, state: dict[str, Any], params: Sequence[Tensor]) -> None:
        """Restore what `state_dict` returned, for these parameters."""


class GradientUpdate:
    """One optimizer step on a batch and its replayed samples. Calls the slots of the strategy, in the order of `step`."""

    def __init__(
        self,
        strategy: Strategy,
        outputs: ActiveOutputs,
        spec: OptimizerConfig,
        *,
        max_norm: float | None = None,
        distort: RandomAffine | None = None,
        trains_single_samples: bool = True,
    ) -> None:
        self.strategy = strategy
        self.outputs = outputs
        self.spec = spec
        self.max_norm = max_norm  # a larger gradient is clipped; None: no limit
        self.distort = distort  # augments images, if configured
        self.trains_single_samples = trains_single_samples  # or else in evaluation mode: see `ModelCheck`
        self.lr_factor = 1.0  # factor on the learning rate; rollbacks after divergence reduce it
        self.params: list[Tensor] = list(strategy.network.trainable_parameters().values())
        self.optimizer = self._make_optimizer()

    @property
    def lr(self) -> float:
        """The learning rate now."""
        return self.optimizer.lr

    def step(self, batch: Batch, weight: float = 1.0) -> StepResult:
        """Take one optimizer step on a preprocessed batch on the device. Nothing here waits for the device."""
        s = self.strategy
        mixed = batch.with_replay(s.replay.sample(batch), s.replay.share).scale_weights(weight)
        logits, features = self._forward(mixed)
        loss = weighted_loss(logits, mixed, self.outputs.inactive_for(mixed.task))
        if features is not None:
            loss = loss + s.replay.feature_loss(mixed, features)  # replay through feedback
        loss.backward()
        grads = [dense(param.grad, param) for param in self.params]
        fixed = self._fixed_entries(mixed, grads)
        s.penalty.add_gradient(self.params, grads)  # of the penalty on changes of important parameters
        for index, entries in fixed.items():
            # these weights are still those of the past tasks, so the penalty's gradient there is only rounding
            grads[index].masked_fill_(entries, 0.0)
        s.constraint.project_gradient(self.params, grads, self.gradient_of)  # so that the step does not harm past tasks
        norm, finite = finite_norm(grads)
        clipped = self._clip(grads, norm)
        self.optimizer.step(grads, finite, fixed)  # is dropped if the gradient is not finite
        s.penalty.proximal_step(self.params, self.optimizer.lr, finite)  # if the strategy uses the implicit step
        s.constraint.restore_frozen(self.params)  # undoes changes of frozen parameters
        s.penalty.after_step(self.params, finite)  # for path integrals of the gradient
        s.replay.after_step(mixed, finite)  # trains a generator
        for param in self.params:
            param.grad = None
        return StepResult(loss.detach() / weight, norm, finite, clipped)

    def gradient_of(self, batch: Batch) -> list[Tensor]:
        """Return the gradient of a batch's mean loss at the current parameters. Does not change `.grad`."""
        joined = batch.with_replay(None, 0.0)
        logits = self._logits(joined.x, joined.task)
        loss = weighted_loss(logits, joined, self.outputs.inactive_for(joined.task))
        grads = torch.autograd.grad(loss, self.params, allow_unused=True)
        return [dense(grad, param) for grad, param in zip(grads, self.params, strict=True)]

    def set_parameters(self, params: Sequence[Tensor], old_indices: Sequence[int | None]) -> None:
        """Replace the parameters, and carry over the optimizer's moments; `old_indices` as in `Update`."""
        self.params = list(params)
        self.optimizer.set_parameters(self.params, old_indices)

    def reduce_lr(self, factor: float) -> None:
        """Multiply the learning rate by `factor`, permanently: it is part of the state."""
        self.lr_factor *= factor
        self.optimizer.lr *= factor

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to continue bit-equal."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "lr_factor": self.lr_factor,
            "distort": {} if self.distort is None else {"generator": self.distort.generator.get_state()},
        }

    def load_state_dict(self, state: dict[str, Any], params: Sequence[Tensor]) -> None:
        """Restore what `state_dict` returned, for these parameters."""
        self.params = list(params)
        self.lr_factor = state["lr_factor"]
        self.optimizer = self._make_optimizer()
        self.optimizer.load_state_dict(state["optimizer"])
        if self.distort is not None and state["distort"]:  # augmentation may be turned on or off between starts
            self.distort.generator.set_state(state["distort"]["generator"])

    def _make_optimizer(self) -> Optimizer:
        o = self.spec
        return Optimizer(self.params, o.name, o.lr * self.lr_factor, momentum=o.momentum, weight_decay=o.weight_decay)

    def _forward(self, mixed: Batch) -> tuple[Tensor, Tensor | None]:
        """Return the logits `[B, C]` and, if replay needs it, the input of the head. Augments images if configured."""
        network = self.strategy.network
        x = mixed.x if self.distort is None else self.distort(mixed.x)
        if not self.strategy.replay.needs_features:
            return self._logits(x, mixed.task), None
        head, head_inputs = registry.head_of(network.module), []
        assert head is not None  # the replay has checked this when it was built
        handle = head.register_forward_pre_hook(lambda _, inputs: head_inputs.append(inputs[0]))
        try:
            logits = self._logits(x, mixed.task)
        finally:
            handle.remove()
        return logits, head_inputs[0]

    def _logits(self, x: Tensor, task: Tensor) -> Tensor:
        """Return the logits for training. A single sample has no batch statistics: see `ModelCheck.run`."""
        network = self.strategy.network
        if len(x) > 1 or self.trains_single_samples:
            return network.forward(x, task)
        with differentiable_eval_mode(network.module):
            return network.forward(x, task)

    def _fixed_entries(self, mixed: Batch, grads: Sequence[Tensor]) -> dict[int, Tensor]:
        """Return masks of the head's entries whose output is inactive for all samples, by index of the parameter.

        Earlier momentum and weight decay must not change these entries. In scenario class, where all tasks share a mask, an
        inactive output was never trained, so only weight decay could change it.
        """
        head = self.strategy.network.head
        if head is None or (self.outputs.scenario.shares_mask and not self.optimizer.weight_decay):
            return {}
        inactive = self.outputs.inactive_for(mixed.task).all(0)
        return {
            # a weight that is tied to other layers may have a gradient nevertheless
            index: inactive.view(-1, *[1] * (param.dim() - 1)) & (grads[index] == 0)
            for index, param in enumerate(self.params)
            if param is head.weight or param is head.bias
        }

    def _clip(self, grads: Sequence[Tensor], norm: Tensor) -> Tensor | None:
        """Clip the gradient to `max_norm`, if there is one; return whether it was larger."""
        if self.max_norm is None:
            return None
        clip_norm(grads, norm, self.max_norm)
        return norm > self.max_norm
