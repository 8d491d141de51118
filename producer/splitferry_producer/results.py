"""Waiting for results: one read_committed reader of the partitions that requests use."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import structlog
from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition
from aiokafka import errors as kafka

from splitferry_protocol.codec import InvalidRecord, decode_outcome
from splitferry_protocol.ids import RequestId
from splitferry_protocol.records import Accepted, Result

from .cluster import START_TIMEOUT, explain, explained
from .errors import ProducerError

_log = structlog.get_logger(__name__)

_POLL_MS = 1000
_RETRY = 1.0
"""Seconds before reading again after an error that may pass."""


class ResultReader:
    """Tells each waiting request its result.

    A partition is read from its end as it was before the first split of the first request that
    uses it: `expect` returns after that end was taken, and only then may the request open.

    Args:
        group: the consumer group whose results count; None: the first that comes.
        on_accepted: told every accepted event of a request that waits here.
    """

    def __init__(
        self,
        options: Mapping[str, Any],
        topic: str,
        group: str | None = None,
        on_accepted: Callable[[Accepted], None] | None = None,
    ) -> None:
        self._options = options
        self._topic = topic
        self._group = group
        self._on_accepted = on_accepted
        self._consumer = AIOKafkaConsumer(
            group_id=None,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            isolation_level="read_committed",
            # A partition that is added has to wait until the fetch under way has ended, and a
            # fetch without news lasts this long.
            fetch_max_wait_ms=50,
            **options,
        )
        self._positions: dict[TopicPartition, int] = {}
        self._waiting: dict[RequestId, asyncio.Future[Result]] = {}
        self._reading: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<ResultReader {self._topic} waiting={len(self._waiting)} {self._positions}>"

    async def start(self) -> None:
        """Connect. Raises ProducerError; the reader is closed then."""
        try:
            async with self._explained(), asyncio.timeout(START_TIMEOUT):
                await self._consumer.start()
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Disconnect; whoever still waits gets a ProducerError."""
        self._fail(ProducerError("the producer was closed before the result came"))
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.wait([self._reading])
        with contextlib.suppress(TimeoutError, kafka.KafkaError):
            async with asyncio.timeout(5):
                await self._consumer.stop()

    async def expect(self, request: RequestId, partition: int) -> asyncio.Future[Result]:
        """The request's result, once it comes; call it before the request opens.

        Raises:
            ProducerError: the results topic, or this partition of it, cannot be read.
        """
        where = TopicPartition(self._topic, partition)
        if where not in self._positions:
            async with self._explained(), asyncio.timeout(START_TIMEOUT):
                end = (await self._consumer.end_offsets([where]))[where]
            # Two requests may have asked at once. Neither has opened yet, so either end will do,
            # but once one is set the request that it was set for may open: never move it.
            if where not in self._positions:
                self._positions[where] = end
                self._assign()
        if self._reading is None or self._reading.done():
            self._reading = asyncio.create_task(self._read(), name="splitferry results")
            self._reading.add_done_callback(self._ended)
        result: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        result.add_done_callback(lambda done: done.cancelled() or done.exception())
        self._waiting[request] = result
        return result

    def forget(self, request: RequestId) -> None:
        self._waiting.pop(request, None)

    def _explained(self) -> contextlib.AbstractAsyncContextManager[None]:
        return explained(self._options, "Read", self._topic)

    def _assign(self) -> None:
        """Read from our own positions. An assignment forgets its own, and what was prefetched."""
        self._consumer.assign(list(self._positions))
        for where, position in self._positions.items():
            self._consumer.seek(where, position)

    async def _read(self) -> None:
        while True:
            try:
                fetched = await self._consumer.getmany(timeout_ms=_POLL_MS)
            except kafka.KafkaError as error:
                # It may have lost records that it had fetched for other partitions.
                self._assign()
                if not getattr(error, "retriable", False):
                    told = explain(error, self._options["bootstrap_servers"], "Read", self._topic)
                    self._fail(told)
                    return
                _log.warning("results cannot be read now", topic=self._topic, cause=str(error))
                await asyncio.sleep(_RETRY)
                continue
            for where, records in fetched.items():
                for record in records:
                    self._take(record)
                    self._positions[where] = record.offset + 1

    def _take(self, record: ConsumerRecord[bytes, bytes]) -> None:
        try:
            outcome = decode_outcome(record.key, record.value)
        except InvalidRecord as error:
            _log.warning(
                "skipped a record of the results topic",
                topic=record.topic,
                partition=record.partition,
                offset=record.offset,
                cause=str(error),
            )
            return
        waiting = self._waiting.get(outcome.request)
        if waiting is None or waiting.done() or self._group not in (None, outcome.group):
            return
        if isinstance(outcome, Result):
            waiting.set_result(outcome)
        elif self._on_accepted is not None:
            asyncio.get_running_loop().call_soon(self._on_accepted, outcome)

    def _ended(self, reading: asyncio.Task[None]) -> None:
        if not reading.cancelled() and (error := reading.exception()):
            self._fail(ProducerError(f"results are not read any more: {error!r}"))

    def _fail(self, error: ProducerError) -> None:
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(error)
