"""The way to the broker: one idempotent aiokafka producer, with bounds around what it leaves open.

aiokafka retries an idempotent send for ever, and its `stop` waits for that. And once a batch has
failed for good, later ones of its partition are out of sequence. So a `Link` watches that the
broker confirms something now and then, and a link that failed is never used again.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from typing import Any

from aiokafka import errors as kafka

from splitferry_protocol.codec import crc_header
from splitferry_protocol.ids import RequestId
from splitferry_protocol.records import PAYLOAD_MAX
from splitferry_protocol.rights import TOPIC, Right

from .client import idempotent_producer
from .cluster import START_TIMEOUT, explain, explained, said
from .errors import DeliveryFailed, NoBroker, ProducerError

STOP_TIMEOUT = 5.0
"""Seconds."""
_BATCH = 1024 * 1024
"""Bytes of a batch, where the topic takes that: two splits of the default size. One batch for
each partition is on its way to a broker at a time."""


class Link:
    """One connected producer for one topic. After `failed` is set, make another.

    Args:
        options: of `ConnectionSettings.client_options`.
        stall_timeout: s without any confirmation, while some are due, after which it has failed.
    """

    def __init__(
        self, options: Mapping[str, Any], topic: str, max_message_bytes: int, stall_timeout: float
    ) -> None:
        self._options = options
        self._topic = topic
        self._wanted = Right("Write", TOPIC, topic)
        self._stall_timeout = stall_timeout
        self._client = idempotent_producer(
            linger_ms=0,
            max_batch_size=min(_BATCH, max_message_bytes),
            max_request_size=2 * PAYLOAD_MAX,  # bounds a record; the topic's bound is lower
            **options,
        )
        self._due: set[asyncio.Future[None]] = set()
        self._queueing: set[asyncio.Timeout] = set()
        self._confirmed_at = 0.0
        self._watch: asyncio.TimerHandle | None = None
        self.failed: ProducerError | None = None

    def __repr__(self) -> str:
        return f"<Link {self._topic} due={len(self._due)} failed={self.failed!r}>"

    async def start(self) -> None:
        """Connect. Raises ProducerError; the link is closed then."""
        try:
            async with (
                explained(self._options, self._wanted),
                asyncio.timeout(START_TIMEOUT),
            ):
                await self._client.start()
        except BaseException:
            await self.close()
            raise

    async def partitions(self) -> int:
        """How many partitions the topic has, as of the last refresh of the metadata."""
        async with explained(self._options, self._wanted):
            return len(await self._client.partitions_for(self._topic))

    async def send(self, request: RequestId, value: bytes, partition: int) -> asyncio.Future[None]:
        """Queue one record; the future is done when all in-sync replicas have it.

        Waits while the partition's batch is full. Raises ProducerError; so does the future.
        """
        confirmed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        # Whoever gave up waiting need not fetch the error as well.
        confirmed.add_done_callback(lambda done: done.cancelled() or done.exception())
        self._expect(confirmed)
        try:
            queued = await self._queue(request, value, partition)
        except BaseException as error:
            self._due.discard(confirmed)
            if isinstance(error, kafka.KafkaError):
                raise self._fail(self._explain(error)) from error
            raise
        queued.add_done_callback(lambda done: self._confirm(confirmed, done))
        return confirmed

    def _expect(self, confirmed: asyncio.Future[None]) -> None:
        loop = asyncio.get_running_loop()
        if not self._due:
            self._confirmed_at = loop.time()
        self._due.add(confirmed)
        if self._watch is None:
            self._watch = loop.call_later(self._stall_timeout, self._look_for_silence)

    async def _queue(
        self, request: RequestId, value: bytes, partition: int
    ) -> asyncio.Future[object]:
        while self.failed is None:
            # aiokafka gives up on a full batch after a while; that is for the watch to decide.
            with contextlib.suppress(kafka.KafkaTimeoutError, TimeoutError):
                async with asyncio.timeout(None) as interruption:
                    self._queueing.add(interruption)
                    try:
                        queued: asyncio.Future[object] = await self._client.send(
                            self._topic,
                            value,
                            key=request.key,
                            partition=partition,
                            headers=[crc_header(value)],
                        )
                        return queued
                    finally:
                        self._queueing.discard(interruption)
        raise self.failed

    def _confirm(self, confirmed: asyncio.Future[None], queued: asyncio.Future[object]) -> None:
        self._due.discard(confirmed)
        if error := queued.exception():
            self._fail(self._explain(error))
        else:
            self._confirmed_at = asyncio.get_running_loop().time()
        if confirmed.done():
            return
        if error and self.failed:
            confirmed.set_exception(self.failed)
        else:
            confirmed.set_result(None)

    def _look_for_silence(self) -> None:
        self._watch = None
        if not self._due:
            return
        loop = asyncio.get_running_loop()
        silent = loop.time() - self._confirmed_at
        if silent < self._stall_timeout:
            self._watch = loop.call_later(self._stall_timeout - silent, self._look_for_silence)
            return
        self._fail(
            NoBroker(
                f"no broker of {self._options['bootstrap_servers']} has confirmed anything for "
                f"{silent:.0f} s: check that it is up and topic {self._topic} has enough "
                "in-sync replicas"
            )
        )

    def _explain(self, error: BaseException) -> ProducerError:
        """Why a record was not taken."""
        if isinstance(error, kafka.MessageSizeTooLargeError | kafka.RecordListTooLargeError):
            return DeliveryFailed(
                f"topic {self._topic} does not take splits of this size any more: "
                "raise its max.message.bytes, or give a smaller split size"
            )
        explained = explain(error, self._options["bootstrap_servers"], self._wanted)
        if type(explained) is ProducerError:
            return DeliveryFailed(
                f"Kafka did not take a record for topic {self._topic}: {said(error)}; send it again"
            )
        return explained

    def _fail(self, error: ProducerError) -> ProducerError:
        """The first failure is the link's end: whatever is still due fails with it."""
        if self.failed is None:
            self.failed = error
            for confirmed in self._due:
                if not confirmed.done():
                    confirmed.set_exception(error)
            self._due.clear()
            for interruption in self._queueing:
                interruption.reschedule(asyncio.get_running_loop().time())
        return self.failed

    async def close(self) -> None:
        """Flush and disconnect, both within a bound."""
        if self._watch is not None:
            self._watch.cancel()
        try:
            # Nothing to flush to when the link has failed.
            async with asyncio.timeout(STOP_TIMEOUT if self.failed is None else 0):
                await self._client.stop()
        except (TimeoutError, kafka.KafkaError):
            # `stop` waits for what is retried for ever; this is what it does after that wait.
            if (sender := self._client._sender.sender_task) is not None:
                sender.cancel()
            await self._client.client.close()
        self._fail(DeliveryFailed("the producer was closed before the broker confirmed"))
