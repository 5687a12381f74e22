"""The listeners: limits of the TCP port. The control desk: commands are executed in the order in which they arrive."""

from __future__ import annotations

import socket
import threading
import time
from concurrent.futures import Future
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from streamlearn.checkpoint.store import Store
from streamlearn.cli.lifecycle import why_not_ready
from streamlearn.control import server
from streamlearn.control.api import COMMANDS, control_app, read_only_app
from streamlearn.control.server import MAX_CONNECTIONS, Server, bind_control, bind_tcp
from streamlearn.control.statedir import locked, record_process
from streamlearn.core.errors import StreamlearnError
from streamlearn.core.states import SaveTrigger
from streamlearn.core.tasks import Task, TaskState
from streamlearn.metrics import Metrics
from streamlearn.runtime.control_desk import ControlDesk, Request
from tests.support.in_process import BlockedStore, made

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def http(tmp_path: Path) -> Iterator[Server]:
    """Give a read-only listener."""
    job, _ = made(tmp_path)
    http = Server(read_only_app(ControlDesk(job.config, Metrics())), bind_tcp("127.0.0.1", 0), "http")
    http.start()
    yield http
    http.stop()


@pytest.fixture
def address(http: Server) -> str:
    """Give its address."""
    return f"http://127.0.0.1:{http.listener.getsockname()[1]}"


@pytest.mark.parametrize("path", ["/metrics", "/healthz", "/readyz", "/status"])
@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
def test_the_tcp_port_is_read_only(address: str, method: str, path: str) -> None:
    """Every method that could change something is refused."""
    assert httpx.request(method, address + path).status_code == 405


@pytest.mark.parametrize("name", COMMANDS)
def test_the_tcp_port_has_no_commands(address: str, name: str) -> None:
    """Only the owner's Unix socket has them."""
    assert httpx.post(f"{address}/v1/{name}").status_code == 404


def test_huge_headers_are_refused(address: str) -> None:
    """Headers above the limit end the connection, and the next request is answered."""
    with pytest.raises((httpx.HTTPError, AssertionError)):
        assert httpx.get(address + "/healthz", headers={"x": "y" * (1 << 20)}).status_code == 200
    assert httpx.get(address + "/healthz").status_code == 200


def connected(address: str, sent: bytes = b"") -> socket.socket:
    """Return a connection that has sent so much of a request."""
    url = httpx.URL(address)
    client = socket.create_connection((url.host, url.port or 0), timeout=30)
    client.sendall(sent)
    return client


@pytest.mark.parametrize("sent", [b"", b"GET /status HTTP/1.1\r\nHost: a\r\nX"], ids=["idle", "half"])
def test_idle_connections_do_not_block_the_listener(address: str, sent: bytes) -> None:
    """With three times the limit, the oldest are closed, and health checks and metrics are always answered."""
    clients = []
    for number in range(3 * MAX_CONNECTIONS):
        clients.append(connected(address, sent))
        if number % 16 == 15:
            assert httpx.get(f"{address}/healthz", timeout=30).status_code == 200
            assert httpx.get(f"{address}/metrics", timeout=30).status_code == 200
    assert is_closed(clients[0])
    for client in clients:
        client.close()


def is_closed(client: socket.socket) -> bool:
    """Wait until the server closes a connection; return whether it sent nothing."""
    try:
        return client.recv(1) == b""
    except ConnectionResetError:
        return True


def test_a_request_that_is_never_complete_is_closed(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time limit is for the whole request, even if every byte arrives in time."""
    monkeypatch.setattr(server, "TIMEOUT_SECONDS", 0.5)
    client = connected(address, b"GET /healthz HTTP/1.1\r\nHost: a\r\nX: ")
    sent = 0
    with suppress(BrokenPipeError, ConnectionResetError):
        while sent < 600:
            client.sendall(b"a")
            sent += 1
            time.sleep(0.05)
    assert sent < 600


def test_an_answer_that_is_not_read_is_closed(http: Server, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that sends a request and does not read the answer is disconnected after a time limit."""
    monkeypatch.setattr(server, "ANSWER_SECONDS", 0.5)
    monkeypatch.setattr(ControlDesk, "status", lambda _: {"long": "x" * (64 << 20)})
    with connected(address, b"GET /status HTTP/1.1\r\nHost: a\r\n\r\n") as client:
        state = http._server.server_state
        while state.total_requests == 0 or state.connections:
            time.sleep(0.01)
        taken = 0
        with suppress(ConnectionResetError):
            while content := client.recv(1 << 20):
                taken += len(content)
    assert taken < 64 << 20


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
    acknowledged = []
    desk = ControlDesk(job.config, Metrics())
    monkeypatch.setattr(stream, "resume_after_burst", lambda: acknowledged.append(desk.state))
    answers = send_commands(desk, "pause", "resume", "pause")
    assert (desk.paused, acknowledged) == (False, [])  # nothing is done before the loop has its turn
    desk.serve(job, stream, idle=False)
    assert acknowledged == ["paused"]
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
