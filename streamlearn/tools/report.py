"""The report: an HTML page and pictures, made from checkpoints, of what was learned and what was forgotten."""

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

from streamlearn.core.errors import ConfigurationError, StreamlearnError
from streamlearn.evaluation.matrix import AccuracyMatrix

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from streamlearn.checkpoint.manifest import Checkpoint

COLOURS = ("#3b6fb6", "#d1742f", "#3d9a5b", "#b8434e", "#7d5ab5", "#8a6d3b", "#c95f9f", "#6b7280", "#a9a13a", "#2aa1b3")

MAX_NAMED_TASKS = 30  # pictures of more tasks have no name, bar or number for each task
MAX_LINES, MAX_POINTS = 300, 300  # lines (tasks) and points (evaluations) in a picture of many tasks
MAX_NAME_LENGTH = 32  # characters of a name in a picture
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
tested on held-out samples of <em>every</em> task so far: samples that it had never learned. A model without protection
against forgetting is good at the newest task, and has forgotten the others.</p>
$overview
<p class="small"><b>Average accuracy</b>: the mean over all tasks seen, now. <b>Forgetting</b>: how far the accuracy on a task
is now below its best at the end of an earlier task. <b>Backward transfer</b>: how much later tasks changed the accuracy on
earlier ones; negative means that they reduced it. <b>Forward transfer</b>: how much accuracy a task had before it started,
above that of an untrained model; not defined where new classes cannot be guessed. <b>Learning accuracy</b>: the accuracy on
each task when it ended. <b>Worst case</b>: the newest task now, and the others at their lowest accuracy since they ended. A
dash means: not defined, or not measured yet.</p>
<h2>Accuracy along the stream</h2>
<p>One line for each task, from the moment it started. A falling line means that the task is being forgotten.</p>
$accuracy
<h2>The accuracy matrix</h2>
<p>Each row is the moment after a task was learned; each column is the task that was tested. The diagonal shows each task
just after it was learned; below the diagonal is what the model still knows about earlier tasks.</p>
$matrix
<h2>Forgetting by task</h2>
$forgetting
$details
<p class="small">Made by streamlearn $version from $sources.</p></html>
"""


@dataclass(frozen=True)
class Run:
    """A run, read from one of its checkpoints."""

    name: str
    status: dict[str, Any]
    history: list[tuple[int, int, dict[int, float]]]  # of each evaluation: batches, samples learned, accuracy by task
    checkpoint: Mapping[str, Any] = field(default_factory=dict)  # the manifest of the checkpoint

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint, name: str | None = None) -> Run:
        """Return the run of a checkpoint. `name`: its title in the report; the default is its strategy."""
        status = checkpoint.read_json("status.json")
        matrix = AccuracyMatrix.from_checkpoint(checkpoint)
        status["matrix"] = matrix.matrix()  # the status itself leaves it out if there are many tasks
        return cls(name or status["strategy"], status, matrix.history, checkpoint.manifest)

    def learned(self) -> dict[str, float]:
        """Return R[k, k] by task name: the accuracy on each task when it ended."""
        rows = zip(self.status["tasks"], self.status["matrix"], strict=False)  # the last task may not have ended
        accuracies = {task["name"]: row[number] for number, (task, row) in enumerate(rows)}
        return {name: accuracy for name, accuracy in accuracies.items() if accuracy is not None}

    @property
    def tasks(self) -> list[str]:
        """The names of the tasks, with their labels if there are at most four."""
        names = []
        for task in self.status["tasks"]:
            labels = task["labels"]
            names.append(task["name"] + (f" ({', '.join(map(str, labels))})" if 0 < len(labels) <= 4 else ""))
        return names


def intransigence(run: Run, joint: Run) -> dict[str, float]:
    """Return the intransigence a*_k - R[k, k] by task: how much better a joint run was at its end (Chaudhry et al. 2018)."""
    own, reference = run.learned(), joint.learned()
    return {name: reference[name] - own[name] for name in own if name in reference}


def write(output: Path, runs: Sequence[Run], joint: Run | None = None) -> Path:
    """Write `report.html`, `accuracy.png`, `matrix.png` and `forgetting.png`; return the page's path.

    `joint`: a run of the same tasks with joint training, for intransigence.
    Raises `ConfigurationError` if matplotlib is not installed, and `StreamlearnError` if there was no evaluation yet.
    """
    if not any(run.history for run in runs):
        raise StreamlearnError("no evaluation yet: there is nothing to report")
    output.mkdir(parents=True, exist_ok=True)
    pictures = _draw_pictures(runs)
    for name, content in pictures.items():
        (output / f"{name}.png").write_bytes(content)
    page = output / "report.html"
    page.write_text(_make_page(runs, pictures, joint), encoding="utf-8")
    return page


def summary(run: Run) -> dict[str, Any]:
    """Return the summary metrics of a run, and its accuracy matrix."""
    keys = ("average_accuracy", "average_forgetting", "backward_transfer", "forward_transfer", "matrix")
    return {key: run.status[key] for key in keys}


def _draw_pictures(runs: Sequence[Run]) -> dict[str, bytes]:
    """Return the pictures as PNG, by name. A `$` in a name is printed, and starts no formula."""
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise ConfigurationError("pictures need matplotlib: pip install 'streamlearn[demo]'") from error
    pictures = {"accuracy": _draw_accuracy, "matrix": _draw_matrix, "forgetting": _draw_forgetting}
    encoded = {}
    with mpl.rc_context({"text.parse_math": False, "axes.unicode_minus": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # a box is drawn instead
        for name, draw in pictures.items():
            content = io.BytesIO()
            draw(runs).savefig(content, format="png", dpi=DPI)
            encoded[name] = content.getvalue()
    return encoded


def _subplots(count: int, width: float, height: float, margin: float = 0.0) -> tuple[Figure, list[Axes]]:
    """Return a figure with `count` axes side by side, each `width` by `height` inches, and a `margin` to their right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * count + margin, height), layout="constrained")
    axes = figure.subplots(1, count, squeeze=False)
    return figure, list(axes[0])


def _num_tasks(runs: Sequence[Run]) -> int:
    """Return the largest number of tasks in a run."""
    return max(len(run.status["tasks"]) for run in runs)


def _has_many_tasks(runs: Sequence[Run]) -> bool:
    """Return whether there are too many tasks to name each of them in a picture."""
    return _num_tasks(runs) > MAX_NAMED_TASKS


def _draw_accuracy(runs: Sequence[Run]) -> Figure:
    many = _has_many_tasks(runs)
    height = 3.8 if many else max(3.8, 0.6 + 0.19 * _num_tasks(runs))
    figure, axes = _subplots(len(runs), 5.2, height, 0.0 if many else 2.2)  # the margin is for the names of the tasks
    for ax, run in zip(axes, runs, strict=True):
        if many:
            _draw_many_lines(ax, run)
        else:
            _draw_lines(ax, run)
        ax.set_title(_wrap_title(run.name))
        ax.set_xlabel("samples learned")
        ax.set_ylim(-3, 103)
        ax.grid(alpha=0.25)
    axes[0].set_ylabel("accuracy on held-out samples, %")
    if not many:
        axes[-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _draw_lines(ax: Axes, run: Run) -> None:
    """Draw a named line for each task."""
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
        # matplotlib leaves a label that begins with an underscore out of the legend, so it begins with an invisible space
        line.set_label("\u200b" + _shorten(name))


def _draw_many_lines(ax: Axes, run: Run) -> None:
    """Draw a thin line for each task, coloured by its number, and the mean over the tasks seen."""
    import numpy as np
    from matplotlib.collections import LineCollection

    history = [run.history[n] for n in _evenly_spaced(len(run.history), MAX_POINTS)]
    table = np.full((len(history), len(run.status["tasks"])), np.nan, np.float32)  # [evaluation, task]
    for number, (_, _, row) in enumerate(history):
        table[number, list(row)] = 100 * np.array(list(row.values()))
    samples = np.array([n for _, n, _ in history], dtype=np.float64)
    chosen = _evenly_spaced(table.shape[1], MAX_LINES)
    lines = LineCollection([np.column_stack([samples, table[:, task]]) for task in chosen], linewidths=0.6, alpha=0.5)
    lines.set_array(np.array(chosen) + 1)
    ax.add_collection(lines)
    seen = ~np.isnan(table).all(1)
    ax.plot(samples[seen], np.nanmean(table[seen], 1), color="#1d2430", linewidth=2)
    ax.autoscale_view()
    assert ax.figure is not None
    ax.figure.colorbar(lines, ax=ax, label="task, by number (black: mean)")


def _draw_matrix(runs: Sequence[Run]) -> Figure:
    import numpy as np

    many = _has_many_tasks(runs)
    side = 5.0 if many else max(4.0, 1.2 + 0.36 * _num_tasks(runs))
    figure, axes = _subplots(len(runs), side + 0.4, side)
    for ax, run in zip(axes, runs, strict=True):
        values = 100 * np.array(run.status["matrix"], dtype=np.float32)  # [after, task], NaN if not measured
        if values.size:
            edge = len(values) + 0.5 if many else len(values) - 0.5
            ax.imshow(
                values, vmin=0, vmax=100, cmap="Blues", extent=(edge - len(values), edge, edge, edge - len(values))
            )
        if not many:
            for (i, j), value in np.ndenumerate(values):
                if not np.isnan(value):
                    ax.text(j, i, f"{value:.0f}", ha="center", va="center", color="white" if value > 55 else "#1d2430")
            names = [_shorten(task["name"]) for task in run.status["tasks"]][: len(values)]
            ax.set_xticks(range(len(names)), names, rotation=35, ha="right", fontsize=8)
            ax.set_yticks(range(len(names)), names, fontsize=8)
        ax.set_title(_wrap_title(run.name))
        ax.set_xlabel("accuracy on task, by number" if many else "accuracy on")
    axes[0].set_ylabel("after learning")
    return figure


def _draw_forgetting(runs: Sequence[Run]) -> Figure:
    many, count = _has_many_tasks(runs), _num_tasks(runs)
    figure, (ax,) = _subplots(1, 6.5, 3.4 if many else max(2.4, 1.2 + 0.24 * count * max(1, len(runs) / 2)))
    width = 0.8 / len(runs)
    for number, run in enumerate(runs):
        forgetting = [task["probe"]["forgetting"] for task in run.status["tasks"]]
        known = [(index, 100 * value) for index, value in enumerate(forgetting) if value is not None]
        style: dict[str, Any] = {"label": "\u200b" + _shorten(run.name), "color": COLOURS[number % len(COLOURS)]}
        if many:
            ax.plot([index + 1 for index, _ in known], [value for _, value in known], ".", markersize=2.5, **style)
        else:  # horizontal bars, so that long names do not overlap
            ax.barh([index + number * width for index, _ in known], [value for _, value in known], width, **style)
    text = "forgotten, percentage points"
    draw_zero = ax.axhline if many else ax.axvline
    draw_zero(0, color="#1d2430", linewidth=0.8)
    if many:
        ax.set_xlabel("task, by number")
        ax.set_ylabel(text)
    else:
        names = [_shorten(name) for name in max((run.tasks for run in runs), key=len)]
        ax.set_yticks([index + 0.4 - width / 2 for index in range(count)], names, fontsize=8)
        ax.set_ylim(count - 0.1, -0.5)  # the first task at the top
        ax.set_xlabel(text)
    ax.grid(axis="y" if many else "x", alpha=0.25)
    if len(runs) > 1:
        ax.legend(fontsize=8)
    return figure


def _evenly_spaced(count: int, limit: int) -> list[int]:
    """Return at most `limit` of the numbers below `count`, evenly spaced, with the first and the last."""
    if count <= limit:
        return list(range(count))
    return [round(number * (count - 1) / (limit - 1)) for number in range(limit)]


def _printable(text: str) -> str:
    """Return text with a replacement mark for each character that cannot be printed: control characters, lone surrogates."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)


def _shorten(text: str) -> str:
    """Return a name for a picture, printable and cut to `MAX_NAME_LENGTH` characters."""
    text = _printable(text)
    return text if len(text) <= MAX_NAME_LENGTH else text[: MAX_NAME_LENGTH - 1] + "\N{HORIZONTAL ELLIPSIS}"


def _wrap_title(text: str) -> str:
    """Return a run's name as the title of a picture, in at most two lines."""
    return textwrap.fill(_printable(text), MAX_NAME_LENGTH, max_lines=2, placeholder="\N{HORIZONTAL ELLIPSIS}")


def _make_page(runs: Sequence[Run], pictures: dict[str, bytes], joint: Run | None) -> str:
    images = {
        name: f'<img alt="{name}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'
        for name, data in pictures.items()
    }
    sources = ", ".join(run.checkpoint.get("id", "the last checkpoint") for run in runs)
    return Template(PAGE).substitute(
        images,
        style=STYLE,
        title=_escape(" and ".join(dict.fromkeys(run.status["name"] for run in runs))),
        facts="".join(map(_fact_list, runs)),
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
        details="".join(f"<h3>{_escape(run.name)}</h3>{_task_table(run, joint)}" for run in runs),
        version=_escape(runs[0].status["version"]),
        sources=_escape(sources),
    )


def _escape(text: str) -> str:
    """Return text that is safe in the HTML page, whatever it contains."""
    return html.escape(_printable(text))


def _fact_list(run: Run) -> str:
    """Return the HTML list of what was learned, when, and with which configuration."""
    status, manifest = run.status, run.checkpoint
    values = {
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
    items = "".join(f"<dt>{key}</dt><dd>{_escape(value)}</dd>" for key, value in values.items() if value)
    shaping = manifest.get("shaping", {})
    rows = [[key, json.dumps(value, ensure_ascii=False)] for key, value in sorted(shaping.items())]
    title = "values that shape the state"
    details = f"<details><summary>{title}</summary>{_table(['key', 'value'], rows)}</details>" if rows else ""
    return f"<dl>{items}</dl>{details}"


def _task_table(run: Run, joint: Run | None) -> str:
    rows, missing = [], {} if joint is None else intransigence(run, joint)
    for name, task in zip(run.tasks, run.status["tasks"], strict=True):
        probe = task["probe"]
        figures = [_percent(probe["accuracy"]), _percent(probe["best"]), _points(probe["forgetting"])]
        if joint is not None:
            figures.append(_points(missing.get(task["name"])))
        rows.append([name, f"{task['samples']['consumed']:,}", f"{probe['size']:,}", *figures])
    head = ["task", "samples", "held out", "accuracy now", "best", "forgotten"]
    return _table(head if joint is None else [*head, "intransigence"], rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = "".join(f"<th>{_escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{_escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
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
    """Write a JSON file."""
    path.write_text(json.dumps(tree, indent=2) + "\n")
