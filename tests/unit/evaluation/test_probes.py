"""Probes are bounded, seeded, and sealed at the end of the task."""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from streamlearn import state
from streamlearn.core.progress import Progress
from streamlearn.core.samples import FIRST_WORD_ID, UNKNOWN_ID, HeldOut
from streamlearn.evaluation.probes import Probes
from tests.support.learners import begun

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


class Constant:
    """An evaluator whose accuracy is the number of samples in a probe."""

    def evaluate_all(self, probes: Sequence[tuple[torch.Tensor, torch.Tensor, int]]) -> list[tuple[float, float]]:
        return [(float(len(y)), 0.0) for _, y, _ in probes]


def held(task: int, start: int, count: int) -> HeldOut:
    """Return held-out samples whose x is their number."""
    x = np.arange(start, start + count, dtype=np.float32)[:, None]
    return HeldOut(task, x, np.zeros(count, np.int64))


def test_an_open_probe_is_evaluated_from_a_minimum_size_on() -> None:
    """A few samples of the running task are not enough; a sealed probe is always evaluated."""
    probes = Probes(100, 1 << 20, 0)
    probes.add([held(0, 0, 3)])
    assert probes.evaluate(Constant(), 4) == {}
    probes.add([held(0, 3, 1)])
    assert probes.evaluate(Constant(), 4) == {0: (4.0, 0.0)}
    probes.seal(0)
    assert probes.evaluate(Constant(), 99) == {0: (4.0, 0.0)}


def test_a_sealed_probe_ignores_further_samples() -> None:
    """Late samples cannot change a metric that was already published."""
    probes = Probes(100, 1 << 20, 0)
    probes.add([held(0, 0, 3)])
    probes.seal(0)
    probes.add([held(0, 3, 5)])
    assert probes.sizes == {0: 3}


def test_a_restored_probe_chooses_the_same_samples() -> None:
    """A seeded reservoir chooses among too many samples, and saving in between changes nothing."""
    one, other = Probes(50, 1 << 20, 7), Probes(50, 1 << 20, 7)
    one.add([held(0, 0, 400)])
    other.add([held(0, 0, 100)])
    files, rest, _ = state.pack({"probes": other.state_dict()})
    third = Probes(50, 1 << 20, 7)
    third.load_state_dict(state.unpack(files, rest)["probes"])
    third.add([held(0, 100, 300)])
    a, b = one.samples(0), third.samples(0)
    assert a is not None
    assert b is not None
    assert torch.equal(a[0], b[0])
    assert len(a[1]) == 50
    assert 120 < float(a[0].mean()) < 280


def test_names_are_resolved_as_they_come() -> None:
    """However labels and words arrive, a probe's samples have the numbers that one look-up over everything would give."""
    rng = random.Random(3)
    probes, progress = Probes(None, 1 << 20, 0), Progress()
    names = [f"n{number}" for number in range(40)]
    for _ in range(60):
        for seen, apart in (
            (progress.labels, progress.probe_labels),
            (progress.vocabulary, progress.probe_words),
        ):
            name = rng.choice(names)
            if rng.random() < 0.5 and name not in seen:
                seen.append(name)
            elif name not in seen and name not in apart:
                apart.append(name)
        probes.resolve_names(progress)
    outputs = [
        progress.labels.index(label) if label in progress.labels else -1 - place
        for place, label in enumerate(progress.probe_labels)
    ]
    words = [
        FIRST_WORD_ID + progress.vocabulary.index(word) if word in progress.vocabulary else UNKNOWN_ID
        for word in progress.probe_words
    ]
    y, x = -1 - np.arange(len(outputs)), -1 - np.arange(len(words), dtype=np.int32)[:, None]
    probes.add([HeldOut(0, np.zeros((len(y), 1), np.int32), y), HeldOut(1, x, np.zeros(len(x), np.int64))])
    labels, texts = probes.samples(0), probes.samples(1)
    assert labels is not None
    assert texts is not None
    assert labels[1].tolist() == outputs
    assert texts[0].flatten().tolist() == words
    assert {output < 0 for output in outputs} == {word == UNKNOWN_ID for word in words} == {True, False}


def test_small_probes_share_forward_passes(tmp_path: Path) -> None:
    """100 probes of 10 samples need two passes; if the samples of a batch depend on each other, each probe needs its own."""
    passes: list[int] = []
    for model, expected in (("mixing", [10] * 100), ("plain", [510, 490])):
        learner = begun(
            tmp_path, [[0, 1]], input={"shape": [1, 2, 2]}, classes=2, model={"name": f"{__name__}:{model}"}
        )
        learner.model.register_forward_pre_hook(lambda _, inputs: passes.append(len(inputs[0])))
        passes.clear()
        learner.evaluate_all([(torch.rand(10, 1, 2, 2), torch.zeros(10, dtype=torch.int64), 0)] * 100)
        assert passes == expected


def plain(input_shape: Sequence[int], num_outputs: int) -> nn.Module:
    """Build a model whose outputs do not depend on the batch."""
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(input_shape), num_outputs))


def mixing(input_shape: Sequence[int], num_outputs: int) -> nn.Module:
    """Build a model that normalises by batch statistics, in evaluation mode, too."""
    return nn.Sequential(nn.BatchNorm2d(1, track_running_stats=False), plain(input_shape, num_outputs))
