"""Pictures and a page from checkpoints: what was learned and what was forgotten, for people who know neither word."""

from __future__ import annotations

import base64
import html
import json
from dataclasses import dataclass
from string import Template
from typing import TYPE_CHECKING, Any

from streamlearn.data import StreamlearnError
from streamlearn.evaluation.matrix import AccuracyMatrix

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from streamlearn.checkpoint import Checkpoint

COLOURS = ("#3b6fb6", "#d1742f", "#3d9a5b", "#b8434e", "#7d5ab5", "#8a6d3b", "#c95f9f", "#6b7280", "#a9a13a", "#2aa1b3")

STYLE = """
body { font: 16px/1.55 system-ui, sans-serif; color: #1d2430; max-width: 62rem; margin: 2.5rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.2rem; margin-top: 2.4rem; } p { max-width: 46rem; }
img { max-width: 100%; } table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .35rem .8rem; text-align: right; border-bottom: 1px solid #dde3ea; }
th:first-child, td:first-child { text-align: left; }
.small { color: #5b6675; font-size: .9rem; }
"""

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>What was learned, and what was forgotten</title><style>$style</style>
<h1>What was learned, and what was forgotten</h1>
<p>A model learned one task after the other, from a stream in which each task came once. After every few batches it was
asked about samples of <em>every</em> task so far that it had never been taught. A model without memory is good at what
came last, and has lost the rest.</p>
$overview
<p class="small"><b>Average accuracy</b>: the mean over all tasks seen, now. <b>Forgetting</b>: how far a task has fallen
below the best it reached after an earlier task. <b>Backward transfer</b>: how far later tasks moved the earlier ones;
negative is harm. <b>Forward transfer</b>: what was known of a task before it began; undefined where new classes cannot be
guessed. <b>Learning accuracy</b>: how well each task was known when it ended. <b>Worst case</b>: the newest task now, and the
others at the lowest point since they ended. A dash means: not defined, or not measured yet.</p>
<h2>Accuracy along the stream</h2>
<p>One line a task, from the moment it began. A line that falls is a task being forgotten.</p>
$accuracy
<h2>The accuracy matrix</h2>
<p>Each row is the moment after a task was learned; each column is what was asked. The diagonal is what was just learned;
below it stands what is still known of earlier tasks.</p>
$matrix
<h2>What each task lost</h2>
$forgetting
$details
<p class="small">Made by streamlearn $version from $sources.</p></html>
"""


@dataclass(frozen=True)
class Curves:
    """A run as a report shows it."""

    name: str
    status: dict[str, Any]
    history: list[tuple[int, int, dict[int, float]]]  # batches, samples learned, accuracy by task

    @classmethod
    def of(cls, checkpoint: Checkpoint, name: str | None = None) -> Curves:
        """Return what a checkpoint knows of its run."""
        status = checkpoint.read_json("status.json")
        matrix = AccuracyMatrix.of(checkpoint)
        status["matrix"] = matrix.matrix()  # which is not there where there are many tasks
        return cls(name or status["strategy"], status, matrix.history)

    def learned(self) -> dict[str, float]:
        """Return R[k, k] by task's name: what was known of it when it ended."""
        rows = zip(self.status["tasks"], self.status["matrix"], strict=False)  # the last may not have ended
        found = {task["name"]: row[number] for number, (task, row) in enumerate(rows)}
        return {name: accuracy for name, accuracy in found.items() if accuracy is not None}

    @property
    def tasks(self) -> list[str]:
        """The tasks' names, with their labels where these are few."""
        names = []
        for task in self.status["tasks"]:
            labels = task["labels"]
            names.append(task["name"] + (f" ({', '.join(map(str, labels))})" if 0 < len(labels) <= 4 else ""))
        return names


def intransigence(run: Curves, joint: Curves) -> dict[str, float]:
    """Return a*_k - R[k, k] by task, what a joint run knew of it when it ended and this run did not (Chaudhry et al. 2018)."""
    own, best = run.learned(), joint.learned()
    return {name: best[name] - own[name] for name in own if name in best}


def write(output: Path, runs: Sequence[Curves], joint: Curves | None = None) -> Path:
    """Write `report.html`, `accuracy.png`, `matrix.png` and `forgetting.png`; return the page's path.

    `joint`: a run of the same tasks by joint training, to which what each task reached is compared.
    Raises `StreamlearnError` (78) when matplotlib is not installed, and (1) when nothing was evaluated yet.
    """
    if not any(run.history for run in runs):
        raise StreamlearnError("nothing was evaluated yet: there is nothing to show")
    output.mkdir(parents=True, exist_ok=True)
    pictures = {"accuracy": _accuracy(runs), "matrix": _matrix(runs), "forgetting": _forgetting(runs)}
    for name, figure in pictures.items():
        figure.savefig(output / f"{name}.png", dpi=110)
    page = output / "report.html"
    page.write_text(_page(runs, {name: (output / f"{name}.png").read_bytes() for name in pictures}, joint))
    return page


def summary(run: Curves) -> dict[str, Any]:
    """Return a run's figures."""
    keys = ("average_accuracy", "average_forgetting", "backward_transfer", "forward_transfer", "matrix")
    return {key: run.status[key] for key in keys}


def _subplots(count: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise StreamlearnError("pictures need matplotlib: pip install 'streamlearn[demo]'", code=78) from error
    figure = Figure(figsize=(width * count, height), layout="constrained")
    axes = figure.subplots(1, count, squeeze=False)
    return figure, list(axes[0])


def _accuracy(runs: Sequence[Curves]) -> Figure:
    figure, axes = _subplots(len(runs), 5.2, 3.8)
    for ax, run in zip(axes, runs, strict=True):
        for index, name in enumerate(run.tasks):
            points = [(samples, row[index]) for _, samples, row in run.history if index in row]
            colour = COLOURS[index % len(COLOURS)]
            ax.plot(
                [x for x, _ in points],
                [100 * y for _, y in points],
                color=colour,
                label=name,
                linewidth=2,
                marker="o",
                markersize=2.5,
            )
        ax.set_title(run.name)
        ax.set_xlabel("samples learned")
        ax.set_ylim(-3, 103)
        ax.grid(alpha=0.25)
    axes[0].set_ylabel("accuracy on held-out samples, %")
    axes[-1].legend(fontsize=8, loc="lower left")
    return figure


def _matrix(runs: Sequence[Curves]) -> Figure:
    figure, axes = _subplots(len(runs), 4.4, 4.0)
    for ax, run in zip(axes, runs, strict=True):
        matrix = run.status["matrix"]
        values = [[float("nan") if cell is None else 100 * cell for cell in row] for row in matrix]
        if values:
            ax.imshow(values, vmin=0, vmax=100, cmap="Blues")
        for i, row in enumerate(values):
            for j, value in enumerate(row):
                if value == value:  # noqa: PLR0124 - a cell that was not measured is not a number
                    ax.text(j, i, f"{value:.0f}", ha="center", va="center", color="white" if value > 55 else "#1d2430")
        names = [task["name"] for task in run.status["tasks"]][: len(matrix)]
        ax.set_xticks(range(len(names)), names, rotation=35, ha="right", fontsize=8)
        ax.set_yticks(range(len(names)), names, fontsize=8)
        ax.set_title(run.name)
        ax.set_xlabel("accuracy on")
    axes[0].set_ylabel("after learning")
    return figure


def _forgetting(runs: Sequence[Curves]) -> Figure:
    figure, (ax,) = _subplots(1, 6.5, 3.4)
    count = max(len(run.tasks) for run in runs)
    width = 0.8 / len(runs)
    for number, run in enumerate(runs):
        lost = [task["probe"]["forgetting"] for task in run.status["tasks"]]
        places = [index + number * width for index, value in enumerate(lost) if value is not None]
        ax.bar(
            places,
            [100 * value for value in lost if value is not None],
            width,
            label=run.name,
            color=COLOURS[number % len(COLOURS)],
        )
    ax.set_xticks(
        [index + 0.4 - width / 2 for index in range(count)], max((run.tasks for run in runs), key=len), fontsize=8
    )
    ax.set_ylabel("forgotten, percentage points")
    ax.axhline(0, color="#1d2430", linewidth=0.8)
    ax.grid(axis="y", alpha=0.25)
    if len(runs) > 1:
        ax.legend(fontsize=8)
    return figure


def _page(runs: Sequence[Curves], pictures: dict[str, bytes], joint: Curves | None) -> str:
    images = {
        name: f'<img alt="{name}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'
        for name, data in pictures.items()
    }
    sources = ", ".join((run.status["checkpoint"] or {}).get("id", "the last checkpoint") for run in runs)
    return Template(PAGE).substitute(
        images,
        style=STYLE,
        overview=_table(
            ["", *(name.replace("_", " ") for name in OVERVIEW), "samples learned"],
            [
                [
                    run.name,
                    *(show(run.status.get(name)) for name, show in OVERVIEW.items()),
                    f"{run.status['samples']['trained']:,}",
                ]
                for run in runs
            ],
        ),
        details="".join(f"<h3>{html.escape(run.name)}</h3>{_task_table(run, joint)}" for run in runs),
        version=html.escape(runs[0].status["version"]),
        sources=html.escape(sources),
    )


def _task_table(run: Curves, joint: Curves | None) -> str:
    rows, missed = [], {} if joint is None else intransigence(run, joint)
    for name, task in zip(run.tasks, run.status["tasks"], strict=True):
        probe = task["probe"]
        figures = [_percent(probe["accuracy"]), _percent(probe["best"]), _points(probe["forgetting"])]
        if joint is not None:
            figures.append(_points(missed.get(task["name"])))
        rows.append([name, f"{task['samples']['consumed']:,}", f"{probe['size']:,}", *figures])
    head = ["task", "samples", "held out", "accuracy now", "best", "forgotten"]
    return _table(head if joint is None else [*head, "intransigence"], rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{cells}</tr>{body}</table>"


def _percent(value: float | None) -> str:
    return "\N{EN DASH}" if value is None else f"{100 * value:.1f} %"


def _points(value: float | None) -> str:
    return "\N{EN DASH}" if value is None else f"{100 * value:+.1f}"


OVERVIEW = {
    "average_accuracy": _percent,
    "learning_accuracy": _percent,
    "average_forgetting": _percent,
    "worst_forgetting": _percent,
    "backward_transfer": _points,
    "forward_transfer": _points,
    "worst_case_accuracy": _percent,
}


def write_json(path: Path, tree: dict[str, Any]) -> None:
    """Write a JSON file for programs."""
    path.write_text(json.dumps(tree, indent=2) + "\n")
