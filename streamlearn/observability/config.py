"""Section `log`: what is logged, and in which format."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from streamlearn.core.section import Section


class LogConfig(Section):
    """What is logged, and in which format."""

    level: Literal["debug", "info", "warning", "error"] = Field("info", description="lowest level that is logged")
    format: Literal["auto", "json", "console"] = Field(
        "auto",
        description="json: one object a line; console: plain text; auto: plain text on a terminal, otherwise json",
    )
