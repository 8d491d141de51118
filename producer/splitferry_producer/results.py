"""Reading results: those that requests wait for, and all that come."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

import structlog
from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition
from aiokafka import errors as kafka

from splitferry_protocol.codec import InvalidRecord, decode_outcome
from splitferry_protocol.connection import ConnectionSettings
from splitferry_protocol.ids import RequestId
from splitferry_protocol.records import Accepted, Result
from splitferry_protocol.rights import TOPIC, Right

from .cluster import START_TIMEOUT, client_options, explain, explained, inspect
from .errors import ProducerError

_log = structlog.get_logger(__name__)

_POLL_MS = 1000
_RETRY = 1.0
"""Seconds before reading again after an error that may pass."""
_STOP_BOUND = 5.0
"""Seconds that closing a reader may take."""


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
        self._wanted = Right("Read", TOPIC, topic)
        self._group = group
        self._on_accepted = on_accepted
        # A partition that is added has to wait until the fetch under way has ended, and a fetch
        # without news lasts this long.
        self._consumer = _reader(options, fetch_max_wait_ms=50)
        self._positions: dict[TopicPartition, int] = {}
        self._waiting: dict[RequestId, set[asyncio.Future[Result]]] = {}
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
        await _close(self._consumer)

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
                _assign(self._consumer, self._positions)
        if self._reading is None or self._reading.done():
            self._reading = asyncio.create_task(self._read(), name="splitferry results")
            self._reading.add_done_callback(self._ended)
        result: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        result.add_done_callback(lambda done: done.cancelled() or done.exception())
        self._waiting.setdefault(request, set()).add(result)
        return result

    def forget(self, request: RequestId, result: asyncio.Future[Result]) -> None:
        others = self._waiting[request]
        others.discard(result)
        if not others:
            del self._waiting[request]

    def _explained(self) -> contextlib.AbstractAsyncContextManager[None]:
        return explained(self._options, self._wanted)

    async def _read(self) -> None:
        try:
            while True:
                for record in await _fetch(self._consumer, self._positions):
                    self._take(record)
        except kafka.KafkaError as error:
            self._fail(explain(error, self._options["bootstrap_servers"], self._wanted))

    def _take(self, record: ConsumerRecord[bytes, bytes]) -> None:
        outcome = _outcome(record)
        if outcome is None:
            return
        # Who sends a request may abort it, too, and waits for its result twice then.
        waiting = [one for one in self._waiting.get(outcome.request, ()) if not one.done()]
        if not waiting or self._group not in (None, outcome.group):
            return
        if isinstance(outcome, Result):
            for one in waiting:
                one.set_result(outcome)
        elif self._on_accepted is not None:
            asyncio.get_running_loop().call_soon(self._on_accepted, outcome)

    def _ended(self, reading: asyncio.Task[None]) -> None:
        if not reading.cancelled() and (error := reading.exception()):
            self._fail(ProducerError(f"results are not read any more: {error!r}"))

    def _fail(self, error: ProducerError) -> None:
        for waiting in self._waiting.values():
            for one in waiting:
                if not one.done():
                    one.set_exception(error)


class ResultFeed:
    """Everybody's results, as they are committed: an async context manager, and an iterator.

        async with ResultFeed(connection, group="archive") as feed:
            async for result in feed:
                ...

    Each request has one result in each group; those that are told once more (WIRE, "result",
    `repeat`) are passed over. What is committed after the block was entered is not missed. Errors
    that may pass are waited out. Partitions that the topic gets later are left out: enter anew.

    Args:
        group: the consumer group whose results count; None: of all groups.
        from_start: begin with the oldest result that the topic still has.

    Raises:
        ProducerError: on entering: NoBroker, LoginRefused, UnknownTopic, MissingRights. The
            last ones while reading, too, where rights or the topic are taken away.
    """

    def __init__(
        self,
        connection: ConnectionSettings,
        *,
        results_topic: str = "splitferry.results",
        group: str | None = None,
        from_start: bool = False,
    ) -> None:
        self._connection = connection
        self._topic = results_topic
        self._wanted = Right("Read", TOPIC, results_topic)
        self._group = group
        self._from_start = from_start
        self._options: dict[str, Any] = {}
        self._positions: dict[TopicPartition, int] = {}
        self._consumer: AIOKafkaConsumer | None = None
        self._fetched: deque[ConsumerRecord[bytes, bytes]] = deque()

    def __repr__(self) -> str:
        return f"<ResultFeed {self._topic} {self._positions}>"

    async def __aenter__(self) -> Self:
        self._options = await client_options(self._connection)
        facts = await inspect(self._options, self._wanted)
        wanted = [TopicPartition(self._topic, number) for number in range(facts.partitions)]
        self._consumer = consumer = _reader(self._options)
        try:
            async with explained(self._options, self._wanted), asyncio.timeout(START_TIMEOUT):
                await consumer.start()
                if self._from_start:
                    self._positions = await consumer.beginning_offsets(wanted)
                else:
                    self._positions = await consumer.end_offsets(wanted)
        except BaseException:
            await _close(consumer)
            raise
        _assign(consumer, self._positions)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._consumer is not None
        await _close(self._consumer)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Result:
        assert self._consumer is not None, "not entered"
        while True:
            while self._fetched:
                told = _outcome(self._fetched.popleft())
                if not isinstance(told, Result) or told.repeat:
                    continue
                if self._group in (None, told.group):
                    return told
            try:
                self._fetched.extend(await _fetch(self._consumer, self._positions))
            except kafka.KafkaError as error:
                servers = self._connection.bootstrap_servers
                raise explain(error, servers, self._wanted) from error


def _reader(options: Mapping[str, Any], **more: Any) -> AIOKafkaConsumer:
    return AIOKafkaConsumer(
        group_id=None,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        isolation_level="read_committed",
        **options,
        **more,
    )


def _assign(consumer: AIOKafkaConsumer, positions: Mapping[TopicPartition, int]) -> None:
    """Read from our own positions. An assignment forgets its own, and what was prefetched."""
    consumer.assign(list(positions))
    for where, position in positions.items():
        consumer.seek(where, position)


async def _fetch(
    consumer: AIOKafkaConsumer, positions: dict[TopicPartition, int]
) -> list[ConsumerRecord[bytes, bytes]]:
    """The next records, if some come in time; moves `positions` behind them.

    Raises:
        KafkaError: one that does not pass by itself.
    """
    try:
        fetched = await consumer.getmany(timeout_ms=_POLL_MS)
    except kafka.KafkaError as error:
        # It may have lost records that it had fetched for other partitions.
        _assign(consumer, positions)
        if not getattr(error, "retriable", False):
            raise
        topic = next(iter(positions)).topic
        _log.warning("results cannot be read now", topic=topic, cause=str(error))
        await asyncio.sleep(_RETRY)
        return []
    except UnicodeDecodeError as error:  # the name of a record's header
        _log.warning("a record of the results topic cannot be decoded", cause=repr(error))
        _assign(consumer, positions)  # it counts the records of this poll as handed out
        fetched = await _past(consumer, positions)
    for where, records in fetched.items():
        if records:
            positions[where] = records[-1].offset + 1
    return [record for records in fetched.values() for record in records]


async def _past(
    consumer: AIOKafkaConsumer, positions: dict[TopicPartition, int]
) -> dict[TopicPartition, list[ConsumerRecord[bytes, bytes]]]:
    """One record of a partition that has any; one that cannot be decoded is passed over."""
    for where in list(positions):
        try:
            if fetched := await consumer.getmany(where, timeout_ms=_POLL_MS, max_records=1):
                return fetched
        except UnicodeDecodeError:
            positions[where] += 1
            _assign(consumer, positions)
    return {}


def _outcome(record: ConsumerRecord[bytes, bytes]) -> Result | Accepted | None:
    """What a record of the results topic tells; None for anything else, which is logged."""
    try:
        return decode_outcome(record.key, record.value)
    except InvalidRecord as error:
        _log.warning(
            "skipped a record of the results topic",
            topic=record.topic,
            partition=record.partition,
            offset=record.offset,
            cause=str(error),
        )
        return None


async def _close(consumer: AIOKafkaConsumer) -> None:
    # In a task of its own: aiokafka cancels tasks of its own and awaits them, so that theirs may
    # come out as if it were our cancellation, or ours may be swallowed.
    stopping = asyncio.create_task(consumer.stop())
    try:
        await asyncio.wait([stopping], timeout=_STOP_BOUND)
    finally:
        stopping.cancel()
    if stopping.done() and not stopping.cancelled():
        with contextlib.suppress(kafka.KafkaError):
            stopping.result()
