"""The bounded queue of deliveries between the reader thread and the loop."""

from __future__ import annotations

import threading
from collections import Counter, deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from streamlearn.core.deliveries import Delivery
    from streamlearn.stream.config import QueueConfig


class DeliveryQueue:
    """Passes deliveries, errors and the numbers of waiting samples from the reader thread to the loop, under one lock.

    The reader thread calls `put`, `publish_undelivered` and `is_full`; any thread may call the other methods.
    """

    def __init__(self, limits: QueueConfig) -> None:
        self.limits = limits
        self.finished = False  # no delivery is left, and there will be no further one
        self.exhausted = False  # no further task will begin; the reader thread sets it
        self._deliveries: deque[Delivery] = deque()
        self._num_samples: Counter[str] = Counter()  # in the queue, by topic
        self._num_bytes = 0
        self._undelivered: Counter[str] = Counter()  # samples that were read and are in no delivery yet, by topic
        self._error: BaseException | None = None
        self._woken = False
        self._changed = threading.Condition(threading.Lock())  # a new delivery, an error, or a call of `wake`

    def put(self, delivery: Delivery, undelivered: Counter[str]) -> None:
        """Append a delivery; `undelivered` are the samples, by topic, that were read and are in no delivery yet."""
        with self._changed:
            self._num_samples += delivery.observations.consumed
            self._num_bytes += _num_bytes(delivery)
            self._undelivered = undelivered
            self._deliveries.append(delivery)
            self._changed.notify()

    def publish_undelivered(self, undelivered: Counter[str]) -> None:
        """Publish the number of samples, by topic, that were read and are in no delivery yet."""
        with self._changed:
            self._undelivered = undelivered

    def is_full(self, *, was_full: bool) -> bool:
        """Return whether the queue is full; after it `was_full`, it counts as full until it is half empty."""
        num_samples, max_bytes = self._num_samples.total(), self.limits.megabytes * 1e6
        fill = max(num_samples / self.limits.samples, self._num_bytes / max_bytes)
        return fill >= 1 or (was_full and fill >= 0.5)

    def fail(self, error: BaseException) -> None:
        """Let `get` raise this error after the deliveries that are in the queue."""
        with self._changed:
            self._error = error
            self._changed.notify()

    def get(self, timeout: float) -> Delivery | None:
        """Return the next delivery, or None after `timeout` seconds or a call of `wake`; raises the reader thread's error.

        The main thread waits here, so a signal handler can run meanwhile. This is why a `Condition` is used: in CPython 3.11
        and 3.12, `SimpleQueue.get` waits for ever if a signal handler returns after the deadline.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._deliveries or self._error or self._woken, timeout)
            woken, self._woken = self._woken, False
            if self._deliveries:
                delivery = self._deliveries.popleft()
                self._num_samples -= delivery.observations.consumed
                self._num_bytes -= _num_bytes(delivery)
                return delivery
            if self._error is not None:
                raise self._error
            self.finished = self.exhausted and not woken
        return None

    def wake(self) -> None:
        """Make the waiting call of `get`, or else the next call, return at once."""
        with self._changed:
            self._woken = True
            self._changed.notify()

    @property
    def queued_samples(self) -> Counter[str]:
        """The number of samples, by topic, that were read and are in no returned delivery yet."""
        with self._changed:
            return self._num_samples + self._undelivered


def _num_bytes(delivery: Delivery) -> int:
    """Return the size of a delivery's samples in bytes."""
    held_out = sum(part.x.nbytes for part in delivery.observations.held_out)
    return held_out + (delivery.batch.x.nbytes if delivery.batch is not None else 0)
