"""The learner: trains the model on batches, and begins, refines and ends tasks. Has the only training step of the program."""

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
from streamlearn.core.config import TextInputConfig
from streamlearn.core.errors import ConfigurationError, StreamlearnError
from streamlearn.core.samples import Batch
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

    from streamlearn.core.labels import Label
    from streamlearn.core.tasks import Task
    from streamlearn.learning.config import LearnerConfig, LearningConfig
    from streamlearn.scenario import Scenario
    from streamlearn.strategies.slots import Network, Slot, State, Strategy

EVALUATION_CHUNK = 512  # samples of a forward pass in evaluation
IGNORED = -100  # target of a sample without a loss


@dataclass(frozen=True)
class LearnStats:
    """Statistics of one learned batch, on the host. To read them, the loop waits for the device once per batch."""

    task: int
    samples: int
    steps: int  # optimizer steps computed
    applied: int  # steps with a finite gradient; the others were dropped
    clipped: int  # applied steps whose gradient was clipped
    loss: float | None  # mean over the applied steps; None if all were dropped
    accuracy: float  # of the evaluated model on the batch, before training on it (test, then train)
    gradient_norm: float  # of the last step
    unusable: int = 0  # samples left out because the encoder's features are not finite
    generator_dropped: int = 0  # dropped steps of a generator, while the model's step was applied

    @property
    def outcome(self) -> str:
        """How the batch's samples are counted: as `trained`, or as `skipped` if all steps were dropped."""
        return "trained" if self.applied else "skipped"


class Learner:
    """Trains one model on a sequence of tasks, batch by batch.

    Owns the parameters, the optimizer, the averaged weights and the reservoir of the current task.
    """

    def __init__(
        self,
        strategy: Strategy,
        spec: LearnerConfig,
        context: BuildContext,
        scenario: Scenario,
        *,
        batch_size: int,
        encoder: Encoder | None = None,
        has_user_code: bool = False,
        trains_single_samples: bool = True,
    ) -> None:
        self.strategy = strategy
        self.encoder = encoder  # part of `context.preprocess`; never trained
        self.trains_single_samples = trains_single_samples  # or else in evaluation mode: see `ModelCheck`
        self.spec = spec
        self.context = context
        self.scenario = scenario
        self.batch_size = batch_size
        self.step = 0  # optimizer steps so far
        self.task_steps = 0  # optimizer steps in the current task
        self.batches = 0  # batches learned so far
        self.task = -1  # index of the current task
        self.refinement_done: int | None = None  # refinement batches done; None outside refinement
        self.lr_factor = 1.0  # factor on the learning rate; rollbacks after divergence reduce it
        needed = [slot.samples_needed for slot in strategy.slots.values()]
        self.reservoir = Reservoir(
            ALL if ALL in needed else max(needed),
            context.max_bytes,
            context.seed,
            balanced=any(slot.needs_balanced_samples for slot in strategy.slots.values()),
        )
        self.names, self.params = self._trainable_parameters()
        self.optimizer = self._make_optimizer()
        self.averaged_network: Network = strategy.network  # the evaluated network: a copy if there is a weight average
        self._average: list[Tensor] = self.params  # parameters of `averaged_network`, aligned with `params`
        self._start_average(self.params)
        self.initial_params = clones(self.params)  # of the untrained model, for forward transfer
        self.task_start_params = clones(self.params)  # at the start of the task, for forward transfer
        none = torch.zeros(0, context.num_outputs, dtype=torch.bool)
        self._masks = self.active_outputs = self.inactive_outputs = none
        self._reset_masks()
        self.distort = RandomAffine(spec.augment, context.seed, context.device) if spec.augment is not None else None
        self._generator = seeded_generator(context.seed, "learner")
        self.layer_rng = LayerRng(context.seed, context.device, has_user_code=has_user_code)
        # of each step of the current batch: (loss, gradient norm, whether it is finite), and whether it was clipped
        self._step_stats: list[tuple[Tensor, Tensor, Tensor]] = []
        self._clipped: list[Tensor] = []

    # -- learning

    def learn(self, batch: Batch) -> LearnStats:
        """Train on a batch: `updates_per_batch` optimizer steps, each with its own replayed samples.

        A batch with fewer than `batch_size` samples gets fewer steps and a smaller loss weight, in proportion to its size.
        With all steps and the full weight, a single unusual record could destroy what a task has learned.
        """
        self._step_stats, self._clipped = [], []
        with self.layer_rng.in_use():
            usable, on_device = self._usable(batch)
        unusable = len(batch) - len(usable)
        if not len(usable):
            return LearnStats(self.task, 0, 0, 0, 0, None, 0.0, 0.0, unusable)
        hits = self._count_hits(on_device)
        with self.layer_rng.in_use():
            steps, weight = self._steps_and_weight(len(usable))
            for _ in range(steps):
                self.update(on_device, weight)
        stats = self._read_stats(usable, hits, unusable)
        if self.refinement_done is not None:
            self.refinement_done += 1
        elif stats.outcome == "trained":
            self.reservoir.add(usable.x, usable.y)  # after the steps, so that a batch never replays itself
        self.batches += 1
        return stats

    def update(self, batch: Batch, weight: float = 1.0) -> None:
        """Take one optimizer step on a preprocessed batch on the device. Nothing here waits for the device."""
        s = self.strategy
        mixed = batch.with_replay(s.replay.sample(batch), s.replay.share).scale_weights(weight)
        logits, features = self.forward(mixed)
        loss = self.loss(logits, mixed)
        if features is not None:
            loss = loss + s.replay.feature_loss(mixed, features)  # replay through feedback
        loss.backward()
        grads = [dense(param.grad, param) for param in self.params]
        fixed = self._fixed_entries(mixed, grads)
        s.penalty.add_gradient(self.params, grads)  # of the penalty on changes of important parameters
        for index, entries in fixed.items():
            grads[index].masked_fill_(entries, 0.0)  # unchanged since past tasks: the penalty's gradient is rounding
        s.constraint.project_gradient(self.params, grads, self.gradient_of)  # so that the step does not harm past tasks
        norm, finite = finite_norm(grads)
        self._clip(grads, norm)
        self.optimizer.step(grads, finite, fixed)  # is dropped if the gradient is not finite
        s.penalty.proximal_step(self.params, self.optimizer.lr, finite)  # if the strategy uses the implicit step
        s.constraint.restore_frozen(self.params)  # undoes changes of frozen parameters
        s.penalty.after_step(self.params, finite)  # for path integrals of the gradient
        s.replay.after_step(mixed, finite)  # trains a generator
        self._statistics.after_step(finite)
        self._update_average(finite)
        self._step_stats.append((loss.detach() / weight, norm, finite))  # stay on the device until the end of the batch
        for param in self.params:
            param.grad = None
        self.step += 1
        self.task_steps += 1

    def forward(self, mixed: Batch) -> tuple[Tensor, Tensor | None]:
        """Return the logits `[B, C]` and, if replay needs it, the input of the head. Augments images if configured."""
        network = self.strategy.network
        x = mixed.x if self.distort is None else self.distort(mixed.x)
        if not self.strategy.replay.needs_features:
            return self._logits(x, mixed.task), None
        head, head_inputs = registry.head_of(network.module), []
        assert head is not None  # the replay has checked this when it was built
        handle = head.register_forward_pre_hook(lambda _, inputs: head_inputs.append(inputs[0]))
        try:
            logits = self._logits(x, mixed.task)
        finally:
            handle.remove()
        return logits, head_inputs[0]

    def loss(self, logits: Tensor, mixed: Batch) -> Tensor:
        """Return the weighted cross-entropy over the active outputs.

        Soft targets are weighted by T^2 (Hinton et al. 2015); for stored logits the loss is the mean squared distance
        (Buzzega et al. 2020).
        """
        inactive = self._inactive_of(mixed.task)
        num_hard = len(mixed) - (0 if mixed.soft_targets is None else len(mixed.soft_targets))
        masked = logits.masked_fill(inactive, -torch.inf)
        losses = functional.cross_entropy(masked[:num_hard], mixed.y[:num_hard], reduction="none")
        if mixed.soft_targets is not None and mixed.targets_are_logits:
            losses = torch.cat([losses, squared_distance(logits[num_hard:], mixed.soft_targets)])
        elif mixed.soft_targets is not None:
            log_probabilities = functional.log_softmax(masked[num_hard:] / mixed.temperature, 1)
            # inactive outputs must be filled before the product, because 0 * -inf is NaN
            terms = mixed.soft_targets * log_probabilities.masked_fill(inactive[-len(mixed.soft_targets) :], 0.0)
            losses = torch.cat([losses, -(mixed.temperature**2) * terms.sum(1)])
        assert mixed.weight is not None
        return torch.dot(losses, mixed.weight)

    def reduce_lr(self, factor: float) -> None:
        """Multiply the learning rate by `factor`, permanently: it is part of the state."""
        self.lr_factor *= factor
        self.optimizer.lr *= factor

    def gradient_of(self, batch: Batch) -> list[Tensor]:
        """Return the gradient of a batch's mean loss at the current parameters. Does not change `.grad`."""
        joined = batch.with_replay(None, 0.0)
        loss = self.loss(self._logits(joined.x, joined.task), joined)
        grads = torch.autograd.grad(loss, self.params, allow_unused=True)
        return [dense(grad, param) for grad, param in zip(grads, self.params, strict=True)]

    # -- tasks

    def begin_task(self, task: Task) -> None:
        """Begin a task with an empty reservoir. Raises `StreamlearnError`, naming the task, if the network has no room."""
        start = clones(self._average)
        try:
            # the network comes first: only it may raise, and then nothing has changed
            for slot in self.strategy.slots.values():
                slot.begin_task(task.index, self.params)
        except StreamlearnError as error:
            raise error.with_message(f"task {task.name}: {error}") from error
        self.task = task.index
        self.task_steps = 0
        self.refinement_done = None
        self.reservoir.clear()
        self.task_start_params = start
        self._update_parameters()

    def set_active_outputs(self, tasks: Sequence[Task], labels: Sequence[Label]) -> None:
        """Update the active outputs of all tasks; grow the head if the labels need more outputs.

        Tasks and labels are append-only, so the cost depends on what is new since the last call, not on tasks times labels.
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
            for label in task.labels[self._num_labels[row] :]:
                self._num_labels[row] += 1
                if (output := self.scenario.output(label, task.name, labels)) is not None:
                    self.output_labels[row][output] = label

    def active_outputs_of(self, task: int) -> list[int]:
        """Return the indices of a task's active outputs."""
        indices: list[int] = self.active_outputs[task].nonzero().flatten().tolist()
        return indices

    def refine(self) -> Iterator[Batch]:
        """Yield the batches of a task's refinement: `refine_epochs` passes over the reservoir.

        The order of each pass depends only on seed, task and epoch, so a restart continues at `refinement_done`.
        """
        if self.refinement_done is None:
            self.refinement_done = 0
            self.reservoir.sealed = True
            if self.strategy.refine_epochs:
                self._copy_average_to_params()
                with self.layer_rng.in_use():
                    for slot in self.strategy.slots.values():
                        slot.begin_refinement(self._ended_task(slot))
                self._update_parameters()
                self._start_average(self.params)  # a new average: the old one contains pruned weights
                self.task_steps = 0
        size = len(self.reservoir)
        batches = -(-size // self.batch_size)
        for number in range(self.refinement_done, self.strategy.refine_epochs * batches):
            epoch, index = divmod(number, batches)
            order = torch.randperm(size, generator=seeded_generator(self.context.seed, f"refine-{self.task}-{epoch}"))
            indices = order[index * self.batch_size : (index + 1) * self.batch_size]
            y = self.reservoir.y[indices]
            yield Batch(self.reservoir.x[indices], y, torch.full_like(y, self.task))

    def end_task(self) -> None:
        """End the task: the weight average becomes the live weights, then every slot consolidates the task.

        So teacher, penalties and probes use the same weights.
        """
        self._copy_average_to_params()
        with self.layer_rng.in_use():
            for slot in self.strategy.slots.values():
                slot.end_task(self._ended_task(slot))
        with self.layer_rng.in_use(keep=False):
            self.strategy.replay.measure_agreement(self.task)
        self.refinement_done = None
        self.reservoir.clear()
        self._update_parameters()

    # -- evaluation

    def evaluate(self, x: Tensor, y: Tensor, task: int, params: Sequence[Tensor] | None = None) -> tuple[float, float]:
        """Return accuracy and mean loss on samples of a task, with the averaged weights or with `params`.

        A sample whose label is not an active output of the task, or has no output (`y` is negative), counts as a wrong
        answer and has no loss. The mean loss is over the other samples; it is infinite if there are none.
        """
        return self.evaluate_all([(x, y, task)], params)[0]

    @torch.no_grad()
    def evaluate_all(
        self, probes: Sequence[tuple[Tensor, Tensor, int]], params: Sequence[Tensor] | None = None
    ) -> list[tuple[float, float]]:
        """Return accuracy and mean loss for each probe (`x [n, ...]`, `y [n]`, task), as `evaluate` does.

        Small probes share forward passes, so a thousand small probes cost little more than one large probe.
        """
        network = self.averaged_network
        if params is not None:
            network = self._copy_network()
            copy_into(self._params_of(network), params)
        hits, total, counted = torch.zeros(3, len(probes), device=self.context.device)
        room = EVALUATION_CHUNK if samples_are_independent(network.module) else 0
        with eval_mode(network.module), self.layer_rng.in_use(keep=False):
            for probe_index, x, y, task in _evaluation_batches(probes, room):
                tasks, inputs = task, self.context.preprocess(x)
                index, target = probe_index.to(self.context.device), y.to(self.context.device)
                if self.encoder is not None and not bool((usable := finite_rows(inputs)).all()):
                    # a sample without finite features counts as a wrong answer and has no loss
                    inputs, target, tasks, index = inputs[usable], target[usable], tasks[usable.cpu()], index[usable]
                    if not len(target):
                        continue
                logits = network.forward(inputs, tasks)
                inactive = self._inactive_of(tasks).expand_as(logits)
                masked = logits.masked_fill(inactive, -torch.inf)
                is_active = (target >= 0) & ~inactive.gather(1, target.clamp(min=0)[:, None])[:, 0]
                labels = torch.where(is_active, target, IGNORED)
                hits.index_add_(0, index, ((masked.argmax(1) == target) & is_active).float())
                counted.index_add_(0, index, is_active.float())
                if bool((probe_index == probe_index[0]).all()):
                    total[probe_index[0]] += functional.cross_entropy(
                        masked, labels, ignore_index=IGNORED, reduction="sum"
                    )
                else:
                    losses = functional.cross_entropy(masked, labels, ignore_index=IGNORED, reduction="none")
                    total.index_add_(0, index, losses)
        return [
            (correct / len(y), loss / number if number else math.inf)
            for (_, y, _), correct, loss, number in zip(
                probes, hits.tolist(), total.tolist(), counted.tolist(), strict=True
            )
        ]

    @property
    def measures_transfer(self) -> bool:
        """Whether forward transfer is defined. In scenario class it is not: unseen classes cannot be predicted."""
        return self.scenario.kind != "class" and self.strategy.network.supports_forward_transfer

    @property
    def model(self) -> nn.Module:
        """The evaluated module: with the averaged weights if there is an average."""
        return self.averaged_network.module

    # -- state

    def state_dict(self) -> dict[str, State]:
        """Return everything needed to continue bit-equal, as named groups of tensors and JSON values."""
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
                "draws": self._generator.get_state(),
                "distort": {} if self.distort is None else {"generator": self.distort.generator.get_state()},
                "layer_draws": self.layer_rng.state_dict(),
            },
            **{name: slot.state_dict() for name, slot in self.strategy.slots.items()},
        }

    def load_state_dict(self, state: dict[str, State], tasks: Sequence[Task], labels: Sequence[Label]) -> None:
        """Restore what `state_dict` returned. `tasks` and `labels` are those seen so far."""
        learner = state["learner"]
        self._reset_masks()
        if self.encoder is not None:  # the saved encoder, because the model was trained on its features
            self.encoder.load(join_tensors(state["encoder"]["frozen"], state["encoder"].get("rest", {})))
        if learner["num_outputs"] > self.active_outputs.shape[1]:
            self._grow(learner["num_outputs"])
        for name, slot in self.strategy.slots.items():
            slot.load_state_dict(state[name])
        load_module_state(self.strategy.network.module, state["live"] or state["model"])
        self.names, self.params = self._trainable_parameters()
        self.lr_factor = learner.get("slowed", 1.0)  # older checkpoints have neither this nor `layer_draws`
        self.optimizer = self._make_optimizer()
        self.optimizer.load_state_dict(state["optimizer"])
        self._start_average(self.params)
        if self.spec.average is not None:
            load_module_state(self.averaged_network.module, state["model"])
        self.reservoir.load_state_dict(state["reservoir"])
        for name in ("initial", "task_start"):
            # empty if forward transfer is undefined; then values of the right shapes are enough
            values = state["transfer"][name]
            saved = [values[str(n)].to(self.context.device, copy=True) for n in range(len(values))]
            setattr(self, f"{name}_params", saved or clones(self.params))
        self.step, self.task_steps, self.batches = learner["step"], learner["task_steps"], learner["batches"]
        self.task, self.refinement_done = learner["task"], learner["cursor"]
        self._generator.set_state(learner["draws"])
        self.layer_rng.load_state_dict(learner.get("layer_draws", {}))
        if self.distort is not None and learner["distort"]:  # augmentation may be turned on or off between starts
            self.distort.generator.set_state(learner["distort"]["generator"])
        self.set_active_outputs(tasks, labels)

    # -- helpers

    def _reset_masks(self) -> None:
        """Remove all tasks and labels; `set_active_outputs` adds them."""
        # active outputs, one row per task, or one row for all tasks if they share it
        self._masks = torch.zeros(0, self.context.num_outputs, dtype=torch.bool, device=self.context.device)
        self._counted: list[int] = []  # number of outputs already set in each row
        self.active_outputs = self._masks  # [T, C]: a view with a row for each task
        self.inactive_outputs = ~self._masks
        self.output_labels: list[dict[int, Label]] = []  # for each task: output -> label, of the labels seen
        self._num_labels: list[int] = []  # for each task: number of its labels in `output_labels`

    def _add_rows(self, tasks: int) -> None:
        """Add mask rows until there are this many tasks."""
        rows = min(tasks, 1) if self.scenario.shares_mask else tasks
        more = self._masks.new_zeros(rows - len(self._masks), self._masks.shape[1])
        self._masks = torch.cat([self._masks, more])
        self._counted += [0] * len(more)
        self.output_labels += [{} for _ in range(tasks - len(self.output_labels))]
        self._num_labels += [0] * (tasks - len(self._num_labels))

    def _usable(self, batch: Batch) -> tuple[Batch, Batch]:
        """Return the usable samples of a batch twice: unchanged, and preprocessed on the device.

        A sample whose encoder features are not finite is left out.
        """
        x, y = self.context.preprocess(batch.x), batch.y.to(self.context.device)
        if self.encoder is not None and not bool((usable := finite_rows(x)).all()):
            rows = usable.to(batch.x.device)
            batch = Batch(batch.x[rows], batch.y[rows], batch.task[rows])
            x, y = x[usable], y[usable]
        return batch, Batch(x, y, batch.task)

    def _logits(self, x: Tensor, task: Tensor) -> Tensor:
        """Return the logits for training. A single sample has no batch statistics: see `ModelCheck.run`."""
        network = self.strategy.network
        if len(x) > 1 or self.trains_single_samples:
            return network.forward(x, task)
        with differentiable_eval_mode(network.module):
            return network.forward(x, task)

    def _inactive_of(self, task: Tensor) -> Tensor:
        """Return a mask of the inactive outputs of each sample, `[B, C]`, or `[1, C]` if all tasks share it."""
        if len(self.inactive_outputs) == 1:
            return self.inactive_outputs
        return self.inactive_outputs[task.to(self.context.device, non_blocking=True)]

    def _fixed_entries(self, mixed: Batch, grads: Sequence[Tensor]) -> dict[int, Tensor]:
        """Return masks of the head's entries whose output is inactive for all samples, by index of the parameter.

        Earlier momentum and weight decay must not change these entries. In scenario class an inactive output was never
        trained, so only weight decay could change it.
        """
        head = self.strategy.network.head
        if head is None or (self.scenario.kind == "class" and not self.optimizer.weight_decay):
            return {}
        inactive = self._inactive_of(mixed.task).all(0)
        return {
            # a weight that is tied to other layers may have a gradient nevertheless
            index: inactive.view(-1, *[1] * (param.dim() - 1)) & (grads[index] == 0)
            for index, param in enumerate(self.params)
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
        """Return how many samples of a preprocessed batch the evaluated model classifies correctly, as a device tensor."""
        network = self.averaged_network
        with eval_mode(network.module), self.layer_rng.in_use(keep=False):
            logits = network.forward(batch.x, batch.task)
        masked = logits.masked_fill(self._inactive_of(batch.task), -torch.inf)
        return (masked.argmax(1) == batch.y).sum()

    def _steps_and_weight(self, samples: int) -> tuple[int, float]:
        """Return how many steps a batch of this many samples gets, and the weight of its loss in each step."""
        due = self.spec.updates_per_batch * min(samples, self.batch_size)  # number of steps times `batch_size`
        steps = -(-due // self.batch_size)
        return steps, due / (steps * self.batch_size)

    def _read_stats(self, batch: Batch, hits: Tensor, unusable: int) -> LearnStats:
        """Read the statistics of a batch. This waits for the device, once per batch."""
        losses, norms, finite = (torch.stack(values) for values in zip(*self._step_stats, strict=True))
        applied = int(finite.sum())
        loss = float(losses[finite].mean()) if applied else None
        clipped = int((finite & torch.stack(self._clipped)).sum()) if self._clipped else 0
        accuracy, norm = int(hits) / len(batch), float(norms[-1])
        dropped = self.strategy.replay.pop_dropped_updates()
        return LearnStats(self.task, len(batch), len(losses), applied, clipped, loss, accuracy, norm, unusable, dropped)

    def _ended_task(self, slot: Slot) -> EndedTask:
        x, y = self.reservoir.x, self.reservoir.y
        if slot.samples_needed != ALL and slot.samples_needed < len(y):  # another slot needs more
            order = torch.randperm(len(y), generator=seeded_generator(self.context.seed, f"closing-{self.task}"))
            if slot.needs_balanced_samples:
                order = order[rank_in_class(y[order]).argsort(stable=True)]
            x, y = x[order[: slot.samples_needed]], y[order[: slot.samples_needed]]
        return EndedTask(
            self.task, x, y, self.params, self.strategy.network.module, self.active_outputs,
            [list(row) for row in self.output_labels], self._generator, self.output_labels,
        )  # fmt: skip

    def _trainable_parameters(self) -> tuple[list[str], list[Tensor]]:
        trained = self.strategy.network.trainable_parameters()
        return list(trained), list(trained.values())

    def _make_optimizer(self) -> Optimizer:
        o = self.spec.optimizer
        return Optimizer(self.params, o.name, o.lr * self.lr_factor, momentum=o.momentum, weight_decay=o.weight_decay)

    def _params_of(self, network: Network) -> list[Tensor]:
        """Return the parameters of a copy of the network, aligned with `params`."""
        named = dict(network.module.named_parameters())
        return [named[name] for name in self.names]

    def _start_average(self, values: Sequence[Tensor]) -> None:
        """Start a weight average at these values. Without an average the live network is evaluated."""
        if self.spec.average is None:
            self._average = self.params
            self._statistics = RunningStatistics(self.strategy.network.module, self.strategy.network.module)
            return
        self.averaged_network = self._copy_network()
        self._average = self._params_of(self.averaged_network)
        copy_into(self._average, values)
        self._statistics = RunningStatistics(self.strategy.network.module, self.averaged_network.module)

    def _copy_average_to_params(self) -> None:
        if self.spec.average is not None:
            copy_into(self.params, self._average)

    def _copy_network(self) -> Network:
        network = copy.deepcopy(self.strategy.network)
        network.module.requires_grad_(requires_grad=False).eval()
        flatten_recurrent(network.module)
        return network

    def _update_parameters(self) -> None:
        """Read the parameters again after the network has added, frozen or replaced some, or has changed its buffers.

        Optimizer state, average and saved parameters are carried over by parameter name.
        """
        old = {name: index for index, name in enumerate(self.names)}
        self.names, self.params = self._trainable_parameters()
        indices = [old.get(name) for name in self.names]
        self.optimizer.set_parameters(self.params, indices)
        carried = [
            [param.detach().clone() if index is None else padded(values[index], param, copy_rest=True)
             for index, param in zip(indices, self.params, strict=True)]
            for values in (self._average, self.initial_params, self.task_start_params)
        ]  # fmt: skip
        self._start_average(carried[0])
        self.initial_params, self.task_start_params = carried[1:]

    def _grow(self, size: int) -> None:
        registry.grow_head(self.strategy.network.module, size, self.context.seed)
        self._update_parameters()
        for slot in self.strategy.slots.values():
            slot.grow(self.params, size)
        self._masks = padded(self._masks, self._masks.new_zeros(len(self._masks), size))
        self.active_outputs = self._masks.expand(len(self.active_outputs), size)


def _evaluation_batches(
    probes: Sequence[tuple[Tensor, Tensor, int]], room: int
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Yield the samples of all probes in batches: for each sample the index of its probe, `x`, `y` and its task.

    Whole probes share a batch of at most `room` samples. A larger probe is split into batches of its own.
    """
    waiting: list[tuple[int, Tensor, Tensor, int]] = []
    count = 0  # samples in `waiting`

    def joined() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        sizes = torch.tensor([y.shape[0] for _, _, y, _ in waiting])
        numbers, tasks = torch.tensor([(number, task) for number, _, _, task in waiting]).T
        x, y = (torch.cat([probe[field] for probe in waiting]) for field in (1, 2))  # type: ignore[misc]
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
    """Return each sample's mean squared distance `[R]` from stored logits `[R, C]`, over the finite stored logits."""
    finite = stored.isfinite()
    squares = torch.where(finite, logits - stored, 0.0).square()
    return squares.sum(1) / finite.sum(1).clamp(min=1)


def make_learner(config: LearningConfig, scenario: Scenario) -> Learner:
    """Return an untrained learner for a configuration.

    Raises `ConfigurationError` if model or strategy cannot be built, `ValueError` if the device does not exist.
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
        config.batch_size, config.topics, token_ids=vocabulary is not None,
        max_norm=config.learner.max_norm,
    )  # fmt: skip
    strategy = build_strategy(config.strategy, context)
    if config.grow_head and registry.head_of(strategy.network.module) is None:
        raise ConfigurationError("grow_head: the model needs a linear layer named head")
    is_custom, trains_single_samples = ":" in spec["name"], True
    if is_custom:

        def sample(count: int) -> Tensor:
            # values from 0 to 1: a model may use them as indices of an embedding, and these must be valid
            some = torch.randint(2, (count, *shape)) if context.token_ids else torch.rand(count, *shape)
            return some.to(device, context.zero_inputs(0).dtype)

        copies = config.learner.average is not None or (
            scenario.kind != "class" and strategy.network.supports_forward_transfer
        )
        build = partial(build_network, context.num_outputs)
        trains_single_samples = ModelCheck(spec["name"], build, sample, config.seed, round_trip, equal).run(
            copies=copies
        )
    return Learner(
        strategy, config.learner, context, scenario,
        batch_size=config.batch_size, encoder=encoder, has_user_code=is_custom or encoder is not None,
        trains_single_samples=trains_single_samples,
    )  # fmt: skip


def encoder_state(encoder: Encoder) -> State:
    """Return an encoder's state: tensors that never change, saved in a file of their own, and the rest."""
    tensors, rest = split_tensors(encoder.state_dict())
    return {"frozen": Immutable(tensors), "rest": rest}
