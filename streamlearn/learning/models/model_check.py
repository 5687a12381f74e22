"""Checks a user's model before training: with a few samples, in training mode and in evaluation mode."""

from __future__ import annotations

import copy
import logging
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from streamlearn.core.errors import ConfigurationError, StreamlearnError, is_out_of_memory
from streamlearn.learning.models.modes import differentiable_eval_mode, eval_mode, global_seed
from streamlearn.learning.models.module_state import load_module_state, module_state
from streamlearn.learning.models.registry import model_error
from streamlearn.learning.tensors import dense
from streamlearn.state import equal, round_trip

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

logger = logging.getLogger(__name__)

SUMS_TO_ONE = 1e-4  # how far the sum of probabilities may be from 1


@dataclass(frozen=True)
class ModelCheck:
    """Checks one model. `build` returns an untrained model on its device; `sample(n)` returns n input samples for it."""

    name: str
    build: Callable[[], nn.Module]
    sample: Callable[[int], Tensor]
    seed: int

    def run(self, *, copies: bool) -> bool:
        """Run all checks; return whether the model can learn a single sample in training mode.

        Layers with batch statistics cannot; the learner then trains single samples in evaluation mode. `copies` says whether
        the learner will copy the model. Raises `ConfigurationError` if the model cannot be used.
        """
        with global_seed(self.seed):
            model = self.build()
            two, one = self.sample(2), self.sample(1)
            self._warn_about_probabilities(self._train(model, two))
            trains_single_samples = self._trains_single_samples(model, one)
            self._check_evaluation(model, one)
            self._check_state(model)
            if copies:
                check_copies(self.name, model, two)
        return trains_single_samples

    def _train(self, model: nn.Module, x: Tensor) -> Tensor:
        """Do a forward and a backward pass in the model's current mode; return the logits with their graph."""
        model.zero_grad()
        with as_model_error(self.name, f"training on a batch of shape {list(x.shape)} failed: "), torch.enable_grad():
            logits: Tensor = model(x)
            target = torch.zeros(len(x), dtype=torch.int64, device=x.device)
            functional.cross_entropy(logits, target).backward()
        if len(logits) != len(x):
            why = f"the output for a batch of shape {list(x.shape)} must have {len(x)} rows, and has {len(logits)}"
            raise model_error({"name": self.name}, why)
        return logits

    def _trains_single_samples(self, model: nn.Module, one: Tensor) -> bool:
        finite_before = _finite_gradients(model)
        try:
            self._train(model, one)
        except ConfigurationError:
            pass
        else:  # a layer that divides by the variance of one sample has gradients that are not finite
            if finite_before <= _finite_gradients(model):
                return True
        with differentiable_eval_mode(model):
            self._train(model, one)
        logger.info(
            "model %s: single samples are trained in evaluation mode, because training mode needs more", self.name
        )
        return False

    def _check_evaluation(self, model: nn.Module, one: Tensor) -> None:
        """Evaluate one sample, as probes and `predict` may do."""
        with (
            as_model_error(self.name, "the forward pass of a single sample in evaluation mode failed: "),
            eval_mode(model),
            torch.no_grad(),
        ):
            logits = model(one)
        if logits.dim() != 2 or len(logits) != 1:
            why = f"the output for a single sample in evaluation mode must have shape [1, C], and has {list(logits.shape)}"
            raise model_error({"name": self.name}, why)

    def _check_state(self, model: nn.Module) -> None:
        """Save the model's state, load it into a second model, and compare."""
        with as_model_error(self.name, "its state cannot be saved and loaded: "):
            state = module_state(model)
            other = self.build()
            load_module_state(other, round_trip(state))
            again = module_state(other)
        differs = [name for name in {**state, **again} if not _same(name, state, again)]
        if differs:
            why = f"its state changes when it is saved and loaded: {differs[0]!r:.80}"
            raise model_error({"name": self.name}, why)

    def _warn_about_probabilities(self, logits: Tensor) -> None:
        """Warn if the outputs are probabilities: the loss would apply a second softmax."""
        values = logits.detach()
        is_probability = type(logits.grad_fn).__name__ in {"SoftmaxBackward0", "SigmoidBackward0"}
        sums = (values.sum(1) - 1).abs().max() <= SUMS_TO_ONE
        if values.shape[1] > 1 and (is_probability or bool(((values >= 0) & (values <= 1)).all() & sums)):
            logger.warning(
                "model %s: its outputs are probabilities, and logits are expected, because the loss applies a softmax; remove "
                "the last softmax or sigmoid",
                self.name,
            )


def _finite_gradients(model: nn.Module) -> set[str]:
    """Return the names of the parameters whose gradients are finite."""
    return {name for name, param in model.named_parameters() if bool(dense(param.grad, param).isfinite().all())}


def _same(name: str, state: Mapping[str, Any], again: Mapping[str, Any]) -> bool:
    return name in state and name in again and equal(state[name], again[name])


def check_copies(name: str, model: nn.Module, zeros: Tensor) -> None:
    """Raise `ConfigurationError` if a model cannot be copied after a forward pass, because it keeps the graph."""
    with as_model_error(name, "cannot be copied after training, as learner.average and forward transfer need it: "):
        with torch.random.fork_rng(devices=[]), differentiable_eval_mode(model), torch.enable_grad():
            model(zeros)
        copy.deepcopy(model)


@contextmanager
def as_model_error(name: str, step: str) -> Iterator[None]:
    """Turn any exception of a user's code into a `ConfigurationError` of one line, or a `TemporaryError` if memory ran out."""
    try:
        yield
    except Exception as error:  # a user's model may raise anything
        if is_out_of_memory(error):
            raise StreamlearnError.from_out_of_memory(error) from error
        raise model_error({"name": name}, error, step) from error
