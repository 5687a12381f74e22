"""Maps labels to outputs, and says which outputs are active for a sample (task-, domain- and class-incremental)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from streamlearn.core.labels import Labels

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from streamlearn.core.config import ScenarioConfig
    from streamlearn.core.labels import Label
    from streamlearn.core.tasks import Task


@dataclass(frozen=True)
class Scenario:
    """The output of each label, and the active outputs of each task: three types of incremental learning.

    They are those of van de Ven et al. 2022. Only active outputs take part in the softmax. `classes` is the list of all
    labels in output order, or the number of outputs: labels then get outputs in order of first appearance. `declared` has
    the classes of each task by task name; in a domain scenario their order gives the output. A domain scenario without
    declared classes has all classes in every task, and accepts new tasks.
    """

    kind: str
    active: str
    classes: Sequence[Label] | int
    declared: Mapping[str, Sequence[Label]] = field(default_factory=dict)
    grow: bool = False

    @classmethod
    def from_config(cls, spec: ScenarioConfig, classes: Sequence[Label] | int, *, grow: bool) -> Scenario:
        """Return the scenario that a configuration describes."""
        declared = {task: Labels(labels) for task, labels in spec.tasks.items()}
        return cls(spec.kind, spec.active, classes if isinstance(classes, int) else Labels(classes), declared, grow)

    @property
    def shares_mask(self) -> bool:
        """Whether all tasks have the same active outputs."""
        return self.kind == "class"

    @property
    def outputs_by_appearance(self) -> bool:
        """Whether labels get outputs in the order in which training first sees them."""
        return self.kind != "domain" and isinstance(self.classes, int)

    def declared_classes(self, task: str) -> Sequence[Label] | None:
        """Return the classes declared for a task; None if any class may come, or if no declaration is known."""
        if self.kind == "domain" and not self.declared and not isinstance(self.classes, int):
            return self.classes
        return self.declared.get(task)

    def num_outputs(self, labels: Sequence[Label]) -> int:
        """Return how many outputs the model needs for the labels seen so far."""
        if self.kind == "domain" and self.declared:
            return max(len(known) for known in self.declared.values())
        size = self.classes if isinstance(self.classes, int) else len(self.classes)
        return max(size, len(labels)) if self.grow else size

    def output(self, label: Label, task: str, labels: Sequence[Label]) -> int | None:
        """Return the output of a label in a task, or None if it has none. `labels` are the labels seen so far.

        A label that is not in `labels` gets the next free output; then the caller must append it to `labels`.
        """
        known = self.declared_classes(task)
        if known is not None and label not in known:
            return None
        if self.kind == "domain":
            return None if known is None else known.index(label)
        if not isinstance(self.classes, int):
            return self.classes.index(label) if label in self.classes else None
        if label in labels:
            return labels.index(label)
        return len(labels) if self.grow or len(labels) < self.classes else None

    def active_outputs(self, task: Task, labels: Sequence[Label], start: int = 0) -> list[int | None]:
        """Return the active outputs of a task for the labels seen so far, without the first `start` of them.

        New labels add outputs at the end, so a caller that counts the outputs it already has asks only for the new ones.
        """
        if self.kind == "domain":
            return list(range(start, len(self.declared_classes(task.name) or ())))
        if self.kind == "class" and self.active == "all":
            return list(range(start, self.num_outputs(labels)))
        if self.kind == "task":
            task_labels = self.declared.get(task.name, task.labels)
            return [self.output(label, task.name, labels) for label in task_labels[start:]]
        known = labels if isinstance(self.classes, int) else self.classes
        return [known.index(label) for label in labels[start:]]

    def outputs_are_final(self, task: Task, labels: Sequence[Label]) -> bool:
        """Return whether the active outputs of a task can only be extended, and none of them can change.

        A declared class that was not seen yet counts as the next free output, which another label may still get.
        """
        if self.kind != "task" or not isinstance(self.classes, int):
            return True
        return all(label in labels for label in self.declared.get(task.name, ()))

    def active_mask(self, task: Task, labels: Sequence[Label]) -> list[bool]:
        """Return a mask over the outputs, `[C]`: the active outputs of a task for the labels seen so far."""
        outputs = set(self.active_outputs(task, labels))
        return [n in outputs for n in range(self.num_outputs(labels))]

    def labels_in_output_order(self, labels: Sequence[Label]) -> list[Label]:
        """Return the known labels in output order; an empty list in a domain scenario, where an output has a label per task."""
        if self.kind == "domain":
            return []
        return list(labels) if isinstance(self.classes, int) else list(self.classes)
