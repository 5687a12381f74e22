"""The control desk: commands are executed in the order in which they arrive, and each gets an answer."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import pytest

from streamlearn.checkpoint.store import Store
from streamlearn.cli.lifecycle import why_not_ready
from streamlearn.control.api import control_app
from streamlearn.control.server import Server, bind_control
from streamlearn.control.statedir import locked, record_process
from streamlearn.core.errors import StreamlearnError
from streamlearn.core.states import SaveTrigger
from streamlearn.core.tasks import Task, TaskState
from streamlearn.metrics import Metrics
from streamlearn.runtime.control_desk import ControlDesk, Request
from tests.support.in_process import BlockedStore, made

if TYPE_CHECKING:
    from pathlib import Path


def send_commands(desk: ControlDesk, *names: str) -> list[Future[dict[str, Any]]]:
    """Send commands in this order, each from its own thread; return their answers after all are queued."""
    answers: list[Future[dict[str, Any]]] = []
    for number, name in enumerate(names, 1):
        answer: Future[dict[str, Any]] = Future()
        answers.append(answer)

        def call(name: str = name, answer: Future[dict[str, Any]] = answer) -> None:
            try:
                answer.set_result(desk.command(name, {}))
            except StreamlearnError as error:
                answer.set_exception(error)

        threading.Thread(target=call, daemon=True).start()
        while len(desk._requests) < number:
            time.sleep(0.001)
    return answers


def test_a_pause_does_not_undo_a_resume_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With both in one turn of the loop, reading continues after a burst, and then learning pauses."""
    job, stream = made(tmp_path)
    resumed = []
    desk = ControlDesk(job.config, Metrics())
    monkeypatch.setattr(stream, "resume_after_burst", lambda: resumed.append(desk.state))
    answers = send_commands(desk, "pause", "resume", "pause")
    assert (desk.paused, resumed) == (False, [])  # nothing is done before the loop has its turn
    desk.serve(job, stream, idle=False)
    assert resumed == ["paused"]
    assert [answer.result(10) for answer in answers] == [{"state": state} for state in ("paused", "running", "paused")]
    assert desk.paused


def test_the_answer_to_pause_agrees_with_status(tmp_path: Path) -> None:
    """After the answer `paused` the status is `paused`, however rarely the loop publishes it."""
    job, stream = made(tmp_path)
    desk = ControlDesk(job.config, Metrics())
    desk.serve(job, stream, idle=True)
    for name, state in (("pause", "paused"), ("resume", "running")):
        (answer,) = send_commands(desk, name)
        desk.serve(job, stream, idle=False)
        assert answer.result(10)["state"] == desk.status()["state"] == state
    desk.stopping = True
    assert desk.status()["state"] == "draining"


def test_a_command_after_the_last_turn_is_refused(tmp_path: Path) -> None:
    """The loop has ended and cannot execute it, so the answer is 75 at once."""
    job, _ = made(tmp_path)
    desk = ControlDesk(job.config, Metrics())
    (early,) = send_commands(desk, "pause")
    desk.refuse_requests()
    with pytest.raises(StreamlearnError, match="the daemon is stopping"):
        early.result(10)
    with pytest.raises(StreamlearnError, match="the daemon is stopping") as caught:
        desk.command("pause", {})
    assert caught.value.exit_code == 75


def test_task_end_is_answered_when_the_task_has_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an open task, or while learning is paused, the command is refused with one line."""
    job, stream = made(tmp_path)
    asked: list[str] = []
    monkeypatch.setattr(stream, "end_task", asked.append)
    desk = ControlDesk(job.config, Metrics())

    def refusal_of(answer: Future[dict[str, Any]]) -> str:
        desk.serve(job, stream, idle=True)
        return str(answer.exception(timeout=30))

    assert refusal_of(send_commands(desk, "end_task")[0]) == "no task is open"
    task = Task(0, "a")
    job.progress.tasks.append(task)
    desk.paused = True
    assert (
        refusal_of(send_commands(desk, "end_task")[0])
        == "learning is paused, so task a cannot end: use `streamlearn resume` first"
    )
    desk.paused = False
    [answer] = send_commands(desk, "end_task")
    desk.serve(job, stream, idle=True)
    task.state = TaskState.REFINING
    assert refusal_of(send_commands(desk, "end_task")[0]) == "task a is already ending"
    assert not answer.done()
    task.state = TaskState.ENDED
    desk.serve(job, stream, idle=True)
    assert answer.result(timeout=30) == {"task": "a", "state": "ended"}
    assert set(asked) == {"a"}


def test_a_pause_refuses_a_waiting_task_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While learning is paused the task cannot end, so `task end` gets one line and 75, and `resume` ends the task."""
    job, stream = made(tmp_path)
    monkeypatch.setattr(stream, "end_task", lambda _: None)
    job.progress.tasks.append(Task(0, "a"))
    desk = ControlDesk(job.config, Metrics())
    ended, paused = send_commands(desk, "end_task", "pause")
    desk.serve(job, stream, idle=True)
    refusal = ended.exception(timeout=30)
    assert isinstance(refusal, StreamlearnError)
    assert (str(refusal), refusal.exit_code) == (
        "learning was paused before the task ended: it ends after `streamlearn resume`",
        75,
    )
    assert paused.result(timeout=30) == {"state": "paused"}


def test_a_tag_taken_meanwhile_is_reported(tmp_path: Path) -> None:
    """The checkpoint is saved, and the answer says that it does not have the tag."""
    job, stream = made(tmp_path)
    desk = ControlDesk(job.config, Metrics())
    job.save(stream, SaveTrigger.MANUAL)
    job.checkpointer.wait(stream)
    held = BlockedStore(job)
    desk._requests.append(request := Request("checkpoint", {"tag": "mine"}))
    desk.serve(job, stream, idle=True)
    Store(tmp_path).tag("1", "mine")
    held.open.set()
    job.checkpointer.wait(stream)
    desk.serve(job, stream, idle=True)
    assert "without the tag mine" in str(request.answer.exception(timeout=30))


def test_a_stop_refuses_a_waiting_task_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command gets an answer (75) when the daemon stops."""
    job, stream = made(tmp_path)
    monkeypatch.setattr(stream, "end_task", lambda _: None)
    job.progress.tasks.append(Task(0, "a"))
    desk = ControlDesk(job.config, Metrics())
    [answer] = send_commands(desk, "end_task")
    desk.serve(job, stream, idle=True)
    desk.refuse_requests()
    refusal = answer.exception(timeout=30)
    assert isinstance(refusal, StreamlearnError)
    assert refusal.exit_code == 75


def test_why_not_ready(tmp_path: Path) -> None:
    """It has the stream's problem, the state and the failing checks; before the daemon answers, the path of its log."""
    job, stream = made(tmp_path)
    desk = ControlDesk(job.config, Metrics())
    stream.status.problem = "no broker answers"
    with locked(tmp_path):
        assert why_not_ready(tmp_path) == (
            f"{tmp_path}: the daemon is still starting; see {tmp_path / 'daemon.log'}"
        )  # fmt: skip
        listener, path = bind_control(tmp_path)
        control_server = Server(control_app(desk), listener, "control")
        control_server.start()
        record_process(tmp_path, {"socket": str(path), "http": ""})
        assert why_not_ready(tmp_path) == "starting, not ok: restored"
        desk.serve(job, stream, idle=True)
        assert why_not_ready(tmp_path) == "no broker answers (running, not ok: broker, stream)"
        control_server.stop()
