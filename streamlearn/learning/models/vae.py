"""Variational autoencoders, the generators: plain (Kingma & Welling 2014) and class-conditional (Sohn et al. 2015)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Sequence


LOG_VARIANCE = (-20.0, 4.0)
"""Bounds on the log variance of a code. Values near 1 need far less, and exp of these bounds does not overflow."""


class VAE(nn.Module):
    """Encoder and decoder with two hidden layers. If `conditional`, both get the label as an embedding.

    `likelihood` is `bernoulli` for values in [0, 1], or `gaussian` (unit variance) for all others.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        *,
        conditional: bool,
        hidden: int,
        latent: int,
        likelihood: str,
    ) -> None:
        super().__init__()
        self.input_shape = tuple(input_shape)
        self.latent = latent
        self.likelihood = likelihood
        size = math.prod(input_shape)
        self.encode_in = nn.Linear(size, hidden)
        self.encode_hidden = nn.Linear(hidden, hidden)
        self.encode_out = nn.Linear(hidden, 2 * latent)
        self.decode_in = nn.Linear(latent, hidden)
        self.decode_hidden = nn.Linear(hidden, hidden)
        self.decode_out = nn.Linear(hidden, size)
        self.encode_class = nn.Embedding(num_classes, hidden) if conditional else None
        self.decode_class = nn.Embedding(num_classes, hidden) if conditional else None

    def encode(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log variance of the codes of `x [B, prod(shape)]`, `[B, latent]` each."""
        h = self.encode_in(x)
        if self.encode_class is not None:
            h = h + self.encode_class(y)
        mean, log_variance = self.encode_out(functional.relu(self.encode_hidden(functional.relu(h)))).chunk(2, dim=1)
        return mean, bounded(log_variance)

    def decode(self, z: Tensor, y: Tensor) -> Tensor:
        """Return the decoder's output before its nonlinearity, `[B, prod(shape)]`."""
        h = self.decode_in(z)
        if self.decode_class is not None:
            h = h + self.decode_class(y)
        out: Tensor = self.decode_out(functional.relu(self.decode_hidden(functional.relu(h))))
        return out

    def generate(self, z: Tensor, y: Tensor) -> Tensor:
        """Return samples `[B, *shape]` for codes `z [B, latent]` and classes `y [B]`."""
        return observed(self.decode(z, y), self.likelihood).reshape(-1, *self.input_shape)

    def loss(self, x: Tensor, y: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return each sample's negative evidence lower bound in nats, `[B]`, and the mean and log variance of its code.

        `noise [B, latent]` is standard normal.
        """
        x = x.flatten(1)
        mean, log_variance = self.encode(x, y)
        out = self.decode(mean + torch.exp(0.5 * log_variance) * noise, y)
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1)
        return reconstruction(out, x, self.likelihood) + divergence, mean, log_variance

    @torch.no_grad()
    def grow(self, num_classes: int) -> None:
        """Add classes, up to `num_classes`. Known classes keep their embeddings; new embeddings are zero."""
        for name in ("encode_class", "decode_class"):
            old = getattr(self, name)
            if old is not None and old.num_embeddings < num_classes:
                grown = nn.Embedding(num_classes, old.embedding_dim).to(old.weight.device)
                grown.weight.zero_()
                grown.weight[: old.num_embeddings] = old.weight
                setattr(self, name, grown)


def bounded(log_variance: Tensor) -> Tensor:
    """Clamp log variances to `LOG_VARIANCE`, with the gradient of the identity.

    So the divergence still pulls values back that lie beyond the bounds, and large values cannot make the codes explode.
    """
    return log_variance.detach().clamp(*LOG_VARIANCE) + (log_variance - log_variance.detach())


def observed(out: Tensor, likelihood: str) -> Tensor:
    """Return the mean of the distribution that a decoder's output describes."""
    return torch.sigmoid(out) if likelihood == "bernoulli" else out


def reconstruction(out: Tensor, x: Tensor, likelihood: str) -> Tensor:
    """Return the negative log likelihood of `x [B, n]` in nats, `[B]`, up to a constant."""
    if likelihood == "bernoulli":
        return functional.binary_cross_entropy_with_logits(out, x.clamp(0, 1), reduction="none").sum(1)
    return 0.5 * (out - x).square().sum(1)
