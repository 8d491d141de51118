"""The aiokafka form of the transport. What it works around is measured in docs/DESIGN.md."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any

import structlog
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, ConsumerRebalanceListener, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import (
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
from aiokafka.structs import OffsetAndMetadata

from .transport import (
    FateUnknown,
    Fenced,
    HangingTransaction,
    Lost,
    Outgoing,
    OutOfRange,
    Record,
    Taken,
    TooLarge,
    TransportError,
)

log = structlog.get_logger(__name__)

REQUEST_BOUND = 30.0
"""Seconds after which a request to Kafka is given up: aiokafka itself would retry for ever."""
STOP_BOUND = 5.0
"""Seconds that closing a client may take; a broker that is gone would make it hang."""
STALL_BOUND = 10.0
"""Seconds without progress after which the end of the results counts as out of reach."""
PUBLISH_BOUND = 15.0
"""Seconds that a transaction may take."""
TRANSACTION_TIMEOUT = 20.0
"""Seconds after which the broker aborts a transaction and fences its producer. Until then the
transaction of a crashed owner hides the results of other groups behind it."""
HEARD_BOUND = 5.0
"""Seconds after which what the broker last said of a partition is old."""
CAREFUL_POLLS = 5000
"""Polls of single records after a record that could not be decoded, until it must have come."""
FETCH_BUDGET = 32 * 1024 * 1024
"""Bytes of prefetched records of all partitions (DESIGN: idle buffering grows with them)."""
FETCH_MAX = 4 * 1024 * 1024
RECORD_MAX = 32 * 1024 * 1024
"""Bytes: above every limit of the contract, so that the broker's limit decides."""

_NOWHERE = TopicPartition("", -1)


class StartError(Exception):
    """The consumer cannot start; one line that names the cause and the remedy."""


async def check_topics(
    client_options: Mapping[str, Any], splits_topic: str, results_topic: str, dead_letters: str
) -> None:
    """The topics exist, and every splits partition has its results partition (WIRE, "Topics")."""
    servers = client_options["bootstrap_servers"]
    admin = AIOKafkaAdminClient(**client_options)
    try:
        async with asyncio.timeout(REQUEST_BOUND):
            await admin.start()
            topics = {
                topic["topic"]: topic
                for topic in await admin.describe_topics(
                    [splits_topic, results_topic, dead_letters]
                )
            }
    except (KafkaError, TimeoutError, OSError) as error:
        raise StartError(
            f"no Kafka broker answers at {servers} ({_reason(error)}): start one, for example "
            "with `splitferry broker`, or name another with --bootstrap-servers"
        ) from error
    finally:
        await _bounded(admin.close())
    for name in (splits_topic, results_topic, dead_letters):
        code = topics[name]["error_code"] if name in topics else UnknownTopicOrPartitionError.errno
        if code == TopicAuthorizationFailedError.errno:
            raise StartError(f"no right to Describe topic {name}: an ACL must allow it")
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
        self._options = dict(client_options)
        self._group = group
        self._splits_topic = splits_topic
        self._results_topic = results_topic
        self._session_timeout = session_timeout
        self._admin = AIOKafkaAdminClient(**self._options)
        # One client asks for the bounds of logs: uncommitted, so that the end counts records
        # of open transactions too.
        self._bounds = AIOKafkaConsumer(**self._options, isolation_level="read_uncommitted")
        self._consumer: AIOKafkaConsumer | None = None
        self._careful = 0

    async def start(self, taken: Taken, lost: Lost) -> None:
        try:
            await self._join(taken, lost)
        except KafkaError as error:
            raise TransportError(_reason(error)) from error

    async def _join(self, taken: Taken, lost: Lost) -> None:
        await self._admin.start()
        await self._bounds.start()
        topics = await self._admin.describe_topics([self._splits_topic])
        partitions = max(1, len(topics[0]["partitions"]))
        milliseconds = int(self._session_timeout * 1000)
        self._consumer = AIOKafkaConsumer(
            **self._options,
            group_id=self._group,
            isolation_level="read_committed",
            enable_auto_commit=False,
            # A position outside the log must be heard of, not moved: see `poll`.
            auto_offset_reset="none",
            # The contract's own CRC-32C covers every value.
            check_crcs=False,
            max_partition_fetch_bytes=max(1024 * 1024, min(FETCH_MAX, FETCH_BUDGET // partitions)),
            # A partition that goes on after a pause has to wait until the fetch under way has
            # ended, and a fetch without news lasts this long.
            fetch_max_wait_ms=50,
            session_timeout_ms=milliseconds,
            rebalance_timeout_ms=max(milliseconds, 30_000),
            heartbeat_interval_ms=max(100, milliseconds // 4),
            max_poll_interval_ms=300_000,
            metadata_max_age_ms=30_000,
        )
        self._consumer.subscribe([self._splits_topic], listener=_Listener(self._park, taken, lost))
        await self._consumer.start()

    async def stop(self) -> None:
        for client in (self._consumer, self._bounds):
            if client is not None:
                await _bounded(client.stop())
        await _bounded(self._admin.close())

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
            if self._careful:
                batches = await self._poll_carefully(asked, wait)
            else:
                batches = await self._consumer.getmany(*asked, timeout_ms=int(wait * 1000))
        except OffsetOutOfRangeError as error:
            raise OutOfRange([tp.partition for tp in error.args[0]]) from error
        except KafkaError as error:
            raise TransportError(_reason(error)) from error
        except Exception as error:
            self._careful = CAREFUL_POLLS
            raise TransportError(f"a record could not be decoded: {_reason(error)}") from error
        return {
            tp.partition: [
                Record(r.offset, r.key, r.value, r.headers, r.timestamp) for r in records
            ]
            for tp, records in batches.items()
        }

    async def _poll_carefully(
        self, asked: Sequence[TopicPartition], wait: float
    ) -> dict[TopicPartition, list[Any]]:
        """Record by record, to find the one that aiokafka cannot decode (a header's name that
        is not UTF-8) and hand it out empty, so that it becomes a dead letter and no more.

        What it raises for stands at the position, unless markers lie between: then it takes a
        few steps to get there.
        """
        assert self._consumer is not None
        batches: dict[TopicPartition, list[Any]] = {}
        self._careful -= 1
        for tp in asked:
            left = 0.0 if batches else wait / len(asked)
            try:
                records = await self._consumer.getmany(
                    tp, timeout_ms=int(left * 1000), max_records=1
                )
            except KafkaError:
                if batches:
                    continue  # it is raised again by the next poll, with nothing to lose
                raise
            except Exception as error:  # noqa: BLE001
                offset = await self._consumer.position(tp)
                log.warning("undecodable record", offset=offset, error=_reason(error))
                batches[tp] = [Record(offset, None, None)]
                self._consumer.seek(tp, offset + 1)
                self._careful = 0
                break
            batches.update(records)
        return batches

    def seek(self, partition: int, offset: int) -> None:
        assert self._consumer is not None
        with suppress(IllegalStateError):  # not assigned any more: `lost` is on its way
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
            position: int = await self._consumer.position(tp)
        except (IllegalStateError, KafkaError):
            return None
        return position

    def end(self, partition: int) -> int | None:
        assert self._consumer is not None
        tp = TopicPartition(self._splits_topic, partition)
        if tp not in self._consumer.assignment():
            return None
        # A paused partition is not asked for, and a dead connection brings no answers: what
        # was heard last says nothing then.
        if self.silence(partition) > HEARD_BOUND:
            return None
        stable: int | None = self._consumer.last_stable_offset(tp)
        return stable

    def silence(self, partition: int) -> float:
        assert self._consumer is not None
        tp = TopicPartition(self._splits_topic, partition)
        if tp not in self._consumer.assignment():
            return math.inf
        heard: int | None = self._consumer.last_poll_timestamp(tp)
        return math.inf if heard is None else max(0.0, time.time() - heard / 1000)

    # ---- taking

    async def writer(self, partition: int) -> AiokafkaWriter:
        producer = AIOKafkaProducer(
            **self._options,
            transactional_id=f"{self._group}/{self._splits_topic}/{partition}",
            transaction_timeout_ms=int(TRANSACTION_TIMEOUT * 1000),
            max_request_size=RECORD_MAX,
            max_batch_size=256 * 1024,
        )
        try:
            async with asyncio.timeout(REQUEST_BOUND):
                await producer.start()  # asks for the epoch, which fences the previous owner
        except BaseException as error:
            await _stop(producer)
            if isinstance(error, KafkaError | TimeoutError):
                raise TransportError(f"no transactional producer: {_reason(error)}") from error
            raise
        source = TopicPartition(self._splits_topic, partition)
        return AiokafkaWriter(producer, source, self._group)

    async def committed(self, partition: int) -> tuple[int, str] | None:
        tp = TopicPartition(self._splits_topic, partition)
        offsets = await self._ask(
            self._admin.list_consumer_group_offsets(self._group, partitions=[tp])
        )
        if tp not in offsets:
            # A coordinator that is just loading answers for the group as a whole, which aiokafka
            # passes over. Taken for "no commit" it would mean reading everything anew.
            raise TransportError(f"the coordinator of group {self._group} gave no offsets")
        found = offsets[tp]
        return None if found.offset < 0 else (found.offset, found.metadata)

    async def splits_bounds(self, partition: int) -> tuple[int, int]:
        return await self._log_bounds(TopicPartition(self._splits_topic, partition))

    async def results_bounds(self, partition: int) -> tuple[int, int]:
        return await self._log_bounds(TopicPartition(self._results_topic, partition))

    async def _log_bounds(self, tp: TopicPartition) -> tuple[int, int]:
        start = await self._ask(self._bounds.beginning_offsets([tp]))
        end = await self._ask(self._bounds.end_offsets([tp]))
        return start[tp], end[tp]

    async def results(self, partition: int, start: int, end: int) -> AsyncIterator[Record]:
        if start >= end:
            return
        tp = TopicPartition(self._results_topic, partition)
        reader = AIOKafkaConsumer(
            **self._options,
            isolation_level="read_committed",
            enable_auto_commit=False,
            auto_offset_reset="none",
        )
        try:
            await self._ask(reader.start())
            reader.assign([tp])
            reader.seek(tp, start)
            # Aborted records and markers are passed over without being handed out, so it is
            # the position that tells whether the end was reached.
            position, moved = start, asyncio.get_running_loop().time()
            while position < end:
                for record in (await self._ask(reader.getmany(tp, timeout_ms=200))).get(tp, ()):
                    if record.offset < end:
                        yield Record(record.offset, record.key, record.value)
                before, position = position, await reader.position(tp)
                now = asyncio.get_running_loop().time()
                if position > before:
                    moved = now
                elif now - moved > STALL_BOUND:
                    raise HangingTransaction(
                        f"the results from offset {position} to {end} of {tp.topic} partition "
                        f"{partition} cannot be read: a transaction of another producer is open "
                        "there; end it, or wait for its time-out"
                    )
        finally:
            await _bounded(reader.stop())

    async def _ask(self, request: Any) -> Any:
        try:
            async with asyncio.timeout(REQUEST_BOUND):
                return await request
        except (KafkaError, TimeoutError) as error:
            raise TransportError(_reason(error)) from error


class AiokafkaWriter:
    """A transactional producer with the epoch it was given; see `Writer`."""

    def __init__(self, producer: AIOKafkaProducer, source: TopicPartition, group: str) -> None:
        self._producer = producer
        self._source = source
        self._group = group

    async def publish(
        self,
        records: Sequence[Outgoing],
        commit: Callable[[Sequence[int]], tuple[int, str]],
    ) -> list[int]:
        committing = False
        try:
            async with asyncio.timeout(PUBLISH_BOUND):
                await self._producer.begin_transaction()
                # Every send is awaited before the commit: aiokafka commits a transaction
                # whose batch has failed.
                sent: list[Any] = await asyncio.gather(
                    *[await self._send(record) for record in records], return_exceptions=True
                )
                _refuse(sent)
                offsets = [metadata.offset for metadata in sent]
                if min(offsets, default=0) < 0:
                    raise TransportError("the broker did not say where results were appended")
                watermark, metadata = commit(offsets)
                await self._producer.send_offsets_to_transaction(
                    {self._source: OffsetAndMetadata(watermark, metadata)}, self._group
                )
                committing = True
                await self._producer.commit_transaction()
                return offsets
        except (ProducerFenced, InvalidProducerEpoch) as error:
            # Also while committing: the one who fenced us has settled what we left, and whether
            # that was a commit stands in the log.
            raise Fenced(_reason(error)) from error
        except (KafkaError, TimeoutError) as error:
            kind = FateUnknown if committing else TransportError
            raise kind(_reason(error)) from error

    async def _send(self, record: Outgoing) -> asyncio.Future[Any]:
        future: asyncio.Future[Any]
        try:
            future = await self._producer.send(
                record.topic,
                partition=record.partition,
                key=record.key,
                value=record.value,
                headers=record.headers,
            )
        except MessageSizeTooLargeError as error:
            future = asyncio.get_running_loop().create_future()
            future.set_exception(error)
        return future

    async def close(self) -> None:
        await _stop(self._producer)


class _Listener(ConsumerRebalanceListener):
    def __init__(self, park: Callable[[Collection[int]], None], taken: Taken, lost: Lost) -> None:
        self._park = park
        self._taken = taken
        self._lost = lost

    async def on_partitions_assigned(self, assigned: Collection[TopicPartition]) -> None:
        partitions = [tp.partition for tp in assigned]
        self._park(partitions)  # before anything is awaited, so before anything is fetched
        await self._taken(partitions)

    async def on_partitions_revoked(self, revoked: Collection[TopicPartition]) -> None:
        await self._lost([tp.partition for tp in revoked])


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


async def _stop(producer: AIOKafkaProducer) -> None:
    """`stop` ends with the error of a fenced producer, and leaves its connections open then."""
    await _bounded(producer.stop())
    await _bounded(producer.client.close())


async def _bounded(stopping: Any) -> None:
    """Await the end of a client, but not for ever; what goes wrong in it is over with it."""
    try:
        async with asyncio.timeout(STOP_BOUND):
            await stopping
    except (KafkaError, TimeoutError, OSError) as error:
        log.debug("a Kafka client did not stop cleanly", error=_reason(error))


def _reason(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return f"Kafka did not answer within {REQUEST_BOUND:.0f} s"
    return f"{type(error).__name__}: {error}"
