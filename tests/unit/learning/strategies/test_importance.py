"""Importances compared with their definitions, computed in a slow and simple way."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from streamlearn.learning.models.mlp import MLP
from streamlearn.learning.models.resnet import ResNet
from streamlearn.learning.strategies.ewc import FisherImportance
from streamlearn.learning.strategies.gradient_moments import gradient_moments
from streamlearn.learning.strategies.l2 import UniformImportance
from streamlearn.learning.strategies.mas import OutputSensitivity
from streamlearn.learning.strategies.penalty import ImportancePenalty
from streamlearn.learning.strategies.rwalk import RiemannianWalk
from streamlearn.learning.strategies.si import PathIntegral
from streamlearn.learning.strategies.slots import BuildContext, EndedTask
from streamlearn.learning.tensors import dense
from tests.support import awkward


def context(shape: tuple[int, ...]) -> BuildContext:
    """Return a build context for small networks."""
    return BuildContext(0, torch.device("cpu"), shape, 3, 1 << 20, lambda x: x, lambda _: nn.Identity())


def ended_task(network: nn.Module, x: Tensor, y: Tensor) -> EndedTask:
    """Return an ended task in which the last output is not active."""
    active = torch.tensor([[True, True, False]])
    return EndedTask(0, x, y, list(network.parameters()), network, active, [[0, 1]], torch.Generator().manual_seed(0))


def slow_fisher(network: nn.Module, x: Tensor, y: Tensor, *, exact: bool) -> list[Tensor]:
    """Return the mean of per-sample squared gradients, one sample and label at a time."""
    total = [torch.zeros_like(param) for param in network.parameters()]
    for one, label in zip(x, y.tolist(), strict=True):
        log_probabilities = functional.log_softmax(network(one[None])[:, :2], 1)[0]
        for output in range(2) if exact else [label]:
            grads = torch.autograd.grad(log_probabilities[output], list(network.parameters()), retain_graph=True)
            weight = log_probabilities[output].exp().detach() if exact else 1.0
            total = [sum_ + weight * grad.square() for sum_, grad in zip(total, grads, strict=True)]
    return [sum_ / len(x) for sum_ in total]


NETWORKS = [
    pytest.param(lambda: MLP([5], 3, [7, 6]), (5,), id="mlp, in closed form"),
    pytest.param(lambda: ResNet([8, 8], 3, 4), (8, 8), id="resnet, in closed form"),
]


@pytest.mark.parametrize(("build", "shape"), NETWORKS)
@pytest.mark.parametrize("kind", ["exact", "empirical"])
def test_fisher_is_the_mean_of_squared_gradients_of_samples(
    build: type[nn.Module], shape: tuple[int, ...], kind: str
) -> None:
    """The Fisher diagonal is the mean of each sample's squared gradient, not the square of the mean gradient."""
    torch.manual_seed(0)
    network, x, y = build(), torch.randn(9, *shape), torch.randint(0, 2, (9,))
    actual = FisherImportance(context(shape), kind=kind, samples=9).compute(ended_task(network, x, y))
    expected = slow_fisher(network, x, y, exact=kind == "exact")
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def test_sampled_fisher_approximates_exact_fisher() -> None:
    """With one drawn label for each of many samples, the result is close to the expectation over all labels."""
    torch.manual_seed(0)
    network, x, y = MLP([5], 3, [6]), torch.randn(20_000, 5), torch.zeros(20_000, dtype=torch.int64)
    exact, sampled = (
        FisherImportance(context((5,)), kind=kind, samples=1).compute(ended_task(network, x, y))[0]
        for kind in ("exact", "sampled")
    )
    assert float((exact - sampled).norm() / exact.norm()) < 0.05


def test_fisher_does_not_change_the_network() -> None:
    """Computing the Fisher information leaves no gradient and no hook, and restores the mode."""
    network = MLP([5], 3, [6])
    FisherImportance(context((5,)), kind="exact", samples=1).compute(
        ended_task(network, torch.randn(4, 5), torch.zeros(4, dtype=torch.int64))
    )
    assert network.training
    assert all(param.grad is None for param in network.parameters())
    assert all(not module._forward_hooks for module in network.modules())


def test_path_integral_is_the_decrease_of_the_loss() -> None:
    """For a quadratic loss and small steps, the sum of all path integrals is the decrease of the loss."""
    param = torch.tensor([3.0, -2.0])
    scale = torch.tensor([1.0, 4.0])
    importance = PathIntegral(context((1,)), xi=0.1)
    importance.begin_task([param])
    first_loss, finite = float((scale * param.square()).sum() / 2), torch.tensor(data=True)
    for _ in range(20_000):
        gradient = scale * param
        importance.see_gradient([gradient])
        param -= 1e-3 * gradient
        importance.after_step([param], finite)
    assert float(importance.path[0].sum()) == pytest.approx(first_loss, rel=0.01)
    network = nn.Linear(1, 1)
    end = EndedTask(0, torch.empty(0), torch.empty(0), [param], network, torch.empty(0), [], torch.Generator())
    moved = torch.tensor([3.0, -2.0]) - param
    torch.testing.assert_close(importance.compute(end)[0], importance.path[0] / (moved.square() + 0.1))


@pytest.mark.parametrize("anchor", ["all", "last"])
def test_added_gradient_is_that_of_the_penalty(anchor: str) -> None:
    """The closed form equals autograd on the sum of one parabola for each task, around its own or the last parameters."""
    torch.manual_seed(0)
    penalty = ImportancePenalty(
        context((5,)),
        FisherImportance(context((5,)), kind="exact", samples=8),
        3.0,
        anchor=anchor,
        decay=0.5,
        proximal=False,
    )
    importances: list[list[Tensor]] = []
    anchors: list[list[Tensor]] = []
    for _ in range(3):
        network = MLP([5], 3, [6])
        end = ended_task(network, torch.randn(8, 5), torch.zeros(8, dtype=torch.int64))
        importances = [[0.5 * value for value in task] for task in importances]
        importances.append(penalty.importance.compute(end))
        anchors.append([param.detach().clone() for param in network.parameters()])
        penalty.end_task(end)
    params = [param.detach().clone().requires_grad_() for param in MLP([5], 3, [6]).parameters()]
    centres = anchors if anchor == "all" else [anchors[-1]] * 3
    parabolas = [
        (1.5 * b * (param - centre).square()).sum()
        for task, where in zip(importances, centres, strict=True)
        for b, param, centre in zip(task, params, where, strict=True)
    ]
    expected = torch.autograd.grad(torch.stack(parabolas).sum(), params)
    actual = [torch.zeros_like(param) for param in params]
    penalty.add_gradient(params, actual)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_proximal_step_is_stable_at_any_strength() -> None:
    """Even at a huge strength, the step ends between the parameter and its anchor."""
    penalty = ImportancePenalty(
        context((1,)), PathIntegral(context((1,)), xi=0.1), 1e12, anchor="last", decay=1.0, proximal=True
    )
    penalty.precision, penalty.weighted_anchor = [torch.tensor([2.0, 0.0])], [torch.tensor([2.0, 0.0])]
    param = torch.tensor([5.0, 5.0])
    penalty.proximal_step([param], 0.1, torch.tensor(data=True))
    torch.testing.assert_close(param, torch.tensor([1.0, 5.0]))


def slow_sensitivity(network: nn.Module, x: Tensor) -> list[Tensor]:
    """Return the mean over samples of the absolute gradient of the squared norm of the first two outputs."""
    total = [torch.zeros_like(param) for param in network.parameters()]
    for one in x:
        grads = torch.autograd.grad(network(one[None])[:, :2].square().sum(), list(network.parameters()))
        total = [sum_ + grad.abs() for sum_, grad in zip(total, grads, strict=True)]
    return [sum_ / len(x) for sum_ in total]


@pytest.mark.parametrize(("build", "shape"), NETWORKS)
def test_sensitivity_is_the_mean_of_gradient_magnitudes_of_samples(
    build: type[nn.Module], shape: tuple[int, ...]
) -> None:
    """MAS takes each sample's magnitude before the mean, and uses only the task's active outputs."""
    torch.manual_seed(0)
    network, x = build(), torch.randn(9, *shape)
    end = ended_task(network, x, torch.zeros(9, dtype=torch.int64))
    actual = OutputSensitivity(context(shape), samples=9).compute(end)
    for one, other in zip(actual, slow_sensitivity(network, x), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


class Positions(nn.Module):
    """Linear and normalising layers over several positions, a strided convolution, and a layer without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, stride=2, padding=1, dilation=1)
        self.group = nn.GroupNorm(2, 4)
        self.norm = nn.LayerNorm(4)
        self.mix = nn.Linear(4, 3, bias=False)
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits `[B, 3]` for `x [B, 2, 6, 6]`."""
        h = self.group(self.conv(x)).relu().flatten(2).transpose(1, 2)
        out: Tensor = self.head(torch.tanh(self.mix(self.norm(h))).mean(1))
        return out


class Shared(nn.Module):
    """A model that uses a layer twice, so that the closed form does not hold."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        out: Tensor = self.head(torch.tanh(self.layer(torch.tanh(self.layer(x)))))
        return out


OWN = [
    pytest.param(lambda kind=kind: nn.Sequential(awkward.make([12], 3, kind=kind)), (12,), id=kind)
    for kind in awkward.MAKERS
]


@pytest.mark.parametrize(("build", "shape"), [(Positions, (2, 6, 6)), (Shared, (5,)), (nn.Identity, (3,)), *OWN])
@pytest.mark.parametrize("power", [1, 2])
def test_gradient_moments_equal_those_of_a_loop(build: type[nn.Module], shape: tuple[int, ...], power: int) -> None:
    """The gradient moments, in closed form or from single samples, equal those of a loop over samples."""
    torch.manual_seed(0)
    network = nn.Sequential(build(), nn.Linear(3, 3)).eval()
    x, y, weight = torch.randn(7, *shape), torch.randint(0, 3, (7,)), torch.rand(7)

    def losses(logits: Tensor, label: Tensor) -> Tensor:
        return functional.cross_entropy(logits, label, reduction="none")

    trained = [param for param in network.parameters() if param.requires_grad]
    expected = [torch.zeros_like(param) for param in trained]
    for one, label, w in zip(x, y, weight, strict=True):
        loss = losses(network(one[None]), label[None]).sum()
        found = torch.autograd.grad(loss, trained, allow_unused=True)
        grads = [dense(grad, param) for grad, param in zip(found, trained, strict=True)]
        expected = [sum_ + w * grad.abs() ** power for sum_, grad in zip(expected, grads, strict=True)]
    for actual, other in zip(gradient_moments(network, x, y, weight, losses, power), expected, strict=True):
        torch.testing.assert_close(actual, other, rtol=1e-4, atol=1e-6)


def test_riemannian_walk_follows_its_equations() -> None:
    """The importance equals a plain loop over the equations, with a last interval that is not complete."""
    torch.manual_seed(0)
    keep, interval, size = 0.8, 3, 6
    importance = RiemannianWalk(context((1,)), keep=keep, interval=interval)
    param, finite, past = torch.randn(size), torch.tensor(data=True), torch.zeros(size)
    fisher = torch.zeros(size)
    for task in range(2):
        importance.begin_task([param])
        score, decrease, mark = torch.zeros(size), torch.zeros(size), param.clone()
        for step in range(1, 8):
            gradient, before = torch.randn(size), param.clone()
            importance.see_gradient([gradient])
            param -= 0.1 * torch.randn(size)
            importance.after_step([param], finite)
            fisher = keep * fisher + (1 - keep) * 1 * gradient.square()  # a batch of one
            decrease += gradient * (before - param)
            if step % interval == 0 or step == 7:
                score += decrease.relu() / (0.5 * fisher * (param - mark).square() + importance.epsilon)
                decrease, mark = torch.zeros(size), param.clone()
        past = score / score.max() if task == 0 else (past + score / score.max()) / 2
        end = EndedTask(
            task, torch.empty(0), torch.empty(0), [param], nn.Identity(), torch.empty(0), [], torch.Generator()
        )
        torch.testing.assert_close(importance.compute(end)[0], fisher / fisher.max() + past)


def test_l2_has_the_same_importance_for_every_parameter() -> None:
    """After any number of tasks, the importance is 1 and the anchor is the parameters after the last task."""
    penalty = ImportancePenalty(context((5,)), UniformImportance(), 3.0, anchor="last", decay=0.0, proximal=False)
    for _ in range(3):
        network = MLP([5], 3, [6])
        penalty.end_task(ended_task(network, torch.randn(8, 5), torch.zeros(8, dtype=torch.int64)))
    anchors = list(network.parameters())
    moved = [anchor + 0.5 for anchor in anchors]
    grads = [torch.zeros_like(param) for param in moved]
    penalty.add_gradient(moved, grads)
    for grad in grads:
        torch.testing.assert_close(grad, torch.full_like(grad, 1.5))
