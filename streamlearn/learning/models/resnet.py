"""A small residual network with group normalisation: batch statistics would break under replay and frozen tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Sequence

GROUPS = 4


class Block(nn.Module):
    """Two convolutions with a shortcut (He et al. 2016). `stride` 2 halves the resolution."""

    def __init__(self, size: int, following: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(size, following, 3, stride, padding=1, bias=False)
        self.norm_first = nn.GroupNorm(GROUPS, following)
        self.second = nn.Conv2d(following, following, 3, padding=1, bias=False)
        self.norm_second = nn.GroupNorm(GROUPS, following)
        self.shortcut = nn.Conv2d(size, following, 1, stride, bias=False) if stride != 1 or size != following else None

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.norm_first(self.first(x)))
        y = self.norm_second(self.second(y))
        return functional.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class ResNet(nn.Module):
    """Three stages of one block each. `x` is `[B, H, W]` or `[B, channels, H, W]`; logits are `[B, C]`."""

    def __init__(self, input_shape: Sequence[int], num_outputs: int, width: int) -> None:
        super().__init__()
        if len(input_shape) not in {2, 3} or width % GROUPS:
            raise ValueError(f"resnet needs images, [H, W] or [channels, H, W], and a width divisible by {GROUPS}")
        channels = input_shape[0] if len(input_shape) == 3 else 1
        self.stem = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(GROUPS, width)
        self.body = nn.Sequential(Block(width, width, 1), Block(width, 2 * width, 2), Block(2 * width, 4 * width, 2))
        self.head = nn.Linear(4 * width, num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 3:
            x = x.unsqueeze(1)
        y = self.body(functional.relu(self.norm(self.stem(x))))
        logits: Tensor = self.head(y.mean(dim=(2, 3)))
        return logits
