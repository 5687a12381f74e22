"""The memory network: what its outputs depend on, per-sample gradients, and growth of the head."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from streamlearn.core.errors import StreamlearnError
from streamlearn.learning.models import registry
from streamlearn.learning.strategies.gradient_moments import gradient_moments

SPEC: dict[str, Any] = {"name": "memnet", "embedding": 8, "hops": 2, "heads": 2, "options": {}}
SHAPE, OUTPUTS, VOCABULARY = [5, 4], 3, 9


def made() -> nn.Module:
    """Return an untrained network."""
    return registry.build(SPEC, SHAPE, OUTPUTS, 0, VOCABULARY)


def texts(count: int) -> torch.Tensor:
    """Return texts of different lengths; the last has only a question."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(1, VOCABULARY + 2, (count, *SHAPE), generator=generator, dtype=torch.int32)
    for n in range(count):
        x[n, 1 + n % 4 :] = 0
        x[n, :, 1 + n % 3 :] = 0
    x[-1, 1:] = 0
    return x


@torch.no_grad()
def test_padding_does_not_change_outputs() -> None:
    """Outputs depend neither on the embedding of padding nor on empty rows, but on the order of sentences."""
    model, x = made(), texts(6)
    before = model(x)
    assert before.isfinite().all()
    assert isinstance(model.words, nn.Embedding)
    assert isinstance(model.time, nn.Parameter)
    model.words.weight[0] += 7.0
    model.time[4] += 7.0
    torch.testing.assert_close(model(x), before)
    x[2, [1, 2]] = x[2, [2, 1]]
    assert not torch.allclose(model(x)[2], before[2])


@torch.no_grad()
def test_a_text_does_not_depend_on_its_batch() -> None:
    """Without batch statistics a text has the same outputs alone as in a batch."""
    model, x = made(), texts(6)
    torch.testing.assert_close(torch.cat([model(one) for one in x.split(1)]), model(x))


def test_gradients_of_single_samples_work() -> None:
    """The vectorised Fisher equals the slow loop over samples, for every parameter."""
    model, x = made(), texts(20)
    y, weight = torch.arange(20) % OUTPUTS, torch.linspace(0.5, 1.5, 20)
    params = list(model.parameters())
    expected = [torch.zeros_like(param) for param in params]
    for one, label, share in zip(x.split(1), y.split(1), weight, strict=True):
        grads = torch.autograd.grad(functional.cross_entropy(model(one), label), params)
        for total, part in zip(expected, grads, strict=True):
            total.add_(share * part.square())
    found = gradient_moments(
        model, x, y, weight, lambda logits, label: functional.cross_entropy(logits, label, reduction="none"), 2
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_the_head_grows_and_keeps_its_rows() -> None:
    """New outputs do not change the old rows."""
    model, x = made(), texts(6)
    before = model(x)
    registry.grow_head(model, OUTPUTS + 2, 0)
    torch.testing.assert_close(model(x)[:, :OUTPUTS], before)


def test_it_needs_text() -> None:
    """Without a vocabulary it cannot be built."""
    with pytest.raises(StreamlearnError, match="model memnet"):
        registry.build(SPEC, SHAPE, OUTPUTS, 0)


def options(input_shape: list[int], num_outputs: int, *, vocabulary: int) -> nn.Module:
    """Return a user's model that gets the size of the vocabulary."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Embedding(vocabulary, num_outputs),
        nn.Flatten(),
        nn.Linear(math.prod(input_shape) * num_outputs, num_outputs),
    )


def test_a_users_model_gets_the_size_of_the_vocabulary() -> None:
    """The user's function gets the number of words in addition to its options."""
    spec = {"name": f"{__name__}:options", "options": {}}
    model = registry.build(spec, SHAPE, OUTPUTS, 0, VOCABULARY)
    assert isinstance(model, nn.Sequential)
    assert isinstance(model[1], nn.Embedding)
    assert model[1].num_embeddings == VOCABULARY
