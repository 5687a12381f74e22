"""Mean and covariance of each class's codes in the latent space of a variational autoencoder.

A decoder that gets codes from N(0, I) must also decode codes to which no sample was ever encoded. Codes from a normal
distribution with the mean and covariance of the class's own codes give samples that are far more like the class (from one
normal prior to the aggregated posterior: Hoffman & Johnson 2016; Tomczak & Welling 2018). These are statistics: no sample is
stored.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from streamlearn.learning.tensors import padded

if TYPE_CHECKING:
    from streamlearn.learning.strategies.slots import State

JITTER = 1e-4  # variance that is added to a covariance before it is factored


class LatentMoments:
    """Moving sums of codes and their products by class: `count [C]`, `total [C, z]`, `products [C, z, z]`."""

    def __init__(self, num_classes: int, latent: int, device: torch.device) -> None:
        self.count = torch.zeros(num_classes, device=device)
        self.total = torch.zeros(num_classes, latent, device=device)
        self.products = torch.zeros(num_classes, latent, latent, device=device)

    @torch.no_grad()
    def update(self, mean: Tensor, log_variance: Tensor, y: Tensor, rate: float, finite: Tensor) -> None:
        """Move the sums toward those of a batch by `rate`. If not `finite`, they stay as they are.

        `mean [B, z]` and `log_variance [B, z]` describe the codes of the samples, `y [B]` are their classes.
        """
        count = torch.zeros_like(self.count).index_add_(0, y, torch.ones_like(mean[:, 0]))
        total = torch.zeros_like(self.total).index_add_(0, y, mean)
        products = torch.zeros_like(self.products).index_add_(0, y, mean[:, :, None] * mean[:, None, :])
        products.diagonal(dim1=1, dim2=2).index_add_(0, y, log_variance.exp())
        for old, new in ((self.count, count), (self.total, total), (self.products, products)):
            old.lerp_(torch.where(finite, new, old), rate)

    def gaussians(self) -> tuple[Tensor, Tensor]:
        """Return each class's mean `[C, z]` and a square root of its covariance `[C, z, z]`.

        The covariance of a class without samples is `JITTER` times the identity.
        """
        count = self.count.clamp(min=1e-12)
        mean = self.total / count[:, None]
        covariance = self.products / count[:, None, None] - mean[:, :, None] * mean[:, None, :]
        covariance += JITTER * torch.eye(covariance.shape[1], device=covariance.device)
        root, failed = torch.linalg.cholesky_ex(covariance)
        diagonal = torch.diag_embed(covariance.diagonal(dim1=1, dim2=2).clamp(min=JITTER).sqrt())
        usable = (failed == 0) & root.isfinite().all(2).all(1)
        # contiguous, like a tensor that was read from a file: on a GPU a product of another layout has other bits
        return mean, torch.where(usable[:, None, None], root, diagonal).contiguous()

    def grow(self, num_classes: int) -> None:
        """Add classes without samples, up to `num_classes`."""
        shapes = ((num_classes,), (num_classes, *self.total.shape[1:]), (num_classes, *self.products.shape[1:]))
        self.count, self.total, self.products = (
            padded(old, old.new_zeros(shape))
            for old, shape in zip((self.count, self.total, self.products), shapes, strict=True)
        )

    def state_dict(self) -> State:
        """Return the sums."""
        return {"count": self.count, "total": self.total, "products": self.products}

    def load_state_dict(self, state: State) -> None:
        """Restore what `state_dict` returned."""
        device = self.count.device
        self.count, self.total, self.products = (
            state[name].to(device, copy=True) for name in ("count", "total", "products")
        )


def sample_codes(gaussians: tuple[Tensor, Tensor], y: Tensor, noise: Tensor) -> Tensor:
    """Return codes `[B, z]` of classes `y [B]` from standard normal `noise [B, z]`."""
    mean, root = gaussians
    return mean[y] + (root[y] @ noise[:, :, None])[:, :, 0]
