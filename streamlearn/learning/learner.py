"""The learner: trains one model on batches, and begins, refines and ends tasks."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from streamlearn.core.errors import StreamlearnError
from streamlearn.core.samples import Batch, Outcome
from streamlearn.learning import accuracy, learner_state
from streamlearn.learning.current_task import CurrentTask
from streamlearn.learning.models import registry
from streamlearn.learning.models.modes import LayerRng
from streamlearn.learning.models.module_state import RunningStatistics
from streamlearn.learning.parameters import TrainedParameters
from streamlearn.learning.stats import LearnStats
from streamlearn.learning.strategies.slots import EndedTask
from streamlearn.learning.tensors import clones, copy_into, finite_rows, seeded_generator
from streamlearn.learning.weight_average import WeightAverage, frozen_copy, parameters_named

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor, nn

    from streamlearn.core.labels import Label
    from streamlearn.core.scenario import Scenario
    from streamlearn.core.tasks import Task
    from streamlearn.learning.active_outputs import ActiveOutputs
    from streamlearn.learning.config import LearnerConfig
    from streamlearn.learning.models.encoder import Encoder
    from streamlearn.learning.strategies.slots import BuildContext, Network, Slot, State, Strategy
    from streamlearn.learning.update import StepResult, Update


class Learner:
    """Trains one model on a sequence of tasks, batch by batch.

    Each part has one responsibility: `update` changes the weights, `average` holds the evaluated weights, `outputs` knows
    the active outputs, `task` is the state of the current task. The learner calls them in order.
    """

    def __init__(
        self,
        strategy: Strategy,
        update: Update,
        outputs: ActiveOutputs,
        spec: LearnerConfig,
        context: BuildContext,
        *,
        encoder: Encoder | None = None,
        has_user_code: bool = False,
    ) -> None:
        self.strategy = strategy
        self.update = update
        self.outputs = outputs
        self.spec = spec
        self.context = context
        self.encoder = encoder  # part of `context.preprocess`; never trained
        self.step = 0  # optimizer steps so far
        self.batches = 0  # batches learned so far
        self.task = CurrentTask.for_slots(strategy.slots.values(), context.max_bytes, context.batch_size, context.seed)
        self.parameters = TrainedParameters(strategy.network)
        self.average = WeightAverage(strategy.network, spec.average)
        self.start_average(self.params)
        self.initial_params = clones(self.params)  # of the untrained model, for forward transfer
        self.task_start_params = clones(self.params)  # at the start of the task, for forward transfer
        self.generator = seeded_generator(context.seed, "learner")
        self.layer_rng = LayerRng(context.seed, context.device, has_user_code=has_user_code)

    # -- learning

    def learn(self, batch: Batch) -> LearnStats:
        """Train on a batch: `updates_per_batch` optimizer steps, each with its own replayed samples.

        A batch with fewer than `batch_size` samples gets fewer steps and a smaller loss weight, in proportion to its size.
        With all steps and the full weight, a single unusual record could destroy what a task has learned.
        """
        with self.layer_rng.in_use():
            usable, on_device = self._usable(batch)
        unusable = len(batch) - len(usable)
        if not len(usable):
            return LearnStats.of_unusable(self.task.index, unusable)
        with self.layer_rng.in_use(keep=False):
            correct = accuracy.count_correct(self.averaged_network, on_device, self.outputs)
        with self.layer_rng.in_use():
            steps, weight = self._steps_and_weight(len(usable))
            results = [self._step(on_device, weight) for _ in range(steps)]
        stats = LearnStats.read(self.task.index, len(usable), correct, results, unusable)
        stats = replace(stats, generator_dropped=self.strategy.replay.pop_dropped_updates())
        self.task.after_batch(usable, trained=stats.outcome == Outcome.TRAINED)
        self.batches += 1
        return stats

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

    def _steps_and_weight(self, samples: int) -> tuple[int, float]:
        """Return how many steps a batch of this many samples gets, and the weight of its loss in each step."""
        size = self.context.batch_size
        due = self.spec.updates_per_batch * min(samples, size)  # number of steps times `batch_size`
        steps = -(-due // size)
        return steps, due / (steps * size)

    def _step(self, batch: Batch, weight: float) -> StepResult:
        """Take one step on a preprocessed batch. Nothing here waits for the device."""
        result = self.update.step(batch, weight)
        self._statistics.after_step(result.finite)
        self.average.after_step(self.params, result.finite, self.task.steps)
        self.step += 1
        self.task.steps += 1
        return result

    def reduce_lr(self, factor: float) -> None:
        """Multiply the learning rate by `factor`, permanently: it is part of the state."""
        self.update.reduce_lr(factor)

    # -- tasks

    def begin_task(self, task: Task) -> None:
        """Begin a task with an empty reservoir. Raises `StreamlearnError`, naming the task, if the network has no room."""
        start = clones(self.average.params)
        try:
            # the network comes first: only it may raise, and then nothing has changed
            for slot in self.strategy.slots.values():
                slot.begin_task(task.index, self.params)
        except StreamlearnError as error:
            raise error.with_message(f"task {task.name}: {error}") from error
        self.task.begin(task.index)
        self.task_start_params = start
        self._update_parameters()

    def set_active_outputs(self, tasks: Sequence[Task], labels: Sequence[Label]) -> None:
        """Update the active outputs of all tasks; grow the head if the labels need more outputs."""
        size = self.scenario.num_outputs(labels)
        if size > self.outputs.num_outputs:
            self.grow(size)
        self.outputs.update(tasks, labels)

    def refine(self) -> Iterator[Batch]:
        """Yield the batches of a task's refinement: `refine_epochs` passes over the reservoir.

        A restart inside the refinement continues where it was.
        """
        if not self.task.is_refining:
            self._begin_refinement()
        yield from self.task.refinement_batches(self.strategy.refine_epochs)

    def _begin_refinement(self) -> None:
        self.task.begin_refinement()
        if not self.strategy.refine_epochs:
            return
        self.average.copy_to(self.params)
        with self.layer_rng.in_use():
            for slot in self.strategy.slots.values():
                slot.begin_refinement(self._ended_task(slot))
        self._update_parameters()
        self.start_average(self.params)  # a new average: the old one contains pruned weights
        self.task.steps = 0

    def end_task(self) -> None:
        """End the task: the weight average becomes the live weights, then every slot consolidates the task.

        So teacher, penalties and probes use the same weights.
        """
        self.average.copy_to(self.params)
        with self.layer_rng.in_use():
            for slot in self.strategy.slots.values():
                slot.end_task(self._ended_task(slot))
        with self.layer_rng.in_use(keep=False):
            self.strategy.replay.measure_agreement(self.task.index)
        self.task.end()
        self._update_parameters()

    def _ended_task(self, slot: Slot) -> EndedTask:
        x, y = self.task.samples_for(slot)
        return EndedTask(
            self.task.index, x, y, self.params, self.strategy.network.module, self.active_outputs,
            [list(row) for row in self.output_labels], self.generator, self.output_labels,
        )  # fmt: skip

    # -- evaluation

    def evaluate(self, x: Tensor, y: Tensor, task: int, params: Sequence[Tensor] | None = None) -> tuple[float, float]:
        """Return accuracy and mean loss on samples of a task, as `evaluate_all` does."""
        return self.evaluate_all([(x, y, task)], params)[0]

    def evaluate_all(
        self, probes: Sequence[tuple[Tensor, Tensor, int]], params: Sequence[Tensor] | None = None
    ) -> list[tuple[float, float]]:
        """Return accuracy and mean loss for each probe (`x [n, ...]`, `y [n]`, task): see `accuracy.evaluate`.

        The weights are the averaged ones, or `params`. Small probes share forward passes, so a thousand small probes cost
        little more than one large probe.
        """
        network = self.averaged_network
        if params is not None:
            network = frozen_copy(self.strategy.network)
            copy_into(parameters_named(network, self.parameters.names), params)
        with self.layer_rng.in_use(keep=False):
            return accuracy.evaluate(
                network, probes, self.outputs, self.context.preprocess,
                has_encoder=self.encoder is not None, device=self.context.device,
            )  # fmt: skip

    @property
    def scenario(self) -> Scenario:
        """Which outputs labels have, and which outputs are active."""
        return self.outputs.scenario

    @property
    def measures_transfer(self) -> bool:
        """Whether forward transfer is defined. In scenario class it is not: unseen classes cannot be predicted."""
        return self.scenario.kind != "class" and self.strategy.network.supports_forward_transfer

    @property
    def averaged_network(self) -> Network:
        """The evaluated network: with the averaged weights if there is an average."""
        return self.average.network

    @property
    def model(self) -> nn.Module:
        """The module of the evaluated network."""
        return self.average.network.module

    @property
    def active_outputs(self) -> Tensor:
        """A mask of the active outputs of each task, `[T, C]`."""
        return self.outputs.active

    @property
    def output_labels(self) -> Sequence[Mapping[int, Label]]:
        """For each task, the label of each output that training has seen."""
        return self.outputs.labels

    def active_outputs_of(self, task: int) -> list[int]:
        """Return the indices of a task's active outputs."""
        return self.outputs.indices(task)

    # -- state

    def state_dict(self) -> dict[str, State]:
        """Return everything needed to continue bit-equal, as named groups of tensors and JSON values."""
        return learner_state.state_of(self)

    def load_state_dict(self, state: dict[str, State], tasks: Sequence[Task], labels: Sequence[Label]) -> None:
        """Restore what `state_dict` returned. `tasks` and `labels` are those seen so far."""
        learner_state.load_state(self, state, tasks, labels)

    # -- parameters

    @property
    def params(self) -> list[Tensor]:
        """The trained parameters."""
        return self.parameters.tensors

    def start_average(self, values: Sequence[Tensor]) -> None:
        """Start a weight average at these values, for the current parameters and buffers of the network."""
        self.average.start(self.parameters.names, self.params, values)
        self._statistics = RunningStatistics(self.strategy.network.module, self.model)

    def grow(self, num_outputs: int) -> None:
        """Grow the head to this many outputs, and everything that has its shape."""
        registry.grow_head(self.strategy.network.module, num_outputs, self.context.seed)
        self._update_parameters()
        for slot in self.strategy.slots.values():
            slot.grow(self.params, num_outputs)
        self.outputs.grow(num_outputs)

    def _update_parameters(self) -> None:
        """Read the parameters again after the network has added, frozen or replaced some, or has changed its buffers.

        Optimizer state, average and saved parameters are carried over by parameter name.
        """
        old_indices = self.parameters.read()
        self.update.set_parameters(self.params, old_indices)
        self.initial_params = self.parameters.carried_over(self.initial_params, old_indices)
        self.task_start_params = self.parameters.carried_over(self.task_start_params, old_indices)
        self.start_average(self.parameters.carried_over(self.average.params, old_indices))
