"""What a task's probe can say: warnings where nothing was trained, where nothing is measured, or where the probe misleads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from streamlearn.config import HoldoutConfig
    from streamlearn.data import Label, Task

EARLY_SAMPLES = 1000  # of an open task, without a single one that was trained
EXPECTED = 20  # held-out samples to be expected of an open task, and none came
LOOKED_AT = 1000  # samples of a probe whose values are compared
REPEATED = 10  # how often each value is there, where a probe has few distinct values
NAMED = 5  # classes that a warning names

CoverageWarning = tuple[str, str]  # its kind, and the line for people


def task_warnings(task: Task, rule: HoldoutConfig) -> Iterator[CoverageWarning]:
    """Give what the counts of a task say, open or ended: nothing was trained, or nothing was held out."""
    counts, ended = task.counts, task.state == "ended"
    trained, held_out = counts["trained"], counts["held_out"]
    if trained == 0 and (ended or counts["consumed"] >= EARLY_SAMPLES):
        outcomes = ", ".join(f"{counts[kind]} {kind.replace('_', ' ')}" for kind in ("held_out", "rejected", "skipped"))
        all_held = rule.fraction and held_out and held_out == counts["consumed"]
        why = f": holdout.by {rule.by} takes them all" if all_held else ""
        yield "untrained", f"nothing is trained: of {counts['consumed']} samples {outcomes}{why}"
    elif held_out == 0 and (ended or trained * rule.fraction >= EXPECTED):
        why = f"holdout.by {rule.by} takes none of them" if rule.fraction else "holdout.fraction is 0"
        hint = "; few keys or few distinct values decide for all" if rule.fraction else ""
        text = f"nothing is measured: {trained} samples are trained and none is held out"
        yield "unmeasured", f"{text} ({why}, and no record came for the probe{hint})"


def probe_warnings(
    x: Tensor, y: Tensor, trained: Mapping[int, Label] | None, rule: HoldoutConfig
) -> Iterator[CoverageWarning]:
    """Give what a sealed probe, `x [n, ...]` and `y [n]`, lacks; `trained` are the task's labels by output, where known."""
    held_out = set(y.unique().tolist()) if trained is not None else set()
    trained = trained or {}
    if missing := [label for output, label in trained.items() if output not in held_out]:
        named = ", ".join(repr(label)[:40] for label in missing[:NAMED]) + (", ..." if len(missing) > NAMED else "")
        yield "missing", f"the probe has no sample of {len(missing)} trained classes ({named}): it says nothing of them"
    if strange := int(sum((y == output).sum() for output in held_out - set(trained))):
        yield (
            "strange",
            f"{strange} of {len(y)} samples of the probe have a class that the task did not train: wrong answers",
        )
    some = x[:LOOKED_AT].flatten(1)
    distinct = len(torch.unique(some, dim=0))
    if rule.by == "value" and rule.fraction and len(some) >= EXPECTED and distinct * REPEATED <= len(some):
        text = (
            f"{len(some)} samples of the probe have {distinct} distinct values: few values decide the hold-out by value"
        )
        yield "distinct", f"{text}; holdout.by key, or records for the probe, would measure better"
