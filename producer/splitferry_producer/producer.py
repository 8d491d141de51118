"""The producer: opens a request, sends its splits, waits for its result (WIRE, "Topics")."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeVar, overload

import structlog

from splitferry_protocol.allocation import keep_freed_memory
from splitferry_protocol.codec import encode_abort, encode_split
from splitferry_protocol.connection import ConnectionSettings
from splitferry_protocol.errors import cut
from splitferry_protocol.ids import RequestId
from splitferry_protocol.partitioning import partition_for
from splitferry_protocol.paths import path_problem
from splitferry_protocol.records import REASON_MAX, Abort, Accepted, Block, Result, Split, Status
from splitferry_protocol.rights import TOPIC, Right

from .cluster import client_options, inspect
from .errors import InvalidItem, ProducerError, TimedOut, TooFewPartitions
from .flow import Allowance, ByteBudget
from .results import ResultReader
from .sending import Link
from .sequences import Sequences, now_ms
from .sources import DataItemSource
from .splitting import TOPIC_DEFAULT, Piece, SplitSizes, pieces, read_ahead

_log = structlog.get_logger(__name__)

T = TypeVar("T")

MEMORY = 32 * 1024 * 1024
_MEMORY_MAX = 64 * 1024 * 1024
"""A produce request may hold all bytes in flight; a broker takes 100 MiB in one by default."""
STALL_TIMEOUT = 120.0
"""Seconds, as Kafka's own `delivery.timeout.ms`."""
_SENDING_MAX = 16
"""Requests of known size that send at once. With the sizes that are chosen here each has at most
some 8,000 splits, so that even in one partition all of them end well within the horizon of the
first."""
_ABORT_TIMEOUT = 5.0
_CONFIRMING = 1.0
"""Seconds in which the broker confirms what the consumer has read already."""
_END_TIMEOUT = 2 * _ABORT_TIMEOUT
"""Seconds that requests have to end in when the producer is closed."""
_CLOSED = "the producer was closed"


@dataclass(frozen=True, slots=True)
class Sent:
    """A request all of whose splits the broker has; its result was not waited for.

    Attributes:
        partition: of the splits topic; its result comes in the same one of the results topic.
        size: bytes.
        sha256: digest of the item, 32 bytes.
    """

    request: RequestId
    partition: int
    unique_id: str
    version: int
    size: int
    sha256: bytes


@dataclass(slots=True, eq=False)
class _Request:
    """One request from its opening to its end."""

    id: RequestId
    link: Link
    partition: int
    unique_id: str
    version: int
    block: Block
    labels: Mapping[str, str] | None
    reply: bytes | None
    begun: bool = False
    """Whether a record of it may be on the topic."""
    bound: asyncio.Timeout | None = None
    """Ends it, while it is sent or waited for."""

    def split(self, piece: Piece) -> Split:
        first = piece.index == 0
        return Split(
            self.id,
            self.unique_id,
            self.version,
            self.block,
            piece.index,
            piece.offset,
            piece.total,
            piece.payload,
            piece.sha256,
            self.reply if first else None,
            self.labels if first else None,
        )


class Producer:
    """Sends data items as requests. An async context manager; `send` may run many times at once.

    Args:
        node_id: u32; None: this user's own on this machine, drawn once (see `Sequences`).
        split_size: bytes of every split's payload; None: 512 KiB, more for large items, as far
            as the topic takes it. A small one for large items may need more splits than the
            consumers' horizon allows.
        group: the consumer group whose results count; None: the first result that comes.
        memory: bytes that all requests together may hold between source and confirmation: 32 MiB
            unless told, at most 64 MiB. A stream holds one split more.
        state_dir: where sequences are kept; None: the user's state directory.
        stall_timeout: s without any confirmation by the broker, while some are due, after which
            the requests that wait for them fail with NoBroker; 120 unless told.
        on_accepted: told each accepted event of a request that waits for its result, in the
            event loop: it must not block.

    Attributes:
        node_id: the node id in use; there once entered.

    Raises:
        StateError: the given `node_id` is not a u32; on entering, its sequences cannot be kept.
        ProducerError: on entering: NoBroker, LoginRefused, UnknownTopic, MissingRights,
            SplitTooLarge, or a certificate file cannot be read.
    """

    def __init__(
        self,
        connection: ConnectionSettings,
        *,
        node_id: int | None = None,
        splits_topic: str = "splitferry.splits",
        results_topic: str = "splitferry.results",
        split_size: int | None = None,
        group: str | None = None,
        memory: int = MEMORY,
        state_dir: Path | None = None,
        stall_timeout: float = STALL_TIMEOUT,
        on_accepted: Callable[[Accepted], None] | None = None,
    ) -> None:
        self._connection = connection
        self._splits_topic = splits_topic
        self._results_topic = results_topic
        self._split_size = split_size
        self._group = group
        self._stall_timeout = stall_timeout
        self._on_accepted = on_accepted
        self._sequences = Sequences(node_id, state_dir)
        self._budget = ByteBudget(min(memory, _MEMORY_MAX))
        self._sending = asyncio.Semaphore(_SENDING_MAX)
        self._options: dict[str, Any] = {}
        self._max_message_bytes = TOPIC_DEFAULT
        self._link: asyncio.Task[Link] | None = None
        self._reader: asyncio.Task[ResultReader] | None = None
        self._background: set[asyncio.Task[Any]] = set()
        self._open: set[_Request] = set()
        self._all_ended = asyncio.Event()
        self._closed = False
        self.node_id: int
        self._sizes: SplitSizes

    def __repr__(self) -> str:
        return f"<Producer to {self._splits_topic}, {self._sequences!r}, {self._budget!r}>"

    async def __aenter__(self) -> Producer:
        keep_freed_memory()
        self._options = await client_options(self._connection)
        facts = await inspect(self._options, Right("Write", TOPIC, self._splits_topic))
        if facts.max_message_bytes is None:
            _log.info("not told the topic's max.message.bytes: assuming Kafka's default")
        else:
            self._max_message_bytes = facts.max_message_bytes
        self._sizes = SplitSizes.fitting(self._split_size, self._max_message_bytes)
        self.node_id = await self._sequences.open()
        try:
            await self._connected()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Disconnect, within some 25 s. Requests still sent or waited for are aborted and fail."""
        self._closed = True
        for request in self._open:
            if request.bound is not None and not request.bound.expired():
                request.bound.reschedule(asyncio.get_running_loop().time())
        if self._open:
            self._all_ended.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_END_TIMEOUT):
                    await self._all_ended.wait()
        if self._background:
            await asyncio.wait(self._background)
        link, self._link = self._link, None
        reader, self._reader = self._reader, None
        for task in (reader, link):
            if task is None:
                continue
            task.cancel()
            await asyncio.wait([task])
            if not task.cancelled() and task.exception() is None:
                await task.result().close()

    @overload
    async def send(
        self,
        source: DataItemSource,
        *,
        unique_id: str,
        version: int | None = None,
        labels: Mapping[str, str] | None = None,
        wait: Literal[True] = True,
        timeout: float | None = None,
        progress: Callable[[int], None] | None = None,
        reply: bytes | None = None,
    ) -> Result: ...

    @overload
    async def send(
        self,
        source: DataItemSource,
        *,
        unique_id: str,
        version: int | None = None,
        labels: Mapping[str, str] | None = None,
        wait: Literal[False],
        timeout: float | None = None,
        progress: Callable[[int], None] | None = None,
        reply: bytes | None = None,
    ) -> Sent: ...

    @overload
    async def send(
        self,
        source: DataItemSource,
        *,
        unique_id: str,
        version: int | None = None,
        labels: Mapping[str, str] | None = None,
        wait: bool,
        timeout: float | None = None,
        progress: Callable[[int], None] | None = None,
        reply: bytes | None = None,
    ) -> Result | Sent: ...

    async def send(
        self,
        source: DataItemSource,
        *,
        unique_id: str,
        version: int | None = None,
        labels: Mapping[str, str] | None = None,
        wait: bool = True,
        timeout: float | None = None,
        progress: Callable[[int], None] | None = None,
        reply: bytes | None = None,
    ) -> Result | Sent:
        """Send one item as a request of its own.

        Args:
            unique_id: names the item, 1 to 512 bytes of UTF-8; for block `file` also its path
                below the consumer's root.
            version: u64; replaces older versions only. None: the Unix time in ms.
            labels: handed through to the result; at most 16 pairs and 2 KiB.
            wait: wait for the result; otherwise only until the broker has every split.
            timeout: s from the opening of the request; None: no limit.
            progress: told the bytes of each split when the broker has it, until `send` ends.
            reply: correlation token, 1 to 256 bytes, handed through to the result.

        Returns:
            The result, whatever its status; or what was sent, without `wait`.

        Raises:
            InvalidItem: the contract does not allow such an id, version, label or reply.
            SourceError, SourceChanged, ItemTooLarge: the item cannot be sent.
            TimedOut: no result in time. It may still come, when the abort came too late.
            ProducerError: the others of this package.
        On each of these, and on cancellation, an abort record ends the request if it was opened.
        """
        version = now_ms() if version is None else version
        if source.block is Block.FILE and (problem := path_problem(unique_id)):
            raise InvalidItem(f"unique id {unique_id!r} cannot name a file: {problem}")
        async with contextlib.AsyncExitStack() as sending:
            # A stream may wait for its next byte for ever: it must not keep others from sending.
            if not source.unbounded:
                await sending.enter_async_context(self._sending)
            sending.push_async_callback(source.close)
            await source.open()
            link = await self._connected()
            name = RequestId(self.node_id, await self._sequences.next())
            # Taken once: all records of the request go there, even if partitions are added.
            partition = partition_for(name.key, await link.partitions())
            request = _Request(
                name, link, partition, unique_id, version, source.block, labels, reply
            )
            _check(request)
            if self._closed:  # since the link was got; nothing is awaited from here to the bound
                raise ProducerError(f"{_CLOSED} before the request was sent")
            async with self._ending(request, timeout):
                if not wait:
                    return await self._transmit(request, source, progress)
                reader = await self._results()
                result = await reader.expect(request.id, request.partition)
                try:
                    whole = await self._transmit_until(result, request, source, progress)
                    await sending.aclose()
                    told = await result
                    if not whole and told.status in (Status.FAILED, Status.EXPIRED):
                        # Other groups would wait for the rest until their idle timeout.
                        reason = f"group {told.group} has ended it as {told.status}"
                        self._in_background(self._send_abort(request, reason))
                    return told
                finally:
                    reader.forget(request.id, result)

    async def _transmit_until(
        self,
        result: asyncio.Future[Result],
        request: _Request,
        source: DataItemSource,
        progress: Callable[[int], None] | None,
    ) -> bool:
        """Send the splits, or as many as come before the result: a request may fail early.

        Returns whether the broker has all of them.
        """
        transmitting = asyncio.create_task(self._transmit(request, source, progress))
        either: list[asyncio.Future[Any]] = [transmitting, result]
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not result.done():
                await transmitting
            elif result.exception() is None and result.result().success:
                # It has every split, and the confirmations of the last ones are on their way.
                await asyncio.wait([transmitting], timeout=_CONFIRMING)
        finally:
            transmitting.cancel()
            await asyncio.gather(transmitting, return_exceptions=True)
        return not transmitting.cancelled() and transmitting.exception() is None

    async def _transmit(
        self,
        request: _Request,
        source: DataItemSource,
        progress: Callable[[int], None] | None,
    ) -> Sent:
        """Cut, encode and send the item; returns when the broker has every split."""
        due: set[asyncio.Future[None]] = set()

        def confirm(size: int, confirmed: asyncio.Future[None]) -> None:
            self._budget.release(size)
            if confirmed in due and confirmed.exception() is None:
                due.discard(confirmed)
                if progress is not None:
                    progress(size)

        try:
            with Allowance(self._budget) as allowance:
                made = read_ahead(pieces(source, self._sizes, allowance.admit))
                async with contextlib.aclosing(made):
                    async for piece in made:
                        value = encode_split(request.split(piece))
                        size = len(piece.payload)
                        request.begun = True
                        confirmed = await request.link.send(request.id, value, request.partition)
                        allowance.hand_over(size)
                        due.add(confirmed)
                        confirmed.add_done_callback(partial(confirm, size))
            # Not gather: cancelled, it would cancel the confirmations, which release the memory.
            while due:
                done, _ = await asyncio.wait(due, return_when=asyncio.FIRST_EXCEPTION)
                for confirmed in done:
                    confirmed.result()
        finally:
            due.clear()  # What is confirmed later is no progress of a request that has ended.
        assert piece.total is not None
        assert piece.sha256 is not None
        return Sent(
            request.id,
            request.partition,
            request.unique_id,
            request.version,
            piece.total,
            piece.sha256,
        )

    # ---- the abort record

    @contextlib.asynccontextmanager
    async def _ending(self, request: _Request, timeout: float | None) -> AsyncIterator[None]:
        """Whatever ends the block but its success, the request is aborted before it goes on."""
        self._open.add(request)
        try:
            async with asyncio.timeout(timeout) as bound:
                request.bound = bound
                try:
                    yield
                finally:
                    request.bound = None
        except BaseException as error:
            timed_out = isinstance(error, TimeoutError) and bound.expired()
            closed = timed_out and self._closed
            if closed:
                reason = _CLOSED
            elif timed_out:
                reason = f"no result within {timeout} s"
            elif isinstance(error, ProducerError):
                reason = f"the producer failed: {error}"
            else:
                reason = "the producer was interrupted"
            state = "nothing of it was sent: give a longer timeout"
            if request.begun:
                # Shielded from the next cancellation: `close` waits for what is left of it.
                aborting = self._in_background(self._send_abort(request, reason))
                state = await asyncio.shield(aborting)
            if closed:
                raise ProducerError(f"{_CLOSED} before the result came") from None
            if timed_out:
                raise TimedOut(request.id, timeout or 0, state) from None
            raise
        finally:
            self._open.discard(request)
            if not self._open:
                self._all_ended.set()

    async def _send_abort(self, request: _Request, reason: str) -> str:
        """Returns what became of it, for people."""
        told = cut(reason, REASON_MAX)
        try:
            async with asyncio.timeout(_ABORT_TIMEOUT):
                value = encode_abort(Abort(request.id, told))
                # Behind the splits on their own link, if that is still good.
                link = await self._connected() if request.link.failed else request.link
                await (await link.send(request.id, value, request.partition))
                return "it was aborted: check that a consumer runs, or give a longer timeout"
        except (ProducerError, TimeoutError) as error:
            _log.warning(
                "no abort record could be sent: the request ends at the consumer's idle timeout",
                request=str(request.id),
                cause=str(error) or "the broker did not confirm it in time",
            )
            return (
                "it ends at the consumer's idle timeout, as no abort record could be sent: check "
                "that the brokers answer"
            )

    async def abort(
        self,
        request: RequestId,
        reason: str,
        *,
        partition: int | None = None,
        wait: bool = False,
        timeout: float | None = None,
    ) -> Result | None:
        """End a request, whoever sent it. A consumer ignores this when the request is not open.

        Args:
            reason: up to 1 KiB.
            partition: where the request's splits are; None: where it would open now.
            wait: wait for the result, up to `timeout` s; None: no limit.

        Returns:
            The result; None without `wait`.

        Raises:
            InvalidItem: the contract does not allow the reason, or there is no such partition.
            TimedOut: no result in time: most likely the request was not open.
            ProducerError: the brokers cannot be reached or refuse the record.
        """
        try:
            value = encode_abort(Abort(request, reason))
        except ValueError as error:
            raise InvalidItem(str(error)) from error
        link = await self._connected()
        known = await link.partitions()
        if partition is None:
            partition = partition_for(request.key, known)
        elif not 0 <= partition < known:
            raise InvalidItem(f"partition {partition} is not one of the topic's {known}")
        if not wait:
            await (await link.send(request, value, partition))
            return None
        reader = await self._results()
        result = await reader.expect(request, partition)
        state = "the brokers have not confirmed the abort record: check that they are up"
        try:
            async with asyncio.timeout(timeout):
                await (await link.send(request, value, partition))
                state = "most likely it was not open"
                return await result
        except TimeoutError:
            raise TimedOut(request, timeout or 0, state) from None
        finally:
            reader.forget(request, result)

    # ---- connections

    async def _connected(self) -> Link:
        """The link to send on: a new one after the last has failed, the same for all who ask."""
        if self._closed:
            raise ProducerError("the producer is closed: make a new one")
        task = self._link
        if task is not None and task.done():
            failed = task.cancelled() or task.exception() is not None
            if not failed and (old := task.result()).failed:
                self._in_background(old.close())
                failed = True
            task = None if failed else task
        if task is None:
            task = self._link = asyncio.create_task(self._connect())
        return await asyncio.shield(task)

    async def _connect(self) -> Link:
        link = Link(self._options, self._splits_topic, self._max_message_bytes, self._stall_timeout)
        await link.start()
        return link

    async def _results(self) -> ResultReader:
        """The reader, started when the first result is waited for."""
        if self._reader is None or (self._reader.done() and self._reader.exception()):
            self._reader = asyncio.create_task(self._read_results())
        return await asyncio.shield(self._reader)

    async def _read_results(self) -> ResultReader:
        facts = await inspect(self._options, Right("Read", TOPIC, self._results_topic))
        known = await (await self._connected()).partitions()
        if facts.partitions < known:
            raise TooFewPartitions(
                f"topic {self._results_topic} has {facts.partitions} partitions, "
                f"{self._splits_topic} has {known}: give it as many"
            )
        reader = ResultReader(self._options, self._results_topic, self._group, self._on_accepted)
        await reader.start()
        return reader

    def _in_background(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task


def _check(request: _Request) -> None:
    """Raises InvalidItem if the contract does not allow such a request."""
    try:
        encode_split(request.split(Piece(0, 0, b"", 0, bytes(32))))
    except ValueError as error:
        raise InvalidItem(str(error)) from error
