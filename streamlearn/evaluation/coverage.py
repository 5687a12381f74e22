"""Warns when a task trained nothing, when it has no probe, or when its probe is misleading."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from streamlearn.core.samples import Outcome
from streamlearn.core.tasks import TaskState

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from streamlearn.core.labels import Label
    from streamlearn.core.tasks import Task
    from streamlearn.evaluation.config import HoldoutConfig

EARLY_SAMPLES = 1000  # warn when a running task consumed this many and trained none
EXPECTED = 20  # warn when a running task should have this many held-out samples and has none
COMPARED = 1000  # how many samples of a probe are compared with each other
REPEATED = 10  # few distinct values: each one occurs this often on average
LISTED = 5  # how many classes a warning lists

CoverageWarning = tuple[str, str]  # kind, message


def task_warnings(task: Task, rule: HoldoutConfig) -> Iterator[CoverageWarning]:
    """Yield warnings from the counts of a task, running or ended: nothing was trained, or nothing was held out."""
    counts, ended = task.counts, task.state == TaskState.ENDED
    trained, held_out = counts[Outcome.TRAINED], counts[Outcome.HELD_OUT]
    if trained == 0 and (ended or counts["consumed"] >= EARLY_SAMPLES):
        kinds = (Outcome.HELD_OUT, Outcome.REJECTED, Outcome.SKIPPED)
        outcomes = ", ".join(f"{counts[kind]} {kind.replace('_', ' ')}" for kind in kinds)
        all_held = rule.fraction and held_out and held_out == counts["consumed"]
        why = f"; holdout.by {rule.by} holds all samples out" if all_held else ""
        yield "untrained", f"no sample was trained: {counts['consumed']} samples consumed, {outcomes}{why}"
    elif held_out == 0 and (ended or trained * rule.fraction >= EXPECTED):
        why = f"holdout.by {rule.by} selected none of them" if rule.fraction else "holdout.fraction is 0"
        hint = "; the samples have few distinct keys or values" if rule.fraction else ""
        text = f"the task has no probe: {trained} samples were trained and none was held out"
        yield "unmeasured", f"{text} ({why}, and no record was marked for the probe{hint})"


def probe_warnings(
    x: Tensor, y: Tensor, trained: Mapping[int, Label] | None, rule: HoldoutConfig
) -> Iterator[CoverageWarning]:
    """Yield warnings about a sealed probe, `x [n, ...]` and `y [n]`. `trained` maps outputs to the task's labels, if known."""
    held_out = set(y.unique().tolist()) if trained is not None else set()
    trained = trained or {}
    if missing := [label for output, label in trained.items() if output not in held_out]:
        named = ", ".join(repr(label)[:40] for label in missing[:LISTED]) + (", ..." if len(missing) > LISTED else "")
        yield "missing", f"the probe has no sample of {len(missing)} trained classes ({named}): they are not measured"
    if strange := int(sum((y == output).sum() for output in held_out - set(trained))):
        yield (
            "strange",
            f"{strange} of {len(y)} samples of the probe have a class that the task did not train: wrong answers",
        )
    some = x[:COMPARED].flatten(1)
    distinct = len(torch.unique(some, dim=0))
    if rule.by == "value" and rule.fraction and len(some) >= EXPECTED and distinct * REPEATED <= len(some):
        text = f"{len(some)} samples of the probe have only {distinct} distinct values: holdout.by value holds out whole values"
        yield "distinct", f"{text}; use holdout.by key, or mark records for the probe"
