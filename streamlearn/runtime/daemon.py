"""The daemon process: builds everything from a configuration, holds the lock, handles signals, and sets the exit code."""

from __future__ import annotations

import logging
import os
import platform
from contextlib import ExitStack, suppress
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from streamlearn import __version__
from streamlearn.checkpoint.store import Store
from streamlearn.control.api import control_app, read_only_app
from streamlearn.control.server import Server, bind_control, bind_tcp
from streamlearn.control.signals import call_on_stop, ignore_stop_signals
from streamlearn.control.statedir import Lock, locked, record_clean_end, record_process
from streamlearn.core.errors import (
    DataError,
    InputOutputError,
    StreamlearnError,
    is_out_of_memory,
)
from streamlearn.core.samples import Outcome
from streamlearn.core.states import DaemonState, SaveTrigger
from streamlearn.logs import format_outcomes
from streamlearn.metrics import Metrics
from streamlearn.runtime.control_desk import ControlDesk
from streamlearn.runtime.divergence import Diverged
from streamlearn.runtime.status import status_of
from streamlearn.runtime.stream import open_stream_reader

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from pathlib import Path

    from streamlearn.config.root import Config
    from streamlearn.runtime.job import Job
    from streamlearn.stream.reader import StreamReader

logger = logging.getLogger(__name__)


def run(
    config: Config,
    *,
    on_event: Callable[[dict[str, Any]], None] = lambda _: None,
    live_view: Callable[[ControlDesk], AbstractContextManager[None]] | None = None,
) -> None:
    """Run the daemon until it is stopped; returns after the last checkpoint is durable.

    `on_event` is called with `{"event": "running" | "ready", ...}`. `live_view` returns a context that is open while the loop
    runs. Raises `StreamlearnError`; its `exit_code` is that of the process.
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

        desk.enter(DaemonState.RESTORING)
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
            desk.enter(DaemonState.RESTORING)
            job = job.roll_back(diverged)
        try_record_clean_end(config.state_dir)
        ignore_stop_signals()


def learn_from(job: Job, desk: ControlDesk) -> Diverged | None:
    """Learn until a stop is requested or the stream is finished; return the error if training diverged, else None."""
    stream = open_stream_reader(job)
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

    Raises `TemporaryError` if there was no memory left, `InputOutputError` if the last checkpoint failed, `DataError` if every
    sample was rejected, and `Diverged` if training diverged.
    """
    from streamlearn.runtime import loop

    diverged = None
    try:
        loop.run(job, stream, desk)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        job.recorder.out_of_memory()
        raise StreamlearnError.from_out_of_memory(error) from error
    finally:
        desk.enter(DaemonState.DRAINING)
        desk.publish(job, stream)
        for _ in range(2):  # a second time, if a save that had already started has failed
            if job.progress.positions != job.checkpointer.snapshot_positions and job.may_be_saved:
                diverged = save_last(job, stream)
            job.checkpointer.wait(stream, desk.heartbeat)
        if missing := job.progress.unaccounted():
            logger.error("samples without an outcome: %s", missing)
        for line in format_outcomes(status_of(job, None, desk.state)["topics"]):
            logger.info("audit: %s", line)
        logger.info("stopped at step %d", job.learner.step, extra={"step": job.learner.step})
        desk.publish(job, stream)
    if diverged is not None:
        raise diverged
    if job.progress.positions != job.checkpointer.saved_positions:
        newest = job.checkpointer.newest
        last = newest.id if newest is not None else "the beginning"
        raise InputOutputError(f"the batches since {last} could not be saved, and will be learned again")
    totals = job.progress.totals()
    if stream.finished and totals[Outcome.REJECTED] and not totals[Outcome.TRAINED] + totals[Outcome.HELD_OUT]:
        raise DataError(
            f"nothing was learned: every sample was rejected ({totals['rejected']}); `streamlearn dlq list CONFIG` says why",
        )


def save_last(job: Job, stream: StreamReader) -> Diverged | None:
    """Save the last checkpoint; return the error if training diverged and nothing may be saved, else None."""
    try:
        job.save(stream, SaveTrigger.SHUTDOWN)
    except Diverged as error:
        logger.warning("%s: the batches since the last checkpoint are not saved", error)
        return error
    return None


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
    job.recorder.metrics.record_start(versions, model, job.started, cause)


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
