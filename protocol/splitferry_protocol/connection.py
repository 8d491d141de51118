"""How to reach the brokers: the same settings for the producer, the consumer and the command."""

from __future__ import annotations

import logging
import ssl
from dataclasses import dataclass, field
from typing import Any, SupportsIndex

SECURITY_PROTOCOLS = ("PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL")
SASL_MECHANISMS = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")
_SASL_AUTHENTICATE = 36
"""Kafka's number of the request that carries the password."""


class Secret(str):
    """A text that shows itself to nobody: not printed, not in a `repr`, not in the locals of a
    traceback. Only what works on its characters (`encode`, `join`, `json.dumps`) gets them."""

    __slots__ = ()

    def __new__(cls, text: str) -> Secret:
        # One of a secret would be one of the stars.
        return text if isinstance(text, Secret) else super().__new__(cls, text)

    def __repr__(self) -> str:
        return "'***'"

    def __str__(self) -> str:
        return "***"

    def __format__(self, specification: str) -> str:
        return format("***", specification)

    def __getitem__(self, key: SupportsIndex | slice) -> Secret:
        # Who shortens a long text before it is shown, as tracebacks with locals do.
        return Secret(super().__getitem__(key))


@dataclass(frozen=True, slots=True)
class ConnectionSettings:
    """Brokers, transport security and login.

    Attributes:
        bootstrap_servers: HOST:PORT, several separated by commas.
        security_protocol: PLAINTEXT, SSL, SASL_PLAINTEXT or SASL_SSL.
        sasl_mechanism: PLAIN, SCRAM-SHA-256 or SCRAM-SHA-512; counts with SASL only.
        sasl_password: the password itself; kept as a `Secret`.
        ssl_cafile: certificates to trust (PEM); None: the system's authorities. The broker's host
            name is always checked.
        ssl_certfile: own certificate (PEM).
        ssl_keyfile: its key (PEM), not under a passphrase.

    Raises:
        ValueError: the settings contradict each other; the message names the remedy.
    """

    bootstrap_servers: str = "127.0.0.1:9092"
    security_protocol: str = "PLAINTEXT"
    sasl_mechanism: str = "PLAIN"
    sasl_username: str | None = None
    sasl_password: str | None = field(default=None, repr=False)
    ssl_cafile: str | None = None
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None

    def __post_init__(self) -> None:
        if self.sasl_password is not None:
            object.__setattr__(self, "sasl_password", Secret(self.sasl_password))
        if not self.bootstrap_servers.strip(", "):
            raise ValueError("bootstrap_servers is empty: name at least one HOST:PORT")
        if self.security_protocol not in SECURITY_PROTOCOLS:
            raise ValueError(
                f"security_protocol {self.security_protocol!r} is not known: "
                f"choose one of {', '.join(SECURITY_PROTOCOLS)}"
            )
        if self.uses_sasl:
            if self.sasl_mechanism not in SASL_MECHANISMS:
                raise ValueError(
                    f"sasl_mechanism {self.sasl_mechanism!r} is not supported: "
                    f"choose one of {', '.join(SASL_MECHANISMS)}"
                )
            if self.sasl_username is None or self.sasl_password is None:
                raise ValueError(
                    f"{self.security_protocol} needs sasl_username and sasl_password as well"
                )
        elif self.sasl_username is not None or self.sasl_password is not None:
            raise ValueError(
                f"a SASL login is not used with {self.security_protocol}: "
                "set security_protocol to SASL_SSL (or SASL_PLAINTEXT)"
            )
        if not self.uses_ssl and (self.ssl_cafile or self.ssl_certfile or self.ssl_keyfile):
            raise ValueError(
                f"certificates are not used with {self.security_protocol}: "
                "set security_protocol to SSL or SASL_SSL"
            )
        if self.ssl_keyfile and not self.ssl_certfile:
            raise ValueError("ssl_keyfile needs ssl_certfile as well")

    @property
    def uses_sasl(self) -> bool:
        """Whether the brokers want a user and a password."""
        return self.security_protocol.startswith("SASL_")

    @property
    def uses_ssl(self) -> bool:
        """Whether the connections are encrypted (TLS)."""
        return self.security_protocol.endswith("SSL")

    def client_options(self) -> dict[str, Any]:
        """Keyword arguments for any aiokafka client.

        Reads the certificate files, so call it before the event loop runs or in a thread.

        Raises:
            OSError: a certificate file cannot be read (`ssl.SSLError` is one: not valid PEM).
        """
        options: dict[str, Any] = {
            "bootstrap_servers": self.bootstrap_servers,
            "security_protocol": self.security_protocol,
        }
        if self.uses_sasl:
            # Here, because every client begins here, a library's as well as the command's.
            logging.getLogger("aiokafka.conn").addFilter(_hide_login)
            options |= {
                "sasl_mechanism": self.sasl_mechanism,
                "sasl_plain_username": self.sasl_username,
                "sasl_plain_password": self.sasl_password,
            }
        if self.uses_ssl:
            context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cafile=self.ssl_cafile)
            if self.ssl_certfile:
                # A key under a passphrase would ask for it on the terminal; refuse instead.
                context.load_cert_chain(self.ssl_certfile, self.ssl_keyfile, password=_no_password)
            options["ssl_context"] = context
        return options


def _hide_login(record: logging.LogRecord) -> bool:
    """Log filter: aiokafka's debug messages show each request whole, the login's too."""
    if isinstance(record.args, tuple):
        record.args = tuple(
            type(arg).__name__ if getattr(arg, "API_KEY", None) == _SASL_AUTHENTICATE else arg
            for arg in record.args
        )
    return True


def _no_password() -> str:
    raise ssl.SSLError("the private key is encrypted: give a key file without a passphrase")
