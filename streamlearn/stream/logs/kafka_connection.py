"""Connect to Apache Kafka: authentication, TLS, and an error that names the cause as soon as a broker refuses us."""

from __future__ import annotations

import re
import socket
import ssl
import struct
from typing import TYPE_CHECKING, Any

from kafka import errors as kafka_errors
from kafka.net.compat import KafkaNetClient
from kafka.net.selector import NetworkSelector

from streamlearn.core.errors import AccessError, ConfigurationError, StreamlearnError
from streamlearn.stream.logs.base import BrokerUnavailable
from streamlearn.stream.logs.kafka_failures import error_text, is_refusal, is_tls_alert
from streamlearn.stream.logs.kafka_python import ConnectionManager, use_own_random_generator

if TYPE_CHECKING:
    from collections.abc import Mapping

    from streamlearn.stream.logs.config import KafkaConfig

BOOTSTRAP_MS = 5000
REQUEST_MS = 10_000
DISCONNECTED = re.compile(r"WRONG_VERSION_NUMBER|UNEXPECTED_EOF|socket disconnected|reset by peer")
PROTOCOL_CHECK_SECONDS = 3.0
CORRELATION_ID = 0x5354  # any number; a broker repeats it in its answer
API_VERSIONS_REQUEST = struct.pack(">ihhih", 10, 18, 0, CORRELATION_ID, -1)  # the first request of every client


def client_settings(kafka: KafkaConfig) -> dict[str, Any]:
    """Return the connection settings that consumer, producer and admin client share; raises `AccessError`."""
    use_own_random_generator()
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


def create_client(kind: type, settings: Mapping[str, Any]) -> Any:
    """Create a client that is connected, and return it.

    Raises `AccessError` or `ConfigurationError` if a broker refuses the connection, and `BrokerUnavailable` if none answers.
    """
    managers: list[ConnectionManager] = []

    def network_client(**configs: Any) -> Any:
        network = NetworkSelector(**configs)
        managers.append(ConnectionManager(network, **configs))
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
        try:
            address = host.strip("[]"), int(port)
            if settings["security_protocol"].endswith("SSL"):
                if _answers_plaintext(address):
                    return f"{server} speaks no TLS"
            elif _answers_tls(address):
                return f"{server} speaks TLS"
        except (OSError, ValueError):  # it disconnects here too, or the server has no port
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
    if is_tls_alert(cause):
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
