"""Generative replay: Shin, Lee, Kim & Kim 2017, "Continual learning with deep generative replay".

With k tasks begun, solver and generator both learn   1/k * L(new) + (1 - 1/k) * L(replay), or by the samples seen.
Replayed x comes from the *scholar*, frozen copies of generator and solver made when the last task ended; its targets are
the frozen solver's outputs at temperature T (van de Ven & Tolias 2018), or their largest (hard). `prior: moments` draws the
codes of a class from where that class's codes lie (`latent.py`).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from streamlearn.data import Batch, StreamlearnError
from streamlearn.models import registry
from streamlearn.models.feedback import Feedback
from streamlearn.models.vae import VAE
from streamlearn.optimizers import Optimizer
from streamlearn.strategies.latent import LatentMoments, codes
from streamlearn.strategies.parts import Closing, Replay, State, World
from streamlearn.strategies.shares import Shares
from streamlearn.strategies.teacher import Teacher
from streamlearn.tensors import averaging_rate, clones, copy_into, finite_norm, padded_all, seeded

if TYPE_CHECKING:
    from collections.abc import Sequence


log = logging.getLogger(__name__)

MOMENTS_DECAY = 0.998  # where the weights have no average


@dataclass(frozen=True)
class GeneratorSpec:
    """The generator's size and training."""

    conditional: bool
    hidden: int
    latent: int
    lr: float
    likelihood: str
    average: float | None
    moments: bool  # draw codes from where each class's codes lie, and not from N(0, I)
    gated: float = 0.0  # brain-inspired: share of the decoder's units that a class switches off


@dataclass(frozen=True)
class Targets:
    """What replayed samples are learned toward, and how many there are for each new one."""

    soft: bool
    temperature: float
    ratio: float
    balance: str


@dataclass(frozen=True)
class Scholar:
    """Generator and solver as they were when a task ended; `normals` of each class's codes, where they are drawn so."""

    generator: VAE | Feedback
    teacher: Teacher
    normals: tuple[Tensor, Tensor] | None
    pairs: Tensor  # [P, 2]: (task, output) of everything it can replay, on the host
    classes: Tensor  # [P]: the number of its class; one that came in several tasks has as many pairs

    def choose(self, count: int, generator: torch.Generator) -> Tensor:
        """Return the numbers of `count` pairs, drawn so that every class is as likely, in however many tasks it came."""
        tasks = self.classes.bincount()[self.classes]
        if bool((tasks == tasks[0]).all()):
            return torch.randint(len(self.pairs), (count,), generator=generator)
        return torch.multinomial(1 / tasks.double(), count, replacement=True, generator=generator)


class GenerativeReplay(Replay):
    """Replays what a generator remembers, labelled by the solver as it was."""

    generator: VAE | Feedback

    def __init__(self, world: World, spec: GeneratorSpec, targets: Targets) -> None:
        self.world = world
        self.spec = spec
        self.targets = targets
        self.num_outputs = world.num_outputs
        self.generator = self._build(world.num_outputs)
        self.average = clones(self._params)  # the weights that the scholar's generator is made of
        self.optimizer = self._optimizer()
        self.moments = LatentMoments(world.num_outputs, spec.latent, world.device) if spec.moments else None
        self.scholar: Scholar | None = None
        self.shares = Shares(targets.balance)
        self.steps = 0  # of the generator, in the current task
        self._noise = seeded(world.seed, "generative", world.device)
        self._choice = seeded(world.seed, "generative-choice")
        self._looked = False  # at the values of the current task

    @property
    def _params(self) -> list[Tensor]:
        return list(self.generator.parameters())

    def _build(self, num_outputs: int) -> VAE | Feedback:
        spec = self.spec
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.world.seed)
            return VAE(
                self.world.input_shape, num_outputs, conditional=spec.conditional,
                hidden=spec.hidden, latent=spec.latent, likelihood=spec.likelihood,
            ).to(self.world.device)  # fmt: skip

    def _optimizer(self) -> Optimizer:
        return Optimizer(self._params, "adam", self.spec.lr)

    def begin_task(self, task: int, params: Sequence[Tensor]) -> None:
        del task, params
        self._looked = False

    @torch.no_grad()
    def sample(self, batch: Batch) -> Batch | None:
        self._look(batch.x)
        self.shares.see(len(batch))
        scholar, targets = self.scholar, self.targets
        if scholar is None or not len(scholar.pairs):  # a first task may have had no usable sample
            self.share = 0.0
            return None
        count = max(1, round(targets.ratio * len(batch)))
        self.share = self.shares.of_the_past
        chosen = scholar.choose(count, self._choice)
        task = scholar.pairs[chosen, 0]
        y = scholar.pairs[chosen, 1].to(self.world.device, non_blocking=True)
        z = torch.randn(count, self.spec.latent, generator=self._noise, device=self.world.device)
        if scholar.normals is not None:
            z = codes(scholar.normals, y, z)
        x = scholar.generator.generate(z, y)
        logits = scholar.teacher.logits(x, task)
        if not targets.soft:
            return Batch(x, logits.argmax(1), task)
        if not self.spec.conditional:
            y = logits.argmax(1)
        return Batch(x, y, task, soft=torch.softmax(logits / targets.temperature, 1), temperature=targets.temperature)

    def observe(self, mixed: Batch, finite: Tensor) -> None:
        noise = torch.randn(len(mixed), self.spec.latent, generator=self._noise, device=self.world.device)
        assert mixed.weight is not None
        assert isinstance(self.generator, VAE)
        losses, mean, log_variance = self.generator.loss(mixed.x, mixed.y, noise)
        (losses * mixed.weight).sum().backward()
        applied = self._step(finite)
        if self.moments is not None:
            rate = averaging_rate(self.spec.average or MOMENTS_DECAY, self.steps)
            self.moments.note(mean.detach(), log_variance.detach(), mixed.y, rate, applied)
        self.steps += 1

    def _look(self, x: Tensor) -> None:
        if self._looked or self.spec.likelihood != "bernoulli":
            return
        self._looked = True  # once a task: it waits for the device
        low, high = float(x.min()), float(x.max())
        if low < 0 or high > 1:
            told = (
                "strategy.generative: values from %.3g to %.3g are replayed cut to 0 and 1, by likelihood bernoulli; %s"
            )
            log.warning(told, low, high, "set input.scale, or likelihood: gaussian")

    def _step(self, finite: Tensor) -> Tensor:
        """Take the generator's optimizer step; return whether it was applied, 0-dim and on the device."""
        params = self._params
        grads = [param.grad if param.grad is not None else torch.zeros_like(param) for param in params]
        _, sound = finite_norm(grads)
        applied = sound & finite
        self.optimizer.step(grads, applied)
        self.generator.zero_grad()
        if self.spec.average is not None:
            rate = averaging_rate(self.spec.average, self.steps) * applied
            with torch.no_grad():
                for mean, param in zip(self.average, params, strict=True):
                    mean.lerp_(param, rate)
        return applied

    @torch.no_grad()
    def end_task(self, closing: Closing) -> None:
        if self.spec.average is not None:
            copy_into(self._params, self.average)
        generator = self._build(self.num_outputs)
        copy_into(list(generator.parameters()), self._params)
        pairs = [(task, y) for task, outputs in enumerate(closing.outputs) for y in outputs]
        labels = [closing.classes[task][y] if closing.classes else y for task, y in pairs]
        numbers = {label: number for number, label in enumerate(dict.fromkeys(labels))}
        self.scholar = Scholar(
            generator.requires_grad_(requires_grad=False).eval(),
            Teacher.of(self.world, closing),
            self.moments.normals() if self.moments is not None else None,
            torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2),
            torch.tensor([numbers[label] for label in labels], dtype=torch.int64),
        )
        self.shares.end_task(closing.task)
        self.steps = 0

    def grow(self, params: Sequence[Tensor], num_outputs: int) -> None:
        del params
        self.num_outputs = num_outputs
        self.generator.grow(num_outputs)
        self.optimizer.follow(self._params)
        self.average = padded_all(self.average, self._params, copy_rest=True)
        if self.moments is not None:
            self.moments.grow(num_outputs)
        if self.scholar is not None:  # it knows nothing of the new outputs, and is never asked for them
            self.scholar.generator.grow(num_outputs)
            self.scholar.generator.requires_grad_(requires_grad=False)
            self.scholar.teacher.grow(num_outputs)

    def state_dict(self) -> State:
        state: State = {
            "num_outputs": self.num_outputs,
            "shares": self.shares.state_dict(),
            "steps": self.steps,
            "generator": dict(self.generator.state_dict()),
            "average": {str(n): mean for n, mean in enumerate(self.average)},
            "optimizer": self.optimizer.state_dict(),
            "noise": self._noise.get_state(),
            "choice": self._choice.get_state(),
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
            if scholar.normals is not None:
                state["scholar"] |= {"mean": scholar.normals[0], "root": scholar.normals[1]}
        return state

    def load_state_dict(self, state: State) -> None:
        self.num_outputs, self.steps = state["num_outputs"], state["steps"]
        self.shares.load_state_dict(state["shares"])
        self.generator = self._build(self.num_outputs)
        self.generator.load_state_dict(state["generator"])
        self.average = [state["average"][str(n)].to(self.world.device) for n in range(len(self._params))]
        self.optimizer = self._optimizer()
        self.optimizer.load_state_dict(state["optimizer"])
        self._noise.set_state(state["noise"])
        self._choice.set_state(state["choice"])
        if self.moments is not None:
            self.moments.load_state_dict(state["moments"])
        if (frozen := state.get("scholar")) is not None:
            generator = self._build(self.num_outputs)
            generator.load_state_dict(frozen["generator"])
            normals = None
            if "mean" in frozen:
                normals = frozen["mean"].to(self.world.device), frozen["root"].to(self.world.device)
            self.scholar = Scholar(
                generator.requires_grad_(requires_grad=False).eval(),
                Teacher.from_state(self.world, frozen["teacher"]),
                normals,
                frozen["pairs"],
                frozen.get("classes", torch.arange(len(frozen["pairs"]))),  # of an earlier version: all alike
            )


class FeedbackReplay(GenerativeReplay):
    """Brain-inspired replay: the generator reads the solver's last hidden layer, and its loss shapes that layer, too.

    So the solver is not naive's even before a first task has ended. What the generator replays is what the solver sees: hidden
    features, as in the publication, where `input.encoder` makes them; they need lower layers that no longer change.
    """

    needs_features = True
    generator: Feedback

    def _build(self, num_outputs: int) -> Feedback:
        spec = self.spec
        head = registry.head_of(self.world.build_network(num_outputs))
        if head is None:
            message = (
                "strategy.generative: variant brain-inspired needs a model whose last layer is linear and named head"
            )
            raise StreamlearnError(message, code=78)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.world.seed)
            return Feedback(
                self.world.input_shape, head.in_features, num_outputs, hidden=spec.hidden, latent=spec.latent,
                likelihood=spec.likelihood, gated=spec.gated, seed=self.world.seed,
            ).to(self.world.device)  # fmt: skip

    def loss(self, mixed: Batch, features: Tensor) -> Tensor:
        noise = torch.randn(len(mixed), self.spec.latent, generator=self._noise, device=self.world.device)
        assert mixed.weight is not None
        return (self.generator.loss(features, mixed.x, mixed.y, noise) * mixed.weight).sum()

    def observe(self, mixed: Batch, finite: Tensor) -> None:
        del mixed  # its gradients came with the solver's
        self._step(finite)
        self.steps += 1
