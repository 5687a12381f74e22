"""A frozen module of the user's before the model: built, tried, and later the one that was saved."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from streamlearn.data import StreamlearnError, is_out_of_memory
from streamlearn.models import imports
from streamlearn.models.modes import global_seed
from streamlearn.models.module_state import load_module_state, module_state

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import nn


class Encoder:
    """Makes features `[B, *shape]`, float32, of samples `[B, ...]`; nothing of it ever learns or changes."""

    def __init__(self, name: str, module: nn.Module, shape: tuple[int, ...]) -> None:
        self.name = name
        self.module = module
        self.shape = shape

    @classmethod
    def build(cls, spec: Mapping[str, Any], input_shape: Sequence[int], seed: int, device: torch.device) -> Self:
        """Return the encoder that `package.module:function(input_shape, **options)` makes.

        `spec` is the configuration's `input.encoder` section. Raises `StreamlearnError` (78) when it cannot be built, does not
        give a tensor of numbers for each sample, or could not be saved.
        """
        name = spec["name"]
        zeros = torch.zeros(2, *input_shape, device=device)
        doing = ""
        with global_seed(seed):
            try:
                made = imports.import_function(name)(list(input_shape), **spec["options"])
                _freeze(made, device)
                doing = f"cannot see a batch of shape {list(zeros.shape)}: "
                features: Any = _features(made, zeros)
                alone: Any = _features(made, zeros[:1].clone())
            except Exception as error:  # whatever a user's code raises is not our fault
                raise _unfit(name, error, doing) from error
        number = isinstance(features, Tensor) and features.dtype == torch.float32
        if not number or features.dim() < 2 or features.shape[0] != 2:
            got = (
                f"{features.dtype} {list(features.shape)}" if isinstance(features, Tensor) else type(features).__name__
            )
            raise _unfit(name, f"two samples must give float32 features [2, ...], and give {got}")
        if not isinstance(alone, Tensor) or alone.shape != (1, *features.shape[1:]):
            got = str(list(alone.shape)) if isinstance(alone, Tensor) else type(alone).__name__
            raise _unfit(name, f"one sample must give features {[1, *features.shape[1:]]}, and gives {got}")
        if broken := [key for key, param in made.named_parameters() if not bool(param.isfinite().all())]:
            raise _unfit(name, f"parameter {broken[0]} is not finite")
        return cls(name, made, tuple(features.shape[1:]))

    def __call__(self, x: Tensor) -> Tensor:
        """Return the features of samples, which it may overwrite."""
        features: Tensor = _features(self.module, x)
        return features

    def state_dict(self) -> dict[str, Any]:
        """Return everything that its features depend on."""
        return module_state(self.module)

    def check_state(
        self, round_trip: Callable[[Mapping[str, Any]], Mapping[str, Any]], equal: Callable[[Any, Any], bool]
    ) -> None:
        """Save the state, read it again, and compare; raises `StreamlearnError` (78) where it is not the same."""
        before = self.state_dict()
        try:
            saved = round_trip(before)
            same = equal(before, saved)
            load_module_state(self.module, saved)
        except Exception as error:  # whatever a user's code raises is not our fault
            raise _unfit(self.name, error, "its state cannot be saved and read again: ") from error
        if not same:
            raise _unfit(self.name, "its state is not the same after it was saved and read again")

    def load(self, state: Mapping[str, Any]) -> None:
        """Become the encoder that was saved; raises `StreamlearnError` (78) where the function makes another kind by now."""
        try:
            load_module_state(self.module, state)
        except RuntimeError as error:
            raise _unfit(self.name, error, "does not fit the weights that were saved: ") from error


def _freeze(module: Any, device: torch.device) -> None:
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(module).__name__}")
    for param in module.parameters():
        param.requires_grad = False
    module.eval().to(device)


@torch.no_grad()
def _features(module: nn.Module, x: Tensor) -> Any:
    features = module(x)
    # autograd refuses what was made in inference mode, as a frozen module's author may well have chosen
    return features.clone() if isinstance(features, Tensor) and features.is_inference() else features


def _unfit(name: str, why: Exception | str, doing: str = "") -> StreamlearnError:
    if isinstance(why, Exception):
        if is_out_of_memory(why):
            return StreamlearnError.from_out_of_memory(why)
        why = f"{type(why).__name__}: {' '.join(str(why).split())}"
    return StreamlearnError(f"input.encoder {name}: {doing}{why}", code=78)
