"""How connections fail: the error messages, and that nothing stays open."""

from __future__ import annotations

import random
import socket
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest
from kafka import KafkaAdminClient
from kafka import errors as kafka_errors

from benchmarks.kafka_broker import free_port
from streamlearn.core.errors import AccessError, StreamlearnError
from streamlearn.stream.logs import kafka_connection as connection
from streamlearn.stream.logs import kafka_failures, kafka_python
from streamlearn.stream.logs.base import BrokerUnavailable
from streamlearn.stream.logs.config import KafkaConfig
from tests.support.secure_broker import make_authority

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def short_bootstrap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the time of a failing attempt."""
    monkeypatch.setattr(connection, "BOOTSTRAP_MS", 300)


def settings(**over: Any) -> dict[str, Any]:
    """Return the settings of a client."""
    return connection.client_settings(KafkaConfig.model_validate({"bootstrap_servers": "localhost:1", **over}))


def test_failed_attempts_leave_no_thread() -> None:
    """The reader tries every half minute, possibly for months."""
    before = set(threading.enumerate())
    for _ in range(3):
        with pytest.raises(BrokerUnavailable, match=r"^localhost:1: no broker answers \(111 ECONNREFUSED\)$"):
            connection.create_client(KafkaAdminClient, settings())
    assert set(threading.enumerate()) - before == set()


def test_a_disconnecting_broker_hints_at_the_protocol() -> None:
    """A broker that disconnects without an answer may speak another protocol; the message names ours."""
    with socket.create_server(("127.0.0.1", free_port())) as server:
        port = server.getsockname()[1]

        def hang_up() -> None:
            while True:
                try:
                    server.accept()[0].close()
                except OSError:
                    return

        thread = threading.Thread(target=hang_up)
        thread.start()
        why = r"no broker answers \(.*; does it speak PLAINTEXT there \(kafka.security_protocol\)\?\)$"
        with pytest.raises(BrokerUnavailable, match=why):
            connection.create_client(KafkaAdminClient, settings(bootstrap_servers=f"127.0.0.1:{port}"))
        server.shutdown(socket.SHUT_RDWR)
        thread.join()


def test_a_server_without_a_port_has_no_protocol_mismatch() -> None:
    """The check of the protocol skips it, so the user sees the error of the connection."""
    found = connection._find_protocol_mismatch({"bootstrap_servers": ["broker"], "security_protocol": "PLAINTEXT"})
    assert found is None


@pytest.mark.kafka
@pytest.mark.parametrize("protocol", ["SSL", "SASL_SSL"])
def test_a_broker_without_tls_is_a_configuration_error(kafka: KafkaConfig, protocol: str) -> None:
    """It disconnects during the TLS handshake but answers without TLS, so the error has code 78, not 69."""
    over: dict[str, Any] = {"bootstrap_servers": kafka.bootstrap_servers, "security_protocol": protocol}
    if protocol == "SASL_SSL":
        over["sasl"] = {"username": "a", "password": "b"}
    [server] = kafka.bootstrap_servers
    why = f"^{server}: kafka.security_protocol is {protocol}, but {server} speaks no TLS$"
    with pytest.raises(StreamlearnError, match=why) as caught:
        connection.create_client(KafkaAdminClient, settings(**over))
    assert caught.value.exit_code == 78


def test_key_and_certificate_files_are_checked_before_connecting(tmp_path: Path) -> None:
    """The error for a missing or invalid file has its configuration key and path."""
    certificate, other = make_authority(tmp_path / "a"), make_authority(tmp_path / "b")
    noise = tmp_path / "noise.pem"
    noise.write_text("noise")
    own = {"ssl_certfile": certificate, "ssl_keyfile": certificate.with_suffix(".key")}
    assert settings(security_protocol="SSL", ssl_cafile=certificate, **own)["ssl_context"].check_hostname
    for over, message in (
        ({"ssl_cafile": tmp_path / "none.pem"}, f"kafka.ssl_cafile: {tmp_path}/none.pem is not a readable file"),
        ({"ssl_cafile": noise}, f"kafka.ssl_cafile: {noise}: "),
        ({**own, "ssl_certfile": noise}, f"kafka.ssl_certfile: {noise}: "),
        ({**own, "ssl_keyfile": other.with_suffix(".key")}, f"kafka.ssl_certfile: {certificate}: "),
    ):
        with pytest.raises(StreamlearnError) as caught:
            settings(security_protocol="SSL", **over)
        assert (caught.value.exit_code, str(caught.value).startswith(message)) == (77, True), caught.value


HANDSHAKE = "Handshake failed: [SSL: "
ERRORS: list[tuple[Exception, bool]] = [
    (kafka_errors.SaslAuthenticationFailedError("wrong"), True),
    (kafka_errors.TopicAuthorizationFailedError({"t"}), True),
    (kafka_errors.KafkaConnectionError(HANDSHAKE + "CERTIFICATE_VERIFY_FAILED] certificate has expired"), True),
    (kafka_errors.KafkaConnectionError(HANDSHAKE + "TLSV13_ALERT_CERTIFICATE_REQUIRED] certificate required"), True),
    (kafka_errors.KafkaConnectionError(HANDSHAKE + "TLSV1_ALERT_UNKNOWN_CA] unknown ca"), True),
    (kafka_errors.KafkaConnectionError(HANDSHAKE + "UNEXPECTED_EOF_WHILE_READING]"), False),
    (kafka_errors.KafkaConnectionError("socket disconnected"), False),
    (kafka_errors.KafkaProtocolError("Invalid frame length: 352518912"), True),  # a TLS alert, read as a length
    (kafka_errors.KafkaProtocolError("Invalid frame length: 1213486160"), False),  # HTTP
    (kafka_errors.KafkaTimeoutError("late"), False),
    (AccessError("no token"), True),
    (BrokerUnavailable("no token server"), False),
]


@pytest.mark.parametrize(("error", "refused"), ERRORS, ids=[str(number) for number in range(len(ERRORS))])
def test_refusals_differ_from_outages(error: Exception, *, refused: bool) -> None:
    """Only an error that another attempt cannot change ends the daemon."""
    assert kafka_failures.is_refusal(error) == refused


def test_the_client_does_not_use_the_global_random_generator() -> None:
    """The client's random choices must not change the draws of a model that uses Python's `random`."""
    settings()
    users = [name for name, module in sys.modules.items() if name.startswith("kafka.") and hasattr(module, "random")]
    assert "kafka.cluster" in users
    assert [name for name in users if sys.modules[name].random is random] == []


def test_modules_may_be_imported_while_a_client_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader's thread connects while the main thread still imports: that once ended a daemon that had just begun."""

    class Growing(dict[str, Any]):
        """Modules of which another one is imported at each step of an iteration."""

        def items(self) -> Any:
            for pair in super().items():
                self[f"imported-{len(self)}"] = None
                yield pair

    monkeypatch.setattr(kafka_python, "sys", type("System", (), {"modules": Growing(sys.modules)}))
    assert settings()["bootstrap_servers"] == ["localhost:1"]
