"""Tests of `make reproduce`: its topics in memory, which cells it runs, and its document."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from rich.console import Console

from benchmarks.common import DATA
from benchmarks.reproduce import __main__ as tool
from benchmarks.reproduce import cells, page, runner, streams
from benchmarks.reproduce.cells import Row, Table
from benchmarks.reproduce.result_file import ResultFile
from benchmarks.reproduce.streams import Curriculum
from streamlearn.stream.logs.base import CONTROL_HEADER, PROBE, TASK_END, USE_HEADER
from streamlearn.tools.producer import Samples
from tests.support.jobs import require

SIZE = 7  # samples in a record
PIXELS = np.arange(20 * 4, dtype=np.uint8).reshape(20, 2, 2)
TINY = Table(
    "tiny",
    "Tiny",
    "\nTwo tasks.",
    Curriculum("tiny", count=2, epochs=3),
    {"input": {"shape": [2, 2]}, "model": {"hidden": [4]}, "stream": {"batch_size": SIZE}}
    | cells.optimizer("sgd", 0.1),
    (
        Row("naive", {"class": (50.0,), "task": (60.0,)}, {"naive": {}}),
        Row("none yet", {"class": (50.0,)}, {"no-such-recipe": {}}, note="It will come."),
    ),
    seeds=1,
)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace MNIST by two tasks of twenty samples."""

    def lesson(task: int) -> streams.TaskData:
        train = Samples(PIXELS, [2 * task + n % 2 for n in range(20)])
        return streams.TaskData(train, train.select(np.arange(5)))

    def tasks(curriculum: Curriculum, seed: int) -> list[streams.TaskData]:
        del seed
        return [lesson(number) for number in range(curriculum.count)]

    monkeypatch.setitem(streams.TASKS, "tiny", tasks)


def topic(total: int) -> streams.RepeatedTopic:
    """Return a topic that repeats the twenty samples until it has `total`."""
    curriculum = Curriculum("tiny", count=1, samples=total)
    store = streams.publish(curriculum, streams.task_data(curriculum, 0), per_record=SIZE, seed=3, scale=1.0)
    records = store.records["tiny-1", 0]
    assert isinstance(records, streams.RepeatedTopic)
    return records


def learned(records: list[Any]) -> np.ndarray:
    """Return the indices of the samples in the training records, in order."""
    trees = [
        msgpack.unpackb(record.value)
        for record in records
        if not record.header(CONTROL_HEADER) and not record.header(USE_HEADER)
    ]
    pixels = np.concatenate([np.frombuffer(tree["x"], np.uint8) for tree in trees])
    return pixels[::4] // 4


@pytest.mark.parametrize("total", [20, 47, 61, 5])
def test_records_equal_those_of_a_list(total: int) -> None:
    """Slices and single offsets, also from the end, equal those of a list, in any order of reading."""
    whole = list(topic(total))
    again = topic(total)
    assert len(again) == len(whole) == 1 + -(-total // SIZE) + 1
    assert [record.offset for record in whole] == list(range(len(whole)))
    for piece in (slice(2, 5), slice(0, 1), slice(-3, None), slice(4, 400), slice(1, 1), slice(0, None, 2)):
        assert [(r.offset, r.value, r.headers) for r in again[piece]] == [
            (r.offset, r.value, r.headers) for r in whole[piece]
        ]
    assert again[-1].header(CONTROL_HEADER) == TASK_END
    assert again[0].header(USE_HEADER) == PROBE
    with pytest.raises(IndexError):
        again[len(whole)]


def test_each_epoch_is_a_permutation_of_its_own() -> None:
    """Every epoch has each sample once, in a different order; the last epoch may be incomplete."""
    taught = learned(list(topic(50)))
    first, second, third = taught[:20], taught[20:40], taught[40:]
    assert sorted(first) == sorted(second) == list(range(20))
    assert first.tolist() != second.tolist()
    assert len(set(third)) == len(third) == 10


def test_every_seed_but_0_draws_the_digits() -> None:
    """The seed draws the two digits of each task, every digit is in one task, and seed 0 keeps them in order."""
    curriculum = Curriculum("drawn")
    in_order = [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
    drawn = [streams.classes(curriculum, seed) for seed in range(4)]
    assert drawn[0] == in_order == streams.classes(Curriculum("split"), 3)
    assert [sorted(digit for pair in pairs for digit in pair) for pairs in drawn] == 4 * [list(range(10))]
    assert len({str(pairs) for pairs in drawn}) == 4
    assert streams.classes(curriculum, 3) == drawn[3]


def test_an_optional_key_of_a_later_version_makes_no_cell_outdated() -> None:
    """The digest ignores keys without a value, because an earlier version may not have known them."""
    assert runner.without_none({"a": 1, "b": None, "c": {"d": None, "e": [None]}}) == {"a": 1, "c": {"e": [None]}}


def test_a_finished_cell_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cell runs once, its result stays in the file, and it runs again only if its configuration has changed."""
    ran: list[str] = []
    really = runner.run

    def run(cell: runner.Cell, *rest: Any) -> dict[str, Any]:
        ran.append(cell.key)
        return really(cell, *rest)

    monkeypatch.setattr(runner, "run", run)
    console = Console(quiet=True)

    def reproduce(table: Table, *, pattern: str = "", again: bool = False) -> dict[tuple[str, str], str]:
        ran.clear()
        books = tool.ResultFiles(tmp_path, (table,))
        todo, absent = tool.plan(books.cells(None, pattern, 1.0), books, again=again)
        assert tool.run_cells(todo, books, console, jobs=1, device="cpu") == {}
        return absent

    absent = reproduce(TINY)
    assert ran == ["tiny/naive/class/0", "tiny/naive/task/0"]
    assert "no such recipe" in absent["tiny", "none yet"]
    entry = ResultFile(tmp_path / "reproduce.json").entries["tiny/naive/class/0"]
    assert (entry["samples"], entry["steps"], len(entry["last"])) == (2 * 60, 2 * 9, 2)
    reproduce(TINY)
    assert ran == []
    reproduce(TINY, pattern="NAIVE/task", again=True)
    assert ran == ["tiny/naive/task/0"]
    faster = Table(**{**vars(TINY), "settings": TINY.settings | cells.optimizer("sgd", 0.2)})
    _, outdated = tool.ResultFiles(tmp_path, (faster,)).finished(1.0)
    assert outdated == 2
    reproduce(faster, pattern="class")
    assert ran == ["tiny/naive/class/0"]


def test_a_failing_cell_does_not_stop_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is returned by cell; all other cells are finished and stored."""
    really = runner.run

    def run(cell: runner.Cell, *rest: Any) -> dict[str, Any]:
        if cell.scenario == "class":
            raise ValueError("no memory left")
        return really(cell, *rest)

    monkeypatch.setattr(runner, "run", run)
    books = tool.ResultFiles(tmp_path, (TINY,))
    todo, _ = tool.plan(books.cells(1, "", 0.5), books, again=False)
    failed = tool.run_cells(todo, books, Console(quiet=True), jobs=1, device="cpu")
    assert list(failed) == ["tiny/naive/class/0"]
    assert list(books.published.entries) == ["tiny/naive/task/0"]
    assert books.published.entries["tiny/naive/task/0"]["samples"] == 2 * 30


def entry(accuracy: float, **over: Any) -> dict[str, Any]:
    """Return a stored result of a cell."""
    figures = {"average_accuracy": accuracy, "backward_transfer": -0.1, "average_forgetting": 0.0}
    spent = {"seconds": 30.0, "cpu_seconds": 36.0, "skipped": 0, "machine": "A machine, 2 cores"}
    return {**figures, **spent, "learned": [1.0, 0.9], "last": [0.8, 0.9], "curve": [[0, 0.5], [10, 1.0]], **over}


def test_the_document_compares_ours_with_the_published_figures(tmp_path: Path) -> None:
    """The document has means, standard errors, verdicts, notes and hours of the results; pictures show what exists."""
    finished: page.Finished = {
        ("split-mnist", "naive", "class"): [entry(0.195), entry(0.205), entry(0.2)],
        ("split-mnist", "joint", "class"): [entry(0.9), entry(0.91)],
        ("split-mnist", "EWC", "task"): [entry(0.9950, skipped=128)],
        ("rotations", "naive", "class"): [entry(0.6)],
        ("two-tasks", "sequential", "domain"): [entry(0.85)],
    }
    text = page.markdown(finished, {("split-mnist", "LwF"): "no such recipe"}, 3)
    assert "| naive | class | accuracy | 19.9 | 20.00 ± 0.29 (3) | +0.10 | within | 30 s |" in text
    assert "| joint | class | accuracy | 98.17 | 90.50 ± 0.50 (2) | -7.67 | short | 30 s |" in text
    assert "| EWC | task | accuracy | 99.06 | 99.50 (1) | +0.44 | within | 30 s |" in text
    assert "| LwF | class | accuracy | 21.9 | \N{EN DASH} | \N{EN DASH} | \N{EN DASH} | \N{EN DASH} |" in text
    assert "| naive | class | accuracy | 53 | 60.00 (1) | +7.00 | above | 30 s |" in text
    assert "| naive | class | backward transfer | -8 | -10.00 (1) | -2.00 | short | 30 s |" in text
    assert "**LwF**: Not run by this version: no such recipe." in text
    assert "128 samples were skipped" in " ".join(text.split())
    assert "- A machine, 2 cores: 0.08 CPU hours" in text
    assert "- 8 cells; of 5 published figures: 2 within, 1 above, 2 short" in text
    assert "- 3 cells were run with earlier settings" in text
    assert "| sequential | 100.0 | 80.0 | 90.0 |" in text
    page.draw(tmp_path, finished)
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == {"results-split-mnist.png", "results-rotations.png", "two-tasks.png"}


def test_less_forgetting_is_better() -> None:
    """If lower is better, a figure below the published one counts as above."""
    row = cells.ONLINE.rows[0]
    line = page.Line(cells.ONLINE, row, "class", "average_forgetting", 19.5, (9.0, 9.2), 1.0, 0)
    assert line.verdict == "above"
    assert page.Line(cells.ONLINE, row, "class", "average_forgetting", 19.5, (25.0,), 1.0, 0).verdict == "short"


def test_every_cell_is_valid_or_has_a_reason() -> None:
    """Each cell has a valid configuration, or a reason that names the missing recipe or parameter."""
    books = tool.ResultFiles(Path("/nowhere"))
    todo, absent = tool.plan(books.cells(1, "", 1.0), books, again=False)
    assert {cell.row.method for cell in todo} >= {"naive", "joint", "EWC", "SI", "generative replay"}
    assert all(reason.startswith("strategy") for reason in absent.values()), absent
    assert len({cell.key for cell in books.cells(None, "", 1.0)}) == len(books.cells(None, "", 1.0))


@pytest.mark.slow
def test_cells_run_in_parallel(tmp_path: Path) -> None:
    """A cell runs in a worker process that shares nothing with this one, and its result comes back."""
    books = tool.ResultFiles(tmp_path)
    (cell,) = books.cells(1, "two-tasks/sequential", 0.0)  # one sample a task
    require((DATA / "mnist.npz").is_file(), "mnist.npz")
    assert tool.run_cells([cell], books, Console(quiet=True), jobs=2, device="cpu") == {}
    assert books.demonstration.entries[cell.key]["samples"] == 2


def test_workers_end_with_their_parent(tmp_path: Path) -> None:
    """After a run is killed, its worker processes end too."""
    script = (
        "import os, time\n"
        "from concurrent.futures import ProcessPoolExecutor\n"
        "from multiprocessing import get_context\n"
        "from benchmarks.reproduce import runner\n"
        "if __name__ == '__main__':\n"
        "    pool = ProcessPoolExecutor(1, mp_context=get_context('spawn'), initializer=runner.start_worker)\n"
        "    worker = pool.submit(os.getpid).result()\n"
        "    pool.submit(time.sleep, 600)\n"
        "    print(worker, flush=True)\n"
        "    time.sleep(600)\n"
    )
    path = tmp_path / "run.py"
    path.write_text(script)
    environment = os.environ | {"PYTHONPATH": str(runner.ROOT)}
    run = subprocess.Popen([sys.executable, path], stdout=subprocess.PIPE, env=environment)
    assert run.stdout is not None
    worker = int(run.stdout.readline())
    assert worker != run.pid
    run.kill()
    assert run.communicate(timeout=60)[0] == b""  # the pipe ends with the last process that holds it


def test_the_readme_has_the_counts_of_the_results() -> None:
    """README.md says how many published figures are reached, with the numbers of docs/results.md."""
    found = re.search(r"of (\d+) published figures: (\d+) within, (\d+) above, (\d+) short", tool.RESULTS.read_text())
    assert found is not None
    text = " ".join((runner.ROOT / "README.md").read_text().split())
    within = (
        "Of {} published figures, ours are within one point or two standard errors in {}, above in {}, and below in {}"
    )
    assert within.format(*found.groups()) in text


def test_the_document_shows_the_stored_results() -> None:
    """docs/results.md is what `make reproduce ARGS=--report` writes from the stored results."""
    files = tool.ResultFiles(tool.STORED)
    finished, outdated = files.finished(1.0)
    _, unavailable = tool.plan(files.cells(None, "", 1.0), files, again=False)
    assert tool.RESULTS.read_text() == page.markdown(finished, unavailable, outdated), (
        "run: make reproduce ARGS=--report"
    )
