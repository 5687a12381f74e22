"""The public checks for models and encoders: they accept what works, and say what does not."""

from __future__ import annotations

import pytest

from streamlearn.testing import LearnerRun, check_encoder, check_model, check_strategy

pytestmark = pytest.mark.usefixtures("daemon_mode")


def test_a_model_is_accepted_or_refused_by_recipe() -> None:
    """A model with statistics of batches works with `er`; PackNet refuses it, and the result says why."""
    made = {"kind": "statistics"}
    refused = check_model("tests.support.awkward:make", options=made, recipes=["er", "packnet"])
    assert list(refused) == ["packnet"]
    assert "strategy.packnet: " in refused["packnet"]


def test_an_encoder_is_checked() -> None:
    """An encoder whose weights differ at each call works: a restart loads it from the checkpoint."""
    check_encoder("tests.support.models:encoder", options={"features": 7, "fresh": True}, recipes=["naive", "er"])


def test_a_restart_that_is_not_bit_equal_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names the recipe and what differs."""
    load = LearnerRun.load

    def forgetful(self: LearnerRun, other: LearnerRun) -> None:
        load(self, other)
        self.learner.params[0].data.add_(1)

    monkeypatch.setattr(LearnerRun, "load", forgetful)
    with pytest.raises(AssertionError, match=r"er: a restart does not continue bit-equal; different: .*model"):
        check_strategy({"er": {}})
