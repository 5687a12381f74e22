"""THE update: how a batch changes the model. Begins, refines and ends tasks; owns parameters, optimizer and reservoir."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from streamlearn.config import TextInput
from streamlearn.data import Batch, Delivery
from streamlearn.memory import ALL, Reservoir
from streamlearn.models import registry
from streamlearn.optimizers import Optimizer
from streamlearn.strategies.parts import Closing, World
from streamlearn.strategies.recipes import compose
from streamlearn.tensors import averaging_rate, choose_device, clones, copy_into, finite_norm, padded_all, seeded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from streamlearn.config import Config, LearnerSpec
    from streamlearn.data import Label, Task
    from streamlearn.scenario import Scenario
    from streamlearn.strategies.parts import Network, State, Strategy

EVALUATION_CHUNK = 512


@dataclass(frozen=True)
class LearnStats:
    """What a batch did, on the host: the only values that the loop waits for, once a batch."""

    task: int
    samples: int
    steps: int  # optimizer steps asked for
    applied: int  # of them, those whose gradient was finite
    clipped: int
    loss: float | None  # mean over the applied updates
    accuracy: float  # before the first update: test, then train
    gradient_norm: float  # of the last update

    @property
    def outcome(self) -> str:
        """How the batch's samples ended: `trained`, or `skipped` where no update was applied."""
        return "trained" if self.applied else "skipped"


class Learner:
    """A model that learns batch after batch, task after task."""

    def __init__(
        self,
        strategy: Strategy,
        spec: LearnerSpec,
        world: World,
        scenario: Scenario,
        *,
        batch_size: int,
    ) -> None:
        self.strategy = strategy
        self.spec = spec
        self.world = world
        self.scenario = scenario
        self.batch_size = batch_size
        self.step = 0  # optimizer steps
        self.task_steps = 0  # of them, in the current task
        self.batches = 0
        self.task = -1  # index of the current task
        self.cursor: int | None = None  # refinement batches done, while refining
        needed = [part.samples_needed for part in strategy.parts.values()]
        if strategy.refine_epochs:
            needed.append(ALL)
        self.reservoir = Reservoir(ALL if ALL in needed else max(needed), world.max_bytes, world.seed)
        self.params: list[Tensor] = list(strategy.network.module.parameters())
        o = spec.optimizer
        self.optimizer = Optimizer(self.params, o.name, o.lr, momentum=o.momentum, weight_decay=o.weight_decay)
        self.averaged: Network = self._averaged_network()
        self.initial = clones(self.params)  # for forward transfer
        self.task_start = clones(self.params)  # the same
        self.allowed = torch.zeros(0, world.num_outputs, dtype=torch.bool, device=world.device)  # [T, C]
        self.forbidden = ~self.allowed
        self.outputs: list[list[int]] = []  # met in each task
        self._draws = seeded(world.seed, "learner")
        self._noted: list[tuple[Tensor, Tensor, Tensor]] = []  # loss, gradient norm and finiteness of each update
        self._clipped: list[Tensor] = []  # whether each was clipped
        self._hits = torch.zeros((), device=world.device)  # right answers before the first update

    # -- learning

    def learn(self, batch: Batch) -> LearnStats:
        """Learn a batch once: `updates_per_batch` optimizer steps, each with its own replay."""
        there = Batch(self.world.scale(batch.x), batch.y.to(self.world.device), batch.task)
        self._noted, self._clipped = [], []
        for number in range(self.spec.updates_per_batch):
            self.update(there, first=number == 0)
        stats = self._read_stats(batch)
        if self.cursor is not None:
            self.cursor += 1
        elif stats.outcome == "trained":
            self.reservoir.add(batch.x, batch.y)  # after the updates: a batch never replays itself
        self.batches += 1
        return stats

    def update(self, batch: Batch, *, first: bool = True) -> None:
        """Take one optimizer step; `batch` is scaled and on the device. Nothing here waits for the device."""
        s = self.strategy
        mixed = batch.join(s.replay.sample(batch), s.replay.share)
        logits = s.network.forward(mixed.x, mixed.task)
        loss = self.loss(logits, mixed)
        loss.backward()
        grads = [param.grad if param.grad is not None else torch.zeros_like(param) for param in self.params]
        s.penalty.pull(self.params, grads)  # toward what past tasks need, in closed form
        s.constraint.project(self.params, grads, self.gradient_of)
        norm, finite = finite_norm(grads)
        self._clip(grads, norm)
        self.optimizer.step(grads, finite)  # does nothing where the gradient is not finite
        s.penalty.settle(self.params, self.spec.optimizer.lr, finite)  # the implicit step, where chosen
        s.constraint.hold(self.params)  # what must not move has not moved
        s.penalty.accumulate(self.params, finite)  # path integrals
        s.replay.observe(mixed, finite)  # a generator learns too
        self._update_average(finite)
        self._noted.append((loss.detach(), norm, finite))  # on the device, until the batch is learned
        if first:
            self._hits = self._count_hits(logits, batch)
        for param in self.params:
            param.grad = None
        self.step += 1
        self.task_steps += 1

    def loss(self, logits: Tensor, mixed: Batch) -> Tensor:
        """Return the weighted cross-entropy over the outputs that compete; soft targets count T^2 (Hinton et al. 2015)."""
        forbidden = self._forbidden(mixed.task)
        hard = len(mixed) - (0 if mixed.soft is None else len(mixed.soft))
        masked = logits.masked_fill(forbidden, -torch.inf)
        losses = functional.cross_entropy(masked[:hard], mixed.y[:hard], reduction="none")
        if mixed.soft is not None:
            log_probabilities = functional.log_softmax(masked[hard:] / mixed.temperature, 1)
            # before the product: 0 * -inf is NaN
            terms = mixed.soft * log_probabilities.masked_fill(forbidden[hard:], 0.0)
            losses = torch.cat([losses, -(mixed.temperature**2) * terms.sum(1)])
        assert mixed.weight is not None
        return torch.dot(losses, mixed.weight)

    def gradient_of(self, batch: Batch) -> list[Tensor]:
        """Return the gradient of a batch's mean loss at the current parameters; leaves `.grad` alone."""
        joined = batch.join(None, 0.0)
        loss = self.loss(self.strategy.network.forward(joined.x, joined.task), joined)
        return list(torch.autograd.grad(loss, self.params, allow_unused=False))

    # -- tasks

    def begin_task(self, task: Task) -> None:
        """Prepare for a task: its samples so far are none."""
        self.task = task.index
        self.task_steps = 0
        self.cursor = None
        self.reservoir.clear()
        self.task_start = clones(self._evaluated())
        for part in self.strategy.parts.values():
            part.begin_task(task.index, self.params)
        self._renew()

    def activate(self, tasks: Sequence[Task], labels: Sequence[Label]) -> None:
        """Take over which outputs compete in each task; the head grows where labels need it."""
        size = self.scenario.num_outputs(labels)
        if size > self.allowed.shape[1]:
            self._grow(size)
        masks = [self.scenario.mask(task, labels) for task in tasks]
        self.allowed = torch.tensor(masks, dtype=torch.bool, device=self.world.device).reshape(len(tasks), size)
        self.forbidden = ~self.allowed
        found = [[self.scenario.output(label, task.name, labels) for label in task.labels] for task in tasks]
        self.outputs = [[output for output in row if output is not None] for row in found]

    def refine(self) -> Iterator[Delivery]:
        """Yield the rest of a task after its last record: `refine_epochs` passes over the reservoir, then its end.

        The order of each pass is a function of seed, task and epoch, so that a restart goes on at the cursor.
        """
        if self.cursor is None:
            self.cursor = 0
            self.reservoir.sealed = True
            if self.strategy.refine_epochs:
                for part in self.strategy.parts.values():
                    part.begin_refine(self.params)
        size = len(self.reservoir)
        batches = -(-size // self.batch_size)
        for number in range(self.cursor, self.strategy.refine_epochs * batches):
            epoch, place = divmod(number, batches)
            order = torch.randperm(size, generator=seeded(self.world.seed, f"refine-{self.task}-{epoch}"))
            chosen = order[place * self.batch_size : (place + 1) * self.batch_size]
            y = self.reservoir.y[chosen]
            yield Delivery(batch=Batch(self.reservoir.x[chosen], y, torch.full_like(y, self.task)), refines=True)
        yield Delivery(consolidates=True)

    def end_task(self) -> None:
        """Make what was learned last: the live weights take the average, so that teacher, anchor and probe agree."""
        if self.spec.average is not None:
            copy_into(self.params, list(self.averaged.module.parameters()))
        closing = Closing(
            self.task, self.reservoir.x, self.reservoir.y, self.params, self.strategy.network.module,
            self.allowed, self.outputs, self._draws,
        )  # fmt: skip
        for part in self.strategy.parts.values():
            part.end_task(closing)
        self.cursor = None
        self.reservoir.clear()
        self._renew()

    # -- evaluation

    @torch.no_grad()
    def evaluate(self, x: Tensor, y: Tensor, task: int, params: Sequence[Tensor] | None = None) -> tuple[float, float]:
        """Return accuracy and mean loss on samples of a task, with the averaged weights or the given parameters."""
        network = self.averaged
        if params is not None:
            network = self._copy_network()
            copy_into(list(network.module.parameters()), params)
        training = network.module.training
        network.module.eval()
        hits = torch.zeros((), device=self.world.device)
        total = torch.zeros((), device=self.world.device)
        for some_x, some_y in zip(x.split(EVALUATION_CHUNK), y.split(EVALUATION_CHUNK), strict=True):
            tasks = torch.full((len(some_y),), task)
            target = some_y.to(self.world.device)
            logits = network.forward(self.world.scale(some_x), tasks)
            masked = logits.masked_fill(self._forbidden(tasks), -torch.inf)
            hits += (masked.argmax(1) == target).sum()
            total += functional.cross_entropy(masked, target, reduction="sum")
        network.module.train(training)
        return float(hits) / len(y), float(total) / len(y)

    @property
    def model(self) -> nn.Module:
        """The module that probes see: the averaged weights, where there is an average."""
        return self.averaged.module

    # -- state

    def state_dict(self) -> dict[str, State]:
        """Return everything needed to go on bit-equal, in named groups of tensors and values."""
        transfer = self.scenario.kind != "class"
        return {
            "model": dict(self.model.state_dict()),
            "live": dict(self.strategy.network.module.state_dict()) if self.spec.average is not None else {},
            "optimizer": self.optimizer.state_dict(),
            "reservoir": self.reservoir.state_dict(),
            "transfer": {
                "initial": {str(n): value for n, value in enumerate(self.initial)} if transfer else {},
                "task_start": {str(n): value for n, value in enumerate(self.task_start)} if transfer else {},
            },
            "learner": {
                "step": self.step,
                "task_steps": self.task_steps,
                "batches": self.batches,
                "task": self.task,
                "cursor": self.cursor,
                "num_outputs": self.allowed.shape[1],
                "draws": self._draws.get_state(),
            },
            **{name: part.state_dict() for name, part in self.strategy.parts.items()},
        }

    def load_state_dict(self, state: dict[str, State], tasks: Sequence[Task], labels: Sequence[Label]) -> None:
        """Take over what `state_dict` returned; `tasks` and `labels` are those met so far."""
        own = state["learner"]
        if own["num_outputs"] > self.allowed.shape[1]:
            self._grow(own["num_outputs"])
        for name, part in self.strategy.parts.items():
            part.load_state_dict(state[name])
        self.strategy.network.module.load_state_dict(state["live"] or state["model"])
        self.params = list(self.strategy.network.module.parameters())
        self.optimizer.follow(self.params)
        self.optimizer.load_state_dict(state["optimizer"])
        self.averaged = self._averaged_network()
        if self.spec.average is not None:
            self.averaged.module.load_state_dict(state["model"])
        self.reservoir.load_state_dict(state["reservoir"])
        if state["transfer"]["initial"]:
            for name in ("initial", "task_start"):
                values = state["transfer"][name]
                setattr(self, name, [values[str(n)].to(self.world.device, copy=True) for n in range(len(values))])
        self.step, self.task_steps, self.batches = own["step"], own["task_steps"], own["batches"]
        self.task, self.cursor = own["task"], own["cursor"]
        self._draws.set_state(own["draws"])
        self.activate(tasks, labels)

    # -- inside

    def _forbidden(self, task: Tensor) -> Tensor:
        """Return the outputs that do not compete, `[B, C]` or, where one row serves all, `[1, C]`."""
        if len(self.allowed) == 1:
            return self.forbidden
        return self.forbidden[task.to(self.world.device, non_blocking=True)]

    def _clip(self, grads: Sequence[Tensor], norm: Tensor) -> None:
        if self.spec.max_norm is None:
            return
        scale = (self.spec.max_norm / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(list(grads), scale)
        self._clipped.append(norm > self.spec.max_norm)

    @torch.no_grad()
    def _update_average(self, finite: Tensor) -> None:
        if self.spec.average is None:
            return
        rate = averaging_rate(self.spec.average, self.task_steps) * finite
        for mean, param in zip(self.averaged.module.parameters(), self.params, strict=True):
            mean.lerp_(param, rate)

    @torch.no_grad()
    def _count_hits(self, logits: Tensor, batch: Batch) -> Tensor:
        masked = logits[: len(batch)].masked_fill(self._forbidden(batch.task), -torch.inf)
        return (masked.argmax(1) == batch.y).sum()

    def _read_stats(self, batch: Batch) -> LearnStats:
        """Wait for the device, once a batch."""
        losses, norms, finite = (torch.stack(noted) for noted in zip(*self._noted, strict=True))
        applied = int(finite.sum())
        loss = float(losses[finite].mean()) if applied else None
        clipped = int((finite & torch.stack(self._clipped)).sum()) if self._clipped else 0
        steps = self.spec.updates_per_batch
        hits = int(self._hits)
        return LearnStats(self.task, len(batch), steps, applied, clipped, loss, hits / len(batch), float(norms[-1]))

    def _evaluated(self) -> list[Tensor]:
        return list(self.averaged.module.parameters())

    def _averaged_network(self) -> Network:
        """Return a network for the average, or where there is none, the live one."""
        return self.strategy.network if self.spec.average is None else self._copy_network()

    def _copy_network(self) -> Network:
        network = copy.deepcopy(self.strategy.network)
        network.module.requires_grad_(requires_grad=False).eval()
        return network

    def _renew(self) -> None:
        """Follow parts that have replaced or added parameters."""
        params: list[Tensor] = list(self.strategy.network.module.parameters())
        if len(params) != len(self.params) or any(a is not b for a, b in zip(params, self.params, strict=True)):
            self._follow(params)

    def _grow(self, size: int) -> None:
        registry.grow_head(self.strategy.network.module, size, self.world.seed)
        self._follow(list(self.strategy.network.module.parameters()))
        for part in self.strategy.parts.values():
            part.grow(self.params, size)
        self.allowed = padded_all([self.allowed], [self.allowed.new_zeros(len(self.allowed), size)])[0]

    def _follow(self, params: list[Tensor]) -> None:
        """Carry optimizer state, average and remembered parameters over to parameters whose shapes have grown."""
        average = self._evaluated()
        self.params = params
        self.optimizer.follow(params)
        if self.spec.average is not None:
            self.averaged = self._copy_network()
            copy_into(self._evaluated(), padded_all(average, params, copy_rest=True))
        self.initial = padded_all(self.initial, params, copy_rest=True)
        self.task_start = padded_all(self.task_start, params, copy_rest=True)


def scaling(divisor: float, device: torch.device, *, names: bool = False) -> Callable[[Tensor], Tensor]:
    """Return the function from samples as they arrived to what the network sees: float32, on the device, divided.

    Where they are `names`, the token ids of a text, they stay integers.
    """

    def scale(x: Tensor) -> Tensor:
        if names:
            return x.to(device)
        there = x.to(device, torch.float32)
        return there if divisor == 1 else there / divisor

    return scale


def make_learner(config: Config, scenario: Scenario) -> Learner:
    """Return the learner that a configuration describes, untrained.

    Raises `StreamlearnError` (78) when model or strategy cannot be built, `ValueError` when the device is not there.
    """
    device = choose_device(config.device)
    spec = config.model.model_dump()
    vocabulary = config.input.vocabulary if isinstance(config.input, TextInput) else None

    def build_network(num_outputs: int) -> nn.Module:
        return registry.build(spec, config.input.shape, num_outputs, config.seed, vocabulary).to(device)

    world = World(
        config.seed, device, tuple(config.input.shape), scenario.num_outputs([]), config.memory.max_bytes,
        scaling(config.input.scale, device, names=vocabulary is not None), build_network,
    )  # fmt: skip
    return Learner(
        compose(config.strategy, world), config.learner, world, scenario, batch_size=config.stream.batch_size
    )
