"""Connect to Apache Kafka: authentication, TLS, and an error that names the cause as soon as a broker refuses us.

Repairs of kafka-python 3.0 that stand here:

- It repeats a refused login until the bootstrap time is over, and then reports only that no broker answered. See
  `_ConnectionManager`.
- It drops the last bytes of a connection, which contain the reason of a refusal. See `_ConnectionManager`.
- If a client's constructor fails, its network thread and sockets stay open. See `create_client`.
- It uses Python's global random generator, which belongs to the model that learns. See `_use_own_random_generator`.
"""

from __future__ import annotations

import random
import re
import socket
import ssl
import struct
import sys
from typing import TYPE_CHECKING, Any

from kafka import errors as kafka_errors
from kafka.net.compat import KafkaNetClient
from kafka.net.manager import KafkaConnectionManager
from kafka.net.selector import NetworkSelector

from streamlearn.core.errors import AccessError, ConfigurationError, StreamlearnError
from streamlearn.stream.logs.base import BrokerUnavailable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from streamlearn.stream.logs.config import KafkaConfig

BOOTSTRAP_MS = 5000
REQUEST_MS = 10_000

PERMISSION_ERRORS = (
    kafka_errors.AuthorizationError,
    kafka_errors.SaslAuthenticationFailedError,
    kafka_errors.UnsupportedSaslMechanismError,
    kafka_errors.IllegalSaslStateError,
)
# parts of OpenSSL's messages if a TLS handshake failed because of a certificate; the client has no error class for it
CERTIFICATE_ERROR = re.compile(r"CERTIFICATE|UNKNOWN_CA|_CERT_")
DISCONNECTED = re.compile(r"WRONG_VERSION_NUMBER|UNEXPECTED_EOF|socket disconnected|reset by peer")
CLASS_NAMES = re.compile(
    r"^(\[Error \d+\] (\w+Error: )*|KafkaConnectionError: )"
)  # before a message, without information
CLIENT_RANDOM = random.Random()  # noqa: S311 - the client uses it to choose brokers and waiting times
FRAME_LENGTH = re.compile(r"Invalid frame length: (\d+)")
TLS_ALERT = 0x1503  # the first two bytes of a TLS alert: record type 21, major version 3
PROTOCOL_CHECK_SECONDS = 3.0
CORRELATION_ID = 0x5354  # any number; a broker repeats it in its answer
API_VERSIONS_REQUEST = struct.pack(">ihhih", 10, 18, 0, CORRELATION_ID, -1)  # the first request of every client


def _use_own_random_generator() -> None:
    """Give the modules of kafka-python a random generator of their own.

    They draw numbers in the reader thread from Python's global generator. The draws of a model that uses this generator
    would then depend on the network.
    """
    # `copy` is one step of the interpreter; `list(...items())` is not, and another thread may import a module meanwhile
    for name, module in sys.modules.copy().items():
        if name.startswith("kafka.") and getattr(module, "random", None) is random:
            module.random = CLIENT_RANDOM  # type: ignore[attr-defined]  # modules have any attributes


def client_settings(kafka: KafkaConfig) -> dict[str, Any]:
    """Return the connection settings that consumer, producer and admin client share; raises `AccessError`."""
    _use_own_random_generator()
    settings: dict[str, Any] = {
        "bootstrap_servers": kafka.bootstrap_servers,
        "client_id": kafka.client_id,
        "security_protocol": kafka.security_protocol,
        "request_timeout_ms": REQUEST_MS,
        "bootstrap_timeout_ms": BOOTSTRAP_MS,
        "reconnect_backoff_ms": 50,
        "reconnect_backoff_max_ms": 1000,
    }
    if kafka.security_protocol.endswith("SSL"):
        settings["ssl_context"] = _ssl_context(kafka)
    if kafka.sasl is not None and kafka.security_protocol.startswith("SASL"):
        settings["sasl_mechanism"] = kafka.sasl.mechanism
        if kafka.sasl.mechanism == "OAUTHBEARER":
            from streamlearn.stream.logs.kafka_oauth import token_provider

            settings["sasl_oauth_token_provider"] = token_provider(kafka.sasl)
        else:
            settings |= {"sasl_plain_username": kafka.sasl.username, "sasl_plain_password": kafka.sasl.secret()}
    return settings


def _ssl_context(kafka: KafkaConfig) -> ssl.SSLContext:
    """Load the certificates and the key; raises `AccessError` if a file is missing or wrong.

    The client would load them at every attempt to connect, and report a wrong file as a failed connection.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname = kafka.ssl_check_hostname
    for name in ("ssl_cafile", "ssl_certfile", "ssl_keyfile"):
        path = getattr(kafka, name)
        if path is not None and not path.is_file():
            raise AccessError(f"kafka.{name}: {path} is not a readable file")
    name = "ssl_cafile"
    try:
        if kafka.ssl_cafile is not None:
            context.load_verify_locations(kafka.ssl_cafile)
        else:
            context.load_default_certs()
        if kafka.ssl_certfile is not None:
            name = "ssl_certfile"
            password = "" if kafka.ssl_password is None else kafka.ssl_password.get_secret_value()
            context.load_cert_chain(kafka.ssl_certfile, kafka.ssl_keyfile, password)
    except OSError as error:  # includes SSLError
        raise AccessError(f"kafka.{name}: {getattr(kafka, name)}: {error.strerror or error}") from error
    return context


def is_refusal(error: BaseException) -> bool:
    """Return whether an error concerns authentication, permissions or certificates, so that another attempt cannot help."""
    if isinstance(error, StreamlearnError):
        return not isinstance(error, BrokerUnavailable)
    return (
        isinstance(error, PERMISSION_ERRORS) or CERTIFICATE_ERROR.search(str(error)) is not None or _is_tls_alert(error)
    )


def error_text(error: BaseException) -> str:
    """Return the message of an error (at most 300 characters) without the class names that the client puts before it."""
    return CLASS_NAMES.sub("", f"{error!s:.300}")


def _is_tls_alert(error: BaseException) -> bool:
    """Return whether the client took the beginning of a TLS alert for the length of an answer."""
    found = FRAME_LENGTH.search(str(error))
    return found is not None and int(found[1]) >> 16 == TLS_ALERT


class _ConnectionManager(KafkaConnectionManager):  # type: ignore[misc]  # the package has no types
    """Keeps the reason for which a broker refused us, and raises it instead of another attempt.

    The base class has a dictionary for this since dpkp/kafka-python#2994, but fills it only if `conn.initialize()` raises.
    In version 3.0 that method does not raise: it puts the error into `conn.init_future`.
    """

    def __init__(self, net: Any, **settings: Any) -> None:
        super().__init__(net, **settings)
        self.failure: BaseException | None = None  # the last error of any connection

    async def _connect(self, node: Any, conn: Any, **how: Any) -> None:
        conn.close_future.add_errback(self._keep_failure)
        await super()._connect(node, conn, **how)
        if conn.init_future.failed() and is_refusal(conn.init_future.exception):
            # the base class raises it at the next request for a connection to this broker
            self._auth_failures[node.node_id] = conn.init_future.exception

    async def _build_transport(self, node: Any, timeout_at: float | None = None) -> Any:
        transport = await super()._build_transport(node, timeout_at)
        receive = transport._sock_recv  # noqa: SLF001 - no public method does this

        def receive_data_first() -> tuple[bytes, Exception | None]:
            # the client ignores data if an error comes with it: a broker sends the reason of a refusal, then disconnects
            data, error = receive()
            return data, None if data else error

        transport._sock_recv = receive_data_first  # noqa: SLF001
        return transport

    def _keep_failure(self, error: BaseException) -> None:
        if not isinstance(error, kafka_errors.KafkaTimeoutError):  # the end of the bootstrap time is not a cause
            self.failure = error


def create_client(kind: type, settings: Mapping[str, Any]) -> Any:
    """Create a client that is connected, and return it.

    Raises `AccessError` or 78) if a broker refuses the connection, and `BrokerUnavailable` if no broker answers.
    """
    managers: list[_ConnectionManager] = []

    def network_client(**configs: Any) -> Any:
        network = NetworkSelector(**configs)
        managers.append(_ConnectionManager(network, **configs))
        return KafkaNetClient(network, managers[-1], **configs)

    try:
        return kind(**settings, kafka_client=network_client)
    except (StreamlearnError, kafka_errors.KafkaError, OSError) as error:
        for manager in managers:
            manager._net.close()  # noqa: SLF001 - a constructor that fails leaves its thread and sockets open
        cause = error if is_refusal(error) or not managers else managers[-1].failure or error
        raise _connection_error(cause, settings) from error


def _find_protocol_mismatch(settings: Mapping[str, Any]) -> str | None:
    """Check whether a broker that disconnects speaks TLS but we do not, or the reverse; return that as a text, or None."""
    for server in settings["bootstrap_servers"]:
        host, _, port = server.rpartition(":")
        address = host.strip("[]"), int(port)
        try:
            if settings["security_protocol"].endswith("SSL"):
                if _answers_plaintext(address):
                    return f"{server} speaks no TLS"
            elif _answers_tls(address):
                return f"{server} speaks TLS"
        except OSError:  # it disconnects here too
            continue
    return None


def _answers_plaintext(address: tuple[str, int]) -> bool:
    """Return whether a broker answers an `ApiVersions` request without TLS."""
    with socket.create_connection(address, PROTOCOL_CHECK_SECONDS) as plain, plain.makefile("rb") as answers:
        plain.sendall(API_VERSIONS_REQUEST)
        answer = answers.read(8)  # its length, and the correlation id
    return answer[4:] == struct.pack(">i", CORRELATION_ID)


def _answers_tls(address: tuple[str, int]) -> bool:
    """Return whether a broker completes a TLS handshake, whatever its certificate is."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with socket.create_connection(address, PROTOCOL_CHECK_SECONDS) as plain, context.wrap_socket(plain):
        return True


def _connection_error(cause: BaseException, settings: Mapping[str, Any]) -> StreamlearnError:
    """Return the error for a user: why there is no connection, and what to check."""
    if isinstance(cause, StreamlearnError):
        return cause
    servers, protocol = ", ".join(settings["bootstrap_servers"]), settings["security_protocol"]
    if _is_tls_alert(cause):
        return ConfigurationError(f"{servers}: kafka.security_protocol is {protocol}, but the broker speaks TLS")
    why = error_text(cause)
    if isinstance(cause, kafka_errors.UnsupportedSaslMechanismError):
        why = f"it does not offer the mechanism {settings['sasl_mechanism']}"
    if is_refusal(cause):
        return AccessError(f"{servers}: refused: {why}")
    if DISCONNECTED.search(why):
        if (mismatch := _find_protocol_mismatch(settings)) is not None:
            return ConfigurationError(f"{servers}: kafka.security_protocol is {protocol}, but {mismatch}")
        why += f"; does it speak {protocol} there (kafka.security_protocol)?"
    return BrokerUnavailable(f"{servers}: no broker answers ({why})")
