"""Replay without a stream: shares of the loss, targets and generators, compared with their definitions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence
from torch.nn import functional

from streamlearn.core.samples import Batch
from streamlearn.learning.loss import squared_distance
from streamlearn.learning.memory import EpisodicMemory
from streamlearn.learning.models.feedback import Feedback
from streamlearn.learning.models.mlp import MLP
from streamlearn.learning.models.vae import bounded
from streamlearn.learning.strategies.generative import GenerativeReplay, ReplayTargets
from streamlearn.learning.strategies.generator_training import GeneratorSpec
from streamlearn.learning.strategies.latent_moments import JITTER, LatentMoments, sample_codes
from streamlearn.learning.strategies.lwf import LearningWithoutForgetting
from streamlearn.learning.strategies.replay import DarkReplay
from streamlearn.learning.strategies.replay_share import ReplayShare
from streamlearn.learning.strategies.slots import BuildContext, EndedTask

CPU, YES = torch.device("cpu"), torch.tensor(data=True)


def build(num_outputs: int, offset: int = 0) -> nn.Module:
    """Return a small network whose weights depend on the offset only."""
    torch.manual_seed(offset)
    return MLP([5], num_outputs, [6])


CONTEXT = BuildContext(0, CPU, (5,), 4, 1 << 20, lambda x: x, build, 8)


def ended_task(task: int, model: nn.Module) -> EndedTask:
    """Return an ended task with two outputs of its own, after tasks with two outputs each."""
    active = torch.zeros(task + 1, 4, dtype=torch.bool)
    active[:, : 2 * task + 2] = True
    x, y = torch.randn(8, 5), torch.arange(8) % 2 + 2 * task
    outputs = [[2 * t, 2 * t + 1] for t in range(task + 1)]
    return EndedTask(task, x, y, list(model.parameters()), model, active, outputs, torch.Generator())


def test_replay_share_by_tasks_and_by_counts() -> None:
    """By tasks: 1 - 1/k. By counts: the past tasks' share of the samples; a new task counts as an average task."""
    by_tasks, by_counts = ReplayShare("tasks"), ReplayShare("counts")
    seen = []
    for shares in (by_tasks, by_counts):
        row = [shares.value]
        for task, samples in enumerate((30, 90)):
            shares.add_samples(samples)
            shares.end_task(task)
            row.append(shares.value)
        shares.add_samples(240)
        seen.append([*row, shares.value])
    assert seen == [[0, 1 / 2, 2 / 3, 2 / 3], [0, 1 / 2, 120 / 180, 120 / 360]]


def test_unsuitable_values_are_logged_once_a_task(caplog: pytest.LogCaptureFixture) -> None:
    """A bernoulli generator warns of values outside 0 to 1, a gaussian one of large values. Both say what to do."""
    small = torch.tensor([[0.0, 0.5, 3.25, -1.5, 1.0]])
    for likelihood, size in (("bernoulli", 1), ("gaussian", 1), ("gaussian", 100)):
        batch = Batch(size * small, torch.zeros(1, dtype=torch.int64), torch.zeros(1))
        spec = GeneratorSpec(
            conditional=True, hidden=4, latent=2, lr=0.1, likelihood=likelihood, average=None, moments=False
        )
        replay = GenerativeReplay(CONTEXT, spec, ReplayTargets(soft=True, temperature=2.0, ratio=1.0, balance="tasks"))
        for task in range(2):
            replay.begin_task(task, [])
            for _ in range(3):
                replay.sample(batch)
    messages = [record.getMessage() for record in caplog.records]
    clipped, large = messages[:2], messages[2:]
    assert clipped[0].startswith(
        "strategy.generative: values from -1.5 to 3.25 are clipped to 0..1 in replayed samples"
    )
    assert "set input.scale so that they are from 0 to 1" in clipped[0]
    assert large[0].startswith("strategy.generative: values from -150 to 325 are too large")
    assert "input.encoder that standardises them" in large[0]
    assert (clipped[1:], large[1:]) == (clipped[:1], large[:1])


def test_log_variances_are_bounded() -> None:
    """Values within the bounds stay as they are. Beyond them the value is the bound, but the divergence keeps its gradient."""
    inside = torch.linspace(-19.9, 3.9, 50)
    assert torch.equal(bounded(inside), inside)
    raw = torch.tensor([1e3, 1e12, -1e6], requires_grad=True)
    found = bounded(raw)
    assert found.tolist() == [4.0, 4.0, -20.0]
    (0.5 * (found.exp() - 1 - found)).sum().backward()
    assert raw.grad is not None
    assert torch.allclose(raw.grad, 0.5 * (torch.tensor([4.0, 4.0, -20.0]).exp() - 1))


@pytest.mark.usefixtures("daemon_mode")
@pytest.mark.parametrize("variant", ["conditional", "vae"])
def test_a_generator_of_large_values_does_not_explode(variant: str) -> None:
    """For columns with values of several hundred, as in tables, generated values are about as large as the real ones."""
    spec = GeneratorSpec(
        conditional=variant == "conditional", hidden=128, latent=20, lr=1e-3, likelihood="gaussian", average=0.998,
        moments=variant == "conditional",
    )  # fmt: skip
    replay = GenerativeReplay(CONTEXT, spec, ReplayTargets(soft=True, temperature=2.0, ratio=1.0, balance="tasks"))
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(2, (1200,), generator=generator)
    spread = torch.tensor([250.0, 90.0, 3.0, 30.0, 0.1])
    x = (torch.randn(1200, 5, generator=generator) + y[:, None]) * spread
    for rows in torch.arange(1200).split(20):
        batch = Batch(x[rows], y[rows], torch.zeros(len(rows), dtype=torch.int64)).with_replay(None, 0.0)
        for _ in range(4):
            replay.after_step(batch, YES)
    assert replay.pop_dropped_updates() == 0
    replay.end_task(ended_task(0, build(4)))
    scholar = replay.scholar
    assert scholar is not None
    noise = torch.randn(500, 20, generator=generator)
    labels = torch.arange(500) % 2
    z = noise if scholar.gaussians is None else sample_codes(scholar.gaussians, labels, noise)
    assert scholar.generator.generate(z, labels).std(0).max() < 3 * x.std(0).max()


def test_dropped_generator_updates_are_counted_and_logged_once_a_task(caplog: pytest.LogCaptureFixture) -> None:
    """Updates that were dropped because the model's step was dropped do not count."""
    spec = GeneratorSpec(
        conditional=True, hidden=4, latent=2, lr=0.1, likelihood="gaussian", average=None, moments=False
    )
    replay = GenerativeReplay(CONTEXT, spec, ReplayTargets(soft=True, temperature=2.0, ratio=1.0, balance="tasks"))
    batch = Batch(torch.rand(3, 5), torch.zeros(3, dtype=torch.int64), torch.zeros(3)).with_replay(None, 0.0)
    huge = Batch(1e30 * batch.x, batch.y, batch.task, batch.weight)
    for task in range(2):
        replay.begin_task(task, [])
        for some, finite in ((batch, True), (huge, True), (huge, True), (huge, False)):
            replay.after_step(some, torch.tensor(data=finite))
        assert (replay.pop_dropped_updates(), replay.pop_dropped_updates()) == (2, 0)
        replay.after_step(huge, YES)
        assert replay.pop_dropped_updates() == 1
    assert [record.getMessage().split(";")[0] for record in caplog.records] == [
        "an update of the generator was not finite and was dropped"
    ] * 2


def test_max_norm_clips_the_gradient_of_a_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    """`max_norm` clips the generator's gradient, as it does the model's."""
    context = replace(CONTEXT, max_norm=0.5)
    spec = GeneratorSpec(
        conditional=True, hidden=4, latent=2, lr=0.1, likelihood="gaussian", average=None, moments=False
    )
    batch = Batch(100 * torch.rand(3, 5), torch.zeros(3, dtype=torch.int64), torch.zeros(3)).with_replay(None, 0.0)
    norms = []
    for where in (CONTEXT, context):
        replay = GenerativeReplay(where, spec, ReplayTargets(soft=True, temperature=2.0, ratio=1.0, balance="tasks"))
        monkeypatch.setattr(
            replay.training.optimizer,
            "step",
            lambda grads, _: norms.append(float(torch.stack([g.norm() for g in grads]).norm())),
        )
        replay.after_step(batch, YES)
    assert norms[0] > 10
    assert norms[1] == pytest.approx(0.5, rel=1e-3)


def test_replay_share_of_tasks_without_samples() -> None:
    """If the past tasks had no samples, the share by counts is the share by tasks."""
    shares = ReplayShare("counts")
    shares.end_task(0)
    assert shares.value == 1 / 2


def test_every_class_is_replayed_equally_often() -> None:
    """A class that came in several tasks is replayed as often as any other class, and each of its tasks equally often."""
    model = build(4)
    active = torch.ones(3, 4, dtype=torch.bool)
    classes = [{0: "cat", 1: "dog"}, {0: "cat", 2: "cow"}, {0: "cat", 3: "hen"}]
    spec = GeneratorSpec(
        conditional=True, hidden=8, latent=3, lr=1e-3, likelihood="gaussian", average=None, moments=False
    )
    replay = GenerativeReplay(CONTEXT, spec, ReplayTargets(soft=True, temperature=2.0, ratio=2.0, balance="tasks"))
    end = EndedTask(
        2, torch.empty(0), torch.empty(0), list(model.parameters()), model, active,
        [list(row) for row in classes], torch.Generator(), classes,
    )  # fmt: skip
    replay.end_task(end)
    other = GenerativeReplay(CONTEXT, replay.spec, replay.targets)
    other.load_state_dict(replay.state_dict())
    for scholar in (replay.scholar, other.scholar):
        assert scholar is not None
        drawn = scholar.pairs[scholar.draw_pairs(40_000, torch.Generator().manual_seed(0))]
        assert (torch.bincount(drawn[:, 1]) / 40_000 - 0.25).abs().max() < 0.01
        assert (torch.bincount(drawn[drawn[:, 1] == 0, 0]) / 40_000 - 0.25 / 3).abs().max() < 0.01


def test_lwf_targets_are_the_softmax_of_the_old_model() -> None:
    """LwF replays the current inputs with the teacher's softmax at T over its outputs; they have 1 - 1/k of the loss."""
    replay, model = LearningWithoutForgetting(CONTEXT, temperature=2.0, balance="tasks"), build(4)
    batch = Batch(torch.randn(3, 5), torch.tensor([2, 3, 2]), torch.ones(3, dtype=torch.int64))
    assert replay.sample(batch) is None
    replay.end_task(ended_task(0, model))
    with torch.no_grad():
        expected = torch.softmax(model(batch.x)[:, :2] / 2, 1)
        for param in model.parameters():
            param.add_(1.0)  # the teacher does not change
    replayed = replay.sample(batch)
    assert replayed is not None
    assert replayed.soft_targets is not None
    assert replay.share == 1 / 2
    assert torch.equal(replayed.x, batch.x)
    torch.testing.assert_close(replayed.soft_targets[:, :2], expected)
    assert replayed.soft_targets[:, 2:].abs().max() == 0
    assert replayed.task.tolist() == [0, 0, 0]


def test_dark_replay_matches_the_stored_logits() -> None:
    """DER++: stored labels have weight beta, and squared distances from stored logits have weight alpha."""
    memory = EpisodicMemory(8, 1 << 20, 0)
    replay, model = DarkReplay(CONTEXT, memory, alpha=0.3, beta=0.7, ratio=1.0), build(4)
    end = ended_task(0, model)
    replay.end_task(end)
    stored = memory.samples_by_task[0]
    with torch.no_grad():
        torch.testing.assert_close(stored["logits"][:, :2], model(stored["x"])[:, :2])
    assert torch.isneginf(stored["logits"][:, 2:]).all()
    batch = Batch(torch.randn(4, 5), torch.zeros(4, dtype=torch.int64), torch.zeros(4, dtype=torch.int64))
    replayed = replay.sample(batch)
    assert replayed is not None
    assert replayed.weight is not None
    mixed = batch.with_replay(replayed, replay.share)
    assert mixed.weight is not None
    assert mixed.weight.tolist() == pytest.approx([1 / 4] * 4 + [0.7 / 4] * 4 + [0.3 / 4] * 4)
    assert mixed.targets_are_logits
    logits = torch.randn(4, 4)
    assert replayed.soft_targets is not None
    by_hand = (logits[:, :2] - replayed.soft_targets[:, :2]).square().mean(1)
    torch.testing.assert_close(squared_distance(logits, replayed.soft_targets), by_hand)


def test_latent_moments_are_those_of_the_codes() -> None:
    """At a rate of 1, a class has the mean and covariance of its codes, including the variance of each code."""
    torch.manual_seed(0)
    mean, log_variance, y = torch.randn(600, 3) @ torch.randn(3, 3), torch.randn(600, 3) - 2, torch.arange(600) % 2
    moments = LatentMoments(3, 3, CPU)
    moments.update(mean, log_variance, y, 1.0, YES)
    moments.update(torch.full_like(mean, torch.nan), log_variance, y, 1.0, ~YES)  # a dropped step changes nothing
    found, root = moments.gaussians()
    for label in range(2):
        own = y == label
        torch.testing.assert_close(found[label], mean[own].mean(0))
        expected = torch.cov(mean[own].T, correction=0) + torch.diag(log_variance[own].exp().mean(0) + JITTER)
        torch.testing.assert_close(root[label] @ root[label].T, expected, rtol=1e-4, atol=1e-4)
    assert bool(root[2].isfinite().all())  # a class that was never seen
    drawn = sample_codes((found, root), torch.ones(200_000, dtype=torch.int64), torch.randn(200_000, 3))
    torch.testing.assert_close(drawn.mean(0), found[1], rtol=0.05, atol=0.05)
    torch.testing.assert_close(torch.cov(drawn.T), root[1] @ root[1].T, rtol=0.05, atol=0.05)
    moments.grow(5)
    torch.testing.assert_close(moments.gaussians()[0][:3], found)


def generator(gated: float = 0.5, likelihood: str = "gaussian") -> Feedback:
    """Return a brain-inspired generator of three classes."""
    torch.manual_seed(0)
    return Feedback([2, 2], 6, 3, hidden=40, latent=3, likelihood=likelihood, gated=gated, seed=0)


def test_loss_of_brain_inspired_replay_follows_its_definition() -> None:
    """The loss is the reconstruction loss plus the divergence of each code from the prior of its class."""
    made, features, x = generator(), torch.randn(7, 6), torch.randn(7, 2, 2)
    with torch.no_grad():
        made.prior_log_variance.normal_()
    y, noise = torch.arange(7) % 3, torch.randn(7, 3)
    mean, log_variance = made.encode_out(features).chunk(2, 1)
    prior = Normal(made.prior_mean[y], torch.exp(0.5 * made.prior_log_variance[y]))
    divergence = kl_divergence(Normal(mean, torch.exp(0.5 * log_variance)), prior).sum(1)
    out = made.decode(mean + torch.exp(0.5 * log_variance) * noise, y)
    torch.testing.assert_close(
        made.loss(features, x, y, noise), 0.5 * (out - x.flatten(1)).square().sum(1) + divergence
    )
    bernoulli = generator(likelihood="bernoulli")
    assert bool(((images := bernoulli.generate(noise, y)) >= 0).all())
    assert images.shape == (7, 2, 2)


def test_each_class_switches_off_its_own_units() -> None:
    """The gates of a class depend on its number only, so new classes do not change them. A gated unit has no effect."""
    made, z = generator(), torch.randn(1, 3)
    before = [made.decode(z, torch.tensor([label])) for label in range(3)]
    gates = made.get_buffer("gates").clone()
    assert 0.35 < float(gates.mean()) < 0.65
    off = int((gates[1, 0] == 0).nonzero()[0])
    with torch.no_grad():
        made.decode_hidden.bias[off] += 100
    after = [made.decode(z, torch.tensor([label])) for label in range(3)]
    assert torch.equal(before[0], after[0])
    made.grow(5)
    assert torch.equal(made.get_buffer("gates")[:, :3], gates)
    assert torch.equal(made.decode(z, torch.tensor([0])), after[0])
    assert made.prior_mean.shape == (5, 3)


def test_soft_targets_need_the_squared_temperature() -> None:
    """For large T, T^2 times the gradient of soft targets is that of matched logits (Hinton et al. 2015)."""
    logits, target = torch.randn(1, 4, dtype=torch.float64), torch.randn(1, 4, dtype=torch.float64)
    logits, target = logits - logits.mean(), target - target.mean()
    logits.requires_grad_()
    temperature = 1e4
    soft = torch.softmax(target / temperature, 1)
    loss = -(temperature**2) * (soft * functional.log_softmax(logits / temperature, 1)).sum()
    (gradient,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(gradient, (logits - target).detach() / 4, rtol=1e-3, atol=1e-4)
