"""Pictures and a page from checkpoints: what was learned and what was forgotten, for people who know neither word."""

from __future__ import annotations

import base64
import html
import io
import json
import textwrap
import warnings
from dataclasses import dataclass, field
from string import Template
from typing import TYPE_CHECKING, Any

from streamlearn.data import StreamlearnError
from streamlearn.evaluation.matrix import AccuracyMatrix

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from streamlearn.checkpoint import Checkpoint

COLOURS = ("#3b6fb6", "#d1742f", "#3d9a5b", "#b8434e", "#7d5ab5", "#8a6d3b", "#c95f9f", "#6b7280", "#a9a13a", "#2aa1b3")

MANY = 30  # tasks, above which pictures have no names, bars and numbers of single ones
MAX_LINES, MAX_POINTS = 300, 300  # of a picture of more tasks than that: tasks, and evaluations
MAX_LETTERS = 32  # of a name in a picture
DPI = 110

STYLE = """
body { font: 16px/1.55 system-ui, sans-serif; color: #1d2430; max-width: 62rem; margin: 2.5rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.2rem; margin-top: 2.4rem; } p { max-width: 46rem; }
img { max-width: 100%; } table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .35rem .8rem; text-align: right; border-bottom: 1px solid #dde3ea; }
th:first-child, td:first-child { text-align: left; }
dl { display: grid; grid-template-columns: max-content auto; gap: .1rem 1rem; } dt { color: #5b6675; } dd { margin: 0; }
.small { color: #5b6675; font-size: .9rem; }
"""

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>$title: what was learned, and what was forgotten</title><style>$style</style>
<h1>$title: what was learned, and what was forgotten</h1>
$facts
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
class Run:
    """A run as a report shows it."""

    name: str
    status: dict[str, Any]
    history: list[tuple[int, int, dict[int, float]]]  # batches, samples learned, accuracy by task
    checkpoint: Mapping[str, Any] = field(default_factory=dict)  # the manifest of the one that it was read from

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint, name: str | None = None) -> Run:
        """Return what a checkpoint knows of its run."""
        status = checkpoint.read_json("status.json")
        matrix = AccuracyMatrix.from_checkpoint(checkpoint)
        status["matrix"] = matrix.matrix()  # which is not there where there are many tasks
        return cls(name or status["strategy"], status, matrix.history, checkpoint.manifest)

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


def intransigence(run: Run, joint: Run) -> dict[str, float]:
    """Return a*_k - R[k, k] by task, what a joint run knew of it when it ended and this run did not (Chaudhry et al. 2018)."""
    own, best = run.learned(), joint.learned()
    return {name: best[name] - own[name] for name in own if name in best}


def write(output: Path, runs: Sequence[Run], joint: Run | None = None) -> Path:
    """Write `report.html`, `accuracy.png`, `matrix.png` and `forgetting.png`; return the page's path.

    `joint`: a run of the same tasks by joint training, to which what each task reached is compared.
    Raises `StreamlearnError` (78) when matplotlib is not installed, and (1) when nothing was evaluated yet.
    """
    if not any(run.history for run in runs):
        raise StreamlearnError("nothing was evaluated yet: there is nothing to show")
    output.mkdir(parents=True, exist_ok=True)
    pictures = _drawn(runs)
    for name, content in pictures.items():
        (output / f"{name}.png").write_bytes(content)
    page = output / "report.html"
    page.write_text(_page(runs, pictures, joint), encoding="utf-8")
    return page


def summary(run: Run) -> dict[str, Any]:
    """Return a run's figures."""
    keys = ("average_accuracy", "average_forgetting", "backward_transfer", "forward_transfer", "matrix")
    return {key: run.status[key] for key in keys}


def _drawn(runs: Sequence[Run]) -> dict[str, bytes]:
    """Return the pictures as PNG. Names are shown as they are: no `$` in them begins a formula."""
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise StreamlearnError("pictures need matplotlib: pip install 'streamlearn[demo]'", code=78) from error
    pictures = {"accuracy": _accuracy, "matrix": _matrix, "forgetting": _forgetting}
    found = {}
    with mpl.rc_context({"text.parse_math": False, "axes.unicode_minus": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # a box stands for it
        for name, draw in pictures.items():
            content = io.BytesIO()
            draw(runs).savefig(content, format="png", dpi=DPI)
            found[name] = content.getvalue()
    return found


def _subplots(count: int, width: float, height: float, beside: float = 0.0) -> tuple[Figure, list[Axes]]:
    """Return a figure with axes side by side, each of these inches, and with room `beside` them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * count + beside, height), layout="constrained")
    axes = figure.subplots(1, count, squeeze=False)
    return figure, list(axes[0])


def _size(runs: Sequence[Run]) -> int:
    """Return how many tasks the longest run has."""
    return max(len(run.status["tasks"]) for run in runs)


def _many(runs: Sequence[Run]) -> bool:
    """Tell whether there are too many tasks for each to have a name in a picture."""
    return _size(runs) > MANY


def _accuracy(runs: Sequence[Run]) -> Figure:
    many = _many(runs)
    height = 3.8 if many else max(3.8, 0.6 + 0.19 * _size(runs))
    figure, axes = _subplots(len(runs), 5.2, height, 0.0 if many else 2.2)  # where the tasks' names stand
    for ax, run in zip(axes, runs, strict=True):
        if many:
            _many_lines(ax, run)
        else:
            _lines(ax, run)
        ax.set_title(_title(run.name))
        ax.set_xlabel("samples learned")
        ax.set_ylim(-3, 103)
        ax.grid(alpha=0.25)
    axes[0].set_ylabel("accuracy on held-out samples, %")
    if not many:
        axes[-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _lines(ax: Axes, run: Run) -> None:
    """Draw a line with a name for each task."""
    for index, name in enumerate(run.tasks):
        points = [(samples, row[index]) for _, samples, row in run.history if index in row]
        (line,) = ax.plot(
            [x for x, _ in points],
            [100 * y for _, y in points],
            color=COLOURS[index % len(COLOURS)],
            linestyle=("-", "--", ":")[index // len(COLOURS) % 3],
            linewidth=2,
            marker="o",
            markersize=2.5,
        )
        line.set_label("\u200b" + _short(name))  # a legend leaves out what begins with an underscore


def _many_lines(ax: Axes, run: Run) -> None:
    """Draw thin lines, a colour from the first task to the last, and the mean over the tasks seen."""
    import numpy as np
    from matplotlib.collections import LineCollection

    history = [run.history[n] for n in _spread(len(run.history), MAX_POINTS)]
    table = np.full((len(history), len(run.status["tasks"])), np.nan, np.float32)  # [evaluation, task]
    for number, (_, _, row) in enumerate(history):
        table[number, list(row)] = 100 * np.array(list(row.values()))
    samples = np.array([n for _, n, _ in history], dtype=np.float64)
    chosen = _spread(table.shape[1], MAX_LINES)
    lines = LineCollection([np.column_stack([samples, table[:, task]]) for task in chosen], linewidths=0.6, alpha=0.5)
    lines.set_array(np.array(chosen) + 1)
    ax.add_collection(lines)
    seen = ~np.isnan(table).all(1)
    ax.plot(samples[seen], np.nanmean(table[seen], 1), color="#1d2430", linewidth=2)
    ax.autoscale_view()
    assert ax.figure is not None
    ax.figure.colorbar(lines, ax=ax, label="task, by number (black: mean)")


def _matrix(runs: Sequence[Run]) -> Figure:
    import numpy as np

    many = _many(runs)
    side = 5.0 if many else max(4.0, 1.2 + 0.36 * _size(runs))
    figure, axes = _subplots(len(runs), side + 0.4, side)
    for ax, run in zip(axes, runs, strict=True):
        values = 100 * np.array(run.status["matrix"], dtype=np.float32)  # [after, task], NaN where nothing was measured
        if values.size:
            edge = len(values) + 0.5 if many else len(values) - 0.5
            ax.imshow(
                values, vmin=0, vmax=100, cmap="Blues", extent=(edge - len(values), edge, edge, edge - len(values))
            )
        if not many:
            for (i, j), value in np.ndenumerate(values):
                if not np.isnan(value):
                    ax.text(j, i, f"{value:.0f}", ha="center", va="center", color="white" if value > 55 else "#1d2430")
            names = [_short(task["name"]) for task in run.status["tasks"]][: len(values)]
            ax.set_xticks(range(len(names)), names, rotation=35, ha="right", fontsize=8)
            ax.set_yticks(range(len(names)), names, fontsize=8)
        ax.set_title(_title(run.name))
        ax.set_xlabel("accuracy on task, by number" if many else "accuracy on")
    axes[0].set_ylabel("after learning")
    return figure


def _forgetting(runs: Sequence[Run]) -> Figure:
    many, count = _many(runs), _size(runs)
    figure, (ax,) = _subplots(1, 6.5, 3.4 if many else max(2.4, 1.2 + 0.24 * count * max(1, len(runs) / 2)))
    width = 0.8 / len(runs)
    for number, run in enumerate(runs):
        lost = [task["probe"]["forgetting"] for task in run.status["tasks"]]
        known = [(index, 100 * value) for index, value in enumerate(lost) if value is not None]
        how: dict[str, Any] = {"label": "\u200b" + _short(run.name), "color": COLOURS[number % len(COLOURS)]}
        if many:
            ax.plot([index + 1 for index, _ in known], [value for _, value in known], ".", markersize=2.5, **how)
        else:  # bars that lie: names of any length have a line of their own
            ax.barh([index + number * width for index, _ in known], [value for _, value in known], width, **how)
    zero, text = (ax.axhline, "forgotten, percentage points") if many else (ax.axvline, "forgotten, percentage points")
    zero(0, color="#1d2430", linewidth=0.8)
    if many:
        ax.set_xlabel("task, by number")
        ax.set_ylabel(text)
    else:
        names = [_short(name) for name in max((run.tasks for run in runs), key=len)]
        ax.set_yticks([index + 0.4 - width / 2 for index in range(count)], names, fontsize=8)
        ax.set_ylim(count - 0.1, -0.5)  # the first task on top
        ax.set_xlabel(text)
    ax.grid(axis="y" if many else "x", alpha=0.25)
    if len(runs) > 1:
        ax.legend(fontsize=8)
    return figure


def _spread(count: int, most: int) -> list[int]:
    """Return at most so many numbers below `count`, evenly spread, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return [round(number * (count - 1) / (most - 1)) for number in range(most)]


def _plain(text: str) -> str:
    """Return a text of any origin with a mark in place of what cannot be shown: control characters, half a surrogate pair."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


def _short(text: str) -> str:
    """Return a name for a picture: plain, and no longer than fits one."""
    text = _plain(text)
    return text if len(text) <= MAX_LETTERS else text[: MAX_LETTERS - 1] + "\N{HORIZONTAL ELLIPSIS}"


def _title(text: str) -> str:
    """Return a run's name for above a picture: in two lines where one is too short for it."""
    return textwrap.fill(_plain(text), MAX_LETTERS, max_lines=2, placeholder="\N{HORIZONTAL ELLIPSIS}")


def _page(runs: Sequence[Run], pictures: dict[str, bytes], joint: Run | None) -> str:
    images = {
        name: f'<img alt="{name}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'
        for name, data in pictures.items()
    }
    sources = ", ".join(run.checkpoint.get("id", "the last checkpoint") for run in runs)
    return Template(PAGE).substitute(
        images,
        style=STYLE,
        title=_text(" and ".join(dict.fromkeys(run.status["name"] for run in runs))),
        facts="".join(map(_facts, runs)),
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
        details="".join(f"<h3>{_text(run.name)}</h3>{_task_table(run, joint)}" for run in runs),
        version=_text(runs[0].status["version"]),
        sources=_text(sources),
    )


def _text(text: str) -> str:
    """Return a text of any origin for the page."""
    return html.escape(_plain(text))


def _facts(run: Run) -> str:
    """Return what was learned when, and by which configuration."""
    status, manifest = run.status, run.checkpoint
    facts = {
        "job": status["name"],
        "saved": f"{manifest.get('created', '')[:19].replace('T', ' ')} UTC" if manifest else "",
        "checkpoint": manifest.get("id", ""),
        "last evaluation": (status.get("evaluated") or "")[:19].replace("T", " "),
        "strategy": status["strategy"],
        "scenario": status["scenario"],
        "model": status["model"],
        "tasks": f"{len(status['tasks']):,}",
        "configuration": f"SHA-256 {manifest['config_sha256'][:16]}" if manifest else "",
    }
    known = "".join(f"<dt>{key}</dt><dd>{_text(value)}</dd>" for key, value in facts.items() if value)
    shaping = manifest.get("shaping", {})
    rows = [[key, json.dumps(value, ensure_ascii=False)] for key, value in sorted(shaping.items())]
    details = f"<details><summary>what shaped it</summary>{_table(['key', 'value'], rows)}</details>" if rows else ""
    return f"<dl>{known}</dl>{details}"


def _task_table(run: Run, joint: Run | None) -> str:
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
    cells = "".join(f"<th>{_text(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
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
