"""THE update: how a batch changes the model. Begins, refines and ends tasks; owns parameters, optimizer and reservoir."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from streamlearn.augment import RandomAffine
from streamlearn.config import TextInputConfig
from streamlearn.data import Batch, Delivery, StreamlearnError
from streamlearn.memory import ALL, Immutable, Reservoir, rank_in_class
from streamlearn.models import registry
from streamlearn.models.encoder import Encoder
from streamlearn.models.model_check import ModelCheck
from streamlearn.models.modes import (
    LayerRng,
    differentiable_eval_mode,
    eval_mode,
    flatten_recurrent,
    samples_are_independent,
)
from streamlearn.models.module_state import RunningStatistics, load_module_state, module_state
from streamlearn.optimizers import Optimizer
from streamlearn.state import equal, join_tensors, round_trip, split_tensors
from streamlearn.strategies.recipes import build_strategy
from streamlearn.strategies.slots import BuildContext, EndedTask
from streamlearn.tensors import (
    averaging_rate,
    choose_device,
    clones,
    copy_into,
    dense,
    finite_norm,
    finite_rows,
    make_preprocess,
    padded,
    seeded_generator,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from streamlearn.config import Config, LearnerConfig
    from streamlearn.data import Label, Task
    from streamlearn.scenario import Scenario
    from streamlearn.strategies.slots import Network, Slot, State, Strategy

EVALUATION_CHUNK = 512
IGNORED = -100  # stands for a label that has no loss


@dataclass(frozen=True)
class LearnStats:
    """What a batch did, on the host: the only values that the loop waits for, once a batch."""

    task: int
    samples: int
    steps: int  # optimizer steps asked for
    applied: int  # of them, those whose gradient was finite
    clipped: int
    loss: float | None  # mean over the applied updates
    accuracy: float  # of the model that probes see, before the first update: test, then train
    gradient_norm: float  # of the last update
    unusable: int = 0  # samples that were left out: the encoder's features of them are not finite
    generator_dropped: int = 0  # updates of a generator whose gradient was not finite, where the solver's was

    @property
    def outcome(self) -> str:
        """How the batch's samples ended: `trained`, or `skipped` where no update was applied."""
        return "trained" if self.applied else "skipped"


class Learner:
    """A model that learns batch after batch, task after task."""

    def __init__(
        self,
        strategy: Strategy,
        spec: LearnerConfig,
        context: BuildContext,
        scenario: Scenario,
        *,
        batch_size: int,
        encoder: Encoder | None = None,
        own: bool = False,
        trains_single_samples: bool = True,
    ) -> None:
        self.strategy = strategy
        self.encoder = encoder  # inside `context.preprocess`, and never trained
        self.trains_single_samples = (
            trains_single_samples  # whether the model can learn a single sample in training mode
        )
        self.spec = spec
        self.context = context
        self.scenario = scenario
        self.batch_size = batch_size
        self.step = 0  # optimizer steps
        self.task_steps = 0  # of them, in the current task
        self.batches = 0
        self.task = -1  # index of the current task
        self.refinement_done: int | None = None  # refinement batches done, while refining
        self.lr_factor = 1.0  # what the learning rate was multiplied by, after training had diverged
        needed = [slot.samples_needed for slot in strategy.slots.values()]
        self.reservoir = Reservoir(
            ALL if ALL in needed else max(needed),
            context.max_bytes,
            context.seed,
            balanced=any(slot.needs_balanced_samples for slot in strategy.slots.values()),
        )
        self.names, self.params = self._trained()
        self.optimizer = self._make_optimizer()
        self.averaged_network: Network = strategy.network  # where there is an average, a copy that holds it
        self._average: list[Tensor] = self.params  # the parameters that probes see, aligned with `params`
        self._make_average(self.params)
        self.initial_params = clones(self.params)  # for forward transfer
        self.task_start_params = clones(self.params)  # the same
        self._masks = self.active_outputs = self.inactive_outputs = torch.zeros(
            0, context.num_outputs, dtype=torch.bool
        )
        self._forget_masks()
        self.distort = RandomAffine(spec.augment, context.seed, context.device) if spec.augment is not None else None
        self._draws = seeded_generator(context.seed, "learner")
        self.layer_rng = LayerRng(context.seed, context.device, own=own)
        self._noted: list[tuple[Tensor, Tensor, Tensor]] = []  # loss, gradient norm and finiteness of each update
        self._clipped: list[Tensor] = []  # whether each was clipped

    # -- learning

    def learn(self, given: Batch) -> LearnStats:
        """Learn a batch once: `updates_per_batch` optimizer steps, each with its own replay.

        A short batch has as many steps for each of its samples as a full one: fewer steps, and what is left of a whole
        step is the weight of its loss. With all the steps and the whole weight, one odd record could undo a task.
        """
        self._noted, self._clipped = [], []
        with self.layer_rng.in_use():
            batch, there = self._usable(given)
        unusable = len(given) - len(batch)
        if not len(batch):
            return LearnStats(self.task, 0, 0, 0, 0, None, 0.0, 0.0, unusable)
        hits = self._count_hits(there)
        with self.layer_rng.in_use():
            steps, weight = self._amount(len(batch))
            for _ in range(steps):
                self.update(there, weight)
        stats = self._read_stats(batch, hits, unusable)
        if self.refinement_done is not None:
            self.refinement_done += 1
        elif stats.outcome == "trained":
            self.reservoir.add(batch.x, batch.y)  # after the updates: a batch never replays itself
        self.batches += 1
        return stats

    def update(self, batch: Batch, weight: float = 1.0) -> None:
        """Take one optimizer step; `batch` is scaled and on the device. Nothing here waits for the device."""
        s = self.strategy
        mixed = batch.with_replay(s.replay.sample(batch), s.replay.share).scale_weights(weight)
        logits, features = self.forward(mixed)
        loss = self.loss(logits, mixed)
        if features is not None:
            loss = loss + s.replay.feature_loss(mixed, features)  # replay through feedback
        loss.backward()
        grads = [dense(param.grad, param) for param in self.params]
        still = self._still(mixed, grads)
        s.penalty.add_gradient(self.params, grads)  # toward what past tasks need, in closed form
        for place, entries in still.items():
            grads[place].masked_fill_(entries, 0.0)  # they are where past tasks left them: a pull is rounding alone
        s.constraint.project_gradient(self.params, grads, self.gradient_of)  # so that no past task is harmed
        norm, finite = finite_norm(grads)
        self._clip(grads, norm)
        self.optimizer.step(grads, finite, still)  # does nothing where the gradient is not finite
        s.penalty.proximal_step(self.params, self.optimizer.lr, finite)  # the implicit step, where chosen
        s.constraint.restore_frozen(self.params)  # what must not move has not moved
        s.penalty.after_step(self.params, finite)  # path integrals
        s.replay.after_step(mixed, finite)  # a generator learns too
        self._statistics.after_step(finite)
        self._update_average(finite)
        self._noted.append((loss.detach() / weight, norm, finite))  # on the device, until the batch is learned
        for param in self.params:
            param.grad = None
        self.step += 1
        self.task_steps += 1

    def forward(self, mixed: Batch) -> tuple[Tensor, Tensor | None]:
        """Return logits `[B, C]`, of distorted images where chosen, and the input of the head where replay needs it."""
        network = self.strategy.network
        x = mixed.x if self.distort is None else self.distort(mixed.x)
        if not self.strategy.replay.needs_features:
            return self._logits(x, mixed.task), None
        head, seen = registry.head_of(network.module), []
        assert head is not None  # or the replay had refused the model
        handle = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            logits = self._logits(x, mixed.task)
        finally:
            handle.remove()
        return logits, seen[0]

    def loss(self, logits: Tensor, mixed: Batch) -> Tensor:
        """Return the weighted cross-entropy over the outputs that compete; soft targets count T^2 (Hinton et al. 2015).

        Stored logits are matched by their mean squared distance (Buzzega et al. 2020).
        """
        inactive = self._inactive_of(mixed.task)
        hard = len(mixed) - (0 if mixed.soft_targets is None else len(mixed.soft_targets))
        masked = logits.masked_fill(inactive, -torch.inf)
        losses = functional.cross_entropy(masked[:hard], mixed.y[:hard], reduction="none")
        if mixed.soft_targets is not None and mixed.targets_are_logits:
            losses = torch.cat([losses, squared_distance(logits[hard:], mixed.soft_targets)])
        elif mixed.soft_targets is not None:
            log_probabilities = functional.log_softmax(masked[hard:] / mixed.temperature, 1)
            # before the product: 0 * -inf is NaN
            terms = mixed.soft_targets * log_probabilities.masked_fill(inactive[-len(mixed.soft_targets) :], 0.0)
            losses = torch.cat([losses, -(mixed.temperature**2) * terms.sum(1)])
        assert mixed.weight is not None
        return torch.dot(losses, mixed.weight)

    def reduce_lr(self, factor: float) -> None:
        """Multiply the learning rate, from now on and in every checkpoint to come."""
        self.lr_factor *= factor
        self.optimizer.lr *= factor

    def gradient_of(self, batch: Batch) -> list[Tensor]:
        """Return the gradient of a batch's mean loss at the current parameters; leaves `.grad` alone."""
        joined = batch.with_replay(None, 0.0)
        loss = self.loss(self._logits(joined.x, joined.task), joined)
        found = torch.autograd.grad(loss, self.params, allow_unused=True)
        return [dense(grad, param) for grad, param in zip(found, self.params, strict=True)]

    # -- tasks

    def begin_task(self, task: Task) -> None:
        """Prepare for a task: its samples so far are none. Raises `StreamlearnError`, naming it, where it has no room."""
        start = clones(self._average)
        try:
            # the network comes first: it alone may refuse, and nothing has changed then
            for slot in self.strategy.slots.values():
                slot.begin_task(task.index, self.params)
        except StreamlearnError as error:
            raise StreamlearnError(f"task {task.name}: {error}", code=error.code) from error
        self.task = task.index
        self.task_steps = 0
        self.refinement_done = None
        self.reservoir.clear()
        self.task_start_params = start
        self._renew()

    def set_active_outputs(self, tasks: Sequence[Task], labels: Sequence[Label]) -> None:
        """Take over which outputs compete in each task; the head grows where labels need it.

        Tasks and labels are append-only, so this costs what is new since the last call, and not tasks times labels.
        """
        size = self.scenario.num_outputs(labels)
        if size > self.active_outputs.shape[1]:
            self._grow(size)
        self._add_rows(len(tasks))
        for row, task in enumerate(tasks[: len(self._counted)]):
            outputs = self.scenario.active_outputs(task, labels, self._counted[row])
            if not self._counted[row]:
                self._masks[row] = False
            if outputs:
                self._masks[row, [output for output in outputs if output is not None]] = True
            self._counted[row] += len(outputs) if self.scenario.outputs_are_final(task, labels) else 0
        self.active_outputs = self._masks.expand(len(tasks), size)
        self.inactive_outputs = ~self._masks
        for row, task in enumerate(tasks):
            for label in task.labels[self._met[row] :]:
                self._met[row] += 1
                if (output := self.scenario.output(label, task.name, labels)) is not None:
                    self.output_labels[row][output] = label

    def active_outputs_of(self, task: int) -> list[int]:
        """Return the outputs that compete in a task."""
        found: list[int] = self.active_outputs[task].nonzero().flatten().tolist()
        return found

    def refine(self) -> Iterator[Delivery]:
        """Yield the rest of a task after its last record: `refine_epochs` passes over the reservoir, then its end.

        The order of each pass is a function of seed, task and epoch, so that a restart goes on at the cursor.
        """
        if self.refinement_done is None:
            self.refinement_done = 0
            self.reservoir.sealed = True
            if self.strategy.refine_epochs:
                self._take_average()
                with self.layer_rng.in_use():
                    for slot in self.strategy.slots.values():
                        slot.begin_refinement(self._ended_task(slot))
                self._renew()
                self._make_average(self.params)  # anew: what was pruned has no past
                self.task_steps = 0
        size = len(self.reservoir)
        batches = -(-size // self.batch_size)
        for number in range(self.refinement_done, self.strategy.refine_epochs * batches):
            epoch, place = divmod(number, batches)
            order = torch.randperm(size, generator=seeded_generator(self.context.seed, f"refine-{self.task}-{epoch}"))
            chosen = order[place * self.batch_size : (place + 1) * self.batch_size]
            y = self.reservoir.y[chosen]
            yield Delivery(batch=Batch(self.reservoir.x[chosen], y, torch.full_like(y, self.task)), is_refinement=True)
        yield Delivery(ends_refinement=True)

    def end_task(self) -> None:
        """Make what was learned last: the live weights take the average, so that teacher, anchor and probe agree."""
        self._take_average()
        with self.layer_rng.in_use():
            for slot in self.strategy.slots.values():
                slot.end_task(self._ended_task(slot))
        with self.layer_rng.in_use(keep=False):
            self.strategy.replay.measure_agreement(self.task)
        self.refinement_done = None
        self.reservoir.clear()
        self._renew()

    # -- evaluation

    def evaluate(self, x: Tensor, y: Tensor, task: int, params: Sequence[Tensor] | None = None) -> tuple[float, float]:
        """Return accuracy and mean loss on samples of a task, with the averaged weights or the given parameters.

        A sample whose label does not compete in the task, or has no output (`y` is negative), is a wrong answer. It has no
        loss: the mean is of the others, and infinite where there are none.
        """
        return self.evaluate_all([(x, y, task)], params)[0]

    @torch.no_grad()
    def evaluate_all(
        self, probes: Sequence[tuple[Tensor, Tensor, int]], params: Sequence[Tensor] | None = None
    ) -> list[tuple[float, float]]:
        """Return accuracy and mean loss on each probe, `x [n, ...]`, `y [n]` and its task, as `evaluate` does.

        Small probes go through the network together: so a thousand of them cost little more than their samples.
        """
        network = self.averaged_network
        if params is not None:
            network = self._copy_network()
            copy_into(self._of(network), params)
        hits, total, counted = torch.zeros(3, len(probes), device=self.context.device)
        room = EVALUATION_CHUNK if samples_are_independent(network.module) else 0
        with eval_mode(network.module), self.layer_rng.in_use(keep=False):
            for places, x, y, task in _together(probes, room):
                tasks, seen = task, self.context.preprocess(x)
                place, target = places.to(self.context.device), y.to(self.context.device)
                if self.encoder is not None and not bool((usable := finite_rows(seen)).all()):
                    # a sample without finite features counts as answered wrongly, and has no loss
                    seen, target, tasks, place = seen[usable], target[usable], tasks[usable.cpu()], place[usable]
                    if not len(target):
                        continue
                logits = network.forward(seen, tasks)
                inactive = self._inactive_of(tasks).expand_as(logits)
                masked = logits.masked_fill(inactive, -torch.inf)
                competes = (target >= 0) & ~inactive.gather(1, target.clamp(min=0)[:, None])[:, 0]
                kept = torch.where(competes, target, IGNORED)
                hits.index_add_(0, place, ((masked.argmax(1) == target) & competes).float())
                counted.index_add_(0, place, competes.float())
                if bool((places == places[0]).all()):
                    total[places[0]] += functional.cross_entropy(masked, kept, ignore_index=IGNORED, reduction="sum")
                else:
                    losses = functional.cross_entropy(masked, kept, ignore_index=IGNORED, reduction="none")
                    total.index_add_(0, place, losses)
        return [
            (right / len(y), loss / number if number else math.inf)
            for (_, y, _), right, loss, number in zip(
                probes, hits.tolist(), total.tolist(), counted.tolist(), strict=True
            )
        ]

    @property
    def measures_transfer(self) -> bool:
        """Whether forward transfer is defined: classes that were never seen cannot be predicted."""
        return self.scenario.kind != "class" and self.strategy.network.supports_forward_transfer

    @property
    def model(self) -> nn.Module:
        """The module that probes see: the averaged weights, where there is an average."""
        return self.averaged_network.module

    # -- state

    def state_dict(self) -> dict[str, State]:
        """Return everything needed to go on bit-equal, in named groups of tensors and values."""
        transfer = self.measures_transfer
        return {
            "encoder": {} if self.encoder is None else encoder_state(self.encoder),
            "model": module_state(self.model),
            "live": module_state(self.strategy.network.module) if self.spec.average is not None else {},
            "optimizer": self.optimizer.state_dict(),
            "reservoir": self.reservoir.state_dict(),
            "transfer": {
                "initial": {str(n): value for n, value in enumerate(self.initial_params)} if transfer else {},
                "task_start": {str(n): value for n, value in enumerate(self.task_start_params)} if transfer else {},
            },
            "learner": {
                "step": self.step,
                "task_steps": self.task_steps,
                "batches": self.batches,
                "task": self.task,
                "cursor": self.refinement_done,
                "num_outputs": self.active_outputs.shape[1],
                "slowed": self.lr_factor,
                "draws": self._draws.get_state(),
                "distort": {} if self.distort is None else {"generator": self.distort.generator.get_state()},
                "layer_draws": self.layer_rng.state_dict(),
            },
            **{name: slot.state_dict() for name, slot in self.strategy.slots.items()},
        }

    def load_state_dict(self, state: dict[str, State], tasks: Sequence[Task], labels: Sequence[Label]) -> None:
        """Take over what `state_dict` returned; `tasks` and `labels` are those met so far."""
        own = state["learner"]
        self._forget_masks()
        if self.encoder is not None:  # as it was: what was learned, was learned of these features
            self.encoder.load(join_tensors(state["encoder"]["frozen"], state["encoder"].get("rest", {})))
        if own["num_outputs"] > self.active_outputs.shape[1]:
            self._grow(own["num_outputs"])
        for name, slot in self.strategy.slots.items():
            slot.load_state_dict(state[name])
        load_module_state(self.strategy.network.module, state["live"] or state["model"])
        self.names, self.params = self._trained()
        self.lr_factor = own.get("slowed", 1.0)  # older checkpoints have none, and no draws of layers
        self.optimizer = self._make_optimizer()
        self.optimizer.load_state_dict(state["optimizer"])
        self._make_average(self.params)
        if self.spec.average is not None:
            load_module_state(self.averaged_network.module, state["model"])
        self.reservoir.load_state_dict(state["reservoir"])
        for name in ("initial", "task_start"):
            # empty where forward transfer is undefined: then any values of the right shapes will do
            values = state["transfer"][name]
            kept = [values[str(n)].to(self.context.device, copy=True) for n in range(len(values))]
            setattr(self, f"{name}_params", kept or clones(self.params))
        self.step, self.task_steps, self.batches = own["step"], own["task_steps"], own["batches"]
        self.task, self.refinement_done = own["task"], own["cursor"]
        self._draws.set_state(own["draws"])
        self.layer_rng.load_state_dict(own.get("layer_draws", {}))
        if self.distort is not None and own["distort"]:  # augmentation may be switched on and off between starts
            self.distort.generator.set_state(own["distort"]["generator"])
        self.set_active_outputs(tasks, labels)

    # -- inside

    def _forget_masks(self) -> None:
        """Have no task and no label yet; `set_active_outputs` adds them."""
        # a row for each task, or one for all: which outputs compete
        self._masks = torch.zeros(0, self.context.num_outputs, dtype=torch.bool, device=self.context.device)
        self._counted: list[int] = []  # outputs that each row was given, in order
        self.active_outputs = self._masks  # [T, C], of it
        self.inactive_outputs = ~self._masks
        self.output_labels: list[dict[int, Label]] = []  # the outputs met in each task, with their labels
        self._met: list[int] = []  # labels of each task that `classes` covers

    def _add_rows(self, tasks: int) -> None:
        """Make room for the masks of so many tasks."""
        rows = min(tasks, 1) if self.scenario.shares_mask else tasks
        more = self._masks.new_zeros(rows - len(self._masks), self._masks.shape[1])
        self._masks = torch.cat([self._masks, more])
        self._counted += [0] * len(more)
        self.output_labels += [{} for _ in range(tasks - len(self.output_labels))]
        self._met += [0] * (tasks - len(self._met))

    def _usable(self, batch: Batch) -> tuple[Batch, Batch]:
        """Return a batch's samples that can be learned, as they arrived, and as the network sees them on the device.

        What an encoder makes of a sample may be beyond float32: such a sample is left out.
        """
        x, y = self.context.preprocess(batch.x), batch.y.to(self.context.device)
        if self.encoder is not None and not bool((usable := finite_rows(x)).all()):
            rows = usable.to(batch.x.device)
            batch = Batch(batch.x[rows], batch.y[rows], batch.task[rows])
            x, y = x[usable], y[usable]
        return batch, Batch(x, y, batch.task)

    def _logits(self, x: Tensor, task: Tensor) -> Tensor:
        """Return the logits of samples that are learned. A single sample has no batch statistics: see `ModelCheck.run`."""
        network = self.strategy.network
        if len(x) > 1 or self.trains_single_samples:
            return network.forward(x, task)
        with differentiable_eval_mode(network.module):
            return network.forward(x, task)

    def _inactive_of(self, task: Tensor) -> Tensor:
        """Return the outputs that do not compete, `[B, C]` or, where one row serves all, `[1, C]`."""
        if len(self.inactive_outputs) == 1:
            return self.inactive_outputs
        return self.inactive_outputs[task.to(self.context.device, non_blocking=True)]

    def _still(self, mixed: Batch, grads: Sequence[Tensor]) -> dict[int, Tensor]:
        """Return the entries of the head whose output competes for no sample of a batch, by the place of the parameter.

        Momentum from before and weight decay must not move them. In scenario class an output that does not compete has
        never been learned, so that decay alone would move it.
        """
        head = self.strategy.network.head
        if head is None or (self.scenario.kind == "class" and not self.optimizer.weight_decay):
            return {}
        idle = self._inactive_of(mixed.task).all(0)
        return {
            # a weight that other layers share may have a gradient all the same
            place: idle.view(-1, *[1] * (param.dim() - 1)) & (grads[place] == 0)
            for place, param in enumerate(self.params)
            if param is head.weight or param is head.bias
        }

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
        for mean, param in zip(self._average, self.params, strict=True):
            mean.lerp_(param, rate)

    @torch.no_grad()
    def _count_hits(self, batch: Batch) -> Tensor:
        """Return how many samples of a scaled batch are answered rightly by the model that probes see; waits for nothing."""
        network = self.averaged_network
        with eval_mode(network.module), self.layer_rng.in_use(keep=False):
            logits = network.forward(batch.x, batch.task)
        masked = logits.masked_fill(self._inactive_of(batch.task), -torch.inf)
        return (masked.argmax(1) == batch.y).sum()

    def _amount(self, samples: int) -> tuple[int, float]:
        """Return how many steps a batch of so many samples has, and the weight of its loss in each."""
        due = self.spec.updates_per_batch * min(samples, self.batch_size)  # steps times full batches
        steps = -(-due // self.batch_size)
        return steps, due / (steps * self.batch_size)

    def _read_stats(self, batch: Batch, hits: Tensor, unusable: int) -> LearnStats:
        """Wait for the device, once a batch."""
        losses, norms, finite = (torch.stack(noted) for noted in zip(*self._noted, strict=True))
        applied = int(finite.sum())
        loss = float(losses[finite].mean()) if applied else None
        clipped = int((finite & torch.stack(self._clipped)).sum()) if self._clipped else 0
        accuracy, norm = int(hits) / len(batch), float(norms[-1])
        dropped = self.strategy.replay.pop_dropped_updates()
        return LearnStats(self.task, len(batch), len(losses), applied, clipped, loss, accuracy, norm, unusable, dropped)

    def _ended_task(self, slot: Slot) -> EndedTask:
        x, y = self.reservoir.x, self.reservoir.y
        if slot.samples_needed != ALL and slot.samples_needed < len(y):  # another slot asked for more
            order = torch.randperm(len(y), generator=seeded_generator(self.context.seed, f"closing-{self.task}"))
            if slot.needs_balanced_samples:
                order = order[rank_in_class(y[order]).argsort(stable=True)]
            x, y = x[order[: slot.samples_needed]], y[order[: slot.samples_needed]]
        return EndedTask(
            self.task, x, y, self.params, self.strategy.network.module, self.active_outputs,
            [list(row) for row in self.output_labels], self._draws, self.output_labels,
        )  # fmt: skip

    def _trained(self) -> tuple[list[str], list[Tensor]]:
        trained = self.strategy.network.trainable_parameters()
        return list(trained), list(trained.values())

    def _make_optimizer(self) -> Optimizer:
        o = self.spec.optimizer
        return Optimizer(self.params, o.name, o.lr * self.lr_factor, momentum=o.momentum, weight_decay=o.weight_decay)

    def _of(self, network: Network) -> list[Tensor]:
        """Return a copy's parameters, aligned with `params`."""
        named = dict(network.module.named_parameters())
        return [named[name] for name in self.names]

    def _make_average(self, values: Sequence[Tensor]) -> None:
        """Begin an average at these values; without one, probes see the live network."""
        if self.spec.average is None:
            self._average = self.params
            self._statistics = RunningStatistics(self.strategy.network.module, self.strategy.network.module)
            return
        self.averaged_network = self._copy_network()
        self._average = self._of(self.averaged_network)
        copy_into(self._average, values)
        self._statistics = RunningStatistics(self.strategy.network.module, self.averaged_network.module)

    def _take_average(self) -> None:
        if self.spec.average is not None:
            copy_into(self.params, self._average)

    def _copy_network(self) -> Network:
        network = copy.deepcopy(self.strategy.network)
        network.module.requires_grad_(requires_grad=False).eval()
        flatten_recurrent(network.module)
        return network

    def _renew(self) -> None:
        """Follow a network whose parameters were added, frozen or replaced, or whose buffers have changed.

        Parameters are matched by name: optimizer state, average and remembered values are carried over.
        """
        old = {name: place for place, name in enumerate(self.names)}
        self.names, self.params = self._trained()
        places = [old.get(name) for name in self.names]
        self.optimizer.set_parameters(self.params, places)
        carried = [
            [param.detach().clone() if place is None else padded(values[place], param, copy_rest=True)
             for place, param in zip(places, self.params, strict=True)]
            for values in (self._average, self.initial_params, self.task_start_params)
        ]  # fmt: skip
        self._make_average(carried[0])
        self.initial_params, self.task_start_params = carried[1:]

    def _grow(self, size: int) -> None:
        registry.grow_head(self.strategy.network.module, size, self.context.seed)
        self._renew()
        for slot in self.strategy.slots.values():
            slot.grow(self.params, size)
        self._masks = padded(self._masks, self._masks.new_zeros(len(self._masks), size))
        self.active_outputs = self._masks.expand(len(self.active_outputs), size)


def _together(
    probes: Sequence[tuple[Tensor, Tensor, int]], room: int
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Give the samples of probes in batches: the probe of each sample by its number, `x`, `y` and its task.

    Probes that fit into `room` samples share a batch, whole; a larger one is cut, and has its batches for itself.
    """
    waiting: list[tuple[int, Tensor, Tensor, int]] = []
    count = 0  # of their samples

    def joined() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        sizes = torch.tensor([y.shape[0] for _, _, y, _ in waiting])
        numbers, tasks = torch.tensor([(number, task) for number, _, _, task in waiting]).T
        x, y = (torch.cat([probe[place] for probe in waiting]) for place in (1, 2))  # type: ignore[misc]
        return numbers.repeat_interleave(sizes), x, y, tasks.repeat_interleave(sizes)

    for number, (x, y, task) in enumerate(probes):
        size = y.shape[0]
        if waiting and count + size > room:
            yield joined()
            waiting, count = [], 0
        if size > room:
            for some_x, some_y in zip(x.split(EVALUATION_CHUNK), y.split(EVALUATION_CHUNK), strict=True):
                waiting = [(number, some_x, some_y, task)]
                yield joined()
            waiting = []
        else:
            waiting.append((number, x, y, task))
            count += size
    if waiting:
        yield joined()


def squared_distance(logits: Tensor, stored: Tensor) -> Tensor:
    """Return each sample's mean squared distance `[R]` from stored logits `[R, C]`, over those that are not -inf."""
    known = stored.isfinite()
    apart = torch.where(known, logits - stored, 0.0).square()
    return apart.sum(1) / known.sum(1).clamp(min=1)


def make_learner(config: Config, scenario: Scenario) -> Learner:
    """Return the learner that a configuration describes, untrained.

    Raises `StreamlearnError` (78) when model or strategy cannot be built, `ValueError` when the device is not there.
    """
    device = choose_device(config.device)
    spec = config.model.model_dump()
    vocabulary = config.input.vocabulary if isinstance(config.input, TextInputConfig) else None

    encoder, shape = None, tuple(config.input.shape)
    if config.input.encoder is not None:
        encoder = Encoder.build(config.input.encoder.model_dump(), shape, config.seed, device)
        encoder.check_state(round_trip, equal)
        shape = encoder.shape

    def build_network(num_outputs: int, offset: int = 0) -> nn.Module:
        return registry.build(spec, shape, num_outputs, config.seed + offset, vocabulary).to(device)

    context = BuildContext(
        config.seed, device, shape, scenario.num_outputs([]), config.memory.max_bytes,
        make_preprocess(config.input.scale, device, token_ids=vocabulary is not None, encoder=encoder), build_network,
        config.stream.batch_size, tuple(config.stream.topics or ()), token_ids=vocabulary is not None,
        max_norm=config.learner.max_norm,
    )  # fmt: skip
    strategy = build_strategy(config.strategy, context)
    if config.grow_head and registry.head_of(strategy.network.module) is None:
        raise StreamlearnError("grow_head: the model needs a linear layer named head", code=78)
    own, alone = ":" in spec["name"], True
    if own:

        def sample(count: int) -> Tensor:
            # from 0 to 1: a model may take a number for a name, of which it knows few and none below 0
            some = torch.randint(2, (count, *shape)) if context.token_ids else torch.rand(count, *shape)
            return some.to(device, context.zero_inputs(0).dtype)

        copies = config.learner.average is not None or (
            scenario.kind != "class" and strategy.network.supports_forward_transfer
        )
        build = partial(build_network, context.num_outputs)
        alone = ModelCheck(spec["name"], build, sample, config.seed, round_trip, equal).run(copies=copies)
    return Learner(
        strategy, config.learner, context, scenario,
        batch_size=config.stream.batch_size, encoder=encoder, own=own or encoder is not None, trains_single_samples=alone,
    )  # fmt: skip


def encoder_state(encoder: Encoder) -> State:
    """Return an encoder's state: tensors that never change, in a file of their own, and the rest."""
    tensors, rest = split_tensors(encoder.state_dict())
    return {"frozen": Immutable(tensors), "rest": rest}
