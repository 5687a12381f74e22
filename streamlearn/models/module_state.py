"""Everything that a module's outputs depend on: its `state_dict`, and the buffers that are not persistent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import nn

LARGE = 1 << 14  # numbers: a larger buffer is looked at only if torch has counted a write


def module_state(module: nn.Module) -> dict[str, Any]:
    """Return a module's `state_dict` and, by their full names, the buffers that it leaves out."""
    state: dict[str, Any] = dict(module.state_dict())
    for name, part, key in _left_out(module):
        buffer = part._buffers[key]  # noqa: SLF001 - torch has no other access to one that may be None
        if buffer is not None and name not in state:
            state[name] = buffer.detach()
    return state


@torch.no_grad()
def load_module_state(module: nn.Module, state: Mapping[str, Any]) -> None:
    """Take over what `module_state` returned.

    A checkpoint of an earlier version has no buffers that are not persistent: they stay as they are. Raises whatever
    `load_state_dict` raises.
    """
    left_out = {name: (part, key) for name, part, key in _left_out(module)}
    module.load_state_dict({name: value for name, value in state.items() if name not in left_out})
    for name, (part, key) in left_out.items():
        if (value := state.get(name)) is None:
            continue
        here = part._buffers[key]  # noqa: SLF001 - as above
        if isinstance(here, Tensor) and here.shape == value.shape and here.dtype == value.dtype:
            here.copy_(value)
        else:  # it has grown since it was made, or was None
            device = next(
                (tensor.device for tensor in module.state_dict().values() if isinstance(tensor, Tensor)), None
            )
            part._buffers[key] = value.to(device, copy=True)  # noqa: SLF001 - as above


def _left_out(module: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Give the full name of every buffer that is not persistent, the module that has it, and its name there."""
    for prefix, part in module.named_modules():
        for key in sorted(getattr(part, "_non_persistent_buffers_set", ())):
            yield (f"{prefix}.{key}" if prefix else key), part, key


class RunningStatistics:
    """The buffers of real numbers that training changes: an average follows them, and a dropped update leaves none behind.

    `mean` is the averaged copy of the module, or the module itself where there is no average.
    """

    def __init__(self, module: nn.Module, mean: nn.Module) -> None:
        self._followed: list[_Buffer] = []
        for part, copied in zip(module.modules(), mean.modules(), strict=True):
            for key, value in part._buffers.items():  # noqa: SLF001 - the only way to one that is replaced later
                if value is not None and value.is_floating_point():
                    self._followed.append(_Buffer(part, copied, key, value, _version(value), value.detach().clone()))

    @torch.no_grad()
    def after_step(self, finite: Tensor) -> None:
        """After an update: take back what is not finite, or belongs to a dropped update; nothing waits for the device."""
        for one in self._followed:
            value = one.part._buffers.get(one.key)  # noqa: SLF001 - as above
            if value is None:
                continue
            # batch norm writes its statistics without counting, and they are small; a large mask never changes
            if value.numel() > LARGE and value is one.seen and _version(value) == one.version:
                continue
            if value.shape == one.before.shape and not value.is_inference():
                sound = finite & (value.isfinite() | ~one.before.isfinite()).all()
                value.copy_(torch.where(sound, value, one.before))
            one.seen, one.version, one.before = value, _version(value), value.detach().clone()
            if one.copied is not one.part:
                mean = one.copied._buffers.get(one.key)  # noqa: SLF001 - as above
                if mean is not None and mean.shape == value.shape:
                    mean.copy_(value)
                else:
                    one.copied._buffers[one.key] = value.detach().clone()  # noqa: SLF001 - as above


@dataclass
class _Buffer:
    part: nn.Module
    copied: nn.Module
    key: str
    seen: Tensor
    version: int | None
    before: Tensor


def _version(tensor: Tensor) -> int | None:
    """Return how often a tensor was written; None where torch does not count it."""
    return None if tensor.is_inference() else tensor._version  # noqa: SLF001 - what autograd itself compares
