"""How well generated samples agree with the model: a measure of the quality of generative replay."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from streamlearn.learning.strategies.scholar import Scholar

MAX_MEASURED_PAIRS = 200  # limits on the cost of `measure_agreement`
MAX_MEASURED_SAMPLES = 2000
SAMPLES_PER_PAIR = 100
CHUNK = 500


@torch.no_grad()
def measure_agreement(
    scholar: Scholar, task: int, draws: torch.Generator, *, latent: int, conditional: bool, device: torch.device
) -> dict[tuple[int, int], float]:
    """Return for each (task, output) which ratio of its generated samples the frozen model assigns to that output.

    A generator that is not `conditional` cannot generate a given class. There the measure is the class's share of the
    samples generated for tasks with the same active outputs, divided by an equal share, and at most 1; it is empty with
    more than `MAX_MEASURED_PAIRS` pairs. Otherwise at most that many pairs are measured, those of the newest task `task`
    first, so that the cost does not grow. `draws` is used for nothing else: measuring must not change training.
    """
    if not len(scholar.pairs) or (not conditional and len(scholar.pairs) > MAX_MEASURED_PAIRS):
        return {}
    order = torch.randperm(len(scholar.pairs), generator=draws)
    is_older = (scholar.pairs[order, 0] != task).byte()
    pairs = scholar.pairs[order[is_older.argsort(stable=True)[:MAX_MEASURED_PAIRS]]]
    per_pair = min(SAMPLES_PER_PAIR, MAX_MEASURED_SAMPLES // len(pairs))
    requested = pairs.repeat_interleave(per_pair, 0)
    noise = torch.randn(len(requested), latent, generator=draws)
    answers = torch.cat([
        scholar.teacher.logits(scholar.generate(some[:, 1].to(device), z.to(device)), some[:, 0]).argmax(1).cpu()
        for some, z in zip(requested.split(CHUNK), noise.split(CHUNK), strict=True)
    ]).view(len(pairs), per_pair)  # fmt: skip
    if conditional:
        ratios = (answers == pairs[:, 1:]).double().mean(1)
    else:
        active = scholar.teacher.active_outputs.cpu()
        masks = active.expand(task + 1, -1)[pairs[:, 0]] if len(active) == 1 else active[pairs[:, 0]]
        same_mask = (masks[:, None] == masks[None]).all(2)
        num_classes = [len(pairs[row, 1].unique()) for row in same_mask]
        shares = [(answers[row] == y).double().mean() for row, y in zip(same_mask, pairs[:, 1], strict=True)]
        ratios = (torch.stack(shares) * torch.tensor(num_classes)).clamp(max=1)
    return {(t, y): ratio for (t, y), ratio in zip(pairs.tolist(), ratios.tolist(), strict=True)}
