"""Apache Kafka with a SASL_SSL listener, users and ACLs. Its PLAINTEXT listener is for the operator, who may do all."""

from __future__ import annotations

import signal
import subprocess
from typing import TYPE_CHECKING, Any

from kafka import KafkaAdminClient
from kafka.admin import (
    ACL,
    ACLFilter,
    ACLOperation,
    ACLPermissionType,
    ACLResourcePatternType,
    ResourcePattern,
    ResourcePatternFilter,
    ResourceType,
    ScramMechanism,
    UserScramCredentialUpsertion,
)

from benchmarks.kafka_broker import KafkaBroker, free_port
from tests.support.relay import Relay

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

HOST = "localhost"  # the only name in the broker's certificate
MODULES = "org.apache.kafka.common.security"


class SecureBroker(KafkaBroker):
    """A broker with users. For OAUTHBEARER it accepts any unsigned token whose subject is a user's name."""

    def __init__(self, directory: Path, users: Mapping[str, str], **settings: Any) -> None:
        super().__init__(directory)
        self.users = users
        self.settings = settings
        self.secure_port = free_port()
        self.relay = Relay(self.secure_port)  # all connections of users pass it, so that they can be counted
        self.authority = directory / "ca.pem"
        self._admin: Any = None

    @property
    def secure(self) -> str:
        """The bootstrap server for users."""
        return f"{HOST}:{self.relay.port}"

    def start(self) -> None:
        if not self.authority.exists():
            self.directory.mkdir(parents=True, exist_ok=True)
            make_certificates(self.directory)
        super().start()

    def kill(self) -> None:
        self.relay.close()
        super().kill()

    def stop(self, sig: int = signal.SIGTERM) -> None:
        if self._admin is not None:
            self._admin.close()
            self._admin = None
        super().stop(sig)

    @property
    def admin(self) -> Any:
        """The operator's admin client."""
        if self._admin is None:
            self._admin = KafkaAdminClient(bootstrap_servers=self.address)
        return self._admin

    def allow(self, user: str, kind: str, name: str, *operations: str) -> None:
        """Give a user a permission for a topic, a group or the cluster."""
        pattern = ResourcePattern(ResourceType[kind], name)
        rules = [
            ACL(f"User:{user}", "*", ACLOperation[operation], ACLPermissionType.ALLOW, pattern)
            for operation in operations
        ]
        self.admin.create_acls(rules)

    def withdraw(self, user: str, kind: str, name: str, operation: str) -> None:
        """Withdraw a permission from a user."""
        pattern = ResourcePatternFilter(ResourceType[kind], name, ACLResourcePatternType.LITERAL)
        self.admin.delete_acls(
            [ACLFilter(f"User:{user}", "*", ACLOperation[operation], ACLPermissionType.ALLOW, pattern)]
        )

    def change_password(self, user: str, password: str) -> None:
        """Change a user's password for SCRAM-SHA-512."""
        change = UserScramCredentialUpsertion(user, ScramMechanism.SCRAM_SHA_512, password.encode())
        self.admin.alter_user_scram_credentials([change])

    def format_options(self) -> list[str]:
        added = [f"SCRAM-SHA-512=[name={user},password={password}]" for user, password in self.users.items()]
        return [part for one in added for part in ("-S", one)]

    def properties(self) -> dict[str, object]:
        lines = super().properties()
        name = "listener.name.sasl_ssl"
        plain = " ".join(f'user_{user}="{password}"' for user, password in self.users.items())
        return lines | {
            "listeners": f"{lines['listeners']},SASL_SSL://127.0.0.1:{self.secure_port}",
            "advertised.listeners": f"{lines['advertised.listeners']},SASL_SSL://{self.secure}",
            "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT,SASL_SSL:SASL_SSL",
            f"{name}.sasl.enabled.mechanisms": "PLAIN,SCRAM-SHA-512,OAUTHBEARER",
            f"{name}.plain.sasl.jaas.config": f"{MODULES}.plain.PlainLoginModule required {plain};",
            f"{name}.scram-sha-512.sasl.jaas.config": f"{MODULES}.scram.ScramLoginModule required;",
            f"{name}.oauthbearer.sasl.jaas.config": f"{MODULES}.oauthbearer.OAuthBearerLoginModule required "
            'unsecuredLoginStringClaim_sub="broker";',
            f"{name}.ssl.keystore.type": "PEM",
            f"{name}.ssl.keystore.location": self.directory / "broker.pem",
            "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
            "super.users": "User:ANONYMOUS",
            **self.settings,
        }


def make_certificates(directory: Path) -> None:
    """Write an authority's certificate, `ca.pem`, and the broker's key and certificate, `broker.pem`."""
    subject = f"/CN={HOST}"
    key, request, certificate = directory / "broker.key", directory / "broker.csr", directory / "broker.crt"
    names = directory / "names"
    names.write_text(f"subjectAltName=DNS:{HOST}\n")
    authority = ["-CA", str(directory / "ca.pem"), "-CAkey", str(directory / "ca.key"), "-CAcreateserial"]
    make_authority(directory / "ca")
    _openssl(
        "req", "-new", "-nodes", "-newkey", "rsa:2048", "-keyout", str(key), "-out", str(request), "-subj", subject
    )
    _openssl(
        "x509", "-req", "-in", str(request), *authority, "-days", "2", "-extfile", str(names), "-out", str(certificate)
    )
    (directory / "broker.pem").write_text(key.read_text() + certificate.read_text())


def make_authority(path: Path) -> Path:
    """Write the key and certificate of a certificate authority; return the certificate's path."""
    certificate = path.with_suffix(".pem")
    files = ["-keyout", str(path.with_suffix(".key")), "-out", str(certificate)]
    _openssl("req", "-x509", "-nodes", "-newkey", "rsa:2048", *files, "-days", "2", "-subj", "/CN=authority of tests")
    return certificate


def _openssl(*arguments: str) -> None:
    done = subprocess.run(["openssl", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
