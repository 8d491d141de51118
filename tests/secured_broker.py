"""A broker that asks who one is, and lets nobody do what was not granted.

Its listener without a login stays, on loopback, for the superuser of the tests. Users and rights
are changed through Kafka's own protocol, which takes effect within milliseconds.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import trustme
from aiokafka.client import AIOKafkaClient
from aiokafka.errors import for_code
from aiokafka.protocol.admin import CreateAclsRequest, DeleteAclsRequest
from aiokafka.protocol.api import Request, RequestStruct, Response
from aiokafka.protocol.types import (
    CompactArray,
    CompactBytes,
    CompactString,
    Int8,
    Int16,
    Int32,
    Schema,
    TaggedFields,
)
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from brokers import quiet_ports
from splitferry_cli.broker import LocalBroker
from splitferry_cli.kafka_process import HOST
from splitferry_protocol.connection import ConnectionSettings

PASSWORD = "s3cr3t-Tr0ub4dor"
"""Of every user, unless a test gives another."""
REAUTH_MS = 2000
"""How long a login counts on the listener RELOGIN."""

LISTENERS = {
    "PASSWORD": "SASL_PLAINTEXT",
    "RELOGIN": "SASL_PLAINTEXT",
    "PASSWORDTLS": "SASL_SSL",
    "CERTIFICATE": "SSL",
    "RELAYED": "SSL",
}
MECHANISMS = {"SCRAM-SHA-256": (1, "sha256"), "SCRAM-SHA-512": (2, "sha512")}
ITERATIONS = 4096

OPERATIONS = {
    "Read": 3, "Write": 4, "Create": 5, "Describe": 8, "DescribeConfigs": 10, "IdempotentWrite": 12
}  # fmt: skip
RESOURCES = {"topic": 2, "group": 3, "cluster": 4, "transactional id": 5}
_LITERAL, _PREFIXED = 3, 4
_ALLOW = 3


class Grant(NamedTuple):
    """A right as ACLs have it. A `name` that ends with `*` covers all that begin so."""

    operation: str
    resource: str
    name: str


EVERYTHING = [
    *(Grant(right, "topic", "test-*") for right in ("Read", "Write", "DescribeConfigs")),
    Grant("Read", "group", "test-*"),
    Grant("Write", "transactional id", "test-*"),
]
"""For who is not tested for rights: `make_topics` names topics so, and `stage` groups."""


@dataclass(frozen=True)
class Identity:
    """Files of a certificate and its key."""

    certfile: Path
    keyfile: Path

    def replace(self, other: Identity) -> None:
        """Take the place of another on the disk."""
        self.keyfile.replace(other.keyfile)
        self.certfile.replace(other.certfile)


class SecuredBroker(LocalBroker):
    """Attributes: `ports`, by the names of LISTENERS, where RELAYED is for a Proxy,
    which passes it on to `relayed`; `ca`, which signs what the broker trusts."""

    def __init__(self, data: Path, users: Iterable[str]) -> None:
        """`users` may log in with PLAIN; those with SCRAM are made by `add_user`."""
        super().__init__(data)
        self.ca = trustme.CA()
        self.cafile = data / "ca.pem"
        self._users = list(users)
        self._identities = 0
        names = [*LISTENERS, "relayed"]
        self.ports = dict(zip(names, quiet_ports(len(names)), strict=True))
        self.relayed = self.ports.pop("relayed")

    def _settings(self, clients: str, controller: str) -> dict[str, str]:
        self.cafile.write_bytes(self.ca.cert_pem.bytes())
        own = self.identity("broker", HOST)
        store = own.certfile.with_name("store.pem")
        key = load_pem_private_key(own.keyfile.read_bytes(), None)
        pkcs8 = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        store.write_bytes(pkcs8 + own.certfile.read_bytes())
        told = super()._settings(clients, controller)
        bound = {**self.ports, "RELAYED": self.relayed}
        for name, ports in (("listeners", bound), ("advertised.listeners", self.ports)):
            told[name] += "".join(f",{one}://{HOST}:{number}" for one, number in ports.items())
        protocols = ",".join(f"{name}:{protocol}" for name, protocol in LISTENERS.items())
        told["listener.security.protocol.map"] += f",{protocols}"
        plain = " ".join(f'user_{user}="{PASSWORD}"' for user in self._users)
        for name, protocol in LISTENERS.items():
            if not protocol.startswith("SASL"):
                continue
            told[f"listener.name.{name.lower()}.sasl.enabled.mechanisms"] = (
                "PLAIN,SCRAM-SHA-256,SCRAM-SHA-512"
            )
            jaas = f"listener.name.{name.lower()}.{{}}.sasl.jaas.config"
            module = "org.apache.kafka.common.security"
            told[jaas.format("plain")] = f"{module}.plain.PlainLoginModule required {plain};"
            for mechanism in MECHANISMS:
                told[jaas.format(mechanism.lower())] = f"{module}.scram.ScramLoginModule required;"
        return told | {
            "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
            "super.users": "User:ANONYMOUS",
            "listener.name.relogin.connections.max.reauth.ms": str(REAUTH_MS),
            **{
                f"listener.name.{name}.ssl.{setting}": value
                for name in ("certificate", "relayed")
                for setting, value in (
                    ("client.auth", "required"),
                    ("principal.mapping.rules", "RULE:^CN=([^,]*).*$/$1/"),
                )
            },
            "ssl.keystore.type": "PEM",
            "ssl.keystore.location": str(store),
            "ssl.truststore.type": "PEM",
            "ssl.truststore.location": str(self.cafile),
        }

    # ---- who one is

    def identity(
        self,
        user: str,
        *names: str,
        ca: trustme.CA | None = None,
        lifetime: float = 3600,
    ) -> Identity:
        """A certificate of `user`, valid for `lifetime` seconds from now (negative: no more)."""
        self._identities += 1
        directory = self.data / f"identity-{self._identities}"
        directory.mkdir(parents=True)
        now = dt.datetime.now(dt.UTC)
        made = (ca or self.ca).issue_cert(
            *(names or (f"{user}.test",)),
            common_name=user,
            not_before=now - dt.timedelta(days=1),
            not_after=now + dt.timedelta(seconds=lifetime),
        )
        identity = Identity(*(directory / f"{part}.pem" for part in ("cert", "key")))
        identity.certfile.write_bytes(b"".join(blob.bytes() for blob in made.cert_chain_pems))
        identity.keyfile.write_bytes(made.private_key_pem.bytes())
        return identity

    def address(self, listener: str) -> str:
        return f"{HOST}:{self.ports[listener]}"

    def login(
        self, user: str, mechanism: str = "PLAIN", listener: str = "PASSWORD"
    ) -> ConnectionSettings:
        """How `user` connects with the password."""
        tls = LISTENERS[listener] == "SASL_SSL"
        return ConnectionSettings(
            self.address(listener),
            LISTENERS[listener],
            mechanism,
            user,
            PASSWORD,
            ssl_cafile=str(self.cafile) if tls else None,
        )

    def certified(self, own: Identity, listener: str = "CERTIFICATE") -> ConnectionSettings:
        """How the owner of a certificate connects."""
        return ConnectionSettings(
            self.address(listener),
            "SSL",
            ssl_cafile=str(self.cafile),
            ssl_certfile=str(own.certfile),
            ssl_keyfile=str(own.keyfile),
        )

    async def add_user(self, user: str, password: str = PASSWORD) -> None:
        """Let `user` log in with SCRAM."""
        for mechanism, digest in MECHANISMS.values():
            salt = os.urandom(16)
            salted = hashlib.pbkdf2_hmac(digest, password.encode(), salt, ITERATIONS)
            await self._alter_users([], [(user, mechanism, ITERATIONS, salt, salted, {})])

    async def remove_user(self, user: str) -> None:
        """Refuse `user` from the next login with SCRAM on."""
        for mechanism, _ in MECHANISMS.values():
            await self._alter_users([(user, mechanism, {})], [])

    async def _alter_users(self, gone: list[Any], made: list[Any]) -> None:
        response: Any = await self._ask(_AlterScram(gone, made))
        for _, code, message, _ in response.results:
            assert code == 0, message

    # ---- what one may

    async def grant(self, user: str, *grants: Grant) -> None:
        for grant in grants:
            response: Any = await self._ask(CreateAclsRequest(*_acl(user, grant)))
            _check(response.creation_responses)

    async def revoke(self, user: str, *grants: Grant) -> None:
        for grant in grants:
            response: Any = await self._ask(DeleteAclsRequest(*_acl(user, grant)))
            _check(response.filter_responses)
            assert response.filter_responses[0][2], f"{user} did not have {grant}"

    async def _ask(self, request: Any) -> Any:
        client = AIOKafkaClient(bootstrap_servers=self.bootstrap_servers)
        await client.bootstrap()
        try:
            return await client.send(client.get_random_node(), request)
        finally:
            await client.close()


def _acl(user: str, grant: Grant) -> tuple[int, str, int, str, str, int, int]:
    prefixed = grant.name.endswith("*")
    return (
        RESOURCES[grant.resource],
        grant.name.removesuffix("*"),
        _PREFIXED if prefixed else _LITERAL,
        f"User:{user}",
        "*",
        OPERATIONS[grant.operation],
        _ALLOW,
    )


def _check(answers: Iterable[Any]) -> None:
    for code, message, *_ in answers:
        assert code == 0, f"{for_code(code).__name__}: {message}"


class _AlterScramResponse(Response):
    API_KEY = 51
    API_VERSION = 0
    SCHEMA = Schema(
        ("throttle_time_ms", Int32),
        (
            "results",
            CompactArray(
                ("user", CompactString("utf-8")),
                ("error_code", Int16),
                ("error_message", CompactString("utf-8")),
                ("tags", TaggedFields),
            ),
        ),
        ("tags", TaggedFields),
    )


class _AlterScramStruct(RequestStruct):
    API_KEY = 51
    API_VERSION = 0
    FLEXIBLE_VERSION = True
    RESPONSE_TYPE = _AlterScramResponse
    SCHEMA = Schema(
        (
            "deletions",
            CompactArray(
                ("name", CompactString("utf-8")), ("mechanism", Int8), ("tags", TaggedFields)
            ),
        ),
        (
            "upsertions",
            CompactArray(
                ("name", CompactString("utf-8")),
                ("mechanism", Int8),
                ("iterations", Int32),
                ("salt", CompactBytes),
                ("salted_password", CompactBytes),
                ("tags", TaggedFields),
            ),
        ),
        ("tags", TaggedFields),
    )


class _AlterScram(Request[_AlterScramStruct]):
    """AlterUserScramCredentials, which aiokafka does not have."""

    API_KEY: ClassVar[int] = 51

    def __init__(self, deletions: list[Any], upsertions: list[Any]) -> None:
        self._parts = deletions, upsertions

    def build(self, request_struct_class: type[_AlterScramStruct]) -> _AlterScramStruct:
        return request_struct_class(*self._parts, {})


def environment(connection: ConnectionSettings, password_file: Path) -> Mapping[str, str]:
    """The options of the command for `connection`. The password goes to `password_file`."""
    told = {
        name: value
        for name in (
            "bootstrap_servers", "security_protocol", "sasl_username",
            "ssl_cafile", "ssl_certfile", "ssl_keyfile",
        )
        if (value := getattr(connection, name)) is not None
    }  # fmt: skip
    if connection.uses_sasl:
        assert connection.sasl_password is not None
        password_file.write_text(connection.sasl_password + "\n")
        told |= {
            "sasl_mechanism": connection.sasl_mechanism,
            "sasl_password_file": str(password_file),
        }
    return {f"SPLITFERRY_{name.upper()}": value for name, value in told.items()}
