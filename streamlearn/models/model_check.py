"""A user's model is tried before anything is learned: with few samples, in training mode and in evaluation mode."""

from __future__ import annotations

import copy
import logging
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from streamlearn.data import StreamlearnError, is_out_of_memory
from streamlearn.models.modes import differentiable_eval_mode, eval_mode, global_seed
from streamlearn.models.module_state import load_module_state, module_state
from streamlearn.models.registry import model_error
from streamlearn.tensors import dense

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

log = logging.getLogger(__name__)

SUMS_TO_ONE = 1e-4  # how far the sum of probabilities may be from 1


@dataclass(frozen=True)
class ModelCheck:
    """What is tried: `build` returns an untrained model on its device, `sample` returns so many samples of what it sees."""

    name: str
    build: Callable[[], nn.Module]
    sample: Callable[[int], Tensor]
    seed: int
    round_trip: Callable[[Mapping[str, Any]], Mapping[str, Any]]  # a state, saved and read again
    equal: Callable[[Any, Any], bool]

    def run(self, *, copies: bool) -> bool:
        """Try everything; return whether the model can learn a single sample in training mode.

        Layers with batch statistics cannot: such a model then learns a single sample in evaluation mode. `copies`: whether the
        learner makes copies of the model. Raises `StreamlearnError` (78) for a model that cannot be used.
        """
        with global_seed(self.seed):
            model = self.build()
            two, one = self.sample(2), self.sample(1)
            self._check_logits(self._learn(model, two))
            alone = self._learns_alone(model, one)
            self._answer(model, one)
            self._check_state(model)
            if copies:
                check_copies(self.name, model, two)
        return alone

    def _learn(self, model: nn.Module, x: Tensor) -> Tensor:
        """Learn a batch in the mode that the model is in; return its logits, with their graph."""
        model.zero_grad()
        with as_model_error(self.name, f"cannot learn a batch of shape {list(x.shape)}: "), torch.enable_grad():
            logits: Tensor = model(x)
            target = torch.zeros(len(x), dtype=torch.int64, device=x.device)
            functional.cross_entropy(logits, target).backward()
        if len(logits) != len(x):
            what = f"a batch of shape {list(x.shape)} must give {len(x)} rows of outputs, and gives {len(logits)}"
            raise model_error({"name": self.name}, what)
        return logits

    def _learns_alone(self, model: nn.Module, one: Tensor) -> bool:
        sound = _finite_gradients(model)
        try:
            self._learn(model, one)
        except StreamlearnError as error:
            if error.code != 78:
                raise
        else:  # what divides by the spread of one sample gives gradients that are not finite
            if sound <= _finite_gradients(model):
                return True
        with differentiable_eval_mode(model):
            self._learn(model, one)
        log.info("model %s: learns a single sample in evaluation mode, for it needs more in training mode", self.name)
        return False

    def _answer(self, model: nn.Module, one: Tensor) -> None:
        """Evaluate one sample, as probes and `predict` may."""
        with (
            as_model_error(self.name, "cannot see a single sample in evaluation mode: "),
            eval_mode(model),
            torch.no_grad(),
        ):
            logits = model(one)
        if logits.dim() != 2 or len(logits) != 1:
            what = (
                f"a single sample must give outputs of shape [1, C] in evaluation mode, and gives {list(logits.shape)}"
            )
            raise model_error({"name": self.name}, what)

    def _check_state(self, model: nn.Module) -> None:
        """Save what the model is now, read it into a model that was built anew, and compare."""
        with as_model_error(self.name, "its state cannot be saved and read again: "):
            state = module_state(model)
            other = self.build()
            load_module_state(other, self.round_trip(state))
            again = module_state(other)
        differs = [name for name in {**state, **again} if not self._same(name, state, again)]
        if differs:
            why = f"its state is not the same after it was saved and read again: {differs[0]!r:.80}"
            raise model_error({"name": self.name}, why)

    def _same(self, name: str, state: Mapping[str, Any], again: Mapping[str, Any]) -> bool:
        return name in state and name in again and self.equal(state[name], again[name])

    def _check_logits(self, logits: Tensor) -> None:
        """Warn where outputs are probabilities: the loss takes the softmax of them again."""
        values = logits.detach()
        squashed = type(logits.grad_fn).__name__ in {"SoftmaxBackward0", "SigmoidBackward0"}
        sums = (values.sum(1) - 1).abs().max() <= SUMS_TO_ONE
        if values.shape[1] > 1 and (squashed or bool(((values >= 0) & (values <= 1)).all() & sums)):
            log.warning(
                "model %s: its outputs are probabilities, and logits are expected: the loss takes their softmax; leave out the "
                "last softmax or sigmoid",
                self.name,
            )


def _finite_gradients(model: nn.Module) -> set[str]:
    """Return the names of the parameters whose gradients are finite."""
    return {name for name, param in model.named_parameters() if bool(dense(param.grad, param).isfinite().all())}


def check_copies(name: str, model: nn.Module, zeros: Tensor) -> None:
    """Raise `StreamlearnError` (78) where a model cannot be copied once it has seen something: it keeps a graph."""
    with as_model_error(
        name, "cannot be copied once it has learned, as learner.average and forward transfer need it: "
    ):
        with torch.random.fork_rng(devices=[]), differentiable_eval_mode(model), torch.enable_grad():
            model(zeros)
        copy.deepcopy(model)


@contextmanager
def as_model_error(name: str, doing: str) -> Iterator[None]:
    """Turn what a user's code raises into one line: 78, or 75 where no memory was left."""
    try:
        yield
    except Exception as error:  # whatever a user's model raises is not our fault
        if is_out_of_memory(error):
            raise StreamlearnError.from_out_of_memory(error) from error
        raise model_error({"name": name}, error, doing) from error
