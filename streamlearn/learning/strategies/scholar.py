"""The scholar of deep generative replay (Shin et al. 2017): a frozen generator and a frozen model, which replay past tasks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from streamlearn.learning.strategies.latent_moments import sample_codes
from streamlearn.learning.strategies.teacher import Teacher

if TYPE_CHECKING:
    from collections.abc import Sequence

    from streamlearn.core.labels import Label
    from streamlearn.learning.models.feedback import Feedback
    from streamlearn.learning.models.vae import VAE
    from streamlearn.learning.strategies.slots import BuildContext, EndedTask, State


@dataclass(frozen=True)
class Scholar:
    """Frozen copies of generator and model from the end of a task, which together replay past tasks.

    `gaussians` are the distributions of each class's codes, or None if codes come from N(0, I).
    """

    generator: VAE | Feedback
    teacher: Teacher
    gaussians: tuple[Tensor, Tensor] | None
    pairs: Tensor  # [P, 2]: every (task, output) that can be replayed, on the host
    classes: Tensor  # [P]: a number for the class of each pair; a class that came in several tasks has several pairs

    @classmethod
    def from_ended_task(
        cls,
        context: BuildContext,
        generator: VAE | Feedback,
        gaussians: tuple[Tensor, Tensor] | None,
        ended: EndedTask,
    ) -> Scholar:
        """Return the scholar of a task that has ended. `generator` is a copy that nothing else changes."""
        pairs = [(task, y) for task, outputs in enumerate(ended.seen_outputs) for y in outputs]
        # without labels, an output is its own class
        labels: Sequence[Label] = [ended.output_labels[task][y] if ended.output_labels else y for task, y in pairs]
        numbers = {label: number for number, label in enumerate(dict.fromkeys(labels))}
        return cls(
            generator.requires_grad_(requires_grad=False).eval(),
            Teacher.from_ended_task(context, ended),
            gaussians,
            torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2),
            torch.tensor([numbers[label] for label in labels], dtype=torch.int64),
        )

    def draw_pairs(self, count: int, generator: torch.Generator) -> Tensor:
        """Return the indices of `count` pairs. Every class is equally likely, however many pairs it has."""
        pairs_of_class = self.classes.bincount()[self.classes]
        if bool((pairs_of_class == pairs_of_class[0]).all()):
            return torch.randint(len(self.pairs), (count,), generator=generator)
        return torch.multinomial(1 / pairs_of_class.double(), count, replacement=True, generator=generator)

    def generate(self, y: Tensor, noise: Tensor) -> Tensor:
        """Return samples of classes `y [B]` from standard normal `noise [B, z]`."""
        return self.generator.generate(noise if self.gaussians is None else sample_codes(self.gaussians, y, noise), y)

    def grow(self, num_outputs: int) -> None:
        """Enlarge the shapes for `num_outputs` outputs. The scholar never replays the new outputs."""
        self.generator.grow(num_outputs)
        self.generator.requires_grad_(requires_grad=False)
        self.teacher.grow(num_outputs)

    def state_dict(self) -> State:
        """Return everything from which `from_state` builds the scholar."""
        state: State = {
            "generator": dict(self.generator.state_dict()),
            "teacher": self.teacher.state_dict(),
            "pairs": self.pairs,
            "classes": self.classes,
        }
        if self.gaussians is not None:
            state |= {"mean": self.gaussians[0], "root": self.gaussians[1]}
        return state

    @classmethod
    def from_state(cls, context: BuildContext, generator: VAE | Feedback, state: State) -> Scholar:
        """Build the scholar from what `state_dict` returned. `generator` is an untrained one, which gets the weights."""
        generator.load_state_dict(state["generator"])
        gaussians = None
        if "mean" in state:
            gaussians = state["mean"].to(context.device), state["root"].to(context.device)
        return cls(
            generator.requires_grad_(requires_grad=False).eval(),
            Teacher.from_state(context, state["teacher"]),
            gaussians,
            state["pairs"],
            state.get("classes", torch.arange(len(state["pairs"]))),  # older checkpoints: each pair is a class
        )
