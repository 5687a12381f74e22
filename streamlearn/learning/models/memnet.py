"""A memory network: Sukhbaatar et al. 2015, "End-to-end memory networks", with attention that sees several facts at once.

a sentence      m_i = sum_j l_j * E x_ij + T_i     position encoding l, temporal encoding T by distance to the question
a hop           p = softmax(m K u), o = V sum_i p_i m_i, u <- norm(u + o + relu(W [u, o]))

The paper's position encoding, l_jk = (1 - j/J) - (k/d) (1 - 2j/J), is a sum of two products of a weight by position and a
scale by dimension. So a sentence is computed from two weighted bags of words, with only one tensor of `[B, R, W, d]`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Sequence

FIRST_WORD = 2  # 0 is padding, 1 an unknown word


class Hop(nn.Module):
    """Attends to the story once: `state [B, d]`, sentences `rows [B, R, d]`, mask of empty sentences `empty [B, 1, R]`."""

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.key = nn.Linear(size, heads * size, bias=False)
        self.value = nn.Linear(heads * size, size, bias=False)
        self.mix = nn.Linear(2 * size, size)
        self.norm = nn.LayerNorm(size)

    def forward(self, state: Tensor, rows: Tensor, empty: Tensor) -> Tensor:
        query = self.key(state).unflatten(1, (self.heads, -1))  # cheaper than computing keys for all rows
        scores = (query @ rows.transpose(1, 2)) / math.sqrt(rows.shape[2])
        attention = scores.masked_fill(empty, -torch.inf).softmax(2)
        read = self.value((attention @ rows).flatten(1))
        mixed: Tensor = self.norm(state + read + functional.relu(self.mix(torch.cat([state, read], 1))))
        return mixed


class MemNet(nn.Module):
    """Attends to a story in several hops. `x [B, 1 + sentences, words]`: token ids, the question first; logits `[B, C]`."""

    def __init__(
        self, input_shape: Sequence[int], num_outputs: int, *, vocabulary: int, embedding: int, hops: int, heads: int
    ) -> None:
        super().__init__()
        rows, words = input_shape
        self.words = nn.Embedding(FIRST_WORD + vocabulary, embedding)
        nn.init.normal_(self.words.weight, std=1 / math.sqrt(embedding))
        place = torch.arange(1, words + 1) / words
        self.place: Tensor
        self.register_buffer("place", torch.stack([1 - place, 1 - 2 * place]), persistent=False)
        depth = torch.arange(1, embedding + 1) / embedding
        self.depth = nn.Parameter(torch.stack([torch.ones(embedding), -depth]))
        self.time = nn.Parameter(0.1 * torch.randn(rows, embedding))
        self.norm = nn.LayerNorm(embedding)
        self.hops = nn.ModuleList(Hop(embedding, heads) for _ in range(hops))
        self.head = nn.Linear(embedding, num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        present = (x > 0).unsqueeze(2)
        bags = (self.place * present) @ self.words(x)  # [B, R, 2, d]
        sentences = (bags * self.depth).sum(2)
        state = self.norm(sentences[:, 0])
        rows = sentences + self.time  # includes the question, so there is always a row to attend to
        empty = ~present[:, None, :, 0, 0]
        for hop in self.hops:
            state = hop(state, rows, empty)
        logits: Tensor = self.head(state)
        return logits
