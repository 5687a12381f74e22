"""Samples: the batch of an update, samples of a probe, what becomes of a sample, and why one is rejected."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


class Outcome(StrEnum):
    """What becomes of a consumed sample. Until then it is queued. The counts of all outcomes add up to the samples consumed."""

    TRAINED = "trained"
    HELD_OUT = "held_out"
    """It is in the probe of its task, and never trained."""

    LATE = "late"
    """It came after the end of its task."""

    REJECTED = "rejected"
    """It cannot be used, for one of `REJECT_REASONS`."""

    DUPLICATES = "duplicates"
    """Its record was consumed before, and came again."""

    SKIPPED = "skipped"
    """It was in a batch, but no step with it was applied: a value was not finite."""


CODEC_VERSION = 2
"""The version of the rules by which samples are decoded. A job keeps its first version, or its hold-out would change.

1: words of text without combining marks. 2: words with combining marks, in Unicode's form NFC.
"""


PADDING_ID, UNKNOWN_ID, FIRST_WORD_ID = 0, 1, 2
"""Word ids of text: padding, a word that has no id, and the first word of the vocabulary."""


REJECT_REASONS = ("decode", "schema", "shape", "nonfinite", "label_range", "unknown_task", "oversize", "missing_label")
"""All reasons for which a sample can be rejected. The set is closed, because a metric has the reason as a label."""


DEAD_LETTER_REASONS = (*REJECT_REASONS, "late")
"""All reasons for which a sample can be in the dead-letter topic."""


class Rejected(Exception):  # noqa: N818 - an outcome, not a fault of the program
    """A sample cannot be used; `reason` is one of `DEAD_LETTER_REASONS`."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Batch:
    """The samples of one update.

    `x [B, ...]`: inputs, in the dtype in which they arrived, or as scaled floats.
    `y [B]`: output indices.
    `task [B]`: task indices, on the host, so that routing by task never waits for the device.
    `weight [B]`: each sample's share of the loss. None before the update has added the replayed samples, unless the replay
    weights its samples itself.
    `soft_targets [R, C]`: the targets of the last R samples. They are distributions at `temperature`, or logits if
    `targets_are_logits`: then -inf stands for an output for which there is no target.
    """

    x: Tensor
    y: Tensor
    task: Tensor
    weight: Tensor | None = None
    soft_targets: Tensor | None = None
    temperature: float = 1.0
    targets_are_logits: bool = False

    def __len__(self) -> int:
        return len(self.y)

    def with_replay(self, replayed: Batch | None, share: float) -> Batch:
        """Return these samples followed by the replayed ones. The replayed samples together have `share` of the loss."""
        import torch

        own = 1.0 if replayed is None else 1.0 - share
        weight = torch.full((len(self),), own / len(self), device=self.x.device)
        if replayed is None:
            return replace(self, weight=weight)
        replayed_weight = replayed.weight
        if replayed_weight is None:
            replayed_weight = torch.full((len(replayed),), share / len(replayed), device=self.x.device)
        return Batch(
            torch.cat([self.x, replayed.x]),
            torch.cat([self.y, replayed.y]),
            torch.cat([self.task, replayed.task]),
            torch.cat([weight, replayed_weight]),
            replayed.soft_targets,
            replayed.temperature,
            replayed.targets_are_logits,
        )

    def scale_weights(self, factor: float) -> Batch:
        """Return these samples with every weight multiplied by `factor`."""
        return self if factor == 1 or self.weight is None else replace(self, weight=self.weight * factor)


@dataclass(frozen=True)
class HeldOut:
    """Samples for a task's probe: `x [n, ...]` as they arrived, `y [n]` output indices.

    A label that no trained sample has had yet has no output. Then `y` is -1 minus the label's index in
    `Progress.probe_labels`. In a text, a word that no trained sample has had yet is stored in the same way: -1 minus the
    word's index in `Progress.probe_words`.
    """

    task: int
    x: np.ndarray
    y: np.ndarray
