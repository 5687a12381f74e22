"""The accuracy matrix and the figures made of it. What is undefined is None, never 0."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Container, Mapping

HISTORY = 2000
WINDOW = 10
"""Evaluations in a row within which a drop counts as one: WF^10 of De Lange et al. 2023."""


class AccuracyMatrix:
    """`R[i, j]`: accuracy on the probe of task j after task i was learned; and the newest evaluation, at any time.

    Live figures take the newest evaluation as the last row. Lopez-Paz & Ranzato 2017 (ACC, BWT, FWT), Chaudhry et al. 2018
    (forgetting) and De Lange et al. 2023 (min-ACC, WC-ACC, WF, over every evaluation and not only tasks' ends), on k tasks.
    """

    def __init__(self) -> None:
        self.rows: dict[int, dict[int, float]] = {}  # after a task's end
        self.now: dict[int, float] = {}  # the newest evaluation
        self.loss: dict[int, float] = {}
        self._recorded: tuple[dict[int, float], dict[int, float]] = ({}, {})  # accuracy and loss of the newest in state
        self.transfer: dict[int, tuple[float, float]] = {}  # task -> accuracy before it began, and untrained
        self.history: list[tuple[int, int, dict[int, float]]] = []  # batches, samples trained, accuracy by task
        self._highest: dict[int, float] = {}  # in any row
        self._before: dict[int, float] = {}  # in any row but the last
        self._lowest: dict[int, float] = {}  # since the task ended
        self._window: dict[int, list[float]] = {}  # the newest evaluations
        self._drops: dict[int, float] = {}  # the largest within a window, ever

    def record(self, results: Mapping[int, tuple[float, float]], batches: int, trained: int, after: int | None) -> None:
        """Take an evaluation: accuracy and loss by task; `after` names the task that has just ended."""
        self.look(results)
        self._recorded = self.now, self.loss
        self._follow(self.now, self.rows)
        if after is not None:
            self._add_row(after, dict(self.now))
        self.history.append((batches, trained, dict(self.now)))
        if len(self.history) > HISTORY:  # keep the shape of the curves, not every point
            self.history = self.history[::2] + ([self.history[-1]] if len(self.history) % 2 == 0 else [])

    def look(self, results: Mapping[int, tuple[float, float]]) -> None:
        """Take an evaluation whose moment the clock chose: it is shown, and leaves no trace in the state.

        Otherwise the same records would not give the same state, bit for bit.
        """
        self.now = {task: accuracy for task, (accuracy, _) in results.items()}
        # the loss of a single outlier can overflow
        self.loss = {task: loss for task, (_, loss) in results.items() if math.isfinite(loss)}

    @property
    def ended(self) -> list[int]:
        """Tasks whose row is written, in order."""
        return sorted(self.rows)

    def matrix(self) -> list[list[float | None]]:
        """Return R as a square list of rows, tasks by index; cells that were not measured are None."""
        size = max([*self.rows, *(j for row in self.rows.values() for j in row)], default=-1) + 1
        return [[self.rows.get(i, {}).get(j) for j in range(size)] for i in range(size)]

    def best(self, task: int) -> float | None:
        """Return the best accuracy on a task's probe at its own end, at the end of a later task, or now.

        None before the task has ended: until then its probe grows, and figures of different samples do not compare. So
        this less the accuracy now is the task's forgetting, or 0 where that is negative.
        """
        if task not in self.rows:
            return None
        return max((row[task] for row in (self._highest, self.now) if task in row), default=None)

    def figures(self) -> dict[str, float | None]:
        """Return every figure that is one number, by name."""
        return {
            "average_accuracy": self.average_accuracy,
            "learning_accuracy": self.learning_accuracy,
            "backward_transfer": self.backward_transfer,
            "forward_transfer": self.forward_transfer,
            "average_forgetting": self.average_forgetting,
            "worst_forgetting": self.worst_forgetting,
            "windowed_forgetting": self.windowed_forgetting,
            "min_accuracy": self.min_accuracy,
            "worst_case_accuracy": self.worst_case_accuracy,
        }

    @property
    def average_accuracy(self) -> float | None:
        """ACC = 1/k * sum_j R[k, j], over tasks seen that have a probe."""
        return _mean(list(self.now.values()))

    @property
    def learning_accuracy(self) -> float | None:
        """Return the mean of R[j, j]: how well each task was known when it ended."""
        return _mean([row[task] for task, row in self.rows.items() if task in row])

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
        earlier = (self._before if self._at_end() else self._highest).get(task)
        return None if earlier is None else earlier - self.now[task]

    @property
    def average_forgetting(self) -> float | None:
        """Return the mean of `forgetting` over the tasks before the newest."""
        return _mean(self._forgotten())

    @property
    def worst_forgetting(self) -> float | None:
        """Return the largest `forgetting` of a task before the newest."""
        return max(self._forgotten(), default=None)

    @property
    def windowed_forgetting(self) -> float | None:
        """WF: mean over tasks of the largest drop of accuracy, ever, within `WINDOW` evaluations in a row."""
        return _mean([self._drops[task] for task in self.now if task in self._drops])

    @property
    def min_accuracy(self) -> float | None:
        """min-ACC: mean over the tasks before the newest of the lowest accuracy at any evaluation after the task's end."""
        return _mean([self._lowest[task] for task in self._earlier() if task in self._lowest])

    @property
    def worst_case_accuracy(self) -> float | None:
        """WC-ACC = 1/k * accuracy on the newest task + (1 - 1/k) * min-ACC."""
        lowest, newest = self.min_accuracy, self.now.get(self._newest())
        if lowest is None or newest is None:
            return None
        k = len(self._earlier()) + 1
        return newest / k + (1 - 1 / k) * lowest

    def state_dict(self) -> dict[str, Any]:
        """Return a JSON tree."""
        return {
            "rows": {str(i): _named(row) for i, row in self.rows.items()},
            "now": _named(self._recorded[0]),
            "loss": _named(self._recorded[1]),
            "lowest": _named(self._lowest),
            "window": {str(task): values for task, values in self._window.items()},
            "drops": _named(self._drops),
            "transfer": {str(task): list(pair) for task, pair in self.transfer.items()},
            "history": [[batches, trained, _named(row)] for batches, trained, row in self.history],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.rows, self._highest, self._before = {}, {}, {}
        for after, row in sorted((int(i), _numbered(row)) for i, row in state["rows"].items()):
            self._add_row(after, row)
        self._recorded = self.now, self.loss = _numbered(state["now"]), _numbered(state["loss"])
        self.transfer = {int(task): (pair[0], pair[1]) for task, pair in state["transfer"].items()}
        self.history = [(batches, trained, _numbered(row)) for batches, trained, row in state["history"]]
        self._lowest, self._drops = (_numbered(state.get(key, {})) for key in ("lowest", "drops"))
        self._window = {int(task): list(values) for task, values in state.get("window", {}).items()}
        if "lowest" not in state:  # of a version that had none: from what it kept of every evaluation
            ended: set[int] = set()
            for _, _, row in self.history:
                self._follow(row, ended)
                ended |= {task for task, last in self.rows.items() if last == row}

    def _add_row(self, after: int, row: dict[int, float]) -> None:
        """Add a task's end, and keep the maxima over all ends so far."""
        self.rows[after] = row
        self._before = dict(self._highest)
        for task, accuracy in row.items():
            self._highest[task] = max(accuracy, self._highest.get(task, accuracy))

    def _follow(self, now: Mapping[int, float], ended: Container[int]) -> None:
        """Note what an evaluation says of accuracies between the ends of tasks."""
        for task, accuracy in now.items():
            if task in ended:
                self._lowest[task] = min(accuracy, self._lowest.get(task, accuracy))
            window = self._window[task] = [*self._window.get(task, []), accuracy][-WINDOW:]
            self._drops[task] = max(max(window) - accuracy, self._drops.get(task, 0.0))

    def _forgotten(self) -> list[float]:
        found = [self.forgetting(task) for task in self._earlier()]
        return [value for value in found if value is not None]

    def _newest(self) -> int:
        """Return the task that the newest evaluation belongs to: the last one begun that has figures."""
        return max([*self.now, *self.rows], default=-1)

    def _earlier(self) -> list[int]:
        """Return the tasks before the newest whose accuracy is known now, and was when they ended."""
        newest = self._newest()
        return [task for task in sorted(self.now) if task < newest and task in self.rows]

    def _at_end(self) -> bool:
        """Tell whether the newest evaluation is the last row itself, which the maximum must leave out."""
        newest = self._newest()
        return newest in self.rows and self.rows[newest] == self.now


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _named(row: Mapping[int, float]) -> dict[str, float]:
    return {str(task): value for task, value in row.items()}


def _numbered(row: Mapping[str, float]) -> dict[int, float]:
    return {int(task): value for task, value in row.items()}
