"""The statistics of one learned batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch

from streamlearn.core.samples import Outcome

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from streamlearn.learning.update import StepResult


@dataclass(frozen=True)
class LearnStats:
    """Statistics of one learned batch, on the host. To read them, the loop waits for the device once per batch."""

    task: int
    samples: int
    steps: int  # optimizer steps computed
    applied: int  # steps with a finite gradient; the others were dropped
    clipped: int  # applied steps whose gradient was clipped
    loss: float | None  # mean over the applied steps; None if all were dropped
    accuracy: float  # of the evaluated model on the batch, before training on it (test, then train)
    gradient_norm: float  # of the last step
    unusable: int = 0  # samples left out because the encoder's features are not finite
    generator_dropped: int = 0  # dropped steps of a generator, while the model's step was applied

    @classmethod
    def of_unusable(cls, task: int, unusable: int) -> Self:
        """Return the statistics of a batch without usable samples: no step was taken."""
        return cls(task, 0, 0, 0, 0, None, 0.0, 0.0, unusable)

    @classmethod
    def read(cls, task: int, samples: int, correct: Tensor, results: Sequence[StepResult], unusable: int) -> Self:
        """Read the results of a batch's steps, and the number of correct answers before them. Waits for the device."""
        losses, norms, finite = (torch.stack(values) for values in list(zip(*results, strict=True))[:3])
        flags = [result.clipped for result in results if result.clipped is not None]
        applied = int(finite.sum())
        return cls(
            task,
            samples,
            steps=len(results),
            applied=applied,
            clipped=int((finite & torch.stack(flags)).sum()) if flags else 0,
            loss=float(losses[finite].mean()) if applied else None,
            accuracy=int(correct) / samples,
            gradient_norm=float(norms[-1]),
            unusable=unusable,
        )

    @property
    def outcome(self) -> Outcome:
        """How the batch's samples are counted: as `trained`, or as `skipped` if all steps were dropped."""
        return Outcome.TRAINED if self.applied else Outcome.SKIPPED
