"""The accuracy matrix and its metrics. An undefined metric is None, never 0."""

from __future__ import annotations

import math
from array import array
from typing import TYPE_CHECKING, Any, Protocol

from streamlearn.evaluation import array_file

if TYPE_CHECKING:
    from collections.abc import Container, Mapping, Sequence

HISTORY = 2000  # evaluations kept for curves
WINDOW = 10
"""Number of consecutive evaluations over which a drop is measured: WF^10 of De Lange et al. 2023."""
FILE = "matrix.safetensors"


class CheckpointFiles(Protocol):
    """What the matrix needs of a checkpoint: its manifest, and its files by name."""

    @property
    def manifest(self) -> Mapping[str, Any]:
        """The manifest; its key `files` has an entry for each file."""

    def read(self, name: str) -> bytes:
        """Return the content of a file."""

    def read_json(self, name: str) -> dict[str, Any]:
        """Return the content of a JSON file."""


class AccuracyMatrix:
    """`R[i, j]` is the accuracy on the probe of task j after task i ended. Also keeps the latest evaluation.

    The metrics use the latest evaluation as the last row, k tasks in all: ACC, BWT and FWT of Lopez-Paz & Ranzato 2017,
    forgetting of Chaudhry et al. 2018, and min-ACC, WC-ACC and WF of De Lange et al. 2023, which cover every evaluation
    and not only the ends of tasks.

    The metrics need only a few numbers per task, so the cost of an evaluation is linear in the number of tasks. Rows and
    history are float32, because their size is quadratic in it.
    """

    def __init__(self) -> None:
        self.latest_accuracy: dict[int, float] = {}  # latest evaluation: task -> accuracy
        self.latest_loss: dict[int, float] = {}
        # accuracy and loss of the latest evaluation that is part of the state
        self._recorded: tuple[dict[int, float], dict[int, float]] = ({}, {})
        # task -> accuracy at its start, and of the untrained model
        self.transfer_inputs: dict[int, tuple[float, float]] = {}
        self.rows: dict[int, array[float]] = {}  # task -> row at its end; NaN where nothing was measured
        self._history: list[tuple[int, int, array[float]]] = []  # batches, trained samples, accuracy by task
        self._sizes: dict[int, int] = {}  # task -> samples in its probe when the task ended
        self._at_end: dict[int, float] = {}  # task j -> R[j, j]
        self._highest: dict[int, float] = {}  # task -> highest accuracy in all rows
        self._highest_before_last: dict[int, float] = {}  # the same without the last row
        self._last_row: tuple[int, dict[int, float]] = (-1, {})  # task of the last row, and the row
        self._lowest: dict[int, float] = {}  # task -> lowest accuracy since it ended
        self._window: dict[int, list[float]] = {}  # task -> accuracy at the last WINDOW evaluations
        self._largest_drop: dict[int, float] = {}  # task -> largest drop within any window
        self._newest = -1  # newest task that was evaluated
        self._latest_is_last_row = False  # then a maximum over earlier rows must leave the last row out
        self._metrics: dict[str, float | None] | None = None  # cache, until the next evaluation

    def record(
        self,
        results: Mapping[int, tuple[float, float]],
        batches: int,
        trained: int,
        after: int | None,
        sizes: Mapping[int, int] | None = None,
    ) -> None:
        """Record an evaluation: accuracy and loss by task. `after` is the task that has just ended, if one has.

        `sizes` has the number of samples of each probe; with it, accuracies are restored exactly from float32.
        """
        self.record_live(results)
        self._recorded = self.latest_accuracy, self.latest_loss
        self._update_extremes(self.latest_accuracy, self.rows)
        row = _packed(self.latest_accuracy)
        if after is not None:
            if sizes is not None:
                self._sizes.update({task: sizes[task] for task in self.latest_accuracy if task in sizes})
            self._add_row(after, self.latest_accuracy, row)
        self._history.append((batches, trained, row))
        if len(self._history) > HISTORY:  # keep the shape of the curves, not every point
            self._history = self._history[::2] + ([self._history[-1]] if len(self._history) % 2 == 0 else [])
        self._update_derived()

    def record_live(self, results: Mapping[int, tuple[float, float]]) -> None:
        """Show an evaluation that the clock triggered. It does not become part of the saved state.

        Otherwise the same records would not give the same state, bit for bit.
        """
        self.latest_accuracy = {task: accuracy for task, (accuracy, _) in results.items()}
        # the loss of a single outlier can overflow
        self.latest_loss = {task: loss for task, (_, loss) in results.items() if math.isfinite(loss)}
        self._update_derived()

    @property
    def ended_tasks(self) -> list[int]:
        """Tasks that have a row, in order."""
        return sorted(self.rows)

    @property
    def history(self) -> list[tuple[int, int, dict[int, float]]]:
        """Evaluations in order: batches, trained samples, accuracy by task (float32)."""
        return [(batches, trained, _unpacked(row)) for batches, trained, row in self._history]

    @property
    def batches(self) -> int:
        """Batches learned at the latest evaluation that is part of the state."""
        return self._history[-1][0] if self._history else 0

    def row(self, task: int) -> dict[int, float]:
        """Return the row of an ended task: accuracy by task."""
        return {j: self._exact(j, value) for j, value in _unpacked(self.rows[task]).items()}

    def accuracy_at_end(self, task: int) -> float | None:
        """Return R[j, j]: a task's accuracy when it ended; None if it was not measured."""
        return self._at_end.get(task)

    def matrix(self) -> list[list[float | None]]:
        """Return R as a square list of rows by task index; cells that were not measured are None.

        Any thread may call this: rows are added and never changed.
        """
        rows = self.rows.copy()  # one step, whatever the loop does meanwhile
        size = max([*(i + 1 for i in rows), *(len(row) for row in rows.values())], default=0)
        cells: list[list[float | None]] = [[None] * size for _ in range(size)]
        for i, row in rows.items():
            for j, value in _unpacked(row).items():
                cells[i][j] = self._exact(j, value)
        return cells

    def best_accuracy(self, task: int) -> float | None:
        """Return the highest accuracy on a task's probe since the task ended: at ends of tasks, or now.

        None before the task has ended: until then its probe grows, and accuracies on different samples are not comparable.
        This minus the latest accuracy is the task's forgetting, or 0 if the forgetting is negative.
        """
        if task not in self.rows:
            return None
        return max((row[task] for row in (self._highest, self.latest_accuracy) if task in row), default=None)

    def metrics(self) -> dict[str, float | None]:
        """Return every scalar metric by name."""
        if self._metrics is None:
            self._metrics = {
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
        return self._metrics

    @property
    def average_accuracy(self) -> float | None:
        """ACC = 1/k * sum_j R[k, j], over the tasks that have a probe."""
        return _mean(list(self.latest_accuracy.values()))

    @property
    def learning_accuracy(self) -> float | None:
        """Return the mean of R[j, j]: the accuracy on each task when it ended."""
        return _mean(list(self._at_end.values()))

    @property
    def backward_transfer(self) -> float | None:
        """BWT = 1/(k-1) * sum_{j<k} (R[k, j] - R[j, j])."""
        return _mean([self.latest_accuracy[j] - self._at_end[j] for j in self._earlier() if j in self._at_end])

    @property
    def forward_transfer(self) -> float | None:
        """FWT = 1/(k-1) * sum_{j>1} (R[j-1, j] - b[j]); b is the accuracy of the untrained model."""
        return _mean([before - untrained for task, (before, untrained) in self.transfer_inputs.items() if task > 0])

    def forgetting(self, task: int) -> float | None:
        """f_j = max_{l<k} R[l, j] - R[k, j]; negative if the task improved. None until a later task is evaluated."""
        if not self._is_earlier(task):
            return None
        earlier = (self._highest_before_last if self._latest_is_last_row else self._highest).get(task)
        return None if earlier is None else earlier - self.latest_accuracy[task]

    @property
    def average_forgetting(self) -> float | None:
        """Return the mean of `forgetting` over all tasks before the newest."""
        return _mean(self._forgotten())

    @property
    def worst_forgetting(self) -> float | None:
        """Return the largest `forgetting` of a task before the newest."""
        return max(self._forgotten(), default=None)

    @property
    def windowed_forgetting(self) -> float | None:
        """WF: mean over tasks of the largest drop of accuracy within any `WINDOW` consecutive evaluations."""
        return _mean([self._largest_drop[task] for task in self.latest_accuracy if task in self._largest_drop])

    @property
    def min_accuracy(self) -> float | None:
        """min-ACC: mean, over all tasks before the newest, of the lowest accuracy at any evaluation after the task ended."""
        return _mean([self._lowest[task] for task in self._earlier() if task in self._lowest])

    @property
    def worst_case_accuracy(self) -> float | None:
        """WC-ACC = 1/k * accuracy on the newest task + (1 - 1/k) * min-ACC."""
        lowest, newest = self.min_accuracy, self.latest_accuracy.get(self._newest)
        if lowest is None or newest is None:
            return None
        k = len(self._earlier()) + 1
        return newest / k + (1 - 1 / k) * lowest

    def state_dict(self) -> dict[str, Any]:
        """Return the small part of the state as a JSON tree. `table` returns the large part."""
        return {
            "now": _named(self._recorded[0]),
            "loss": _named(self._recorded[1]),
            "sizes": {str(task): size for task, size in self._sizes.items()},
            "learned": _named(self._at_end),
            "highest": _named(self._highest),
            "before": _named(self._highest_before_last),
            "last": [self._last_row[0], _named(self._last_row[1])],
            "lowest": _named(self._lowest),
            "window": {str(task): list(values) for task, values in self._window.items()},
            "drops": _named(self._largest_drop),
            "transfer": {str(task): list(pair) for task, pair in self.transfer_inputs.items()},
        }

    def table(self) -> bytes:
        """Return rows and history as a safetensors file: float32, concatenated, with the length of each."""
        at = [number for batches, trained, _ in self._history for number in (batches, trained)]
        history = [row for *_, row in self._history]
        return array_file.to_bytes(
            {
                "rows": array_file.concatenated(self.rows.values()),
                "row_tasks": array("q", self.rows),
                "row_lengths": array("q", map(len, self.rows.values())),
                "history": array_file.concatenated(history),
                "history_at": array("q", at),
                "history_lengths": array("q", map(len, history)),
            }
        )

    def load_state_dict(self, state: Mapping[str, Any], table: bytes | None) -> None:
        """Restore what `state_dict` and `table` returned, into a new matrix. `table` is None in checkpoints of format 1."""
        self._recorded = self.latest_accuracy, self.latest_loss = _numbered(state["now"]), _numbered(state["loss"])
        self.transfer_inputs = {int(task): (pair[0], pair[1]) for task, pair in state["transfer"].items()}
        self._lowest, self._largest_drop = (_numbered(state.get(key, {})) for key in ("lowest", "drops"))
        self._window = {int(task): list(values) for task, values in state.get("window", {}).items()}
        self._sizes = {int(task): size for task, size in state["sizes"].items()}
        if table is None:
            self._load_format_1(state)
        else:
            kept = (_numbered(state[key]) for key in ("learned", "highest", "before"))
            self._at_end, self._highest, self._highest_before_last = kept
            self._last_row = state["last"][0], _numbered(state["last"][1])
            tensors = array_file.from_bytes(table)
            rows = array_file.split(tensors["rows"], tensors["row_lengths"])
            self.rows = dict(zip(tensors["row_tasks"], rows, strict=True))
            at, history = tensors["history_at"], array_file.split(tensors["history"], tensors["history_lengths"])
            self._history = list(zip(at[::2], at[1::2], history, strict=True))
        self._update_derived()

    @classmethod
    def from_checkpoint(cls, checkpoint: CheckpointFiles) -> AccuracyMatrix:
        """Return the matrix that a checkpoint contains."""
        matrix = cls()
        tree = checkpoint.read_json("state.json")["matrix"]
        if FILE in checkpoint.manifest["files"]:
            matrix.load_state_dict(tree, checkpoint.read(FILE))
        else:  # format 1
            tasks = checkpoint.read_json("status.json")["tasks"]
            matrix.load_state_dict({**tree, "sizes": {task["index"]: task["probe"]["size"] for task in tasks}}, None)
        return matrix

    def _load_format_1(self, state: Mapping[str, Any]) -> None:
        """Restore rows and history of a checkpoint of format 1, which has them as JSON."""
        rows = {int(i): _numbered(row) for i, row in state["rows"].items()}
        for task, row in sorted(rows.items()):
            self._add_row(task, row, _packed(row))
        history = [(batches, trained, _numbered(row)) for batches, trained, row in state["history"]]
        self._history = [(batches, trained, _packed(row)) for batches, trained, row in history]
        if "lowest" not in state:  # an older version did not save these: compute them from its history
            ended: set[int] = set()
            for _, _, row in history:
                self._update_extremes(row, ended)
                ended |= {task for task, last in rows.items() if last == row}

    def _add_row(self, task: int, row: Mapping[int, float], packed: array[float]) -> None:
        """Add a task's row, and update the maxima over all rows."""
        self._highest_before_last = dict(self._highest)
        for j, accuracy in row.items():
            self._highest[j] = max(accuracy, self._highest.get(j, accuracy))
        self._last_row = task, dict(row)
        self.rows[task] = packed
        if task in row:
            self._at_end[task] = row[task]

    def _update_derived(self) -> None:
        """Update what all metrics of the latest evaluation use, and drop the cached metrics."""
        self._newest = max([*self.latest_accuracy, *self.rows], default=-1)
        self._latest_is_last_row = self._last_row[0] == self._newest and self._last_row[1] == self.latest_accuracy
        self._metrics = None

    def _exact(self, task: int, stored: float) -> float:
        """Return the exact accuracy of one rounded to float32: an integer number of hits over the probe's size."""
        size = self._sizes.get(task)
        return round(stored * size) / size if size else stored

    def _update_extremes(self, now: Mapping[int, float], ended: Container[int]) -> None:
        """Update lowest accuracies, windows and largest drops with an evaluation."""
        for task, accuracy in now.items():
            if task in ended:
                self._lowest[task] = min(accuracy, self._lowest.get(task, accuracy))
            window = self._window[task] = [*self._window.get(task, []), accuracy][-WINDOW:]
            self._largest_drop[task] = max(max(window) - accuracy, self._largest_drop.get(task, 0.0))

    def _forgotten(self) -> list[float]:
        values = [self.forgetting(task) for task in self._earlier()]
        return [value for value in values if value is not None]

    def _is_earlier(self, task: int) -> bool:
        """Return whether a task precedes the newest one, has a row, and is in the latest evaluation."""
        return task < self._newest and task in self.latest_accuracy and task in self.rows

    def _earlier(self) -> list[int]:
        return [task for task in sorted(self.latest_accuracy) if self._is_earlier(task)]


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _named(row: Mapping[int, float]) -> dict[str, float]:
    return {str(task): value for task, value in row.items()}


def _numbered(row: Mapping[str, float]) -> dict[int, float]:
    return {int(task): value for task, value in row.items()}


def _packed(row: Mapping[int, float]) -> array[float]:
    """Return accuracies by task as float32; NaN where there is none."""
    return array("f", [row.get(task, math.nan) for task in range(max(row, default=-1) + 1)])


def _unpacked(row: Sequence[float]) -> dict[int, float]:
    return {task: value for task, value in enumerate(row) if value == value}  # noqa: PLR0124 - NaN is not itself
