"""Progressive neural networks: Rusu et al. 2016, "Progressive neural networks".

A column for each task, all earlier ones frozen. Layer i of column k sees its own column and every earlier one (eq. 1):
h_i^(k) = f(W_i^(k) h_{i-1}^(k) + sum_{j<k} s_i^(k:j) U_i^(k:j) h_{i-1}^(j)), with a learned scale s that begins small.
Linear and convolution layers but the first have lateral connections; every other layer is its column's own.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from streamlearn.data import StreamlearnError
from streamlearn.models.modes import eval_mode, global_seed
from streamlearn.strategies.slots import BuildContext, Network, State

if TYPE_CHECKING:
    from collections.abc import Sequence

CONNECTED_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)
INITIAL_SCALE = 0.1  # of lateral connections, at first


class LateralLayer(nn.Module):
    """A layer of a column, with what it sees of the same layer's input in each earlier column."""

    def __init__(self, layer: nn.Module, earlier: Sequence[LateralLayer]) -> None:
        super().__init__()
        self.layer = layer
        self.earlier = tuple(earlier)  # in a tuple, so that they stay the parameters of their own columns
        self.adapters = nn.ModuleList(_adapter(layer) for _ in earlier)
        self.scales = nn.Parameter(torch.full((len(earlier),), INITIAL_SCALE)) if earlier else None
        self.layer_input: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.layer_input = x
        out: Tensor = self.layer(x)
        for place, (adapter, other) in enumerate(zip(self.adapters, self.earlier, strict=True)):
            assert self.scales is not None
            out = out + self.scales[place] * adapter(other.layer_input)
        return out


class Columns(nn.Module):
    """The columns; `columns[k]` answers for task k."""

    def __init__(self) -> None:
        super().__init__()
        self.columns = nn.ModuleList()

    def forward(self, x: Tensor, task: int) -> Tensor:
        """Return the logits `[B, C]` of a task's column for `x [B, ...]`."""
        with torch.no_grad():
            for column in self.columns[:task]:
                column(x)
        logits: Tensor = self.columns[task](x)
        for module in self.modules():
            if isinstance(module, LateralLayer):
                module.layer_input = None  # a graph must not outlive its step, nor be copied
        return logits

    def train(self, mode: bool = True) -> Columns:  # noqa: FBT001, FBT002 - torch's own signature
        super().train(mode)
        for column in self.columns[:-1]:
            column.eval()
        return self


class ProgressiveNetwork(Network):
    """A column a task. Parameters grow with the square of the number of tasks, up to `max_parameters`."""

    supports_forward_transfer = False  # a task has no column before it begins
    module: Columns

    def __init__(self, context: BuildContext, *, max_parameters: int) -> None:
        super().__init__(Columns())
        self.context = context
        self.max_parameters = max_parameters
        self._add_column()
        for number, name in enumerate(
            context.task_names
        ):  # where all tasks are listed, room for them is known before the first
            self._check_parameter_limit(number, f"task {name}: ")

    def begin_task(self, task: int, params: Sequence[Tensor]) -> None:
        del params
        self._check_parameter_limit(task, "")
        while len(self.module.columns) <= task:
            self._add_column()

    def forward(self, x: Tensor, task: Tensor) -> Tensor:
        found = task.unique().tolist()
        if len(found) == 1:
            return self.module(x, found[0])  # type: ignore[no-any-return]  # modules are typed to return anything
        logits = torch.zeros(len(x), self.context.num_outputs, device=x.device)
        for number in found:
            rows = (task == number).to(x.device)
            logits[rows] = self.module(x[rows], number)
        return logits

    def state_dict(self) -> State:
        return {"columns": len(self.module.columns)}

    def load_state_dict(self, state: State) -> None:
        while len(self.module.columns) < state["columns"]:
            self._add_column()

    def _add_column(self) -> None:
        """Freeze the columns and add one, its lateral connections and weights seeded by its number."""
        number = len(self.module.columns)
        self.module.columns.requires_grad_(requires_grad=False)
        with global_seed(self.context.seed + number):
            column = self.context.build_network(self.context.num_outputs, number)
            add_lateral_connections(column, self.context, list(self.module.columns))
        self.module.columns.append(column.to(self.context.device))
        self.module.columns[:-1].eval()

    def _check_parameter_limit(self, task: int, who: str) -> None:
        own = sum(param.numel() for param in self.module.columns[0].parameters())
        layers = [m for m in self.module.columns[0].modules() if isinstance(m, LateralLayer)][1:]
        lateral = sum(next(layer.layer.parameters()).numel() + 1 for layer in layers)  # its weights, and a scale
        total = (task + 1) * own + task * (task + 1) // 2 * lateral
        if total > self.max_parameters:
            raise StreamlearnError(
                f"{who}strategy.pnn.max_parameters is {self.max_parameters}, and {task + 1} columns have {total} parameters",
                code=78,
            )


def add_lateral_connections(column: nn.Module, context: BuildContext, earlier: Sequence[nn.Module]) -> None:
    """Give a column's layers their lateral connections to the same layers of earlier columns.

    Raises `StreamlearnError` (78) for a network without such layers, or with one that is used more or less than once.
    """
    called: list[nn.Module] = []
    layers = {name: m for name, m in column.named_modules() if isinstance(m, CONNECTED_LAYERS)}
    handles = [m.register_forward_hook(lambda layer, _in, _out: called.append(layer)) for m in layers.values()]
    with torch.no_grad(), eval_mode(column):
        column(context.zero_inputs(2))
    for handle in handles:
        handle.remove()
    if not layers or len(called) != len(layers) or len({id(layer) for layer in called}) != len(layers):
        raise StreamlearnError(
            f"strategy.pnn: needs a network of linear and convolution layers, each used once; found {len(layers)} of them, "
            f"used {len(called)} times",
            code=78,
        )
    others = [{name: m for name, m in one.named_modules() if isinstance(m, LateralLayer)} for one in earlier]
    for name, layer in layers.items():
        parent, _, last = name.rpartition(".")
        seen = [] if layer is called[0] else [other[name] for other in others]  # all columns have the same input
        setattr(column.get_submodule(parent), last, LateralLayer(layer, seen))
    if not earlier:
        try:
            with torch.no_grad(), eval_mode(column):
                column(context.zero_inputs(2))
        except Exception as error:  # a model may want of its layers what only they have
            raise StreamlearnError(f"strategy.pnn: cannot connect the model's layers: {error}", code=78) from error
        for module in column.modules():
            if isinstance(module, LateralLayer):
                module.layer_input = None


def _adapter(layer: nn.Module) -> nn.Module:
    """Return an untrained layer of the same shape, without a bias."""
    adapter = copy.deepcopy(layer)
    assert isinstance(adapter, CONNECTED_LAYERS)
    adapter.register_parameter("bias", None)
    adapter.reset_parameters()
    return adapter
