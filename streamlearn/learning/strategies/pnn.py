"""Progressive neural networks: Rusu et al. 2016, "Progressive neural networks".

Each task has a column, a network of its own; the columns of earlier tasks are frozen. Layer i of column k gets the input of
layer i in its own column and in every earlier one (eq. 1):
h_i^(k) = f(W_i^(k) h_{i-1}^(k) + sum_{j<k} s_i^(k:j) U_i^(k:j) h_{i-1}^(j)), with a learned scale s that is small at first.
Linear and convolution layers, except the first, have lateral connections. All other layers only see their own column.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from streamlearn.core.errors import ConfigurationError
from streamlearn.learning.models.modes import eval_mode, global_seed
from streamlearn.learning.strategies.slots import BuildContext, Network, State

if TYPE_CHECKING:
    from collections.abc import Sequence

CONNECTED_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)
INITIAL_SCALE = 0.1  # of lateral connections


class LateralLayer(nn.Module):
    """A layer of a column, with lateral connections from the inputs of the same layer in each earlier column."""

    def __init__(self, layer: nn.Module, earlier: Sequence[LateralLayer]) -> None:
        super().__init__()
        self.layer = layer
        self.earlier = tuple(earlier)  # a tuple, so that their parameters are registered in their own columns only
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
    """The columns; `columns[k]` computes the logits of task k."""

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
                module.layer_input = None  # the autograd graph must neither live longer than its step nor be copied
        return logits

    def train(self, mode: bool = True) -> Columns:  # noqa: FBT001, FBT002 - torch's own signature
        super().train(mode)
        for column in self.columns[:-1]:
            column.eval()
        return self


class ProgressiveNetwork(Network):
    """Adds a column for each task. The parameters grow with the square of the number of tasks, up to `max_parameters`."""

    supports_forward_transfer = False  # a task has no column before it begins
    module: Columns

    def __init__(self, context: BuildContext, *, max_parameters: int) -> None:
        super().__init__(Columns())
        self.context = context
        self.max_parameters = max_parameters
        self._add_column()
        # if the configuration lists the tasks, a limit that is too low is an error at the start
        for task, name in enumerate(context.task_names):
            self._check_parameter_limit(task, f"task {name}: ")

    def begin_task(self, task: int, params: Sequence[Tensor]) -> None:
        del params
        self._check_parameter_limit(task, "")
        while len(self.module.columns) <= task:
            self._add_column()

    def forward(self, x: Tensor, task: Tensor) -> Tensor:
        tasks = task.unique().tolist()
        if len(tasks) == 1:
            return self.module(x, tasks[0])  # type: ignore[no-any-return]  # modules are typed to return anything
        logits = torch.zeros(len(x), self.context.num_outputs, device=x.device)
        for one in tasks:
            rows = (task == one).to(x.device)
            logits[rows] = self.module(x[rows], one)
        return logits

    def state_dict(self) -> State:
        return {"columns": len(self.module.columns)}

    def load_state_dict(self, state: State) -> None:
        while len(self.module.columns) < state["columns"]:
            self._add_column()

    def _add_column(self) -> None:
        """Freeze the existing columns and add one; its number and the seed decide all its initial weights."""
        number = len(self.module.columns)
        self.module.columns.requires_grad_(requires_grad=False)
        with global_seed(self.context.seed + number):
            column = self.context.build_network(self.context.num_outputs, number)
            add_lateral_connections(column, self.context, list(self.module.columns))
        self.module.columns.append(column.to(self.context.device))
        self.module.columns[:-1].eval()

    def _check_parameter_limit(self, task: int, prefix: str) -> None:
        """Raise `ConfigurationError` if the columns up to this task's need more than `max_parameters`."""
        own = sum(param.numel() for param in self.module.columns[0].parameters())
        layers = [m for m in self.module.columns[0].modules() if isinstance(m, LateralLayer)][1:]
        lateral = sum(next(layer.layer.parameters()).numel() + 1 for layer in layers)  # the weights, and a scale
        total = (task + 1) * own + task * (task + 1) // 2 * lateral
        if total > self.max_parameters:
            raise ConfigurationError(
                f"{prefix}strategy.pnn.max_parameters is {self.max_parameters}, and {task + 1} columns have {total} "
                "parameters; raise it, or use a smaller model",
            )


def add_lateral_connections(column: nn.Module, context: BuildContext, earlier: Sequence[nn.Module]) -> None:
    """Connect a column's layers to the inputs of the same layers in earlier columns, in place.

    Raises `ConfigurationError` for a network that has no such layers, or that does not use each of them exactly once.
    """
    called: list[nn.Module] = []
    layers = {name: m for name, m in column.named_modules() if isinstance(m, CONNECTED_LAYERS)}
    handles = [m.register_forward_hook(lambda layer, _in, _out: called.append(layer)) for m in layers.values()]
    with torch.no_grad(), eval_mode(column):
        column(context.zero_inputs(2))
    for handle in handles:
        handle.remove()
    if not layers or len(called) != len(layers) or len({id(layer) for layer in called}) != len(layers):
        raise ConfigurationError(
            "strategy.pnn: the model must have linear or convolution layers, each used once; "
            f"found {len(layers)} of them, used {len(called)} times",
        )
    others = [{name: m for name, m in one.named_modules() if isinstance(m, LateralLayer)} for one in earlier]
    for name, layer in layers.items():
        parent, _, last = name.rpartition(".")
        # the first layer has no lateral connections: its input is the same in all columns
        sources = [] if layer is called[0] else [other[name] for other in others]
        setattr(column.get_submodule(parent), last, LateralLayer(layer, sources))
    if not earlier:
        try:
            with torch.no_grad(), eval_mode(column):
                column(context.zero_inputs(2))
        except Exception as error:  # a model may use attributes of its layers that a `LateralLayer` does not have
            raise ConfigurationError(f"strategy.pnn: cannot connect the model's layers: {error}") from error
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
