"""Write the checkpoints that every later version must read: `python -m tests.golden.make`, once for each format."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from streamlearn.checkpoint.manifest import FORMAT
from streamlearn.checkpoint.store import Store
from streamlearn.config import loader
from streamlearn.stream.logs.sqlite import EmbeddedWriter
from streamlearn.tools import producer
from streamlearn.tools.producer import PublishOptions, Samples
from tests.support import jobs

HERE = Path(__file__).parent
SETTINGS: dict[str, Any] = {
    "input": {"shape": [4], "dtype": "float32", "scale": 1},
    "classes": 4,
    "holdout": {"fraction": 0.2},
    "stream": {"topics": ["a", "b"], "batch_size": 10},
    "model": {"name": "mlp", "hidden": [6]},
    "learner": {"updates_per_batch": 2},
}
STRATEGIES: dict[str, dict[str, Any]] = {
    "default": {"generative": {"hidden": 6, "latent": 2}, "si": {}},
    "stored": {"derpp": {"budget": 20}, "rwalk": {}, "agem": {"budget": 10, "momentum": "allow"}},
}


def settings(directory: Path, name: str) -> dict[str, Any]:
    """Return a job's configuration, with its state and topics in this directory."""
    tree = jobs.settings(directory, strategy=STRATEGIES[name])
    return {**tree, **SETTINGS, "stream": {**SETTINGS["stream"], "on_finished": "exit"}}


def samples(task: int, count: int) -> Samples:
    """Return samples of two separable classes."""
    rng = np.random.default_rng(task)
    labels = rng.integers(0, 2, count)
    x = rng.normal(size=(count, 4)).astype(np.float32)
    x[np.arange(count), 2 * task + labels] += 3
    return Samples(x, (labels + 2 * task).tolist())


def main() -> None:
    """Learn one task and the begin of a second, and store the checkpoint with its configuration."""
    for name in STRATEGIES:
        with tempfile.TemporaryDirectory() as temporary:
            directory = Path(temporary)
            sink = EmbeddedWriter(directory / "topics.sqlite")
            for task, topic in enumerate(("a", "b")):
                producer.publish(
                    sink, topic, samples(task, 60), PublishOptions(samples_per_record=7, markers=task == 0)
                )
            sink.close()
            config = directory / "job.yaml"
            tree = settings(directory, name)
            tree["stream"]["on_finished"] = "wait"
            tree["probes"] = {"every_seconds": None}  # what the clock has evaluated is shown, and is not state
            config.write_text(loader.dump(tree))
            with jobs.Daemon(config) as daemon:
                daemon.until(lambda status: status.get("samples", {}).get("trained", 0) >= 80)
                daemon.stop()
            kept = HERE / f"format-{FORMAT}" / name
            shutil.rmtree(kept, ignore_errors=True)
            newest = Store(daemon.state).all()[0]
            shutil.copytree(newest.path, kept / "checkpoints" / newest.id)


if __name__ == "__main__":
    main()
