"""Learning without forgetting: Li & Hoiem 2016.

With k tasks begun, loss = 1/k * CE(labels) + (1 - 1/k) * T^2 * CE(teacher's softmax at T, model's softmax at T). Both terms
use the *new* samples: the current inputs are replayed with targets from the teacher, a copy of the model from the end of the
last task. No sample is stored.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from streamlearn.core.samples import Batch
from streamlearn.learning.strategies.replay_share import ReplayShare
from streamlearn.learning.strategies.slots import BuildContext, EndedTask, Replay, State
from streamlearn.learning.strategies.teacher import Teacher
from streamlearn.learning.tensors import seeded_generator

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


class LearningWithoutForgetting(Replay):
    """Replays the current inputs. Each gets a past task at random, so that the cost does not grow with the tasks."""

    def __init__(self, context: BuildContext, *, temperature: float, balance: str) -> None:
        self.context = context
        self.temperature = temperature
        self.replay_share = ReplayShare(balance)
        self.teacher: Teacher | None = None
        self.teacher_tasks: list[int] = []  # tasks for which the teacher has outputs
        self._generator = seeded_generator(context.seed, "distillation")

    def sample(self, batch: Batch) -> Batch | None:
        self.replay_share.add_samples(len(batch))
        if self.teacher is None or not self.teacher_tasks:
            self.share = 0.0
            return None
        self.share = self.replay_share.value
        chosen = torch.randint(len(self.teacher_tasks), (len(batch),), generator=self._generator)
        task = torch.tensor(self.teacher_tasks)[chosen]
        logits = self.teacher.logits(batch.x, task)
        targets = torch.softmax(logits / self.temperature, 1)
        return Batch(batch.x, logits.argmax(1), task, soft_targets=targets, temperature=self.temperature)

    def end_task(self, ended: EndedTask) -> None:
        self.replay_share.end_task(ended.task)
        self.teacher = Teacher.from_ended_task(self.context, ended)
        self.teacher_tasks = [task for task, outputs in enumerate(ended.seen_outputs) if outputs]

    def grow(self, params: Sequence[Tensor], num_outputs: int) -> None:
        del params
        if self.teacher is not None:
            self.teacher.grow(num_outputs)

    def state_dict(self) -> State:
        state: State = {
            "shares": self.replay_share.state_dict(),
            "taught": self.teacher_tasks,
            "choice": self._generator.get_state(),
        }
        return state if self.teacher is None else {**state, "teacher": self.teacher.state_dict()}

    def load_state_dict(self, state: State) -> None:
        self.replay_share.load_state_dict(state["shares"])
        self.teacher_tasks = list(state["taught"])
        self._generator.set_state(state["choice"])
        if "teacher" in state:
            self.teacher = Teacher.from_state(self.context, state["teacher"])
