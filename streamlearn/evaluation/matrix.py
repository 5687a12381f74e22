"""The accuracy matrix and the figures made of it. What is undefined is None, never 0."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

HISTORY = 2000


class AccuracyMatrix:
    """`R[i, j]`: accuracy on the probe of task j after task i was learned; and the newest evaluation, at any time.

    Live figures take the newest evaluation as the last row. Lopez-Paz & Ranzato 2017 (ACC, BWT, FWT) and Chaudhry et al.
    2018 (forgetting), on k tasks.
    """

    def __init__(self) -> None:
        self.rows: dict[int, dict[int, float]] = {}  # after a task's end
        self.now: dict[int, float] = {}  # the newest evaluation
        self.loss: dict[int, float] = {}
        self.transfer: dict[int, tuple[float, float]] = {}  # task -> accuracy before it began, and untrained
        self.history: list[tuple[int, int, dict[int, float]]] = []  # batches, samples trained, accuracy by task
        self._peaks: dict[int, float] = {}

    def record(self, results: Mapping[int, tuple[float, float]], batches: int, trained: int, after: int | None) -> None:
        """Take an evaluation: accuracy and loss by task; `after` names the task that has just ended."""
        self.now = {task: accuracy for task, (accuracy, _) in results.items()}
        self.loss = {
            task: loss for task, (_, loss) in results.items() if math.isfinite(loss)
        }  # one outlier can overflow
        for task, accuracy in self.now.items():
            self._peaks[task] = max(accuracy, self._peaks.get(task, accuracy))
        if after is not None:
            self.rows[after] = dict(self.now)
        self.history.append((batches, trained, dict(self.now)))
        if len(self.history) > HISTORY:  # keep the shape of the curves, not every point
            self.history = self.history[::2] + ([self.history[-1]] if len(self.history) % 2 == 0 else [])

    @property
    def ended(self) -> list[int]:
        """Tasks whose row is written, in order."""
        return sorted(self.rows)

    def matrix(self) -> list[list[float | None]]:
        """Return R as a square list of rows, tasks by index; cells that were not measured are None."""
        size = max([*self.rows, *(j for row in self.rows.values() for j in row)], default=-1) + 1
        return [[self.rows.get(i, {}).get(j) for j in range(size)] for i in range(size)]

    def best(self, task: int) -> float | None:
        """Return the best accuracy ever measured on a task's probe."""
        return self._peaks.get(task)

    @property
    def average_accuracy(self) -> float | None:
        """ACC = 1/k * sum_j R[k, j], over tasks seen that have a probe."""
        return _mean(list(self.now.values()))

    @property
    def backward_transfer(self) -> float | None:
        """BWT = 1/(k-1) * sum_{j<k} (R[k, j] - R[j, j])."""
        return _mean([self.now[j] - self.rows[j][j] for j in self._earlier() if j in self.rows.get(j, {})])

    @property
    def forward_transfer(self) -> float | None:
        """FWT = 1/(k-1) * sum_{j>1} (R[j-1, j] - b[j]), b the random initialisation."""
        return _mean([before - untrained for task, (before, untrained) in self.transfer.items() if task > 0])

    def forgetting(self, task: int) -> float | None:
        """f_j = max_{l<k} R[l, j] - R[k, j]; negative where a task got better. None before a later task was learned."""
        if task not in self._earlier():
            return None
        earlier = [row[task] for after, row in self.rows.items() if task in row and not self._is_last(after)]
        return max(earlier) - self.now[task] if earlier else None

    @property
    def average_forgetting(self) -> float | None:
        """Return the mean of `forgetting` over the tasks before the newest."""
        found = [self.forgetting(task) for task in self._earlier()]
        return _mean([value for value in found if value is not None])

    def state_dict(self) -> dict[str, Any]:
        """Return a JSON tree."""
        return {
            "rows": {str(i): _named(row) for i, row in self.rows.items()},
            "now": _named(self.now),
            "loss": _named(self.loss),
            "peaks": _named(self._peaks),
            "transfer": {str(task): list(pair) for task, pair in self.transfer.items()},
            "history": [[batches, trained, _named(row)] for batches, trained, row in self.history],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.rows = {int(i): _numbered(row) for i, row in state["rows"].items()}
        self.now, self.loss, self._peaks = (_numbered(state[key]) for key in ("now", "loss", "peaks"))
        self.transfer = {int(task): (pair[0], pair[1]) for task, pair in state["transfer"].items()}
        self.history = [(batches, trained, _numbered(row)) for batches, trained, row in state["history"]]

    def _newest(self) -> int:
        """Return the task that the newest evaluation belongs to: the last one begun that has figures."""
        return max([*self.now, *self.rows], default=-1)

    def _earlier(self) -> list[int]:
        """Return the tasks before the newest whose accuracy is known now, and was when they ended."""
        newest = self._newest()
        return [task for task in sorted(self.now) if task < newest and task in self.rows]

    def _is_last(self, after: int) -> bool:
        """Tell whether a row is the newest evaluation itself, which the maximum must leave out."""
        return after == self._newest() and self.rows[after] == self.now


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _named(row: Mapping[int, float]) -> dict[str, float]:
    return {str(task): value for task, value in row.items()}


def _numbered(row: Mapping[str, float]) -> dict[int, float]:
    return {int(task): value for task, value in row.items()}
