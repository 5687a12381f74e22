"""Networks that isolate tasks: PackNet and progressive networks."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from streamlearn.core.errors import StreamlearnError
from streamlearn.learning.models.mlp import MLP
from streamlearn.learning.models.resnet import ResNet
from streamlearn.learning.strategies.packnet import FREE, PackedNetwork
from streamlearn.learning.strategies.pnn import INITIAL_SCALE, Columns, ProgressiveNetwork
from streamlearn.learning.strategies.slots import BuildContext, EndedTask

LIMIT = 10**9


def context(build: Any = None, shape: tuple[int, ...] = (6,), tasks: tuple[str, ...] = ()) -> BuildContext:
    """Return a build context for small networks with four outputs."""

    def built(num_outputs: int, offset: int = 0) -> nn.Module:
        torch.manual_seed(offset)
        made: nn.Module = MLP(shape, num_outputs, [8, 7]) if build is None else build()
        return made

    return BuildContext(0, torch.device("cpu"), shape, 4, 1 << 20, lambda x: x, built, 4, tasks)


def ended_task(network: PackedNetwork, task: int, samples: int = 5) -> EndedTask:
    """Return an ended task with two outputs of its own."""
    active = torch.zeros(task + 1, 4, dtype=torch.bool)
    active[task, 2 * (task % 2) : 2 * (task % 2) + 2] = True
    x, y = torch.randn(samples, 6), torch.zeros(samples, dtype=torch.int64)
    params = list(network.module.parameters())
    return EndedTask(task, x, y, params, network.module, active, [], torch.Generator())


def test_packnet_keeps_the_largest_free_weights() -> None:
    """In each layer the smallest free weights are set to zero and stay free; the task owns the others."""
    network = PackedNetwork(context(), prune=0.75, samples=9)
    first = dict(network.module.named_parameters())["net.body.0.weight"].detach().clone()
    network.begin_task(0, [])
    network.begin_refinement(ended_task(network, 0))
    weight, owner = (
        dict(network.module.named_parameters())["net.body.0.weight"],
        network.module.owners("net.body.0.weight"),
    )
    kept = owner == 0
    assert int(kept.sum()) == 12  # a quarter of 48
    assert float(first[kept].abs().min()) >= float(first[~kept].abs().max())
    assert torch.equal(weight[kept], first[kept])
    assert weight[~kept].abs().max() == 0
    assert (owner[~kept] == FREE).all()


def test_packnet_leaves_head_rows_of_other_outputs_free() -> None:
    """A task does not own head weights of outputs that are not its own."""
    network = PackedNetwork(context(), prune=0.5, samples=9)
    network.begin_refinement(ended_task(network, 0))
    owned = (network.module.owners("net.head.weight") == 0).sum(1).tolist()
    assert sum(owned[:2]) == 7
    assert owned[2:] == [0, 0]


def test_packnet_finds_the_head_by_its_whole_name() -> None:
    """In a layer whose name only ends with `head`, a task can own weights of every row."""
    layers: OrderedDict[str, nn.Module] = OrderedDict(value_head=nn.Linear(6, 6), head=nn.Linear(6, 4))
    network = PackedNetwork(context(lambda: nn.Sequential(layers)), prune=0.5, samples=9)
    network.begin_refinement(ended_task(network, 0, samples=9))
    shares = {name: int((network.module.owners(name) == 0).sum()) for name in network.module.packed}
    assert shares == {"net.value_head.weight": 18, "net.head.weight": 6}


def test_packnet_reports_free_weights_and_raises_without_any() -> None:
    """The share of free weights is a metric. When no weight is free, the error names the layer."""
    network = PackedNetwork(context(), prune=0.5, samples=9)
    left = []
    for task in range(2):
        network.begin_task(task, [])
        network.begin_refinement(ended_task(network, task))
        left.append(network.metrics()["free_ratio"])
    assert 1 > left[0] > left[1] > 0
    for name in network.module.packed:
        network.module.owners(name).fill_(0)
    with pytest.raises(StreamlearnError, match=r"no weight of layer body\.0 is free any more"):
        network.begin_task(2, [])


def test_a_task_without_samples_owns_nothing() -> None:
    """After a task without a usable sample, all weights are free, and the next task trains the biases."""
    network = PackedNetwork(context(), prune=0.5, samples=9)
    network.begin_refinement(ended_task(network, 0, samples=0))
    assert network.metrics()["free_ratio"] == 1
    network.begin_task(1, [])
    assert all(bool(mask.all()) for mask in network.trainable_entries().values())


class Averaging(nn.Module):
    """A model with batch statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        out: Tensor = self.net(x)
        return out


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: nn.Sequential(nn.Flatten(), nn.LayerNorm(6)), "the model has no layer that it can mask"),
        (Averaging, "keeps statistics of batches"),
    ],
)
def test_packnet_refuses_unsupported_models(build: Any, message: str) -> None:
    """A model without a layer that can be masked, or with batch statistics, is refused when it is built."""
    with pytest.raises(StreamlearnError, match=message) as caught:
        PackedNetwork(context(build), prune=0.5, samples=9)
    assert caught.value.exit_code == 78


def test_a_column_follows_its_equation() -> None:
    """Layer i of column 1 is W h + scale * U h', where h' is that layer's input in column 0; the first has no such term."""
    network = ProgressiveNetwork(context(), max_parameters=LIMIT)
    network.begin_task(1, [])
    first: Any
    second: Any
    first, second = network.module.columns
    x = torch.randn(5, 6)
    h0 = x @ first.body[0].layer.weight.T + first.body[0].layer.bias
    h1 = x @ second.body[0].layer.weight.T + second.body[0].layer.bias
    for name in ("body.2", "head"):
        old, new = first.get_submodule(name), second.get_submodule(name)
        h0, h1 = h0.relu(), h1.relu()
        lateral = INITIAL_SCALE * h0 @ new.adapters[0].weight.T
        h0, h1 = h0 @ old.layer.weight.T + old.layer.bias, h1 @ new.layer.weight.T + new.layer.bias + lateral
    torch.testing.assert_close(network.forward(x, torch.tensor([1] * 5)), h1)
    torch.testing.assert_close(network.forward(x, torch.tensor([0, 1, 1, 0, 1])), torch.where(
        torch.tensor([[True], [False], [False], [True], [False]]), h0, h1))  # fmt: skip


@pytest.mark.parametrize("build", [None, lambda: ResNet([8, 8], 4, 4)], ids=["mlp", "resnet"])
def test_parameter_limit_counts_all_columns(build: Any) -> None:
    """`max_parameters` is compared with exactly the number of parameters that the columns will have."""
    shape = (6,) if build is None else (8, 8)
    network = ProgressiveNetwork(context(build, shape), max_parameters=LIMIT)
    network.begin_task(2, [])
    count = int(network.metrics()["parameters"])
    assert isinstance(network.module, Columns)
    exact = ProgressiveNetwork(context(build, shape), max_parameters=count)
    exact.begin_task(2, [])
    with pytest.raises(StreamlearnError, match=f"max_parameters is {count - 1}, and 3 columns have {count} parameters"):
        ProgressiveNetwork(context(build, shape), max_parameters=count - 1).begin_task(2, [])
    with pytest.raises(StreamlearnError, match=r"task c: strategy\.pnn\.max_parameters"):
        ProgressiveNetwork(context(build, shape, ("a", "b", "c")), max_parameters=count - 1)


def test_only_the_newest_column_is_trained() -> None:
    """Earlier columns are frozen and stay in evaluation mode when the network is put into training mode."""
    network = ProgressiveNetwork(context(), max_parameters=LIMIT)
    network.begin_task(1, [])
    assert all(name.startswith("columns.1.") for name in network.trainable_parameters())
    assert [column.training for column in network.module.train().columns] == [False, True]


def test_a_layer_that_is_used_twice_is_refused() -> None:
    """Lateral connections are defined only for layers that are used once."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)
            self.head = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.layer(self.layer(x)))
            return out

    with pytest.raises(StreamlearnError, match="each used once; found 2 of them, used 3 times"):
        ProgressiveNetwork(context(Twice), max_parameters=LIMIT)
