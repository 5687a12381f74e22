"""A user's modules for tests: an encoder, and a model that counts how often it was trained on each sample.

So tests do not depend on the counters of the program.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.common import merged
from streamlearn.tools import producer
from tests.support import jobs

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from streamlearn.checkpoint.manifest import Checkpoint

FEATURES = 4


class Counting(nn.Module):
    """A linear model whose first input is the sample's number. Its state counts how often each sample was trained."""

    def __init__(self, num_outputs: int, samples: int, seconds: float) -> None:
        super().__init__()
        self.head = nn.Linear(FEATURES, num_outputs)
        self.seconds = seconds
        self.learned: Tensor
        self.register_buffer("learned", torch.zeros(samples, dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training and torch.is_grad_enabled():
            self.learned += torch.bincount(x[:, 0].long(), minlength=len(self.learned))
            time.sleep(self.seconds)
        logits: Tensor = self.head(x[:, 1:])
        return logits


def counting(input_shape: Sequence[int], num_outputs: int, *, samples: int, seconds: float = 0.0) -> nn.Module:
    """Return a counting model. Each update sleeps for `seconds`."""
    del input_shape
    return Counting(num_outputs, samples, seconds)


def settings(directory: Path, samples: int, seconds: float = 0.0, **over: Any) -> dict[str, Any]:
    """Return a configuration for the counting model. A batch is one update and one forward pass, so a count is a sample."""
    base: dict[str, Any] = {
        "name": "counting",
        "state_dir": str(directory / "state"),
        "embedded": {"path": str(directory / "topics.sqlite")},
        "device": jobs.DEVICE,
        "input": {"shape": [1 + FEATURES]},
        "classes": 2,
        "holdout": {"fraction": 0.0, "max": None},
        "stream": {"topics": ["t1"], "on_finished": "exit", "batch_size": 10},
        "model": {"name": "tests.support.models:counting", "options": {"samples": samples, "seconds": seconds}},
        "learner": {"updates_per_batch": 1, "average": None},
        "strategy": "naive",
        "checkpoint": {"every_seconds": None, "every_batches": 3},
        "service": {"port": 0},
    }
    return merged(base, over)


def numbered(first: int, count: int) -> producer.Samples:
    """Return samples with these numbers. Features and labels depend only on the number."""
    numbers = np.arange(first, first + count)
    rng = np.random.default_rng(first)
    x = np.column_stack([numbers, rng.normal(size=(count, FEATURES))]).astype(np.float32)
    return producer.Samples(x, [int(label) for label in x[:, 1] > 0])


def tally(checkpoint: Checkpoint, samples: int) -> tuple[int, int]:
    """Return how many of the samples were never learned, and how many were learned more than once."""
    learned = jobs.tensors(checkpoint)["model.safetensors:learned"][:samples]
    return int((learned == 0).sum()), int((learned > 1).sum())


def encoder(input_shape: Sequence[int], *, features: int = 10, fresh: bool = False) -> nn.Module:
    """Return an encoder with batch norm and dropout, for evaluation mode only. `fresh`: other weights at each call."""
    size = int(np.prod(input_shape))
    made = nn.Sequential(nn.Flatten(), nn.Linear(size, features), nn.BatchNorm1d(features), nn.ReLU(), nn.Dropout())
    if fresh:
        weights = np.random.default_rng().normal(size=(features, size)).astype(np.float32)
        made[1].load_state_dict({"weight": torch.from_numpy(weights), "bias": torch.zeros(features)})
    return made


class Exponential(nn.Module):
    """Computes features that overflow float32 for large values."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the exponential of each value, minus 1."""
        return torch.expm1(x)


def exponential(input_shape: Sequence[int]) -> nn.Module:
    """Return an encoder whose features may be infinite."""
    del input_shape
    return Exponential()
