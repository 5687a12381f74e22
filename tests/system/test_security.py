"""Real daemons against a broker with TLS, users and permissions."""

from __future__ import annotations

import json
import re
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import yaml

from streamlearn.checkpoint.store import Store
from streamlearn.stream.logs.config import KafkaConfig
from streamlearn.stream.logs.kafka import KafkaReader
from streamlearn.stream.logs.kafka_writer import KafkaWriter
from tests.support import jobs
from tests.support.commands import cli
from tests.support.secure_broker import SecureBroker, make_authority
from tests.support.token_server import TokenServer

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.kafka

USER, PASSWORD, CLIENT_SECRET = "learner", "c4n4ry-password", "c4n4ry-client-secret"
SAMPLES = 40
CLIENTS = 5  # reader and writer of a daemon have two each, and the reader may have connected once more
PASSWORD_KEY = "STREAMLEARN__KAFKA__SASL__PASSWORD"
SECRET_KEY = "STREAMLEARN__KAFKA__SASL__CLIENT_SECRET"


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecureBroker]:
    """Return a broker whose only user has no permission yet."""
    settings = {"connections.max.reauth.ms": 3_600_000}
    with SecureBroker(tmp_path_factory.mktemp("secure"), {USER: PASSWORD}, **settings) as made:
        yield made


class Job:
    """One topic, its dead letters, and a configuration that reads them as the user."""

    def __init__(self, broker: SecureBroker, directory: Path) -> None:
        self.broker = broker
        self.directory = directory
        prefix = f"s{uuid.uuid4().hex[:8]}"
        self.topic, self.letters, self.group = f"{prefix}-t", f"{prefix}-dlq", f"{prefix}-g"
        self.sink = KafkaWriter(KafkaConfig.model_validate({"bootstrap_servers": broker.address}))
        for name in (self.topic, self.letters):
            self.sink.create_topic(name, 1)
        for number in range(SAMPLES):
            self.publish(json.dumps({"x": [number, 1], "y": number % 2}))
        self.sink.flush()

    def publish(self, text: str) -> None:
        """Append one record."""
        self.sink.append(self.topic, 0, text.encode())

    def mark(self) -> None:
        """End the task."""
        self.sink.append(self.topic, 0, b"", headers=(("streamlearn-control", b"task-end"),))
        self.sink.flush()

    def allow(self, *but: str) -> None:
        """Give the user all that a daemon needs, but this."""
        needed = {
            "read": ("TOPIC", self.topic, "READ"),
            "describe": ("TOPIC", self.topic, "DESCRIBE"),
            "write": ("TOPIC", self.letters, "WRITE"),
            "letters": ("TOPIC", self.letters, "DESCRIBE"),
            "group": ("GROUP", self.group, "READ"),
        }
        for name, permission in needed.items():
            if name not in but:
                self.broker.allow(USER, *permission)

    def settings(self) -> dict[str, Any]:
        """Return how to reach the broker, without a secret."""
        return {
            "bootstrap_servers": self.broker.secure,
            "security_protocol": "SASL_SSL",
            "ssl_cafile": str(self.broker.authority),
            "sasl": {"username": USER},
            "group_id": self.group,
            "metadata_refresh_seconds": 1,
        }

    def kafka(self, **over: Any) -> KafkaConfig:
        """Return the same for a client of this process, the password with it."""
        sasl = {"username": USER, "password": PASSWORD}
        return KafkaConfig.model_validate({**self.settings(), "sasl": sasl, **over})

    def config(self, **kafka: Any) -> Path:
        """Write the configuration."""
        return jobs.write_config(
            self.directory,
            kafka={**self.settings(), **kafka},
            input={"shape": [2], "dtype": "float32", "scale": 1},
            classes=2,
            stream={"topics": [self.topic], "batch_size": 10, "dead_letter": {"topic": self.letters}},
            model={"hidden": [4]},
            strategy="naive",
            checkpoint={"every_batches": 1},
            log={"level": "debug", "format": "json"},
        )


@pytest.fixture
def job(broker: SecureBroker, tmp_path: Path) -> Iterator[Job]:
    """Return a job whose user has no permission yet."""
    made = Job(broker, tmp_path)
    yield made
    made.sink.close()


def ended(daemon: jobs.Daemon) -> tuple[int, str]:
    """Return a daemon's exit code and its one error line; check that its log has no traceback."""
    code = daemon.finish(60)
    text = daemon.log.read_text()
    assert "Traceback" not in text
    lines = [line for line in text.splitlines() if not line.startswith("{")]
    assert len(lines) == 1, text
    logged = [line for line in text.splitlines() if '"level": "error"' in line or '"level": "warning"' in line]
    assert logged == []
    return code, lines[0].removeprefix("streamlearn: ")


def all_learned(status: dict[str, Any]) -> bool:
    """Return whether every published sample was learned."""
    return bool(status.get("samples", {}).get("trained") == SAMPLES)


@pytest.mark.parametrize("mechanism", ["PLAIN", "SCRAM-SHA-512"])
def test_learns_to_the_end_with_a_password(job: Job, mechanism: str) -> None:
    """Over TLS, with exactly the needed permissions, every sample is learned."""
    job.allow()
    job.mark()
    with jobs.Daemon(
        job.config(sasl={"mechanism": mechanism, "username": USER}), environment={PASSWORD_KEY: PASSWORD}
    ) as daemon:
        assert daemon.finish(60) == 0, daemon.tail()
    assert Store(daemon.state).all()[0].read_json("status.json")["samples"]["trained"] == SAMPLES


def test_learns_to_the_end_with_tokens(job: Job) -> None:
    """With OAUTHBEARER, reader, writer and admin client share one token."""
    job.allow()
    job.mark()
    with TokenServer(USER, CLIENT_SECRET) as server:
        sasl = {"mechanism": "OAUTHBEARER", "token_url": server.url, "client_id": USER}
        with jobs.Daemon(job.config(sasl=sasl), environment={SECRET_KEY: CLIENT_SECRET}) as daemon:
            assert daemon.finish(60) == 0, daemon.tail()
        assert len(server.asked) == 1
    assert Store(daemon.state).all()[0].read_json("status.json")["samples"]["trained"] == SAMPLES


def test_a_connection_continues_after_its_token_expires(job: Job) -> None:
    """The client authenticates again with a new token before the broker ends the session."""
    job.allow()
    with TokenServer(USER, CLIENT_SECRET, lifetime=3) as server:
        sasl = {"mechanism": "OAUTHBEARER", "token_url": server.url, "client_id": USER, "client_secret": CLIENT_SECRET}
        log = KafkaReader(job.kafka(sasl=sasl), job.group)
        log.connect()
        log.assign({(job.topic, 0): 0})
        count, deadline = 0, time.monotonic() + 60
        while len(server.given) < 4 or count < SAMPLES + 1:
            assert time.monotonic() < deadline, (len(server.given), count)
            count += len(log.poll(0.2))
            log.bounds([(job.topic, 0)])
            if len(server.given) == 4 and count == SAMPLES:
                job.publish("{}")
                job.sink.flush()
        log.close()


def test_a_refusal_by_the_token_server_ends_the_daemon_at_once(job: Job) -> None:
    """The error is the token server's, and no broker is asked twice."""
    before = job.broker.relay.connections
    with TokenServer(USER, "another") as server:
        sasl = {"mechanism": "OAUTHBEARER", "token_url": server.url, "client_id": USER}
        config = job.config(sasl=sasl)
        with jobs.Daemon(config, environment={SECRET_KEY: CLIENT_SECRET}) as daemon:
            why = f"{server.url}: no token for client {USER}, scope None: refused with 401 (invalid_client)"
            assert ended(daemon) == (77, why)
        assert (len(server.asked), job.broker.relay.connections - before) == (1, 1)


REFUSALS: dict[str, tuple[dict[str, Any], str, int, str]] = {
    "wrong password": ({}, "localhost", 77, "refused: Authentication failed .*invalid credentials.*SCRAM-SHA-512"),
    "mechanism": (
        {"sasl": {"mechanism": "SCRAM-SHA-256", "username": USER}},
        "localhost",
        77,
        "refused: it does not offer the mechanism SCRAM-SHA-256",
    ),
    "unknown CA": (
        {"ssl_cafile": "other.pem"},
        "localhost",
        77,
        "refused: .*CERTIFICATE_VERIFY_FAILED.*unable to get local issuer certificate.*",
    ),
    "wrong host name": ({}, "127.0.0.1", 77, "refused: .*certificate is not valid for '127.0.0.1'.*"),
    "no TLS": (
        {"security_protocol": "PLAINTEXT", "sasl": None},
        "localhost",
        78,
        "kafka.security_protocol is PLAINTEXT, but the broker speaks TLS",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_refusal_ends_the_daemon_at_once(job: Job, case: str) -> None:
    """There is one connection, one line with the broker's reason, and a code after which supervisors do not restart."""
    over, host, code, why = REFUSALS[case]
    if "ssl_cafile" in over:
        over = {"ssl_cafile": str(make_authority(job.directory / "other"))}
    relay = job.broker.relay
    before, address = relay.connections, f"{host}:{relay.port}"
    wrong = {} if "security_protocol" in over else {PASSWORD_KEY: "wrong"}  # it would be a sasl section
    with jobs.Daemon(job.config(**{**over, "bootstrap_servers": address}), environment=wrong) as daemon:
        exit_code, line = ended(daemon)
    assert relay.connections - before == 1
    assert exit_code == code
    assert re.fullmatch(f"{address}: {why}", line), line


PERMISSIONS: dict[str, tuple[tuple[str, ...], str]] = {
    "nothing": (("read", "describe"), "topic {topic}: no permission to see it (DESCRIBE)"),
    "no READ": (("read",), "topic {topic}: no permission to read it (READ)"),
    "no WRITE": (("write",), "topic {letters}: no permission to write to it (WRITE)"),
    "no dead letters": (
        ("write", "letters"),
        "topic {letters}: does not exist, or we may not see it (DESCRIBE), and we may not create it (CREATE)",
    ),
    "no group": (("group",), "group {group}: no permission to commit offsets for it (READ)"),
}


@pytest.mark.parametrize("case", PERMISSIONS)
def test_a_missing_permission_ends_the_daemon_at_once(job: Job, case: str) -> None:
    """One line names the missing permission and the resource; the client alone reports nothing."""
    but, why = PERMISSIONS[case]
    job.allow(*but)
    with jobs.Daemon(job.config(), environment={PASSWORD_KEY: PASSWORD}) as daemon:
        assert ended(daemon) == (77, why.format(**vars(job)))


WITHDRAWN = {"READ": ["READ"], "READ and DESCRIBE": ["READ", "DESCRIBE"]}


@pytest.mark.parametrize("case", WITHDRAWN)
def test_a_withdrawn_permission_is_noticed(job: Job, case: str) -> None:
    """Even without new records, the daemon notices it, saves, and names the missing permission."""
    job.allow()
    with jobs.Daemon(job.config(), environment={PASSWORD_KEY: PASSWORD}) as daemon:
        daemon.until(all_learned, 60)
        for operation in WITHDRAWN[case]:
            job.broker.withdraw(USER, "TOPIC", job.topic, operation)
        code, why = ended(daemon)
    assert (code, why.startswith(f"topic {job.topic}: no permission")) == (77, True), why
    assert Store(daemon.state).all()[0].read_json("status.json")["samples"]["trained"] == SAMPLES


def test_an_ended_topic_without_permission_does_not_end_the_daemon(job: Job) -> None:
    """It is one warning, and the next topic is learned, also after a restart."""
    later = f"{job.topic}2"
    job.sink.create_topic(later, 1)
    job.allow()
    for operation in ("READ", "DESCRIBE"):
        job.broker.allow(USER, "TOPIC", later, operation)
    job.mark()
    config = job.config()
    tree = yaml.safe_load(config.read_text())
    tree["stream"] |= {"topics": [job.topic, later], "on_finished": "wait", "linger": 0.1}
    config.write_text(yaml.safe_dump(tree))

    def learn(daemon: jobs.Daemon, trained: int) -> None:
        job.sink.append(later, 0, b'{"x": [0.5, 0.5], "y": 1}')
        job.sink.flush()
        daemon.until(lambda status: status.get("samples", {}).get("trained") == trained, 60)

    with jobs.Daemon(config, environment={PASSWORD_KEY: PASSWORD}) as daemon:
        learn(daemon, SAMPLES + 1)
        job.broker.withdraw(USER, "TOPIC", job.topic, "READ")
        daemon.until(lambda _: "no permission to read it (READ); it is not read for now" in daemon.tail(), 60)
        learn(daemon, SAMPLES + 2)
        assert daemon.stop() == 0
    with jobs.Daemon(config, environment={PASSWORD_KEY: PASSWORD}) as daemon:
        learn(daemon, SAMPLES + 3)
        assert daemon.stop() == 0


def refusal(log: KafkaReader, topic: str) -> str:
    """Poll and ask for the topics until one names a missing permission, at most for half a minute."""
    deadline = time.monotonic() + 30
    while (refused := log.topics()[topic].missing_permission) is None:
        assert time.monotonic() < deadline
        assert log.poll(0.1) == []
    return refused


@pytest.mark.parametrize("case", WITHDRAWN)
def test_a_paused_reader_notices_a_withdrawn_permission(job: Job, case: str) -> None:
    """While fetching is paused no fetch can fail; the list of topics has the missing permission."""
    job.allow()
    log = KafkaReader(job.kafka(), job.group)
    log.connect()
    log.assign({(job.topic, 0): 0})
    log.pause_partitions({(job.topic, 0)})
    assert log.topics()[job.topic].missing_permission is None
    for operation in WITHDRAWN[case]:
        job.broker.withdraw(USER, "TOPIC", job.topic, operation)
    assert refusal(log, job.topic) in {"no permission to see it (DESCRIBE)", "no permission to read it (READ)"}
    log.close()


def test_a_changed_password_ends_the_daemon(job: Job) -> None:
    """Open connections stay; after a restart of the broker, one attempt with the old password ends the daemon."""
    job.allow()
    with jobs.Daemon(job.config(), environment={PASSWORD_KEY: PASSWORD}) as daemon:
        daemon.until(all_learned, 60)
        job.broker.change_password(USER, "another")
        try:
            job.broker.stop()
            before = job.broker.relay.connections
            job.broker.start()
            assert daemon.finish(120) == 77, daemon.tail()
            attempts = job.broker.relay.connections - before
        finally:
            job.broker.change_password(USER, PASSWORD)
    text = daemon.log.read_text()
    assert "Traceback" not in text
    assert re.fullmatch(
        "streamlearn: (localhost:[0-9]+: )?refused: Authentication failed .*SCRAM-SHA-512", text.splitlines()[-1]
    ), text
    assert 1 <= attempts <= CLIENTS


def test_a_withdrawn_permission_for_dead_letters_ends_the_daemon(job: Job) -> None:
    """The position does not move past an unwritten letter: the next start reads the record again."""
    job.allow()
    with jobs.Daemon(job.config(), environment={PASSWORD_KEY: PASSWORD}) as daemon:
        daemon.until(all_learned, 60)
        job.broker.withdraw(USER, "TOPIC", job.letters, "WRITE")
        job.publish("no sample")
        job.mark()
        assert daemon.finish(60) == 77, daemon.tail()
        why = f"topic {job.letters}: no permission to write to it (WRITE), 1 records are waiting"
        assert daemon.tail().splitlines()[-1] == f"streamlearn: {why}"
    assert Store(daemon.state).all()[0].read_json("status.json")["samples"]["rejected"] == 0
    job.broker.allow(USER, "TOPIC", job.letters, "WRITE")
    with jobs.Daemon(daemon.config, environment={PASSWORD_KEY: PASSWORD}) as again:
        assert again.finish(60) == 0, again.tail()
    samples = Store(daemon.state).all()[0].read_json("status.json")["samples"]
    assert (samples["trained"], samples["rejected"]) == (SAMPLES, 1)


@pytest.mark.parametrize("mechanism", ["SCRAM-SHA-512", "OAUTHBEARER"])
def test_secrets_are_nowhere(job: Job, mechanism: str) -> None:
    """No log, answer, metric, command line or file of a daemon at debug level has a password, secret or token."""
    job.allow()
    environment = {PASSWORD_KEY: PASSWORD}
    with TokenServer(USER, CLIENT_SECRET) as server:
        sasl: dict[str, Any] = {"mechanism": mechanism, "username": USER}
        if mechanism == "OAUTHBEARER":
            sasl = {"mechanism": mechanism, "token_url": server.url, "client_id": USER}
            environment = {SECRET_KEY: CLIENT_SECRET}
        config = job.config(sasl=sasl)
        with jobs.Daemon(config, environment=environment) as daemon:
            daemon.until(all_learned, 60)
            shown = [
                cli("status", "--json", "--state", daemon.state).stdout,
                cli("config", "show", config, environment=environment).stdout,
                cli("config", "check", config, environment=environment).stdout,
                Path(f"/proc/{daemon.process.pid}/cmdline").read_text(),
                *(httpx.get(daemon.http + path).text for path in ("/metrics", "/status", "/readyz", "/healthz")),
            ]
            assert daemon.stop() == 0
        secrets = [PASSWORD, CLIENT_SECRET, *server.given]
    assert all(shown)
    assert len(server.given) == (mechanism == "OAUTHBEARER")
    files = [path for path in job.directory.rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"job.log", "daemon.json", "MANIFEST.json", "state.json"}
    places = [text.encode() for text in shown] + [path.read_bytes() for path in files]
    assert [secret for secret in secrets if any(secret.encode() in place for place in places)] == []
