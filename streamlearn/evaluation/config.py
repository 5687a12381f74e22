"""Sections `holdout` and `probes`: which samples are held out, and when they are evaluated."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from streamlearn.core.section import Int32, Seconds, Section


class HoldoutConfig(Section):
    """Which samples are kept for the probes and never trained on."""

    by: Literal["value", "key"] = Field(
        "value",
        description="input of the hash: a sample's x and y, or its record's key (all samples of a key are held out, or none)",
    )
    fraction: float = Field(
        0.1, ge=0, lt=1, description="share of the samples that is held out: 0 (none) or more, below 1"
    )
    max: Int32 | None = Field(1000, ge=1, description="largest number of samples in a task's probe; null: no limit")


class ProbesConfig(Section):
    """When the probes (held-out samples) are evaluated."""

    every: Int32 = Field(20, ge=1, description="number of batches between two evaluations")
    every_seconds: Seconds | None = Field(
        60.0, description="seconds after which newly learned batches are evaluated although they are few; null: never"
    )
    minimum: Int32 = Field(
        20, ge=1, description="number of samples that the open task's probe needs before its accuracy is reported"
    )
