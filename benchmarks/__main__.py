"""Run all benchmarks, or the named ones: `python -m benchmarks [NAME] ...`. The names are in `SUITES`."""

from __future__ import annotations

import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import checkpoints, idle, ingest, methods, tasks, update

SUITES = {
    "update": update.run,
    "methods": methods.run,
    "checkpoints": checkpoints.run,
    "ingest": ingest.run,
    "idle": idle.run,
    "tasks": tasks.run,
}


def main() -> None:
    """Run the benchmarks, print the results, and write `results.json` beside this file."""
    names = sys.argv[1:] or list(SUITES)
    path = Path(__file__).parent / "results.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for name in names:
        print(f"== {name}", flush=True)
        results[name] = SUITES[name]()
    results["machine"] = {
        "date": time.strftime("%Y-%m-%d"),
        "processor": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    path.write_text(json.dumps(results, indent=1) + "\n")
    missed = [
        f"{name}.{key}: {entry['value']} (target: {entry['target']})"
        for name in names
        for key, entry in results[name].items()
        if isinstance(entry, dict) and entry.get("met") is False
    ]
    print("every target is met" if not missed else "missed:\n  " + "\n  ".join(missed))


if __name__ == "__main__":
    main()
