"""What a report says of runs, against numbers worked out by hand."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from streamlearn.report import MANY, Run, _accuracy, _forgetting, _matrix, _title, intransigence, write

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.text import Text

PNG = b"\x89PNG"


def curves(names: list[str], matrix: list[list[float | None]]) -> Run:
    """Return a run with these tasks and this accuracy matrix."""
    status: dict[str, Any] = {"tasks": [{"name": name} for name in names], "matrix": matrix}
    return Run("run", status, [])


def test_intransigence_is_what_a_joint_run_knew_better() -> None:
    """a*_k - R[k, k] by name, where both have measured it: whatever the order, and negative where the run knew more."""
    run = curves(["a", "b", "c", "d"], [[0.9, None, None], [0.7, 0.6, None], [0.5, 0.5, None]])
    joint = curves(["b", "a", "c"], [[0.8, None, None], [0.8, 0.85, None], [0.8, 0.8, 0.9]])
    assert run.learned() == {"a": 0.9, "b": 0.6}
    assert intransigence(run, joint) == pytest.approx({"a": -0.05, "b": 0.2})


def learned(names: list[str], labels: list[object], evaluations: int = 5) -> Run:
    """Return a run that has ended, each task a tenth of a point worse than when it was learned for each later one."""
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


def test_a_report_says_what_when_and_how(tmp_path: Path) -> None:
    """It names the job, the checkpoint and its time, the last evaluation, and what shaped the state."""
    page = write(tmp_path, [learned(["a", "b"], [1, 2])]).read_text()
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
    """Formulas, markup, escape sequences, half a surrogate pair: a label is text, in the pictures and on the page."""
    run = learned([f"task {label}", label, "other"], [label])
    page = write(tmp_path, [run]).read_text(encoding="utf-8")
    for forbidden in ("<script>", "\x1b", "\ud800"):
        assert forbidden not in page
    assert (tmp_path / "accuracy.png").read_bytes().startswith(PNG)
    assert len(drawn_legend(run)) == 3


def drawn_legend(run: Run) -> list[Text]:
    """Return what the legend of the curves names."""
    legend = _accuracy([run]).axes[0].get_legend()
    assert legend is not None
    return list(legend.get_texts())


@pytest.mark.parametrize("count", [2, 10, MANY])
def test_names_do_not_overlap(count: int) -> None:
    """However long the names are, each has a place of its own, inside its picture."""
    run = learned([f"orders-of-the-northern-region-2026-{number}" for number in range(count)], ["returned"])
    bars, matrix, curves = _forgetting([run, run]), _matrix([run]), _accuracy([run])
    legend = curves.axes[0].get_legend()
    assert legend is not None
    for figure, texts in (
        (bars, bars.axes[0].get_yticklabels()),
        (matrix, matrix.axes[0].get_yticklabels()),
        (curves, legend.get_texts()),
    ):
        figure.draw_without_rendering()
        boxes = [text.get_window_extent() for text in texts]
        assert len(boxes) == count
        for number, box in enumerate(boxes):
            assert not any(box.overlaps(other) for other in boxes[number + 1 :])
            assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1
            assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1


def test_many_tasks_have_no_marks_of_their_own(tmp_path: Path) -> None:
    """Above thirty tasks no number, bar or name stands for a single one, so that pictures cost what their pixels do."""
    run = learned([f"t{number}" for number in range(MANY + 1)], [], evaluations=400)
    accuracy, matrix, forgetting = _accuracy([run]), _matrix([run]), _forgetting([run])
    assert (accuracy.axes[0].get_legend(), len(accuracy.axes[0].lines)) == (None, 1)
    assert (len(matrix.axes[0].texts), len(forgetting.axes[0].patches)) == (0, 0)
    assert len(accuracy.axes[0].lines[0].get_xdata()) == 300  # type: ignore[arg-type]
    write(tmp_path, [run])
    assert all((tmp_path / f"{name}.png").read_bytes().startswith(PNG) for name in ("accuracy", "matrix", "forgetting"))


def test_a_run_keeps_its_whole_name_above_a_picture() -> None:
    """Two lines hold what the demo calls its runs; a longer name is cut."""
    assert _title("naive: one task after the other, no memory") == "naive: one task after the other,\nno memory"
    assert _title("x" * 100) == "x" * 32 + "\n\N{HORIZONTAL ELLIPSIS}"
