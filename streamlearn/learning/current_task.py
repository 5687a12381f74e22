"""The life of the current task in the learner: its samples, its steps, and its refinement."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

import torch

from streamlearn.core.samples import Batch
from streamlearn.learning.memory import ALL, Reservoir, rank_in_class
from streamlearn.learning.tensors import seeded_generator

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from torch import Tensor

    from streamlearn.learning.strategies.slots import Slot


class CurrentTask:
    """The task that is being learned. Before the first task its index is -1."""

    def __init__(self, reservoir: Reservoir, batch_size: int, seed: int) -> None:
        self.reservoir = reservoir  # samples of the task, as they arrived
        self.batch_size = batch_size
        self.seed = seed
        self.index = -1
        self.steps = 0  # optimizer steps in the task, counted from the start of its refinement if it has one
        self.is_refining = False
        self.batches_refined = 0  # batches of the refinement that were learned

    @classmethod
    def for_slots(cls, slots: Collection[Slot], max_bytes: int, batch_size: int, seed: int) -> Self:
        """Return the state before the first task, with room for the samples that the slots of a strategy need."""
        needed = [slot.samples_needed for slot in slots]
        balanced = any(slot.needs_balanced_samples for slot in slots)
        capacity = ALL if ALL in needed else max(needed)
        return cls(Reservoir(capacity, max_bytes, seed, balanced=balanced), batch_size, seed)

    def begin(self, index: int) -> None:
        """Begin a task with an empty reservoir."""
        self.index = index
        self.steps = 0
        self.end()

    def end(self) -> None:
        """End the task: its samples are dropped."""
        self.is_refining, self.batches_refined = False, 0
        self.reservoir.clear()

    def begin_refinement(self) -> None:
        """Begin the refinement: the reservoir accepts no further samples."""
        self.is_refining, self.batches_refined = True, 0
        self.reservoir.sealed = True

    def after_batch(self, batch: Batch, *, trained: bool) -> None:
        """Count a batch of the refinement, or offer the samples of a trained batch to the reservoir.

        Called after the batch's steps, so that a batch never replays itself.
        """
        if self.is_refining:
            self.batches_refined += 1
        elif trained:
            self.reservoir.add(batch.x, batch.y)

    def refinement_batches(self, epochs: int) -> Iterator[Batch]:
        """Yield the remaining batches of `epochs` passes over the reservoir.

        The order of each pass depends only on seed, task and epoch, so a restart continues at `batches_refined`.
        """
        size = len(self.reservoir)
        batches = -(-size // self.batch_size)
        for number in range(self.batches_refined, epochs * batches):
            epoch, index = divmod(number, batches)
            order = torch.randperm(size, generator=seeded_generator(self.seed, f"refine-{self.index}-{epoch}"))
            indices = order[index * self.batch_size : (index + 1) * self.batch_size]
            y = self.reservoir.y[indices]
            yield Batch(self.reservoir.x[indices], y, torch.full_like(y, self.index))

    def samples_for(self, slot: Slot) -> tuple[Tensor, Tensor]:
        """Return samples of the task, `x [n, ...]` and `y [n]`: as many as the slot needs."""
        x, y = self.reservoir.x, self.reservoir.y
        if slot.samples_needed != ALL and slot.samples_needed < len(y):  # another slot needs more
            order = torch.randperm(len(y), generator=seeded_generator(self.seed, f"closing-{self.index}"))
            if slot.needs_balanced_samples:
                order = order[rank_in_class(y[order]).argsort(stable=True)]
            x, y = x[order[: slot.samples_needed]], y[order[: slot.samples_needed]]
        return x, y
