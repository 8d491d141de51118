"""Why no broker can be used, in one line with its remedy.

Kafka's client logs what it meets while it looks for a broker and keeps nothing of it, so each
address is tried once more by hand, with what the caller connects by: no I/O happens here.
"""

from __future__ import annotations

import errno
import ssl
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any, NamedTuple

_SASL_AUTHENTICATION_FAILED, _UNSUPPORTED_MECHANISM, _ILLEGAL_SASL_STATE = 58, 33, 34
"""Kafka's error codes."""
_CERTIFICATE_HAS_EXPIRED, _HOSTNAME_MISMATCH, _IP_ADDRESS_MISMATCH = 10, 62, 64
"""OpenSSL's verify codes."""
_TLS_ALERT = 0x1503
"""How a TLS record begins that refuses what was no TLS; it was taken for the size of an answer."""

_CONNECT = {
    errno.ECONNREFUSED: "Connection refused",
    errno.EHOSTUNREACH: "No route to host",
    errno.ENETUNREACH: "Network is unreachable",
    errno.ETIMEDOUT: "Connection timed out",
}
"""What the system says, for which asyncio puts words of its own."""


class Unreachable(NamedTuple):
    message: str
    login: bool
    """Whether it is the login that was refused."""


async def why_unreachable(
    options: Mapping[str, Any],
    connect: Callable[..., Awaitable[Any]],
    question: Any,
    bound: Callable[[], AbstractAsyncContextManager[Any]],
) -> Unreachable:
    """Try each bootstrap server again, and tell what is wrong with them.

    Args:
        options: of `ConnectionSettings.client_options`.
        connect: aiokafka's `create_conn`: a connection to a host and port.
        question: the request that a broker has to answer on it.
        bound: the time for one server.
    """
    servers = options["bootstrap_servers"]
    settings = {name: value for name, value in options.items() if name != "bootstrap_servers"}
    found: dict[str, Unreachable] = {}
    for server in servers.split(","):
        host, colon, port = server.strip().rpartition(":")
        try:
            # Without a port aiokafka takes Kafka's usual one.
            where = (host.strip("[]"), int(port)) if colon else (port, 9092)
            async with bound():
                connection = await connect(*where, **settings)
                try:
                    await connection.send(question)
                finally:
                    await connection.close()
        except Exception as error:  # noqa: BLE001  whatever it is, it is what is to be told
            cause, remedy, login = _explained(error, options)
        else:
            cause, remedy, login = "it answers now", "try again", False
        told = f"no Kafka broker answers at {servers} ({cause}): {remedy}"
        found.setdefault(told, Unreachable(told, login))
    # A login that one server refuses is worth more to know than that another is down.
    return min(found.values(), key=lambda one: not one.login)


def _explained(error: Exception, options: Mapping[str, Any]) -> tuple[str, str, bool]:
    """Cause, remedy, and whether it is the login."""
    sasl = options["security_protocol"].startswith("SASL_")
    tls = "ssl_context" in options
    code = None if isinstance(error, OSError) else getattr(error, "errno", None)
    if code == _SASL_AUTHENTICATION_FAILED:
        user = options["sasl_plain_username"]
        remedy = "check sasl_username, the password and sasl_mechanism"
        return f"it refuses the login of {user!r}: {error.args[0]}", remedy, True
    if code == _UNSUPPORTED_MECHANISM:
        cause = f"it does not take the sasl_mechanism {options['sasl_mechanism']}"
        return cause, "choose another sasl_mechanism", True
    if code == _ILLEGAL_SASL_STATE:
        remedy = f"set security_protocol to {'SSL' if tls else 'PLAINTEXT'}"
        return "it takes no login on that port", remedy, True
    # aiokafka tells that the connection ended, and why only as the cause of that.
    origin = error if isinstance(error, OSError) else error.__cause__ or error
    match origin:
        case ssl.SSLError():
            return *_tls(origin), False
        case EOFError():
            if getattr(origin, "expected", 0) >> 16 == _TLS_ALERT:
                protocol = "SASL_SSL" if sasl else "SSL"
                return "it speaks TLS on that port", f"set security_protocol to {protocol}", False
            if not sasl:
                protocol = "SASL_SSL" if tls else "SASL_PLAINTEXT"
                remedy = f"it may want a login: set security_protocol to {protocol}"
                return "it ends the connection at the first question", remedy, False
        case ConnectionResetError() if tls:
            remedy = f"set security_protocol to {'SASL_PLAINTEXT' if sasl else 'PLAINTEXT'}"
            return "it seems to speak no TLS on that port", remedy, False
        case TimeoutError():
            return "it took too long", "check the address, and that it is up", False
        case OSError() if origin.errno in _CONNECT:
            return _CONNECT[origin.errno], _START, False
    return str(origin) or type(origin).__name__, _START, False


_START = "start one, as with `splitferry broker`, or name yours in bootstrap_servers"


def _tls(error: ssl.SSLError) -> tuple[str, str]:
    """Cause and remedy."""
    if isinstance(error, ssl.SSLCertVerificationError):
        if error.verify_code == _CERTIFICATE_HAS_EXPIRED:
            return "the broker's certificate has expired", "renew it at the broker"
        if error.verify_code in {_HOSTNAME_MISMATCH, _IP_ADDRESS_MISMATCH}:
            return (
                f"the broker's certificate is for another host: {error.verify_message}",
                "connect by a name that stands in the certificate",
            )
        return (
            f"the broker's certificate is not trusted: {error.verify_message}",
            "check ssl_cafile: it holds the authority that signed the broker's certificate",
        )
    reason = getattr(error, "reason", None) or str(error)
    if "CERTIFICATE_REQUIRED" in reason or "HANDSHAKE_FAILURE" in reason:
        return (
            "the broker wants a certificate of this user",
            "name it with ssl_certfile and ssl_keyfile",
        )
    if "ALERT" in reason:
        return (
            f"the broker refuses the certificate of this user: {reason}",
            "check that ssl_certfile has not expired, and that the broker trusts who signed it",
        )
    return f"TLS failed: {reason}", "check that security_protocol is what that port speaks"
