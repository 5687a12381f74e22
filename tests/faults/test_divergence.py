"""Divergence: the job rolls back to a checkpoint with a lower learning rate, or the daemon ends with the reason."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from streamlearn.checkpoint.store import Store
from tests.support import jobs

if TYPE_CHECKING:
    from pathlib import Path

WILD = {"updates_per_batch": 2, "average": None, "optimizer": {"name": "sgd", "lr": 1e37}}


def diverging(tmp_path: Path, **divergence: Any) -> Path:
    """Return the configuration of a job whose updates are not finite from the second on."""
    config = jobs.write_config(
        tmp_path,
        strategy={"naive": {}},
        learner=WILD,
        divergence={"after": 3, **divergence},
        checkpoint={"every_batches": 1},
    )
    jobs.publish_embedded(tmp_path / "topics.sqlite", 300)
    return config


def test_a_rollback_lowers_the_learning_rate(tmp_path: Path) -> None:
    """Everything is learned in the end, even if the newest checkpoint has bad weights; the lower rate is saved."""
    with jobs.Daemon(diverging(tmp_path, slow_down=1e-38)) as daemon:
        assert daemon.finish() == 0, daemon.tail()
        log = daemon.log.read_text()
    rollbacks = log.count("3 batches was finite: rolled back to ckpt-")
    assert rollbacks in {1, 2}
    checkpoint = Store(daemon.state).all()[0]
    status = checkpoint.read_json("status.json")
    assert (status["samples"]["trained"], status["samples"]["skipped"]) == (1500, 0)
    assert jobs.all_accounted_for(status)
    assert checkpoint.read_json("state.json")["groups"]["learner"]["slowed"] == 1e-38**rollbacks
    assert all(bool(tensor.isfinite().all()) for tensor in jobs.tensors(checkpoint).values())


def test_the_daemon_ends_if_rollbacks_do_not_help(tmp_path: Path) -> None:
    """After all attempts it ends with 1 and one line; no diverged state is saved."""
    with jobs.Daemon(diverging(tmp_path, slow_down=0.9, attempts=2)) as daemon:
        assert daemon.finish(60) == 1
        log = daemon.log.read_text()
    assert log.count("3 batches was finite: rolled back to ckpt-") == 2
    assert "after 2 rollbacks: lower learner.optimizer.lr, or check the data in the stream" in log
    assert "Traceback" not in log
    assert {checkpoint.manifest["step"] for checkpoint in Store(daemon.state).all()} <= {0, 2}


def test_then_stop_ends_at_once(tmp_path: Path) -> None:
    """With `then: stop` there is no second attempt."""
    with jobs.Daemon(diverging(tmp_path, then="stop")) as daemon:
        assert daemon.finish(60) == 1
        assert "was finite: lower learner.optimizer.lr" in daemon.log.read_text()


def test_then_skip_continues(tmp_path: Path) -> None:
    """With `then: skip` every sample of a dropped batch counts as skipped."""
    status = jobs.run_to_end(diverging(tmp_path, then="skip")).read_json("status.json")
    assert status["samples"]["skipped"] > 0
    assert jobs.all_accounted_for(status)


def test_an_accuracy_drop_rolls_back(tmp_path: Path) -> None:
    """A method that forgets uses up its attempts, and no checkpoint has the refused weights."""
    config = jobs.write_config(
        tmp_path,
        strategy={"naive": {}},
        learner={"updates_per_batch": 10, "average": None, "optimizer": {"lr": 0.01}},
        divergence={"drop": 0.2, "slow_down": 0.9, "attempts": 2},
        probes={"every": 1},
        checkpoint={"every_batches": 1},
    )
    jobs.publish_embedded(tmp_path / "topics.sqlite", 300)
    with jobs.Daemon(config) as daemon:
        assert daemon.finish(120) == 1, daemon.tail()
        log = daemon.log.read_text()
    assert log.count(": rolled back to ckpt-") == 2
    assert "accuracy on past tasks fell from" in log
    assert "after 2 rollbacks: lower learner.optimizer.lr, or check the data in the stream" in log
    status = Store(daemon.state).all()[0].read_json("status.json")
    assert status["tasks"][0]["probe"]["accuracy"] > 0.5
