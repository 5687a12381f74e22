"""The daemon process: builds everything from a configuration, holds the lock, handles signals, and sets the exit code."""

from __future__ import annotations

import json
import logging
import os
import platform
import threading
import time
from collections import deque
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from streamlearn import __version__
from streamlearn.checkpoint.store import Store
from streamlearn.control.api import COMMANDS, control_app, read_only_app
from streamlearn.control.server import Server, bind_control, bind_tcp
from streamlearn.control.signals import call_on_stop, ignore_stop_signals
from streamlearn.control.statedir import Lock, locked, record_clean_end, record_process
from streamlearn.core.errors import (
    DataError,
    InputOutputError,
    StreamlearnError,
    TemporaryError,
    UsageError,
    is_out_of_memory,
)
from streamlearn.core.progress import Progress, format_outcomes
from streamlearn.core.samples import Outcome
from streamlearn.core.states import DaemonState, SaveTrigger
from streamlearn.core.tasks import TaskState
from streamlearn.metrics import Metrics

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from pathlib import Path

    from streamlearn.config.root import Config
    from streamlearn.runtime.job import Diverged, Job, PendingSave
    from streamlearn.stream.logs.base import LogReader, LogWriter
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
        metrics.record_state(DaemonState.STARTING, ready=False)
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
        job.state = self._state()
        self._answer_saves()
        self._answer_task_ends(job, stream)
        while self._requests:
            self._apply(self._requests.popleft(), job, stream)
        if dead := [server for server in self.servers if not server.alive]:
            raise StreamlearnError(f"{len(dead)} of the HTTP listeners ended unexpectedly")
        if idle or time.monotonic() - self._published >= self._publish_interval:
            self.publish(job, stream)

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
        job.record_gauges(stream)
        self.metrics.record_state(job.state, ready=ready)
        self._status = {**job.status(stream), "ready": ready}
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
            job.state = self._state()
            self.publish(job, stream)
        except StreamlearnError as error:  # the request is refused, and the loop continues
            request.answer.set_exception(error)
            if job.mid_delivery:  # saving has found that training diverged
                raise
            return
        request.answer.set_result({"state": job.state})

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
            return {"state": self._state()}
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

    def _state(self) -> DaemonState:
        if self.stopping:
            return DaemonState.DRAINING
        return DaemonState.PAUSED if self.paused else DaemonState.RUNNING

    def _check(self, job: Job, stream: StreamReader) -> dict[str, Any]:
        contact = stream.status.last_contact_monotonic
        silent_seconds = None if contact is None else time.monotonic() - contact
        return {
            "restored": {"ok": True},
            "broker": {
                "ok": stream.status.connected and silent_seconds is not None and silent_seconds < CONTACT_SECONDS
            },
            "stream": {"ok": stream.status.problem is None, "problem": stream.status.problem},
            "checkpoint": {"ok": job.save_failed is None},
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


def run(
    config: Config,
    *,
    on_event: Callable[[dict[str, Any]], None] = lambda _: None,
    live_view: Callable[[ControlDesk], AbstractContextManager[None]] | None = None,
) -> None:
    """Run the daemon until it is stopped; returns after the last checkpoint is durable.

    `on_event` is called with `{"event": "running" | "ready", ...}`. `live_view` returns a context that is open while the loop
    runs. Raises `StreamlearnError`; its code is the exit code of the process.
    """
    metrics = Metrics()
    desk = ControlDesk(config, metrics)
    with ExitStack() as stack:
        lock = stack.enter_context(locked(config.state_dir))
        call_on_stop(desk.stop)
        listener = bind_tcp(config.service.host, config.service.port)
        socket_, path = bind_control(config.state_dir)
        stack.callback(remove_socket, path, lock)
        host, port = listener.getsockname()[:2]
        desk.servers = [Server(read_only_app(desk), listener, "http"), Server(control_app(desk), socket_, "control")]
        for server in desk.servers:
            server.start()
            stack.callback(server.stop)
        http = f"http://{host}:{port}"
        cause = record_process(config.state_dir, {"socket": str(path), "http": http, "version": __version__})

        # torch is imported only here, so that a held lock or a busy port is reported at once
        from streamlearn.learning.tensors import configure_torch

        configure_torch(config.threads)
        from streamlearn.runtime.job import Job

        metrics.record_state(DaemonState.RESTORING, ready=False)
        spec = config.checkpoint
        store = Store(
            config.state_dir, keep=spec.keep, hourly=spec.hourly, task_ends=spec.task_ends, before_write=lock.check
        )
        job = Job.make(config, store, metrics)
        job.restore()
        record_versions(job, cause)
        desk.call_when_ready(lambda: on_event({"event": "ready", "pid": os.getpid(), "http": http}))
        on_event({"event": "running", "pid": os.getpid(), "http": http})
        logger.info("learning from %s on %s; metrics on %s/metrics", config.source, job.learner.context.device, http)
        if live_view is not None:
            stack.enter_context(live_view(desk))
        stack.callback(desk.refuse_requests)
        while (diverged := learn_from(job, desk)) is not None:
            metrics.record_state(DaemonState.RESTORING, ready=False)
            job = job.roll_back(diverged)
        try_record_clean_end(config.state_dir)
        ignore_stop_signals()


def learn_from(job: Job, desk: ControlDesk) -> Diverged | None:
    """Learn until a stop is requested or the stream is finished; return the error if training diverged, else None."""
    from streamlearn.runtime.job import Diverged

    stream = make_stream_reader(job)
    stream.start()
    try:
        learn(job, stream, desk)
    except Diverged as error:
        return error
    finally:
        stream.stop()
    return None


def learn(job: Job, stream: StreamReader, desk: ControlDesk) -> None:
    """Run the loop; at its end save what was learned, whatever the reason, and check the outcome of every sample.

    Raises `TemporaryError` if there was no memory left, 74 if the last checkpoint failed, 65 if every sample was
    rejected; and `Diverged`.
    """
    from streamlearn.runtime import loop

    diverged = None
    try:
        loop.run(job, stream, desk)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        job.metrics.count("out_of_memory", 1)
        raise StreamlearnError.from_out_of_memory(error) from error
    finally:
        job.state = DaemonState.DRAINING
        desk.publish(job, stream)
        for _ in range(2):  # a second time, if a save that had already started has failed
            if job.progress.positions != job.snapshot_positions and not job.mid_delivery:
                diverged = save_last(job, stream)
            job.wait_for_saves(stream, desk.heartbeat)
        if missing := job.progress.unaccounted():
            logger.error("samples without an outcome: %s", missing)
        for line in format_outcomes(job.status(None)["topics"]):
            logger.info("audit: %s", line)
        logger.info("stopped at step %d", job.learner.step, extra={"step": job.learner.step})
        desk.publish(job, stream)
    if diverged is not None:
        raise diverged
    if job.progress.positions != job.saved_positions:
        last = job.checkpoint.id if job.checkpoint is not None else "the beginning"
        raise InputOutputError(f"the batches since {last} could not be saved, and will be learned again")
    totals = job.progress.totals()
    if stream.finished and totals[Outcome.REJECTED] and not totals[Outcome.TRAINED] + totals[Outcome.HELD_OUT]:
        raise DataError(
            f"nothing was learned: every sample was rejected ({totals['rejected']}); `streamlearn dlq list CONFIG` says why",
        )


def save_last(job: Job, stream: StreamReader) -> Diverged | None:
    """Save the last checkpoint; return the error if training diverged and nothing may be saved, else None."""
    from streamlearn.runtime.job import Diverged

    try:
        job.save(stream, SaveTrigger.SHUTDOWN)
    except Diverged as error:
        logger.warning("%s: the batches since the last checkpoint are not saved", error)
        return error
    return None


def make_stream_reader(job: Job) -> StreamReader:
    """Return a reader of the job's stream, from its positions on. The reader gets a copy of the progress."""
    from streamlearn.stream.assembler import Assembler, AssemblerSettings
    from streamlearn.stream.deadletter import DeadLetterWriter
    from streamlearn.stream.decoder import RecordDecoder
    from streamlearn.stream.holdout import HoldOut
    from streamlearn.stream.reader import StreamReader

    config = job.config
    reader, writer = open_reader_and_writer(config)
    dead_letters = DeadLetterWriter(writer, config.dead_letter_topic)
    spec = config.stream
    decoder = RecordDecoder.from_config(config.input, config.stream, job.progress.codec_version)
    settings = AssemblerSettings(
        decoder, HoldOut(config.holdout.by, config.holdout.fraction), job.scenario, dead_letters,
        spec.batch_size, spec.task_end.records, spec.late == "dead_letter",
    )  # fmt: skip
    copied = Progress.from_json(json.loads(json.dumps(job.progress.to_json())), job.progress.positions)
    refresh = config.kafka.metadata_refresh_seconds if config.kafka is not None else 1.0
    job.metrics.declare_topics(spec.topics or [])
    for key in ("dead letters", "dead letter failures"):  # the new dead-letter writer counts from 0
        job.metrics.set_baseline(key, 0)
    return StreamReader(reader, Assembler(settings, copied), spec, dead_letters, config.group_id, refresh)


def open_reader_and_writer(config: Config) -> tuple[LogReader, LogWriter]:
    """Return a reader and a writer of the configured source. Kafka is not contacted yet."""
    if config.source == "kafka":
        from streamlearn.stream.logs.kafka import KafkaReader
        from streamlearn.stream.logs.kafka_writer import KafkaWriter

        assert config.kafka is not None
        return KafkaReader(config.kafka, config.group_id, config.stream.max_record_bytes), KafkaWriter(config.kafka)
    from streamlearn.stream.logs.sqlite import EmbeddedReader, EmbeddedWriter

    return EmbeddedReader(config.embedded.path), EmbeddedWriter(config.embedded.path)


def record_versions(job: Job, cause: str) -> None:
    """Record the versions and the configuration in the metrics."""
    versions = {
        "version": __version__,
        "python_version": platform.python_version(),
        "torch_version": version("torch"),
        "kafka_client_version": version("kafka-python"),
    }
    model = {
        "name": job.config.name,
        "model": job.config.model.name,
        "strategy": " + ".join(job.config.strategy),
        "config_sha256": job.config.digest(),
    }
    job.metrics.record_start(versions, model, job.started, cause)


def remove_socket(path: Path, lock: Lock) -> None:
    """Remove the control socket, unless the lock is lost: another daemon may have bound it then."""
    with suppress(StreamlearnError, OSError):
        lock.check()
        path.unlink()


def try_record_clean_end(state_dir: Path) -> None:
    """Record that this process ended cleanly; an error, such as a full disk, is only logged."""
    try:
        record_clean_end(state_dir)
    except StreamlearnError as error:
        logger.warning("the next start will count this stop as a crash: %s", error)
