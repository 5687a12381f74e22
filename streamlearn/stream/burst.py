"""Count the samples that are rejected in a row. A long row (a burst) means that the data has another schema than before.

Reading on would then move the whole topic to the dead letters.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

    from streamlearn.core.samples import Rejected
    from streamlearn.stream.logs.base import Record


class Burst:
    """The samples that were rejected in a row, up to the record read last, in all topics and partitions."""

    def __init__(self) -> None:
        self.length = 0  # samples
        self._reasons: Counter[str] = Counter()
        self._first_messages: dict[str, str] = {}  # by reason
        self._place = ""  # of the record that was read last

    def clear(self) -> None:
        """Set the count to zero."""
        if self.length:
            self.length = 0
            self._reasons.clear()
            self._first_messages.clear()

    def update(self, record: Record, is_rejected: np.ndarray, rejected: Mapping[int, Rejected], first: int) -> None:
        """Count the rejected samples of a record; a sample that is not rejected sets the count to zero.

        `is_rejected [n]` has a boolean for each sample, `rejected` has the reason by index. Samples before index `first` were
        counted earlier.
        """
        accepted = np.flatnonzero(~is_rejected[first:])
        if len(accepted):
            self.clear()
            first += int(accepted[-1]) + 1
        for index in range(first, len(is_rejected)):
            self._reasons[rejected[index].reason] += 1
            self._first_messages.setdefault(rejected[index].reason, str(rejected[index]))
        self.length += len(is_rejected) - first
        self._place = f"{record.topic}[{record.partition}] offset {record.offset}"

    def __str__(self) -> str:
        reason, _ = self._reasons.most_common(1)[0]
        message = self._first_messages[reason]
        return (
            f"{self._place}: {self.length} samples in a row were rejected, mostly {reason} ({message}); repair the producer "
            "or the configuration, then run `streamlearn resume`, or start the daemon again if it has ended"
        )
