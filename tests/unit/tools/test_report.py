"""The report: intransigence against numbers computed by hand, and pages and pictures with unusual names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from streamlearn.tools.report import (
    MAX_NAMED_TASKS,
    Run,
    _draw_accuracy,
    _draw_forgetting,
    _draw_matrix,
    _wrap_title,
    intransigence,
    write,
)

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.text import Text

PNG = b"\x89PNG"


def run_with_matrix(names: list[str], matrix: list[list[float | None]]) -> Run:
    """Return a run that has only task names and an accuracy matrix."""
    status: dict[str, Any] = {"tasks": [{"name": name} for name in names], "matrix": matrix}
    return Run("run", status, [])


def test_intransigence_compares_with_a_joint_run() -> None:
    """It is a*_k - R[k, k] by task name if both runs measured it; negative if the run was better than the joint run."""
    run = run_with_matrix(["a", "b", "c", "d"], [[0.9, None, None], [0.7, 0.6, None], [0.5, 0.5, None]])
    joint = run_with_matrix(["b", "a", "c"], [[0.8, None, None], [0.8, 0.85, None], [0.8, 0.8, 0.9]])
    assert run.learned() == {"a": 0.9, "b": 0.6}
    assert intransigence(run, joint) == pytest.approx({"a": -0.05, "b": 0.2})


def ended_run(names: list[str], labels: list[object], evaluations: int = 5) -> Run:
    """Return a run that has ended, where each later task costs every earlier task a tenth of a percentage point."""
    count = len(names)
    matrix = [[0.9 - (i - j) / 1000 if j <= i else None for j in range(count)] for i in range(count)]
    probes = [
        {"size": 100, "accuracy": last, "best": 0.9, "forgetting": None if j == count - 1 else 0.9 - (last or 0)}
        for j, last in enumerate(matrix[-1])
    ]
    status: dict[str, Any] = {
        "name": "night-shift",
        "strategy": "er",
        "scenario": "class",
        "model": "mlp",
        "version": "0.1.0",
        "evaluated": "2026-11-28T01:02:03+00:00",
        "samples": {"trained": 1000},
        "matrix": matrix,
        "tasks": [
            {"name": name, "labels": labels, "samples": {"consumed": 10}, "probe": probe}
            for name, probe in zip(names, probes, strict=True)
        ],
    }
    history = []
    for number in range(evaluations):
        row = matrix[number * count // evaluations]
        history.append((number, 10 * number, {task: value for task, value in enumerate(row) if value is not None}))
    manifest = {
        "id": "ckpt-000000000007",
        "created": "2026-11-28T04:05:06.789+00:00",
        "config_sha256": "ab" * 32,
        "shaping": {"model.name": "mlp", "strategy.er.budget": 500},
    }
    return Run("er", status, history, manifest)


def test_a_report_names_job_checkpoint_and_configuration(tmp_path: Path) -> None:
    """It also has the times of the checkpoint and of the last evaluation."""
    page = write(tmp_path, [ended_run(["a", "b"], [1, 2])]).read_text()
    assert "<h1>night-shift: what was learned" in page
    for fact in ("2026-11-28 04:05:06 UTC", "ckpt-000000000007", "2026-11-28 01:02:03", "er", "abababababababab"):
        assert f"<dd>{fact}</dd>" in page or f"<dd>SHA-256 {fact}</dd>" in page
    assert "<td>strategy.er.budget</td><td>500</td>" in page


@pytest.mark.parametrize(
    "label",
    [
        "$$",
        "$x$",
        r"\frac{1}",
        "_hidden",
        "<script>",
        "[/x]",
        "\x1b[31m",
        "\ud800",
        "\n",
        "\N{SNOWMAN}\u4e2d\u6587",
        "x" * 300,
    ],
)
def test_any_label_can_be_shown(tmp_path: Path, label: str) -> None:
    """Formulas, markup, escape sequences and lone surrogates are plain text, in the pictures and on the page."""
    run = ended_run([f"task {label}", label, "other"], [label])
    page = write(tmp_path, [run]).read_text(encoding="utf-8")
    for forbidden in ("<script>", "\x1b", "\ud800"):
        assert forbidden not in page
    assert (tmp_path / "accuracy.png").read_bytes().startswith(PNG)
    assert len(legend_texts(run)) == 3


def legend_texts(run: Run) -> list[Text]:
    """Return the texts in the legend of the accuracy picture."""
    legend = _draw_accuracy([run]).axes[0].get_legend()
    assert legend is not None
    return list(legend.get_texts())


@pytest.mark.parametrize("count", [2, 10, MAX_NAMED_TASKS])
def test_names_do_not_overlap(count: int) -> None:
    """Long names do not overlap each other and do not leave their picture."""
    run = ended_run([f"orders-of-the-northern-region-2026-{number}" for number in range(count)], ["returned"])
    bars, matrix, lines = _draw_forgetting([run, run]), _draw_matrix([run]), _draw_accuracy([run])
    legend = lines.axes[0].get_legend()
    assert legend is not None
    for figure, texts in (
        (bars, bars.axes[0].get_yticklabels()),
        (matrix, matrix.axes[0].get_yticklabels()),
        (lines, legend.get_texts()),
    ):
        figure.draw_without_rendering()
        boxes = [text.get_window_extent() for text in texts]
        assert len(boxes) == count
        for number, box in enumerate(boxes):
            assert not any(box.overlaps(other) for other in boxes[number + 1 :])
            assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1
            assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1


def test_pictures_of_many_tasks_do_not_name_each_task(tmp_path: Path) -> None:
    """Above thirty tasks there is no number, bar or name for each task, so that the time to draw stays short."""
    run = ended_run([f"t{number}" for number in range(MAX_NAMED_TASKS + 1)], [], evaluations=400)
    accuracy, matrix, forgetting = _draw_accuracy([run]), _draw_matrix([run]), _draw_forgetting([run])
    assert (accuracy.axes[0].get_legend(), len(accuracy.axes[0].lines)) == (None, 1)
    assert (len(matrix.axes[0].texts), len(forgetting.axes[0].patches)) == (0, 0)
    assert len(accuracy.axes[0].lines[0].get_xdata()) == 300  # type: ignore[arg-type]
    write(tmp_path, [run])
    assert all((tmp_path / f"{name}.png").read_bytes().startswith(PNG) for name in ("accuracy", "matrix", "forgetting"))


def test_the_title_of_a_picture_has_at_most_two_lines() -> None:
    """The names of the demo's runs fit; a longer name is cut."""
    assert _wrap_title("naive: one task after the other, no memory") == "naive: one task after the other,\nno memory"
    assert _wrap_title("x" * 100) == "x" * 32 + "\n\N{HORIZONTAL ELLIPSIS}"
