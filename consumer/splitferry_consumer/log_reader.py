"""Reading topics from outside any group: nothing is committed, joined, fenced or written.

For whoever looks at the log besides its consumers: replay, and what tells how things stand.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping
from typing import Any, Self, TypeVar

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import (
    CorruptRecordException,
    KafkaConnectionError,
    KafkaError,
    OffsetOutOfRangeError,
)
from tenacity import AsyncRetrying, retry_if_exception, stop_after_delay, wait_fixed

from splitferry_protocol.rights import TOPIC, Right

from .bounded import within
from .fetching import (
    FETCH_MAX,
    POLL_MAX,
    REQUEST_BOUND,
    REQUEST_TIMEOUT,
    Fetches,
    as_record,
    stop_consumer,
)
from .inquiry import Inquiry, TopicView, reason
from .transport import HangingTransaction, OutOfRange, Record, TransportError

T = TypeVar("T")

POLL_MS = 200
PATIENCE = 15.0
"""Seconds in which what fails for a moment is asked again."""
STALL_BOUND = 10.0
"""Seconds without progress after which the end of what is to be read counts as out of reach."""


class LogReader:
    """A context manager: its connections are kept from one question to the next.

    All methods raise TransportError, one line that names cause and remedy; its kinds
    TopicUnusable, OutOfRange and HangingTransaction are told apart.

    Args:
        client_options: of `ConnectionSettings.client_options`.
    """

    def __init__(self, client_options: Mapping[str, Any]) -> None:
        self._options = {**client_options, "request_timeout_ms": int(REQUEST_TIMEOUT * 1000)}
        self._inquiry = Inquiry(client_options)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._inquiry.close()

    async def topic(self, name: str) -> TopicView:
        """Its id and partitions. Raises TopicUnusable when it is not there."""
        return await _patiently(lambda: self._inquiry.topic(name))

    async def partitions(self, topic: str) -> list[int]:
        """Numbers of the topic's partitions, in order."""
        return sorted((await self.topic(topic)).leaders)

    async def bounds(self, partition: TopicPartition) -> tuple[int, int]:
        """Start and end of a log; the end counts open transactions."""
        return await _patiently(lambda: self._inquiry.bounds(partition))

    async def stable_end(self, partition: TopicPartition) -> int:
        """The end of what can be read: no transaction that begins below it is open."""
        return await _patiently(lambda: self._inquiry.stable_end(partition))

    async def offset_at(self, partition: TopicPartition, moment: int) -> int | None:
        """The first offset whose record is of `moment` (Unix time in ms) or later.

        None: all records that the log holds are older.
        """
        return await _patiently(lambda: self._inquiry.offset_at(partition, moment))

    async def committed(self, group: str, partition: TopicPartition) -> tuple[int, str] | None:
        """The group's committed offset with its metadata; see `Bookmark.parse`. While a commit
        is under way it is the one before: a lower bound."""
        return await _patiently(
            lambda: self._inquiry.committed(group, partition, wanted="Describe", stable=False)
        )

    def records(
        self, partition: TopicPartition, start: int, end: int
    ) -> AsyncGenerator[Record, None]:
        """See `read_log`."""
        return read_log(self._options, partition, start, end, REQUEST_BOUND)


async def _patiently(question: Callable[[], Awaitable[T]]) -> T:
    """Ask again what fails for a moment only: a partition or a group changes hands, a broker is
    slow, or a cluster that has had no group yet first makes the topic for their offsets."""
    async for attempt in AsyncRetrying(
        retry=retry_if_exception(_passes),
        stop=stop_after_delay(PATIENCE),
        wait=wait_fixed(0.2),
        reraise=True,
    ):
        with attempt:
            return await question()
    raise AssertionError("unreachable")


def _passes(error: BaseException) -> bool:
    cause = error.__cause__
    if isinstance(cause, KafkaError):
        return cause.retriable and not isinstance(cause, KafkaConnectionError)
    return isinstance(cause, TimeoutError)


async def read_log(
    client_options: Mapping[str, Any],
    partition: TopicPartition,
    start: int,
    end: int,
    silence: float = STALL_BOUND,
) -> AsyncGenerator[Record, None]:
    """Committed records of `partition` from the offset `start` until `end` is reached.

    Holds at most what two fetches bring. Close it (`contextlib.aclosing`) when it is left early.

    Args:
        silence: seconds without a record, where there are some, after which it is given up.

    Raises:
        OutOfRange: the log does not hold the next offset: retention was quicker.
        HangingTransaction: an open transaction keeps `end` from being reached; all that can be
            read was given before.
        TransportError: Kafka did not answer, or refused.
    """
    if start >= end:
        return
    right = Right("Read", TOPIC, partition.topic)
    reader = AIOKafkaConsumer(
        **client_options,
        isolation_level="read_committed",
        enable_auto_commit=False,
        # A position outside the log must be heard of, not moved.
        auto_offset_reset="none",
        # The contract's own CRC-32C covers every value, and mended batches do not keep Kafka's.
        check_crcs=False,
        max_partition_fetch_bytes=FETCH_MAX,
        fetch_max_bytes=FETCH_MAX,
    )
    try:
        fetches = Fetches(reader, FETCH_MAX)
        await _ask(reader.start())
        reader.assign([partition])
        reader.seek(partition, start)
        # Aborted records and markers are passed over without being handed out, so it is the
        # position that tells whether the end was reached.
        position, moved = start, asyncio.get_running_loop().time()
        while position < end:
            try:
                found = await _ask(
                    reader.getmany(partition, timeout_ms=POLL_MS, max_records=POLL_MAX), right
                )
            except TransportError:
                raise
            except Exception as error:
                if fetches.mending:
                    raise TransportError(
                        f"{_told(partition, position, end)}: a record could not be decoded: "
                        f"{reason(error)}"
                    ) from error
                # aiokafka counts the records of this poll as handed out.
                fetches.mend()
                reader.seek(partition, position)
                continue
            for record in found.get(partition, ()):
                if record.offset < end:
                    yield as_record(partition, record)
            before, position = position, await _ask(reader.position(partition))
            now = asyncio.get_running_loop().time()
            if position > before:
                moved = now
            elif now - moved > STALL_BOUND:
                stable = reader.last_stable_offset(partition)
                if stable is not None and position >= stable:
                    raise HangingTransaction(
                        f"{_told(partition, position, end)}: a transaction of another producer is "
                        "open there; end it, or wait for its time-out"
                    )
                if now - moved > silence:
                    raise TransportError(
                        f"{_told(partition, position, end)}: nothing came for {silence:g} s; see "
                        "that the leader of this partition is up"
                    )
    finally:
        await stop_consumer(reader)


def _told(partition: TopicPartition, position: int, end: int) -> str:
    return (
        f"the records from offset {position} to {end} of {partition.topic} partition "
        f"{partition.partition} cannot be read"
    )


async def _ask(request: Coroutine[Any, Any, T], *asked: Right) -> T:
    try:
        return await within(REQUEST_BOUND, request)
    except OffsetOutOfRangeError as error:
        raise OutOfRange([tp.partition for tp in error.args[0]]) from error
    except CorruptRecordException:
        raise
    except (KafkaError, TimeoutError) as error:
        raise TransportError(reason(error, *asked)) from error
