"""Measure every recipe: milliseconds an update, the ratio to a plain torch loop in the same run, and memory by tasks."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common import merged
from benchmarks.update import BATCH, CLASSES, DEVICE, PIXELS, STEPS, plain, ratio_of, samples
from streamlearn import state
from streamlearn.config import loader
from streamlearn.core.scenario import Scenario
from streamlearn.core.tasks import Task
from streamlearn.learning.build import make_learner
from streamlearn.learning.strategies.recipes import RECIPES
from streamlearn.learning.tensors import configure_torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from streamlearn.learning.learner import Learner

TASKS, ROUNDS = 50, 7
SHOWN = (1, 10, 50)
NAMES = [f"t{number}" for number in range(TASKS)]
# with one CPU thread; on a GPU a step of this size waits for kernel launches, and the ratio would measure those
TARGETS = (
    {} if DEVICE != "cpu" else {"l2": 1.15, "ewc": 1.15, "mas": 1.15, "si": 1.4, "rwalk": 1.5, "agem": 2.2, "er": 1.9}
)
GROWS = {"gem", "pnn", "joint"}  # their documented cost grows with every task
MAX_GROWTH = 1.15  # largest ratio of a step measured at task 50 to task 2 that counts as equal
SGD = {"learner": {"optimizer": {"name": "sgd", "lr": 0.01}}}
PARAMETERS: dict[str, dict[str, Any]] = {
    "packnet": {"prune": 0.95},  # room for fifty tasks
    "pnn": {"max_parameters": 10**9},
    "generative": {"average": None},
}
NEEDS: dict[str, dict[str, Any]] = {
    "gem": SGD,
    "agem": SGD,
    "pnn": {"model": {"hidden": [100, 100]}},  # fifty columns of 400 would be a billion bytes
}


def learners_by_task(name: str) -> Iterator[tuple[int, Learner]]:
    """Yield a learner of a recipe at the begin of each task, with the number of tasks that have ended."""
    tree: dict[str, Any] = {
        "device": DEVICE,
        "input": {"shape": [PIXELS]},
        "classes": CLASSES,
        "scenario": {"kind": "domain", "tasks": {task: list(range(CLASSES)) for task in NAMES}},
        "stream": {"topics": NAMES, "batch_size": BATCH},
        "learner": {"updates_per_batch": STEPS, "average": None},
        "strategy": {name: PARAMETERS.get(name, {})},
    }
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "job.yaml"
        path.write_text(loader.dump(merged(tree, NEEDS.get(name, {}))))
        config = loader.load(path, RECIPES, {})
    learner = make_learner(
        config.learning, Scenario.from_config(config.scenario, config.classes, grow=config.grow_head)
    )
    tasks: list[Task] = []
    for index in range(TASKS + 1):
        if index == TASKS:
            yield index, learner
            return
        tasks.append(Task(index, NAMES[index], labels=list(range(CLASSES))))
        learner.begin_task(tasks[-1])
        learner.set_active_outputs(tasks, list(range(CLASSES)))
        yield index, learner
        few = learner.spec.model_copy(update={"updates_per_batch": 1})
        learner.spec, whole = few, learner.spec
        for part in range(2):
            learner.learn(samples(2 * index + part, index))
        for batch in learner.refine():
            learner.learn(batch)
        learner.end_task()
        learner.spec = whole


def megabytes(learner: Learner) -> float:
    """Return the size of the learner's state in a checkpoint, in megabytes."""
    files, _, _ = state.pack(learner.state_dict())
    return sum(tensor.nbytes for content in files.values() for tensor in content.values()) / 1e6


def measure(name: str) -> dict[str, Any]:
    """Return the ratio of a recipe's step to a plain step in the second and the last task, and its memory."""
    memory: dict[str, float] = {}
    early = late = (0.0, 0.0, 0.0)
    hidden = NEEDS.get(name, {}).get("model", {}).get("hidden", [400, 400])
    for ended, learner in learners_by_task(name):
        if ended in SHOWN:
            memory[str(ended)] = round(megabytes(learner), 1)
        if ended in {1, TASKS - 1}:
            batch = samples(0, ended)
            rounds = 1 if ended > 1 and name in GROWS else ROUNDS  # half a second a step
            figures = ratio_of(lambda learner=learner, batch=batch: learner.learn(batch), plain(hidden), rounds)  # type: ignore[misc]
            early, late = (figures, late) if ended == 1 else (early, figures)
    return {
        "value": round(early[0], 3),
        "ms_per_update": round(early[1], 3),
        "plain_ms_per_update": round(early[2], 3),
        "value_at_task_50": round(late[0], 3),
        "megabytes": memory,
    }


def run() -> dict[str, Any]:
    """Measure every recipe; print and return ratios, milliseconds and megabytes."""
    configure_torch(1)
    results: dict[str, Any] = {}
    print(f"{'recipe':<12}{'ms':>8}{'ratio':>8}{'target':>8}{'task 50':>9}   MB after 1, 10, 50 tasks")
    for name in RECIPES:
        entry = measure(name)
        target = TARGETS.get(name)
        grew = entry["value_at_task_50"] / entry["value"]
        entry["grows"] = name in GROWS
        if target is not None:
            entry |= {"target": f"<= {target}", "met": entry["value"] <= target}
        if name not in GROWS and grew > MAX_GROWTH:
            entry |= {"target": f"at task 50 at most {MAX_GROWTH} of task 2", "met": False}
        results[name] = entry
        shown = ", ".join(f"{value:.1f}" for value in entry["megabytes"].values())
        limit = "" if target is None else f"{target:.2f}"
        note = "  grows with tasks" if name in GROWS else ""
        print(
            f"{name:<12}{entry['ms_per_update']:>8.2f}{entry['value']:>8.2f}{limit:>8}{entry['value_at_task_50']:>9.2f}"
            f"   {shown}{note}",
            flush=True,
        )
    return results
