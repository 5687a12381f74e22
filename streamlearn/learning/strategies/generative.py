"""Generative replay: Shin, Lee, Kim & Kim 2017, "Continual learning with deep generative replay".

With k tasks begun, model and generator both learn 1/k * L(new) + (1 - 1/k) * L(replay), or the shares follow the numbers of
samples (`replay_share.py`). Replayed x comes from the *scholar*: frozen copies of generator and model from the end of the last
task (`scholar.py`). Its targets are the frozen model's outputs at temperature T (van de Ven & Tolias 2018), or the largest
output (hard). `prior: moments` draws the codes of a class from the distribution of that class's codes (`latent_moments.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from streamlearn.core.samples import Batch
from streamlearn.learning.models.modes import global_seed
from streamlearn.learning.models.vae import VAE
from streamlearn.learning.strategies.agreement import measure_agreement
from streamlearn.learning.strategies.generator_training import (
    GeneratorSpec,
    GeneratorTraining,
    warn_of_unsuitable_values,
)
from streamlearn.learning.strategies.latent_moments import LatentMoments
from streamlearn.learning.strategies.replay_share import ReplayShare
from streamlearn.learning.strategies.scholar import Scholar
from streamlearn.learning.strategies.slots import BuildContext, EndedTask, Replay, State
from streamlearn.learning.tensors import averaging_rate, seeded_generator

if TYPE_CHECKING:
    from collections.abc import Sequence

    from streamlearn.learning.models.feedback import Feedback

MOMENTS_DECAY = 0.998  # of the latent moments, if the generator's weights are not averaged


@dataclass(frozen=True)
class ReplayTargets:
    """The targets of replayed samples, and how many samples are replayed for each new one."""

    soft: bool
    temperature: float
    ratio: float
    balance: str


class GenerativeReplay(Replay):
    """Replays samples from a generator, with targets from a frozen copy of the model."""

    def __init__(self, context: BuildContext, spec: GeneratorSpec, targets: ReplayTargets) -> None:
        self.context = context
        self.spec = spec
        self.targets = targets
        self.training = self._make_training()
        self.moments = LatentMoments(context.num_outputs, spec.latent, context.device) if spec.moments else None
        self.scholar: Scholar | None = None
        self.replay_share = ReplayShare(targets.balance)
        self._noise = seeded_generator(context.seed, "generative", context.device)
        self._pair_draws = seeded_generator(context.seed, "generative-choice")
        self._range_checked = False  # for the current task
        self._agreement: dict[tuple[int, int], float] = {}

    def _make_training(self) -> GeneratorTraining:
        return GeneratorTraining(
            self._build_vae, self.context.num_outputs, self.spec, self.context.max_norm, self.context.device
        )

    def _build_vae(self, num_outputs: int) -> VAE:
        """Return an untrained generator."""
        spec = self.spec
        with global_seed(self.context.seed):
            return VAE(
                self.context.input_shape, num_outputs, conditional=spec.conditional,
                hidden=spec.hidden, latent=spec.latent, likelihood=spec.likelihood,
            ).to(self.context.device)  # fmt: skip

    @property
    def generator(self) -> VAE | Feedback:
        """The generator that is trained."""
        return self.training.generator

    def begin_task(self, task: int, params: Sequence[Tensor]) -> None:
        del task, params
        self._range_checked = False
        self.training.begin_task()

    @torch.no_grad()
    def sample(self, batch: Batch) -> Batch | None:
        if not self._range_checked:
            self._range_checked = True  # only once a task, because it waits for the device
            warn_of_unsuitable_values(batch.x, self.spec.likelihood)
        self.replay_share.add_samples(len(batch))
        scholar, targets = self.scholar, self.targets
        if scholar is None or not len(scholar.pairs):  # a first task may have had no usable sample
            self.share = 0.0
            return None
        count = max(1, round(targets.ratio * len(batch)))
        self.share = self.replay_share.value
        chosen = scholar.draw_pairs(count, self._pair_draws)
        task = scholar.pairs[chosen, 0]
        y = scholar.pairs[chosen, 1].to(self.context.device, non_blocking=True)
        x = scholar.generate(y, self._draw_noise(count))
        logits = scholar.teacher.logits(x, task)
        if not targets.soft:
            return Batch(x, logits.argmax(1), task)
        if not self.spec.conditional:
            y = logits.argmax(1)
        soft_targets = torch.softmax(logits / targets.temperature, 1)
        return Batch(x, y, task, soft_targets=soft_targets, temperature=targets.temperature)

    def after_step(self, mixed: Batch, finite: Tensor) -> None:
        noise = self._draw_noise(len(mixed))
        assert mixed.weight is not None
        assert isinstance(self.generator, VAE)
        losses, mean, log_variance = self.generator.loss(mixed.x, mixed.y, noise)
        (losses * mixed.weight).sum().backward()
        rate = averaging_rate(self.spec.average or MOMENTS_DECAY, self.training.steps)
        applied = self.training.step(finite)
        if self.moments is not None:
            self.moments.update(mean.detach(), log_variance.detach(), mixed.y, rate, applied)

    def pop_dropped_updates(self) -> int:
        return self.training.pop_dropped_updates()

    @torch.no_grad()
    def end_task(self, ended: EndedTask) -> None:
        gaussians = self.moments.gaussians() if self.moments is not None else None
        self.scholar = Scholar.from_ended_task(self.context, self.training.end_task(), gaussians, ended)
        self.replay_share.end_task(ended.task)

    def measure_agreement(self, task: int) -> None:
        self._agreement = {}
        if self.scholar is not None:
            draws = seeded_generator(self.context.seed, f"generative-measure-{task}")
            self._agreement = measure_agreement(
                self.scholar, task, draws,
                latent=self.spec.latent, conditional=self.spec.conditional, device=self.context.device,
            )  # fmt: skip

    def agreement(self) -> dict[tuple[int, int], float]:
        return self._agreement

    def grow(self, params: Sequence[Tensor], num_outputs: int) -> None:
        del params
        self.training.grow(num_outputs)
        if self.moments is not None:
            self.moments.grow(num_outputs)
        if self.scholar is not None:
            self.scholar.grow(num_outputs)

    def state_dict(self) -> State:
        state: State = {
            "num_outputs": self.training.num_outputs,
            "shares": self.replay_share.state_dict(),
            **self.training.state_dict(),
            "noise": self._noise.get_state(),
            "choice": self._pair_draws.get_state(),
            "agreement": [[*pair, ratio] for pair, ratio in self._agreement.items()],
        }
        if self.moments is not None:
            state["moments"] = self.moments.state_dict()
        if self.scholar is not None:
            state["scholar"] = self.scholar.state_dict()
        return state

    def load_state_dict(self, state: State) -> None:
        num_outputs = state["num_outputs"]
        self.replay_share.load_state_dict(state["shares"])
        self.training.load_state_dict(state, num_outputs)
        self._noise.set_state(state["noise"])
        self._pair_draws.set_state(state["choice"])
        self._agreement = {(task, y): ratio for task, y, ratio in state.get("agreement", [])}
        if self.moments is not None:
            self.moments.load_state_dict(state["moments"])
        if (frozen := state.get("scholar")) is not None:
            self.scholar = Scholar.from_state(self.context, self.training.build(num_outputs), frozen)

    def _draw_noise(self, count: int) -> Tensor:
        """Return standard normal noise `[count, z]` for codes."""
        return torch.randn(count, self.spec.latent, generator=self._noise, device=self.context.device)
