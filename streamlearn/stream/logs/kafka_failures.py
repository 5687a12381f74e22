"""What the errors of kafka-python mean: refused, temporary, or an answer that cannot be read."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from kafka import errors as kafka_errors

from streamlearn.core.errors import AccessError, StreamlearnError
from streamlearn.stream.logs.base import BrokerUnavailable, Unreadable

if TYPE_CHECKING:
    from collections.abc import Mapping

PERMISSION_ERRORS = (
    kafka_errors.AuthorizationError,
    kafka_errors.SaslAuthenticationFailedError,
    kafka_errors.UnsupportedSaslMechanismError,
    kafka_errors.IllegalSaslStateError,
)
# errors that end by themselves or after the client connects again; any other error is shown to the user
TEMPORARY_ERRORS = (
    kafka_errors.RetriableError,
    kafka_errors.BrokerNotAvailableError,
    kafka_errors.KafkaProtocolError,
    kafka_errors.UnknownBrokerIdError,
    kafka_errors.IllegalStateError,
    kafka_errors.NoOffsetForPartitionError,
)
LOG_CHANGED_ERRORS = (kafka_errors.OffsetOutOfRangeError, kafka_errors.LogTruncationError)
# parts of OpenSSL's messages if a TLS handshake failed because of a certificate; the client has no error class for it
CERTIFICATE_ERROR = re.compile(r"CERTIFICATE|UNKNOWN_CA|_CERT_")
# class names that the client puts before a message
CLASS_NAMES = re.compile(r"^(\[Error \d+\] (\w+Error: )*|KafkaConnectionError: )")
FRAME_LENGTH = re.compile(r"Invalid frame length: (\d+)")
TLS_ALERT = 0x1503  # the first two bytes of a TLS alert: record type 21, major version 3


def is_refusal(error: BaseException) -> bool:
    """Return whether an error concerns authentication, permissions or certificates, so that another attempt cannot help."""
    if isinstance(error, StreamlearnError):
        return not isinstance(error, BrokerUnavailable)
    return (
        isinstance(error, PERMISSION_ERRORS) or CERTIFICATE_ERROR.search(str(error)) is not None or is_tls_alert(error)
    )


def error_text(error: BaseException) -> str:
    """Return the message of an error (at most 300 characters) without the class names that the client puts before it."""
    return CLASS_NAMES.sub("", f"{error!s:.300}")


def is_tls_alert(error: BaseException) -> bool:
    """Return whether the client took the beginning of a TLS alert for the length of an answer."""
    found = FRAME_LENGTH.search(str(error))
    return found is not None and int(found[1]) >> 16 == TLS_ALERT


def permission_error(error: kafka_errors.KafkaError) -> AccessError:
    """Return the error for a user that says which permission is missing."""
    names = error.args[0] if error.args else ""
    what = ", ".join(sorted(names)) if isinstance(names, set) else str(names)
    if isinstance(error, kafka_errors.GroupAuthorizationFailedError):
        return AccessError(f"group {what}: no permission to commit offsets for it (READ)")
    if isinstance(error, kafka_errors.TopicAuthorizationFailedError):
        return AccessError(f"topic {what}: no permission (READ and DESCRIBE are needed)")
    return AccessError(f"refused: {error_text(error)}")


def translate_error(error: kafka_errors.KafkaError) -> StreamlearnError:
    """Return our error for one of the client's: a missing permission, an outage, or an answer that cannot be read."""
    if isinstance(error, PERMISSION_ERRORS):
        return permission_error(error)
    if isinstance(error, LOG_CHANGED_ERRORS):
        # connecting again makes the reader compare topic ids and bounds before it reads another record
        return BrokerUnavailable(f"the log has changed: {type(error).__name__}")
    text = f"{type(error).__name__}: {error_text(error):.160}"
    return (
        BrokerUnavailable(text)
        if isinstance(error, TEMPORARY_ERRORS)
        else Unreadable(f"the broker answers with {text}")
    )


def is_allowed(topic: Mapping[str, Any], operation: str) -> bool:
    """Return whether a broker's description of a topic allows us an operation; true if an old broker does not say."""
    operations = topic.get("authorized_operations")
    return operations is None or operation in operations
