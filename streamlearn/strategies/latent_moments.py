"""Where the codes of each class lie: the aggregated posterior of a variational autoencoder, by its first two moments.

A decoder that is fed from N(0, I) is asked for much that no sample was ever encoded to. Fed from a normal distribution with
the mean and covariance of the class's own codes, it generates what is far more like the class (from one normal prior to the
aggregated posterior: Hoffman & Johnson 2016; Tomczak & Welling 2018). These are statistics: no sample is kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from streamlearn.tensors import padded

if TYPE_CHECKING:
    from streamlearn.strategies.slots import State

JITTER = 1e-4  # variance added before a covariance is factored


class LatentMoments:
    """Moving sums, by class, of codes and their products: `count [C]`, `total [C, z]`, `products [C, z, z]`."""

    def __init__(self, num_classes: int, latent: int, device: torch.device) -> None:
        self.count = torch.zeros(num_classes, device=device)
        self.total = torch.zeros(num_classes, latent, device=device)
        self.products = torch.zeros(num_classes, latent, latent, device=device)

    @torch.no_grad()
    def update(self, mean: Tensor, log_variance: Tensor, y: Tensor, rate: float, finite: Tensor) -> None:
        """Follow by `rate` to the sums over a batch: `mean` and `log_variance` `[B, z]`; where not `finite`, stay."""
        count = torch.zeros_like(self.count).index_add_(0, y, torch.ones_like(mean[:, 0]))
        total = torch.zeros_like(self.total).index_add_(0, y, mean)
        products = torch.zeros_like(self.products).index_add_(0, y, mean[:, :, None] * mean[:, None, :])
        products.diagonal(dim1=1, dim2=2).index_add_(0, y, log_variance.exp())
        for old, new in ((self.count, count), (self.total, total), (self.products, products)):
            old.lerp_(torch.where(finite, new, old), rate)

    def gaussians(self) -> tuple[Tensor, Tensor]:
        """Return each class's mean `[C, z]` and a root of its covariance `[C, z, z]`; a class not seen has nearly none."""
        count = self.count.clamp(min=1e-12)
        mean = self.total / count[:, None]
        covariance = self.products / count[:, None, None] - mean[:, :, None] * mean[:, None, :]
        covariance += JITTER * torch.eye(covariance.shape[1], device=covariance.device)
        root, failed = torch.linalg.cholesky_ex(covariance)
        spread = torch.diag_embed(covariance.diagonal(dim1=1, dim2=2).clamp(min=JITTER).sqrt())
        sound = (failed == 0) & root.isfinite().all(2).all(1)
        # contiguous, as it will be when it comes back from a file: a product of another layout has other bits on a GPU
        return mean, torch.where(sound[:, None, None], root, spread).contiguous()

    def grow(self, num_classes: int) -> None:
        """Make room for more classes."""
        sizes = ((num_classes,), (num_classes, *self.total.shape[1:]), (num_classes, *self.products.shape[1:]))
        self.count, self.total, self.products = (
            padded(old, old.new_zeros(size))
            for old, size in zip((self.count, self.total, self.products), sizes, strict=True)
        )

    def state_dict(self) -> State:
        """Return the sums."""
        return {"count": self.count, "total": self.total, "products": self.products}

    def load_state_dict(self, state: State) -> None:
        """Take over what `state_dict` returned."""
        device = self.count.device
        self.count, self.total, self.products = (
            state[name].to(device, copy=True) for name in ("count", "total", "products")
        )


def sample_codes(gaussians: tuple[Tensor, Tensor], y: Tensor, noise: Tensor) -> Tensor:
    """Return codes `[B, z]` of classes `y [B]` from standard normal `noise [B, z]`."""
    mean, root = gaussians
    return mean[y] + (root[y] @ noise[:, :, None])[:, :, 0]
