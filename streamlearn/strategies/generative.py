"""Generative replay: Shin, Lee, Kim & Kim 2017, "Continual learning with deep generative replay".

With k tasks begun, solver and generator both learn   1/k * L(new) + (1 - 1/k) * L(replay).
Replayed x comes from the *scholar*, frozen copies of generator and solver made when the last task ended; its targets are
the frozen solver's outputs at temperature T (van de Ven & Tolias 2018), or their largest (hard).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from streamlearn.data import Batch
from streamlearn.models.vae import VAE
from streamlearn.optimizers import Optimizer
from streamlearn.strategies.parts import Closing, Replay, State, World
from streamlearn.tensors import averaging_rate, clones, copy_into, finite_norm, padded_all, seeded


@dataclass(frozen=True)
class GeneratorSpec:
    """The generator's size and training."""

    conditional: bool
    hidden: int
    latent: int
    lr: float
    likelihood: str
    average: float | None


class GenerativeReplay(Replay):
    """Replays what a generator remembers, labelled by the solver as it was."""

    def __init__(self, world: World, spec: GeneratorSpec, *, soft: bool, temperature: float, ratio: float) -> None:
        self.world = world
        self.spec = spec
        self.soft = soft
        self.temperature = temperature
        self.ratio = ratio
        self.num_outputs = world.num_outputs
        self.generator = self._build(world.num_outputs)
        self.average = clones(self._params)  # the weights that the scholar's generator is made of
        self.optimizer = self._optimizer()
        self.scholar: tuple[VAE, nn.Module] | None = None
        self.allowed = torch.empty(0)  # [T, C] of the scholar
        self.pairs = torch.empty(0, 2, dtype=torch.int64)  # (task, output) of everything it can replay, on the host
        self._pairs_there = self.pairs
        self.tasks = 0  # ended
        self.steps = 0  # of the generator, in the current task
        self._noise = seeded(world.seed, "generative", world.device)
        self._choice = seeded(world.seed, "generative-choice")

    @property
    def _params(self) -> list[Tensor]:
        return list(self.generator.parameters())

    def _build(self, num_outputs: int) -> VAE:
        spec = self.spec
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.world.seed)
            return VAE(
                self.world.input_shape, num_outputs, conditional=spec.conditional,
                hidden=spec.hidden, latent=spec.latent, likelihood=spec.likelihood,
            ).to(self.world.device)  # fmt: skip

    def _optimizer(self) -> Optimizer:
        return Optimizer(self._params, "adam", self.spec.lr)

    @torch.no_grad()
    def sample(self, batch: Batch) -> Batch | None:
        if self.scholar is None or not len(self.pairs):  # a first task may have had no usable sample
            self.share = 0.0
            return None
        generator, solver = self.scholar
        count = max(1, round(self.ratio * len(batch)))
        self.share = self.tasks / (self.tasks + 1)
        chosen = torch.randint(len(self.pairs), (count,), generator=self._choice)
        task = self.pairs[chosen, 0]
        y = self._pairs_there[chosen.to(self.world.device), 1]
        z = torch.randn(count, self.spec.latent, generator=self._noise, device=self.world.device)
        x = generator.generate(z, y)
        logits = solver(x).masked_fill(~self.allowed[task.to(self.world.device)], -torch.inf)
        if not self.spec.conditional:
            y = logits.argmax(1)
        if not self.soft:
            return Batch(x, logits.argmax(1) if self.spec.conditional else y, task)
        return Batch(x, y, task, soft=torch.softmax(logits / self.temperature, 1), temperature=self.temperature)

    def observe(self, mixed: Batch, finite: Tensor) -> None:
        noise = torch.randn(len(mixed), self.spec.latent, generator=self._noise, device=self.world.device)
        assert mixed.weight is not None
        loss = (self.generator.loss(mixed.x, mixed.y, noise) * mixed.weight).sum()
        loss.backward()
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
        self.steps += 1

    @torch.no_grad()
    def end_task(self, closing: Closing) -> None:
        if self.spec.average is not None:
            copy_into(self._params, self.average)
        generator, solver = self._build(self.num_outputs), self.world.build_network(self.num_outputs)
        copy_into(list(generator.parameters()), self._params)
        solver.load_state_dict(closing.network.state_dict())
        self._freeze(generator, solver)
        self.allowed = closing.allowed.clone()
        self._remember([(t, y) for t, outputs in enumerate(closing.outputs) for y in outputs])
        self.tasks = closing.task + 1
        self.steps = 0

    def grow(self, params: list[Tensor], num_outputs: int) -> None:  # type: ignore[override]  # a list is a sequence
        del params
        self.num_outputs = num_outputs
        self.generator.grow(num_outputs)
        self.optimizer.follow(self._params)
        self.average = padded_all(self.average, self._params, copy_rest=True)
        # the scholar knows nothing of the new outputs, and is never asked for them: its masks are made wider
        if self.scholar is not None:
            wide = torch.zeros(len(self.allowed), num_outputs, dtype=torch.bool, device=self.allowed.device)
            wide[:, : self.allowed.shape[1]] = self.allowed
            self.allowed = wide
            generator, solver = self.scholar
            generator.grow(num_outputs)
            grown_solver = self.world.build_network(num_outputs)
            with torch.no_grad():
                for new, param in zip(grown_solver.parameters(), solver.parameters(), strict=True):
                    new.copy_(padded_all([param], [new])[0])
            self._freeze(generator, grown_solver)

    def state_dict(self) -> State:
        state: State = {
            "num_outputs": self.num_outputs,
            "tasks": self.tasks,
            "steps": self.steps,
            "generator": dict(self.generator.state_dict()),
            "average": {str(n): mean for n, mean in enumerate(self.average)},
            "optimizer": self.optimizer.state_dict(),
            "noise": self._noise.get_state(),
            "choice": self._choice.get_state(),
        }
        if self.scholar is not None:
            generator, solver = self.scholar
            state["scholar"] = {
                "generator": dict(generator.state_dict()),
                "solver": dict(solver.state_dict()),
                "allowed": self.allowed,
                "pairs": self.pairs,
            }
        return state

    def load_state_dict(self, state: State) -> None:
        self.num_outputs, self.tasks, self.steps = state["num_outputs"], state["tasks"], state["steps"]
        self.generator = self._build(self.num_outputs)
        self.generator.load_state_dict(state["generator"])
        self.average = [state["average"][str(n)].to(self.world.device) for n in range(len(self._params))]
        self.optimizer = self._optimizer()
        self.optimizer.load_state_dict(state["optimizer"])
        self._noise.set_state(state["noise"])
        self._choice.set_state(state["choice"])
        if (frozen := state.get("scholar")) is not None:
            generator, solver = self._build(self.num_outputs), self.world.build_network(self.num_outputs)
            generator.load_state_dict(frozen["generator"])
            solver.load_state_dict(frozen["solver"])
            self._freeze(generator, solver)
            self.allowed = frozen["allowed"].to(self.world.device)
            self._remember(frozen["pairs"].tolist())

    def _freeze(self, generator: VAE, solver: nn.Module) -> None:
        self.scholar = (
            generator.requires_grad_(requires_grad=False).eval(),
            solver.requires_grad_(requires_grad=False).eval(),
        )

    def _remember(self, pairs: list[tuple[int, int]]) -> None:
        self.pairs = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)
        self._pairs_there = self.pairs.to(self.world.device)
