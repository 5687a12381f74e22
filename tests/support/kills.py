"""Kills a job at random moments, and the strategies with which tests do so."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from tests.support import jobs

if TYPE_CHECKING:
    import random
    from pathlib import Path


def run_with_kills(config: Path, kills: int, chance: random.Random, longest: float) -> None:
    """Kill a job several times at random moments while it learns, then let it finish."""
    for _ in range(kills):
        with jobs.Daemon(config) as daemon:
            while daemon.process.poll() is None and (daemon.status() or {"state": "starting"})["state"] != "running":
                time.sleep(0.02)
            time.sleep(chance.uniform(0, longest))
            assert daemon.process.poll() in {None, 0}, daemon.tail()
            daemon.kill()


STRATEGIES: list[dict[str, dict[str, object]]] = [
    {"generative": {"hidden": 64, "latent": 16}, "si": {}},
    {"er": {"budget": 200}, "ewc": {}},
    {"derpp": {"budget": 200}, "rwalk": {}, "agem": {"momentum": "allow"}},
    {"packnet": {"retrain_epochs": 2}},
    {"pnn": {}},
]
