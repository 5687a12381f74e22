"""Contract of the recipes for text: word ids instead of numbers, with the same learner."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from benchmarks.choices import identify
from streamlearn.core.samples import Batch
from streamlearn.testing import BATCH
from streamlearn.testing import LearnerRun as Run

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("daemon_mode")

INPUT = {"kind": "text", "sentences": 3, "words": 4, "vocabulary": 20}
MODEL = {"name": "memnet", "embedding": 8, "hops": 1, "heads": 2}
CHOICES: list[dict[str, Any]] = [{"naive": {}}, {"joint": {}}, {"er": {}, "ewc": {}}, {"er": {}, "si": {}}]


class TextRun(Run):
    """A run whose tasks are texts: one word of the newest sentence determines the answer."""

    def batch(self, number: int, size: int = BATCH) -> Batch:
        """Return a batch of the current task."""
        index = len(self.tasks) - 1
        rng = np.random.default_rng([index, number])
        y = rng.integers(0, 2, size)
        x = rng.integers(10, 22, (size, 4, 4)).astype(np.int32)
        x[:, 1, 0] = 2 + 2 * index + y
        x[:, 3], x[:, :, 3] = 0, 0
        return Batch(torch.from_numpy(x), torch.from_numpy(y + 2 * index), torch.full((size,), index))


@pytest.mark.parametrize("chosen", CHOICES, ids=identify)
def test_text_is_learned_and_resumed_bit_equal(tmp_path: Path, chosen: dict[str, Any]) -> None:
    """Word ids stay integers through replay, importance, growth of the head, and a restart from saved bytes."""
    keys: dict[str, Any] = {"input": INPUT, "model": MODEL, "classes": 2, "grow_head": True}
    keys["learner"] = {"updates_per_batch": 40, "optimizer": {"lr": 0.01}}
    one, other = (TextRun(tmp_path, chosen, **keys) for _ in range(2))
    one.restart_in(other)
    assert one.digest() == other.digest()
    batch = one.batch(99, 200)
    assert one.learner.evaluate(batch.x, batch.y, 1)[0] > 0.8
