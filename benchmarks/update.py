"""Measure the update against a plain torch loop with the same net, batch, fused optimizer, threads and float mode."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from streamlearn.config import loader
from streamlearn.core.samples import Batch
from streamlearn.core.scenario import Scenario
from streamlearn.core.tasks import Task
from streamlearn.learning.build import make_learner
from streamlearn.learning.models.mlp import MLP
from streamlearn.learning.models.vae import VAE
from streamlearn.learning.strategies.recipes import RECIPES
from streamlearn.learning.tensors import configure_torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from streamlearn.learning.learner import Learner

DEVICE = os.environ.get("STREAMLEARN_BENCH_DEVICE", "cpu")
BATCH, PIXELS, CLASSES, HIDDEN = 128, 784, 10, 400
STEPS, ROUNDS = 40, 15
TARGETS = {"naive": 1.05, "ewc": 1.2, "si": 1.5, "er": 2.0, "generative": 1.2}


def learner(strategy: dict[str, Any]) -> Learner:
    """Return a learner after one task, so that the strategy has something to protect."""
    tree = {
        "device": DEVICE,
        "input": {"shape": [PIXELS]},
        "classes": CLASSES,
        "scenario": {"kind": "class", "active": "all"},
        "stream": {"topics": ["a", "b"], "batch_size": BATCH},
        "learner": {"updates_per_batch": STEPS, "average": None},
        "strategy": strategy,
    }
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "job.yaml"
        path.write_text(loader.dump(tree))
        config = loader.load(path, RECIPES, {})
    made = make_learner(config.learning, Scenario.from_config(config.scenario, config.classes, grow=config.grow_head))
    for index in range(2):
        made.begin_task(Task(index, "ab"[index]))
        made.set_active_outputs(
            [Task(n, "ab"[n], labels=list(range(CLASSES))) for n in range(index + 1)], list(range(CLASSES))
        )
        if index == 0:
            made.learn(samples(index))
            for _ in made.refine():
                pass
            made.end_task()
    return made


def samples(seed: int, task: int | None = None) -> Batch:
    """Return a batch of random samples."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(BATCH, PIXELS, generator=generator)
    y = torch.randint(CLASSES, (BATCH,), generator=generator)
    return Batch(x, y, torch.full((BATCH,), seed if task is None else task))


def plain(hidden: Sequence[int] = (HIDDEN, HIDDEN)) -> Callable[[], None]:
    """Return a function that makes `STEPS` steps of a plain torch loop."""
    model, batch = MLP([PIXELS], CLASSES, hidden).to(DEVICE), samples(1)
    x, y = batch.x.to(DEVICE), batch.y.to(DEVICE)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)

    def steps() -> None:
        for _ in range(STEPS):
            functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        wait()

    return steps


def wait() -> None:
    """Wait until the device has finished its work."""
    if DEVICE != "cpu":
        torch.cuda.synchronize()


def bare_replay(ratio: int = 2, latent: int = 50) -> Callable[[], None]:
    """Return a function with plain steps of generative replay: generate, label, train both networks."""
    batch, count = samples(1), ratio * BATCH
    new_x, new_y = batch.x.to(DEVICE), batch.y.to(DEVICE)
    model, frozen = (MLP([PIXELS], CLASSES, [HIDDEN, HIDDEN]).to(DEVICE) for _ in range(2))
    generator, old = (
        VAE([PIXELS], CLASSES, conditional=True, hidden=HIDDEN, latent=latent, likelihood="bernoulli").to(DEVICE)
        for _ in range(2)
    )
    optimizers = [torch.optim.Adam(net.parameters(), lr=1e-3, fused=True) for net in (model, generator)]
    weight = torch.cat([torch.full((BATCH,), 0.5 / BATCH), torch.full((count,), 0.5 / count)]).to(DEVICE)

    def generated() -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            y = torch.randint(CLASSES, (count,), device=DEVICE)
            x = old.generate(torch.randn(count, latent, device=DEVICE), y)
            return x, y, torch.softmax(frozen(x) / 2, 1)

    def steps() -> None:
        for _ in range(STEPS):
            x_old, y_old, soft = generated()
            x, y = torch.cat([new_x, x_old]), torch.cat([new_y, y_old])
            logits = model(x)
            new = functional.cross_entropy(logits[:BATCH], new_y, reduction="none")
            past = -4 * (soft * functional.log_softmax(logits[BATCH:] / 2, 1)).sum(1)
            torch.dot(torch.cat([new, past]), weight).backward()
            losses, _, _ = generator.loss(x, y, torch.randn(len(x), latent, device=DEVICE))
            (losses * weight).sum().backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        wait()

    return steps


def ratio_of(
    ours: Callable[[], object], theirs: Callable[[], object], rounds: int = ROUNDS
) -> tuple[float, float, float]:
    """Return the median ratio of alternating rounds, and the median milliseconds a step of both."""
    pairs = []
    for _ in range(rounds + 1):
        times = []
        for steps in (theirs, ours):
            begun = time.perf_counter()
            steps()
            times.append((time.perf_counter() - begun) / STEPS * 1000)
        pairs.append(times)
    rest = pairs[1:]  # without the first round, the warm-up
    ratio = statistics.median(own / other for other, own in rest)
    return ratio, statistics.median(own for _, own in rest), statistics.median(other for other, _ in rest)


def run() -> dict[str, Any]:
    """Measure strategies with a target; print and return ratios, milliseconds and targets."""
    configure_torch(1)
    results: dict[str, Any] = {}
    print(f"{'strategy':<12}{'ratio':>8}{'target':>8}{'ms/step':>10}{'plain':>10}")
    for name, target in TARGETS.items():
        ours, batch = learner({name: {"average": None} if name == "generative" else {}}), samples(1)
        theirs = bare_replay() if name == "generative" else plain()
        ratio, milliseconds, other = ratio_of(lambda ours=ours, batch=batch: ours.learn(batch), theirs)  # type: ignore[misc]
        print(f"{name:<12}{ratio:>8.3f}{target:>8.2f}{milliseconds:>10.3f}{other:>10.3f}", flush=True)
        results[name] = {
            "value": round(ratio, 3),
            "target": f"<= {target}",
            "met": ratio <= target,
            "ms_per_step": round(milliseconds, 3),
            "plain_ms_per_step": round(other, 3),
        }
    generative = results["generative"]
    generative["us_per_sample"] = round(1000 * generative["ms_per_step"] / (3 * BATCH), 2)
    generative["plain_us_per_sample"] = round(1000 * generative["plain_ms_per_step"] / (3 * BATCH), 2)
    return results
