"""Per-sample gradient moments: sum over samples of weight * |gradient|^p, for p = 2 (Fisher) and p = 1 (MAS).

A closed form computes them layer by layer, from the activations `a` and deltas `d` of one backward pass, if every layer has
such a form: a linear layer's gradient is the outer product of d and a, so its moment is (|d|^p)^T |a|^p. Otherwise there is one
gradient for each sample, for several samples at once if torch can do that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from streamlearn.core.errors import ConfigurationError, is_out_of_memory, one_line
from streamlearn.learning.models.modes import differentiable_eval_mode
from streamlearn.learning.tensors import dense, zeros

if TYPE_CHECKING:
    from collections.abc import Callable

    from streamlearn.learning.strategies.slots import BuildContext

SLICE = 16  # samples whose gradients are in memory at the same time
TOLERANCE = 0.02  # relative to the largest entry of a gradient


def gradient_moments(
    network: nn.Module,
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    losses: Callable[[Tensor, Tensor], Tensor],
    power: int,
) -> list[Tensor]:
    """Return, for each trained parameter, the sum over samples of `weight * |gradient of the sample's loss|^power`.

    `x [B, ...]`, `y [B]`, `weight [B]`; `losses` maps logits `[B, C]` and `y` to the loss of each sample, `[B]`.
    """
    found = _by_layer(network, x, y, weight, losses, power) if _is_layered(network, x[:2], y[:2], losses) else None
    if found is None and any(isinstance(module, nn.RNNBase) for module in network.modules()):
        return _one_by_one(network, x, y, weight, losses, power)  # torch cannot vectorise recurrent layers over samples
    if found is None:
        try:
            found = _by_sample(network, x, y, weight, losses, power)
        except (RuntimeError, ValueError) as error:  # torch cannot vectorise this model over samples
            if is_out_of_memory(error):
                raise
            found = _one_by_one(network, x, y, weight, losses, power)
    return found


def check_per_sample_gradients(context: BuildContext, recipe: str) -> None:
    """Raise `ConfigurationError` if the model gives no gradient of a single sample. Called before training begins."""
    network = context.build_network(context.num_outputs)
    x, y, weight = context.zero_inputs(2), torch.zeros(2, dtype=torch.int64), torch.ones(2)
    try:
        with differentiable_eval_mode(network):
            gradient_moments(
                network, x, y.to(x.device), weight.to(x.device), lambda logits, _: logits.square().sum(1), 1
            )
    except Exception as error:  # a user's model may raise anything
        if is_out_of_memory(error):
            raise
        message = f"strategy.{recipe}: the model gives no gradient of a single sample: {one_line(error)}"
        raise ConfigurationError(message) from error


@torch.enable_grad()
def _is_layered(network: nn.Module, x: Tensor, y: Tensor, losses: Callable[[Tensor, Tensor], Tensor]) -> bool:
    """Return whether the closed form gives the gradient of one sample. It does not if a weight is used outside its layer.

    The batch has two samples, because some models cannot process a single one; the weight of the second is 0.
    """
    first_only = (torch.arange(len(x), device=x.device) == 0).float()
    if (found := _by_layer(network, x, y, first_only, losses, 1)) is None:
        return False
    trained = [param for param in network.parameters() if param.requires_grad]
    gradients = torch.autograd.grad(losses(network(x), y)[0], trained, allow_unused=True, materialize_grads=True)
    # the tolerance is for convolutions on a GPU, which are less exact; a closed form that does not hold is wrong by far more
    return all(
        bool(not gradient.numel() or (moment - gradient.abs()).abs().max() <= TOLERANCE * gradient.abs().max())
        for moment, gradient in zip(found, gradients, strict=True)
    )


@torch.enable_grad()
def _by_layer(
    network: nn.Module, x: Tensor, y: Tensor, weight: Tensor, losses: Callable[[Tensor, Tensor], Tensor], power: int
) -> list[Tensor] | None:
    """Return the moments in closed form, or None if a layer has no such form, or a layer or weight is used more than once."""
    trained = [param for param in network.parameters() if param.requires_grad]
    layers = [m for m in network.modules() if any(param.requires_grad for param in m.parameters(recurse=False))]
    own = [[name for name, _ in layer.named_parameters(recurse=False)] for layer in layers]
    named = all(names in (["weight"], ["weight", "bias"]) for names in own)  # false if a weight is computed from others
    shared = sum(map(len, own)) != len({id(p) for layer in layers for p in layer.parameters(recurse=False)})
    if not named or shared or not all(type(layer) in FORMS for layer in layers):
        return None
    calls: list[tuple[nn.Module, Tensor, Tensor]] = []  # layer, activation, output

    def record(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        # without inputs the layer was called with a keyword argument: the size 0 rules out the closed form
        a = inputs[0].detach() if inputs else output.new_empty(0)
        calls.append((layer, a, output))
        return output.clone()  # later code may change it in place, but the delta must be that of the layer's own output

    handles = [layer.register_forward_hook(record) for layer in layers]
    try:
        loss = losses(network(x), y)
    finally:
        for handle in handles:
            handle.remove()
    once = len(calls) == len(layers) == len({id(layer) for layer, _, _ in calls})
    if not once or not all(len(a) == len(output) == len(x) and output.requires_grad for _, a, output in calls):
        return None
    outputs = [output for _, _, output in calls]
    deltas = torch.autograd.grad(loss.sum(), outputs, allow_unused=True, materialize_grads=True)
    by_param: dict[int, Tensor] = {}
    for (layer, a, _), delta in zip(calls, deltas, strict=True):
        form = FORMS[type(layer)](layer, a, delta, weight.to(delta.dtype), power)
        if form is None:
            return None
        # a layer without a bias has one parameter: zip leaves the second moment out
        by_param |= {id(p): moment for p, moment in zip(layer.parameters(recurse=False), form, strict=False)}
    return [by_param[id(param)] for param in trained]


def _linear(_: nn.Module, a: Tensor, delta: Tensor, weight: Tensor, power: int) -> list[Tensor] | None:
    if a.dim() > 2:  # several positions for each sample: sum their gradients before the power
        gradient = torch.einsum("b...o,b...i->boi", delta, a)
        moment = torch.einsum("boi,b->oi", gradient.abs() ** power, weight)
        bias = delta.flatten(1, -2).sum(1)
    else:
        moment = ((delta.abs() ** power) * weight[:, None]).T @ a.abs() ** power
        bias = delta
    return [moment, weight @ bias.abs() ** power]


def _convolution(layer: nn.Module, a: Tensor, delta: Tensor, weight: Tensor, power: int) -> list[Tensor] | None:
    assert isinstance(layer, nn.Conv2d)
    if layer.groups != 1 or layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        return None
    patches = functional.unfold(a, layer.kernel_size, layer.dilation, layer.padding, layer.stride)  # [B, in * k, L]
    gradient = delta.flatten(2) @ patches.transpose(1, 2)  # [B, out, in * k]
    moment = torch.einsum("boi,b->oi", gradient.abs() ** power, weight).reshape(layer.weight.shape)
    return [moment, weight @ delta.sum((2, 3)).abs() ** power]


def _group_norm(layer: nn.Module, a: Tensor, delta: Tensor, weight: Tensor, power: int) -> list[Tensor] | None:
    assert isinstance(layer, nn.GroupNorm)
    normal = functional.group_norm(a, layer.num_groups, eps=layer.eps)
    return _affine(normal.flatten(2), delta.flatten(2), weight, power)


def _layer_norm(layer: nn.Module, a: Tensor, delta: Tensor, weight: Tensor, power: int) -> list[Tensor] | None:
    assert isinstance(layer, nn.LayerNorm)
    if len(layer.normalized_shape) != 1 or layer.bias is None:
        return None
    normal = functional.layer_norm(a, layer.normalized_shape, eps=layer.eps)
    size = layer.normalized_shape[0]
    return _affine(
        normal.reshape(len(a), -1, size).transpose(1, 2), delta.reshape(len(a), -1, size).transpose(1, 2), weight, power
    )


def _affine(normal: Tensor, delta: Tensor, weight: Tensor, power: int) -> list[Tensor]:
    """Return the moments of scale and shift, for `normal` and `delta` `[B, features, positions]`."""
    scale, shift = (normal * delta).sum(2), delta.sum(2)
    return [weight @ scale.abs() ** power, weight @ shift.abs() ** power]


def _by_sample(
    network: nn.Module, x: Tensor, y: Tensor, weight: Tensor, losses: Callable[[Tensor, Tensor], Tensor], power: int
) -> list[Tensor]:
    """Return the moments of a network that torch can vectorise over samples."""
    params = {name: param.detach() for name, param in network.named_parameters() if param.requires_grad}

    def loss(values: dict[str, Tensor], one: Tensor, label: Tensor) -> Tensor:
        logits: Tensor = torch.func.functional_call(network, values, (one[None],))
        return losses(logits, label[None])[0]

    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
    total = zeros(list(params.values()))
    for xs, ys, ws in zip(x.split(SLICE), y.split(SLICE), weight.split(SLICE), strict=True):
        by_name = gradients(params, xs, ys)
        moments = [torch.einsum("b...,b->...", by_name[name].abs() ** power, ws) for name in params]
        torch._foreach_add_(total, moments)
    return total


@torch.enable_grad()
def _one_by_one(
    network: nn.Module, x: Tensor, y: Tensor, weight: Tensor, losses: Callable[[Tensor, Tensor], Tensor], power: int
) -> list[Tensor]:
    """Return the moments of any network, with one backward pass for each sample."""
    trained = [param for param in network.parameters() if param.requires_grad]
    total = zeros(trained)
    for number in range(len(x)):
        one = slice(number, number + 1)
        found = torch.autograd.grad(losses(network(x[one]), y[one])[0], trained, allow_unused=True)
        gradients = [dense(gradient, param) for gradient, param in zip(found, trained, strict=True)]
        torch._foreach_add_(total, [gradient.abs() ** power * weight[number] for gradient in gradients])
    return total


FORMS: dict[type[nn.Module], Callable[[nn.Module, Tensor, Tensor, Tensor, int], list[Tensor] | None]] = {
    nn.Linear: _linear,
    nn.Conv2d: _convolution,
    nn.GroupNorm: _group_norm,
    nn.LayerNorm: _layer_norm,
}
