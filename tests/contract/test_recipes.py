"""Every recipe, found by itself: what any strategy must do, whatever its mathematics."""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from benchmarks.choices import CHOICES, NEEDS, TASKS, identify
from streamlearn import configfile, state
from streamlearn.data import Batch, StreamlearnError, Task
from streamlearn.learner import Learner, make_learner
from streamlearn.scenario import Scenario
from streamlearn.strategies.recipes import RECIPES
from streamlearn.strategies.slots import Constraint, EndedTask, Penalty, Replay
from tests.support import awkward, jobs

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("daemon_mode")

BATCH, CLASSES, SIZE = 8, 6, 12
PROJECTING = {"gem", "agem"}
FIXED_HEAD = {"pnn", "packnet"}
SHAPES_THE_FIRST_TASK: list[dict[str, Any]] = [  # a generator that reads the solver's layers shapes them from the start
    {"generative": {"variant": "brain-inspired", "gated": 0.3}},
]


every_recipe = pytest.mark.parametrize("chosen", CHOICES, ids=identify)


class Run:
    """A learner with its tasks, fed with two-class tasks that a line can tell apart."""

    def __init__(self, tmp_path: Path, chosen: dict[str, Any], like: dict[str, Any] | None = None, **over: Any) -> None:
        tree: dict[str, Any] = {
            "device": jobs.DEVICE,
            "input": {"shape": [SIZE]},
            "classes": CLASSES,
            "stream": {"topics": ["a", "b", "c"], "batch_size": BATCH},
            "model": {"hidden": [16]},
            "learner": {"updates_per_batch": 3},
            "strategy": chosen,
        }
        for name in like or chosen:
            tree = jobs.merged(tree, NEEDS.get(name, {}))
        tree = jobs.merged(tree, over) | {key: over.get(key, tree[key]) for key in ("input", "model")}
        path = tmp_path / "job.yaml"
        path.write_text(configfile.dump(tree))
        config = configfile.load(path, RECIPES, {})
        self.scenario = Scenario.from_config(config)
        self.learner: Learner = make_learner(config, self.scenario)
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
        """Return a batch of the current task."""
        index = len(self.tasks) - 1
        rng = np.random.default_rng([index, number])
        y = rng.integers(0, 2, size)
        x = rng.random((size, SIZE)).astype(np.float32) * 0.3
        x[np.arange(size), 2 * index + y] += 0.7
        return Batch(torch.from_numpy(x), torch.from_numpy(y + 2 * index), torch.full((size,), index))

    def end(self) -> None:
        """Refine and consolidate, as the loop does."""
        for delivery in self.learner.refine():
            if delivery.batch is not None:
                self.learner.learn(delivery.batch)
        self.learner.end_task()
        self.tasks[-1].state = "ended"

    def through(self, tasks: int) -> None:
        """Learn so many whole tasks."""
        for _ in range(tasks):
            self.begin()
            self.learn(range(4))
            self.end()

    def saved(self) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]]:
        """Return the state as a checkpoint holds it, through bytes."""
        files, rest, _ = state.pack(self.learner.state_dict())
        return {
            name: state.from_bytes(name, state.to_bytes(state.host_copies(content))) for name, content in files.items()
        }, rest

    def load(self, other: Run) -> None:
        """Take over another run's state, through bytes."""
        files, rest = other.saved()
        self.tasks, self.labels = list(other.tasks), list(other.labels)
        self.learner.load_state_dict(state.unpack(files, rest), self.tasks, self.labels)

    def logits(self, x: torch.Tensor, task: int) -> torch.Tensor:
        """Return what probes see of a task, over its own outputs."""
        with torch.no_grad():
            logits = self.learner.averaged_network.forward(
                self.learner.context.preprocess(x), torch.full((len(x),), task)
            )
        return logits[:, self.learner.active_outputs[task]]

    def digest(self) -> dict[str, bytes]:
        """Return every tensor's bytes."""
        files, _ = self.saved()
        return {
            f"{file}:{key}": value.numpy().tobytes()
            for file, content in files.items()
            for key, value in content.items()
        }


@pytest.mark.parametrize("chosen", [one for one in CHOICES if one not in SHAPES_THE_FIRST_TASK], ids=identify)
def test_is_naive_until_the_first_task_ends(tmp_path: Path, chosen: dict[str, Any]) -> None:
    """No strategy changes the model before there is a past to protect: bit-equal to naive."""
    run, naive = Run(tmp_path, chosen), Run(tmp_path, {"naive": {}}, like=chosen)
    for one in (run, naive):
        one.begin()
        one.learn(range(5))
    expected = [param.detach().cpu().numpy().tobytes() for param in naive.learner.params]
    assert [param.detach().cpu().numpy().tobytes() for param in run.learner.params] == expected


@every_recipe
@pytest.mark.parametrize("place", ["in the first task", "after a task", "in a later task", "while refining"])
def test_resumes_bit_equal(tmp_path: Path, chosen: dict[str, Any], place: str) -> None:
    """A learner restored from bytes at any point ends with the same bits as one that never stopped."""
    one, other = Run(tmp_path, chosen), Run(tmp_path, chosen)
    stop = random.randrange(1, 5)
    print(f"stopped after batch {stop}")
    if place != "in the first task":
        one.through(1)
    if place != "after a task":
        one.begin()
        one.learn(range(stop))
    if place == "while refining":
        for number, delivery in enumerate(one.learner.refine()):
            if number == stop or delivery.batch is None:
                break
            one.learner.learn(delivery.batch)
    other.load(one)
    for run in (one, other):
        if place == "after a task":
            run.begin()
        if place != "while refining":
            run.learn(range(stop, 5))
        run.end()
        run.through(1)
    assert one.digest() == other.digest()
    assert one.saved()[1] == other.saved()[1]


def test_resumes_bit_equal_with_distorted_images(tmp_path: Path) -> None:
    """Random distortions draw from a stream that is state; probes and the accuracy before training see images as they are."""
    over: dict[str, Any] = {
        "input": {"shape": [4, 3]},
        "learner": {"updates_per_batch": 3, "augment": {"shift": 1, "rotate": 20, "zoom": 0.1}},
    }
    one, other = (Run(tmp_path, {"generative": {}, "si": {}}, **over) for _ in range(2))
    plain = Run(tmp_path, {"generative": {}, "si": {}}, input={"shape": [4, 3]})
    for run in (one, plain):
        run.begin()
    first = one.batch(0)
    images = Batch(first.x.reshape(-1, 4, 3), first.y, first.task)
    assert one.learner.learn(images).accuracy == plain.learner.learn(images).accuracy
    assert one.digest()["model.safetensors:head.weight"] != plain.digest()["model.safetensors:head.weight"]
    other.load(one)
    for run in (one, other):
        run.learner.learn(images)
        run.end()
    assert one.digest() == other.digest()


ENCODED: list[dict[str, Any]] = [
    {"generative": {"likelihood": "gaussian"}, "si": {}},
    {"generative": {"likelihood": "gaussian", "variant": "brain-inspired"}},
    {"er": {}, "ewc": {}},
    {"lwf": {}, "mas": {}},
    {"gem": {}},
    {"pnn": {}},
    {"packnet": {}},
]


@pytest.mark.parametrize("chosen", ENCODED, ids=identify)
def test_resumes_bit_equal_behind_an_encoder(tmp_path: Path, chosen: dict[str, Any]) -> None:
    """What an encoder makes is what every part sees; it never changes, and comes from the checkpoint, not from its function."""
    made = {"name": "tests.support.models:encoder", "options": {"features": 7, "fresh": True}}
    one, other = (Run(tmp_path, chosen, input={"shape": [SIZE], "encoder": made}) for _ in range(2))
    assert one.learner.context.input_shape == (7,)
    name = "encoder.frozen.safetensors:1.weight"
    before = one.digest()
    assert before[name] != other.digest()[name]
    one.through(1)
    one.begin()
    one.learn(range(2))
    other.load(one)
    for run in (one, other):
        run.learn(range(2, 5))
        run.end()
        run.through(1)
    batch = one.batch(9)
    assert one.digest() == other.digest()
    assert {key: value for key, value in one.digest().items() if key.startswith("encoder")} == {
        key: value for key, value in before.items() if key.startswith("encoder")
    }
    assert one.learner.evaluate(batch.x, batch.y, 2) == other.learner.evaluate(batch.x, batch.y, 2)


@pytest.mark.parametrize("chosen", ENCODED, ids=identify)
def test_samples_without_finite_features_are_left_out(tmp_path: Path, chosen: dict[str, Any]) -> None:
    """They cost no other sample of the batch, are neither stored nor replayed, and count as answered wrongly in a probe."""
    made = {"name": "tests.support.models:exponential"}
    one, other = (Run(tmp_path, chosen, input={"shape": [SIZE], "encoder": made}) for _ in range(2))
    for number in range(3):
        for run in (one, other):
            run.begin()
        clean, wild = other.batch(number, 6), one.batch(number, 6)
        rows = torch.tensor([0, 1, 0, 2, 3, 4, 5, 5])
        odd = Batch(wild.x[rows].clone(), wild.y[rows], torch.full((8,), number))
        odd.x[2, 0] = odd.x[7, 3] = 1000.0
        stats = one.learner.learn(odd)
        assert (stats.samples, stats.unusable, stats.applied, stats.outcome) == (6, 2, 3, "trained")
        expected = other.learner.learn(clean)
        assert (expected.samples, expected.unusable) == (6, 0)
        nothing = Batch(odd.x[2:3], odd.y[2:3], odd.task[2:3])
        stats = one.learner.learn(nothing)
        assert (stats.samples, stats.unusable, stats.steps) == (0, 1, 0)
        for run in (one, other):
            run.end()
    assert one.digest() == other.digest()
    (accuracy, loss), (right, mean) = (
        run.learner.evaluate(batch.x, batch.y, 2) for run, batch in ((one, odd), (other, clean))
    )
    assert accuracy * 8 == pytest.approx(right * 6)
    assert loss == pytest.approx(mean)


REFUSED = {
    "pnn": {"reused"},
    "packnet": {
        "tied",
        "normed",
        "drawing",
        "statistics",
    },  # weights that tasks cannot share out, and statistics of batches
}


@pytest.mark.parametrize("kind", list(awkward.MAKERS))
@pytest.mark.parametrize("name", list(RECIPES))
def test_models_are_taken_as_they_are(tmp_path: Path, name: str, kind: str) -> None:
    """A model of one's own learns with every recipe, resumes bit-equal and keeps its parts' modes; or is refused at once."""
    made = {"model": {"name": "tests.support.awkward:make", "options": {"kind": kind}}}
    if kind in REFUSED.get(name, ()):
        with pytest.raises(StreamlearnError, match=rf"strategy\.{name}: ") as caught:
            Run(tmp_path, {name: {}}, **made)
        assert caught.value.code == 78
        return
    one, other = (Run(tmp_path, {name: {}}, **made) for _ in range(2))
    modes = [part.training for part in one.learner.strategy.network.module.modules()]
    one.through(1)
    one.begin()
    one.learn(range(2))
    other.load(one)
    for run in (one, other):
        run.learn(range(2, 4))
        run.end()
    assert one.digest() == other.digest()
    assert all(bool(param.isfinite().all()) for param in one.learner.params)
    batch = one.batch(9)
    assert one.learner.evaluate(batch.x, batch.y, 1) == other.learner.evaluate(batch.x, batch.y, 1)
    if name != "pnn":  # whose earlier columns no longer train
        assert [part.training for part in one.learner.strategy.network.module.modules()] == modes


ALONE: dict[str, dict[str, Any]] = {  # memories and references of one sample
    "er": {"budget": 1, "ratio": 0.1},
    "derpp": {"budget": 1, "ratio": 0.1},
    "gem": {"memory": 1},
    "agem": {"budget": 1, "reference": 1},
    "joint": {"budget": 1},
    "ewc": {"samples": 1},
    "mas": {"samples": 1},
    "generative": {"variant": "brain-inspired", "likelihood": "gaussian", "ratio": 0.1},
}


@pytest.mark.parametrize("kind", ["statistics", "spread", "drawing", "recurrent", "odd"])
@pytest.mark.parametrize("name", list(RECIPES))
def test_a_batch_of_one_sample_is_learned(tmp_path: Path, name: str, kind: str) -> None:
    """A single sample is learned by every recipe and model: as a batch, in a memory, as a reference, and in refinement."""
    if kind in REFUSED.get(name, ()):
        return  # at the start: see the test before
    run = Run(
        tmp_path, {name: ALONE.get(name, {})}, model={"name": "tests.support.awkward:make", "options": {"kind": kind}}
    )
    for sizes in ([BATCH, 1], [1], [1, 1, BATCH]):
        run.begin()
        for number, size in enumerate(sizes):
            stats = run.learner.learn(run.batch(number, size))
            assert (stats.applied, stats.outcome) == (3 if size == BATCH else 1, "trained")
        run.end()
        one = run.batch(9, 1)
        assert np.isfinite(run.learner.evaluate(one.x, one.y, len(run.tasks) - 1)[1])
    assert all(bool(param.isfinite().all()) for param in run.learner.params)
    assert all(bool(value.isfinite().all()) for value in run.learner.model.buffers())


def test_layers_draw_what_the_seed_says(tmp_path: Path) -> None:
    """Dropout, numpy and random follow the seed, at the start too, and whatever else the process draws is not disturbed."""
    for kind in ("drawing", "odd"):
        made = {"model": {"name": "tests.support.awkward:make", "options": {"kind": kind}}}
        digests = []
        for process in (1, 2):
            torch.manual_seed(process)
            random.seed(process)
            np.random.seed(process)  # noqa: NPY002 - the generator that the model draws from
            run = Run(tmp_path, {"naive": {}}, **made)
            run.through(1)
            digests.append(run.digest())
            drawn = torch.rand(3).tolist(), random.random(), np.random.random()  # noqa: NPY002 - as above
            torch.manual_seed(process)
            random.seed(process)
            np.random.seed(process)  # noqa: NPY002 - as above
            assert drawn == (torch.rand(3).tolist(), random.random(), np.random.random())  # noqa: NPY002 - as above
        assert digests[0] == digests[1]


def test_no_part_gets_more_samples_than_it_asked_for(tmp_path: Path) -> None:
    """A small memory stays small beside a large one, and the samples that it gets are no prefix of the stream."""
    run = Run(tmp_path, {"er": {"budget": 24}, "gem": {"memory": 9}, "ewc": {"samples": 5}})
    asked: dict[str, int] = {}
    for name, part in run.learner.strategy.slots.items():
        whole = part.end_task

        def seen(ended: EndedTask, name: str = name, whole: Callable[[EndedTask], None] = whole) -> None:
            asked[name] = len(ended.y)
            whole(ended)

        part.end_task = seen  # type: ignore[method-assign]
    run.through(1)
    assert asked == {"network": 0, "replay": 24, "penalty": 5, "constraint": 9}
    assert run.learner.strategy.constraint.memory_usage()["samples"] == {0: 9}


def test_a_balanced_memory_stays_balanced_beside_a_larger_part(tmp_path: Path) -> None:
    """What a balanced part gets of a larger reservoir is of every class alike."""
    run = Run(tmp_path, {"er": {"budget": 6, "selection": "balanced"}, "ewc": {"samples": "all"}})
    run.begin()
    for number in range(12):
        batch = run.batch(number)
        kept = (batch.y == 0) | (number == 0)  # the other class is there at the beginning alone
        run.learner.learn(Batch(batch.x[kept], batch.y[kept], batch.task[kept]))
    run.end()
    memory = run.learner.strategy.replay.memory.samples_by_task[0]["y"]  # type: ignore[attr-defined]  # of episodic replay
    assert torch.bincount(memory).tolist() == [3, 3]


def test_resumes_bit_equal_without_an_average(tmp_path: Path) -> None:
    """Where there is no average, probes see the live weights, before a restart and after it."""
    plain = {"updates_per_batch": 3, "average": None, "optimizer": {"name": "sgd", "momentum": 0.9, "lr": 0.1}}
    one, other = (Run(tmp_path, {"er": {}}, learner=plain) for _ in range(2))
    one.through(1)
    other.load(one)
    for run in (one, other):
        run.through(1)
    batch = one.batch(9)
    assert one.digest() == other.digest()
    assert one.learner.evaluate(batch.x, batch.y, 1) == other.learner.evaluate(batch.x, batch.y, 1)
    assert other.learner.model is other.learner.strategy.network.module


@every_recipe
def test_saving_changes_nothing(tmp_path: Path, chosen: dict[str, Any]) -> None:
    """A run with a hundred saves ends equal to a run with none."""
    one, other = Run(tmp_path, chosen), Run(tmp_path, chosen)
    for run in (one, other):
        for _ in range(2):
            run.begin()
            for number in range(4):
                run.learn([number])
                if run is other:
                    run.saved()
            run.end()
    assert one.digest() == other.digest()


@every_recipe
def test_evaluation_changes_nothing(tmp_path: Path, chosen: dict[str, Any]) -> None:
    """Probing draws no random number and moves no state."""
    run = Run(tmp_path, chosen)
    run.through(2)
    before, batch = run.digest(), run.batch(9)
    first = run.learner.evaluate(batch.x, batch.y, 1)
    assert run.learner.evaluate(batch.x, batch.y, 1) == first
    assert run.digest() == before


@every_recipe
def test_a_gradient_that_is_not_finite_is_dropped(tmp_path: Path, chosen: dict[str, Any]) -> None:
    """A poisoned batch counts as skipped and leaves every parameter, average and importance as it was."""
    run = Run(tmp_path, chosen)
    run.through(1)
    run.begin()
    run.learn(range(2))
    before = run.digest()
    poisoned = run.batch(7)
    poisoned.x[0, 0] = torch.nan
    stats = run.learner.learn(poisoned)
    assert (stats.applied, stats.outcome, stats.loss) == (0, "skipped", None)
    moved = [name for name, value in run.digest().items() if value != before[name]]
    assert [name for name in moved if name.startswith(("model", "live", "optimizer"))] == []
    assert all(np.isfinite(np.frombuffer(run.digest()[name], np.float32)).all() for name in moved if "penalty" in name)


@every_recipe
def test_probes_that_are_evaluated_together_give_what_each_gives_alone(tmp_path: Path, chosen: dict[str, Any]) -> None:
    """Small probes of several tasks go through the network in one batch: the same answers, and the same loss but for rounding.

    A large probe keeps its batches, and its bits.
    """
    run = Run(tmp_path, chosen)
    run.through(2)
    probes = []
    for number, size in enumerate((3, 20, 1100, 1, 30)):
        batch = run.batch(number, size)
        task = number % 2
        probes.append((batch.x, batch.y if task == 1 else (batch.y - 2).clamp(min=0), task))
    together = run.learner.evaluate_all(probes)
    alone = [run.learner.evaluate(*probe) for probe in probes]
    assert [accuracy for accuracy, _ in together] == [accuracy for accuracy, _ in alone]
    assert [loss for _, loss in together] == pytest.approx([loss for _, loss in alone], rel=1e-5)
    assert together[2] == alone[2]
    assert run.learner.evaluate_all([]) == []


@pytest.mark.parametrize("chosen", [one for one in CHOICES if not FIXED_HEAD & set(one)], ids=identify)
def test_the_head_grows(tmp_path: Path, chosen: dict[str, Any]) -> None:
    """With `grow_head` a new label past the outputs enlarges model, optimizer, average and parts, and resumes bit-equal."""
    one = Run(tmp_path, chosen, classes=2, grow_head=True)
    one.through(2)
    assert one.learner.active_outputs.shape == (2, 4)
    other = Run(tmp_path, chosen, classes=2, grow_head=True)
    other.load(one)
    for run in (one, other):
        run.through(1)
    assert one.learner.active_outputs.shape == (3, 6)
    assert one.digest() == other.digest()


def test_a_head_that_cannot_grow_is_refused_at_the_start(tmp_path: Path) -> None:
    """A model without a layer named `head` learns nothing before that is told."""
    own = {"name": "tests.support.models:counting", "options": {"samples": 9}}
    Run(tmp_path, {"er": {}}, model=own, input={"shape": [5]}, grow_head=True)
    with pytest.raises(StreamlearnError, match="grow_head: the model needs a linear layer named head") as caught:
        Run(tmp_path, {"er": {}}, model={"name": "tests.support.awkward:headless"}, grow_head=True)
    assert caught.value.code == 78


@pytest.mark.parametrize("name", sorted(FIXED_HEAD))
@pytest.mark.parametrize(
    "over", [{"classes": 2, "grow_head": True}, {"scenario": {"kind": "class"}}], ids=["head", "class"]
)
def test_what_a_recipe_cannot_do_is_refused(tmp_path: Path, name: str, over: dict[str, Any]) -> None:
    """An exception of this suite is an error of configuration, which names the recipe and what is accepted."""
    with pytest.raises(StreamlearnError, match=rf"strategy\.{name}: .*accepted: "):
        Run(tmp_path, {name: {}}, **over)


@every_recipe
@pytest.mark.parametrize("kind", ["task", "domain"])
def test_learns_in_every_scenario(tmp_path: Path, chosen: dict[str, Any], kind: str) -> None:
    """Task- and domain-incremental learning reach far more than chance on the task just learned, however held back."""
    quick = {"updates_per_batch": 20, "optimizer": {"lr": 0.5 if PROJECTING & set(chosen) else 0.01}}
    run = Run(tmp_path, chosen, scenario={"kind": kind, "tasks": TASKS}, learner=quick)
    for index in range(2):
        run.begin()
        for number in range(6):
            batch = run.batch(number)
            shift = 2 * index if kind == "domain" else 0
            run.learner.learn(Batch(batch.x, batch.y - shift, batch.task))
        run.end()
    batch = run.batch(99, 200)
    accuracy, _ = run.learner.evaluate(batch.x, batch.y - (2 if kind == "domain" else 0), 1)
    assert accuracy > 0.65


@pytest.mark.parametrize("chosen", [one for one in CHOICES if "naive" not in one], ids=identify)
def test_every_method_changes_training(tmp_path: Path, chosen: dict[str, Any]) -> None:
    """After two tasks the weights are not naive's: a method that does nothing is no method."""
    run, naive = Run(tmp_path, chosen), Run(tmp_path, {"naive": {}}, like=chosen)
    for one in (run, naive):
        one.through(2)
    last = "columns.1" if "pnn" in chosen else ""
    ours = [p for name, p in run.learner.strategy.network.module.named_parameters() if name.startswith(last)]
    expected = {param.detach().cpu().numpy().tobytes() for param in naive.learner.params}
    assert not {param.detach().cpu().numpy().tobytes() for param in ours} & expected


@every_recipe
def test_budgets_are_never_exceeded(tmp_path: Path, chosen: dict[str, Any]) -> None:
    """What is stored stays under its budget in samples, and under `memory.max_bytes`, after every task."""
    run = Run(tmp_path, chosen)
    for _ in range(3):
        run.through(1)
        for sizes in (run.learner.strategy.replay.memory_usage(), run.learner.strategy.constraint.memory_usage()):
            if sizes:
                assert sum(sizes["samples"].values()) <= (sizes["capacity"] or np.inf)
                assert sizes["bytes"] <= run.learner.context.max_bytes
                assert sizes["bytes"] > 0


@every_recipe
def test_state_is_tensors_and_json(tmp_path: Path, chosen: dict[str, Any]) -> None:
    """What is not a tensor survives JSON unchanged; nothing needs a pickle."""
    run = Run(tmp_path, chosen)
    run.through(2)
    _, rest = run.saved()
    assert json.loads(json.dumps(rest, allow_nan=False)) == rest


@pytest.mark.parametrize("kind", ["task", "domain"])
@pytest.mark.parametrize("model", [{"hidden": [16]}, {"name": "resnet", "width": 4}], ids=["mlp", "resnet"])
@pytest.mark.parametrize("name", ["pnn", "packnet"])
def test_isolated_tasks_never_change(tmp_path: Path, name: str, model: dict[str, Any], kind: str) -> None:
    """The logits of a finished task are bit-identical after later tasks, whatever momentum and weight decay would do."""
    wild = {"optimizer": {"name": "adamw", "lr": 0.01, "weight_decay": 0.5}, "updates_per_batch": 3}
    shape = [SIZE] if "hidden" in model else [SIZE, 1]
    over = {"scenario": {"kind": kind, "tasks": TASKS}, "model": model, "input": {"shape": shape}, "learner": wild}
    run = Run(tmp_path, {name: {}}, **over)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    for index in range(3):
        run.begin()
        for number in range(4):
            batch = run.batch(number)
            shift = 2 * index if kind == "domain" else 0
            run.learner.learn(Batch(batch.x.reshape(-1, *shape), batch.y - shift, batch.task))
        run.end()
        x = run.batch(50, 40).x.reshape(-1, *shape)
        seen.append((x, run.logits(x, index)))
        for task, (probe, before) in enumerate(seen):
            assert run.logits(probe, task).cpu().numpy().tobytes() == before.cpu().numpy().tobytes()


def test_slots_default_to_nothing(tmp_path: Path) -> None:
    """Naive is what remains when every slot holds its null object."""
    strategy = Run(tmp_path, {"naive": {}}).learner.strategy
    assert [type(part) for part in (strategy.replay, strategy.penalty, strategy.constraint)] == [
        Replay,
        Penalty,
        Constraint,
    ]


def test_replay_protects_what_naive_forgets(tmp_path: Path) -> None:
    """After three tasks naive has lost the first, and replay has kept it."""
    accuracy = {}
    for name in ("naive", "er", "joint", "generative"):
        run = Run(tmp_path, {name: {}}, learner={"updates_per_batch": 20, "optimizer": {"lr": 0.01}})
        run.through(3)
        rng = np.random.default_rng(0)
        y = rng.integers(0, 2, 64)
        x = rng.random((64, SIZE)).astype(np.float32) * 0.3
        x[np.arange(64), y] += 0.7
        accuracy[name], _ = run.learner.evaluate(torch.from_numpy(x), torch.from_numpy(y), 0)
    assert accuracy["naive"] < 0.3
    assert min(accuracy["er"], accuracy["joint"]) > 0.8
    assert accuracy["generative"] > accuracy["naive"] + 0.2


@every_recipe
def test_a_task_without_a_usable_sample_harms_nothing(tmp_path: Path, chosen: dict[str, Any]) -> None:
    """A first task that ends without one sample leaves a learner that learns the next."""
    run = Run(tmp_path, chosen)
    empty = Task(0, "a")
    run.tasks.append(empty)
    run.learner.begin_task(empty)
    run.learner.set_active_outputs(run.tasks, run.labels)
    run.end()
    run.through(1)
    assert all(bool(param.isfinite().all()) for param in run.learner.params)


@pytest.mark.parametrize("value", [1e20, 3e38])
@every_recipe
def test_a_sample_far_out_of_range_poisons_nothing(tmp_path: Path, chosen: dict[str, Any], value: float) -> None:
    """One huge but finite sample never makes a weight that is not finite, in its task or after it."""
    run = Run(tmp_path, chosen)
    run.begin()
    wild = run.batch(0)
    wild.x[0, 0] = value
    run.learner.learn(wild)
    run.learn(range(1, 4))
    run.end()
    run.through(1)
    assert all(bool(param.isfinite().all()) for param in run.learner.params)


def test_outputs_are_the_same_however_many_come_together(tmp_path: Path) -> None:
    """A head that grows by two at once has the weights of one that grew twice by one."""
    one, other = (Run(tmp_path, {"naive": {}}, classes=1, grow_head=True) for _ in range(2))
    for run, steps in ((one, [3]), (other, [2, 3])):
        for size in steps:
            run.tasks = [Task(0, "a", labels=list(range(size)))]
            run.learner.set_active_outputs(run.tasks, list(range(size)))
    assert one.digest()["model.safetensors:head.weight"] == other.digest()["model.safetensors:head.weight"]
