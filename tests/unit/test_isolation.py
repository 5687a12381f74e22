"""Networks that isolate tasks: PackNet's ownership and progressive networks' columns."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from streamlearn.data import StreamlearnError
from streamlearn.models.mlp import MLP
from streamlearn.models.resnet import ResNet
from streamlearn.strategies.packnet import FREE, PackedNetwork
from streamlearn.strategies.pnn import INITIAL_SCALE, Columns, ProgressiveNetwork
from streamlearn.strategies.slots import BuildContext, EndedTask

LIMIT = 10**9


def context(build: Any = None, shape: tuple[int, ...] = (6,), tasks: tuple[str, ...] = ()) -> BuildContext:
    """Return a context of small networks with four outputs."""

    def built(num_outputs: int, offset: int = 0) -> nn.Module:
        torch.manual_seed(offset)
        made: nn.Module = MLP(shape, num_outputs, [8, 7]) if build is None else build()
        return made

    return BuildContext(0, torch.device("cpu"), shape, 4, 1 << 20, lambda x: x, built, 4, tasks)


def ended_task(network: PackedNetwork, task: int, samples: int = 5) -> EndedTask:
    """Return the end of a task with two outputs of its own."""
    allowed = torch.zeros(task + 1, 4, dtype=torch.bool)
    allowed[task, 2 * (task % 2) : 2 * (task % 2) + 2] = True
    x, y = torch.randn(samples, 6), torch.zeros(samples, dtype=torch.int64)
    params = list(network.module.parameters())
    return EndedTask(task, x, y, params, network.module, allowed, [], torch.Generator())


def test_packnet_keeps_the_largest_of_what_is_free() -> None:
    """Of each layer's free weights the smallest are zeroed and stay free; the rest belongs to the task."""
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


def test_packnet_leaves_the_rows_of_other_outputs_free() -> None:
    """Weights of outputs that a task never uses are not claimed by it."""
    network = PackedNetwork(context(), prune=0.5, samples=9)
    network.begin_refinement(ended_task(network, 0))
    owned = (network.module.owners("net.head.weight") == 0).sum(1).tolist()
    assert sum(owned[:2]) == 7
    assert owned[2:] == [0, 0]


def test_packnet_knows_the_head_by_its_whole_name() -> None:
    """A layer whose name merely ends like the head's is shared out whole."""
    layers: OrderedDict[str, nn.Module] = OrderedDict(value_head=nn.Linear(6, 6), head=nn.Linear(6, 4))
    network = PackedNetwork(context(lambda: nn.Sequential(layers)), prune=0.5, samples=9)
    network.begin_refinement(ended_task(network, 0, samples=9))
    shares = {name: int((network.module.owners(name) == 0).sum()) for name in network.module.packed}
    assert shares == {"net.value_head.weight": 18, "net.head.weight": 6}


def test_packnet_says_what_is_left_and_ends_when_nothing_is() -> None:
    """Capacity left is a figure, and running out an error that names the layer."""
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


def test_a_task_without_samples_claims_nothing() -> None:
    """A task that ended before a usable sample came leaves all weights free, and biases to the next."""
    network = PackedNetwork(context(), prune=0.5, samples=9)
    network.begin_refinement(ended_task(network, 0, samples=0))
    assert network.metrics()["free_ratio"] == 1
    network.begin_task(1, [])
    assert all(bool(learns.all()) for learns in network.trainable_entries().values())


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
def test_packnet_refuses_what_it_cannot_mask(build: Any, message: str) -> None:
    """A model without a layer that can be masked is refused when it is built."""
    with pytest.raises(StreamlearnError, match=message) as caught:
        PackedNetwork(context(build), prune=0.5, samples=9)
    assert caught.value.code == 78


def test_a_column_is_its_equation() -> None:
    """Layer i of column 1 is W h + scale * U h', h' the input of the same layer in column 0; the first has no lateral."""
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
def test_columns_count_as_announced(build: Any) -> None:
    """The limit is compared with the very number of parameters that the columns then have."""
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


def test_only_the_newest_column_learns() -> None:
    """Earlier columns are frozen and stay in evaluation mode, whatever mode the network is put into."""
    network = ProgressiveNetwork(context(), max_parameters=LIMIT)
    network.begin_task(1, [])
    assert all(name.startswith("columns.1.") for name in network.trainable_parameters())
    assert [column.training for column in network.module.train().columns] == [False, True]


def test_a_layer_that_is_used_twice_is_refused() -> None:
    """Lateral connections are defined for layers that are used once."""

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
