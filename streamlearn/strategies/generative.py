"""Generative replay: Shin, Lee, Kim & Kim 2017, "Continual learning with deep generative replay".

With k tasks begun, model and generator both learn 1/k * L(new) + (1 - 1/k) * L(replay), or the shares follow the numbers of
samples (`replay_share.py`). Replayed x comes from the *scholar*: frozen copies of generator and model from the end of the last
task. Its targets are the frozen model's outputs at temperature T (van de Ven & Tolias 2018), or the largest output (hard).
`prior: moments` draws the codes of a class from the distribution of that class's codes (`latent_moments.py`).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from streamlearn.core.errors import ConfigurationError
from streamlearn.core.samples import Batch
from streamlearn.models import registry
from streamlearn.models.feedback import Feedback
from streamlearn.models.vae import VAE
from streamlearn.optimizers import Optimizer
from streamlearn.strategies.latent_moments import LatentMoments, sample_codes
from streamlearn.strategies.replay_share import ReplayShare
from streamlearn.strategies.slots import BuildContext, EndedTask, Replay, State
from streamlearn.strategies.teacher import Teacher
from streamlearn.tensors import averaging_rate, clones, copy_into, finite_norm, padded_all, seeded_generator

if TYPE_CHECKING:
    from collections.abc import Sequence


logger = logging.getLogger(__name__)

MOMENTS_DECAY = 0.998  # of the latent moments, if the generator's weights are not averaged
MAX_MEASURED_PAIRS = 200  # limits on the cost of `measure_agreement`
MAX_MEASURED_SAMPLES = 2000
SAMPLES_PER_PAIR = 100
CHUNK = 500
LARGE_VALUES = 10.0
"""Root mean square above which a generator of variance 1 uses its latent codes for the size of the values."""


@dataclass(frozen=True)
class GeneratorSpec:
    """The generator's size and training."""

    conditional: bool
    hidden: int
    latent: int
    lr: float
    likelihood: str
    average: float | None
    moments: bool  # draw codes from the distribution of each class's codes, not from N(0, I)
    gated: float = 0.0  # brain-inspired: share of the decoder's units that a class switches off


@dataclass(frozen=True)
class ReplayTargets:
    """The targets of replayed samples, and how many samples are replayed for each new one."""

    soft: bool
    temperature: float
    ratio: float
    balance: str


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

    def draw_pairs(self, count: int, generator: torch.Generator) -> Tensor:
        """Return the indices of `count` pairs. Every class is equally likely, however many pairs it has."""
        pairs_of_class = self.classes.bincount()[self.classes]
        if bool((pairs_of_class == pairs_of_class[0]).all()):
            return torch.randint(len(self.pairs), (count,), generator=generator)
        return torch.multinomial(1 / pairs_of_class.double(), count, replacement=True, generator=generator)

    def generate(self, y: Tensor, noise: Tensor) -> Tensor:
        """Return samples of classes `y [B]` from standard normal `noise [B, z]`."""
        return self.generator.generate(noise if self.gaussians is None else sample_codes(self.gaussians, y, noise), y)


class GenerativeReplay(Replay):
    """Replays samples from a generator, with targets from a frozen copy of the model."""

    generator: VAE | Feedback

    def __init__(self, context: BuildContext, spec: GeneratorSpec, targets: ReplayTargets) -> None:
        self.context = context
        self.spec = spec
        self.targets = targets
        self.num_outputs = context.num_outputs
        self.generator = self._build(context.num_outputs)
        self.average = clones(self._params)  # moving average of the weights; the scholar gets it
        self.optimizer = self._make_optimizer()
        self.moments = LatentMoments(context.num_outputs, spec.latent, context.device) if spec.moments else None
        self.scholar: Scholar | None = None
        self.replay_share = ReplayShare(targets.balance)
        self.steps = 0  # of the generator, in the current task
        self._noise = seeded_generator(context.seed, "generative", context.device)
        self._pair_draws = seeded_generator(context.seed, "generative-choice")
        self._range_checked = False  # for the current task
        self._dropped = torch.zeros((), dtype=torch.int64, device=context.device)  # see `pop_dropped_updates`
        self._drop_logged = False  # for the current task
        self._agreement: dict[tuple[int, int], float] = {}

    @property
    def _params(self) -> list[Tensor]:
        return list(self.generator.parameters())

    def _build(self, num_outputs: int) -> VAE | Feedback:
        """Return an untrained generator."""
        spec = self.spec
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.context.seed)
            return VAE(
                self.context.input_shape, num_outputs, conditional=spec.conditional,
                hidden=spec.hidden, latent=spec.latent, likelihood=spec.likelihood,
            ).to(self.context.device)  # fmt: skip

    def _make_optimizer(self) -> Optimizer:
        return Optimizer(self._params, "adam", self.spec.lr)

    def begin_task(self, task: int, params: Sequence[Tensor]) -> None:
        del task, params
        self._range_checked = self._drop_logged = False

    @torch.no_grad()
    def sample(self, batch: Batch) -> Batch | None:
        self._check_range(batch.x)
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
        noise = torch.randn(count, self.spec.latent, generator=self._noise, device=self.context.device)
        x = scholar.generate(y, noise)
        logits = scholar.teacher.logits(x, task)
        if not targets.soft:
            return Batch(x, logits.argmax(1), task)
        if not self.spec.conditional:
            y = logits.argmax(1)
        soft_targets = torch.softmax(logits / targets.temperature, 1)
        return Batch(x, y, task, soft_targets=soft_targets, temperature=targets.temperature)

    def after_step(self, mixed: Batch, finite: Tensor) -> None:
        noise = torch.randn(len(mixed), self.spec.latent, generator=self._noise, device=self.context.device)
        assert mixed.weight is not None
        assert isinstance(self.generator, VAE)
        losses, mean, log_variance = self.generator.loss(mixed.x, mixed.y, noise)
        (losses * mixed.weight).sum().backward()
        applied = self._step(finite)
        if self.moments is not None:
            rate = averaging_rate(self.spec.average or MOMENTS_DECAY, self.steps)
            self.moments.update(mean.detach(), log_variance.detach(), mixed.y, rate, applied)
        self.steps += 1

    def _check_range(self, x: Tensor) -> None:
        """Warn, once a task, if the values of a batch cannot be generated well."""
        if self._range_checked:
            return
        self._range_checked = True  # only once a task, because it waits for the device
        low, high, size = float(x.min()), float(x.max()), float(x.square().mean().sqrt())
        problem = None
        if self.spec.likelihood == "bernoulli" and (low < 0 or high > 1):
            problem = (
                "are clipped to 0..1 in replayed samples, because of likelihood: bernoulli; set input.scale so that they are "
                "from 0 to 1, or bring them to about -1 to 1 (input.scale, or an input.encoder) and choose likelihood: gaussian"
            )
        elif self.spec.likelihood == "gaussian" and size > LARGE_VALUES:
            problem = (
                "are too large for likelihood: gaussian, whose variance is 1: samples would be generated badly; bring them to "
                "about -1 to 1 by input.scale, or by an input.encoder that standardises them"
            )
        if problem is not None:
            logger.warning("strategy.generative: values from %.3g to %.3g %s", low, high, problem)

    def _step(self, finite: Tensor) -> Tensor:
        """Take the generator's optimizer step, and return whether it was applied, 0-dim and on the device.

        `finite` is false if the model's own step was dropped; then the generator's is dropped, too.
        """
        params = self._params
        grads = [param.grad if param.grad is not None else torch.zeros_like(param) for param in params]
        norm, own_finite = finite_norm(grads)
        if self.context.max_norm is not None:
            torch._foreach_mul_(grads, (self.context.max_norm / (norm + 1e-6)).clamp(max=1.0))
        applied = own_finite & finite
        self._dropped += finite & ~own_finite
        self.optimizer.step(grads, applied)
        self.generator.zero_grad()
        if self.spec.average is not None:
            rate = averaging_rate(self.spec.average, self.steps) * applied
            with torch.no_grad():
                for mean, param in zip(self.average, params, strict=True):
                    mean.lerp_(param, rate)
        return applied

    def pop_dropped_updates(self) -> int:
        dropped = int(self._dropped)
        self._dropped.zero_()
        if dropped and not self._drop_logged:
            self._drop_logged = True
            advice = "lower strategy.generative.lr, set learner.max_norm, or bring the values to about -1 to 1 by input.scale"
            logger.warning(
                "an update of the generator was not finite and was dropped; further ones in this task are only counted; %s",
                advice,
            )
        return dropped

    @torch.no_grad()
    def end_task(self, ended: EndedTask) -> None:
        if self.spec.average is not None:
            copy_into(self._params, self.average)
        generator = self._build(self.num_outputs)
        copy_into(list(generator.parameters()), self._params)
        pairs = [(task, y) for task, outputs in enumerate(ended.seen_outputs) for y in outputs]
        labels = [ended.output_labels[task][y] if ended.output_labels else y for task, y in pairs]
        numbers = {label: number for number, label in enumerate(dict.fromkeys(labels))}
        self.scholar = Scholar(
            generator.requires_grad_(requires_grad=False).eval(),
            Teacher.from_ended_task(self.context, ended),
            self.moments.gaussians() if self.moments is not None else None,
            torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2),
            torch.tensor([numbers[label] for label in labels], dtype=torch.int64),
        )
        self.replay_share.end_task(ended.task)
        self.steps = 0

    @torch.no_grad()
    def measure_agreement(self, task: int) -> None:
        """Measure for each class which ratio of its generated samples the frozen model assigns to that class.

        The generator of variant `vae` cannot generate a given class. There the measure is the class's share of the samples
        generated for tasks with the same active outputs, divided by an equal share, and at most 1. At most
        `MAX_MEASURED_PAIRS` pairs are measured, those of the newest task first, so that the cost does not grow.
        """
        scholar, self._agreement = self.scholar, {}
        if scholar is None or not len(scholar.pairs):
            return
        if not self.spec.conditional and len(scholar.pairs) > MAX_MEASURED_PAIRS:
            return
        # a random generator of its own: measuring must not change training
        draws = seeded_generator(self.context.seed, f"generative-measure-{task}")
        order = torch.randperm(len(scholar.pairs), generator=draws)
        is_older = (scholar.pairs[order, 0] != task).byte()
        pairs = scholar.pairs[order[is_older.argsort(stable=True)[:MAX_MEASURED_PAIRS]]]
        per_pair = min(SAMPLES_PER_PAIR, MAX_MEASURED_SAMPLES // len(pairs))
        requested = pairs.repeat_interleave(per_pair, 0)
        noise = torch.randn(len(requested), self.spec.latent, generator=draws)
        device = self.context.device
        answers = torch.cat([
            scholar.teacher.logits(scholar.generate(some[:, 1].to(device), z.to(device)), some[:, 0]).argmax(1).cpu()
            for some, z in zip(requested.split(CHUNK), noise.split(CHUNK), strict=True)
        ]).view(len(pairs), per_pair)  # fmt: skip
        if self.spec.conditional:
            ratios = (answers == pairs[:, 1:]).double().mean(1)
        else:
            active = scholar.teacher.active_outputs.cpu()
            masks = active.expand(task + 1, -1)[pairs[:, 0]] if len(active) == 1 else active[pairs[:, 0]]
            same_mask = (masks[:, None] == masks[None]).all(2)
            num_classes = [len(pairs[row, 1].unique()) for row in same_mask]
            shares = [(answers[row] == y).double().mean() for row, y in zip(same_mask, pairs[:, 1], strict=True)]
            ratios = (torch.stack(shares) * torch.tensor(num_classes)).clamp(max=1)
        self._agreement = {(t, y): ratio for (t, y), ratio in zip(pairs.tolist(), ratios.tolist(), strict=True)}

    def agreement(self) -> dict[tuple[int, int], float]:
        return self._agreement

    def grow(self, params: Sequence[Tensor], num_outputs: int) -> None:
        del params
        self.num_outputs = num_outputs
        self.generator.grow(num_outputs)
        self.optimizer.set_parameters(self._params)
        self.average = padded_all(self.average, self._params, copy_rest=True)
        if self.moments is not None:
            self.moments.grow(num_outputs)
        if self.scholar is not None:  # only its shapes grow: it never replays the new outputs
            self.scholar.generator.grow(num_outputs)
            self.scholar.generator.requires_grad_(requires_grad=False)
            self.scholar.teacher.grow(num_outputs)

    def state_dict(self) -> State:
        state: State = {
            "num_outputs": self.num_outputs,
            "shares": self.replay_share.state_dict(),
            "steps": self.steps,
            "generator": dict(self.generator.state_dict()),
            "average": {str(n): mean for n, mean in enumerate(self.average)},
            "optimizer": self.optimizer.state_dict(),
            "noise": self._noise.get_state(),
            "choice": self._pair_draws.get_state(),
            "agreement": [[*pair, ratio] for pair, ratio in self._agreement.items()],
        }
        if self.moments is not None:
            state["moments"] = self.moments.state_dict()
        if (scholar := self.scholar) is not None:
            state["scholar"] = {
                "generator": dict(scholar.generator.state_dict()),
                "teacher": scholar.teacher.state_dict(),
                "pairs": scholar.pairs,
                "classes": scholar.classes,
            }
            if scholar.gaussians is not None:
                state["scholar"] |= {"mean": scholar.gaussians[0], "root": scholar.gaussians[1]}
        return state

    def load_state_dict(self, state: State) -> None:
        self.num_outputs, self.steps = state["num_outputs"], state["steps"]
        self.replay_share.load_state_dict(state["shares"])
        self.generator = self._build(self.num_outputs)
        self.generator.load_state_dict(state["generator"])
        self.average = [state["average"][str(n)].to(self.context.device) for n in range(len(self._params))]
        self.optimizer = self._make_optimizer()
        self.optimizer.load_state_dict(state["optimizer"])
        self._noise.set_state(state["noise"])
        self._pair_draws.set_state(state["choice"])
        self._agreement = {(task, y): ratio for task, y, ratio in state.get("agreement", [])}
        if self.moments is not None:
            self.moments.load_state_dict(state["moments"])
        if (frozen := state.get("scholar")) is not None:
            generator = self._build(self.num_outputs)
            generator.load_state_dict(frozen["generator"])
            gaussians = None
            if "mean" in frozen:
                gaussians = frozen["mean"].to(self.context.device), frozen["root"].to(self.context.device)
            self.scholar = Scholar(
                generator.requires_grad_(requires_grad=False).eval(),
                Teacher.from_state(self.context, frozen["teacher"]),
                gaussians,
                frozen["pairs"],
                frozen.get("classes", torch.arange(len(frozen["pairs"]))),  # older checkpoints: each pair is a class
            )


class FeedbackReplay(GenerativeReplay):
    """Brain-inspired replay: the generator reads the model's last hidden layer, and its loss also trains that layer.

    So the model differs from naive's even before the first task has ended. The generator replays the model's inputs. These are
    hidden features, as in the publication, if `input.encoder` computes them: that needs lower layers that do not change.
    """

    needs_features = True
    generator: Feedback

    def _build(self, num_outputs: int) -> Feedback:
        spec = self.spec
        head = registry.head_of(self.context.build_network(num_outputs))
        if head is None:
            message = (
                "strategy.generative: variant brain-inspired needs a model whose last layer is linear and named head"
            )
            raise ConfigurationError(message)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.context.seed)
            return Feedback(
                self.context.input_shape, head.in_features, num_outputs, hidden=spec.hidden, latent=spec.latent,
                likelihood=spec.likelihood, gated=spec.gated, seed=self.context.seed,
            ).to(self.context.device)  # fmt: skip

    def feature_loss(self, mixed: Batch, features: Tensor) -> Tensor:
        noise = torch.randn(len(mixed), self.spec.latent, generator=self._noise, device=self.context.device)
        assert mixed.weight is not None
        return (self.generator.loss(features, mixed.x, mixed.y, noise) * mixed.weight).sum()

    def after_step(self, mixed: Batch, finite: Tensor) -> None:
        del mixed  # the generator already has its gradients: `feature_loss` was part of the model's loss
        self._step(finite)
        self.steps += 1
