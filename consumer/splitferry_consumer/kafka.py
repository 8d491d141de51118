"""The aiokafka form of the transport. What it works around is measured in docs/DESIGN.md."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import (
    AsyncGenerator,
    Callable,
    Collection,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import contextmanager, suppress
from itertools import groupby, zip_longest
from typing import Any

import structlog
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, ConsumerRebalanceListener, TopicPartition
from aiokafka.client import AIOKafkaClient
from aiokafka.errors import (
    CorruptRecordException,
    GroupAuthorizationFailedError,
    IllegalOperation,
    IllegalStateError,
    InvalidProducerEpoch,
    KafkaError,
    MessageSizeTooLargeError,
    OffsetOutOfRangeError,
    OutOfOrderSequenceNumber,
    ProducerFenced,
    TopicAuthorizationFailedError,
    UnknownTopicOrPartitionError,
)
from aiokafka.protocol.metadata import MetadataRequest
from aiokafka.structs import OffsetAndMetadata

from splitferry_protocol.rights import GROUP, TOPIC, TRANSACTIONAL_ID, Right

from .bookmark import TopicIds
from .bounded import Leaked, bounded, is_ours, within
from .fetching import (
    FETCH_MAX,
    FETCH_ROOM,
    POLL_MAX,
    REQUEST_BOUND,
    REQUEST_TIMEOUT,
    Fetches,
    as_record,
    stop_consumer,
)
from .inquiry import Inquiry, diagnosis, reason
from .leftover import end_leftover, leftover
from .log_reader import read_log
from .transport import (
    Excluded,
    FateUnknown,
    Fenced,
    LeftOpen,
    Outgoing,
    OutOfRange,
    Rebalanced,
    Record,
    TooLarge,
    TransportError,
)

log = structlog.get_logger(__name__)

PUBLISH_BOUND = 15.0
"""Seconds that a transaction may take."""
TRANSACTION_TIMEOUT = 20.0
"""Seconds after which the broker aborts a transaction and fences its producer. Until then the
transaction of a crashed owner hides the results of other groups behind it."""
HEARD_BOUND = 5.0
"""Seconds after which what the broker last said of a partition is old."""
FETCH_BUDGET = 32 * 1024 * 1024
"""Bytes of prefetched records of all partitions (DESIGN, "What aiokafka needs")."""
RECORD_MAX = 32 * 1024 * 1024
"""Bytes: above every limit of the contract, so that the broker's limit decides."""

_NOWHERE = TopicPartition("", -1)


class StartError(Exception):
    """The consumer cannot start; one line that names the cause and the remedy."""


async def check_topics(
    client_options: Mapping[str, Any], splits_topic: str, results_topic: str, dead_letters: str
) -> None:
    """The topics exist, and every splits partition has its results partition (WIRE, "Topics")."""
    # The right that is needed for each includes the right to ask about it.
    wanted = {
        splits_topic: Right("Read", TOPIC, splits_topic),
        results_topic: Right("Read", TOPIC, results_topic),
        dead_letters: Right("Write", TOPIC, dead_letters),
    }
    client = AIOKafkaClient(**client_options)

    async def ask() -> Any:
        await client.bootstrap()
        # By default, asking for a topic by name creates it where the broker allows that.
        return await client.send(
            client.get_random_node(),
            MetadataRequest(list(wanted), allow_auto_topic_creation=False),
        )

    try:
        metadata = await within(REQUEST_BOUND, ask())
    except (KafkaError, TimeoutError, OSError) as error:
        raise StartError(await diagnosis(client_options)) from error
    finally:
        await bounded(client.close())
    topics = {topic["topic"]: topic for topic in metadata.to_object()["topics"]}
    for name, right in wanted.items():
        code = topics[name]["error_code"] if name in topics else UnknownTopicOrPartitionError.errno
        if code == TopicAuthorizationFailedError.errno:
            raise StartError(right.missing)
        if code:
            raise StartError(
                f"topic {name} does not exist: create it with `splitferry topics create`"
            )
    splits, results = (len(topics[name]["partitions"]) for name in (splits_topic, results_topic))
    if results < splits:
        raise StartError(
            f"topic {results_topic} has {results} partitions, fewer than the {splits} of "
            f"{splits_topic}: add partitions to it, at least as many"
        )


class AiokafkaTransport:
    """One member of `group`; see `Transport` for what the methods promise."""

    def __init__(
        self,
        client_options: Mapping[str, Any],
        group: str,
        splits_topic: str,
        results_topic: str,
        session_timeout: float,
    ) -> None:
        self._options = {**client_options, "request_timeout_ms": int(REQUEST_TIMEOUT * 1000)}
        self._group = group
        self._splits_topic = splits_topic
        self._results_topic = results_topic
        self._session_timeout = session_timeout
        self._reading = (Right("Read", TOPIC, splits_topic), Right("Read", GROUP, group))
        self._looking = asyncio.Lock()
        self._looked_at = -math.inf
        self._topics = ("", "")
        self._inquiry = Inquiry(client_options)
        self._consumer: AIOKafkaConsumer | None = None
        self._fetches: Fetches  # with the consumer
        self._heard: dict[int, tuple[int, float]] = {}
        """When aiokafka last heard of a partition, by its clock and by ours."""

    async def start(self, assigned: Rebalanced, revoked: Rebalanced) -> None:
        try:
            await self._join(_Listener(self._park, assigned, revoked))
        except (KafkaError, TimeoutError) as error:
            raise TransportError(reason(error, *self._reading)) from error

    async def _join(self, listener: ConsumerRebalanceListener) -> None:
        partitions = max(1, len((await self._inquiry.topic(self._splits_topic)).leaders))
        milliseconds = int(self._session_timeout * 1000)
        fetch_size = min(FETCH_MAX, max(1024 * 1024, FETCH_BUDGET // partitions) + FETCH_ROOM)
        self._consumer = AIOKafkaConsumer(
            **self._options,
            group_id=self._group,
            isolation_level="read_committed",
            enable_auto_commit=False,
            # A position outside the log must be heard of, not moved: see `poll`.
            auto_offset_reset="none",
            # The contract's own CRC-32C covers every value.
            check_crcs=False,
            max_partition_fetch_bytes=fetch_size,
            fetch_max_bytes=FETCH_MAX,
            # A partition that goes on after a pause has to wait until the fetch under way has
            # ended, and a fetch without news lasts this long.
            fetch_max_wait_ms=50,
            session_timeout_ms=milliseconds,
            rebalance_timeout_ms=max(milliseconds, 30_000),
            heartbeat_interval_ms=max(100, milliseconds // 4),
            max_poll_interval_ms=300_000,
            # How late an added partition may be noticed.
            metadata_max_age_ms=10_000,
        )
        self._fetches = Fetches(self._consumer, fetch_size)
        self._consumer.subscribe([self._splits_topic], listener=listener)
        await within(REQUEST_BOUND, self._consumer.start())

    async def stop(self) -> None:
        if self._consumer is not None:
            await stop_consumer(self._consumer)
        await self._inquiry.close()

    def _park(self, partitions: Collection[int]) -> None:
        """Hold new partitions still until they are taken.

        After a rejoin positions are back at the committed offset and pauses are gone, for kept
        partitions too. A position, any, keeps aiokafka from looking one up itself.
        """
        for partition in partitions:
            self.pause(partition)
            self.seek(partition, 0)

    # ---- the splits

    async def poll(self, wanted: Collection[int], wait: float) -> Mapping[int, Sequence[Record]]:
        assert self._consumer is not None
        # Without partitions getmany would answer for all, and throw away what it holds of the
        # paused ones; with one that is not ours it only waits.
        asked = [TopicPartition(self._splits_topic, p) for p in wanted] or [_NOWHERE]
        try:
            batches = await self._consumer.getmany(
                *asked, timeout_ms=int(wait * 1000), max_records=POLL_MAX
            )
        except OffsetOutOfRangeError as error:
            raise OutOfRange([tp.partition for tp in error.args[0]]) from error
        except GroupAuthorizationFailedError as error:
            # aiokafka gives up its heartbeats with this, and goes on raising it.
            raise Excluded(reason(error, *self._reading)) from error
        except KafkaError as error:
            if isinstance(error, CorruptRecordException):
                self._fetches.mend()
            raise TransportError(reason(error, *self._reading)) from error
        except asyncio.CancelledError as error:
            if is_ours():
                raise
            raise TransportError(reason(Leaked())) from error
        except Exception as error:
            self._fetches.mend()
            raise TransportError(f"a record could not be decoded: {reason(error)}") from error
        return {
            tp.partition: [as_record(tp, record) for record in records]
            for tp, records in batches.items()
        }

    def seek(self, partition: int, offset: int) -> None:
        assert self._consumer is not None
        with suppress(IllegalStateError):  # not assigned any more: `revoked` is on its way
            self._consumer.seek(TopicPartition(self._splits_topic, partition), offset)

    def pause(self, partition: int) -> None:
        assert self._consumer is not None
        with suppress(IllegalStateError):
            self._consumer.pause(TopicPartition(self._splits_topic, partition))

    def resume(self, partition: int) -> None:
        assert self._consumer is not None
        with suppress(IllegalStateError):
            self._consumer.resume(TopicPartition(self._splits_topic, partition))

    async def position(self, partition: int) -> int | None:
        assert self._consumer is not None
        tp = TopicPartition(self._splits_topic, partition)
        if tp not in self._consumer.assignment():
            return None
        try:
            position: int = await within(HEARD_BOUND, self._consumer.position(tp))
        except (IllegalStateError, KafkaError, TimeoutError):
            return None
        return position

    def end(self, partition: int) -> int | None:
        assert self._consumer is not None
        # A paused partition is not asked for, and a dead connection brings no answers: what
        # was heard last says nothing then. One that is not ours is never heard.
        if self.silence(partition) > HEARD_BOUND:
            return None
        end: int | None = self._consumer.highwater(TopicPartition(self._splits_topic, partition))
        return end

    def stable_end(self, partition: int) -> int | None:
        assert self._consumer is not None
        tp = TopicPartition(self._splits_topic, partition)
        if tp not in self._consumer.assignment():
            return None
        stable: int | None = self._consumer.last_stable_offset(tp)
        return stable

    def silence(self, partition: int) -> float:
        assert self._consumer is not None
        tp = TopicPartition(self._splits_topic, partition)
        if tp not in self._consumer.assignment():
            return math.inf
        heard: int | None = self._consumer.last_poll_timestamp(tp)
        if heard is None:
            return math.inf
        # It is the wall clock's, which may step: what counts is when it last changed.
        if self._heard.get(partition, (None,))[0] != heard:
            self._heard[partition] = heard, time.monotonic()
        return time.monotonic() - self._heard[partition][1]

    # ---- taking

    async def topics(self, age: float) -> TopicIds:
        since = time.monotonic() - age
        async with self._looking:  # the partitions share one look
            if self._looked_at < since:
                began = time.monotonic()
                names = self._splits_topic, self._results_topic
                splits, results = await self._inquiry.topics(*names)
                self._looked_at, self._topics = began, (splits.id, results.id)
            return self._topics

    async def writer(self, partition: int) -> AiokafkaWriter:
        prefix = f"{self._group}/{self._splits_topic}/"
        right = Right("Write", TRANSACTIONAL_ID, prefix)
        producer = AIOKafkaProducer(
            **self._options,
            transactional_id=f"{prefix}{partition}",
            transaction_timeout_ms=int(TRANSACTION_TIMEOUT * 1000),
            max_request_size=RECORD_MAX,
            max_batch_size=256 * 1024,
        )
        try:
            # It asks for the epoch, which fences the previous owner.
            await within(REQUEST_BOUND, producer.start())
        except BaseException as error:
            await stop_producer(producer)
            # aiokafka asserts that it knows a broker; one that has just started names none.
            if isinstance(error, KafkaError | TimeoutError | AssertionError):
                told = reason(error, right)
                raise TransportError(f"no transactional producer: {told}") from error
            raise
        source = TopicPartition(self._splits_topic, partition)
        results = TopicPartition(self._results_topic, partition)
        return AiokafkaWriter(producer, source, results, self._group, right, self._inquiry)

    async def committed(self, partition: int) -> tuple[int, str] | None:
        tp = TopicPartition(self._splits_topic, partition)
        return await self._inquiry.committed(self._group, tp)

    async def splits_bounds(self, partition: int) -> tuple[int, int]:
        return await self._inquiry.bounds(TopicPartition(self._splits_topic, partition))

    async def results_bounds(self, partition: int) -> tuple[int, int]:
        return await self._inquiry.bounds(TopicPartition(self._results_topic, partition))

    def results(self, partition: int, start: int, end: int) -> AsyncGenerator[Record, None]:
        return read_log(self._options, TopicPartition(self._results_topic, partition), start, end)


class AiokafkaWriter:
    """A transactional producer with the epoch it was given; see `Writer`."""

    def __init__(
        self,
        producer: AIOKafkaProducer,
        source: TopicPartition,
        results: TopicPartition,
        group: str,
        right: Right,
        inquiry: Inquiry,
    ) -> None:
        """`right`: to its transactional id."""
        self._producer = producer
        self._source = source
        self._results = results
        self._group = group
        self._right = right
        self._inquiry = inquiry

    async def publish(
        self,
        records: Sequence[Outgoing],
        commit: Callable[[Sequence[int]], tuple[int, str]],
    ) -> list[int]:
        committing = False
        sending: list[asyncio.Future[Any]] = []
        places: list[int] = []

        async def transact() -> list[int]:
            nonlocal committing
            await self._producer.begin_transaction()
            for (topic, partition), some in groupby(records, lambda r: (r.topic, r.partition)):
                if partition is None:
                    for record in some:
                        sending.append(await self._send(record))
                        places.append(0)
                else:
                    async for count, future in self._send_batches(topic, partition, some):
                        sending.extend([future] * count)
                        places.extend(range(count))
            # Every send is awaited before the commit: aiokafka commits a transaction whose
            # batch has failed.
            sent: list[Any] = await asyncio.gather(*sending, return_exceptions=True)
            _refuse(sent)
            offsets = [told.offset + place for told, place in zip(sent, places, strict=True)]
            if min(offsets, default=0) < 0:
                raise TransportError("the broker did not say where results were appended")
            watermark, metadata = commit(offsets)
            await self._producer.send_offsets_to_transaction(
                {self._source: OffsetAndMetadata(watermark, metadata)}, self._group
            )
            committing = True
            await self._producer.commit_transaction()
            return offsets

        try:
            # What goes on after the bound does so with the epoch that the next taking ends.
            return await within(PUBLISH_BOUND, transact())
        except (KafkaError, TimeoutError, IllegalOperation, AssertionError) as failure:
            # Fenced, also while committing: whoever did it has settled what we left, and whether
            # that was a commit stands in the log.
            error = self._cause(failure)
            told = reason(error, *self._rights(records))
            if committing:
                raise FateUnknown(told) from failure
            # Of what hinders a topic nothing is told but that its records stay unanswered.
            answered = [future.done() and not future.cancelled() for future in sending]
            left = [r for r, done in zip_longest(records, answered) if r is not None and not done]
            topics = " and ".join(sorted({record.topic for record in left}))
            if isinstance(error, TimeoutError) and topics:
                raise TransportError(
                    f"topic {topics} took no records within {PUBLISH_BOUND:.0f} s: see that it "
                    "exists and has as many in-sync replicas as its min.insync.replicas asks for"
                ) from failure
            raise TransportError(told) from failure

    async def settle(self) -> None:
        where = self._group, self._source, self._results
        left = await leftover(self._inquiry, self._producer, *where)
        if not left:
            return
        try:
            await within(REQUEST_BOUND, end_leftover(left, self._producer, *where))
        except (KafkaError, TimeoutError, IllegalOperation, AssertionError) as failure:
            told = reason(self._cause(failure), self._right)
            raise LeftOpen(f"a transaction that Kafka left open is not ended: {told}") from failure
        raise LeftOpen("a transaction that Kafka had left open is ended now")

    def _cause(self, failure: Exception) -> BaseException:
        """What ended the transaction. Raises Fenced when that was another owner, or the broker.

        When that happens between two of our steps, aiokafka only says that it is in none, or
        trips over its own assertion; it keeps the reason for whoever awaits the end.
        """
        cause: BaseException = failure
        if not isinstance(failure, KafkaError | TimeoutError):
            ended: asyncio.Future[None] | None = self._producer._txn_manager._transaction_waiter
            if ended is not None and ended.done() and not ended.cancelled():
                cause = ended.exception() or failure
        if isinstance(cause, ProducerFenced | InvalidProducerEpoch):
            raise Fenced(reason(cause)) from failure
        return cause

    def _rights(self, records: Sequence[Outgoing]) -> list[Right]:
        """What a transaction with `records` needs. A refusal that names no topic is one of the
        commit, which needs the right to read what it commits."""
        return [
            Right("Read", TOPIC, self._source.topic),
            *(Right("Write", TOPIC, topic) for topic in {record.topic for record in records}),
            Right("Read", GROUP, self._group),
            self._right,
        ]

    async def _send_batches(
        self, topic: str, partition: int, records: Iterable[Outgoing]
    ) -> AsyncGenerator[tuple[int, asyncio.Future[Any]], None]:
        """How many records each batch has, and the future of where its first one goes: a future
        for each record costs more than its encoding."""
        batch = self._producer.create_batch()
        for record in records:
            if batch.append(timestamp=None, key=record.key, value=record.value) is None:  # full
                yield batch.record_count(), await self._send_batch(topic, partition, batch)
                batch = self._producer.create_batch()
                # The first one always fits.
                batch.append(timestamp=None, key=record.key, value=record.value)
        yield batch.record_count(), await self._send_batch(topic, partition, batch)

    async def _send_batch(self, topic: str, partition: int, batch: Any) -> asyncio.Future[Any]:
        batch.close()
        with _finding(topic):
            future: asyncio.Future[Any] = await self._producer.send_batch(
                batch, topic, partition=partition
            )
            return future

    async def _send(self, record: Outgoing) -> asyncio.Future[Any]:
        future: asyncio.Future[Any]
        try:
            with _finding(record.topic):
                future = await self._producer.send(
                    record.topic,
                    key=record.key,
                    value=record.value,
                    headers=record.headers,
                )
        except MessageSizeTooLargeError as error:
            future = asyncio.get_running_loop().create_future()
            future.set_exception(error)
        return future

    async def close(self) -> None:
        await stop_producer(self._producer)


class _Listener(ConsumerRebalanceListener):
    def __init__(
        self,
        park: Callable[[Collection[int]], None],
        assigned: Rebalanced,
        revoked: Rebalanced,
    ) -> None:
        self._park = park
        self._assigned = assigned
        self._revoked = revoked

    async def on_partitions_assigned(self, assigned: Collection[TopicPartition]) -> None:
        partitions = [tp.partition for tp in assigned]
        self._park(partitions)  # before anything is awaited, so before anything is fetched
        await self._assigned(partitions)

    async def on_partitions_revoked(self, revoked: Collection[TopicPartition]) -> None:
        await self._revoked([tp.partition for tp in revoked])


@contextmanager
def _finding(topic: str) -> Iterator[None]:
    try:
        yield
    except UnknownTopicOrPartitionError as error:
        # It also comes when no broker answered for the time of a request.
        raise TransportError(
            f"topic {topic} was not found: if it does not exist, create it with "
            "`splitferry topics create`"
        ) from error


def _refuse(sent: Sequence[Any]) -> None:
    """Raise what made a send fail."""
    failures = [outcome for outcome in sent if isinstance(outcome, BaseException)]
    # A refused batch leaves a gap in the sequence, for which the broker refuses every later
    # batch of its partition: the next transaction tells whether those are too large as well.
    consequences = (MessageSizeTooLargeError, OutOfOrderSequenceNumber)
    causes = [failure for failure in failures if not isinstance(failure, consequences)]
    too_large = [i for i, outcome in enumerate(sent) if isinstance(outcome, consequences[0])]
    if causes or (failures and not too_large):
        raise (causes or failures)[0]
    if too_large:
        raise TooLarge(too_large)


async def stop_producer(producer: AIOKafkaProducer) -> None:
    """`stop` ends with the error of a fenced producer, and leaves its connections open then. Given
    up while it waits for records that nobody takes, it leaves a sender that would connect anew."""
    await bounded(producer.stop())
    if producer._sender is not None:
        await bounded(producer._sender.close())
    await bounded(producer.client.close())
