"""Items handed to a function of the program that the consumer is embedded in."""

from __future__ import annotations

import asyncio
import errno
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from splitferry_consumer.targets import Condemned, Item, Verdict, Whole, settle_each
from splitferry_consumer.targets.inode import STEP
from splitferry_consumer.targets.limit import MemoryLimit
from splitferry_protocol.errors import BatchTransferFailed
from splitferry_protocol.ids import RequestId
from splitferry_protocol.records import Status


@dataclass(frozen=True, slots=True)
class ReceivedItem:
    """A whole item.

    It comes at least once: after a crash between the handler's return and the commit of its
    result it is received and handled again, under the same request id.

    Attributes:
        unique_id: names the item, 1 to 512 bytes of UTF-8.
        version: of the item (u64).
        labels: as the splits gave them; empty without any.
        data: its bytes, read-only. The view stays valid as long as it is kept, but the memory
            limit counts it only until the handler returns.
        sha256: their digest, 32 bytes.
    """

    request: RequestId
    unique_id: str
    version: int
    labels: Mapping[str, str]
    data: memoryview
    sha256: bytes


Handler = Callable[[ReceivedItem], Awaitable[None]]
"""Awaited with each whole `mem` item, before its result is told. An exception fails the request."""


class HandlerTarget:
    """Awaits `handler` with every item that was received whole, before its result is told.

    The result comes exactly once; the handler runs at least once: after a crash between its end
    and the commit of the result, the item is received and handled again. An exception from it
    fails the request.
    """

    in_memory = True

    def __init__(self, handler: Handler, limit: MemoryLimit) -> None:
        self.handler = handler
        self.limit = limit

    def begin(self, item: Item) -> HandlerIncoming:
        return HandlerIncoming(self, item)

    async def settle_whole(self, items: Sequence[Whole]) -> None:
        """See `Target.settle_whole`."""
        await settle_each(items)

    async def passed(self, group: str, topic: str, partition: int, before: int) -> None:
        """Nothing: this target keeps no verdicts."""

    async def sweep(self) -> None:
        """Nothing: what is in this process ends with it."""

    def close(self) -> None:
        """Nothing is held besides the requests' own bytes."""


class HandlerIncoming:
    """The bytes of one item, in a buffer that grows as they come; see `Incoming`."""

    def __init__(self, target: HandlerTarget, item: Item) -> None:
        self._target = target
        self._item = item
        self._lock = threading.Lock()
        self._buffer: bytearray | None = bytearray()
        self._charged = 0
        self._verdict: Verdict | None = None

    def write_at(self, offset: int, data: memoryview | bytes) -> None:
        with self._lock:
            buffer, end = self._bytes(), offset + len(data)
            if end > len(buffer):
                self._grow(buffer, end)
            buffer[offset:end] = data

    def read_at(self, offset: int, size: int) -> bytes:
        with self._lock:
            part = bytes(memoryview(self._bytes())[offset : offset + size])
        if len(part) != size:
            raise OSError(errno.EIO, f"the item ends before byte {offset + size}")
        return part

    async def settle(self, proposal: Verdict) -> Verdict:
        if self._verdict is None:
            verdict = proposal
            if proposal.status is Status.COMPLETED:
                verdict = await self._handled(proposal)
            self._verdict = verdict
            self.discard()
        return self._verdict

    def put(self, data: memoryview | bytes, proposal: Verdict) -> None:
        self.write_at(0, data)

    def discard(self) -> None:
        with self._lock:
            self._target.limit.release(self._charged)
            self._buffer, self._charged = None, 0

    async def _handled(self, proposal: Verdict) -> Verdict:
        assert proposal.size is not None
        assert proposal.sha256 is not None
        item = self._item
        received = ReceivedItem(
            item.key.request,
            item.unique_id,
            item.version,
            dict(item.labels),
            memoryview(self._bytes()).toreadonly()[: proposal.size],
            proposal.sha256,
        )
        try:
            await self._target.handler(received)
        except (Exception, asyncio.CancelledError) as error:
            # The handler is not ours: anything may come, also the cancellation of a task that
            # it awaits, which is not our own.
            task = asyncio.current_task()
            if isinstance(error, asyncio.CancelledError) and task and task.cancelling():
                raise
            reason = f"the handler raised {type(error).__name__}: {error}"
            failure = BatchTransferFailed(item.key.request, reason)
            return Verdict(Status.FAILED, failure, proposal.size, proposal.sha256)
        return proposal

    def _bytes(self) -> bytearray:
        if self._buffer is None:
            raise Condemned("the bytes were dropped")
        return self._buffer

    def _grow(self, buffer: bytearray, end: int) -> None:
        """To just `end` bytes: a bytearray keeps some room in hand, so that growing stays cheap."""
        held = len(buffer)
        size = end - held
        self._target.limit.reserve(self._item, held, size)
        try:
            for start in range(held, end, STEP):
                buffer.extend(bytes(min(STEP, end - start)))
        except MemoryError as error:
            del buffer[held:]
            self._target.limit.release(size)
            raise OSError(errno.ENOMEM, "the machine has no memory left") from error
        self._charged += size
