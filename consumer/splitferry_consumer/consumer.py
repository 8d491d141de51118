"""The consumer inside a program of one's own, as an async context manager."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from types import TracebackType
from typing import Self

import structlog

from splitferry_protocol.records import Result

from .service import Service, Settings, StartError
from .targets.handler import Handler

_log = structlog.get_logger(__name__)

RESULTS_KEPT = 10_000
"""Results that wait for a reader. One takes some 2 KiB."""


class Consumer:
    """Receives as long as its block lasts.

        async with Consumer(settings, handler) as consumer:
            async for result in consumer.results():
                ...

    The block is entered once the group has said which partitions are this member's (none, while
    others have them all). Leaving it, for whatever reason, reads no further, finishes what is in
    flight within `settings.grace` and leaves the group; a cancellation meanwhile leaves at once,
    and the next owner reads again what was in flight. Brokers that cannot be reached do not end
    the block: the consumer joins again until it can. Should it fail all the same, the block is
    cancelled, and what made it fail is raised where the block ends.

    With many small requests a third of the CPU time goes into Python's cyclic garbage collector.
    It is the program's, so the program has to calm it, once, after its imports:

        gc.freeze()
        gc.set_threshold(10_000)

    Args:
        handler: awaited with each whole `mem` item before its result is told; without one, `mem`
            items go to shared memory. It runs at least once for an item: see `ReceivedItem`.
        results_kept: results that wait for a reader of `results`, 10,000 unless told. Nothing
            waits for the reader: with more, the oldest are let go, which a warning in the log
            tells once reading began.

    Raises:
        StartError: on entering: the settings, the certificates, the root or the cluster do not
            allow a start; one line that names the remedy.
        RuntimeError: it was entered before.
    """

    def __init__(
        self,
        settings: Settings,
        handler: Handler | None = None,
        *,
        results_kept: int = RESULTS_KEPT,
    ) -> None:
        self._service = Service(settings, handler, self._keep)
        self._name = f"{settings.group} of {settings.splits_topic}"
        self._kept: deque[Result] = deque(maxlen=results_kept)
        self._news = asyncio.Event()
        self._read = False
        self._running: asyncio.Task[None] | None = None
        self._block: asyncio.Task[None] | None = None
        self._cancelling = 0
        self._interrupted = False

    def __repr__(self) -> str:
        return f"<Consumer {self._name} {self._service.phase.value} kept={len(self._kept)}>"

    async def __aenter__(self) -> Self:
        if self._running is not None:
            raise RuntimeError("a consumer is entered once: make a new one")
        self._running = asyncio.create_task(self._service.run(), name=f"consumer {self._name}")
        self._running.add_done_callback(self._ended)
        assigned = asyncio.create_task(self._service.assigned.wait())
        try:
            await asyncio.wait({self._running, assigned}, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            self._running.cancel()
            await asyncio.wait([self._running])
            raise
        finally:
            assigned.cancel()
        if self._running.done():
            self._running.result()
            raise StartError("the consumer was stopped before it had joined its group")
        self._block = asyncio.current_task()
        assert self._block is not None
        self._cancelling = self._block.cancelling()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        running, block, self._block = self._running, self._block, None
        assert running is not None
        assert block is not None
        self.stop()
        cancelled = kind is not None and issubclass(kind, asyncio.CancelledError)
        try:
            await asyncio.wait([running])
        except asyncio.CancelledError:
            cancelled = True
            self._service.abandon()
            await asyncio.wait([running])
        # A cancellation that is not, or not only, ours goes on, whatever became of the consumer.
        ours = self._interrupted and block.uncancel() <= self._cancelling
        if cancelled and not ours:
            if kind is None or not issubclass(kind, asyncio.CancelledError):
                raise asyncio.CancelledError
            return
        running.result()

    def stop(self) -> None:
        """Read no further and finish what is in flight: `results` and `wait` then come to an end.

        Made for a signal handler; leaving the block does it too. Callable any number of times.
        """
        self._service.stop()

    async def wait(self) -> None:
        """Wait until the consumer has stopped; what made it fail is raised."""
        assert self._running is not None, "not entered"
        await asyncio.shield(self._running)

    async def results(self) -> AsyncGenerator[Result]:
        """The results that this consumer has committed, from its start on, as they come.

        Each is given once, whoever asks. It ends when the consumer has stopped and everything is
        given, or raises what made it fail; after the block it gives what came at its end. A
        result whose commit got no answer is missing here, and is in the results topic: whoever
        needs every result, or those of others, reads that (`splitferry_producer.ResultFeed`).
        """
        assert self._running is not None, "not entered"
        self._read = True
        while True:
            while self._kept:
                yield self._kept.popleft()
            if self._running.done():
                self._running.result()
                return
            self._news.clear()
            await self._news.wait()

    def _keep(self, results: Sequence[Result]) -> None:
        lost = len(self._kept) + len(results) - (self._kept.maxlen or 0)
        if lost > 0 and self._read:
            _log.warning("results were not read in time, the oldest are let go", count=lost)
        self._kept.extend(results)
        self._news.set()

    def _ended(self, running: asyncio.Task[None]) -> None:
        self._news.set()
        failed = running.cancelled() or running.exception() is not None
        if failed and self._block is not None:
            self._interrupted = self._block.cancel()
