"""The process: composes everything from a configuration, owns the lock, answers signals, and ends with an exit code."""

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
from streamlearn.checkpoint import Store
from streamlearn.data import Progress, StreamlearnError, format_outcomes, is_out_of_memory
from streamlearn.metrics import Metrics
from streamlearn.service.api import COMMANDS, control_app, read_only_app
from streamlearn.service.server import Server, bind_control, bind_tcp
from streamlearn.service.signals import call_on_stop, ignore_stop_signals
from streamlearn.service.statedir import Lock, locked, record_clean_end, record_process

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from pathlib import Path

    from streamlearn.config import Config
    from streamlearn.job import Diverged, Job, PendingSave
    from streamlearn.stream.log import Log, Sink
    from streamlearn.stream.reader import Stream

logger = logging.getLogger(__name__)

PUBLISH_SECONDS = 0.1
PUBLISH_SHARE = 0.05  # of the loop's time at most: with thousands of tasks the status is made less often
CONTACT_SECONDS = 30.0
COMMAND_SECONDS = 600.0
LAST_LINE_SECONDS = 1.0  # for the line that says why a process ends without a checkpoint


@dataclass
class Request:
    """A command that waits for the loop, and the place for its answer."""

    name: str
    arguments: dict[str, Any]
    answer: Future[dict[str, Any]] = field(default_factory=Future)


class ControlDesk:
    """Where people's requests and the loop meet: the loop's `Control`, and the routes' `Backend`.

    Other threads put requests into a queue. The loop applies them in order between two turns, so no request can undo
    another one that was not applied yet. Only a stop is a flag: it cannot be taken back, and its grace period runs from
    the moment of the call.
    """

    def __init__(self, config: Config, metrics: Metrics) -> None:
        self.config = config
        self.stopping = False
        self.paused = False  # written by the loop alone
        self.metrics = metrics
        self.servers: list[Server] = []
        self._requests: deque[Request] = deque()
        self._ended = False  # the loop will apply no further request
        self._save_requests: list[tuple[Request, PendingSave]] = []
        self._task_end_requests: list[tuple[Request, int]] = []  # and the task's index
        self._wake_event = threading.Event()
        self._wake_stream: Callable[[], None] = lambda: None
        self._status: dict[str, Any] = {"state": "starting", "pid": os.getpid(), "name": config.name}
        self._checks: dict[str, Any] = {"restored": {"ok": False}}
        self._matrix: Callable[[], list[list[float | None]]] = list
        self._published = 0.0
        self._publish_interval = PUBLISH_SECONDS  # until the next time
        self._last_turn = time.monotonic()
        self._on_ready: Callable[[], None] | None = None
        metrics.record_state("starting", ready=False)
        for command in COMMANDS:
            for result in ("success", "failure"):
                metrics.count("control_requests", 0, command, result)

    # -- for the loop

    def serve(self, job: Job, stream: Stream, *, idle: bool) -> None:
        self._last_turn = time.monotonic()
        self._wake_stream = stream.wake
        job.state = self._state()
        self._answer_saves()
        self._answer_task_ends(job, stream)
        while self._requests:
            self._apply(self._requests.popleft(), job, stream)
        if dead := [server for server in self.servers if not server.alive]:
            raise StreamlearnError(f"{len(dead)} of the listeners ended by itself")
        if idle or time.monotonic() - self._published >= self._publish_interval:
            self.publish(job, stream)

    def heartbeat(self) -> None:
        """Show that the loop goes on, though it waits."""
        self._last_turn = time.monotonic()

    def refuse_requests(self) -> None:
        """Refuse the requests that came too late, now and from now on."""
        self._ended = True
        self._answer_saves()
        for request, _ in self._task_end_requests:
            request.answer.set_exception(StreamlearnError("the daemon is ending, and the task has not ended", code=75))
        self._task_end_requests.clear()
        while self._requests:
            with suppress(IndexError):  # another thread was faster
                self._requests.popleft().answer.set_exception(StreamlearnError("the daemon is ending", code=75))

    def wait(self, seconds: float) -> None:
        self._wake_event.wait(seconds)
        self._wake_event.clear()

    def publish(self, job: Job, stream: Stream) -> None:
        """Show where the job stands."""
        begun = time.monotonic()
        self._checks = self._check(job, stream)
        ready = all(check["ok"] for check in self._checks.values())
        job.record_gauges(stream)
        self.metrics.record_state(job.state, ready=ready)
        self._status = {**job.status(stream), "ready": ready}
        self._matrix = job.matrix.matrix
        self._published = time.monotonic()
        self._publish_interval = max(PUBLISH_SECONDS, (self._published - begun) / PUBLISH_SHARE)
        if ready and self._on_ready is not None:
            self._on_ready()
            self._on_ready = None

    def call_when_ready(self, call: Callable[[], None]) -> None:
        """Have something called once, when every readiness condition first holds."""
        self._on_ready = call

    def _apply(self, request: Request, job: Job, stream: Stream) -> None:
        """Do what a request asks. The answer comes when a checkpoint is durable, or else when `status` shows the change."""
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
                    stream.acknowledge()
            job.state = self._state()
            self.publish(job, stream)
        except StreamlearnError as error:  # refused; the loop goes on
            request.answer.set_exception(error)
            if job.mid_delivery:  # it has diverged, which was seen when it should be saved
                raise
            return
        request.answer.set_result({"state": job.state})

    def _save(self, request: Request, job: Job, stream: Stream) -> None:
        """Begin a checkpoint, with a tag where the request names one; raises `StreamlearnError` where that is taken."""
        tag = request.arguments.get("tag")
        if tag is not None:
            job.store.check_tag(tag)
            if any(other.arguments.get("tag") == tag for other, _ in self._save_requests):
                raise StreamlearnError(f"tag {tag}: a checkpoint that is being written has it")
        self._save_requests.append((request, job.save(stream, "manual", tag)))

    def _end_task(self, job: Job, stream: Stream) -> int:
        """Have the open task end where it was read up to; return its index."""
        task = job.progress.current
        if task is None or task.state != "active":
            raise StreamlearnError("no task is open" if task is None else f"task {task.name} is ending already")
        if self.paused:
            raise StreamlearnError(f"learning is paused, and so task {task.name} cannot end: resume first")
        stream.end_task(task.name)
        return task.index

    def _answer_task_ends(self, job: Job, stream: Stream) -> None:
        """Answer those who asked for a task's end, once it has ended."""
        for request, index in list(self._task_end_requests):
            tasks = job.progress.tasks
            if index < len(tasks) and tasks[index].state == "ended":
                self._task_end_requests.remove((request, index))
                request.answer.set_result({"task": tasks[index].name, "state": "ended"})
            elif index < len(tasks):
                stream.end_task(tasks[index].name)  # another stream may have begun, after a rollback

    def _refuse_task_ends(self) -> None:
        """Answer those who wait for a task's end: while learning is paused, it does not come."""
        for request, _ in self._task_end_requests:
            line = "learning was paused before the task had ended: it ends after `streamlearn resume`"
            request.answer.set_exception(StreamlearnError(line, code=75))
        self._task_end_requests.clear()

    def _answer_saves(self) -> None:
        """Answer those who asked for a checkpoint, once it is durable or could not be written."""
        for request, saving in [pair for pair in self._save_requests if pair[1].finished]:
            self._save_requests.remove((request, saving))
            tag = request.arguments.get("tag")
            if saving.checkpoint is None:
                request.answer.set_exception(
                    StreamlearnError("the checkpoint could not be written; the log says why", code=74)
                )
            elif tag is not None and tag not in saving.checkpoint.tags:
                line = (
                    f"{saving.checkpoint.id} is saved, but without the tag {tag}: another checkpoint got it meanwhile"
                )
                request.answer.set_exception(StreamlearnError(line))
            else:
                request.answer.set_result(saving.checkpoint.summary())

    # -- for signals and routes, from any thread but the loop's

    def stop(self) -> None:
        """Have the loop end after the batch it is at, and hold it to its grace period."""
        if not self.stopping:
            self.stopping = True
            threading.Thread(target=self._enforce_grace_period, name="grace", daemon=True).start()
        self._wake()

    def status(self) -> dict[str, Any]:
        return {**self._status, "state": "draining"} if self.stopping else self._status

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
                what = "one argument, tag, a string" if accepted else "no arguments"
                raise StreamlearnError(f"{name}: takes {what}, got {key}: {value!r:.80}", code=2)
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
            raise StreamlearnError(f"{name}: not done after {COMMAND_SECONDS:.0f} s", code=75) from error

    def _wake(self) -> None:
        self._wake_event.set()
        self._wake_stream()

    def _state(self) -> str:
        return "draining" if self.stopping else "paused" if self.paused else "running"

    def _check(self, job: Job, stream: Stream) -> dict[str, Any]:
        contact = stream.status.contacted
        silent = None if contact is None else time.monotonic() - contact
        return {
            "restored": {"ok": True},
            "broker": {"ok": stream.status.connected and silent is not None and silent < CONTACT_SECONDS},
            "stream": {"ok": stream.status.problem is None, "problem": stream.status.problem},
            "checkpoint": {"ok": job.save_failed is None},
            "not_draining": {"ok": not self.stopping},
        }

    def _enforce_grace_period(self) -> None:
        """End the process when the grace period is over, even where the log's reader takes no further line."""
        time.sleep(self.config.shutdown_grace)
        line = "still not drained after %.0f s (shutdown_grace): ending without a new checkpoint"
        writing = threading.Thread(target=logger.error, args=(line, self.config.shutdown_grace), daemon=True)
        writing.start()
        writing.join(LAST_LINE_SECONDS)
        os._exit(1)


def run(
    config: Config,
    *,
    on_event: Callable[[dict[str, Any]], None] = lambda _: None,
    live_view: Callable[[ControlDesk], AbstractContextManager[None]] | None = None,
) -> None:
    """Learn until stopped; returns after the last checkpoint is durable.

    `on_event` is called with `{"event": "running" | "ready", ...}`; `live_view` makes a context in which the loop runs.
    Raises `StreamlearnError` whose code is the process's exit code.
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

        # torch is imported only now: lock, ports and sockets are quick to refuse
        from streamlearn.tensors import configure_torch

        configure_torch(config.threads)
        from streamlearn.job import Job

        metrics.record_state("restoring", ready=False)
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
            metrics.record_state("restoring", ready=False)
            job = job.roll_back(diverged)
        try_record_clean_end(config.state_dir)
        ignore_stop_signals()


def learn_from(job: Job, desk: ControlDesk) -> Diverged | None:
    """Learn from where a job stands until it is told to stop; return what it diverged with, where it did."""
    from streamlearn.job import Diverged

    stream = make_stream_reader(job)
    stream.start()
    try:
        learn(job, stream, desk)
    except Diverged as error:
        return error
    finally:
        stream.stop()
    return None


def learn(job: Job, stream: Stream, desk: ControlDesk) -> None:
    """Run the loop; save what was learned however it ends, and check that every sample is accounted for."""
    from streamlearn import loop

    diverged = None
    try:
        loop.run(job, stream, desk)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        job.metrics.count("out_of_memory", 1)
        raise StreamlearnError.from_out_of_memory(error) from error
    finally:
        job.state = "draining"
        desk.publish(job, stream)
        for _ in range(2):  # again, where what was being written already could not be saved
            if job.progress.positions != job.snapshot_positions and not job.mid_delivery:
                diverged = save_last(job, stream)
            job.wait_for_saves(stream, desk.heartbeat)
        if missing := job.progress.unaccounted():
            logger.error("samples unaccounted for: %s", missing)
        for line in format_outcomes(job.status(None)["topics"]):
            logger.info("audit: %s", line)
        logger.info("stopped at step %d", job.learner.step, extra={"step": job.learner.step})
        desk.publish(job, stream)
    if diverged is not None:
        raise diverged
    if job.progress.positions != job.saved_positions:
        last = job.checkpoint.id if job.checkpoint is not None else "the beginning"
        raise StreamlearnError(f"what was learned since {last} could not be saved, and will be learned again", code=74)
    totals = job.progress.totals()
    if stream.finished and totals["rejected"] and not totals["trained"] + totals["held_out"]:
        raise StreamlearnError(
            f"nothing was learned: every sample was rejected ({totals['rejected']}); `streamlearn dlq list CONFIG` says why",
            code=65,
        )


def save_last(job: Job, stream: Stream) -> Diverged | None:
    """Save what was learned up to the end; return the divergence that forbids it, where there is one."""
    from streamlearn.job import Diverged

    try:
        job.save(stream, "shutdown")
    except Diverged as error:
        logger.warning("%s: what was learned since the last checkpoint is not saved", error)
        return error
    return None


def make_stream_reader(job: Job) -> Stream:
    """Return the stream that a job reads, from where it stands; the reader gets a copy of the progress."""
    from streamlearn.stream.assembler import Assembler, Rules
    from streamlearn.stream.codec import Codec
    from streamlearn.stream.deadletter import DeadLetterWriter
    from streamlearn.stream.holdout import HoldOut
    from streamlearn.stream.reader import Stream

    config = job.config
    source, sink = open_log(config)
    dead_letters = DeadLetterWriter(sink, config.dead_letter_topic)
    spec = config.stream
    codec = Codec.from_config(config, job.progress.codec_version)
    rules = Rules(
        codec, HoldOut(config.holdout.by, config.holdout.fraction), job.scenario, dead_letters,
        spec.batch_size, spec.task_end.records, spec.late == "dead_letter",
    )  # fmt: skip
    copied = Progress.from_json(json.loads(json.dumps(job.progress.to_json())), job.progress.positions)
    refresh = config.kafka.metadata_refresh_seconds if config.kafka is not None else 1.0
    job.metrics.declare_topics(spec.topics or [])
    for key in ("dead letters", "dead letter failures"):  # these dead letters have sent none yet
        job.metrics.set_baseline(key, 0)
    return Stream(source, Assembler(rules, copied), spec, dead_letters, config.group_id, refresh)


def open_log(config: Config) -> tuple[Log, Sink]:
    """Return reader and writer of the configured source; Kafka is contacted later, by the reader."""
    if config.source == "kafka":
        from streamlearn.stream.kafka import KafkaLog, KafkaSink

        assert config.kafka is not None
        return KafkaLog(config.kafka, config.group_id, config.stream.max_record_bytes), KafkaSink(config.kafka)
    from streamlearn.stream.embedded import EmbeddedLog, EmbeddedSink

    return EmbeddedLog(config.embedded.path), EmbeddedSink(config.embedded.path)


def record_versions(job: Job, cause: str) -> None:
    """Show versions and configuration in the metrics."""
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
    """Remove the control socket, unless another daemon may have bound it: then it is not ours any more."""
    with suppress(StreamlearnError, OSError):
        lock.check()
        path.unlink()


def try_record_clean_end(state_dir: Path) -> None:
    """Note that this process ended as it should; a full disk costs only the note."""
    try:
        record_clean_end(state_dir)
    except StreamlearnError as error:
        logger.warning("this stop will be taken for a crash: %s", error)
