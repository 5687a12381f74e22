"""Builds the model that a configuration names. The same seed gives the same model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from streamlearn.core.errors import ConfigurationError, one_line
from streamlearn.learning.models import imports
from streamlearn.learning.models.memnet import MemNet
from streamlearn.learning.models.mlp import MLP
from streamlearn.learning.models.modes import eval_mode, global_seed
from streamlearn.learning.models.resnet import ResNet

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def build(
    spec: Mapping[str, Any], input_shape: Sequence[int], num_outputs: int, seed: int, vocabulary: int | None = None
) -> nn.Module:
    """Build `mlp`, `resnet`, `memnet`, or the user's `package.module:function(input_shape, num_outputs, **options)`.

    `spec` is the configuration's section `model`. If the input is text, a user's function also gets the number of words, as
    the keyword `vocabulary`. Raises `ConfigurationError` if the model cannot be built, or does not fit the input shape
    and the number of outputs.
    """
    with global_seed(seed):
        try:
            if spec["name"] == "mlp":
                return MLP(input_shape, num_outputs, spec["hidden"])
            if spec["name"] == "resnet":
                return ResNet(input_shape, num_outputs, spec["width"])
            words = {} if vocabulary is None else {"vocabulary": vocabulary}
            if spec["name"] == "memnet":
                sizes = {key: spec[key] for key in ("embedding", "hops", "heads")}
                return MemNet(input_shape, num_outputs, **words, **sizes)
        except (TypeError, ValueError, RuntimeError) as error:  # RuntimeError: out of memory
            raise model_error(spec, error) from error
        return _build_custom(spec, input_shape, num_outputs, words)


def _build_custom(
    spec: Mapping[str, Any], input_shape: Sequence[int], num_outputs: int, words: Mapping[str, Any]
) -> nn.Module:
    """Build the user's model, and check it with two samples of zeros."""
    try:
        model = imports.import_function(spec["name"])(list(input_shape), num_outputs, **words, **spec["options"])
    except Exception as error:  # a user's function may raise anything
        raise model_error(spec, error) from error
    if not isinstance(model, nn.Module):
        raise model_error(spec, f"expected a torch.nn.Module, got {type(model).__name__}")
    device = next((param.device for param in model.parameters()), None)
    zeros = torch.zeros(2, *input_shape, dtype=torch.int32 if words else torch.float32, device=device)
    shape = list(zeros.shape)
    try:
        with eval_mode(model), torch.no_grad():
            logits = model(zeros)
    except Exception as error:
        raise model_error(spec, error, f"the forward pass of a batch of shape {shape} failed: ") from error
    if not isinstance(logits, torch.Tensor) or logits.shape != (2, num_outputs):
        got = list(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise model_error(
            spec,
            f"the output for a batch of shape {shape} must have shape {[2, num_outputs]}, and is {got}",
        )
    if broken := [name for name, param in model.named_parameters() if not bool(param.isfinite().all())]:
        raise model_error(spec, f"parameter {broken[0]} is not finite")
    if not any(param.requires_grad for param in model.parameters()):
        raise model_error(spec, "it has no trainable parameter: expected at least one with requires_grad")
    return model


def model_error(spec: Mapping[str, Any], why: Exception | str, step: str = "") -> ConfigurationError:
    """Return the error for a model that cannot be used. `step` says what failed, and ends with a colon."""
    if not isinstance(why, str):
        why = one_line(why)
    return ConfigurationError(f"model {spec['name']}: {step}{why}")


def head_of(model: nn.Module) -> nn.Linear | None:
    """Return the model's attribute `head` if it is a linear layer, else None."""
    head = getattr(model, "head", None)
    return head if isinstance(head, nn.Linear) else None


@torch.no_grad()
def grow_head(model: nn.Module, num_outputs: int, seed: int) -> None:
    """Replace the model's `head` by one with `num_outputs` outputs. Old rows keep their values; new rows are seeded.

    Raises `ConfigurationError` if the model has no linear layer named `head`.
    """
    if (head := head_of(model)) is None:
        raise ConfigurationError("grow_head: the model needs a linear layer named head")
    with torch.random.fork_rng(devices=[]):
        grown = nn.Linear(head.in_features, num_outputs, bias=head.bias is not None)
        for row in range(head.out_features, num_outputs):
            # a seed for each row, so that rows do not depend on how many are added at once
            torch.manual_seed(seed + row + 1)
            one = nn.Linear(head.in_features, 1, bias=head.bias is not None)
            grown.weight[row] = one.weight[0]
            if head.bias is not None:
                grown.bias[row] = one.bias[0]
        grown = grown.to(head.weight.device)
    grown.weight[: head.out_features] = head.weight
    if head.bias is not None:
        grown.bias[: head.out_features] = head.bias
    model.head = grown
