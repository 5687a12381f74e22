"""The accuracy matrix and its metrics against numbers computed by hand. Undefined metrics are None."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
import torch

from streamlearn import state
from streamlearn.evaluation.matrix import FILE, HISTORY, WINDOW, AccuracyMatrix
from tests.support.counting import work

SIZES = {0: 20, 1: 10, 2: 10, 3: 10}


def filled() -> AccuracyMatrix:
    """Return three tasks' rows: 0.9 / 0.6 0.8 / 0.5 0.7 1.0."""
    matrix = AccuracyMatrix()
    matrix.record({0: (0.9, 0.1)}, 10, 100, after=0, sizes=SIZES)
    matrix.record({0: (0.95, 0.1), 1: (0.5, 0.1)}, 15, 150, after=None)
    matrix.record({0: (0.6, 0.1), 1: (0.8, 0.1)}, 20, 200, after=1, sizes=SIZES)
    matrix.record({0: (0.5, 0.1), 1: (0.7, 0.1), 2: (1.0, 0.1)}, 30, 300, after=2, sizes=SIZES)
    return matrix


def round_trip(matrix: AccuracyMatrix) -> AccuracyMatrix:
    """Return the matrix as a checkpoint restores it."""
    copied = AccuracyMatrix()
    copied.load_state_dict(json.loads(json.dumps(matrix.state_dict())), matrix.table())
    return copied


def as_trees(matrix: AccuracyMatrix) -> dict[str, Any]:
    """Return the state as checkpoints of format 1 have it: rows and history as JSON."""
    tree = {
        **matrix.state_dict(),
        "rows": {task: matrix.row(task) for task in matrix.ended_tasks},
        "history": matrix.history,
    }
    for key in ("learned", "highest", "last"):
        del tree[key]
    copied: dict[str, Any] = json.loads(json.dumps(tree))
    return copied


def test_metrics_equal_numbers_computed_by_hand() -> None:
    """ACC, BWT and forgetting follow their definitions: they divide by k - 1, and the maximum is over earlier rows only."""
    matrix = filled()
    assert matrix.matrix() == [[0.9, None, None], [0.6, 0.8, None], [0.5, 0.7, 1.0]]
    assert matrix.average_accuracy == pytest.approx((0.5 + 0.7 + 1.0) / 3)
    assert matrix.backward_transfer == pytest.approx(((0.5 - 0.9) + (0.7 - 0.8)) / 2)
    assert matrix.forgetting(0) == pytest.approx(0.9 - 0.5)
    assert matrix.forgetting(1) == pytest.approx(0.8 - 0.7)
    assert matrix.average_forgetting == pytest.approx((0.4 + 0.1) / 2)
    # not 0.95 for the first task: it was measured while the second task ran, not at the end of a task
    assert [matrix.best_accuracy(task) for task in range(3)] == [0.9, 0.8, 1.0]


def test_metrics_use_the_latest_evaluation_as_the_last_row() -> None:
    """While a fourth task runs, the third task can be forgotten, too."""
    matrix = filled()
    matrix.record({0: (0.4, 0.1), 1: (0.7, 0.1), 2: (0.8, 0.1), 3: (0.3, 0.1)}, 35, 350, after=None)
    assert matrix.average_accuracy == pytest.approx((0.4 + 0.7 + 0.8 + 0.3) / 4)
    assert matrix.forgetting(2) == pytest.approx(0.2)
    assert matrix.forgetting(3) is None
    assert matrix.backward_transfer == pytest.approx(((0.4 - 0.9) + (0.7 - 0.8) + (0.8 - 1.0)) / 3)


def test_best_accuracy_and_forgetting_agree() -> None:
    """Forgetting is the best accuracy minus the latest; a running task has neither."""
    draw = random.Random(0)
    for _ in range(200):
        matrix = AccuracyMatrix()
        tasks = draw.randint(1, 5)
        for newest in range(tasks):
            for end in (*[False] * draw.randint(0, 3), True):
                results = {task: (draw.random(), 0.1) for task in range(newest + 1) if end or draw.random() < 0.7}
                if end or draw.random() < 0.5:
                    matrix.record(results, 1, 1, newest if end else None)
                else:
                    matrix.record_live(results)
                for task in range(newest + 1):
                    best, forgotten = matrix.best_accuracy(task), matrix.forgetting(task)
                    if task == newest and not end:
                        assert (best, forgotten) == (None, None)
                    elif forgotten is not None:
                        assert best is not None
                        assert best - matrix.latest_accuracy[task] == pytest.approx(max(forgotten, 0))


def test_a_live_evaluation_does_not_change_the_state() -> None:
    """An evaluation that the clock triggered is shown, and is not saved."""
    matrix, other = filled(), filled()
    matrix.record_live({0: (0.1, 0.1), 1: (0.1, 0.1), 2: (0.1, 0.1)})
    assert matrix.average_accuracy == pytest.approx(0.1)
    assert matrix.forgetting(2) is None
    assert matrix.forgetting(1) == pytest.approx(0.7)
    assert matrix.state_dict() == other.state_dict()
    for one in (matrix, other):
        one.record({0: (0.3, 0.1), 1: (0.7, 0.1), 2: (0.6, 0.1)}, 40, 400, after=None)
    assert (matrix.state_dict(), matrix.metrics()) == (other.state_dict(), other.metrics())


def test_metrics_between_the_ends_of_tasks() -> None:
    """min-ACC, WC-ACC and WF use every evaluation; the one at a task's own end is not after the task."""
    matrix = filled()
    assert matrix.learning_accuracy == pytest.approx((0.9 + 0.8 + 1.0) / 3)
    assert matrix.worst_forgetting == pytest.approx(0.4)
    assert matrix.min_accuracy == pytest.approx((0.5 + 0.7) / 2)
    matrix.record({0: (0.2, 0.1), 1: (0.9, 0.1), 2: (0.9, 0.1), 3: (0.1, 0.1)}, 35, 350, after=None)
    matrix.record({0: (0.6, 0.1), 1: (0.8, 0.1), 2: (1.0, 0.1), 3: (0.5, 0.1)}, 40, 400, after=3)
    lowest = (0.2 + 0.7 + 0.9) / 3
    assert matrix.min_accuracy == pytest.approx(lowest)
    assert matrix.worst_case_accuracy == pytest.approx(0.5 / 4 + 0.75 * lowest)
    # the first fell from 0.95 to 0.2, the others by a tenth at most, the last only rose
    assert matrix.windowed_forgetting == pytest.approx((0.75 + 0.1 + 0.1 + 0.0) / 4)


def test_a_drop_is_measured_within_a_window_of_evaluations() -> None:
    """A slow decline is not a drop: only the latest evaluations are compared."""
    matrix = AccuracyMatrix()
    for number in range(41):
        matrix.record({0: (1 - number / 100, 0.1)}, number, number, after=None)
    assert matrix.windowed_forgetting == pytest.approx((WINDOW - 1) / 100)


def test_undefined_metrics_are_none() -> None:
    """Before the first evaluation all are undefined; with one task, forgetting is."""
    matrix = AccuracyMatrix()
    assert (set(matrix.metrics().values()), matrix.matrix()) == ({None}, [])
    assert (matrix.best_accuracy(0), matrix.forgetting(0)) == (None, None)
    matrix.record({0: (0.9, 0.1)}, 1, 1, after=0)
    assert matrix.forgetting(0) is None
    known = {name: value for name, value in matrix.metrics().items() if value is not None}
    assert known == {"average_accuracy": 0.9, "learning_accuracy": 0.9, "windowed_forgetting": 0.0}


def test_forward_transfer_leaves_the_first_task_out() -> None:
    """FWT is the mean, over later tasks, of the accuracy before the task minus that of the untrained model."""
    matrix = AccuracyMatrix()
    matrix.transfer_inputs = {0: (0.5, 0.5), 1: (0.7, 0.5), 2: (0.4, 0.5)}
    assert matrix.forward_transfer == pytest.approx((0.2 - 0.1) / 2)


def test_the_matrix_is_restored_from_a_checkpoint() -> None:
    """One part is saved as JSON, the other as a safetensors file."""
    matrix = filled()
    copied = round_trip(matrix)
    assert (copied.state_dict(), copied.table()) == (matrix.state_dict(), matrix.table())
    assert (copied.matrix(), copied.history) == (matrix.matrix(), matrix.history)
    for one in (matrix, copied):
        one.record({0: (0.3, 0.1), 1: (0.7, 0.1), 2: (0.6, 0.1)}, 40, 400, after=None)
    assert copied.metrics() == matrix.metrics()


def test_the_table_is_a_safetensors_file() -> None:
    """Any reader of safetensors can read the rows as float32; a task that ended without an evaluation has an empty row."""
    found = state.from_bytes(FILE, filled().table())
    assert found["rows"].dtype == torch.float32
    assert found["rows"].tolist() == pytest.approx([0.9, 0.6, 0.8, 0.5, 0.7, 1.0])
    assert found["row_lengths"].tolist() == [1, 2, 3]
    assert found["history_at"].reshape(-1, 2).tolist() == [[10, 100], [15, 150], [20, 200], [30, 300]]
    matrix = AccuracyMatrix()
    matrix.record({}, 1, 1, after=0)
    matrix.record({1: (0.5, 0.1)}, 2, 2, after=1)
    assert round_trip(matrix).matrix() == matrix.matrix() == [[None, None], [None, 0.5]]


def test_accuracies_are_exact_although_they_are_saved_as_float32() -> None:
    """A cell is an integer number of hits over the probe's size, so it can be restored exactly."""
    matrix, size = AccuracyMatrix(), 997
    for task in range(50):
        results = {j: ((31 * task + j) % (size + 1) / size, 0.1) for j in range(task + 1)}
        matrix.record(results, task, task, task, dict.fromkeys(results, size))
    copied = round_trip(matrix)
    for i, row in enumerate(copied.matrix()):
        assert row[: i + 1] == [(31 * i + j) % (size + 1) / size for j in range(i + 1)]
    assert copied.metrics() == matrix.metrics()


def test_running_maxima_give_the_forgetting_of_all_rows() -> None:
    """Holds for random histories and with tasks that have no probe."""
    chance = random.Random(0)
    for _ in range(100):
        rows: dict[int, dict[int, float]] = {}
        matrix, probed = AccuracyMatrix(), [chance.random() < 0.7 for _ in range(6)]
        for task in range(6):
            for last in (False, True):
                now = {j: chance.random() for j in range(task + 1) if probed[j] and (j < task or last)}
                matrix.record({j: (value, 1.0) for j, value in now.items()}, 0, 0, task if last else None)
                newest = max([*now, *rows], default=-1) if not last else task
                for j in range(task + 1):
                    earlier = [row[j] for row in rows.values() if j in row]
                    known = j < newest and j in now and j in rows and earlier
                    expected = max(earlier) - now[j] if known else None
                    assert matrix.forgetting(j) == expected
            rows[task] = now


def test_the_cost_of_an_evaluation_is_linear_in_the_tasks() -> None:
    """Four times as many tasks cost about four times as much, not sixteen times as if every row were read."""
    costs = []
    for tasks in (50, 200):
        matrix = AccuracyMatrix()
        for task in range(tasks):
            matrix.record(dict.fromkeys(range(task + 1), (0.5, 0.1)), task, task, task)
        results = dict.fromkeys(range(tasks), (0.5, 0.1))

        def evaluate(matrix: AccuracyMatrix = matrix, results: Any = results) -> None:
            matrix.record(results, 1, 1, None)
            matrix.metrics()
            for task in results:
                matrix.forgetting(task)

        costs.append(work(evaluate))
    assert costs[1] < 6 * costs[0]


def test_metrics_between_the_ends_of_tasks_are_computed_from_an_older_history() -> None:
    """An older state without these numbers gives the same metrics."""
    matrix, copied = filled(), AccuracyMatrix()
    matrix.record({0: (0.2, 0.1), 1: (0.9, 0.1), 2: (0.9, 0.1)}, 35, 350, after=None)
    tree = as_trees(matrix)
    tree["history"] = [[*at, {task: round(value, 2) for task, value in row.items()}] for *at, row in tree["history"]]
    copied.load_state_dict({key: tree[key] for key in tree if key not in {"lowest", "window", "drops"}}, None)
    assert copied.metrics() == matrix.metrics()
    assert (copied.matrix(), copied.history) == (matrix.matrix(), matrix.history)


def test_history_is_thinned_but_keeps_its_ends() -> None:
    """For a stream of any length the curve stays small, and keeps its first and last evaluation."""
    matrix = AccuracyMatrix()
    for batch in range(3 * HISTORY):
        matrix.record({0: (0.5, 0.1)}, batch, batch, after=None)
    assert len(matrix.history) <= HISTORY
    assert (matrix.history[0][0], matrix.history[-1][0]) == (0, 3 * HISTORY - 1)
