"""Sections `kafka` and `embedded`: where the topics are, and how to connect."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, field_validator
from pydantic_core import PydanticCustomError

from streamlearn.core.errors import AccessError
from streamlearn.core.section import Int, Seconds, Section

if TYPE_CHECKING:
    from collections.abc import Iterator

    from streamlearn.core.section import Violations


TOKEN_URL = re.compile(r"https?://[^\s/@?#]+(/[^\s@#]*)?")
SERVER = re.compile(r"([A-Za-z_]+://)?(\[[^\s\[\]]+\]|[^\s:/\[\]]+)(:[0-9]{1,5})?|[0-9a-fA-F:.]+(%\w+)?")


class SaslConfig(Section):
    """Credentials. A password or client secret comes from the environment or from a file, never from the YAML file."""

    mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER"] = Field(
        "SCRAM-SHA-512", description="SASL mechanism: how the client authenticates"
    )
    username: str | None = Field(None, description="user name; not accepted with OAUTHBEARER")
    password: SecretStr | None = Field(
        None,
        min_length=1,
        description="password of the user: set STREAMLEARN__KAFKA__SASL__PASSWORD in the environment, never in this file",
    )
    password_file: Path | None = Field(None, description="file that contains the password")
    token_url: str | None = Field(None, description="OAUTHBEARER: URL that issues tokens for client credentials")
    client_id: str | None = Field(None, min_length=1, description="OAUTHBEARER: id of the client that asks for tokens")
    client_secret: SecretStr | None = Field(
        None,
        min_length=1,
        description="OAUTHBEARER: secret of the client: set STREAMLEARN__KAFKA__SASL__CLIENT_SECRET in the environment",
    )
    client_secret_file: Path | None = Field(None, description="OAUTHBEARER: file that contains the client secret")
    scope: str | None = Field(
        None, min_length=1, description="OAUTHBEARER: scope of the tokens; default: the server decides"
    )

    @field_validator("token_url")
    @classmethod
    def _is_url(cls, value: str | None) -> str | None:
        if value is not None and not (TOKEN_URL.fullmatch(value) and _has_valid_port(value)):
            raise PydanticCustomError(
                "url", "expected https://HOST/PATH or http://HOST/PATH, without credentials in it"
            )
        return value

    def rules(self) -> Iterator[Violations]:
        yield self._has_password()
        yield self._has_client()

    def _has_password(self) -> Violations:
        if self.mechanism == "OAUTHBEARER":
            yield from self._not_accepted("username", "password", "password_file")
            return
        if self.username is None:
            yield "username", f"mechanism {self.mechanism} needs a username"
        if self.password is None and self.password_file is None:
            yield "", "no password: set STREAMLEARN__KAFKA__SASL__PASSWORD in the environment, or password_file"

    def _has_client(self) -> Violations:
        if self.mechanism != "OAUTHBEARER":
            yield from self._not_accepted("token_url", "client_id", "client_secret", "client_secret_file", "scope")
            return
        for key in ("token_url", "client_id"):
            if getattr(self, key) is None:
                yield key, f"mechanism OAUTHBEARER needs a {key}"
        if self.client_secret is None and self.client_secret_file is None:
            name = "STREAMLEARN__KAFKA__SASL__CLIENT_SECRET"
            yield "", f"no client secret: set {name} in the environment, or client_secret_file"

    def _not_accepted(self, *keys: str) -> Violations:
        for key in keys:
            if getattr(self, key) is not None:
                yield key, f"not accepted with mechanism {self.mechanism}"

    def secret(self) -> str:
        """Return the password or the client secret. Raises `AccessError` if its file is empty or cannot be read."""
        key = "client_secret" if self.mechanism == "OAUTHBEARER" else "password"
        if (secret := getattr(self, key)) is not None:
            return str(secret.get_secret_value())
        key += "_file"
        path = getattr(self, key)
        try:
            text = Path(str(path)).read_text().rstrip("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise AccessError(f"kafka.sasl.{key}: {error}") from error
        if not text:
            raise AccessError(f"kafka.sasl.{key}: {path} is empty")
        return text


def _has_valid_port(url: str) -> bool:
    try:
        return urlsplit(url).port != 0
    except ValueError:
        return False


class KafkaConfig(Section):
    """How to connect to the brokers. The security keys have the names that kafka-python gives them."""

    bootstrap_servers: list[str] = Field(
        min_length=1,
        description="HOST:PORT of one or more brokers, as a list or as text with commas; these name all other brokers",
    )
    client_id: str = Field("streamlearn", description="name of this client in the brokers' logs and quotas")
    group_id: str | None = Field(
        None, description="group to which positions are reported, for lag graphs only; default: streamlearn.<name>"
    )
    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = Field(
        "PLAINTEXT",
        description="whether the connection is encrypted (SSL), and whether the client authenticates (SASL)",
    )
    ssl_cafile: Path | None = Field(
        None, description="PEM file of the certificate authorities to trust; default: the system's authorities"
    )
    ssl_certfile: Path | None = Field(
        None, description="PEM file of this client's certificate, if the brokers ask for one"
    )
    ssl_keyfile: Path | None = Field(None, description="PEM file of the private key of ssl_certfile")
    ssl_password: SecretStr | None = Field(
        None,
        min_length=1,
        description="password of ssl_keyfile: set STREAMLEARN__KAFKA__SSL_PASSWORD in the environment, never in this file",
    )
    ssl_check_hostname: bool = Field(default=True, description="refuse a broker whose certificate names another host")
    sasl: SaslConfig | None = None
    isolation_level: Literal["read_committed", "read_uncommitted"] = Field(
        "read_committed",
        description="transactions: read only committed records, or read all records at once, even if they are aborted later",
    )
    metadata_refresh_seconds: Seconds = Field(
        10.0, description="seconds between two searches for new topics and partitions"
    )
    replication_factor: Int = Field(
        -1,
        ge=-1,
        le=32767,
        description="replication factor of the dead-letter topic if it is created here; -1: the broker's default",
    )

    @field_validator("bootstrap_servers", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value

    @field_validator("bootstrap_servers")
    @classmethod
    def _are_servers(cls, value: list[str]) -> list[str]:
        for server in value:
            if not SERVER.fullmatch(server.strip()):
                raise PydanticCustomError("server", "expected host:port, got {server}", {"server": server})
        return value

    def rules(self) -> Iterator[Violations]:
        yield self._has_sasl()

    def _has_sasl(self) -> Violations:
        authenticates = self.security_protocol.startswith("SASL")
        if authenticates and self.sasl is None:
            yield "sasl", f"security_protocol {self.security_protocol} needs a sasl section"
        if not authenticates and self.sasl is not None:
            yield (
                "sasl",
                f"a sasl section needs security_protocol SASL_SSL or SASL_PLAINTEXT, not {self.security_protocol}",
            )


class EmbeddedConfig(Section):
    """Topics in one SQLite file, for trying streamlearn without a Kafka broker."""

    path: Path = Field(
        Path("state/topics.sqlite"),
        description="SQLite file that contains the topics; it is created if it does not exist",
    )
