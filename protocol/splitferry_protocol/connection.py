"""How to reach the brokers: the same settings for the producer, the consumer and the command."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from typing import Any

SECURITY_PROTOCOLS = ("PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL")
SASL_MECHANISMS = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")


@dataclass(frozen=True, slots=True)
class ConnectionSettings:
    """Brokers, transport security and login.

    Attributes:
        bootstrap_servers: HOST:PORT, several separated by commas.
        sasl_password: the password itself; it is never shown by `repr`.
        ssl_cafile, ssl_certfile, ssl_keyfile: PEM files; without a `ssl_cafile` the system's
            authorities are trusted. The broker's host name is always checked.

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
        return self.security_protocol.startswith("SASL_")

    @property
    def uses_ssl(self) -> bool:
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


def _no_password() -> str:
    raise ssl.SSLError("the private key is encrypted: give a key file without a passphrase")
