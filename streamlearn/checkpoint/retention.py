"""Retention: which checkpoints are kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Sequence

    from streamlearn.checkpoint.manifest import Checkpoint


def without_rule(
    checkpoints: Sequence[Checkpoint], keep: int, hourly: int, task_ends: int | Literal["all"]
) -> list[Checkpoint]:
    """Return the checkpoints that no rule keeps; `checkpoints` are newest first.

    These are kept: the newest `keep`; among older ones, the newest of each hour for the last `hourly` hours that have one;
    the first one after the end of each of the last `task_ends` tasks; and every one with a tag. The first two rules skip
    a checkpoint that adds nothing to the next newer one (see `_repeats`).
    """
    newer = [None, *checkpoints]
    distinct = [c for c, next_ in zip(checkpoints, newer, strict=False) if next_ is None or not _repeats(c, next_)]
    hours: dict[int, Checkpoint] = {}
    for checkpoint in distinct[keep:]:
        hours.setdefault(int(checkpoint.created // 3600), checkpoint)
    ends = _after_task_ends(checkpoints)
    kept = {c.id for c in [*distinct[:keep], *list(hours.values())[:hourly]]}
    kept |= {c.id for c in (ends if task_ends == "all" else ends[:task_ends])}
    return [checkpoint for checkpoint in checkpoints if checkpoint.id not in kept and not checkpoint.tags]


def _repeats(checkpoint: Checkpoint, newer: Checkpoint) -> bool:
    """Return whether a checkpoint adds nothing to the next newer one.

    Either both have the same step; or the older one was saved while a task was ending, and the newer one after the end of
    this task only. If saves were merged, the newer one may contain the ends of several tasks.
    """
    old, new = checkpoint.manifest, newer.manifest
    if old["step"] == new["step"]:
        return True
    return bool(old.get("ending")) and new.get("tasks_ended", 0) == old.get("tasks_ended", 0) + 1


def _after_task_ends(checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
    """Return the first checkpoint after each end of a task, newest first; `checkpoints` are newest first.

    If an older checkpoint was restored and a task has ended again, only its later end counts.
    """
    found: dict[int, Checkpoint] = {}
    before = 0
    for checkpoint in reversed(checkpoints):
        ended = checkpoint.manifest.get("tasks_ended", 0)
        if ended > before:
            found[ended] = checkpoint
        before = ended
    return sorted(found.values(), key=lambda checkpoint: checkpoint.sequence, reverse=True)
