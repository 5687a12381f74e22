"""The stream reader: a thread that reads a log, connects again after each outage, and fills a bounded queue."""

from __future__ import annotations

import contextlib
import logging
import random
import sys
import threading
import time
from typing import TYPE_CHECKING

from streamlearn.core.errors import AccessError, StreamlearnError
from streamlearn.stream.logs.base import BrokerUnavailable, Unreadable
from streamlearn.stream.poller import POLL_SECONDS, Poller
from streamlearn.stream.queue import DeliveryQueue
from streamlearn.stream.status import StreamStatus

if TYPE_CHECKING:
    from collections import Counter

    from streamlearn.core.deliveries import Delivery
    from streamlearn.core.positions import Partition, Positions
    from streamlearn.stream.assembler import Assembler
    from streamlearn.stream.config import StreamConfig
    from streamlearn.stream.deadletter import DeadLetterWriter
    from streamlearn.stream.logs.base import LogReader

logger = logging.getLogger(__name__)

MAX_BACKOFF = 30.0
STABLE_SECONDS = 5.0  # a connection that was open this long, or that returned a record, was a good one
SWITCH_INTERVAL = 0.0005  # seconds: the longest time that the learner's thread waits for this thread to release the GIL


class StreamReader:
    """Reads a log in a thread of its own, and hands deliveries to the loop, in order.

    The methods under "for the loop" may be called from the loop's thread; everything else runs in the reader thread.
    """

    def __init__(
        self,
        log_reader: LogReader,
        assembler: Assembler,
        config: StreamConfig,
        dead_letters: DeadLetterWriter,
        group: str,
        refresh_seconds: float = 10.0,
    ) -> None:
        self.log_reader = log_reader
        self.assembler = assembler
        self.dead_letters = dead_letters
        self.group = group
        self.startup_timeout = config.startup_timeout
        self.status = StreamStatus()
        self.queue = DeliveryQueue(config.queue)
        self.poller = Poller(log_reader, assembler, config, dead_letters, self.queue, self.status, refresh_seconds)
        self._thread = threading.Thread(target=self._run, name="reader", daemon=True)
        self._stopping = threading.Event()
        self._burst_resumed = threading.Event()
        self._lock = threading.Lock()  # of the requests below
        self._commits: dict[Partition, int] = {}  # offsets to commit
        self._task_to_end: str | None = None  # the topic of the task that `end_task` must end

    # -- for the loop

    def start(self) -> None:
        """Start the reader thread."""
        sys.setswitchinterval(SWITCH_INTERVAL)
        self._thread.start()

    def next_delivery(self, timeout: float) -> Delivery | None:
        """Return the next delivery, or None after `timeout` seconds or a call of `wake`; raises the reader thread's error."""
        return self.queue.get(timeout)

    @property
    def finished(self) -> bool:
        """Whether no delivery is left, and there will be no further one."""
        return self.queue.finished

    def wake(self) -> None:
        """Make the waiting call of `next_delivery`, or else the next call, return at once."""
        self.queue.wake()

    def flush_dead_letters(self) -> None:
        """Wait until all dead letters are acknowledged. A checkpoint may begin only after that."""
        try:
            self.dead_letters.flush()
        except AccessError as error:
            self.queue.fail(error)  # trying again cannot help: the loop gets the error after the queued deliveries
            raise

    def resume_after_burst(self) -> None:
        """Continue reading if a burst of rejected samples has stopped it, and set the count of rejects to zero."""
        if self.status.stopped_by_burst:
            self._burst_resumed.set()

    def end_task(self, topic: str) -> None:
        """End the task of this topic at the positions up to which it was read. A repeated call changes nothing."""
        with self._lock:
            self._task_to_end = topic

    def commit_positions(self, positions: Positions) -> None:
        """Let the reader thread commit these positions to the log soon, for lag graphs."""
        with self._lock:
            self._commits = {partition: position.offset for partition, position in positions.by_partition.items()}

    @property
    def queued_samples(self) -> Counter[str]:
        """The number of samples, by topic, that were read and are in no returned delivery yet."""
        return self.queue.queued_samples

    def stop(self) -> None:
        """Stop the reader thread and close the log."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout=15)

    @property
    def alive(self) -> bool:
        """Whether the reader thread runs."""
        return self._thread.is_alive()

    # -- the reader thread

    def _run(self) -> None:
        try:
            self._read_until_stopped()
        except BaseException as error:  # noqa: BLE001 - the loop raises it, because a thread has no caller
            self.status.problem = str(error)
            self.queue.fail(error)
        finally:
            try:
                with contextlib.suppress(StreamlearnError):  # a failed commit is no reason for an error
                    if self.status.connected and self._commits:
                        self._send_commits()
                        self.log_reader.poll(POLL_SECONDS)  # the client sends commits only while it polls
                self.log_reader.close()
            except Exception as error:  # noqa: BLE001 - it must not hide the error with which the thread ended
                logger.warning("closing the log failed: %s", error)

    def _read_until_stopped(self) -> None:
        """Connect, read, and connect again after each outage."""
        backoff, since, last = 1.0, time.monotonic(), ""
        while not self._stopping.is_set():
            connected: float | None = None
            try:
                self.log_reader.connect()
                self.assembler.cluster_id = self.log_reader.cluster_id
                self.dead_letters.prepare()
                self.poller.start_at_positions()
                connected = time.monotonic()
                while not self._stopping.is_set():
                    self._read_once()
                    since = time.monotonic()
            except BrokerUnavailable as error:
                stable = self._was_stable(connected)
                if self.status.last_contact is None or (self.status.connected and (stable or str(error) != last)):
                    logger.warning("%s; waiting for it", error)
                self.status.connected = False
                self.status.end_offsets = {}
                self.status.problem = last = str(error)
                limit = self.startup_timeout
                if limit is not None and self.status.last_contact is None and time.monotonic() - since > limit:
                    raise
                if stable:
                    backoff = 1.0
            except Unreadable as error:
                if self.poller.skip_damaged_batch(error):
                    continue
                if str(error) != last:
                    logger.error("%s; reading has stopped, and is tried again from time to time", error)  # noqa: TRY400 - no traceback
                    backoff = 1.0
                self.status.problem = last = str(error)
            jitter = random.SystemRandom().uniform(0.5, 1.0)  # the global generator belongs to the learner
            self._stopping.wait(backoff * jitter)
            backoff = min(2 * backoff, MAX_BACKOFF)

    def _was_stable(self, connected: float | None) -> bool:
        """Return whether the connection made at this time was of use, so that its end is the beginning of a new outage."""
        if connected is None:
            return False
        polled = self.poller.last_polled
        return (polled is not None and polled > connected) or time.monotonic() - connected > STABLE_SECONDS

    def _read_once(self) -> None:
        """Handle the requests of other threads, check the log if it is time, and poll once."""
        if self._burst_resumed.is_set():
            self._burst_resumed.clear()
            self.poller.continue_after_burst()
        self.poller.check_log_if_due()
        self._send_commits()
        with self._lock:
            topic, self._task_to_end = self._task_to_end, None
        if topic is not None:
            self.poller.end_task_now(topic)
        if self.status.problem is not None:
            self._stopping.wait(POLL_SECONDS)
            return
        self.poller.poll_and_feed()

    def _send_commits(self) -> None:
        with self._lock:
            commits, self._commits = self._commits, {}
        if commits:
            try:
                self.log_reader.commit(self.group, commits)
            except StreamlearnError as error:
                logger.warning("positions could not be committed: %s", error)
