"""The learner's parts: another kind of update in place of the gradient step, and the average of the weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from streamlearn.learning.learner import Learner
from streamlearn.learning.strategies.slots import Network
from streamlearn.learning.update import StepResult
from streamlearn.learning.weight_average import WeightAverage
from tests.support.learners import batch, begin, begun, described

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from streamlearn.core.samples import Batch

pytestmark = pytest.mark.usefixtures("daemon_mode")


class ClassMeans:
    """An update in closed form: the weights of the head are the means of the classes. It needs no gradient."""

    lr = 0.0

    def __init__(self, head: nn.Linear) -> None:
        self.head = head
        self.sums = torch.zeros(head.out_features, head.in_features)
        self.counts = torch.zeros(head.out_features)

    @torch.no_grad()
    def step(self, batch: Batch, weight: float) -> StepResult:
        """Add the samples of a batch to the means."""
        del weight
        self.sums.index_add_(0, batch.y, batch.x)
        self.counts.index_add_(0, batch.y, torch.ones(len(batch)))
        means = self.sums / self.counts.clamp(min=1)[:, None]
        self.head.weight.copy_(means)
        self.head.bias.copy_(-means.square().sum(1) / 2)
        zero = torch.zeros(())
        return StepResult(zero, zero, torch.tensor(True), None)  # noqa: FBT003 - the tensor's value

    def set_parameters(self, params: Sequence[Tensor], old_indices: Sequence[int | None]) -> None:
        """Keep the head."""

    def reduce_lr(self, factor: float) -> None:
        """There is no learning rate."""

    def state_dict(self) -> dict[str, Any]:
        """Return the sums and counts."""
        return {"optimizer": {"sums": self.sums, "counts": self.counts}, "lr_factor": 1.0, "distort": {}}

    def load_state_dict(self, state: dict[str, Any], params: Sequence[Tensor]) -> None:
        """Restore the sums and counts."""
        del params
        self.sums, self.counts = state["optimizer"]["sums"].clone(), state["optimizer"]["counts"].clone()


def linear(input_shape: Sequence[int], num_outputs: int) -> nn.Module:
    """Return a model that is only a head."""
    model = nn.Sequential()
    model.add_module("head", nn.Linear(input_shape[0], num_outputs))
    return model


def with_means(directory: Path) -> Learner:
    """Return a learner whose update is in closed form."""
    model = {"name": "tests.unit.learning.test_learner:linear"}
    made = begun(directory, model=model, learner={"average": None, "updates_per_batch": 1})
    head = made.strategy.network.head
    assert head is not None
    learner = Learner(made.strategy, ClassMeans(head), made.outputs, made.spec, made.context)
    begin(learner, [(0, 1, 2, 3)])
    return learner


def test_another_kind_of_update_stands_in_the_place_of_the_gradient_step(tmp_path: Path) -> None:
    """The learner needs nothing of it but the interface, and its state is saved and restored."""
    learner, other = with_means(tmp_path), with_means(tmp_path)
    for number in range(10):
        assert learner.learn(batch(number)).applied == 1
    assert learner.evaluate(batch(99).x, batch(99).y, 0)[0] > 0.9
    other.load_state_dict(learner.state_dict(), *described([(0, 1, 2, 3)]))
    for one in (learner, other):
        one.learn(batch(10))
    assert all(torch.equal(a, b) for a, b in zip(learner.params, other.params, strict=True))


def test_the_average_keeps_its_weights_at_a_dropped_step() -> None:
    """A step that was dropped changes neither the average nor, without a decay, which network is evaluated."""
    network = Network(nn.Linear(2, 2))
    names, params = zip(*network.trainable_parameters().items(), strict=True)
    average = WeightAverage(network, 0.5)
    average.start(names, params, [torch.zeros_like(param) for param in params])
    average.after_step(params, torch.tensor(False), 0)  # noqa: FBT003 - the tensor's value
    assert all(not bool(mean.any()) for mean in average.params)
    average.after_step(params, torch.tensor(True), 0)  # noqa: FBT003 - the tensor's value
    for mean, param in zip(average.params, params, strict=True):
        assert torch.allclose(mean, 0.9 * param)
    live = WeightAverage(network, None)
    live.start(names, params, params)
    assert live.network is network
