"""Augmentation of images by small random shifts, rotations and zooms, which do not change their class."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from streamlearn.learning.tensors import seeded_generator

if TYPE_CHECKING:
    from streamlearn.learning.config import AugmentConfig


class RandomAffine:
    """Applies a random affine map to each image of a batch (bilinear, zero outside), from a random generator of its own."""

    def __init__(self, spec: AugmentConfig, seed: int, device: torch.device) -> None:
        self.spec = spec
        self.generator = seeded_generator(seed, "augment", device)

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """Return a distorted copy of each image, for `x [B, H, W]` or `[B, channels, H, W]`."""
        spec, (height, width) = self.spec, x.shape[-2:]
        draws = torch.rand(len(x), 5, generator=self.generator, device=x.device) * 2 - 1
        angle = draws[:, 0] * math.radians(spec.rotate)
        zoom_x, zoom_y = 1 + draws[:, 1] * spec.zoom, 1 + draws[:, 2] * spec.zoom
        sine, cosine = torch.sin(angle), torch.cos(angle)
        # affine_grid uses coordinates from -1 to 1 on both axes, so a rotation of an image that is not square needs its aspect
        rows = (
            torch.stack([cosine * zoom_x, -sine * zoom_y * height / width, draws[:, 3] * 2 * spec.shift / width], 1),
            torch.stack([sine * zoom_x * width / height, cosine * zoom_y, draws[:, 4] * 2 * spec.shift / height], 1),
        )
        images = x.unsqueeze(1) if x.dim() == 3 else x
        grid = functional.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
        return functional.grid_sample(images, grid, align_corners=False).reshape(x.shape)
