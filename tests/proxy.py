"""A TCP proxy before a broker, which spoils the network between it and its clients at run time.

What a healthy TCP promises still holds: bytes that got through came in their order, and none is
lost as long as the connection lives. A connection either waits or is gone.
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Self

HOST = "127.0.0.1"
CHUNK = 256 * 1024


@dataclass(eq=False)
class _Way:
    """One direction. A chunk is let through when the way is open."""

    open: asyncio.Event = field(default_factory=asyncio.Event)
    delay: float = 0.0
    jitter: float = 0.0


class _Connection:
    """A client's connection with the one that was made to the broker for it."""

    def __init__(self, *writers: asyncio.StreamWriter) -> None:
        self._writers = writers
        self.dead = False
        """Forgotten: nothing passes any more, and nobody is told."""

    def reset(self) -> None:
        for writer in self._writers:
            held: socket.socket = writer.get_extra_info("socket")
            with suppress(OSError):  # closed already
                # Without lingering the kernel sends RST instead of FIN.
                held.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()


class Proxy:
    """Listens on `port` for what goes to `upstream`, both on loopback. An asynchronous context.

    Every fault lasts until `heal`, and faults add up. All methods are for the loop in which the
    context was entered.
    """

    def __init__(self, port: int, upstream: int) -> None:
        self.port = port
        self._upstream = upstream
        self._server: asyncio.Server | None = None
        self._connections: set[_Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._requests, self._answers = _Way(), _Way()
        self._rng = random.Random()
        self._clear()

    @property
    def servers(self) -> str:
        return f"{HOST}:{self.port}"

    # ---- faults

    def cut(self) -> None:
        """Reset all connections, and refuse new ones."""
        if self._server is not None:
            self._server.close()
            self._server = None
        self.reset()

    def reset(self) -> None:
        """Reset all connections; new ones are welcome."""
        for connection in list(self._connections):
            connection.reset()

    def forget(self) -> None:
        """Let nothing pass on the connections of now any more, and tell nobody, as a firewall
        does that has lost its state. New ones work. `heal` does not bring the old ones back."""
        for connection in self._connections:
            connection.dead = True

    def blackhole(self, *, requests: bool = True, answers: bool = True) -> None:
        """Accept connections and take bytes, but let none through, both ways or one way.

        They get through when it is healed, as TCP would send them again: requests that were
        given up arrive late.
        """
        for way, closed in ((self._requests, requests), (self._answers, answers)):
            if closed:
                way.open.clear()

    def delay(self, seconds: float, jitter: float = 0.0) -> None:
        """Hold back every chunk, each way, by `seconds` and up to `jitter` more."""
        for way in (self._requests, self._answers):
            way.delay, way.jitter = seconds, jitter

    def throttle(self, rate: float) -> None:
        """Let `rate` bytes through a second, all connections and both ways together."""
        self._rate = rate

    def reset_at_random(self, chance: float, seed: int | None = None) -> None:
        """Reset a connection with this probability at each chunk: before a request, or after
        one was obeyed and before its answer."""
        self._rng.seed(seed)
        self._chance = chance

    async def heal(self) -> None:
        """End all faults; only forgotten connections stay so."""
        self._clear()
        if self._server is None:
            self._server = await asyncio.start_server(self._accept, HOST, self.port, limit=CHUNK)

    def _clear(self) -> None:
        for way in (self._requests, self._answers):
            way.open.set()
        self.delay(0.0)
        self._rate = 0.0
        self._free_at = 0.0
        self._chance = 0.0

    # ---- what is carried

    async def __aenter__(self) -> Self:
        await self.heal()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cut()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # Registered before anything is awaited, so that no fault passes a new client by.
        connection = _Connection(writer)
        self._connections.add(connection)
        try:
            there, back = await asyncio.open_connection(HOST, self._upstream, limit=CHUNK)
        except OSError:  # the broker is down
            connection.reset()
            self._connections.discard(connection)
            return
        self._connections.discard(connection)
        if writer.is_closing():
            back.transport.abort()
            return
        whole = _Connection(writer, back)
        whole.dead = connection.dead
        self._connections.add(whole)
        ways = [
            asyncio.create_task(self._carry(whole, reader, back, self._requests)),
            asyncio.create_task(self._carry(whole, there, writer, self._answers)),
        ]
        try:
            # The end of one way is the end of both: no Kafka client half-closes.
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            whole.reset()
            self._connections.discard(whole)

    async def _carry(
        self,
        connection: _Connection,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        way: _Way,
    ) -> None:
        loop = asyncio.get_running_loop()
        with suppress(OSError):
            while chunk := await reader.read(CHUNK):
                if pause := way.delay + self._rng.random() * way.jitter:
                    await asyncio.sleep(pause)
                if self._rate:
                    self._free_at = max(loop.time(), self._free_at) + len(chunk) / self._rate
                    await asyncio.sleep(self._free_at - loop.time())
                await way.open.wait()
                if connection.dead:
                    await asyncio.Event().wait()
                if self._rng.random() < self._chance:
                    return
                writer.write(chunk)
                await writer.drain()
