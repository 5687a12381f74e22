"""An encoder through the real daemon: features are learned and replayed, and a saved model answers with them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from streamlearn.checkpoint.store import Store
from streamlearn.tools.predict import Model, accuracy
from tests.support import jobs

if TYPE_CHECKING:
    from pathlib import Path

ENCODED: dict[str, Any] = {
    "input": {
        "shape": [28, 28],
        "encoder": {"name": "tests.support.models:encoder", "options": {"features": 128, "fresh": True}},
    },
    "strategy": {"generative": {"hidden": 64, "latent": 16, "likelihood": "gaussian", "targets": "soft"}, "si": {}},
}


@pytest.mark.usefixtures("daemon_mode")
def test_features_are_learned_replayed_and_used(tmp_path: Path) -> None:
    """Killed in the midst of it, a job ends with the encoder that it began with; `predict` needs the checkpoint alone."""
    config = jobs.write_config(tmp_path, **ENCODED)
    jobs.publish_embedded(tmp_path / "topics.sqlite", 200)
    with jobs.Daemon(config) as daemon:
        daemon.until(lambda status: status.get("checkpoint") is not None and len(status["tasks"]) > 1)
        daemon.kill()
    name = "encoder.frozen.safetensors"
    frozen = Store(tmp_path / "state").all()[0].read(name)
    last = jobs.run_to_end(config)
    assert last.read(name) == frozen
    links = {checkpoint.path.joinpath(name).stat().st_ino for checkpoint in Store(tmp_path / "state").all()}
    assert len(links) == 1  # written once
    assert jobs.tensors(last)["replay.safetensors:generator/encode_in.weight"].shape == (64, 128)

    model = Model(last, lambda kind: ("tests.support.models:encoder", None) if kind == "encoder" else None)
    probes = jobs.tasks(200)
    for (_, probe), (task, entry) in zip(probes, model.description.tasks.items(), strict=True):
        done = model.predict(probe.x, task)
        assert accuracy(done.labels, probe.y) == pytest.approx(entry.probe_accuracy, abs=1e-6)
        assert done.probabilities.dtype == np.float32
    least = model.description.tasks["t1"].probe_accuracy
    assert least is not None
    assert least > 0.05  # naive ends with 0 here; the encoder is another in every run

    damaged = last.path / name
    content = damaged.read_bytes()
    damaged.unlink()  # or it would be damaged in every checkpoint, which link it
    damaged.write_bytes(bytes([content[-1] ^ 1]).rjust(len(content), content[:1]))
    found = Store(tmp_path / "state").find("latest", *Model.FILES, optional=Model.OPTIONAL)
    assert found.id != last.id
