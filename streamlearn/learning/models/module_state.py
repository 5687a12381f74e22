"""Saves and restores everything that a module's outputs depend on: its `state_dict` and its non-persistent buffers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import nn

LARGE = 1 << 14  # elements: a buffer above this size is checked only if torch has counted a write to it


def module_state(module: nn.Module) -> dict[str, Any]:
    """Return a module's `state_dict` and, under their full names, its non-persistent buffers."""
    state: dict[str, Any] = dict(module.state_dict())
    for name, part, key in _non_persistent_buffers(module):
        buffer = part._buffers[key]  # noqa: SLF001 - torch has no public access to a buffer that may be None
        if buffer is not None and name not in state:
            state[name] = buffer.detach()
    return state


@torch.no_grad()
def load_module_state(module: nn.Module, state: Mapping[str, Any]) -> None:
    """Restore what `module_state` returned. Raises whatever `load_state_dict` raises.

    Older checkpoints have no non-persistent buffers; then these keep their values.
    """
    non_persistent = {name: (part, key) for name, part, key in _non_persistent_buffers(module)}
    module.load_state_dict({name: value for name, value in state.items() if name not in non_persistent})
    for name, (part, key) in non_persistent.items():
        if (value := state.get(name)) is None:
            continue
        current = part._buffers[key]  # noqa: SLF001 - as above
        if isinstance(current, Tensor) and current.shape == value.shape and current.dtype == value.dtype:
            current.copy_(value)
        else:  # its shape has changed since the module was built, or it was None
            device = next(
                (tensor.device for tensor in module.state_dict().values() if isinstance(tensor, Tensor)), None
            )
            part._buffers[key] = value.to(device, copy=True)  # noqa: SLF001 - as above


def _non_persistent_buffers(module: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield every non-persistent buffer: its full name, its submodule, and its name in the submodule."""
    for prefix, part in module.named_modules():
        for key in sorted(getattr(part, "_non_persistent_buffers_set", ())):
            yield (f"{prefix}.{key}" if prefix else key), part, key


class RunningStatistics:
    """The floating-point buffers of a module, for example the statistics of batch norm.

    After every step they are copied into `mean`, the module with the averaged weights (or the module itself, if there is no
    average). After a dropped step they are restored.
    """

    def __init__(self, module: nn.Module, mean: nn.Module) -> None:
        self._buffers: list[_Buffer] = []
        for part, mean_part in zip(module.modules(), mean.modules(), strict=True):
            for key, value in part._buffers.items():  # noqa: SLF001 - the only access that survives a replaced buffer
                if value is not None and value.is_floating_point():
                    self._buffers.append(_Buffer(part, mean_part, key, value, _version(value), value.detach().clone()))

    @torch.no_grad()
    def after_step(self, finite: Tensor) -> None:
        """Restore buffers that are not finite, or if `finite` is false (a dropped step). Does not wait for the device."""
        for buffer in self._buffers:
            value = buffer.part._buffers.get(buffer.key)  # noqa: SLF001 - as above
            if value is None:
                continue
            # torch does not count the writes of batch norm, but its buffers are small; a large buffer is often a constant mask
            if value.numel() > LARGE and value is buffer.last_value and _version(value) == buffer.version:
                continue
            if value.shape == buffer.before.shape and not value.is_inference():
                accept = finite & (value.isfinite() | ~buffer.before.isfinite()).all()
                value.copy_(torch.where(accept, value, buffer.before))
            buffer.last_value, buffer.version, buffer.before = value, _version(value), value.detach().clone()
            if buffer.mean_part is not buffer.part:
                mean = buffer.mean_part._buffers.get(buffer.key)  # noqa: SLF001 - as above
                if mean is not None and mean.shape == value.shape:
                    mean.copy_(value)
                else:
                    buffer.mean_part._buffers[buffer.key] = value.detach().clone()  # noqa: SLF001 - as above


@dataclass
class _Buffer:
    part: nn.Module  # the submodule that has the buffer
    mean_part: nn.Module  # the same submodule of `mean`
    key: str
    last_value: Tensor  # the tensor itself, after the last step
    version: int | None  # how often it had been written then
    before: Tensor  # a copy of its values then


def _version(tensor: Tensor) -> int | None:
    """Return how often a tensor was written; None for inference tensors, whose writes torch does not count."""
    return None if tensor.is_inference() else tensor._version  # noqa: SLF001 - the counter that autograd uses
