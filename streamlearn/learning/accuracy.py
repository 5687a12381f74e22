"""Accuracy and loss of a network on samples."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from streamlearn.learning.models.modes import eval_mode, samples_are_independent
from streamlearn.learning.tensors import finite_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from streamlearn.core.samples import Batch
    from streamlearn.learning.active_outputs import ActiveOutputs
    from streamlearn.learning.strategies.slots import Network

    Probe = tuple[Tensor, Tensor, int]  # `x [n, ...]`, `y [n]`, task

CHUNK = 512  # samples of a forward pass
IGNORED = -100  # target of a sample without a loss


@torch.no_grad()
def evaluate(
    network: Network,
    probes: Sequence[Probe],
    outputs: ActiveOutputs,
    preprocess: Callable[[Tensor], Tensor],
    *,
    has_encoder: bool,
    device: torch.device,
) -> list[tuple[float, float]]:
    """Return accuracy and mean loss for each probe (`x [n, ...]`, `y [n]`, task).

    A sample whose label is not an active output of the task, or has no output (`y` is negative), counts as a wrong
    answer and has no loss. The mean loss is over the other samples; it is infinite if there are none.
    """
    hits, total, counted = torch.zeros(3, len(probes), device=device)
    room = CHUNK if samples_are_independent(network.module) else 0
    with eval_mode(network.module):
        for probe_index, x, y, task in _batches(probes, room):
            tasks, inputs = task, preprocess(x)
            index, target = probe_index.to(device), y.to(device)
            if has_encoder and not bool((usable := finite_rows(inputs)).all()):
                # a sample without finite features counts as a wrong answer and has no loss
                inputs, target, tasks, index = inputs[usable], target[usable], tasks[usable.cpu()], index[usable]
                if not len(target):
                    continue
            logits = network.forward(inputs, tasks)
            inactive = outputs.inactive_for(tasks).expand_as(logits)
            masked = logits.masked_fill(inactive, -torch.inf)
            is_active = (target >= 0) & ~inactive.gather(1, target.clamp(min=0)[:, None])[:, 0]
            labels = torch.where(is_active, target, IGNORED)
            hits.index_add_(0, index, ((masked.argmax(1) == target) & is_active).float())
            counted.index_add_(0, index, is_active.float())
            if bool((probe_index == probe_index[0]).all()):
                total[probe_index[0]] += functional.cross_entropy(masked, labels, ignore_index=IGNORED, reduction="sum")
            else:
                losses = functional.cross_entropy(masked, labels, ignore_index=IGNORED, reduction="none")
                total.index_add_(0, index, losses)
    return [
        (correct / len(y), loss / number if number else math.inf)
        for (_, y, _), correct, loss, number in zip(
            probes, hits.tolist(), total.tolist(), counted.tolist(), strict=True
        )
    ]


@torch.no_grad()
def count_correct(network: Network, batch: Batch, outputs: ActiveOutputs) -> Tensor:
    """Return how many samples of a preprocessed batch a network classifies correctly, as a tensor on the device."""
    with eval_mode(network.module):
        logits = network.forward(batch.x, batch.task)
    masked = logits.masked_fill(outputs.inactive_for(batch.task), -torch.inf)
    return (masked.argmax(1) == batch.y).sum()


def _batches(probes: Sequence[Probe], room: int) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Yield the samples of all probes in batches: for each sample the index of its probe, `x`, `y` and its task.

    Whole probes share a batch of at most `room` samples. A larger probe is split into batches of its own.
    """
    waiting: list[tuple[int, Tensor, Tensor, int]] = []
    count = 0  # samples in `waiting`

    def joined() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        sizes = torch.tensor([y.shape[0] for _, _, y, _ in waiting])
        numbers, tasks = torch.tensor([(number, task) for number, _, _, task in waiting]).T
        x, y = (torch.cat([probe[field] for probe in waiting]) for field in (1, 2))  # type: ignore[misc]
        return numbers.repeat_interleave(sizes), x, y, tasks.repeat_interleave(sizes)

    for number, (x, y, task) in enumerate(probes):
        size = y.shape[0]
        if waiting and count + size > room:
            yield joined()
            waiting, count = [], 0
        if size > room:
            for some_x, some_y in zip(x.split(CHUNK), y.split(CHUNK), strict=True):
                waiting = [(number, some_x, some_y, task)]
                yield joined()
            waiting = []
        else:
            waiting.append((number, x, y, task))
            count += size
    if waiting:
        yield joined()
