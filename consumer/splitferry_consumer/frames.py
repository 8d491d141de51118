"""Fetched records on their way from the socket to aiokafka's reader of batches, copied once.

aiokafka reads a connection through a stream, which copies every byte four times before its record
is made: out of the kernel, into the stream's buffer, out of it, and into the set of records. Here
an answer goes from the kernel into a buffer of its own, and the set of records is a view of that.
aiokafka still makes the connections (TLS, SASL, versions), sends the requests, and gives them up;
only what reads the answers is replaced, on connections that nothing but fetches use.
"""

from __future__ import annotations

import asyncio
import socket
import time
from contextlib import suppress
from typing import Any

import structlog
from aiokafka.client import AIOKafkaClient
from aiokafka.conn import CloseReason

log = structlog.get_logger(__name__)

FETCHES: Any = "fetches"
"""aiokafka's client keeps connections apart by such a name, whatever it is."""
ANSWER_MAX = 256 * 1024 * 1024
"""Bytes: above every batch that a topic of ours takes, and below what would break us."""
_AT_ONCE = 256 * 1024
"""Bytes of an answer that are waited for before the event loop is woken. With more of them the
broker and the loop take turns."""
_SHORT = 64 * 1024
"""Bytes: above every text of the protocol, which has to be copied to be decoded."""


async def prepare(client: AIOKafkaClient, node_id: int) -> None:
    """Make the connection to a broker on which fetches are sent to it (`group=FETCHES`).

    In an answer to those a set of records may be a memoryview; see `RecordSet`.
    """
    connection: Any = await client._get_conn(node_id, group=FETCHES)
    # An answer that is still under way, though nobody may wait for it, has its reader already.
    if connection is None or isinstance(connection._protocol, Frames) or connection._requests:
        return
    Frames(connection)


class Frames(asyncio.BufferedProtocol):
    """Reads the answers on a connection of aiokafka from now on, in the place of its stream."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._streamed = connection._protocol
        self._length = bytearray(4)
        self._buffer = memoryview(self._length)
        self._filled = 0
        connection._read_task.cancel()
        connection._protocol = self
        transport = connection._writer.transport
        self._socket = transport.get_extra_info("socket")
        self._encrypted = transport.get_extra_info("sslcontext") is not None
        self._awaited = 1
        transport.set_protocol(self)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        self._filled += nbytes
        if self._filled < len(self._buffer):
            self._await(len(self._buffer) - self._filled)
            return
        full, self._filled = self._buffer, 0
        try:
            if full.obj is self._length:
                size = int.from_bytes(self._length)
                if not len(self._length) <= size <= ANSWER_MAX:
                    raise ValueError(f"an answer of {size} bytes")
                self._buffer = memoryview(bytearray(size))
                self._await(size)
            else:
                self._buffer = memoryview(self._length)
                self._await(1)
                self._answered(full)
        except Exception as error:  # noqa: BLE001 - whoever waits for the answer is told
            log.error("unexpected answer to a fetch", error=repr(error))
            self._connection.close(CloseReason.OUT_OF_SYNC, error)

    def _await(self, left: int) -> None:
        """Have the loop woken for many of the `left` bytes at once, never for more than those.

        Not with TLS: of what is left, its layer may hold some already, so that the socket never
        has as many.
        """
        wanted = 1 if self._encrypted else min(left, _AT_ONCE)
        if wanted != self._awaited:
            self._awaited = wanted
            with suppress(OSError):  # It only saves time.
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, wanted)

    def _answered(self, frame: memoryview) -> None:
        connection = self._connection
        correlation_id, request, future = connection._requests[0]
        answer = _Answer(frame)
        header = request.parse_response_header(answer)
        if header.correlation_id != correlation_id:
            raise ValueError(f"answer {header.correlation_id} to request {correlation_id}")
        if not future.done():
            future.set_result(request.RESPONSE_TYPE.decode(answer))
        connection._last_action = time.monotonic()
        connection._requests.popleft()

    def connection_lost(self, exc: Exception | None) -> None:
        self._streamed.connection_lost(exc)
        self._connection.close(CloseReason.CONNECTION_BROKEN, exc)


class _Answer:
    """A frame as aiokafka decodes it, part by part: of a file it needs `read` alone.

    A part that is most of the frame is not copied. A smaller one is, or it would keep all the
    others in memory for as long as nobody has taken it.
    """

    def __init__(self, frame: memoryview) -> None:
        self._frame = frame
        self._at = 0

    def read(self, size: int) -> bytes | memoryview:
        part = self._frame[self._at : self._at + size]
        self._at += size
        return part if len(part) > max(_SHORT, len(self._frame) // 2) else bytes(part)
