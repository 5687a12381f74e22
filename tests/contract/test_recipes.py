"""What every recipe must do. The tests take the recipes from `RECIPES`, so a new recipe is tested without further code."""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from benchmarks.choices import CHOICES, identify
from streamlearn.core.errors import StreamlearnError
from streamlearn.core.samples import Batch
from streamlearn.core.tasks import Task
from streamlearn.learning.strategies.recipes import RECIPES
from streamlearn.learning.strategies.slots import Constraint, EndedTask, Penalty, Replay
from streamlearn.testing import BATCH, SIZE, TASKS
from streamlearn.testing import LearnerRun as Run
from tests.support import awkward

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


pytestmark = pytest.mark.usefixtures("daemon_mode")

PROJECTING = {"gem", "agem"}
FIXED_HEAD = {"pnn", "packnet"}
# a generator that reads the model's last hidden layer also trains it, from the start
DIFFERS_IN_FIRST_TASK: list[dict[str, Any]] = [{"generative": {"variant": "brain-inspired", "gated": 0.3}}]

every_recipe = pytest.mark.parametrize("chosen", CHOICES, ids=identify)


@pytest.mark.parametrize("chosen", [one for one in CHOICES if one not in DIFFERS_IN_FIRST_TASK], ids=identify)
def test_is_naive_until_the_first_task_ends(tmp_path: Path, chosen: dict[str, Any]) -> None:
    """Before the first task ends, there is nothing to protect, so every model is bit-equal to naive's."""
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
        for number, batch in enumerate(one.learner.refine()):
            if number == stop:
                break
            one.learner.learn(batch)
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
    """The generator of distortions is part of the state. Probes and the accuracy before training use undistorted images."""
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
def test_resumes_bit_equal_with_an_encoder(tmp_path: Path, chosen: dict[str, Any]) -> None:
    """Every slot gets the encoder's features. The encoder never changes; a restart loads it from the checkpoint."""
    made = {"name": "tests.support.models:encoder", "options": {"features": 7, "fresh": True}}
    one, other = (Run(tmp_path, chosen, input={"shape": [SIZE], "encoder": made}) for _ in range(2))
    assert one.learner.context.input_shape == (7,)
    name = "encoder.frozen.safetensors:1.weight"
    before = one.digest()
    assert before[name] != other.digest()[name]
    one.restart_in(other)
    for run in (one, other):
        run.through(1)
    batch = one.batch(9)
    assert one.digest() == other.digest()
    assert {key: value for key, value in one.digest().items() if key.startswith("encoder")} == {
        key: value for key, value in before.items() if key.startswith("encoder")
    }
    assert one.learner.evaluate(batch.x, batch.y, 2) == other.learner.evaluate(batch.x, batch.y, 2)


@pytest.mark.parametrize("chosen", ENCODED, ids=identify)
def test_samples_without_finite_features_are_left_out(tmp_path: Path, chosen: dict[str, Any]) -> None:
    """Such a sample is neither learned nor stored nor replayed; the others of its batch are. In a probe it counts as wrong."""
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
    "packnet": {"tied", "normed", "drawing", "statistics"},  # shared or computed weights, and statistics of batches
}


@pytest.mark.parametrize("kind", list(awkward.MAKERS))
@pytest.mark.parametrize("name", list(RECIPES))
def test_unusual_models_learn_or_are_refused(tmp_path: Path, name: str, kind: str) -> None:
    """A user's model learns with every recipe, resumes bit-equal and keeps its submodules' modes; or it is refused at once."""
    made = {"model": {"name": "tests.support.awkward:make", "options": {"kind": kind}}}
    if kind in REFUSED.get(name, ()):
        with pytest.raises(StreamlearnError, match=rf"strategy\.{name}: ") as caught:
            Run(tmp_path, {name: {}}, **made)
        assert caught.value.exit_code == 78
        return
    one, other = (Run(tmp_path, {name: {}}, **made) for _ in range(2))
    modes = [module.training for module in one.learner.strategy.network.module.modules()]
    one.restart_in(other)
    assert one.digest() == other.digest()
    assert all(bool(param.isfinite().all()) for param in one.learner.params)
    batch = one.batch(9)
    assert one.learner.evaluate(batch.x, batch.y, 1) == other.learner.evaluate(batch.x, batch.y, 1)
    if name != "pnn":  # its earlier columns stay in evaluation mode
        assert [module.training for module in one.learner.strategy.network.module.modules()] == modes


ONE_SAMPLE: dict[str, dict[str, Any]] = {  # settings with memories and references of one sample
    "er": {"budget": 1, "ratio": 0.1},
    "derpp": {"budget": 1, "ratio": 0.1},
    "gem": {"memory": 1},
    "agem": {"budget": 1, "reference": 1},
    "joint": {"budget": 1},
    "ewc": {"samples": 1},
    "mas": {"samples": 1},
    "generative": {"variant": "brain-inspired", "likelihood": "gaussian", "ratio": 0.1},
}


ACCEPTED = [
    (name, kind)
    for name in RECIPES
    for kind in ("statistics", "spread", "drawing", "recurrent", "odd")
    if kind not in REFUSED.get(name, ())
]


@pytest.mark.parametrize(("name", "kind"), ACCEPTED)
def test_a_batch_of_one_sample_is_learned(tmp_path: Path, name: str, kind: str) -> None:
    """Every recipe and model learns from a single sample: as a batch, in a memory, as a reference, and in the refinement."""
    run = Run(
        tmp_path,
        {name: ONE_SAMPLE.get(name, {})},
        model={"name": "tests.support.awkward:make", "options": {"kind": kind}},
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


def test_random_layers_follow_the_seed(tmp_path: Path) -> None:
    """Draws of a model's layers, also from numpy and random, depend on the seed only, and do not change the process's draws."""
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


def test_no_slot_gets_more_samples_than_it_needs(tmp_path: Path) -> None:
    """Each slot gets the number of samples that it asked for, even if another slot needs more."""
    run = Run(tmp_path, {"er": {"budget": 24}, "gem": {"memory": 9}, "ewc": {"samples": 5}})
    received: dict[str, int] = {}
    for name, slot in run.learner.strategy.slots.items():
        original = slot.end_task

        def counted(ended: EndedTask, name: str = name, original: Callable[[EndedTask], None] = original) -> None:
            received[name] = len(ended.y)
            original(ended)

        slot.end_task = counted  # type: ignore[method-assign]
    run.through(1)
    assert received == {"network": 0, "replay": 24, "penalty": 5, "constraint": 9}
    assert run.learner.strategy.constraint.memory_usage()["samples"] == {0: 9}


def test_a_balanced_memory_gets_balanced_samples(tmp_path: Path) -> None:
    """A balanced memory gets equally many samples of each class, even if another slot needs a larger reservoir."""
    run = Run(tmp_path, {"er": {"budget": 6, "selection": "balanced"}, "ewc": {"samples": "all"}})
    run.begin()
    for number in range(12):
        batch = run.batch(number)
        kept = (batch.y == 0) | (number == 0)  # only the first batch has the other class
        run.learner.learn(Batch(batch.x[kept], batch.y[kept], batch.task[kept]))
    run.end()
    memory = run.learner.strategy.replay.memory.samples_by_task[0]["y"]  # type: ignore[attr-defined]  # of episodic replay
    assert torch.bincount(memory).tolist() == [3, 3]


def test_resumes_bit_equal_without_an_average(tmp_path: Path) -> None:
    """Without averaged weights, probes use the live weights, before a restart and after it."""
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
    """A run that saves after every batch ends bit-equal to a run that never saves."""
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
    """Evaluation draws no random number and changes no state."""
    run = Run(tmp_path, chosen)
    run.through(2)
    before, batch = run.digest(), run.batch(9)
    first = run.learner.evaluate(batch.x, batch.y, 1)
    assert run.learner.evaluate(batch.x, batch.y, 1) == first
    assert run.digest() == before


@every_recipe
def test_a_gradient_that_is_not_finite_is_dropped(tmp_path: Path, chosen: dict[str, Any]) -> None:
    """A batch with NaN counts as skipped. Parameters, averages and optimizer stay as they were; importances stay finite."""
    run = Run(tmp_path, chosen)
    run.through(1)
    run.begin()
    run.learn(range(2))
    before = run.digest()
    broken = run.batch(7)
    broken.x[0, 0] = torch.nan
    stats = run.learner.learn(broken)
    assert (stats.applied, stats.outcome, stats.loss) == (0, "skipped", None)
    changed = [name for name, value in run.digest().items() if value != before[name]]
    assert [name for name in changed if name.startswith(("model", "live", "optimizer"))] == []
    assert all(
        np.isfinite(np.frombuffer(run.digest()[name], np.float32)).all() for name in changed if "penalty" in name
    )


@every_recipe
def test_probes_evaluated_together_give_the_same_results(tmp_path: Path, chosen: dict[str, Any]) -> None:
    """Small probes of several tasks share a batch. The accuracies are the same as alone, and the losses up to rounding.

    A large probe has batches of its own, so its loss is bit-equal.
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
    """With `grow_head`, a new label enlarges model, optimizer, average and slots, and the run still resumes bit-equal."""
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
    """With `grow_head`, a model without a layer named `head` is refused before anything is learned."""
    own = {"name": "tests.support.models:counting", "options": {"samples": 9}}
    Run(tmp_path, {"er": {}}, model=own, input={"shape": [5]}, grow_head=True)
    with pytest.raises(StreamlearnError, match="grow_head: the model needs a linear layer named head") as caught:
        Run(tmp_path, {"er": {}}, model={"name": "tests.support.awkward:headless"}, grow_head=True)
    assert caught.value.exit_code == 78


@pytest.mark.parametrize("name", sorted(FIXED_HEAD))
@pytest.mark.parametrize(
    "over", [{"classes": 2, "grow_head": True}, {"scenario": {"kind": "class"}}], ids=["head", "class"]
)
def test_unsupported_settings_of_a_recipe_are_refused(tmp_path: Path, name: str, over: dict[str, Any]) -> None:
    """A setting that a recipe cannot support is a configuration error with the recipe's name and what is accepted."""
    with pytest.raises(StreamlearnError, match=rf"strategy\.{name}: .*accepted: "):
        Run(tmp_path, {name: {}}, **over)


@every_recipe
@pytest.mark.parametrize("kind", ["task", "domain"])
def test_learns_in_every_scenario(tmp_path: Path, chosen: dict[str, Any], kind: str) -> None:
    """In scenarios task and domain, every recipe learns the second task to far more than chance."""
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
    """After two tasks, every recipe has other weights than naive. A recipe without any effect would fail here."""
    run, naive = Run(tmp_path, chosen), Run(tmp_path, {"naive": {}}, like=chosen)
    for one in (run, naive):
        one.through(2)
    last = "columns.1" if "pnn" in chosen else ""
    ours = [p for name, p in run.learner.strategy.network.module.named_parameters() if name.startswith(last)]
    expected = {param.detach().cpu().numpy().tobytes() for param in naive.learner.params}
    assert not {param.detach().cpu().numpy().tobytes() for param in ours} & expected


@every_recipe
def test_budgets_are_never_exceeded(tmp_path: Path, chosen: dict[str, Any]) -> None:
    """After every task, the memories stay within their budgets of samples and within `memory.max_bytes`."""
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
    """Everything in the state that is not a tensor can be written as JSON and read again unchanged."""
    run = Run(tmp_path, chosen)
    run.through(2)
    _, rest = run.saved()
    assert json.loads(json.dumps(rest, allow_nan=False)) == rest


@pytest.mark.parametrize("kind", ["task", "domain"])
@pytest.mark.parametrize("model", [{"hidden": [16]}, {"name": "resnet", "width": 4}], ids=["mlp", "resnet"])
@pytest.mark.parametrize("name", ["pnn", "packnet"])
def test_isolated_tasks_never_change(tmp_path: Path, name: str, model: dict[str, Any], kind: str) -> None:
    """The logits of an ended task are bit-equal after later tasks, despite momentum and weight decay."""
    strong_decay = {"optimizer": {"name": "adamw", "lr": 0.01, "weight_decay": 0.5}, "updates_per_batch": 3}
    shape = [SIZE] if "hidden" in model else [SIZE, 1]
    over = {
        "scenario": {"kind": kind, "tasks": TASKS},
        "model": model,
        "input": {"shape": shape},
        "learner": strong_decay,
    }
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


def test_naive_has_the_default_slots(tmp_path: Path) -> None:
    """Naive's slots are the base classes, which do nothing."""
    strategy = Run(tmp_path, {"naive": {}}).learner.strategy
    assert [type(slot) for slot in (strategy.replay, strategy.penalty, strategy.constraint)] == [
        Replay,
        Penalty,
        Constraint,
    ]


def test_replay_protects_what_naive_forgets(tmp_path: Path) -> None:
    """After three tasks naive has forgotten the first one, and replay has not."""
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
def test_the_first_task_may_have_no_usable_sample(tmp_path: Path, chosen: dict[str, Any]) -> None:
    """If the first task ends without a sample, the next task is learned."""
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
def test_a_huge_sample_leaves_all_weights_finite(tmp_path: Path, chosen: dict[str, Any], value: float) -> None:
    """One huge but finite sample never leads to a weight that is not finite, in its task or later."""
    run = Run(tmp_path, chosen)
    run.begin()
    huge = run.batch(0)
    huge.x[0, 0] = value
    run.learner.learn(huge)
    run.learn(range(1, 4))
    run.end()
    run.through(1)
    assert all(bool(param.isfinite().all()) for param in run.learner.params)


def test_new_outputs_do_not_depend_on_how_the_head_grew(tmp_path: Path) -> None:
    """A head that grows by two outputs at once has the same weights as one that grows twice by one."""
    one, other = (Run(tmp_path, {"naive": {}}, classes=1, grow_head=True) for _ in range(2))
    for run, steps in ((one, [3]), (other, [2, 3])):
        for size in steps:
            run.tasks = [Task(0, "a", labels=list(range(size)))]
            run.learner.set_active_outputs(run.tasks, list(range(size)))
    assert one.digest()["model.safetensors:head.weight"] == other.digest()["model.safetensors:head.weight"]
