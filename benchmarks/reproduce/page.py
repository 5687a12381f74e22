"""Write docs/results.md and its pictures, from the stored results alone."""

from __future__ import annotations

import statistics
import textwrap
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.reproduce.cells import LOWER_IS_BETTER, PUBLISHED, TWO_TASKS
from streamlearn.tools.report import COLOURS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from benchmarks.reproduce.cells import Row, Table

Entries = list[dict[str, Any]]
Finished = dict[tuple[str, str, str], Entries]  # (table, method, scenario) -> one entry for each seed

POINT = 1.0  # percentage points; a smaller difference does not count
NAMES = {
    "average_accuracy": "accuracy",
    "backward_transfer": "backward transfer",
    "average_forgetting": "forgetting",
}
LIGHT, DARK = "#c9ced6", "#1d2430"
DASH = "\N{EN DASH}"

HEAD = """# Results

Written by `make reproduce`; edit `benchmarks/reproduce/`, not this page.

Published tables, rerun with the code that the daemon runs: topics in memory, the reader, the loop and
the learner. There is no second training loop. Figures are percentages, as mean ± standard error over
seeds. The verdict is `within` if the difference is at most one point or two standard errors,
otherwise `above` or `short`; for forgetting, a lower figure is `above`. The penalty strengths of
different libraries are not comparable: the notes say how they were converted.
"""


@dataclass(frozen=True)
class Line:
    """A row of a table in the document: one method, scenario and figure."""

    table: Table
    row: Row
    scenario: str
    figure: str
    published: float | None
    values: tuple[float, ...]  # percent, one for each seed
    seconds: float  # mean over seeds
    skipped: int  # samples of batches without a finite update

    @property
    def mean(self) -> float | None:
        """The mean over seeds."""
        return statistics.mean(self.values) if self.values else None

    @property
    def error(self) -> float | None:
        """The standard error of the mean; None for a single seed."""
        return statistics.stdev(self.values) / len(self.values) ** 0.5 if len(self.values) > 1 else None

    @property
    def difference(self) -> float | None:
        """Ours minus the published figure, in points."""
        return None if self.published is None or self.mean is None else self.mean - self.published

    @property
    def verdict(self) -> str:
        """`within`, `above` or `short`; empty if there is no published figure or no result."""
        if self.difference is None:
            return ""
        if abs(self.difference) <= max(POINT, 2 * (self.error or 0.0)):
            return "within"
        return "above" if (self.difference > 0) != (self.figure in LOWER_IS_BETTER) else "short"

    @property
    def ours(self) -> str:
        """The mean, its error and the number of seeds."""
        if self.mean is None:
            return DASH
        error = "" if self.error is None else f" ± {self.error:.2f}"
        return f"{self.mean:.2f}{error} ({len(self.values)})"


def lines(table: Table, finished: Finished) -> list[Line]:
    """Return the rows of a table in the document."""
    shown = []
    for row in table.rows:
        for scenario, published in row.published.items():
            entries = finished.get((table.name, row.method, scenario), [])
            seconds = statistics.mean([entry["seconds"] for entry in entries]) if entries else 0.0
            for figure, value in zip(table.figures, published, strict=True):
                values = tuple(100 * entry[figure] for entry in entries)
                skipped = sum(entry["skipped"] for entry in entries)
                shown.append(Line(table, row, scenario, figure, value, values, seconds, skipped))
    return shown


def markdown(finished: Finished, unavailable: Mapping[tuple[str, str], str], outdated: int) -> str:
    """Return the document. `unavailable`: why this version cannot run a method; `outdated`: number of omitted cells."""
    parts = [HEAD, _summary(finished, outdated)]
    for table in PUBLISHED:
        shown = lines(table, finished)
        head = ["method", "scenario", "figure", "published", "ours (seeds)", "difference", "verdict", "wall time"]
        body = [[*_cells(line), _wall(line)] for line in shown]
        parts.append(f"\n## {table.title}\n{table.protocol}\n\n{_table(head, body)}")
        if any(line.values for line in shown):
            parts.append(f"\n![{table.title}: ours beside the published figures](images/results-{table.name}.png)\n")
        parts.append(_notes(table, shown, unavailable))
    shown = lines(TWO_TASKS, finished)
    parts.append(f"\n## {TWO_TASKS.title}\n{TWO_TASKS.protocol}\n")
    if any(line.values for line in shown):
        parts.append("\n![Accuracy on the first task while the second is learned, by method](images/two-tasks.png)\n")
    learned = [
        [row.method, *(_accuracies(entries[0]) if (entries := _of(finished, TWO_TASKS, row)) else [DASH] * 3)]
        for row in TWO_TASKS.rows
    ]
    head = ["method", "first task, when learned", "first task, at the end", "second task, at the end"]
    parts += ["\n", _table(head, learned), _notes(TWO_TASKS, shown, unavailable)]
    return "".join(parts)


def draw(images: Path, finished: Finished) -> None:
    """Draw a picture for each table that has results."""
    images.mkdir(parents=True, exist_ok=True)
    for table in PUBLISHED:
        shown = [line for line in lines(table, finished) if line.values]
        if shown:
            _save(_bars(shown), images / f"results-{table.name}.png")
    curves = {
        row.method: _of(finished, TWO_TASKS, row)[0]["curve"] for row in TWO_TASKS.rows if _of(finished, TWO_TASKS, row)
    }
    if curves:
        _save(_curves(curves), images / "two-tasks.png")


def _of(finished: Finished, table: Table, row: Row) -> Entries:
    return finished.get((table.name, row.method, next(iter(row.published))), [])


def _cells(line: Line) -> list[str]:
    published = DASH if line.published is None else f"{line.published:g}"
    difference = DASH if line.difference is None else f"{line.difference:+.2f}"
    named = [line.row.method, line.scenario, NAMES[line.figure]]
    return [*named, published, line.ours, difference, line.verdict or DASH]


def _wall(line: Line) -> str:
    return DASH if not line.values else f"{line.seconds:.0f} s"


def _accuracies(entry: Mapping[str, Any]) -> list[str]:
    return [f"{100 * value:.1f}" for value in (entry["learned"][0], entry["last"][0], entry["last"][1])]


def _summary(finished: Finished, outdated: int) -> str:
    """Return the machines, the CPU hours, and the number of verdicts of each kind."""
    hours: dict[str, float] = defaultdict(float)
    for entry in (entry for entries in finished.values() for entry in entries):
        hours[entry["machine"]] += entry["cpu_seconds"] / 3600
    where = "".join(f"- {name}: {value:.2f} CPU hours\n" for name, value in sorted(hours.items()))
    verdicts = [line.verdict for table in PUBLISHED for line in lines(table, finished)]
    compared = ", ".join(f"{verdicts.count(word)} {word}" for word in ("within", "above", "short"))
    text = f"\n{where}- {sum(map(len, finished.values()))} cells; of {sum(map(bool, verdicts))} published figures: {compared}\n"
    if outdated:
        text += f"- {outdated} cells were run with earlier settings and are omitted; `make reproduce` runs them again\n"
    return text


def _notes(table: Table, shown: Sequence[Line], unavailable: Mapping[tuple[str, str], str]) -> str:
    skipped = {line.row.method: line.skipped for line in shown if line.skipped}
    notes = []
    for row in table.rows:
        sentences = [row.note] if row.note else []
        if (why := unavailable.get((table.name, row.method))) is not None:
            sentences.append(f"Not run by this version: {why}.")
        if row.method in skipped:
            sentences.append(f"{skipped[row.method]:,} samples were skipped: their updates were not finite.")
        if sentences:
            text = f"- **{row.method}**: {' '.join(sentences)}"
            notes.append(textwrap.fill(text, 100, subsequent_indent="  ", break_long_words=False) + "\n")
    return "\n" + "".join(notes) if notes else ""


def _table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *body]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=110, metadata={"Software": None})  # without the version, equal figures give equal bytes


def _bars(shown: Sequence[Line]) -> Figure:
    """Return a figure with a panel for each scenario and figure: the published bar, and ours with its error."""
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys((line.scenario, line.figure) for line in shown))
    methods = list(dict.fromkeys(line.row.method for line in shown))
    size = (3.6 * len(panels) + 1.8, 0.42 * len(methods) + 1.6)
    figure = Figure(figsize=size, layout="constrained")
    axes: list[Axes] = list(figure.subplots(1, len(panels), squeeze=False, sharey=True)[0])
    for ax, (scenario, name) in zip(axes, panels, strict=True):
        for line in (line for line in shown if (line.scenario, line.figure) == (scenario, name)):
            place = methods.index(line.row.method)
            if line.published is not None:
                ax.barh(place - 0.2, line.published, 0.36, color=LIGHT)
            ax.barh(place + 0.2, line.mean or 0.0, 0.36, color=COLOURS[0], xerr=line.error, ecolor=DARK)
        ax.set_title(f"{scenario}: {NAMES[name]}, %", fontsize=10)
        ax.set_yticks(range(len(methods)), methods)
        ax.grid(axis="x", alpha=0.25)
    axes[0].invert_yaxis()
    axes[-1].barh([0], [0], color=LIGHT, label="published")
    axes[-1].barh([0], [0], color=COLOURS[0], label="ours")
    figure.legend(loc="outside lower right", ncols=2, fontsize=8)
    return figure


def _curves(curves: Mapping[str, Sequence[tuple[int, float]]]) -> Figure:
    """Return a figure with the accuracy on the first task along the stream, one line for each method."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 4.6), layout="constrained")
    ax: Axes = figure.subplots()
    for number, (method, points) in enumerate(curves.items()):
        style = ("-", "--", ":")[number // len(COLOURS)]
        samples, accuracies = [x for x, _ in points], [100 * y for _, y in points]
        ax.plot(samples, accuracies, style, color=COLOURS[number % len(COLOURS)], label=method, linewidth=1.8)
    ax.set_xlabel("samples learned; the second task begins half way")
    ax.set_ylabel("accuracy on the first task, %")
    ax.grid(alpha=0.25)
    figure.legend(loc="outside right upper", fontsize=8)
    return figure
