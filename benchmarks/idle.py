"""Measure the CPU share of a daemon while no record arrives."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from streamlearn.control.statedir import read_process_record

SECONDS = 20
TARGET = 2.0


def run() -> dict[str, Any]:
    """Measure, print and return the CPU share of an idle daemon that reads embedded topics."""
    with tempfile.TemporaryDirectory() as name:
        state, config = Path(name, "state"), Path(name, "job.yaml")
        config.write_text(yaml.safe_dump(settings(Path(name))))
        command("start", str(config), "--wait", "ready")
        try:
            record = read_process_record(state)
            assert record is not None
            time.sleep(3)
            used = cpu_seconds(record.pid)
            time.sleep(SECONDS)
            percent = 100 * (cpu_seconds(record.pid) - used) / SECONDS
        finally:
            command("stop", "--state", str(state))
    print(f"idle: {percent:.2f} % of a CPU (target: under {TARGET} %)")
    return {"cpu_percent": {"value": round(percent, 2), "target": f"< {TARGET}", "met": percent < TARGET}}


def settings(directory: Path) -> dict[str, Any]:
    """Return the configuration of a job whose topics never come."""
    return {
        "state_dir": str(directory / "state"),
        "embedded": {"path": str(directory / "topics.sqlite")},
        "device": "cpu",
        "input": {"shape": [28, 28], "dtype": "uint8", "scale": 255},
        "classes": 10,
        "stream": {"topics": ["t1", "t2", "t3", "t4", "t5"], "on_finished": "wait", "batch_size": 50},
        "model": {"hidden": [64, 64]},
        "strategy": {"generative": {"hidden": 64, "latent": 16}, "si": {}},
        "service": {"port": 0},
    }


def command(*arguments: str) -> None:
    """Run a command of the program; raises if it fails."""
    subprocess.run([sys.executable, "-m", "streamlearn", *arguments], check=True, stdout=subprocess.DEVNULL)


def cpu_seconds(pid: int) -> float:
    """Return the CPU time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
