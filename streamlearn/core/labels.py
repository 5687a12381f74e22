"""Labels of samples: integers or strings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from streamlearn.core.text import INTEGER

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import SupportsIndex

Label = int | str


MAX_LABEL_BYTES = 256
"""The longest accepted label. Every checkpoint, every status and every status page contains all labels."""


class Labels(list[Label]):
    """A list of distinct labels in order of first appearance, with `in` and `index` in constant time."""

    def __init__(self, labels: Iterable[Label] = ()) -> None:
        super().__init__(labels)
        self._indices = {label: index for index, label in reversed(list(enumerate(self)))}

    def append(self, label: Label) -> None:
        """Add a label at the end."""
        self._indices.setdefault(label, len(self))
        super().append(label)

    def __contains__(self, label: object) -> bool:
        return label in self._indices

    def index(self, value: Label, *bounds: SupportsIndex) -> int:
        """Return a label's index; raises `ValueError` if the list does not contain it."""
        return super().index(value, *bounds) if bounds or value not in self._indices else self._indices[value]


def label_of_other_type(label: Label) -> Label | None:
    """Return the label of the other type with the same text: 1 for "1", and "1" for 1. None if there is none.

    An integer and a string are two different labels, even if they have the same text.
    """
    if isinstance(label, int):
        return str(label)
    return int(label) if INTEGER.fullmatch(label) and len(label.lstrip("-")) <= 18 else None
