"""A frozen module of the user that computes features for the model. It is built, checked, and restored from checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from streamlearn.core.errors import ConfigurationError, StreamlearnError, is_out_of_memory, one_line
from streamlearn.learning.models import imports
from streamlearn.learning.models.modes import global_seed
from streamlearn.learning.models.module_state import load_module_state, module_state
from streamlearn.state import equal, round_trip

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn


class Encoder:
    """Computes float32 features `[B, *shape]` from samples `[B, ...]`. It never learns or changes."""

    def __init__(self, name: str, module: nn.Module, shape: tuple[int, ...]) -> None:
        self.name = name
        self.module = module
        self.shape = shape

    @classmethod
    def build(cls, spec: Mapping[str, Any], input_shape: Sequence[int], seed: int, device: torch.device) -> Self:
        """Build the encoder with the user's `package.module:function(input_shape, **options)`.

        `spec` is the configuration's section `input.encoder`. Raises `ConfigurationError` if the encoder cannot be built,
        or does not return finite weights and a float32 tensor with one row for each sample.
        """
        name = spec["name"]
        zeros = torch.zeros(2, *input_shape, device=device)
        step = ""
        with global_seed(seed):
            try:
                made = imports.import_function(name)(list(input_shape), **spec["options"])
                _freeze(made, device)
                step = f"the forward pass of a batch of shape {list(zeros.shape)} failed: "
                features: Any = _features(made, zeros)
                single: Any = _features(made, zeros[:1].clone())
            except Exception as error:  # a user's code may raise anything
                raise _encoder_error(name, error, step) from error
        is_float = isinstance(features, Tensor) and features.dtype == torch.float32
        if not is_float or features.dim() < 2 or features.shape[0] != 2:
            got = (
                f"{features.dtype} {list(features.shape)}" if isinstance(features, Tensor) else type(features).__name__
            )
            raise _encoder_error(name, f"the output for two samples must be float32 of shape [2, ...], and is {got}")
        if not isinstance(single, Tensor) or single.shape != (1, *features.shape[1:]):
            got = str(list(single.shape)) if isinstance(single, Tensor) else type(single).__name__
            raise _encoder_error(
                name, f"the output for one sample must have shape {[1, *features.shape[1:]]}, and has {got}"
            )
        if broken := [key for key, param in made.named_parameters() if not bool(param.isfinite().all())]:
            raise _encoder_error(name, f"parameter {broken[0]} is not finite")
        return cls(name, made, tuple(features.shape[1:]))

    def __call__(self, x: Tensor) -> Tensor:
        """Return the features of samples `x`. The module may overwrite `x`."""
        features: Tensor = _features(self.module, x)
        return features

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the features depend on."""
        return module_state(self.module)

    def check_state(self) -> None:
        """Save the state, load it again, and compare. Raises `ConfigurationError` if the two differ."""
        before = self.state_dict()
        try:
            saved = round_trip(before)
            same = equal(before, saved)
            load_module_state(self.module, saved)
        except Exception as error:  # a user's code may raise anything
            raise _encoder_error(self.name, error, "its state cannot be saved and loaded: ") from error
        if not same:
            raise _encoder_error(self.name, "its state changes when it is saved and loaded")

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned. Raises `ConfigurationError` if the module has other weights by now."""
        try:
            load_module_state(self.module, state)
        except RuntimeError as error:
            raise _encoder_error(self.name, error, "the saved weights do not fit: ") from error


def _freeze(module: Any, device: torch.device) -> None:
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(module).__name__}")
    for param in module.parameters():
        param.requires_grad = False
    module.eval().to(device)


@torch.no_grad()
def _features(module: nn.Module, x: Tensor) -> Any:
    features = module(x)
    # autograd refuses inference tensors, and a frozen module may run in inference mode
    return features.clone() if isinstance(features, Tensor) and features.is_inference() else features


def _encoder_error(name: str, why: Exception | str, step: str = "") -> StreamlearnError:
    if isinstance(why, Exception):
        if is_out_of_memory(why):
            return StreamlearnError.from_out_of_memory(why)
        why = one_line(why)
    return ConfigurationError(f"input.encoder {name}: {step}{why}")
