"""The output of each label, and the active outputs of each task."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from streamlearn.config import loader
from streamlearn.core.labels import Label, Labels
from streamlearn.core.scenario import Scenario
from streamlearn.core.tasks import Task
from streamlearn.learning.build import make_learner
from streamlearn.learning.strategies.recipes import RECIPES

if TYPE_CHECKING:
    from pathlib import Path

    from streamlearn.learning.learner import Learner

A, B = Task(0, "a", labels=[3, 5]), Task(1, "b", labels=[1])


def test_a_number_of_classes_gives_outputs_in_order_of_appearance() -> None:
    """The first label gets the first output; a label beyond the number of classes has none, unless the head grows."""
    scenario = Scenario("class", "seen", 2)
    assert [scenario.output(3, "a", []), scenario.output(5, "a", [3]), scenario.output(3, "a", [3, 5])] == [0, 1, 0]
    assert scenario.output(9, "a", [3, 5]) is None
    assert Scenario("class", "seen", 2, grow=True).output(9, "a", [3, 5]) == 2


def test_a_list_of_classes_is_the_order_of_outputs() -> None:
    """A label that is not listed has no output."""
    scenario = Scenario("class", "seen", ["no", "yes"])
    assert (scenario.output("yes", "a", []), scenario.output("maybe", "a", [])) == (1, None)


def test_masks() -> None:
    """Class: the outputs seen, or all; task: the outputs of the task; domain: as many as the task declares."""
    labels = [3, 5, 1]
    assert Scenario("class", "seen", 4).active_mask(A, labels) == [True, True, True, False]
    assert Scenario("class", "all", 4).active_mask(A, labels) == [True] * 4
    assert Scenario("task", "seen", 4).active_mask(A, labels) == [True, True, False, False]
    assert Scenario("task", "seen", 4).active_mask(B, labels) == [False, False, True, False]
    domain = Scenario("domain", "seen", 6, {"a": [3, 5], "b": [1]})
    assert (domain.active_mask(A, labels), domain.active_mask(B, labels)) == ([True, True], [True, False])
    assert (domain.output(5, "a", []), domain.output(5, "b", [])) == (1, None)


def test_a_domain_scenario_may_declare_classes_once_for_all_tasks() -> None:
    """Without a declaration by task every topic has all classes, in the order of the list, future topics too."""
    domain = Scenario("domain", "seen", ["no", "yes"])
    assert domain.num_outputs([]) == 2
    assert (domain.active_mask(A, []), domain.active_mask(B, ["yes"])) == ([True, True], [True, True])
    assert [domain.output(label, "new", []) for label in ("no", "yes", "maybe")] == [0, 1, None]
    assert domain.declared_classes("new") == ["no", "yes"]


class Counting(str):
    """A label that counts how often it is compared with another."""

    __slots__ = ()
    compared = 0

    def __eq__(self, other: object) -> bool:
        Counting.compared += 1
        return str.__eq__(self, str(other))

    __hash__ = str.__hash__


def learner(tmp_path: Path, **over: Any) -> Learner:
    """Return an untrained learner for a configuration."""
    tree = {
        "device": "cpu",
        "input": {"shape": [1]},
        "classes": 4,
        "stream": {"pattern": ".*"},
        "model": {"hidden": [2]},
        "strategy": "naive",
    }
    path = tmp_path / "job.yaml"
    path.write_text(loader.dump(tree | over))
    config = loader.load(path, RECIPES, {})
    return make_learner(config.learning, Scenario.from_config(config.scenario, config.classes, grow=config.grow_head))


def test_finding_a_label_compares_no_other_labels() -> None:
    """The cost of looking up a label does not depend on the number of labels."""
    labels = Labels(Counting(number) for number in range(5000))
    scenario = Scenario("class", "seen", 10_000)
    Counting.compared = 0
    assert scenario.output(Counting(4000), "a", labels) == 4000
    assert scenario.output(Counting(7000), "a", labels) == 5000
    assert Counting.compared < 20
    labels.append(Counting(7000))
    assert (labels.index(Counting(7000)), labels[-1], "7001" in labels) == (5000, "7000", False)
    with pytest.raises(ValueError, match="7001"):
        labels.index("7001")


@pytest.mark.parametrize("kind", ["class", "task"])
def test_masks_are_updated_only_for_new_labels(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new label of the last of 300 tasks costs a few look-ups; labels of earlier tasks are not looked up."""
    one = learner(tmp_path, classes=2, grow_head=True, scenario=kind)
    tasks: list[Task] = []
    labels = Labels()
    looked: list[Label] = []
    output = Scenario.output
    for index in range(300):
        tasks.append(Task(index, f"t{index}", labels=[2 * index, 2 * index + 1]))
        for label in tasks[-1].labels:
            labels.append(label)
    one.set_active_outputs(tasks, labels)

    def count_lookup(self: Scenario, label: Label, task: str, known: Labels) -> int | None:
        looked.append(label)
        return output(self, label, task, known)

    monkeypatch.setattr(Scenario, "output", count_lookup)
    for label in (600, 601):
        tasks[-1].labels.append(label)
        labels.append(label)
        one.set_active_outputs(tasks, labels)
    assert set(looked) == {600, 601}
    assert len(looked) <= 4
    assert one.active_outputs.shape == (300, 602)
    expected = [one.scenario.active_mask(task, labels) for task in tasks]
    assert one.active_outputs.tolist() == expected
    assert (~one.outputs.inactive).expand(300, 602).tolist() == expected
    assert one.output_labels[-1] == {output: output for output in (598, 599, 600, 601)}


def test_masks_do_not_depend_on_how_many_labels_come_at_once(tmp_path: Path) -> None:
    """A restart, which registers all labels at once, gets the same masks as the run that it continues."""
    declared = {"kind": "task", "tasks": {"a": [7, 8], "b": [9]}}
    for number, scenario in enumerate(("class", {"kind": "class", "active": "all"}, "task", declared)):
        directory = tmp_path / str(number)
        directory.mkdir()
        one, other = (learner(directory, scenario=scenario) for _ in range(2))
        tasks, labels = [Task(0, "a"), Task(1, "b")], Labels()
        for index, label in ((0, 8), (0, 7), (1, 9)):
            tasks[index].labels.append(label)
            labels.append(label)
            one.set_active_outputs(tasks, labels)
        other.set_active_outputs(tasks, labels)
        expected = [one.scenario.active_mask(task, labels) for task in tasks]
        assert one.active_outputs.tolist() == other.active_outputs.tolist() == expected
        assert one.output_labels == other.output_labels == [{0: 8, 1: 7}, {2: 9}]
