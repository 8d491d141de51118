"""Runs the web page in a loop that runs already, as long as a block lasts."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
from collections.abc import AsyncIterator, Generator
from contextlib import asynccontextmanager
from operator import itemgetter
from pathlib import Path

import h11
import structlog
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from splitferry_consumer.service import StartError
from splitferry_consumer.web.app import Abort, Pages
from splitferry_consumer.web.source import Source

log = structlog.get_logger(__name__)

STOP_BOUND = 2
"""Seconds that answers under way have when the consumer has stopped."""
CONNECTIONS_MAX = 256
BACKLOG = 64
"""Connections taken at a time, which may be this many above `CONNECTIONS_MAX` for a moment."""
REQUEST_BOUND = 10.0
"""Seconds in which a connection has to bring a whole request."""
READING_BOUND = 60.0
"""The same where an answer is not read yet: it may be MiB, and the line slow."""


@asynccontextmanager
async def serving(
    source: Source, host: str, port: int, abort: Abort | None = None
) -> AsyncIterator[str]:
    """Serve the page of `source` within the block, which is given the page's address.

    Args:
        port: 0 takes a free one.
        abort: what ends a request; None: no actions.

    Raises:
        StartError: nothing can be served there; one line that names the remedy.
    """
    with await _listen(host, port) as listener:
        bound = listener.getsockname()[0]
        local = bound if ipaddress.ip_address(bound).is_loopback else None
        address = _address(listener)
        ending = asyncio.Event()
        async with _answering(source, Pages(source, ending, abort, local), ending, listener):
            log.info("web page", address=address, actions=abort is not None)
            if not local:
                log.warning(
                    "the web page has no login: whoever reaches it sees all", address=address
                )
            yield address


@asynccontextmanager
async def serving_at(source: Source, path: Path) -> AsyncIterator[None]:
    """Serve it within the block to whoever may open the socket `path`, which must be private."""
    with contextlib.suppress(FileNotFoundError):
        await asyncio.to_thread(path.unlink)  # of a process before us
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        listener.setblocking(False)
        ending = asyncio.Event()
        pages = Pages(source, ending, local=None)
        pages.app.add_route("/before", pages.before)
        async with _answering(source, pages, ending, listener):
            yield


@asynccontextmanager
async def _answering(
    source: Source, pages: Pages, ending: asyncio.Event, listener: socket.socket
) -> AsyncIterator[None]:
    server = _Server(
        uvicorn.Config(
            pages.app,
            lifespan="off",
            ws="none",
            log_config=None,
            log_level="error",  # below it is what strangers send, as often as they like
            access_log=False,
            server_header=False,
            proxy_headers=False,
            http=_Connection,
            backlog=BACKLOG,
            timeout_graceful_shutdown=STOP_BOUND,
        )
    )
    watching = asyncio.create_task(source.watch(), name="health")
    await source.looked()
    running = asyncio.create_task(server.serve([listener]), name="web")
    try:
        yield
    finally:
        ending.set()
        server.should_exit = True
        watching.cancel()
        await asyncio.wait([running, watching], timeout=2 * STOP_BOUND)


class _Connection(H11Protocol):
    """Is closed when it brings no whole request in time, or sooner where there are too many.

    Then the one that has waited longest goes, so that who asks at once is answered.
    """

    _late: asyncio.TimerHandle | None = None
    """Closes it; None while a request is answered."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect()
        if len(self.connections) > CONNECTIONS_MAX:
            waiting = [
                (one._late.when(), one)
                for one in self.connections
                if isinstance(one, _Connection) and one._late is not None
            ]
            min(waiting, key=itemgetter(0))[1]._close()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._expect()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._expect()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._late is not None:
            self._late.cancel()

    def _expect(self) -> None:
        incomplete = self.conn.their_state in {h11.IDLE, h11.SEND_BODY}
        if incomplete and self._late is None:
            unread = self.transport.get_write_buffer_size() > 0
            bound = READING_BOUND if unread else REQUEST_BOUND
            self._late = self.loop.call_later(bound, self._close)
        elif not incomplete and self._late is not None:
            self._late.cancel()
            self._late = None

    def _close(self) -> None:
        self.connections.discard(self)  # now: it is lost only in the loop's next round
        self.transport.abort()


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        """Signals are the consumer's."""
        yield


async def _listen(host: str, port: int) -> socket.socket:
    """Raises StartError."""
    where = f"{host}:{port}"
    try:
        found = await asyncio.get_running_loop().getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, _, _, _, address = found[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen()
            listener.setblocking(False)
        except OSError:
            listener.close()
            raise
    except (OSError, UnicodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not the name of a host"
        raise StartError(
            f"the web page cannot be served at {where} ({why}): "
            "choose another address with --web HOST:PORT"
        ) from error
    return listener


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/"
