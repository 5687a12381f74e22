"""The generator of brain-inspired replay: van de Ven, Siegelmann & Tolias 2020, "Brain-inspired replay for continual learning".

It has no encoder of its own: it reads the model's last hidden layer (replay through feedback). Every class has its own prior,
and switches off a part of the decoder's hidden units (gating by internal context).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from streamlearn.learning.models.vae import bounded, observed, reconstruction
from streamlearn.learning.tensors import padded

if TYPE_CHECKING:
    from collections.abc import Sequence


class Feedback(nn.Module):
    """Codes from the model's features `[B, features]`, a normal prior per class, and a decoder gated by class.

    `gated` is the share of hidden units that a class switches off. The class number and `seed` alone decide which ones.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        features: int,
        num_classes: int,
        *,
        hidden: int,
        latent: int,
        likelihood: str,
        gated: float,
        seed: int,
    ) -> None:
        super().__init__()
        self.input_shape = tuple(input_shape)
        self.latent = latent
        self.likelihood = likelihood
        self.gated = gated
        self.seed = seed
        self.encode_out = nn.Linear(features, 2 * latent)
        self.decode_in = nn.Linear(latent, hidden)
        self.decode_hidden = nn.Linear(hidden, hidden)
        self.decode_out = nn.Linear(hidden, math.prod(input_shape))
        self.prior_mean = nn.Parameter(torch.randn(num_classes, latent))
        self.prior_log_variance = nn.Parameter(torch.zeros(num_classes, latent))
        self.register_buffer("gates", self._gates(num_classes), persistent=False)

    def decode(self, z: Tensor, y: Tensor) -> Tensor:
        """Return the decoder's output before its nonlinearity, `[B, prod(shape)]`, for `z [B, latent]` and `y [B]`."""
        gates = self.get_buffer("gates")[:, y]
        h = functional.relu(self.decode_in(z)) * gates[0]
        out: Tensor = self.decode_out(functional.relu(self.decode_hidden(h)) * gates[1])
        return out

    def generate(self, noise: Tensor, y: Tensor) -> Tensor:
        """Return samples `[B, *shape]` of classes `y [B]`, from standard normal `noise [B, latent]`."""
        z = self.prior_mean[y] + torch.exp(0.5 * bounded(self.prior_log_variance[y])) * noise
        return observed(self.decode(z, y), self.likelihood).reshape(-1, *self.input_shape)

    def loss(self, features: Tensor, x: Tensor, y: Tensor, noise: Tensor) -> Tensor:
        """Return each sample's negative evidence lower bound in nats, `[B]`; the divergence is from the prior of its class."""
        mean, log_variance = self.encode_out(features).chunk(2, dim=1)
        log_variance = bounded(log_variance)
        out = self.decode(mean + torch.exp(0.5 * log_variance) * noise, y)
        wide, far = bounded(self.prior_log_variance[y]), mean - self.prior_mean[y]
        divergence = 0.5 * (wide - log_variance + (log_variance.exp() + far.square()) / wide.exp() - 1).sum(1)
        total: Tensor = reconstruction(out, x.flatten(1), self.likelihood) + divergence
        return total

    @torch.no_grad()
    def grow(self, num_classes: int) -> None:
        """Add classes, up to `num_classes`; their priors begin as standard normal."""
        for name in ("prior_mean", "prior_log_variance"):
            old = getattr(self, name)
            setattr(self, name, nn.Parameter(padded(old, old.new_zeros(num_classes, self.latent))))
        self.gates = self._gates(num_classes).to(self.prior_mean.device)

    def _gates(self, num_classes: int) -> Tensor:
        """Return `[2, classes, hidden]`: 0 where a class switches off a unit of a hidden layer. Rows are independent."""
        hidden = self.decode_hidden.in_features
        generator = torch.Generator()
        rows = []
        for number in range(num_classes):
            generator.manual_seed(self.seed + number)
            rows.append((torch.rand(2, hidden, generator=generator) >= self.gated).float())
        return torch.stack(rows, 1)
