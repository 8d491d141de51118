"""Sends dead letters again, each at most once, whoever does it and whatever crashes.

What is sent again leaves a note in the partition of its dead letter, in one transaction with the
record. The transactional id is the same for everybody who sends the dead letters of a topic
again: starting the producer settles what a crashed one left and fences one that still works, so
notes that are read after that are all there will be but ours.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Iterable, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.errors import (
    InvalidProducerEpoch,
    KafkaError,
    MessageSizeTooLargeError,
    ProducerFenced,
    RecordListTooLargeError,
)

from splitferry_consumer.bounded import within
from splitferry_consumer.dead_letters import Letter, Position, Requeued, read_letter
from splitferry_consumer.kafka import RECORD_MAX, TRANSACTION_TIMEOUT, stop_producer
from splitferry_consumer.log_reader import LogReader
from splitferry_consumer.transport import Outgoing
from splitferry_protocol.codec import InvalidRecord, decode_record
from splitferry_protocol.connection import ConnectionSettings
from splitferry_protocol.ids import RequestId
from splitferry_protocol.records import Result
from splitferry_protocol.rights import TOPIC, TRANSACTIONAL_ID, Right

from .cluster import administration, asking
from .failures import Failure
from .lookup import result_in
from .topic_rules import Names

START_BOUND = 30.0
"""Seconds to get the epoch, which may have to wait until a crashed transaction is settled."""
SEND_BOUND = 15.0
"""Seconds that one transaction may take."""


class Outcome(StrEnum):
    REQUEUED = "requeued"
    BEFORE = "requeued before"
    REFUSED = "refused"
    MISSING = "not found"


@dataclass(frozen=True, slots=True)
class Handled:
    """What became of one dead letter.

    Attributes:
        to: where the record lies now, in the splits topic.
        at: since when, Unix time in ms; None: since now.
        reason: why it was not sent.
    """

    letter: Position
    outcome: Outcome
    to: Position | None = None
    at: int | None = None
    reason: str | None = None


async def requeue(
    connection: ConnectionSettings,
    names: Names,
    group: str,
    wanted: Iterable[Position],
    force: bool,
) -> AsyncGenerator[Handled]:
    """What becomes of each of the `wanted`, in their order.

    Raises:
        Failure: nothing more was done; what is left can be tried again.
    """
    wanted = dict.fromkeys(wanted)  # in their order, each once, and quickly found
    async with administration(connection) as cluster:
        splits = await cluster.partitions(names.splits, "Write")
    options = await asyncio.to_thread(connection.client_options)
    async with LogReader(options) as log:
        await log.topic(names.dead_letters)
        async with _sole(options, names) as producer:
            notes, requests = await _known(log, names.dead_letters, wanted)
            ended = {} if force else await _ended(log, names.results, group, requests)
            for position in wanted:
                if note := notes.get(position):
                    yield Handled(position, Outcome.BEFORE, note.to, note.at)
                    continue
                letter = await find(log, names.dead_letters, position)
                if not isinstance(letter, Letter):
                    yield Handled(position, Outcome.MISSING, reason=letter)
                    continue
                reason = impossible(letter, names.splits, splits)
                if reason is None and not force:
                    reason = useless(letter, ended.get(letter.request))
                if reason is not None:
                    yield Handled(position, Outcome.REFUSED, reason=reason)
                else:
                    yield await _send(producer, names, letter)


def impossible(letter: Letter, splits_topic: str, partitions: int) -> str | None:
    """Why the record cannot be sent at all. Pure."""
    if letter.topic != splits_topic:
        return f"it came from topic {letter.topic}: name that with --splits-topic"
    if letter.source.partition >= partitions:
        return (
            f"it came from partition {letter.source.partition}, but {splits_topic} has "
            f"{partitions} now: the topic was made anew"
        )
    if letter.is_stub:
        return "its value was not kept (too large, or empty from the start): send the item again"
    return None


def useless(letter: Letter, ended: Result | None) -> str | None:
    """Why the record would do nothing, or become a dead letter again. Pure."""
    try:
        decode_record(letter.key, letter.value, letter.headers)
    except InvalidRecord as invalid:
        return (
            f"it would become a dead letter again ({invalid.message}): send the item again, or "
            "this record all the same with --force"
        )
    if ended is not None:
        return (
            f"request {ended.request} has ended as {ended.status}, and no record changes that: "
            "send the item again, or this record all the same with --force"
        )
    return None


async def find(log: LogReader, topic: str, position: Position) -> Letter | str:
    """The dead letter, or why there is none."""
    where = TopicPartition(topic, position.partition)
    if position.partition not in await log.partitions(topic):
        return f"{topic} has no partition {position.partition}"
    start, end = await log.bounds(where)
    if position.offset < start:
        return f"it was deleted: partition {position.partition} of {topic} begins at {start} now"
    if position.offset >= end:
        return f"partition {position.partition} of {topic} ends at {end}"
    async with aclosing(log.records(where, position.offset, position.offset + 1)) as records:
        async for record in records:
            found = read_letter(position.partition, record)
            if isinstance(found, Letter):
                return found
    return "no dead letter lies there: `splitferry dead-letters list` shows where they are"


async def letters(
    log: LogReader, where: TopicPartition, start: int, end: int
) -> AsyncGenerator[Letter | Requeued]:
    """What lies in a partition of the dead-letter topic."""
    async with aclosing(log.records(where, start, end)) as records:
        async for record in records:
            if (found := read_letter(where.partition, record)) is not None:
                yield found


Requests = Mapping[int, Collection[RequestId | None]]
"""By the partition where their splits and results lie."""


async def _known(
    log: LogReader, topic: str, wanted: Collection[Position]
) -> tuple[Mapping[Position, Requeued], Requests]:
    """The notes about those that are `wanted`, and the requests that they are of.

    A note lies behind its dead letter.
    """
    notes: dict[Position, Requeued] = {}
    requests: defaultdict[int, set[RequestId | None]] = defaultdict(set)
    held = await log.partitions(topic)
    for partition in {position.partition for position in wanted} & set(held):
        where = TopicPartition(topic, partition)
        start, end = await log.bounds(where)
        first = min(position.offset for position in wanted if position.partition == partition)
        async with aclosing(letters(log, where, max(start, first), end)) as records:
            async for one in records:
                if isinstance(one, Requeued):
                    if one.letter in wanted:
                        notes.setdefault(one.letter, one)
                elif one.at in wanted:
                    requests[one.source.partition].add(one.request)
    return notes, requests


async def _ended(
    log: LogReader, topic: str, group: str, requests: Requests
) -> Mapping[RequestId | None, Result]:
    """The results of the `requests` that `group` has recorded."""
    found: dict[RequestId | None, Result] = {}
    for partition in set(requests) & set(await log.partitions(topic)):
        where = TopicPartition(topic, partition)
        keys = {request.key for request in requests[partition] if request is not None}
        async with aclosing(log.records(where, *await log.bounds(where))) as records:
            async for record in records:
                if record.key in keys:
                    result = result_in(record.key, record.value)
                    if result is not None and result.group == group:
                        found[result.request] = result
    return found


@asynccontextmanager
async def _sole(options: Mapping[str, Any], names: Names) -> AsyncIterator[AIOKafkaProducer]:
    """A producer that no other may be beside."""
    identity = f"{names.dead_letters}/requeue"
    producer = AIOKafkaProducer(
        **options,
        transactional_id=identity,
        transaction_timeout_ms=int(TRANSACTION_TIMEOUT * 1000),
        max_request_size=RECORD_MAX,
    )
    rights = (
        Right("Write", TRANSACTIONAL_ID, identity),
        Right("Write", TOPIC, names.splits),
        Right("Write", TOPIC, names.dead_letters),
    )
    try:
        with asking(*rights):
            await within(START_BOUND, producer.start())
            yield producer
    except (ProducerFenced, InvalidProducerEpoch) as error:
        raise Failure(
            f"somebody else began to send dead letters of {names.dead_letters} again, which ended "
            "this one: run it again, what was sent stays sent"
        ) from error
    finally:
        await stop_producer(producer)


async def _send(producer: AIOKafkaProducer, names: Names, letter: Letter) -> Handled:
    """Send the record and its note, both or none."""
    where = TopicPartition(names.splits, letter.source.partition)
    sequences: dict[TopicPartition, int] = producer._txn_manager._sequence_numbers
    sequence = sequences[where]

    async def transact() -> Position:
        async with producer.transaction():
            offset = await _written(producer, letter.outgoing)
            to = Position(letter.source.partition, offset)
            await _written(producer, Requeued(letter.at, to).outgoing(names.dead_letters))
        return to

    try:
        # What goes on after the bound does so with the epoch that the next producer ends.
        to = await within(SEND_BOUND, transact())
    except (MessageSizeTooLargeError, RecordListTooLargeError):
        # aiokafka counts it, and the broker does not: it would refuse every later one there.
        sequences[where] = sequence
        reason = (
            f"{names.splits} takes no record of its size now: raise its max.message.bytes, or send "
            "the item again in smaller splits"
        )
        return Handled(letter.at, Outcome.REFUSED, reason=reason)
    except TimeoutError as error:
        raise Failure(
            f"dead letter {letter.at}: the brokers did not confirm it within {SEND_BOUND:g} s; "
            "run it again, it is sent once at most"
        ) from error
    return Handled(letter.at, Outcome.REQUEUED, to)


async def _written(producer: AIOKafkaProducer, record: Outgoing) -> int:
    sent = await producer.send_and_wait(
        record.topic,
        record.value,
        record.key,
        record.partition,
        headers=list(record.headers),
    )
    if sent.offset < 0:
        raise KafkaError("the broker did not say where it has put the record: run it again")
    return int(sent.offset)
