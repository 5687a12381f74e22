"""Checks for models and encoders of your own: that they work with every recipe, resume bit-equal, and learn single samples.

`check_model` and `check_encoder` are for your tests, and `LearnerRun` is what they use: a learner with small tasks, without
a stream. `docs/testing.md` shows how.
"""

from __future__ import annotations

import math
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from streamlearn import state
from streamlearn.config import loader
from streamlearn.core.errors import ConfigurationError
from streamlearn.core.samples import Batch
from streamlearn.core.scenario import Scenario
from streamlearn.core.tasks import Task, TaskState
from streamlearn.learning.build import make_learner
from streamlearn.learning.strategies.recipes import RECIPES

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from streamlearn.learning.learner import Learner

BATCH, CLASSES, SIZE = 8, 6, 12  # samples of a batch, classes of all three tasks, and numbers of a sample by default
TASKS = {"a": [0, 1], "b": [2, 3], "c": [4, 5]}
NEEDS: dict[str, dict[str, Any]] = {  # what a recipe cannot do without: every exception stands here, by name
    "pnn": {"scenario": {"kind": "task", "tasks": TASKS}},
    "packnet": {"scenario": {"kind": "task", "tasks": TASKS}},
    "gem": {"learner": {"optimizer": {"name": "sgd", "lr": 0.1}}},
    "agem": {"learner": {"optimizer": {"name": "sgd", "lr": 0.1}}},
}


def merged(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tree in which the values of `over` replace those of `base`, at any depth."""
    out = dict(base)
    for key, value in over.items():
        known = out.get(key)
        out[key] = merged(known, value) if isinstance(value, dict) and isinstance(known, dict) else value
    return out


class LearnerRun:
    """A learner with its tasks, fed with up to three tasks of two classes that a line can tell apart.

    `chosen` are recipes with their parameters, `over` other sections of the configuration. `like` names recipes whose needs
    (an optimizer, a scenario) the run gets instead of those of `chosen`. The environment variable `STREAMLEARN_TEST_DEVICE`
    names the device. Raises `ConfigurationError` if the configuration or a recipe refuses the model.
    """

    def __init__(
        self, directory: Path, chosen: dict[str, Any], like: dict[str, Any] | None = None, **over: Any
    ) -> None:
        tree: dict[str, Any] = {
            "device": os.environ.get("STREAMLEARN_TEST_DEVICE", "cpu"),
            "input": {"shape": [SIZE]},
            "classes": CLASSES,
            "stream": {"topics": ["a", "b", "c"], "batch_size": BATCH},
            "model": {"hidden": [16]},
            "learner": {"updates_per_batch": 3},
            "strategy": chosen,
        }
        for name in like or chosen:
            tree = merged(tree, NEEDS.get(name, {}))
        # `input` and `model` are replaced whole: another kind of input or model has other keys
        tree = merged(tree, over) | {key: over.get(key, tree[key]) for key in ("input", "model")}
        path = directory / "job.yaml"
        path.write_text(loader.dump(tree))
        config = loader.load(path, RECIPES, {})
        self.shape = tuple(config.input.shape)
        self.scenario = Scenario.from_config(config.scenario, config.classes, grow=config.grow_head)
        self.learner: Learner = make_learner(config.learning, self.scenario)
        self.tasks: list[Task] = []
        self.labels: list[Any] = []

    def begin(self) -> None:
        """Begin the next task, of two new labels."""
        index = len(self.tasks)
        task = Task(index, "abc"[index], labels=[2 * index, 2 * index + 1])
        self.tasks.append(task)
        self.learner.begin_task(task)
        self.labels += task.labels
        self.learner.set_active_outputs(self.tasks, self.labels)

    def learn(self, batches: Sequence[int]) -> None:
        """Learn the current task's batches of these numbers."""
        for number in batches:
            self.learner.learn(self.batch(number))

    def batch(self, number: int, size: int = BATCH) -> Batch:
        """Return a batch of the current task, which depends on the task and the number only; its values are from 0 to 1."""
        index = len(self.tasks) - 1
        rng = np.random.default_rng([index, number])
        y = rng.integers(0, 2, size)
        x = rng.random((size, math.prod(self.shape))).astype(np.float32) * 0.3
        x[np.arange(size), (2 * index + y) % x.shape[1]] += 0.7
        tensor = torch.from_numpy(x.reshape(size, *self.shape))
        return Batch(tensor, torch.from_numpy(y + 2 * index), torch.full((size,), index))

    def end(self) -> None:
        """End the task as the loop does: refine, then let every slot store what later tasks need."""
        for batch in self.learner.refine():
            self.learner.learn(batch)
        self.learner.end_task()
        self.tasks[-1].state = TaskState.ENDED

    def through(self, tasks: int) -> None:
        """Learn so many whole tasks."""
        for _ in range(tasks):
            self.begin()
            self.learn(range(4))
            self.end()

    def saved(self) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]]:
        """Return the state as a checkpoint has it: tensors by file, and what is JSON."""
        files, rest, _ = state.pack(self.learner.state_dict())
        return {
            name: state.from_bytes(name, state.to_bytes(state.host_copies(content))) for name, content in files.items()
        }, rest

    def load(self, other: LearnerRun) -> None:
        """Continue from another run's state, as a restart continues from a checkpoint."""
        files, rest = other.saved()
        self.tasks, self.labels = list(other.tasks), list(other.labels)
        self.learner.load_state_dict(state.unpack(files, rest), self.tasks, self.labels)

    def restart_in(self, other: LearnerRun) -> None:
        """Learn a task and half of the next one, load the state into `other`, and learn the second half with both."""
        self.through(1)
        self.begin()
        self.learn(range(2))
        other.load(self)
        for run in (self, other):
            run.learn(range(2, 4))
            run.end()

    def logits(self, x: torch.Tensor, task: int) -> torch.Tensor:
        """Return what probes see of a task, over its own outputs."""
        with torch.no_grad():
            logits = self.learner.averaged_network.forward(
                self.learner.context.preprocess(x), torch.full((len(x),), task)
            )
        return logits[:, self.learner.active_outputs[task]]

    def digest(self) -> dict[str, bytes]:
        """Return the bytes of every tensor in the state, by file and name."""
        files, _ = self.saved()
        return {
            f"{file}:{key}": value.numpy().tobytes()
            for file, content in files.items()
            for key, value in content.items()
        }


def check_model(
    name: str,
    *,
    options: Mapping[str, Any] | None = None,
    input_shape: Sequence[int] = (SIZE,),
    recipes: Iterable[str] | None = None,
) -> dict[str, str]:
    """Check a model `package.module:function` with every recipe, or with these; return why recipes refuse it, by name.

    Raises `AssertionError` if the model does not resume bit-equal, or does not learn a single sample.
    """
    refused: dict[str, str] = {}
    for recipe in RECIPES if recipes is None else recipes:
        try:
            check_strategy(
                {recipe: {}},
                model={"name": name, "options": dict(options or {})},
                input={"shape": list(input_shape)},
            )
        except ConfigurationError as error:
            refused[recipe] = str(error)
    return refused


def check_encoder(
    name: str,
    *,
    options: Mapping[str, Any] | None = None,
    input_shape: Sequence[int] = (SIZE,),
    recipes: Iterable[str] | None = None,
) -> None:
    """Check an encoder `package.module:function` with every recipe, or with these. Raises as `check_strategy` does."""
    for recipe in RECIPES if recipes is None else recipes:
        encoder = {"name": name, "options": dict(options or {})}
        check_strategy({recipe: {}}, input={"shape": list(input_shape), "encoder": encoder})


def check_strategy(chosen: dict[str, Any], **over: Any) -> None:
    """Check that recipes resume bit-equal with these other sections of the configuration, and learn a single sample.

    Raises `AssertionError` if they do not, and `ConfigurationError` if the configuration or a recipe refuses.
    """
    with tempfile.TemporaryDirectory() as directory:
        one, other = (LearnerRun(Path(directory), chosen, **over) for _ in range(2))
    one.restart_in(other)
    recipes, expected, found = " + ".join(chosen), one.digest(), other.digest()
    differing = sorted(key for key in expected if expected[key] != found.get(key))
    assert not differing, f"{recipes}: a restart does not continue bit-equal; different: {', '.join(differing)}"
    one.begin()
    stats = one.learner.learn(one.batch(0, 1))
    assert stats.applied == 1, f"{recipes}: a batch of one sample was not learned, its gradient is not finite"
    one.end()
    broken = [
        key
        for key, param in zip(one.learner.parameters.names, one.learner.params, strict=True)
        if not param.isfinite().all()
    ]
    assert not broken, f"{recipes}: parameters are not finite: {', '.join(broken)}"
