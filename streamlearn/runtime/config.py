"""Section `divergence`: what to do if the updates stop being finite, or the accuracy falls."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from streamlearn.core.section import Int32, Section


class DivergenceConfig(Section):
    """What to do if many updates are not finite, or past tasks suddenly lose accuracy. One such update is only dropped."""

    after: Int32 = Field(10, ge=1, description="number of consecutive batches without a finite update")
    then: Literal["rollback", "stop", "skip"] = Field(
        "rollback", description="return to the newest checkpoint, stop the daemon, or continue without these updates"
    )
    slow_down: float = Field(
        0.5, gt=0, lt=1, description="rollback: factor by which each rollback multiplies the learning rate"
    )
    attempts: Int32 = Field(3, ge=1, description="number of consecutive rollbacks after which the daemon stops")
    drop: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="largest accepted fall of the mean accuracy on past tasks' probes between two evaluations; null: no limit",
    )
