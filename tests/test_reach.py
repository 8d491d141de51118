"""Why no broker can be used, for each way to fail. On a real broker: `security/test_logins.py`."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable

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


def raising(error: Exception) -> Callable[[str, int], Awaitable[None]]:
    async def attempt(host: str, port: int) -> None:
        raise error

    return attempt


async def too_slow(host: str, port: int) -> None:
    async with asyncio.timeout(0):
        await asyncio.sleep(10)


async def tells(
    settings: ConnectionSettings,
    attempt: Callable[[str, int], Awaitable[None]],
    cause: str,
    remedy: str,
) -> None:
    told = await why_unreachable(settings.client_options(), attempt)
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

    async def attempt(host: str, port: int) -> None:
        tried.append((host, port))
        raise ConnectionRefusedError if host == "down" else kafka.SaslAuthenticationFailed("no")

    told = await why_unreachable(settings.client_options(), attempt)
    assert told.login
    assert tried == [("down", 1), ("::1", 2)]
