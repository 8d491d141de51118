"""What every reader of a log needs of aiokafka: fetches that are safe to read. What it works
around is measured in docs/DESIGN.md."""

from __future__ import annotations

import asyncio
import math
import time
from typing import Any

import structlog
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.conn import CloseReason
from aiokafka.consumer import fetcher
from aiokafka.errors import KafkaError, RequestTimedOutError
from aiokafka.protocol.fetch import FetchRequest

from .batches import (
    UNREADABLE,
    Buffer,
    any_misread,
    look,
    readable,
    record_set,
)
from .bounded import bounded
from .frames import FETCHES, prepare
from .inquiry import reason
from .transport import Record

log = structlog.get_logger(__name__)

REQUEST_TIMEOUT = 10.0
"""Seconds until a request without an answer ends its connection. A connection that a firewall
has forgotten gives no other sign, and the next one works; aiokafka itself waits for 40 s, and
for one connection after the other. A response with records has to fit in."""
REQUEST_BOUND = 30.0
"""Seconds after which a request to Kafka is given up: aiokafka itself would retry for ever."""
POLL_MAX = 10_000
"""Records that a poll hands out: the smallest have 7 bytes, and take 500 in memory."""
COUNTED_ON_THE_LOOP = 5000
"""Records of one answer that are looked at without a thread: some ms."""
MEND_PERIOD = 60.0
"""Seconds after a record could not be decoded for which all headers' names are looked at."""
FETCH_ROOM = 64 * 1024
"""Bytes of a response for all that is not payload. Without it 7 splits of 512 KiB come, and most
of an eighth, which is then asked for again."""
FETCH_MAX = 4 * 1024 * 1024 + FETCH_ROOM
"""Bytes of one response, of all partitions: on a slow network it has to come in time."""


_aiokafka: Any = fetcher
# It makes its readers of batches by this name. They take bytes only: for those nothing changes.
_aiokafka.MemoryRecords = record_set


class Fetches:
    """The fetches of `consumer`, with their batches unpacked within bounds (see `batches`).

    Where they arrive is the one place before aiokafka unpacks them, unbounded and on the event
    loop. What is unpacked counts for the budget of what is fetched ahead.

    Args:
        wanted: bytes that the consumer asks for of a partition.
        mended: look at all headers' names from the start, and always.
    """

    def __init__(self, consumer: AIOKafkaConsumer, wanted: int, *, mended: bool = False) -> None:
        self._wanted = wanted
        self._mend_until = math.inf if mended else 0.0
        client: Any = consumer._client
        self._client = client
        self._send = client.send
        client.send = self._fetch

    def mend(self) -> None:
        """A record could not be decoded: look at all headers' names for a while."""
        self._mend_until = time.monotonic() + MEND_PERIOD

    @property
    def mending(self) -> bool:
        return time.monotonic() < self._mend_until

    async def _fetch(self, node_id: Any, request: Any, **options: Any) -> Any:
        if not isinstance(request, FetchRequest):
            return await self._ask(node_id, request, **options)
        await prepare(self._client, node_id)
        response = await self._ask(node_id, request, group=FETCHES)
        mend = self.mending
        try:
            response.topics = [
                (
                    topic,
                    [
                        [*facts, await self._readable(records or b"", mend)]
                        for *facts, records in partitions
                    ],
                )
                for topic, partitions in response.topics
            ]
        except Exception as error:
            # Any other would end aiokafka's task that fetches, and nobody would hear of it.
            log.exception("unexpected error in a fetch")
            raise KafkaError(reason(error)) from error
        return response

    async def _ask(self, node_id: Any, request: Any, **options: Any) -> Any:
        asked = time.monotonic()
        try:
            return await self._send(node_id, request, **options)
        except RequestTimedOutError:
            # aiokafka ends the one connection that this request was for. A firewall that has lost
            # its state has forgotten the others, too: found out one after the other, each would
            # cost a time-out of its own (a heartbeat, then the search for the coordinator).
            for (other, _), connection in [*self._client._conns.items()]:
                if other == node_id and connection._last_action < asked:
                    connection.close(CloseReason.CONNECTION_TIMEOUT)
            raise

    async def _readable(self, records: Buffer, mend: bool) -> Buffer:
        compressed, count = look(records)
        if not (mend or compressed):
            if count > COUNTED_ON_THE_LOOP:
                misread = await asyncio.to_thread(any_misread, records)
            else:
                misread = any_misread(records)
            if not misread:
                return records
        return await asyncio.to_thread(readable, records, self._wanted, mend)


async def stop_consumer(consumer: AIOKafkaConsumer) -> None:
    """`stop` ends with the cancellation of a fetch that pauses after a failure, and leaves its
    connections open then."""
    await bounded(consumer.stop())
    await bounded(consumer._client.close())


def as_record(tp: TopicPartition, read: Any) -> Record:
    """What aiokafka has read, as the transport has it."""
    if read.headers and read.headers[0][0] == UNREADABLE:
        cause = read.headers[0][1].decode()
        log.error(
            "unreadable batch",
            topic=tp.topic,
            partition=tp.partition,
            offset=read.offset,
            error=cause,
            remedy="let its producer make smaller batches, or send without compression",
        )
        return Record(read.offset, None, None, (), read.timestamp, cause)
    return Record(read.offset, read.key, read.value, read.headers, read.timestamp)
