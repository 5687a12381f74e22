"""Scenarios: which output a label has, and which outputs compete for a sample (task-, domain-, class-incremental)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from streamlearn.data import Labels

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from streamlearn.config import Config
    from streamlearn.data import Label, Task


@dataclass(frozen=True)
class Scenario:
    """Labels to outputs and masks over outputs (van de Ven et al. 2022: three types of incremental learning).

    `classes`: every label in output order, or the number of outputs, taken in order of first appearance.
    `declared`: the classes of each task by name; in a domain scenario their order gives the output. A domain scenario that
    declares none has all classes in every task, and new tasks may come.
    """

    kind: str
    active: str
    classes: Sequence[Label] | int
    declared: Mapping[str, Sequence[Label]] = field(default_factory=dict)
    grow: bool = False

    @classmethod
    def from_config(cls, config: Config) -> Scenario:
        """Return the scenario that a configuration describes."""
        spec = config.scenario
        classes = config.classes if isinstance(config.classes, int) else Labels(config.classes)
        declared = {task: Labels(labels) for task, labels in spec.tasks.items()}
        return cls(spec.kind, spec.active, classes, declared, config.grow_head)

    @property
    def shares_mask(self) -> bool:
        """Whether the same outputs compete in every task."""
        return self.kind == "class"

    @property
    def outputs_by_appearance(self) -> bool:
        """Whether labels take outputs in the order in which training meets them."""
        return self.kind != "domain" and isinstance(self.classes, int)

    def declared_classes(self, task: str) -> Sequence[Label] | None:
        """Return the classes that are declared for a task, or None where any may come, or none is known."""
        if self.kind == "domain" and not self.declared and not isinstance(self.classes, int):
            return self.classes
        return self.declared.get(task)

    def num_outputs(self, labels: Sequence[Label]) -> int:
        """Return the outputs a model needs, given the labels met so far."""
        if self.kind == "domain" and self.declared:
            return max(len(known) for known in self.declared.values())
        size = self.classes if isinstance(self.classes, int) else len(self.classes)
        return max(size, len(labels)) if self.grow else size

    def output(self, label: Label, task: str, labels: Sequence[Label]) -> int | None:
        """Return the output of a label met in `task`, or None if it has none; `labels` are those met so far.

        A label that is not among `labels` gets the next free output; the caller appends it.
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
        """Return the outputs that compete for a sample of `task`, given all labels met so far, without the first `start`.

        New labels add outputs at the end. So a caller that counts what it got pays only for what is new.
        """
        if self.kind == "domain":
            return list(range(start, len(self.declared_classes(task.name) or ())))
        if self.kind == "class" and self.active == "all":
            return list(range(start, self.num_outputs(labels)))
        if self.kind == "task":
            chosen = self.declared.get(task.name, task.labels)
            return [self.output(label, task.name, labels) for label in chosen[start:]]
        known = labels if isinstance(self.classes, int) else self.classes
        return [known.index(label) for label in labels[start:]]

    def outputs_are_final(self, task: Task, labels: Sequence[Label]) -> bool:
        """Tell whether the outputs that compete in `task` stay as they are, but for labels that are not met yet.

        A class that was declared and not met stands at the next free output, which another label may take.
        """
        if self.kind != "task" or not isinstance(self.classes, int):
            return True
        return all(label in labels for label in self.declared.get(task.name, ()))

    def active_mask(self, task: Task, labels: Sequence[Label]) -> list[bool]:
        """Return which outputs compete for a sample of `task`, given all labels met so far: `[C]`."""
        outputs = set(self.active_outputs(task, labels))
        return [n in outputs for n in range(self.num_outputs(labels))]

    def labels_in_output_order(self, labels: Sequence[Label]) -> list[Label]:
        """Return the labels in output order, as far as they are known; an empty list where outputs differ by task."""
        if self.kind == "domain":
            return []
        return list(labels) if isinstance(self.classes, int) else list(self.classes)
