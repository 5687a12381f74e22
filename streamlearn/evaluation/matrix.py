"""The accuracy matrix and the figures made of it. What is undefined is None, never 0."""

from __future__ import annotations

import json
import math
from array import array
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Mapping, Sequence

    from streamlearn.checkpoint import Checkpoint

HISTORY = 2000
WINDOW = 10
"""Evaluations in a row within which a drop counts as one: WF^10 of De Lange et al. 2023."""
FILE = "matrix.safetensors"
TYPES = {"f": "F32", "q": "I64"}


class AccuracyMatrix:
    """`R[i, j]`: accuracy on the probe of task j after task i was learned; and the newest evaluation, at any time.

    Live figures take the newest evaluation as the last row. Lopez-Paz & Ranzato 2017 (ACC, BWT, FWT), Chaudhry et al. 2018
    (forgetting) and De Lange et al. 2023 (min-ACC, WC-ACC, WF, over every evaluation and not only tasks' ends), on k tasks.

    What figures need is kept a number a task, so that an evaluation costs what there are tasks. The rows themselves and the
    history are float32: they grow with the square of the tasks.
    """

    def __init__(self) -> None:
        self.latest_accuracy: dict[int, float] = {}  # the newest evaluation
        self.latest_loss: dict[int, float] = {}
        self._recorded: tuple[dict[int, float], dict[int, float]] = ({}, {})  # accuracy and loss of the newest in state
        self.transfer_inputs: dict[int, tuple[float, float]] = {}  # task -> accuracy before it began, and untrained
        self.rows: dict[int, array[float]] = {}  # after a task's end; NaN where nothing was measured
        self._history: list[tuple[int, int, array[float]]] = []  # batches, samples trained, accuracy by task
        self._sizes: dict[int, int] = {}  # samples of each probe when its task ended
        self._learned: dict[int, float] = {}  # R[j, j]
        self._highest: dict[int, float] = {}  # in any row
        self._before: dict[int, float] = {}  # in any row but the last
        self._last: tuple[int, dict[int, float]] = (-1, {})  # the last row and its task
        self._lowest: dict[int, float] = {}  # since the task ended
        self._window: dict[int, list[float]] = {}  # the newest evaluations
        self._drops: dict[int, float] = {}  # the largest within a window, ever
        self._newest = -1  # the last task begun that has figures
        self._ends_now = False  # whether the last row is the newest evaluation itself, which a maximum must leave out
        self._metrics: dict[str, float | None] | None = None

    def record(
        self,
        results: Mapping[int, tuple[float, float]],
        batches: int,
        trained: int,
        after: int | None,
        sizes: Mapping[int, int] | None = None,
    ) -> None:
        """Take an evaluation: accuracy and loss by task; `after` names the task that has just ended.

        `sizes`: samples of each probe, with which an accuracy can be read from a float32 without any loss.
        """
        self.record_live(results)
        self._recorded = self.latest_accuracy, self.latest_loss
        self._follow(self.latest_accuracy, self.rows)
        row = _packed(self.latest_accuracy)
        if after is not None:
            if sizes is not None:
                self._sizes.update({task: sizes[task] for task in self.latest_accuracy if task in sizes})
            self._add_row(after, self.latest_accuracy, row)
        self._history.append((batches, trained, row))
        if len(self._history) > HISTORY:  # keep the shape of the curves, not every point
            self._history = self._history[::2] + ([self._history[-1]] if len(self._history) % 2 == 0 else [])
        self._compare()

    def record_live(self, results: Mapping[int, tuple[float, float]]) -> None:
        """Take an evaluation whose moment the clock chose: it is shown, and leaves no trace in the state.

        Otherwise the same records would not give the same state, bit for bit.
        """
        self.latest_accuracy = {task: accuracy for task, (accuracy, _) in results.items()}
        # the loss of a single outlier can overflow
        self.latest_loss = {task: loss for task, (_, loss) in results.items() if math.isfinite(loss)}
        self._compare()

    @property
    def ended_tasks(self) -> list[int]:
        """Tasks whose row is written, in order."""
        return sorted(self.rows)

    @property
    def history(self) -> list[tuple[int, int, dict[int, float]]]:
        """Evaluations in order: batches, samples trained, accuracy by task (float32)."""
        return [(batches, trained, _unpacked(row)) for batches, trained, row in self._history]

    @property
    def batches(self) -> int:
        """How many batches had been learned at the newest evaluation that is part of the state."""
        return self._history[-1][0] if self._history else 0

    def row(self, task: int) -> dict[int, float]:
        """Return the row after a task's end: accuracy by task."""
        return {j: self._exact(j, value) for j, value in _unpacked(self.rows[task]).items()}

    def accuracy_at_end(self, task: int) -> float | None:
        """Return R[j, j]: a task's accuracy when it ended."""
        return self._learned.get(task)

    def matrix(self) -> list[list[float | None]]:
        """Return R as a square list of rows, tasks by index; cells that were not measured are None.

        May be called from any thread: rows are only added, and never changed.
        """
        rows = dict(list(self.rows.items()))
        size = max([*(i + 1 for i in rows), *(len(row) for row in rows.values())], default=0)
        found: list[list[float | None]] = [[None] * size for _ in range(size)]
        for i, row in rows.items():
            for j, value in _unpacked(row).items():
                found[i][j] = self._exact(j, value)
        return found

    def best_accuracy(self, task: int) -> float | None:
        """Return the best accuracy on a task's probe at its own end, at the end of a later task, or now.

        None before the task has ended: until then its probe grows, and figures of different samples do not compare. So
        this less the accuracy now is the task's forgetting, or 0 where that is negative.
        """
        if task not in self.rows:
            return None
        return max((row[task] for row in (self._highest, self.latest_accuracy) if task in row), default=None)

    def metrics(self) -> dict[str, float | None]:
        """Return every figure that is one number, by name."""
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
        """ACC = 1/k * sum_j R[k, j], over tasks seen that have a probe."""
        return _mean(list(self.latest_accuracy.values()))

    @property
    def learning_accuracy(self) -> float | None:
        """Return the mean of R[j, j]: how well each task was known when it ended."""
        return _mean(list(self._learned.values()))

    @property
    def backward_transfer(self) -> float | None:
        """BWT = 1/(k-1) * sum_{j<k} (R[k, j] - R[j, j])."""
        return _mean([self.latest_accuracy[j] - self._learned[j] for j in self._earlier() if j in self._learned])

    @property
    def forward_transfer(self) -> float | None:
        """FWT = 1/(k-1) * sum_{j>1} (R[j-1, j] - b[j]), b the random initialisation."""
        return _mean([before - untrained for task, (before, untrained) in self.transfer_inputs.items() if task > 0])

    def forgetting(self, task: int) -> float | None:
        """f_j = max_{l<k} R[l, j] - R[k, j]; negative where a task got better. None before a later task was learned."""
        if not self._is_earlier(task):
            return None
        earlier = (self._before if self._ends_now else self._highest).get(task)
        return None if earlier is None else earlier - self.latest_accuracy[task]

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
        return _mean([self._drops[task] for task in self.latest_accuracy if task in self._drops])

    @property
    def min_accuracy(self) -> float | None:
        """min-ACC: mean over the tasks before the newest of the lowest accuracy at any evaluation after the task's end."""
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
        """Return a JSON tree; `table` returns the rest."""
        return {
            "now": _named(self._recorded[0]),
            "loss": _named(self._recorded[1]),
            "sizes": {str(task): size for task, size in self._sizes.items()},
            "learned": _named(self._learned),
            "highest": _named(self._highest),
            "before": _named(self._before),
            "last": [self._last[0], _named(self._last[1])],
            "lowest": _named(self._lowest),
            "window": {str(task): list(values) for task, values in self._window.items()},
            "drops": _named(self._drops),
            "transfer": {str(task): list(pair) for task, pair in self.transfer_inputs.items()},
        }

    def table(self) -> bytes:
        """Return rows and history as a safetensors file: float32, end to end, and where each begins."""
        at = [number for batches, trained, _ in self._history for number in (batches, trained)]
        history = [row for *_, row in self._history]
        return _safetensors(
            {
                "rows": _joined(self.rows.values()),
                "row_tasks": array("q", self.rows),
                "row_lengths": array("q", map(len, self.rows.values())),
                "history": _joined(history),
                "history_at": array("q", at),
                "history_lengths": array("q", map(len, history)),
            }
        )

    def load_state_dict(self, state: Mapping[str, Any], table: bytes | None) -> None:
        """Take over what `state_dict` and `table` of a run returned; earlier versions had no table. For a new matrix."""
        self._recorded = self.latest_accuracy, self.latest_loss = _numbered(state["now"]), _numbered(state["loss"])
        self.transfer_inputs = {int(task): (pair[0], pair[1]) for task, pair in state["transfer"].items()}
        self._lowest, self._drops = (_numbered(state.get(key, {})) for key in ("lowest", "drops"))
        self._window = {int(task): list(values) for task, values in state.get("window", {}).items()}
        self._sizes = {int(task): size for task, size in state["sizes"].items()}
        if table is None:
            self._load_trees(state)
        else:
            kept = (_numbered(state[key]) for key in ("learned", "highest", "before"))
            self._learned, self._highest, self._before = kept
            self._last = state["last"][0], _numbered(state["last"][1])
            found = _read_safetensors(table)
            self.rows = dict(zip(found["row_tasks"], _cut(found["rows"], found["row_lengths"]), strict=True))
            at = found["history_at"]
            rows = _cut(found["history"], found["history_lengths"])
            self._history = list(zip(at[::2], at[1::2], rows, strict=True))
        self._compare()

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> AccuracyMatrix:
        """Return what a checkpoint holds."""
        found = cls()
        tree = checkpoint.read_json("state.json")["matrix"]
        if FILE in checkpoint.manifest["files"]:
            found.load_state_dict(tree, checkpoint.read(FILE))
        else:  # of an earlier version
            tasks = checkpoint.read_json("status.json")["tasks"]
            found.load_state_dict({**tree, "sizes": {task["index"]: task["probe"]["size"] for task in tasks}}, None)
        return found

    def _load_trees(self, state: Mapping[str, Any]) -> None:
        """Take over rows and history of an earlier version, which kept them as trees."""
        rows = {int(i): _numbered(row) for i, row in state["rows"].items()}
        for task, row in sorted(rows.items()):
            self._add_row(task, row, _packed(row))
        history = [(batches, trained, _numbered(row)) for batches, trained, row in state["history"]]
        self._history = [(batches, trained, _packed(row)) for batches, trained, row in history]
        if "lowest" not in state:  # of a version that had none: from what it kept of every evaluation
            ended: set[int] = set()
            for _, _, row in history:
                self._follow(row, ended)
                ended |= {task for task, last in rows.items() if last == row}

    def _add_row(self, task: int, row: Mapping[int, float], packed: array[float]) -> None:
        """Write a task's row, and keep the maxima over all rows so far."""
        self._before = dict(self._highest)
        for j, accuracy in row.items():
            self._highest[j] = max(accuracy, self._highest.get(j, accuracy))
        self._last = task, dict(row)
        self.rows[task] = packed
        if task in row:
            self._learned[task] = row[task]

    def _compare(self) -> None:
        """Note what all figures of the newest evaluation need."""
        self._newest = max([*self.latest_accuracy, *self.rows], default=-1)
        self._ends_now = self._last[0] == self._newest and self._last[1] == self.latest_accuracy
        self._metrics = None

    def _exact(self, task: int, stored: float) -> float:
        """Return the accuracy that was rounded to float32: a number of right answers over the probe's size."""
        size = self._sizes.get(task)
        return round(stored * size) / size if size else stored

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

    def _is_earlier(self, task: int) -> bool:
        """Tell whether a task came before the newest, and its accuracy is known now and was when it ended."""
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
    """Return accuracies as float32 by task; NaN where there is none."""
    return array("f", [row.get(task, math.nan) for task in range(max(row, default=-1) + 1)])


def _unpacked(row: Sequence[float]) -> dict[int, float]:
    return {task: value for task, value in enumerate(row) if value == value}  # noqa: PLR0124 - NaN is not itself


def _joined(rows: Iterable[array[float]]) -> array[float]:
    joined = array("f")
    for row in rows:
        joined.extend(row)
    return joined


def _cut(values: array[float], lengths: Iterable[int]) -> list[array[float]]:
    rows, start = [], 0
    for length in lengths:
        rows.append(values[start : start + length])
        start += length
    return rows


def _safetensors(tensors: Mapping[str, array[Any]]) -> bytes:
    """Return a safetensors file of one-dimensional tensors. Asking commands read it, and import no torch."""
    header: dict[str, Any] = {}
    end = 0
    for name, values in tensors.items():
        start, end = end, end + len(values) * values.itemsize
        header[name] = {"dtype": TYPES[values.typecode], "shape": [len(values)], "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8
    return b"".join([len(text).to_bytes(8, "little"), text, *(values.tobytes() for values in tensors.values())])


def _read_safetensors(content: bytes) -> dict[str, array[Any]]:
    """Return the tensors of a file that `_safetensors` made."""
    begin = 8 + int.from_bytes(content[:8], "little")
    codes = {dtype: code for code, dtype in TYPES.items()}
    found = {}
    for name, entry in json.loads(content[8:begin]).items():
        start, end = entry["data_offsets"]
        found[name] = array(codes[entry["dtype"]])
        found[name].frombytes(content[begin + start : begin + end])
    return found
