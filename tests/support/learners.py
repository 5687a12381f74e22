"""Small learners, and tasks and batches for them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from benchmarks.common import merged
from streamlearn.config import loader
from streamlearn.core.samples import Batch
from streamlearn.core.scenario import Scenario
from streamlearn.core.tasks import Task
from streamlearn.learning.build import make_learner
from streamlearn.learning.strategies.recipes import RECIPES
from tests.support import jobs

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from streamlearn.core.labels import Label
    from streamlearn.learning.learner import Learner

BATCH = 20


def begun(directory: Path, tasks: Sequence[Sequence[int]] = ((0, 1, 2, 3),), **over: Any) -> Learner:
    """Return a learner in its first task. A sample is four numbers; the index of the largest is its class."""
    tree: dict[str, Any] = {
        "device": jobs.DEVICE,
        "input": {"shape": [4]},
        "classes": 4,
        "stream": {"topics": [f"t{number}" for number in range(len(tasks))], "batch_size": BATCH},
        "model": {} if "model" in over else {"hidden": [16]},
        "strategy": "naive",
    }
    path = directory / "job.yaml"
    path.write_text(loader.dump(merged(tree, over)))
    config = loader.load(path, RECIPES, {})
    learner = make_learner(
        config.learning, Scenario.from_config(config.scenario, config.classes, grow=config.grow_head)
    )
    begin(learner, tasks[:1])
    return learner


def begin(learner: Learner, tasks: Sequence[Sequence[int]]) -> None:
    """Begin the last of these tasks."""
    all_tasks, labels = described(tasks)
    learner.begin_task(all_tasks[-1])
    learner.set_active_outputs(all_tasks, labels)


def described(tasks: Sequence[Sequence[int]]) -> tuple[list[Task], list[Label]]:
    """Return tasks with these labels, and the list of all labels."""
    named = [Task(number, f"t{number}", labels=list(labels)) for number, labels in enumerate(tasks)]
    return named, [label for labels in tasks for label in labels]


def batch(number: int, size: int = BATCH, *, classes: Sequence[int] = (0, 1, 2, 3), task: int = 0) -> Batch:
    """Return samples of these classes."""
    generator = torch.Generator().manual_seed(number)
    y = torch.tensor(classes)[torch.randint(len(classes), (size,), generator=generator)]
    x = torch.rand(size, 4, generator=generator)
    x[torch.arange(size), y] += 1.0
    return Batch(x, y, torch.full((size,), task))
