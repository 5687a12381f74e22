"""The reservoir of the current task and the episodic memory of past tasks."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from streamlearn.core.errors import StreamlearnError
from streamlearn.core.immutable import Immutable
from streamlearn.learning.memory import ALL, EpisodicMemory, Reservoir, fair_share


def numbers(start: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return samples whose x is their number."""
    return torch.arange(start, start + count, dtype=torch.float32)[:, None], torch.zeros(count, dtype=torch.int64)


def test_a_reservoir_samples_uniformly() -> None:
    """Every sample of a long task is kept with the same probability, whatever the batch sizes are."""
    hits = torch.zeros(100)
    for seed in range(400):
        reservoir = Reservoir(10, 1 << 20, seed)
        for start in range(0, 100, 7):
            reservoir.add(*numbers(start, min(7, 100 - start)))
        assert len(reservoir) == 10
        hits[reservoir.x.flatten().long()] += 1
    assert float(hits.min()) > 15
    assert float(hits.max()) < 70


def test_a_balanced_reservoir_keeps_rare_classes() -> None:
    """A class with 1 % of the samples gets half of the reservoir; within a class early samples stay as often as late ones."""
    rare, common = torch.zeros(5000), torch.zeros(5000)
    for seed in range(60):
        reservoir = Reservoir(60, 1 << 20, seed, balanced=True)
        y = (torch.arange(5000) % 100 == 7).long()
        for some in torch.arange(5000, dtype=torch.float32)[:, None].split(50):
            reservoir.add(some, y[some.flatten().long()])
        assert torch.bincount(reservoir.y).tolist() == [30, 30]
        assert torch.equal(reservoir.y, y[reservoir.x.flatten().long()])
        rare[reservoir.x[reservoir.y == 1].flatten().long()] += 1
        common[reservoir.x[reservoir.y == 0].flatten().long()] += 1
    early, late = common[:2500].sum(), common[2500:].sum()
    assert abs(float(early - late)) < 5 * 1800**0.5
    early, late = rare[:2500].sum(), rare[2500:].sum()
    assert abs(float(early - late)) < 5 * 1800**0.5


def test_a_restored_balanced_reservoir_chooses_the_same_samples() -> None:
    """The counts of each class are part of the state."""
    one, other = (Reservoir(20, 1 << 20, 0, balanced=True) for _ in range(2))
    x, y = numbers(0, 400)
    y = (torch.arange(400) % 9 == 0).long()
    one.add(x[:200], y[:200])
    other.load_state_dict(json.loads(json.dumps({k: v for k, v in one.state_dict().items() if not torch.is_tensor(v)}))
                          | {k: v for k, v in one.state_dict().items() if torch.is_tensor(v)})  # fmt: skip
    for reservoir in (one, other):
        reservoir.add(x[200:], y[200:])
    assert torch.equal(one.x, other.x)


def test_a_balanced_reservoir_restores_the_state_of_a_uniform_one() -> None:
    """Older checkpoints have no counts of classes: later samples must not replace all earlier ones."""
    old, new = Reservoir(100, 1 << 20, 0), Reservoir(100, 1 << 20, 0, balanced=True)
    x, _ = numbers(0, 11_000)
    y = (torch.arange(11_000) % 2).long()
    old.add(x[:10_000], y[:10_000])
    new.load_state_dict({key: value for key, value in old.state_dict().items() if key not in {"met", "full"}})
    new.add(x[10_000:], y[10_000:])
    assert int((new.x >= 10_000).sum()) < 30  # about a tenth


def test_a_sealed_reservoir_ignores_additions() -> None:
    """During refinement the samples of the task do not change."""
    reservoir = Reservoir(ALL, 1 << 20, 0)
    reservoir.add(*numbers(0, 3))
    reservoir.sealed = True
    reservoir.add(*numbers(3, 3))
    assert reservoir.x.flatten().tolist() == [0, 1, 2]


def test_memory_shares_its_budget_and_counts_evicted_samples() -> None:
    """Each ended task gets the same share; other samples are evicted."""
    memory = EpisodicMemory(12, 1 << 20, 0)
    for task in range(3):
        memory.store(task, *numbers(100 * task, 20))
    assert memory.usage()["samples"] == {0: 4, 1: 4, 2: 4}
    assert memory.evicted == 3 * 20 - 3 * 4
    drawn = memory.draw(3000)
    assert torch.equal((drawn["x"].flatten() // 100).long(), drawn["task"])
    assert torch.bincount(drawn["task"], minlength=3).min() > 800


def test_a_balanced_memory_shares_by_class() -> None:
    """Every class gets the same share, at most `per_class`, whatever the sizes of the classes and the number of tasks."""
    memory = EpisodicMemory(12, 1 << 20, 0, balanced=True, per_class=4)
    for task, first in enumerate((18, 3)):
        x, _ = numbers(100 * task, 20)
        memory.store(task, x, (torch.arange(20) >= first).long())
        counts = [torch.bincount(slot["y"]).tolist() for slot in memory.samples_by_task.values()]
        assert counts == [[[4, 2]], [[2, 2], [2, 2]]][task]


@pytest.mark.parametrize(("per_class", "expected"), [(None, 30), (20, 20)])
def test_a_class_of_several_tasks_gets_one_share(per_class: int | None, expected: int) -> None:
    """Six tasks have class 0 and a new class each: all seven classes get 30 samples, class 0 from all tasks."""
    memory = EpisodicMemory(210, 1 << 20, 0, balanced=True, per_class=per_class)
    for task in range(6):
        x, _ = numbers(1000 * task, 300)
        memory.store(task, x, (torch.arange(300) % 2) * (task + 1))
    ys = [slot["y"] for slot in memory.samples_by_task.values()]
    assert torch.bincount(torch.cat(ys)).tolist() == 7 * [expected]
    assert max(int((y == 0).sum()) for y in ys) - min(int((y == 0).sum()) for y in ys) <= 1


def test_a_class_is_a_label_and_not_an_output() -> None:
    """If the outputs of each task start at 0, equal outputs of two tasks are two classes, and equal labels are one class."""
    memory = EpisodicMemory(12, 1 << 20, 0, balanced=True, per_class=4)
    classes = [{0: "cat", 1: "dog"}, {0: "cow", 1: "cat"}]
    for task in range(2):
        memory.store(task, *numbers(0, 20)[:1], torch.arange(20) % 2, classes)
    assert [torch.bincount(slot["y"]).tolist() for slot in memory.samples_by_task.values()] == [[2, 4], [4, 2]]


def test_unused_shares_of_small_tasks_go_to_other_tasks() -> None:
    """Tasks of 5, 5, 1000 and 1000 samples fill a budget of 100."""
    memory = EpisodicMemory(100, 1 << 20, 0)
    for task, size in enumerate((5, 5, 1000, 1000)):
        memory.store(task, *numbers(0, size))
    assert memory.usage()["samples"] == {0: 5, 1: 5, 2: 45, 3: 45}


@pytest.mark.parametrize("balanced", [False, True])
def test_a_memory_with_fewer_samples_than_tasks_keeps_the_newest(balanced: bool) -> None:  # noqa: FBT001 - a parameter of the test
    """If the budget is smaller than the number of tasks or classes, only the newest keep a sample."""
    memory = EpisodicMemory(2, 1 << 20, 0, balanced=balanced)
    for task in range(4):
        x, y = numbers(0, 6)
        memory.store(task, x, torch.arange(6) % 2 if balanced else y)
    assert memory.usage()["samples"] == ({0: 0, 1: 0, 2: 0, 3: 2} if balanced else {0: 0, 1: 0, 2: 1, 3: 1})
    assert len(memory.draw(9)["y"]) == 9


@given(st.lists(st.integers(1, 50), min_size=1, max_size=12), st.integers(0, 200))
def test_a_fair_share_is_the_largest_that_fits(sizes: list[int], room: int) -> None:
    """With this share all fit into the room; with a larger share they would not, unless nothing was cut."""
    share = fair_share(sizes, room)
    assert sum(min(size, share) for size in sizes) <= room
    assert share >= max(sizes) or sum(min(size, share + 1) for size in sizes) > room


def test_stored_values_can_be_widened() -> None:
    """After the head grows, stored logits need more columns, and are saved under another file name."""
    memory = EpisodicMemory(10, 1 << 20, 0)
    memory.store(0, *numbers(0, 4), logits=torch.zeros(4, 2))
    before = set(memory.state_dict()["slots"])
    memory.widen("logits", 3, -torch.inf)
    assert memory.draw(5)["logits"][0].tolist() == [0, 0, -torch.inf]
    assert not before & set(memory.state_dict()["slots"])


def test_too_many_samples_are_an_error_that_names_the_limit() -> None:
    """Without a budget, exceeding `max_bytes` is an error; with one, the budget is reduced."""
    with pytest.raises(StreamlearnError, match=r"memory\.max_bytes: 100 bytes hold"):
        EpisodicMemory(ALL, 100, 0).store(0, *numbers(0, 100))
    memory = EpisodicMemory(1000, 120, 0)
    memory.store(0, *numbers(0, 100))
    assert len(memory) == 10


def test_the_saved_name_of_a_task_changes_with_its_size() -> None:
    """A file that checkpoints link never changes: after an eviction the samples get another file name."""
    memory = EpisodicMemory(10, 1 << 20, 0)
    memory.store(0, *numbers(0, 20))
    names = set(memory.state_dict()["slots"])
    memory.store(1, *numbers(100, 20))
    assert (names, set(memory.state_dict()["slots"])) == ({"0-10-120"}, {"0-5-60", "1-5-60"})
    assert all(isinstance(slot, Immutable) for slot in memory.state_dict()["slots"].values())
