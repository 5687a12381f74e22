"""Which output a label has, and which outputs compete."""

from __future__ import annotations

from streamlearn.data import Task
from streamlearn.scenario import Scenario

A, B = Task(0, "a", labels=[3, 5]), Task(1, "b", labels=[1])


def test_a_number_of_classes_gives_outputs_in_order_of_appearance() -> None:
    """The first label met has the first output; the one past the number has none, unless the head grows."""
    scenario = Scenario("class", "seen", 2)
    assert [scenario.output(3, "a", []), scenario.output(5, "a", [3]), scenario.output(3, "a", [3, 5])] == [0, 1, 0]
    assert scenario.output(9, "a", [3, 5]) is None
    assert Scenario("class", "seen", 2, grow=True).output(9, "a", [3, 5]) == 2


def test_a_list_of_classes_is_the_order_of_outputs() -> None:
    """A label that is not listed has no output."""
    scenario = Scenario("class", "seen", ["no", "yes"])
    assert (scenario.output("yes", "a", []), scenario.output("maybe", "a", [])) == (1, None)


def test_masks() -> None:
    """Class: what was seen, or all; task: what that task has; domain: as many as that task declares."""
    labels = [3, 5, 1]
    assert Scenario("class", "seen", 4).mask(A, labels) == [True, True, True, False]
    assert Scenario("class", "all", 4).mask(A, labels) == [True] * 4
    assert Scenario("task", "seen", 4).mask(A, labels) == [True, True, False, False]
    assert Scenario("task", "seen", 4).mask(B, labels) == [False, False, True, False]
    domain = Scenario("domain", "seen", 6, {"a": [3, 5], "b": [1]})
    assert (domain.mask(A, labels), domain.mask(B, labels)) == ([True, True], [True, False])
    assert (domain.output(5, "a", []), domain.output(5, "b", [])) == (1, None)
