"""A real broker as a shop has it: TLS by a CA of its own, SASL/SCRAM, and a right for each thing.

with SecuredBroker() as broker:
    broker.add_user("bellwether", "a password")
    broker.allow("bellwether", ("TOPIC", "events", "READ"), ("GROUP", "bellwether-learner", "READ"))
    open_log(broker.secured_url, broker.settings("bellwether", "a password"))

At `broker.plain_url` there is no TLS, no password is asked, and everything is allowed. At `broker.expired_url` the
broker's certificate has expired.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from confluent_kafka.admin import (
    AclBinding,
    AclOperation,
    AclPermissionType,
    AdminClient,
    ResourcePatternType,
    ResourceType,
    ScramCredentialInfo,
    ScramMechanism,
    UserScramCredentialUpsertion,
)

from tests.kafka_broker import KafkaBroker, free_ports

_FIXED = {
    "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
    "super.users": "User:ANONYMOUS",  # who comes without a password; of the tests' own
    "sasl.enabled.mechanisms": "SCRAM-SHA-512",
    "ssl.keystore.type": "PEM",
    "inter.broker.listener.name": "PLAINTEXT",
    "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT,SECURED:SASL_SSL,EXPIRED:SASL_SSL",
}
_LOGIN = "org.apache.kafka.common.security.scram.ScramLoginModule required;"


class SecuredBroker(KafkaBroker):
    """See the module. folder: for keys and certificates."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        make_ca(folder, "ca")
        make_ca(folder, "another-ca")
        make_certificate(folder, "broker", days=3650)
        make_certificate(folder, "expired", days=-1)
        plain, controller, secured, expired = free_ports(4)
        here = "127.0.0.1:"
        super().__init__(
            {
                **_FIXED,
                "controller.quorum.bootstrap.servers": f"{here}{controller}",
                "listeners": f"PLAINTEXT://{here}{plain},CONTROLLER://{here}{controller},"
                f"SECURED://{here}{secured},EXPIRED://{here}{expired}",
                "advertised.listeners": f"PLAINTEXT://{here}{plain},SECURED://{here}{secured},"
                f"EXPIRED://{here}{expired}",
                "listener.name.secured.ssl.keystore.location": str(folder / "broker.both.pem"),
                "listener.name.expired.ssl.keystore.location": str(folder / "expired.both.pem"),
                "listener.name.secured.scram-sha-512.sasl.jaas.config": _LOGIN,
                "listener.name.expired.scram-sha-512.sasl.jaas.config": _LOGIN,
            }
        )
        self.plain_url, self.secured_url = f"kafka://{here}{plain}", f"kafka://{here}{secured}"
        self.expired_url = f"kafka://{here}{expired}"
        self._bootstrap = f"{here}{plain}"

    def add_user(self, name: str, password: str) -> None:
        """Or give the user this password."""
        info = ScramCredentialInfo(ScramMechanism.SCRAM_SHA_512, 4096)
        new = UserScramCredentialUpsertion(name, info, password.encode())
        admin = AdminClient({"bootstrap.servers": self._bootstrap})  # it must live until it is answered
        for future in admin.alter_user_scram_credentials([new]).values():
            future.result(10)

    def allow(self, user: str, *rights: tuple[str, str, str]) -> None:
        """Rights are (TOPIC or GROUP, name, operation)."""
        admin = AdminClient({"bootstrap.servers": self._bootstrap})
        for future in admin.create_acls([_acl(user, *right) for right in rights]).values():
            future.result(10)

    def settings(self, user: str, password: str, ca: str = "ca") -> dict[str, str]:
        """What a client of the secured listener needs."""
        return {
            "security.protocol": "SASL_SSL",
            "sasl.mechanism": "SCRAM-SHA-512",
            "sasl.username": user,
            "sasl.password": password,
            "ssl.ca.location": str(self.folder / f"{ca}.pem"),
        }

    def failed_logins(self) -> int:
        """Connections that the broker turned away so far."""
        return len(re.findall(rb"Failed authentication with", self._log.read_bytes()))


def _acl(user: str, kind: str, name: str, operation: str) -> AclBinding:
    return AclBinding(
        ResourceType[kind],
        name,
        ResourcePatternType.LITERAL,
        f"User:{user}",
        "*",
        AclOperation[operation],
        AclPermissionType.ALLOW,
    )


def make_ca(folder: Path, name: str) -> None:
    """NAME.pem and NAME.key."""
    _openssl(folder, f"req -x509 {_KEY} -keyout {name}.key -out {name}.pem -days 3650 -subj /CN={name}")


def make_certificate(folder: Path, name: str, days: int) -> None:
    """NAME.pem for 127.0.0.1, signed by `ca`, and with its key NAME.both.pem; days: valid for so long, < 0: it was."""
    _openssl(folder, f"req {_KEY} -keyout {name}.key -out {name}.csr -subj /CN={name}")
    (folder / "names").write_text("subjectAltName=IP:127.0.0.1\n")
    signed = f"-CA ca.pem -CAkey ca.key -CAcreateserial -days {days} -extfile names"
    _openssl(folder, f"x509 -req -in {name}.csr {signed} -out {name}.pem")
    both = (folder / f"{name}.key").read_text() + (folder / f"{name}.pem").read_text()
    (folder / f"{name}.both.pem").write_text(both)


_KEY = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes"


def _openssl(folder: Path, arguments: str) -> None:
    subprocess.run(["openssl", *arguments.split()], cwd=folder, check=True, capture_output=True)
