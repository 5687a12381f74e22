"""A burst: so many samples are rejected in a row that the schema must have changed, and reading on empties the topic."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

    from streamlearn.data import Rejected
    from streamlearn.stream.log import Record


class Burst:
    """The samples rejected in a row up to the record that was read last, whatever their topic and partition."""

    def __init__(self) -> None:
        self.length = 0
        self._reasons: Counter[str] = Counter()
        self._examples: dict[str, str] = {}  # the first message of each reason
        self._place = ""

    def clear(self) -> None:
        """Begin the count anew."""
        if self.length:
            self.length = 0
            self._reasons.clear()
            self._examples.clear()

    def update(self, record: Record, rejected: np.ndarray, bad: Mapping[int, Rejected], first: int) -> None:
        """Take in what became of a record's samples from its sample `first` on, `rejected [n]` of booleans."""
        used = np.flatnonzero(~rejected[first:])
        if len(used):
            self.clear()
            first += int(used[-1]) + 1
        for index in range(first, len(rejected)):
            self._reasons[bad[index].reason] += 1
            self._examples.setdefault(bad[index].reason, str(bad[index]))
        self.length += len(rejected) - first
        self._place = f"{record.topic}[{record.partition}] offset {record.offset}"

    def __str__(self) -> str:
        reason, _ = self._reasons.most_common(1)[0]
        return (
            f"{self._place}: {self.length} samples in a row were rejected, mostly {reason} ({self._examples[reason]}); "
            "mend the producer or the configuration, then `streamlearn resume`, or start it again where it has ended"
        )
