"""The update: which weights a batch may change, how far, and its statistics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from streamlearn import state
from streamlearn.core.deliveries import Delivery
from streamlearn.learning.strategies.generative import GenerativeReplay
from streamlearn.learning.update import GradientUpdate
from streamlearn.metrics import Metrics
from tests.support.learners import BATCH, batch, begin, begun, described

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from streamlearn.core.samples import Batch

pytestmark = pytest.mark.usefixtures("daemon_mode")


def dropping(input_shape: Sequence[int], num_outputs: int) -> nn.Module:
    """Return a model with strong dropout at its input."""
    layers: dict[str, nn.Module] = {"drop": nn.Dropout(0.8), "head": nn.Linear(input_shape[0], num_outputs)}
    model = nn.Sequential()
    for name, layer in layers.items():
        model.add_module(name, layer)
    return model


@pytest.mark.parametrize("average", [None, 0.9])
def test_accuracy_before_training_is_that_of_the_evaluated_model(tmp_path: Path, average: float | None) -> None:
    """It is measured without dropout and, if there is a weight average, with the averaged weights."""
    learner = begun(
        tmp_path,
        model={"name": "tests.unit.learning.test_update:dropping"},
        learner={"updates_per_batch": 5, "average": average},
    )
    for number in range(60):
        new = batch(number)
        expected, _ = learner.evaluate(new.x, new.y, 0)
        assert learner.learn(new).accuracy == pytest.approx(expected)


HEADS: list[dict[str, Any]] = [
    {"optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}},
    {"optimizer": {"name": "adam", "weight_decay": 0.01}, "average": None},
    {"optimizer": {"name": "adamw", "weight_decay": 0.1}},
]


@pytest.mark.parametrize("strategy", ["naive", "ewc", "si", "packnet"])
@pytest.mark.parametrize("spec", HEADS, ids=["sgd", "adam", "adamw"])
def test_rows_of_inactive_outputs_do_not_change(tmp_path: Path, spec: dict[str, Any], strategy: str) -> None:
    """Neither momentum of the task before nor weight decay changes them, and their moments are kept."""
    tasks = ((0, 1), (2, 3))
    learner = begun(tmp_path, tasks, scenario={"kind": "task"}, strategy=strategy, learner=spec)
    for number in range(20):
        learner.learn(batch(number, classes=tasks[0]))
    head = learner.strategy.network.head
    assert head is not None
    untrained = [head.weight[2:].clone(), head.bias[2:].clone()]
    for again in learner.refine():
        learner.learn(again)
    if strategy != "packnet":  # which sets to zero what it prunes
        assert torch.equal(head.weight[2:], untrained[0])
        assert torch.equal(head.bias[2:], untrained[1])
    learner.end_task()
    begin(learner, tasks)
    before = head.weight.detach().clone(), head.bias.detach().clone()
    for number in range(30):
        learner.learn(batch(number, classes=tasks[1], task=1))
    assert torch.equal(head.weight[:2], before[0][:2])
    assert torch.equal(head.bias[:2], before[1][:2])
    assert not torch.equal(head.weight[2:], before[0][2:])


def test_a_projected_gradient_may_change_rows_of_inactive_outputs(tmp_path: Path) -> None:
    """GEM projects on gradients of past tasks, so the step changes the rows of their outputs."""
    sgd = {"optimizer": {"name": "sgd", "lr": 0.1}}
    learner = begun(
        tmp_path, ((0, 1), (2, 3)), scenario={"kind": "task"}, strategy={"gem": {"margin": 1.0}}, learner=sgd
    )
    for number in range(10):
        learner.learn(batch(number, classes=(0, 1)))
    learner.end_task()
    begin(learner, ((0, 1), (2, 3)))
    head = learner.strategy.network.head
    assert head is not None
    before = head.weight.detach().clone()
    for number in range(10):
        learner.learn(batch(number, classes=(2, 3), task=1))
    assert learner.strategy.constraint.counters()["projected"] > 0
    assert not torch.equal(head.weight[:2], before[:2])


def test_outputs_of_unseen_classes_do_not_decay(tmp_path: Path) -> None:
    """In scenario class the row of a class that was not seen yet keeps its initial weights."""
    spec = {"optimizer": {"name": "sgd", "lr": 0.1, "weight_decay": 0.1}}
    learner = begun(tmp_path, ((0, 1),), learner=spec)
    head = learner.strategy.network.head
    assert head is not None
    before = head.weight.detach().clone()
    for number in range(10):
        learner.learn(batch(number, classes=(0, 1)))
    assert torch.equal(head.weight[2:], before[2:])
    assert not torch.equal(head.weight[:2], before[:2])


@pytest.mark.parametrize(
    ("size", "steps", "weight"), [(1, 1, 0.2), (7, 2, 0.7), (10, 2, 1.0), (17, 4, 0.85), (BATCH, 4, 1.0), (50, 4, 1.0)]
)
def test_a_short_batch_counts_by_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, steps: int, weight: float
) -> None:
    """Each of its samples is learned as long as one of a full batch: fewer steps, and the rest is the weight of the loss.

    The generator's loss has the same weight, and the loss that is shown is the samples' mean.
    """
    learner = begun(tmp_path, learner={"updates_per_batch": 4}, strategy={"generative": {"likelihood": "gaussian"}})
    replay, seen = learner.strategy.replay, []
    observe = replay.after_step

    def watched(mixed: Batch, finite: torch.Tensor) -> None:
        assert mixed.weight is not None
        seen.append(float(mixed.weight.sum()))
        observe(mixed, finite)

    monkeypatch.setattr(replay, "after_step", watched)
    stats = learner.learn(batch(0, size))
    assert (stats.steps, stats.applied, learner.step) == (steps, steps, steps)
    assert seen == pytest.approx(steps * [weight])
    other = begun(tmp_path, learner={"updates_per_batch": 1, "optimizer": {"lr": 1e-12}})
    new = batch(0, size)
    _, loss = other.evaluate(new.x, new.y, 0)
    assert other.learn(new).loss == pytest.approx(loss, rel=1e-4)


def test_dropped_updates_of_a_generator_are_counted(tmp_path: Path) -> None:
    """The batch's statistics have the number, and the series of dropped steps has a reason for them."""
    learner = begun(tmp_path, learner={"updates_per_batch": 4}, strategy={"generative": {"likelihood": "gaussian"}})
    assert learner.learn(batch(0)).generator_dropped == 0
    replay = learner.strategy.replay
    assert isinstance(replay, GenerativeReplay)
    with torch.no_grad():
        replay.generator.decode_out.bias.fill_(torch.inf)
    stats = learner.learn(batch(1))
    assert (stats.applied, stats.generator_dropped) == (4, 4)
    metrics = Metrics()
    metrics.record_delivery(Delivery(batch=batch(1)), stats, "t0", 0.0)
    found = metrics.expose("")[0].decode()
    assert 'streamlearn_train_steps_skipped_total{reason="nonfinite_generator"} 4.0' in found
    assert 'streamlearn_train_steps_skipped_total{reason="nonfinite"} 0.0' in found


@pytest.mark.parametrize("variant", ["conditional", "vae", "brain-inspired"])
@pytest.mark.parametrize("kind", ["class", "task"])
def test_how_well_a_generator_replays_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str, kind: str
) -> None:
    """At a task's end each class is measured, without a random draw of training.

    The ratios are part of the state, and a useless generator has low ones.
    """
    tasks = ((0, 1), (2, 3))
    over: dict[str, Any] = {
        "scenario": {"kind": kind},
        "strategy": {"generative": {"likelihood": "gaussian", "variant": variant, "hidden": 32, "latent": 4}},
    }
    one, other = (begun(tmp_path, tasks, **over) for _ in range(2))
    replay, blind = one.strategy.replay, other.strategy.replay
    assert isinstance(replay, GenerativeReplay)
    assert isinstance(blind, GenerativeReplay)
    monkeypatch.setattr(blind, "measure_agreement", lambda _: None)  # as if there were no measurement
    for number in range(len(tasks)):
        for learner in (one, other):
            if number:
                begin(learner, tasks)
            for place in range(3):
                learner.learn(batch(place, classes=tasks[number], task=number))
            learner.end_task()
        assert set(replay.agreement()) == {(task, y) for task in range(number + 1) for y in tasks[task]}
        assert all(0 <= ratio <= 1 for ratio in replay.agreement().values())
    found, expected = (state.pack(learner.state_dict())[0] for learner in (one, other))
    for name, tensors in found.items():
        assert all(torch.equal(value, expected[name][key]) for key, value in tensors.items())
    again = begun(tmp_path, tasks, **over)
    again.load_state_dict(one.state_dict(), *described(tasks))
    assert again.strategy.replay.agreement() == replay.agreement()
    assert replay.scholar is not None
    weights = replay.scholar.generator.decode_out
    with torch.no_grad():
        weights.weight.zero_()
        weights.bias.copy_(torch.tensor([9.0, 0.0, 0.0, 0.0]))  # the same class for any request
    replay.measure_agreement(1)
    assert sorted(replay.agreement().values()) == [0, 0, *([0, 1] if kind == "class" else [1, 1])]


def test_the_step_of_a_single_sample_is_its_share_of_a_full_batch(tmp_path: Path) -> None:
    """With plain SGD and one update per batch the step is the mean gradient times (samples / batch size)."""
    spec = {"updates_per_batch": 1, "average": None, "optimizer": {"name": "sgd", "lr": 0.1}}
    learner = begun(tmp_path, learner=spec)
    lone = batch(0, 1)
    assert isinstance(learner.update, GradientUpdate)
    gradient = learner.update.gradient_of(lone)
    before = [param.detach().clone() for param in learner.params]
    learner.learn(lone)
    for param, old, grad in zip(learner.params, before, gradient, strict=True):
        assert torch.allclose(param, old - 0.1 / BATCH * grad, atol=1e-6)
