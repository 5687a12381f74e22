"""Modes are restored, random numbers follow the seed, and recurrent layers run as a GPU needs them."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from streamlearn import state
from streamlearn.learning.models.modes import LayerRng, differentiable_eval_mode, global_seed
from streamlearn.testing import LearnerRun as Run
from tests.support import awkward

if TYPE_CHECKING:
    from pathlib import Path

RECURRENT = {"model": {"name": "tests.support.awkward:make", "options": {"kind": "recurrent"}}}


def draw() -> tuple[list[float], float, list[float], float]:
    """Draw from every global generator. Python's `gauss` caches the second number of a pair."""
    return torch.rand(2).tolist(), random.gauss(0, 1), np.random.normal(size=4).tolist(), random.random()  # noqa: NPY002


def test_recurrent_layers_stay_in_training_mode_without_dropout() -> None:
    """In evaluation mode cuDNN has no backward pass for them. The outputs are the same, and the modes are restored."""
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {"cell": nn.LSTM(4, 8, num_layers=2, dropout=0.9), "drop": nn.Dropout(0.5), "still": nn.Dropout().eval()}
    )
    cell = model["cell"]
    assert isinstance(cell, nn.LSTM)
    x = torch.rand(3, 2, 4)
    modes = [part.training for part in model.modules()]
    with differentiable_eval_mode(model):
        assert (cell.training, cell.dropout, model["drop"].training) == (True, 0.0, False)
        inside = cell(x)[0]
    assert ([part.training for part in model.modules()], cell.dropout) == (modes, 0.9)
    assert torch.allclose(inside, cell.eval()(x)[0], atol=1e-6)
    with pytest.raises(ValueError, match="inside"), differentiable_eval_mode(model):
        raise ValueError("inside")
    assert cell.dropout == 0.9


@pytest.mark.usefixtures("daemon_mode")
@pytest.mark.parametrize("chosen", [{"ewc": {}}, {"mas": {}}, {"ewc": {"fisher": "sampled"}}, {"er": {}}], ids=str)
def test_importances_of_recurrent_models_can_be_computed_on_a_gpu(
    tmp_path: Path, chosen: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every forward pass with a gradient has recurrent layers in training mode, and the weights of copies are flattened."""
    wrong: list[nn.Module] = []
    flat: set[int] = set()
    forward, flatten = nn.GRU.forward, nn.GRU.flatten_parameters

    def seen(self: nn.GRU, *inputs: Tensor) -> Any:
        if torch.is_grad_enabled() and any(param.requires_grad for param in self.parameters()):
            wrong.extend([self] if not self.training or self.dropout else [])
        if id(self) not in flat:
            wrong.append(self)
        return forward(self, *inputs)

    def flattened(self: nn.GRU) -> None:
        flat.add(id(self))
        flatten(self)

    monkeypatch.setattr(nn.GRU, "forward", seen)
    monkeypatch.setattr(nn.GRU, "flatten_parameters", flattened)
    run = Run(tmp_path, chosen, **RECURRENT)
    run.through(2)
    batch = run.batch(1)
    run.learner.evaluate(batch.x, batch.y, 1)
    run.learner.evaluate(batch.x, batch.y, 1, run.learner.initial_params)
    assert wrong == []


def test_layers_draw_from_their_own_random_state() -> None:
    """Two learners with one seed draw the same numbers from torch, numpy and random, whatever the process draws between."""
    found = []
    for process in (1, 2):
        draws = LayerRng(7, torch.device("cpu"))
        with global_seed(process):
            before = draw()
            with draws.in_use():
                first = draw()
            with draws.in_use(keep=False):
                lost = draw()
            with draws.in_use(keep=False):
                assert draw() == lost
            with draws.in_use():
                second = draw()
            after = draw()
        with global_seed(process):
            assert (draw(), draw()) == (before, after)
        found.append((first, lost, second))
    assert found[0] == found[1]
    assert len({str(one) for one in found[0]}) >= 2


def test_the_random_state_of_layers_is_restored() -> None:
    """The cached numbers of the generators are restored, too. The state of an older version has only torch's generator."""
    one, other, old = (LayerRng(7, torch.device("cpu")) for _ in range(3))
    with one.in_use():
        draw()
    other.load_state_dict(state.round_trip(one.state_dict()))
    with one.in_use():
        expected = draw()
    with other.in_use():
        assert draw() == expected
    old.load_state_dict({"cpu": other.state_dict()["cpu"]})
    with other.in_use():
        expected = draw()
    with old.in_use():
        assert draw()[0] == expected[0]


def test_a_model_that_draws_when_it_is_built_follows_the_seed() -> None:
    """Weights drawn from numpy depend only on the seed, and the generators of the process keep their states."""
    made = []
    for process in (1, 2):
        with global_seed(process):
            with global_seed(5):
                made.append(awkward.make([12], 3, kind="odd"))
            after = draw()
        with global_seed(process):
            assert draw() == after
    one, other = (model.state_dict() for model in made)
    assert all(state.equal(value, other[name]) for name, value in one.items() if isinstance(value, Tensor))
