"""What `consume --web` needs of the command line: the address, the extra, the abort."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import click

from splitferry_consumer.service import Service, Settings, StartError
from splitferry_producer import ProducerError
from splitferry_protocol.codec import encode_abort
from splitferry_protocol.ids import RequestId
from splitferry_protocol.records import Abort

from .abort import write
from .failures import Failure
from .workers import Supervisor


class Address(NamedTuple):
    host: str
    port: int


class AddressType(click.ParamType[Address]):
    """`HOST:PORT`, `:PORT` or `PORT`; without a host it is loopback."""

    name = "host:port"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Address:
        if isinstance(value, Address):
            return value
        host, _, port = str(value).rpartition(":")
        bracketed = host.startswith("[") and host.endswith("]")
        number = port.isascii() and port.isdigit() and len(port) <= 5 and int(port) <= 65535
        if not number or (":" in host and not bracketed):
            self.fail(
                f"{value!r} is not an address: write HOST:PORT, as in 127.0.0.1:8080 or [::1]:8080",
                param,
                ctx,
            )
        return Address(host.strip("[]") or "127.0.0.1", int(port))


def need_web() -> None:
    """Read the modules of the extra, before there is an event loop to hold up.

    Raises Failure: one line that names the remedy.
    """
    try:
        import splitferry_consumer.web.server  # noqa: PLC0415
        import splitferry_consumer.web.workers  # noqa: PLC0415, F401
    except ImportError as error:
        raise Failure(
            f"--web needs what the extra `web` brings, and {error.name} is missing: "
            "pip install 'splitferry[web]'"
        ) from error


@asynccontextmanager
async def web_page(
    running: Service | Supervisor, settings: Settings, address: Address | None, actions: bool
) -> AsyncIterator[None]:
    """Serve the page of what runs within the block, where an address is given; after `need_web`.

    Raises Failure: one line that names the remedy.
    """
    if address is None:
        yield
        return
    from splitferry_consumer.web.app import ActionFailed  # noqa: PLC0415
    from splitferry_consumer.web.server import serving  # noqa: PLC0415
    from splitferry_consumer.web.source import OneProcess, Source  # noqa: PLC0415
    from splitferry_consumer.web.workers import Workers  # noqa: PLC0415

    source: Source = (
        OneProcess(running) if isinstance(running, Service) else Workers(running.workers, settings)
    )

    async def abort(request: RequestId, partition: int, reason: str) -> None:
        value = encode_abort(Abort(request, reason))
        try:
            await write(settings.connection, settings.splits_topic, partition, request, value)
        except (ProducerError, OSError) as error:
            raise ActionFailed(str(error)) from error

    try:
        async with serving(source, *address, abort if actions else None):
            yield
    except StartError as error:
        raise Failure(str(error)) from error
