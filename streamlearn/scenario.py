"""Scenarios: which output a label has, and which outputs compete for a sample (task-, domain-, class-incremental)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from streamlearn.config import Config
    from streamlearn.data import Label, Task


@dataclass(frozen=True)
class Scenario:
    """Labels to outputs and masks over outputs (van de Ven et al. 2022: three types of incremental learning).

    `classes`: every label in output order, or the number of outputs, taken in order of first appearance.
    `declared`: the classes of each task by name; in a domain scenario their order gives the output.
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
        return cls(spec.kind, spec.active, config.classes, spec.tasks, config.grow_head)

    @property
    def by_appearance(self) -> bool:
        """Whether labels take outputs in the order in which training meets them."""
        return self.kind != "domain" and isinstance(self.classes, int)

    def num_outputs(self, labels: Sequence[Label]) -> int:
        """Return the outputs a model needs, given the labels met so far."""
        if self.kind == "domain":
            return max(len(known) for known in self.declared.values())
        size = self.classes if isinstance(self.classes, int) else len(self.classes)
        return max(size, len(labels)) if self.grow else size

    def output(self, label: Label, task: str, labels: Sequence[Label]) -> int | None:
        """Return the output of a label met in `task`, or None if it has none; `labels` are those met so far.

        A label that is not among `labels` gets the next free output; the caller appends it.
        """
        known = self.declared.get(task)
        if known is not None and label not in known:
            return None
        if self.kind == "domain":
            return None if known is None else list(known).index(label)
        if not isinstance(self.classes, int):
            return self.classes.index(label) if label in self.classes else None
        if label in labels:
            return labels.index(label)
        return len(labels) if self.grow or len(labels) < self.classes else None

    def mask(self, task: Task, labels: Sequence[Label]) -> list[bool]:
        """Return which outputs compete for a sample of `task`, given all labels met so far: `[C]`."""
        size = self.num_outputs(labels)
        if self.kind == "domain":
            return [n < len(self.declared[task.name]) for n in range(size)]
        if self.kind == "class" and self.active == "all":
            return [True] * size
        chosen = labels if self.kind == "class" else self.declared.get(task.name, task.labels)
        outputs = (
            {self.output(label, task.name, labels) for label in chosen}
            if self.kind == "task"
            else {
                labels.index(label) if isinstance(self.classes, int) else self.classes.index(label) for label in chosen
            }
        )
        return [n in outputs for n in range(size)]

    def names(self, labels: Sequence[Label]) -> list[Label]:
        """Return the labels in output order, as far as they are known; an empty list where outputs differ by task."""
        if self.kind == "domain":
            return []
        return list(labels) if isinstance(self.classes, int) else list(self.classes)
