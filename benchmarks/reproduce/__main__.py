"""Run the cells that are not finished, and write docs/results.md: `python -m benchmarks.reproduce --help`."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor, as_completed
from fnmatch import fnmatchcase
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table as Grid

from benchmarks.reproduce import page, runner
from benchmarks.reproduce.cells import TABLES, TWO_TASKS
from benchmarks.reproduce.result_file import ResultFile
from benchmarks.reproduce.runner import ROOT, Cell, RecipeUnavailable

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from benchmarks.reproduce.cells import Table

RESULTS, IMAGES = ROOT / "docs" / "results.md", ROOT / "docs" / "images"
STORED, QUICK = ROOT / "benchmarks", ROOT / ".cache" / "reproduce-quick"
TENTH = 0.1


class ResultFiles:
    """The result file of the published tables and that of the demonstration."""

    def __init__(self, directory: Path, tables: Sequence[Table] = TABLES) -> None:
        self.tables = tables
        self.published = ResultFile(directory / "reproduce.json")
        self.demonstration = ResultFile(directory / "two-tasks.json")

    def of(self, cell: Cell) -> ResultFile:
        """Return the result file of a cell."""
        return self.demonstration if cell.table is TWO_TASKS else self.published

    def cells(self, seeds: int | None, pattern: str, scale: float) -> list[Cell]:
        """Return the cells of all tables, ordered by seed, so that an interrupted run has results of every row."""
        found = [
            Cell(table, row, scenario, seed, scale)
            for table in self.tables
            for row in table.rows
            for scenario in row.published
            for seed in range(table.seeds if seeds is None or not table.repeated else seeds)
        ]
        wanted = [cell for cell in found if fnmatchcase(cell.key.lower(), f"*{pattern.lower()}*")]
        return sorted(wanted, key=lambda cell: cell.seed)

    def finished(self, scale: float) -> tuple[page.Finished, int]:
        """Return the results of the present settings, and the number of outdated results."""
        finished: page.Finished = defaultdict(list)
        outdated = 0
        for table in self.tables:
            for row in table.rows:
                for scenario in row.published:
                    cell = Cell(table, row, scenario, 0, scale)
                    prefix = cell.key.removesuffix("0")
                    for key, entry in self.of(cell).entries.items():
                        seed = key.removeprefix(prefix)
                        if not key.startswith(prefix) or not seed.isdecimal():
                            continue
                        if _digest(Cell(table, row, scenario, int(seed), scale)) == entry["digest"]:
                            finished[table.name, row.method, scenario].append(entry)
                        else:
                            outdated += 1
        return dict(finished), outdated


def plan(cells: Sequence[Cell], files: ResultFiles, *, again: bool) -> tuple[list[Cell], dict[tuple[str, str], str]]:
    """Return the cells to run, and by table and method why cells cannot be run."""
    todo: list[Cell] = []
    unavailable: dict[tuple[str, str], str] = {}
    for cell in cells:
        try:
            digest = cell.digest()
        except RecipeUnavailable as error:
            unavailable[cell.table.name, cell.row.method] = str(error)
        else:
            if again or not files.of(cell).has_result(cell.key, digest):
                todo.append(cell)
    return todo, unavailable


def run_cells(
    todo: Sequence[Cell], files: ResultFiles, console: Console, *, jobs: int, device: str
) -> dict[str, BaseException]:
    """Run cells and store each result as soon as it is finished; return the errors by cell."""
    failed: dict[str, BaseException] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
        whole = bar.add_task("cells", total=len(todo))
        runs = _run_in_sequence(todo, device, bar) if jobs == 1 else _run_in_parallel(todo, device, jobs)
        for cell, outcome in runs:
            if isinstance(outcome, BaseException):
                failed[cell.key] = outcome
                console.print(f"{cell.key}: failed: {type(outcome).__name__}: {outcome}", markup=False, highlight=False)
            else:
                files.of(cell).add(cell.key, outcome)
                took = f"{100 * outcome['average_accuracy']:6.2f} %, {outcome['seconds']:.0f} s"
                console.print(f"{cell.key}: {took}", markup=False, highlight=False)
            bar.advance(whole)
    return failed


def estimate_hours(cells: Sequence[Cell], files: ResultFiles) -> tuple[float, int]:
    """Return the expected CPU hours, from results of other seeds or scenarios, and the number of cells without any."""
    known: dict[tuple[str, ...], list[float]] = defaultdict(list)
    for book in (files.published, files.demonstration):
        for key, entry in book.entries.items():
            table, method, scenario, _ = key.split("/")
            known[table, method, scenario].append(entry["cpu_seconds"])
            known[table, method].append(entry["cpu_seconds"])
    hours, unknown = 0.0, 0
    for cell in cells:
        names = (cell.table.name, cell.row.method)
        seconds = known.get((*names, cell.scenario)) or known.get(names)
        hours += statistics.mean(seconds) / 3600 if seconds else 0.0
        unknown += not seconds
    return hours, unknown


def main() -> None:
    """Run what is not finished, and write the document."""
    options = _options()
    console = Console()
    scale = TENTH if options.quick else 1.0
    files = ResultFiles(QUICK if options.quick else STORED)
    cells = files.cells(options.seeds, options.only, scale)
    if not cells:
        sys.exit(f"--only {options.only}: no cell has such a name; names are TABLE/METHOD/SCENARIO/SEED")
    todo, unavailable = plan(cells, files, again=options.again)
    for (table, method), why in unavailable.items():
        console.print(f"skipped: {table}/{method}: {why}", markup=False, highlight=False)
    hours, unknown = estimate_hours(todo, files)
    runnable = sum((cell.table.name, cell.row.method) not in unavailable for cell in cells)
    console.print(
        f"{runnable} cells, {runnable - len(todo)} of them finished; the rest takes about {hours:.1f} CPU hours"
        + (f" and {unknown} cells without a known duration" if unknown else ""),
        highlight=False,
    )
    failed: dict[str, BaseException] = {}
    if todo and not options.report:
        runner.quiet()
        begun = time.monotonic()
        try:
            failed = run_cells(todo, files, console, jobs=options.jobs, device=options.device)
        except KeyboardInterrupt:
            sys.exit("stopped; finished cells are stored, and `make reproduce` continues from there")
        console.print(f"{(time.monotonic() - begun) / 60:.0f} min", highlight=False)
    finished, outdated = files.finished(scale)
    _print_results(console, finished, cells)
    if not options.quick:  # a tenth of the work gives no valid result
        _, unavailable = plan(files.cells(None, "", 1.0), files, again=False)
        RESULTS.write_text(page.markdown(finished, unavailable, outdated))
        page.draw(IMAGES, finished)
        console.print(f"wrote {RESULTS.relative_to(ROOT)} and its pictures", highlight=False)
    if failed:
        sys.exit(f"{len(failed)} cells failed: {', '.join(failed)}")


def _run_in_sequence(
    todo: Sequence[Cell], device: str, bar: Progress
) -> Iterator[tuple[Cell, dict[str, Any] | BaseException]]:
    part = bar.add_task("", total=1.0)
    for cell in todo:
        bar.reset(part, description=cell.key, total=100)

        def show(done: float) -> None:
            bar.update(part, completed=round(100 * done))

        try:
            yield cell, runner.run(cell, device, show)
        except Exception as error:  # noqa: BLE001 - one failing cell must not stop the others, which take hours
            yield cell, error


def _run_in_parallel(
    todo: Sequence[Cell], device: str, jobs: int
) -> Iterator[tuple[Cell, dict[str, Any] | BaseException]]:
    # torch and its threads do not work after a fork
    pool = ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=runner.start_worker)
    try:
        runs = {pool.submit(runner.run, cell, device): cell for cell in todo}
        for run in as_completed(runs):
            error = run.exception()
            yield runs[run], run.result() if error is None else error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _digest(cell: Cell) -> str | None:
    try:
        return cell.digest()
    except RecipeUnavailable:
        return None


def _print_results(console: Console, finished: page.Finished, cells: Sequence[Cell]) -> None:
    grid = Grid("table", "method", "scenario", "figure", "published", "ours (seeds)", "verdict")
    chosen = {(cell.table.name, cell.row.method, cell.scenario) for cell in cells}
    for table in TABLES:
        for line in page.lines(table, finished):
            if line.values and (table.name, line.row.method, line.scenario) in chosen:
                published = page.DASH if line.published is None else f"{line.published:g}"
                names = (table.name, line.row.method, line.scenario, page.NAMES[line.figure])
                grid.add_row(*names, published, line.ours, line.verdict)
    console.print(grid)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reproduce", description=__doc__)
    parser.add_argument("--seeds", type=int, metavar="N", help="seeds of each cell; default: the table's own, 3 or 5")
    parser.add_argument(
        "--only",
        default="",
        metavar="PATTERN",
        help="run only cells whose name TABLE/METHOD/SCENARIO/SEED contains this",
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="parallel processes, one thread each")
    parser.add_argument("--device", default="cpu", help="cpu or cuda; results of both are used")
    parser.add_argument(
        "--quick", action="store_true", help="a tenth of the work, stored separately, never in docs/results.md"
    )
    parser.add_argument("--report", action="store_true", help="run nothing: write docs/results.md from stored results")
    parser.add_argument("--again", action="store_true", help="also run finished cells, because the code has changed")
    return parser.parse_args()


if __name__ == "__main__":
    main()
