"""Learning without forgetting: Li & Hoiem 2016.

With k tasks begun, loss = 1/k * CE(new) + (1 - 1/k) * T^2 * CE(old solver's softmax at T, new solver's at T), both on the
*new* samples: replay of the current inputs, labelled by the solver as it was when the last task ended. Stores no sample.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from streamlearn.data import Batch
from streamlearn.strategies.parts import Closing, Replay, State, World
from streamlearn.strategies.shares import Shares
from streamlearn.strategies.teacher import Teacher
from streamlearn.tensors import seeded

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


class Distillation(Replay):
    """Replays the current inputs as if each belonged to a past task, drawn at random, so that no task adds to the cost."""

    def __init__(self, world: World, *, temperature: float, balance: str) -> None:
        self.world = world
        self.temperature = temperature
        self.shares = Shares(balance)
        self.teacher: Teacher | None = None
        self.taught: list[int] = []  # tasks that the teacher has outputs for
        self._choice = seeded(world.seed, "distillation")

    def sample(self, batch: Batch) -> Batch | None:
        self.shares.see(len(batch))
        if self.teacher is None or not self.taught:
            self.share = 0.0
            return None
        self.share = self.shares.of_the_past
        chosen = torch.randint(len(self.taught), (len(batch),), generator=self._choice)
        task = torch.tensor(self.taught)[chosen]
        logits = self.teacher.logits(batch.x, task)
        soft = torch.softmax(logits / self.temperature, 1)
        return Batch(batch.x, logits.argmax(1), task, soft_targets=soft, temperature=self.temperature)

    def end_task(self, closing: Closing) -> None:
        self.shares.end_task(closing.task)
        self.teacher = Teacher.of(self.world, closing)
        self.taught = [task for task, outputs in enumerate(closing.outputs) if outputs]

    def grow(self, params: Sequence[Tensor], num_outputs: int) -> None:
        del params
        if self.teacher is not None:
            self.teacher.grow(num_outputs)

    def state_dict(self) -> State:
        state: State = {"shares": self.shares.state_dict(), "taught": self.taught, "choice": self._choice.get_state()}
        return state if self.teacher is None else {**state, "teacher": self.teacher.state_dict()}

    def load_state_dict(self, state: State) -> None:
        self.shares.load_state_dict(state["shares"])
        self.taught = list(state["taught"])
        self._choice.set_state(state["choice"])
        if "teacher" in state:
            self.teacher = Teacher.from_state(self.world, state["teacher"])
