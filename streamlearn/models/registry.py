"""Builds the model that a configuration names, the same one for the same seed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from streamlearn.data import StreamlearnError
from streamlearn.models import imports
from streamlearn.models.memnet import MemNet
from streamlearn.models.mlp import MLP
from streamlearn.models.modes import eval_mode, global_seed
from streamlearn.models.resnet import ResNet

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def build(
    spec: Mapping[str, Any], input_shape: Sequence[int], num_outputs: int, seed: int, vocabulary: int | None = None
) -> nn.Module:
    """Return `mlp`, `resnet`, `memnet`, or what `package.module:function(input_shape, num_outputs, **options)` returns.

    `spec` is the configuration's `model` section. Where the input is text, the number of its words is passed to a
    function as `vocabulary`. Raises `StreamlearnError` (78) when the model cannot be built, or does not fit its input
    and outputs.
    """
    with global_seed(seed):
        try:
            if spec["name"] == "mlp":
                return MLP(input_shape, num_outputs, spec["hidden"])
            if spec["name"] == "resnet":
                return ResNet(input_shape, num_outputs, spec["width"])
            told = {} if vocabulary is None else {"vocabulary": vocabulary}
            if spec["name"] == "memnet":
                sizes = {key: spec[key] for key in ("embedding", "hops", "heads")}
                return MemNet(input_shape, num_outputs, **told, **sizes)
        except (TypeError, ValueError, RuntimeError) as error:  # the last where memory is too small
            raise model_error(spec, error) from error
        return _build_own(spec, input_shape, num_outputs, told)


def _build_own(
    spec: Mapping[str, Any], input_shape: Sequence[int], num_outputs: int, told: Mapping[str, Any]
) -> nn.Module:
    """Return the user's model, after it has seen two samples of zeros."""
    try:
        model = imports.import_function(spec["name"])(list(input_shape), num_outputs, **told, **spec["options"])
    except Exception as error:  # whatever a user's function raises is not our fault
        raise model_error(spec, error) from error
    if not isinstance(model, nn.Module):
        raise model_error(spec, f"expected a torch.nn.Module, got {type(model).__name__}")
    device = next((param.device for param in model.parameters()), None)
    zeros = torch.zeros(2, *input_shape, dtype=torch.int32 if told else torch.float32, device=device)
    shape = list(zeros.shape)
    try:
        with eval_mode(model), torch.no_grad():
            logits = model(zeros)
    except Exception as error:
        raise model_error(spec, error, f"cannot see a batch of shape {shape}: ") from error
    if not isinstance(logits, torch.Tensor) or logits.shape != (2, num_outputs):
        got = list(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise model_error(
            spec,
            f"a batch of shape {shape} must give outputs of shape {[2, num_outputs]}, and gives {got}",
        )
    if broken := [name for name, param in model.named_parameters() if not bool(param.isfinite().all())]:
        raise model_error(spec, f"parameter {broken[0]} is not finite")
    if not any(param.requires_grad for param in model.parameters()):
        raise model_error(spec, "no parameter of it learns: expected one with requires_grad")
    return model


def model_error(spec: Mapping[str, Any], why: Exception | str, doing: str = "") -> StreamlearnError:
    """Return the error that a model cannot be used: one line, 78."""
    if not isinstance(why, str):
        why = f"{type(why).__name__}: {' '.join(str(why).split())}"
    return StreamlearnError(f"model {spec['name']}: {doing}{why}", code=78)


def head_of(model: nn.Module) -> nn.Linear | None:
    """Return the model's last layer, where it is linear and named `head`."""
    head = getattr(model, "head", None)
    return head if isinstance(head, nn.Linear) else None


@torch.no_grad()
def grow_head(model: nn.Module, num_outputs: int, seed: int) -> None:
    """Give the model's `head` more outputs; the old rows keep their values, the new ones are seeded.

    Raises `StreamlearnError` (78) when the model has no linear layer named `head`.
    """
    if (head := head_of(model)) is None:
        raise StreamlearnError("grow_head: the model needs a linear layer named head", code=78)
    with torch.random.fork_rng(devices=[]):
        grown = nn.Linear(head.in_features, num_outputs, bias=head.bias is not None)
        for row in range(
            head.out_features, num_outputs
        ):  # each its own: rows must not depend on how many came together
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
