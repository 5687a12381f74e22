"""Section `checkpoint`: when the state is saved, and which checkpoints are kept."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from streamlearn.core.section import Int32, Seconds, Section


class CheckpointConfig(Section):
    """When the state is saved, in addition to every task's end and the stop, and which checkpoints are kept."""

    every_batches: Int32 | None = Field(
        None, ge=1, description="number of batches between two checkpoints; null: only every_seconds counts"
    )
    every_seconds: Seconds | None = Field(
        30.0, description="seconds between two checkpoints; null: only every_batches counts"
    )
    keep: Int32 = Field(
        3, ge=1, description="number of newest checkpoints to keep; several of the same step count as one"
    )
    hourly: Int32 = Field(24, ge=0, description="number of older checkpoints to keep, one for each hour")
    task_ends: Annotated[Int32, Field(ge=0)] | Literal["all"] = Field(
        5, description="keep a checkpoint from the end of each of the last N tasks, or of all tasks"
    )
