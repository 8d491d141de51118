"""Why no broker can be used, for each way to fail. On a real broker: `security/test_logins.py`."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import pytest
from aiokafka import errors as kafka

from splitferry_protocol.connection import ConnectionSettings
from splitferry_protocol.reach import why_unreachable

PLAIN = ConnectionSettings("a:1")
TLS = ConnectionSettings("a:1", "SSL")
SASL = ConnectionSettings("a:1", "SASL_PLAINTEXT", sasl_username="me", sasl_password="x")
BOTH = ConnectionSettings("a:1", "SASL_SSL", sasl_username="me", sasl_password="x")


def untrusted(code: int, message: str) -> ssl.SSLCertVerificationError:
    error = ssl.SSLCertVerificationError(1, "[SSL: CERTIFICATE_VERIFY_FAILED]")
    error.verify_code, error.verify_message = code, message
    return error


def closed(cause: Exception) -> kafka.KafkaConnectionError:
    """As aiokafka tells that a connection ended under a request."""
    error = kafka.KafkaConnectionError("Connection at a:1 closed")
    error.__cause__ = cause
    return error


def ended(expected: int) -> asyncio.IncompleteReadError:
    return asyncio.IncompleteReadError(b"", expected)


@pytest.mark.parametrize(
    ("settings", "error", "cause", "remedy"),
    [
        (SASL, kafka.SaslAuthenticationFailed("no"), "the login of 'me': no", "the password"),
        (SASL, kafka.UnsupportedSaslMechanismError(), "sasl_mechanism PLAIN", "choose another"),
        (SASL, kafka.IllegalSaslStateError(), "takes no login", "to PLAINTEXT"),
        (BOTH, kafka.IllegalSaslStateError(), "takes no login", "to SSL"),
        (TLS, untrusted(20, "unable to get issuer"), "not trusted: unable", "check ssl_cafile"),
        (TLS, untrusted(10, "expired"), "certificate has expired", "at the broker"),
        (TLS, untrusted(62, "mismatch"), "another host: mismatch", "connect by a name"),
        (TLS, ssl.SSLError(1, "WRONG_VERSION"), "TLS failed: ", "security_protocol"),
        (TLS, closed(ssl.SSLError(1, "ALERT_CERTIFICATE_REQUIRED")), "wants a cert", "ssl_keyfile"),
        (TLS, closed(ssl.SSLError(1, "ALERT_UNKNOWN")), "refuses the cert", "has not expired"),
        (PLAIN, closed(ended(0x15030300)), "speaks TLS", "to SSL"),
        (SASL, closed(ended(0x15030300)), "speaks TLS", "to SASL_SSL"),
        (PLAIN, closed(ended(4)), "at the first question", "to SASL_PLAINTEXT"),
        (TLS, closed(ended(4)), "at the first question", "to SASL_SSL"),
        (SASL, closed(ended(4)), "0 bytes read", "start one"),
        (TLS, ConnectionResetError(), "speak no TLS", "to PLAINTEXT"),
        (BOTH, ConnectionResetError(), "speak no TLS", "to SASL_PLAINTEXT"),
        (PLAIN, ConnectionRefusedError(111, "Connect call failed"), "Connection refused", "start"),
        (PLAIN, OSError(-2, "Name or service not known"), "not known", "bootstrap_servers"),
        (PLAIN, ValueError("invalid port"), "invalid port", "bootstrap_servers"),
    ],
)
async def test_each_cause_has_its_remedy(
    settings: ConnectionSettings, error: Exception, cause: str, remedy: str
) -> None:
    await tells(settings, raising(error), cause, remedy)
    await tells(settings, too_slow, "it took too long", "that it is up")


Connect = Callable[..., Awaitable[Any]]
BOUND = partial(asyncio.timeout, 0.05)


def raising(error: Exception) -> Connect:
    async def connect(host: str, port: int, **settings: Any) -> Any:
        raise error

    return connect


async def too_slow(host: str, port: int, **settings: Any) -> Any:
    await asyncio.sleep(10)


async def tells(settings: ConnectionSettings, connect: Connect, cause: str, remedy: str) -> None:
    told = await why_unreachable(settings.client_options(), connect, None, BOUND)
    before, _, after = told.message.partition("): ")
    assert before.startswith("no Kafka broker answers at a:1 (")
    assert cause in before
    assert remedy in after
    assert "\n" not in told.message


async def test_a_refused_login_is_told_before_a_server_that_is_down() -> None:
    settings = ConnectionSettings(
        "down:1, [::1]:2", "SASL_PLAINTEXT", sasl_username="me", sasl_password="x"
    )
    tried = []

    async def connect(host: str, port: int, **settings: Any) -> Any:
        tried.append((host, port))
        raise ConnectionRefusedError if host == "down" else kafka.SaslAuthenticationFailed("no")

    told = await why_unreachable(settings.client_options(), connect, None, BOUND)
    assert told.login
    assert tried == [("down", 1), ("::1", 2)]


@pytest.mark.parametrize("failure", [None, closed(ended(4))])
async def test_a_server_is_asked_once_and_left(failure: Exception | None) -> None:
    said: list[object] = []

    class Connection:
        async def send(self, question: object) -> None:
            said.append(question)
            if failure is not None:
                raise failure

        async def close(self) -> None:
            said.append("close")

    async def connect(host: str, port: int, **settings: Any) -> Connection:
        said.append(settings)
        return Connection()

    told = await why_unreachable(PLAIN.client_options(), connect, "question", BOUND)
    assert said == [{"security_protocol": "PLAINTEXT"}, "question", "close"]
    assert ("it answers now" in told.message) == (failure is None)
