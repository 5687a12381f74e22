"""Section `service`: the read-only HTTP listener."""

from __future__ import annotations

from pydantic import Field

from streamlearn.core.section import Int, Seconds, Section


class ServiceConfig(Section):
    """The read-only HTTP listener."""

    host: str = Field(
        "127.0.0.1", description="address to listen on; everyone who can reach it can read metrics and status"
    )
    port: Int = Field(9464, ge=0, le=65535, description="port to listen on; 0: any free port, which status names")
    liveness_timeout: Seconds = Field(
        60.0, description="seconds without a turn of the loop after which /healthz answers 503"
    )
