"""Connections to Apache Kafka: who we are, whom we trust, and at once the cause where the broker refuses us.

kafka-python tries a refused login again until its time is over, says no more than that, and leaves a thread behind.
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

from streamlearn.data import StreamlearnError
from streamlearn.stream.log import BrokerUnavailable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from streamlearn.config import KafkaConfig

BOOTSTRAP_MS = 5000
REQUEST_MS = 10_000

PERMISSION = (
    kafka_errors.AuthorizationError,
    kafka_errors.SaslAuthenticationFailedError,
    kafka_errors.UnsupportedSaslMechanismError,
    kafka_errors.IllegalSaslStateError,
)
# a handshake that one side ended because of a certificate; the client's error has only OpenSSL's words for it
UNTRUSTED = re.compile(r"CERTIFICATE|UNKNOWN_CA|_CERT_")
HUNG_UP = re.compile(r"WRONG_VERSION_NUMBER|UNEXPECTED_EOF|socket disconnected|reset by peer")
REPEATED = re.compile(
    r"^(\[Error \d+\] (\w+Error: )*|KafkaConnectionError: )"
)  # names of the error that say nothing more
JITTER = random.Random()  # noqa: S311 - the client's: which broker to ask first, and how long to wait
FRAME_LENGTH = re.compile(r"Invalid frame length: (\d+)")
TLS_ALERT = 0x1503  # type of the record, and the first byte of its version
PROBE_SECONDS = 3.0
CORRELATION = 0x5354  # any number: a broker's answer repeats it
ASK_VERSIONS = struct.pack(">ihhih", 10, 18, 0, CORRELATION, -1)  # ApiVersions, the first request of every client


def _draw_apart() -> None:
    """Give the client's modules a generator of their own.

    They draw in the reader's thread from Python's global generator, which is the learner's while a model learns.
    """
    # a copy: another thread may import a module meanwhile, and `list` of a dict's items is not one step
    for name, module in sys.modules.copy().items():
        if name.startswith("kafka.") and getattr(module, "random", None) is random:
            module.random = JITTER  # type: ignore[attr-defined]  # modules have any attributes


def client_settings(kafka: KafkaConfig) -> dict[str, Any]:
    """Return the connection settings that consumer, producer and admin client share; raises `StreamlearnError` (77)."""
    _draw_apart()
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
        settings["ssl_context"] = _trust(kafka)
    if kafka.sasl is not None and kafka.security_protocol.startswith("SASL"):
        settings["sasl_mechanism"] = kafka.sasl.mechanism
        if kafka.sasl.mechanism == "OAUTHBEARER":
            from streamlearn.stream.oauth import token_provider

            settings["sasl_oauth_token_provider"] = token_provider(kafka.sasl)
        else:
            settings |= {"sasl_plain_username": kafka.sasl.username, "sasl_plain_password": kafka.sasl.secret()}
    return settings


def _trust(kafka: KafkaConfig) -> ssl.SSLContext:
    """Return whom we trust and who we are, read once: the client would read it at every attempt."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname = kafka.ssl_check_hostname
    for name in ("ssl_cafile", "ssl_certfile", "ssl_keyfile"):
        path = getattr(kafka, name)
        if path is not None and not path.is_file():
            raise StreamlearnError(f"kafka.{name}: {path} is not a readable file", code=77)
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
    except OSError as error:  # an SSLError is one
        raise StreamlearnError(f"kafka.{name}: {getattr(kafka, name)}: {error.strerror or error}", code=77) from error
    return context


def is_refusal(error: BaseException) -> bool:
    """Tell whether an error is of who we are or whom we trust, so that to try again only makes it worse."""
    if isinstance(error, StreamlearnError):
        return not isinstance(error, BrokerUnavailable)
    return isinstance(error, PERMISSION) or UNTRUSTED.search(str(error)) is not None or _speaks_tls(error)


def reason(error: BaseException) -> str:
    """Return what an error says, without the client's names for it."""
    return REPEATED.sub("", f"{error!s:.300}")


def _speaks_tls(error: BaseException) -> bool:
    """Tell whether what came for the length of an answer is the beginning of a TLS alert."""
    found = FRAME_LENGTH.search(str(error))
    return found is not None and int(found[1]) >> 16 == TLS_ALERT


class _Connections(KafkaConnectionManager):  # type: ignore[misc]  # the package has no types
    """Keeps what refused us, for each broker, as its base class means to: that one forgets it, and asks again."""

    def __init__(self, net: Any, **settings: Any) -> None:
        super().__init__(net, **settings)
        self.failure: BaseException | None = None  # the last one

    async def _connect(self, node: Any, conn: Any, **how: Any) -> None:
        conn.close_future.add_errback(self._remember)
        await super()._connect(node, conn, **how)
        if conn.init_future.failed() and is_refusal(conn.init_future.exception):
            self._auth_failures[node.node_id] = (
                conn.init_future.exception
            )  # raised where this broker is asked for again

    async def _build_transport(self, node: Any, timeout_at: float | None = None) -> Any:
        transport = await super()._build_transport(node, timeout_at)
        receive = transport._sock_recv  # noqa: SLF001 - it drops what comes together with the end: a refusal's reason

        def received() -> tuple[bytes, Exception | None]:
            data, error = receive()
            return data, None if data else error

        transport._sock_recv = received  # noqa: SLF001
        return transport

    def _remember(self, error: BaseException) -> None:
        if not isinstance(error, kafka_errors.KafkaTimeoutError):  # the end of the time to try is no cause
            self.failure = error


def connected(kind: type, settings: Mapping[str, Any]) -> Any:
    """Return a client, or raise `StreamlearnError` (77, 78) where the broker refused and `BrokerUnavailable` where none is."""
    made: list[_Connections] = []

    def client(**configs: Any) -> Any:
        network = NetworkSelector(**configs)
        made.append(_Connections(network, **configs))
        return KafkaNetClient(network, made[-1], **configs)

    try:
        return kind(**settings, kafka_client=client)
    except (StreamlearnError, kafka_errors.KafkaError, OSError) as error:
        for connections in made:
            connections._net.close()  # noqa: SLF001 - a constructor that fails leaves its thread and sockets behind
        cause = error if is_refusal(error) or not made else made[-1].failure or error
        raise _told(cause, settings) from error


def _other_protocol(settings: Mapping[str, Any]) -> str | None:
    """Return that a broker which hangs up on us speaks the other protocol, or None where none shows that it does."""
    for server in settings["bootstrap_servers"]:
        host, _, port = server.rpartition(":")
        address = host.strip("[]"), int(port)
        try:
            if settings["security_protocol"].endswith("SSL"):
                if _answers_plainly(address):
                    return f"{server} speaks no TLS"
            elif _answers_tls(address):
                return f"{server} speaks TLS"
        except OSError:  # it hangs up on this, too
            continue
    return None


def _answers_plainly(address: tuple[str, int]) -> bool:
    """Tell whether a broker answers Kafka's first request without TLS."""
    with socket.create_connection(address, PROBE_SECONDS) as plain, plain.makefile("rb") as answers:
        plain.sendall(ASK_VERSIONS)
        answer = answers.read(8)  # its length, and the number of the request
    return answer[4:] == struct.pack(">i", CORRELATION)


def _answers_tls(address: tuple[str, int]) -> bool:
    """Tell whether a broker answers a TLS greeting; whether we would trust it is not asked."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with socket.create_connection(address, PROBE_SECONDS) as plain, context.wrap_socket(plain):
        return True


def _told(cause: BaseException, settings: Mapping[str, Any]) -> StreamlearnError:
    """Return why there is no connection, for people."""
    if isinstance(cause, StreamlearnError):
        return cause
    servers, protocol = ", ".join(settings["bootstrap_servers"]), settings["security_protocol"]
    if _speaks_tls(cause):
        return StreamlearnError(f"{servers}: kafka.security_protocol is {protocol}, but the broker speaks TLS", code=78)
    why = reason(cause)
    if isinstance(cause, kafka_errors.UnsupportedSaslMechanismError):
        why = f"it does not offer the mechanism {settings['sasl_mechanism']}"
    if is_refusal(cause):
        return StreamlearnError(f"{servers}: refused: {why}", code=77)
    if HUNG_UP.search(why):
        if (other := _other_protocol(settings)) is not None:
            return StreamlearnError(f"{servers}: kafka.security_protocol is {protocol}, but {other}", code=78)
        why += f"; does it speak {protocol} there (kafka.security_protocol)?"
    return BrokerUnavailable(f"{servers}: no broker answers ({why})")
