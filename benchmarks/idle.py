"""Measure the CPU share of a daemon while no record arrives."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from tests.support import jobs
from tests.system.test_daemon import cpu_seconds

SECONDS = 20
TARGET = 2.0


def run() -> dict[str, Any]:
    """Measure, print and return the CPU share of an idle daemon that reads embedded topics."""
    with tempfile.TemporaryDirectory() as name:
        config = jobs.write_config(Path(name), stream={"on_finished": "wait"})
        with jobs.Daemon(config) as daemon:
            daemon.until(lambda status: status["state"] == "running")
            time.sleep(3)
            used = cpu_seconds(daemon.process.pid)
            time.sleep(SECONDS)
            percent = 100 * (cpu_seconds(daemon.process.pid) - used) / SECONDS
            daemon.stop()
    print(f"idle: {percent:.2f} % of a CPU (target: under {TARGET} %)")
    return {"cpu_percent": {"value": round(percent, 2), "target": f"< {TARGET}", "met": percent < TARGET}}
