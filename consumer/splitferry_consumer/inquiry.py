"""What taking a partition asks of Kafka: which topics there are, where logs begin and end, what
the group has committed.

The connections are kept from one question to the next, and dropped with the first that brings no
answer: taking is the way out of every fault, so each try has to begin on connections that may
work. A firewall that has lost its state lets a connection die without a word.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from aiokafka.client import AIOKafkaClient, CoordinationType
from aiokafka.conn import create_conn
from aiokafka.errors import (
    InvalidTimestampError,
    KafkaConnectionError,
    KafkaError,
    NodeNotReadyError,
    RequestTimedOutError,
    StaleMetadata,
    TopicAuthorizationFailedError,
    UnknownTopicOrPartitionError,
    for_code,
)
from aiokafka.protocol.metadata import MetadataRequest
from aiokafka.protocol.offset import OffsetRequest
from aiokafka.structs import TopicPartition

from splitferry_protocol.reach import why_unreachable
from splitferry_protocol.rights import GROUP, TOPIC, Right, missing_right

from .bounded import Leaked, bounded, within
from .requests import DescribeProducers, DescribeTopics, FetchOffset
from .transport import TopicUnusable, TransportError

T = TypeVar("T")

ANSWER_TIMEOUT = 5.0
"""Seconds for one answer; all of them are small, and are asked for one by one."""
ANSWER_BOUND = 10.0
"""Seconds for a question with all that it takes: connecting, looking up a coordinator."""
UNSTABLE_OFFSET_COMMIT = 88
_READ_UNCOMMITTED, _READ_COMMITTED = 0, 1
_EARLIEST, _LATEST = -2, -1


class Unstable(TransportError):
    """A transaction that commits the offset anew is not ended."""


@dataclass(frozen=True, slots=True)
class TopicView:
    """A topic as the brokers describe it."""

    id: str
    """Another one when the topic was deleted and made anew under its name."""
    leaders: Mapping[int, int]
    """The broker that leads each partition, -1: none does."""


class Inquiry:
    """Every question raises TransportError where there is no answer."""

    def __init__(self, client_options: Mapping[str, Any]) -> None:
        self._options = {**client_options, "request_timeout_ms": int(ANSWER_TIMEOUT * 1000)}
        self._closing: set[asyncio.Task[None]] = set()
        """Connections that failed, or are not needed any more."""
        self._opening = asyncio.Lock()
        self._client: AIOKafkaClient | None = None

    async def topic(self, name: str) -> TopicView:
        """Raises TransportError, and TopicUnusable when there is no such topic."""
        (view,) = await self.topics(name)
        return view

    async def topics(self, *names: str) -> list[TopicView]:
        """As `topic`, for several in one answer."""
        rights = [Right("Read", TOPIC, name) for name in names]
        return await self._ask(lambda client: _topics(client, rights))

    async def bounds(self, partition: TopicPartition) -> tuple[int, int]:
        """Start and end of a log; the end counts open transactions. Raises TransportError."""
        return await self._offset(partition, _EARLIEST), await self._offset(partition, _LATEST)

    async def stable_end(self, partition: TopicPartition) -> int:
        """Where the first open transaction begins, else the end. Raises TransportError."""
        return await self._offset(partition, _LATEST, _READ_COMMITTED)

    async def offset_at(self, partition: TopicPartition, moment: int) -> int | None:
        """The first offset with a record of `moment` (Unix time in ms) or later, None without
        one. Raises TransportError."""
        offset = await self._offset(partition, moment)
        return None if offset < 0 else offset

    async def _offset(
        self, partition: TopicPartition, which: int, isolation: int = _READ_UNCOMMITTED
    ) -> int:
        leader = await self._leader(partition)
        right = Right("Read", TOPIC, partition.topic)
        return await self._ask(
            lambda client: _bound(client, leader, partition, which, isolation), right
        )

    async def _leader(self, partition: TopicPartition) -> int:
        view = await self.topic(partition.topic)
        if partition.partition not in view.leaders:
            raise TopicUnusable(
                f"topic {partition.topic} has {len(view.leaders)} partitions, none with the "
                f"number {partition.partition}: add partitions to it"
            )
        leader = view.leaders[partition.partition]
        if leader < 0:
            # To ask nobody would fail, and drop the connection under the questions of all others.
            raise TransportError(
                f"partition {partition.partition} of topic {partition.topic} has no leader: start "
                "the brokers that hold it"
            )
        return leader

    async def transaction_open(self, partition: TopicPartition, producer: int) -> bool:
        """Whether a transaction of that producer id is open there. Raises TransportError."""
        leader = await self._leader(partition)
        right = Right("Read", TOPIC, partition.topic)
        return await self._ask(
            lambda client: _transaction_open(client, leader, partition, producer), right
        )

    async def committed(
        self, group: str, partition: TopicPartition, *, wanted: str = "Read", stable: bool = True
    ) -> tuple[int, str] | None:
        """The committed offset with its metadata. Raises TransportError, and Unstable.

        Args:
            wanted: the right to the group that includes this question.
            stable: refuse to answer while a transaction that commits another one is open.
        """
        right = Right(wanted, GROUP, group)
        return await self._ask(lambda client: _committed(client, group, partition, stable), right)

    async def close(self) -> None:
        """Bounded; never raises."""
        if self._client is not None:
            self._close(self._client)
        if self._closing:
            await asyncio.wait(self._closing)

    def _close(self, client: AIOKafkaClient) -> None:
        closing = asyncio.create_task(bounded(client.close()))
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)

    async def _ask(self, question: Callable[[AIOKafkaClient], Awaitable[T]], *asked: Right) -> T:
        client: AIOKafkaClient | None = None

        async def answer() -> T:
            nonlocal client
            client = await self._connected()
            return await question(client)

        try:
            return await within(ANSWER_BOUND, answer())
        except _UNREACHABLE as error:
            # Others may have replaced it meanwhile.
            if client is not None and client is self._client:
                self._client = None
                self._close(client)
            if client is None and isinstance(error, KafkaConnectionError):
                raise TransportError(await diagnosis(self._options)) from error
            raise TransportError(f"no broker answers: {reason(error)}") from error
        except KafkaError as error:
            raise TransportError(reason(error, *asked)) from error

    async def _connected(self) -> AIOKafkaClient:
        async with self._opening:
            if self._client is None:
                made = AIOKafkaClient(**self._options)
                try:
                    await made.bootstrap()
                except BaseException:
                    self._close(made)
                    raise
                self._client = made
            return self._client


_UNREACHABLE = (
    AssertionError,  # aiokafka's, that it knows a broker; one that has just started names none
    Leaked,
    TimeoutError,
    OSError,
    KafkaConnectionError,
    NodeNotReadyError,
    RequestTimedOutError,
    StaleMetadata,
)


def reason(error: BaseException, *asked: Right) -> str:
    """One line about `error`; `asked` are the rights that may have been missing."""
    if isinstance(error, TimeoutError):
        return "Kafka did not answer in time"
    if isinstance(error, InvalidTimestampError):
        return (
            "the broker refuses the time of our records: set this host's clock right, or have "
            "the topics keep the broker's time (message.timestamp.type=LogAppendTime)"
        )
    right = missing_right(error, *asked)
    if right:
        return right.missing
    name, text = type(error).__name__, str(error)
    return text if name in text else f"{name}: {text}"


async def diagnosis(client_options: Mapping[str, Any]) -> str:
    """Why no broker can be used; aiokafka only logs it."""
    bound = partial(asyncio.timeout, ANSWER_TIMEOUT)
    return (await why_unreachable(client_options, create_conn, MetadataRequest([]), bound)).message


async def _topics(client: AIOKafkaClient, wanted: Sequence[Right]) -> list[TopicView]:
    names = [right.name for right in wanted]
    response = await client.send(client.get_random_node(), DescribeTopics(names))
    found = {
        name: (code, identity, partitions)
        for code, name, identity, _, partitions, _, _ in response.topics
    }
    return [_view(right, *found[right.name]) for right in wanted]


def _view(wanted: Right, code: int, identity: str, partitions: Sequence[Any]) -> TopicView:
    name = wanted.name
    if code == UnknownTopicOrPartitionError.errno:
        raise TopicUnusable(
            f"topic {name} does not exist: create it with `splitferry topics create`"
        )
    if code == TopicAuthorizationFailedError.errno:
        raise TopicUnusable(wanted.missing)
    if code:
        raise for_code(code)(name)
    return TopicView(identity, {number: leader for _, number, leader, *_ in partitions})


async def _bound(
    client: AIOKafkaClient, leader: int, tp: TopicPartition, which: int, isolation: int
) -> int:
    request = OffsetRequest(-1, isolation, [(tp.topic, [(tp.partition, which)])])
    response = await client.send(leader, request)
    (((_, code, _, offset, *_),),) = (partitions for _, partitions in response.topics)
    if code:
        raise for_code(code)(tp)
    return int(offset)


async def _transaction_open(
    client: AIOKafkaClient, leader: int, tp: TopicPartition, producer: int
) -> bool:
    response = await client.send(leader, DescribeProducers(tp))
    ((_, ((_, code, _, producers, _),), _),) = response.topics
    if code:
        raise for_code(code)(tp)
    return any(number == producer and start >= 0 for number, *_, start, _ in producers)


async def _committed(
    client: AIOKafkaClient, group: str, tp: TopicPartition, stable: bool
) -> tuple[int, str] | None:
    coordinator = await client.coordinator_lookup(CoordinationType.GROUP, group)
    response = await client.send(coordinator, FetchOffset(group, tp, stable))
    if response.error_code:
        raise for_code(response.error_code)(group)
    found = [
        facts
        for topic, partitions, _ in response.topics
        for number, *facts in partitions
        if (topic, number) == (tp.topic, tp.partition)
    ]
    if not found:
        # Taken for "no commit" it would mean reading everything anew.
        raise TransportError(f"the coordinator of group {group} gave no offsets")
    ((offset, _, metadata, code, _),) = found
    if code == UNSTABLE_OFFSET_COMMIT:
        raise Unstable("the last transaction of the previous owner has not been settled yet")
    if code:
        raise for_code(code)(tp)
    return None if offset < 0 else (offset, metadata or "")
