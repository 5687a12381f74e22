"""The outputs that take part in the softmax of each task, and the label of each output."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from streamlearn.learning.tensors import padded

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from streamlearn.core.labels import Label
    from streamlearn.core.scenario import Scenario
    from streamlearn.core.tasks import Task


class ActiveOutputs:
    """Masks of the active outputs: one row per task, or one row for all tasks if they share it.

    Tasks and labels are append-only, so an update costs what is new, not tasks times labels.
    """

    def __init__(self, scenario: Scenario, num_outputs: int, device: torch.device) -> None:
        self.scenario = scenario
        self._initial_outputs = num_outputs
        self._device = device
        self.clear()

    def clear(self) -> None:
        """Remove all tasks and labels; `update` adds them."""
        self._masks = torch.zeros(0, self._initial_outputs, dtype=torch.bool, device=self._device)
        self._counted: list[int] = []  # number of outputs already set in each row
        self.active = self._masks  # [T, C]: a view with a row for each task
        self.inactive = ~self._masks  # [T, C], or [1, C] if all tasks share a row
        self.labels: list[dict[int, Label]] = []  # for each task: output -> label, of the labels seen
        self._num_labels: list[int] = []  # for each task: number of its labels in `labels`

    @property
    def num_outputs(self) -> int:
        """Number of outputs of the model, C."""
        return self.active.shape[1]

    def grow(self, num_outputs: int) -> None:
        """Add outputs, which are inactive until `update` activates them."""
        self._masks = padded(self._masks, self._masks.new_zeros(len(self._masks), num_outputs))
        self.active = self._masks.expand(len(self.active), num_outputs)

    def update(self, tasks: Sequence[Task], labels: Sequence[Label]) -> None:
        """Activate the outputs of what is new in `tasks` and `labels`, all those seen so far."""
        self._add_rows(len(tasks))
        for row, task in enumerate(tasks[: len(self._counted)]):
            outputs = self.scenario.active_outputs(task, labels, self._counted[row])
            if not self._counted[row]:
                self._masks[row] = False
            if outputs:
                self._masks[row, [output for output in outputs if output is not None]] = True
            self._counted[row] += len(outputs) if self.scenario.outputs_are_final(task, labels) else 0
        self.active = self._masks.expand(len(tasks), self._masks.shape[1])
        self.inactive = ~self._masks
        for row, task in enumerate(tasks):
            for label in task.labels[self._num_labels[row] :]:
                self._num_labels[row] += 1
                if (output := self.scenario.output(label, task.name, labels)) is not None:
                    self.labels[row][output] = label

    def inactive_for(self, task: Tensor) -> Tensor:
        """Return a mask of the inactive outputs of each sample, `[B, C]`, or `[1, C]` if all tasks share it.

        `task [B]` is the task of each sample, on the host.
        """
        if len(self.inactive) == 1:
            return self.inactive
        return self.inactive[task.to(self._device, non_blocking=True)]

    def indices(self, task: int) -> list[int]:
        """Return the indices of a task's active outputs."""
        indices: list[int] = self.active[task].nonzero().flatten().tolist()
        return indices

    def _add_rows(self, tasks: int) -> None:
        """Add mask rows until there are this many tasks."""
        rows = min(tasks, 1) if self.scenario.shares_mask else tasks
        more = self._masks.new_zeros(rows - len(self._masks), self._masks.shape[1])
        self._masks = torch.cat([self._masks, more])
        self._counted += [0] * len(more)
        self.labels += [{} for _ in range(tasks - len(self.labels))]
        self._num_labels += [0] * (tasks - len(self._num_labels))
