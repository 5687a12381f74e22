"""The listeners: what the one on the network refuses, whoever asks. The desk: commands in the order of their arrival."""

from __future__ import annotations

import socket
import threading
import time
from concurrent.futures import Future
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from streamlearn.checkpoint import Store
from streamlearn.cli.lifecycle import why_not_ready
from streamlearn.daemon import ControlDesk, Request
from streamlearn.data import StreamlearnError, Task
from streamlearn.metrics import Metrics
from streamlearn.service import server
from streamlearn.service.api import COMMANDS, control_app, read_only_app
from streamlearn.service.server import MAX_CONNECTIONS, Server, bind_control, bind_tcp
from streamlearn.service.statedir import locked, record_process
from tests.unit.test_job import Held, made

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
def test_the_network_can_only_read(address: str, method: str, path: str) -> None:
    """No verb that changes something is known."""
    assert httpx.request(method, address + path).status_code == 405


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_are_not_on_the_network(address: str, name: str) -> None:
    """What the owner's socket does, nobody else can ask for."""
    assert httpx.post(f"{address}/v1/{name}").status_code == 404


def test_a_huge_request_is_refused(address: str) -> None:
    """Headers past their bound end the connection, and the next request is answered."""
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
def test_connections_that_ask_for_nothing_keep_nobody_out(address: str, sent: bytes) -> None:
    """Three times as many as there may be: the oldest are closed, and health and metrics are answered all the while."""
    clients = []
    for number in range(3 * MAX_CONNECTIONS):
        clients.append(connected(address, sent))
        if number % 16 == 15:
            assert httpx.get(f"{address}/healthz", timeout=30).status_code == 200
            assert httpx.get(f"{address}/metrics", timeout=30).status_code == 200
    assert closed(clients[0])
    for client in clients:
        client.close()


def closed(client: socket.socket) -> bool:
    """Tell whether the server ends a connection without a word; waits for it."""
    try:
        return client.recv(1) == b""
    except ConnectionResetError:
        return True


def test_a_request_that_never_gets_whole_is_given_up(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Byte after byte comes, and each in time: the limit is for the whole request."""
    monkeypatch.setattr(server, "TIMEOUT_SECONDS", 0.5)
    client = connected(address, b"GET /healthz HTTP/1.1\r\nHost: a\r\nX: ")
    sent = 0
    with suppress(BrokenPipeError, ConnectionResetError):
        while sent < 600:
            client.sendall(b"a")
            sent += 1
            time.sleep(0.05)
    assert sent < 600


def test_an_answer_that_nobody_takes_is_given_up(http: Server, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that asks and does not read ties up its connection for a while, not for ever."""
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


def ask(desk: ControlDesk, *names: str) -> list[Future[dict[str, Any]]]:
    """Ask for commands in this order, each from a thread of its own; return when the desk has them all."""
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


def test_a_pause_right_after_a_resume_does_not_erase_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are asked for within one turn of the loop: reading goes on where a burst had stopped it, and then it pauses."""
    job, stream = made(tmp_path)
    acknowledged = []
    monkeypatch.setattr(stream, "resume_after_burst", lambda: acknowledged.append(job.state))
    desk = ControlDesk(job.config, Metrics())
    answers = ask(desk, "pause", "resume", "pause")
    assert (desk.paused, acknowledged) == (False, [])  # nothing is done before the loop has its turn
    desk.serve(job, stream, idle=False)
    assert acknowledged == ["paused"]
    assert [answer.result(10) for answer in answers] == [{"state": state} for state in ("paused", "running", "paused")]
    assert desk.paused


def test_the_answer_to_pause_is_what_status_says(tmp_path: Path) -> None:
    """Whoever has the answer `paused` reads `paused` in the status, however seldom the loop publishes."""
    job, stream = made(tmp_path)
    desk = ControlDesk(job.config, Metrics())
    desk.serve(job, stream, idle=True)
    for name, state in (("pause", "paused"), ("resume", "running")):
        (answer,) = ask(desk, name)
        desk.serve(job, stream, idle=False)
        assert answer.result(10)["state"] == desk.status()["state"] == state
    desk.stopping = True
    assert desk.status()["state"] == "draining"


def test_a_command_that_comes_after_the_last_turn_is_refused(tmp_path: Path) -> None:
    """The loop has ended: nobody would apply it, so the answer is 75 at once."""
    job, _ = made(tmp_path)
    desk = ControlDesk(job.config, Metrics())
    (early,) = ask(desk, "pause")
    desk.refuse_requests()
    with pytest.raises(StreamlearnError, match="the daemon is stopping"):
        early.result(10)
    with pytest.raises(StreamlearnError, match="the daemon is stopping") as caught:
        desk.command("pause", {})
    assert caught.value.code == 75


def test_a_task_is_ended_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer comes when the task has ended; without an open task, or paused, the refusal is one line."""
    job, stream = made(tmp_path)
    asked: list[str] = []
    monkeypatch.setattr(stream, "end_task", asked.append)
    desk = ControlDesk(job.config, Metrics())

    def told(answer: Future[dict[str, Any]]) -> str:
        desk.serve(job, stream, idle=True)
        return str(answer.exception(timeout=30))

    assert told(ask(desk, "end_task")[0]) == "no task is open"
    task = Task(0, "a")
    job.progress.tasks.append(task)
    desk.paused = True
    assert told(ask(desk, "end_task")[0]) == "learning is paused, so task a cannot end: use `streamlearn resume` first"
    desk.paused = False
    [answer] = ask(desk, "end_task")
    desk.serve(job, stream, idle=True)
    task.state = "refining"
    assert told(ask(desk, "end_task")[0]) == "task a is already ending"
    assert not answer.done()
    task.state = "ended"
    desk.serve(job, stream, idle=True)
    assert answer.result(timeout=30) == {"task": "a", "state": "ended"}
    assert set(asked) == {"a"}


def test_a_pause_answers_who_waits_for_a_task_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While learning is paused the task cannot end, so `task end` does not wait: one line, 75, and `resume` ends it."""
    job, stream = made(tmp_path)
    monkeypatch.setattr(stream, "end_task", lambda _: None)
    job.progress.tasks.append(Task(0, "a"))
    desk = ControlDesk(job.config, Metrics())
    ended, paused = ask(desk, "end_task", "pause")
    desk.serve(job, stream, idle=True)
    refusal = ended.exception(timeout=30)
    assert isinstance(refusal, StreamlearnError)
    assert (str(refusal), refusal.code) == (
        "learning was paused before the task ended: it ends after `streamlearn resume`",
        75,
    )
    assert paused.result(timeout=30) == {"state": "paused"}


def test_who_asked_for_a_tag_that_was_given_away_is_told(tmp_path: Path) -> None:
    """The checkpoint is saved, and the answer says that it has no tag."""
    job, stream = made(tmp_path)
    desk = ControlDesk(job.config, Metrics())
    job.save(stream, "manual")
    job.wait_for_saves(stream)
    held = Held(job)
    desk._requests.append(request := Request("checkpoint", {"tag": "mine"}))
    desk.serve(job, stream, idle=True)
    Store(tmp_path).tag("1", "mine")
    held.open.set()
    job.wait_for_saves(stream)
    desk.serve(job, stream, idle=True)
    assert "without the tag mine" in str(request.answer.exception(timeout=30))


def test_a_task_that_has_not_ended_when_the_daemon_ends_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever asked for its end is not left waiting."""
    job, stream = made(tmp_path)
    monkeypatch.setattr(stream, "end_task", lambda _: None)
    job.progress.tasks.append(Task(0, "a"))
    desk = ControlDesk(job.config, Metrics())
    [answer] = ask(desk, "end_task")
    desk.serve(job, stream, idle=True)
    desk.refuse_requests()
    refusal = answer.exception(timeout=30)
    assert isinstance(refusal, StreamlearnError)
    assert refusal.code == 75


def test_a_start_that_was_not_ready_in_time_says_why(tmp_path: Path) -> None:
    """The stream's problem, the state and the conditions that fail; before the daemon answers, that, and where its log is."""
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
