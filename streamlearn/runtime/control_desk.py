"""The control desk: passes the commands of users to the loop, and shows them the daemon's state and status."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from streamlearn.control.api import COMMANDS
from streamlearn.core.errors import InputOutputError, StreamlearnError, TemporaryError, UsageError
from streamlearn.core.states import DaemonState, SaveTrigger
from streamlearn.core.tasks import TaskState
from streamlearn.runtime.divergence import Diverged
from streamlearn.runtime.status import status_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from streamlearn.config.root import Config
    from streamlearn.control.server import Server
    from streamlearn.metrics import Metrics
    from streamlearn.runtime.checkpointer import PendingSave
    from streamlearn.runtime.job import Job
    from streamlearn.stream.reader import StreamReader

logger = logging.getLogger(__name__)

PUBLISH_SECONDS = 0.1  # between two updates of the published status
PUBLISH_SHARE = 0.05  # the largest part of the loop's time for this: with thousands of tasks the updates are rarer
CONTACT_SECONDS = 30.0  # without contact to the broker before the daemon counts as not ready
COMMAND_SECONDS = 600.0  # the longest wait for a command's answer
LAST_LINE_SECONDS = 1.0  # to write the last log line of a process that ends without a checkpoint


@dataclass
class Request:
    """A command that waits for the loop, and the future of its answer."""

    name: str
    arguments: dict[str, Any]
    answer: Future[dict[str, Any]] = field(default_factory=Future)


class ControlDesk:
    """Passes commands from other threads to the loop; implements the loop's `Control` and the routes' `Backend`.

    Other threads put requests into a queue, and the loop executes them in order between two turns. So a request cannot undo
    an earlier one that was not executed yet. Only a stop is a flag: it is final, and its grace period starts with the call.
    """

    def __init__(self, config: Config, metrics: Metrics) -> None:
        self.config = config
        self.stopping = False
        self.paused = False  # only the loop writes it
        self.state = DaemonState.STARTING  # everything else reads the state here
        self.metrics = metrics
        self.servers: list[Server] = []
        self._requests: deque[Request] = deque()
        self._ended = False  # the loop executes no further request
        self._save_requests: list[tuple[Request, PendingSave]] = []
        self._task_end_requests: list[tuple[Request, int]] = []  # request and index of its task
        self._wake_event = threading.Event()
        self._wake_stream: Callable[[], None] = lambda: None
        self._status: dict[str, Any] = {"state": DaemonState.STARTING, "pid": os.getpid(), "name": config.name}
        self._checks: dict[str, Any] = {"restored": {"ok": False}}
        self._matrix: Callable[[], list[list[float | None]]] = list
        self._published = 0.0
        self._publish_interval = PUBLISH_SECONDS  # seconds
        self._last_turn = time.monotonic()
        self._on_ready: Callable[[], None] | None = None
        self.enter(DaemonState.STARTING)
        for command in COMMANDS:
            for result in ("success", "failure"):
                metrics.count("control_requests", 0, command, result)

    # -- called by the loop

    def serve(self, job: Job, stream: StreamReader, *, idle: bool) -> None:
        """Answer finished requests, execute the new ones, and publish the status if that is due.

        Raises `StreamlearnError` if a listener has ended, and `Diverged` if a command had to save and training has diverged.
        """
        self._last_turn = time.monotonic()
        self._wake_stream = stream.wake
        self._update_state()
        self._answer_saves()
        self._answer_task_ends(job, stream)
        while self._requests:
            self._apply(self._requests.popleft(), job, stream)
        if dead := [server for server in self.servers if not server.alive]:
            raise StreamlearnError(f"{len(dead)} of the HTTP listeners ended unexpectedly")
        if idle or time.monotonic() - self._published >= self._publish_interval:
            self.publish(job, stream)

    def enter(self, state: DaemonState) -> None:
        """Set a state in which the loop does not run, and record it: the daemon is not ready."""
        self.state = state
        self.metrics.record_state(state, ready=False)

    def heartbeat(self) -> None:
        """Report that the loop is alive although it waits."""
        self._last_turn = time.monotonic()

    def refuse_requests(self) -> None:
        """Refuse every waiting request and every later one, because the loop has ended."""
        self._ended = True
        self._answer_saves()
        for request, _ in self._task_end_requests:
            request.answer.set_exception(TemporaryError("the daemon is stopping, and the task has not ended"))
        self._task_end_requests.clear()
        while self._requests:
            with suppress(IndexError):  # another thread took it
                self._requests.popleft().answer.set_exception(TemporaryError("the daemon is stopping"))

    def wait(self, seconds: float) -> None:
        self._wake_event.wait(seconds)
        self._wake_event.clear()

    def publish(self, job: Job, stream: StreamReader) -> None:
        """Update status, readiness checks and gauges."""
        start = time.monotonic()
        self._checks = self._check(job, stream)
        ready = all(check["ok"] for check in self._checks.values())
        job.recorder.record_gauges(job, stream)
        self.metrics.record_state(self.state, ready=ready)
        self._status = {**status_of(job, stream, self.state), "ready": ready}
        self._matrix = job.matrix.matrix
        self._published = time.monotonic()
        self._publish_interval = max(PUBLISH_SECONDS, (self._published - start) / PUBLISH_SHARE)
        if ready and self._on_ready is not None:
            self._on_ready()
            self._on_ready = None

    def call_when_ready(self, call: Callable[[], None]) -> None:
        """Call a function once, when every readiness check passes for the first time."""
        self._on_ready = call

    def _apply(self, request: Request, job: Job, stream: StreamReader) -> None:
        """Execute a request.

        It is answered here, after `status` shows the change. Only a checkpoint and the end of a task are answered later, when
        the checkpoint is durable and the task has ended.
        """
        try:
            match request.name:
                case "checkpoint":
                    self._save(request, job, stream)
                    return
                case "end_task":
                    self._task_end_requests.append((request, self._end_task(job, stream)))
                    return
                case "pause":
                    self.paused = True
                    self._refuse_task_ends()
                case "resume":
                    self.paused = False
                    stream.resume_after_burst()
            self._update_state()
            self.publish(job, stream)
        except Diverged as error:  # found by the evaluation before a save
            request.answer.set_exception(error)
            raise
        except StreamlearnError as error:  # the request is refused, and the loop continues
            request.answer.set_exception(error)
            return
        request.answer.set_result({"state": self.state})

    def _save(self, request: Request, job: Job, stream: StreamReader) -> None:
        """Start a checkpoint, with the request's tag if it has one; raises `StreamlearnError` if the tag is taken."""
        tag = request.arguments.get("tag")
        if tag is not None:
            job.store.check_tag(tag)
            if any(other.arguments.get("tag") == tag for other, _ in self._save_requests):
                raise StreamlearnError(f"tag {tag}: the checkpoint that is being written has it")
        self._save_requests.append((request, job.save(stream, SaveTrigger.MANUAL, tag)))

    def _end_task(self, job: Job, stream: StreamReader) -> int:
        """End the open task where it was read up to; return its index. Raises `StreamlearnError` if no task can be ended."""
        task = job.progress.current
        if task is None or task.state != TaskState.ACTIVE:
            raise StreamlearnError("no task is open" if task is None else f"task {task.name} is already ending")
        if self.paused:
            raise StreamlearnError(
                f"learning is paused, so task {task.name} cannot end: use `streamlearn resume` first"
            )
        stream.end_task(task.name)
        return task.index

    def _answer_task_ends(self, job: Job, stream: StreamReader) -> None:
        """Answer the requests to end a task that has ended."""
        for request, index in list(self._task_end_requests):
            tasks = job.progress.tasks
            if index < len(tasks) and tasks[index].state == TaskState.ENDED:
                self._task_end_requests.remove((request, index))
                request.answer.set_result({"task": tasks[index].name, "state": TaskState.ENDED})
            elif index < len(tasks):
                stream.end_task(tasks[index].name)  # again, because a rollback starts a new reader

    def _refuse_task_ends(self) -> None:
        """Refuse the waiting requests to end a task: while learning is paused, it does not end."""
        for request, _ in self._task_end_requests:
            line = "learning was paused before the task ended: it ends after `streamlearn resume`"
            request.answer.set_exception(TemporaryError(line))
        self._task_end_requests.clear()

    def _answer_saves(self) -> None:
        """Answer the requests for a checkpoint that is durable or has failed."""
        for request, save in [pair for pair in self._save_requests if pair[1].finished]:
            self._save_requests.remove((request, save))
            tag = request.arguments.get("tag")
            if save.checkpoint is None:
                request.answer.set_exception(InputOutputError("the checkpoint could not be written; the log says why"))
            elif tag is not None and tag not in save.checkpoint.tags:
                line = f"{save.checkpoint.id} is saved, but without the tag {tag}: another checkpoint has it now"
                request.answer.set_exception(StreamlearnError(line))
            else:
                request.answer.set_result(save.checkpoint.summary())

    # -- called by signals and routes, from any other thread

    def stop(self) -> None:
        """Ask the loop to end after the current batch, and start its grace period."""
        if not self.stopping:
            self.stopping = True
            threading.Thread(target=self._enforce_grace_period, name="grace", daemon=True).start()
        self._wake()

    def status(self) -> dict[str, Any]:
        return {**self._status, "state": DaemonState.DRAINING} if self.stopping else self._status

    def matrix(self) -> list[list[float | None]]:
        return self._matrix()

    def liveness(self) -> tuple[bool, dict[str, Any]]:
        age = time.monotonic() - self._last_turn
        return age < self.config.service.liveness_timeout, {"seconds_since_last_turn": round(age, 3)}

    def readiness(self) -> tuple[bool, dict[str, Any]]:
        checks = {**self._checks, "not_draining": {"ok": not self.stopping}}
        return all(check["ok"] for check in checks.values()), checks

    def expose(self, accept: str) -> tuple[bytes, str]:
        return self.metrics.expose(accept)

    def command(self, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        result = "failure"
        try:
            answer = self._command(name, arguments)
            result = "success"
        finally:
            self.metrics.count("control_requests", 1, name, result)
        return answer

    def _command(self, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        accepted = {"tag": str} if name == "checkpoint" else {}
        for key, value in arguments.items():
            if not isinstance(value, accepted.get(key, ())):
                expected = "only the argument tag, a string" if accepted else "no arguments"
                raise UsageError(f"{name}: accepts {expected}, got {key}: {value!r:.80}")
        if name == "stop":
            self.stop()
            return {"state": DaemonState.DRAINING}
        request = Request(name, arguments)
        self._requests.append(request)
        if self._ended:
            self.refuse_requests()
        self._wake()
        try:
            return request.answer.result(timeout=COMMAND_SECONDS)
        except FutureTimeout as error:
            raise TemporaryError(f"{name}: no answer after {COMMAND_SECONDS:.0f} s") from error

    def _wake(self) -> None:
        self._wake_event.set()
        self._wake_stream()

    def _update_state(self) -> None:
        running = DaemonState.PAUSED if self.paused else DaemonState.RUNNING
        self.state = DaemonState.DRAINING if self.stopping else running

    def _check(self, job: Job, stream: StreamReader) -> dict[str, Any]:
        contact = stream.status.last_contact_monotonic
        silent_seconds = None if contact is None else time.monotonic() - contact
        return {
            "restored": {"ok": True},
            "broker": {
                "ok": stream.status.connected and silent_seconds is not None and silent_seconds < CONTACT_SECONDS
            },
            "stream": {"ok": stream.status.problem is None, "problem": stream.status.problem},
            "checkpoint": {"ok": job.checkpointer.failed_at is None},
            "not_draining": {"ok": not self.stopping},
        }

    def _enforce_grace_period(self) -> None:
        """End the process when the grace period is over, even if nobody reads the log and a write to it blocks."""
        time.sleep(self.config.shutdown_grace)
        line = "the stop took more than %.0f s (shutdown_grace): ending without a new checkpoint"
        log_line = threading.Thread(target=logger.error, args=(line, self.config.shutdown_grace), daemon=True)
        log_line.start()
        log_line.join(LAST_LINE_SECONDS)
        os._exit(1)
