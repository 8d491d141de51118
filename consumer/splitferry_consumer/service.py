"""The consumer as a whole: starts, feeds the partitions that the group assigns, ends in phases."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

import structlog

from splitferry_protocol.allocation import keep_freed_memory
from splitferry_protocol.connection import ConnectionSettings
from splitferry_protocol.records import GROUP_MAX, Block, Result

from .bookmark import HORIZON
from .flow import Flow, Gauge
from .group import Workshop
from .kafka import AiokafkaTransport, StartError, check_topics
from .ledger import Limits
from .membership import Membership
from .modes import FILE_MODE, mode_problem
from .observing import Observer
from .partition import Partition
from .taking import Rules
from .targets import Target, TargetUnusable
from .targets.file import FileTarget
from .targets.handler import Handler, HandlerTarget
from .targets.inode import Descriptors
from .targets.limit import MemoryLimit
from .targets.memory import LIFETIME, MemoryTarget
from .transport import TransportError

__all__ = ["Phase", "Service", "Settings", "StartError"]

T = TypeVar("T")

log = structlog.get_logger(__name__)

WRITERS = 16
"""Threads that write. A request uses one at a time."""
REJOIN_PAUSE = 1.0
"""Seconds before another membership follows one that has failed."""
CLOSE_BOUND = 10.0
"""Seconds that closing a target may take; a disk that hangs must not keep the process."""
DRAIN_LOOK = 0.02
"""Seconds between looks whether everything in flight is done."""
BACKGROUND_BOUND = 10.0
"""Seconds that clean-up work may take at the end."""
SWEEP_INTERVAL = 10.0
"""Seconds between looks for what dead owners left."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What a consumer is told. Sizes in bytes, times in seconds, the horizon in offsets.

    Attributes:
        root: directory for the files; made if it is not there. Consumers may share it.
        group: consumer group to join.
        horizon: how long an ended request is remembered, and an open one may last.
        idle_timeout: after which a request expires to which no split added bytes.
        write_timeout: after which a request fails that cannot be written.
        accept_loss: go on where topics were truncated or made anew, saying what is lost.
        grace: how long a stop waits for what is in flight.
        max_open_requests: in each partition; more are refused.
        max_item_size: of one item; None: no limit.
        max_gaps: between the received ranges of one request.
        quota: of all files together; None: no limit.
        disk_reserve: what is left free on the disk.
        memory_limit: of all `mem` items together.
        segment_lifetime: how long a shared-memory segment stays after its result was told.
        flow_high: in flight between reading and writing, at which reading pauses.
        file_mode: of published files and of segments, whatever the umask is; directories get the
            matching search bits.
        session_timeout: Kafka's: how long a member that fell silent still owns its partitions.
    """

    connection: ConnectionSettings
    root: Path
    group: str = "splitferry"
    splits_topic: str = "splitferry.splits"
    results_topic: str = "splitferry.results"
    dead_letters_topic: str = "splitferry.dead-letters"
    horizon: int = HORIZON
    idle_timeout: float = 3600.0
    write_timeout: float = 120.0
    accept_loss: bool = False
    grace: float = 30.0
    max_open_requests: int = Limits.open_requests
    max_item_size: int | None = Limits.item_size
    max_gaps: int = Limits.gaps
    quota: int | None = None
    disk_reserve: int = 64 * 1024 * 1024
    memory_limit: int = 256 * 1024 * 1024
    segment_lifetime: float = LIFETIME
    flow_high: int = 64 * 1024 * 1024
    file_mode: int = FILE_MODE
    session_timeout: float = 10.0


class Phase(Enum):
    STARTING = "starting"
    RUNNING = "running"
    DRAINING = "draining"
    """Reads no more; what has ended is settled and published."""
    STOPPED = "stopped"


class Service:
    """One consumer process. `run` returns when it was stopped and everything is put away.

    Args:
        handler: receives `mem` items in the process, instead of a shared-memory segment.
        on_results: told the results of each transaction that is known to be committed.

    Attributes:
        observer: what was seen and told since the start.
        memory: what items take of it.
        assigned: set while we are a member that the group has told its partitions, be it none.
    """

    def __init__(
        self,
        settings: Settings,
        handler: Handler | None = None,
        on_results: Callable[[Sequence[Result]], object] | None = None,
    ) -> None:
        self.settings = settings
        self.observer = Observer(on_results)
        self.memory = MemoryLimit(settings.memory_limit)
        self._handler = handler
        self.assigned = asyncio.Event()
        self.phase = Phase.STARTING
        self.membership: Membership | None = None
        self._stopping = asyncio.Event()
        self._abandoned = False
        self._flow = Flow(settings.flow_high)
        self._background: set[asyncio.Task[None]] = set()

    @property
    def partitions(self) -> list[Partition]:
        """Those that are ours, in order of their numbers."""
        held = {} if self.membership is None else self.membership.partitions
        return [held[number] for number in sorted(held)]

    def stop(self) -> None:
        """Finish what is in flight within the grace, then return from `run`."""
        self._stopping.set()

    def abandon(self) -> None:
        """Return from `run` without waiting for what is in flight; the log has it."""
        self._abandoned = True
        self._stopping.set()

    async def run(self) -> None:
        """Receive until stopped.

        Raises:
            StartError: the settings, the certificates, the root or the cluster do not allow a
                start; one line that names the remedy.
        """
        settings = self.settings
        if not 1 <= len(settings.group.encode()) <= GROUP_MAX:
            raise StartError(f"the group's name must have 1 to {GROUP_MAX} bytes: choose another")
        if problem := mode_problem(settings.file_mode):
            raise StartError(f"files cannot have the mode {settings.file_mode:#o}: {problem}")
        keep_freed_memory()
        threads = ThreadPoolExecutor(WRITERS, thread_name_prefix="write")
        targets: dict[Block, Target] = {}
        try:
            options = await self._unless_stopped(self._reach())
            if options is not None:
                await self._open_targets(targets, threads)
                await self._receive(options, targets, threads)
        except TargetUnusable as error:
            raise StartError(str(error)) from error
        except TransportError as error:
            raise StartError(f"the consumer could not join its group: {error}") from error
        finally:
            if self._background:
                await asyncio.wait(self._background, timeout=BACKGROUND_BOUND)
            closing = [asyncio.create_task(asyncio.to_thread(t.close)) for t in targets.values()]
            if closing:
                await asyncio.wait(closing, timeout=CLOSE_BOUND)
            # Waiting here would let one hung write hold up the loop, and the stop.
            threads.shutdown(wait=False, cancel_futures=True)
            self.phase = Phase.STOPPED

    async def _unless_stopped(self, work: Coroutine[Any, Any, T]) -> T | None:
        """What `work` returns; None when the stop comes first, which then waits for nothing."""
        working = asyncio.create_task(work)
        stopping = asyncio.create_task(self._stopping.wait())
        try:
            await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
            return working.result() if working.done() else None
        finally:
            working.cancel()
            stopping.cancel()
            await asyncio.gather(working, stopping, return_exceptions=True)

    async def _reach(self) -> Mapping[str, Any]:
        """The options of a client, with which the topics were found. A broker may never answer."""
        settings = self.settings
        try:
            options = await asyncio.to_thread(settings.connection.client_options)
        except OSError as error:
            raise StartError(
                f"the certificate files cannot be used: {error}: check ssl_cafile, ssl_certfile "
                "and ssl_keyfile"
            ) from error
        await check_topics(
            options, settings.splits_topic, settings.results_topic, settings.dead_letters_topic
        )
        return options

    async def _open_targets(
        self, targets: dict[Block, Target], threads: ThreadPoolExecutor
    ) -> None:
        settings, descriptors = self.settings, Descriptors()
        targets[Block.FILE] = await FileTarget.open(
            settings.root,
            quota=settings.quota,
            disk_reserve=settings.disk_reserve,
            mode=settings.file_mode,
            executor=threads,
            descriptors=descriptors,
        )
        if self._handler is not None:
            targets[Block.MEM] = HandlerTarget(self._handler, self.memory)
        else:
            targets[Block.MEM] = await MemoryTarget.open(
                self.memory,
                lifetime=settings.segment_lifetime,
                mode=settings.file_mode,
                executor=threads,
                descriptors=descriptors,
            )

    # ---- receiving

    async def _receive(
        self,
        options: Mapping[str, Any],
        targets: Mapping[Block, Target],
        threads: ThreadPoolExecutor,
    ) -> None:
        """Be a member of the group until stopped. Raises TransportError if that never began."""
        sweep = asyncio.create_task(_sweep(targets))
        stopping = asyncio.create_task(self._stopping.wait())
        joined = False
        try:
            while not self._stopping.is_set():
                membership = self.membership = self._begin(options, targets, threads)
                feeding = asyncio.create_task(self._feed(membership))
                try:
                    await asyncio.wait({feeding, stopping}, return_when=asyncio.FIRST_COMPLETED)
                    if not feeding.done():
                        await self._drain(membership, feeding)
                finally:
                    feeding.cancel()
                    await asyncio.wait([feeding], timeout=CLOSE_BOUND)
                    await membership.end()
                stopped = not feeding.done() or feeding.cancelled()
                failure = None if stopped else feeding.exception()
                joined = joined or self.phase is not Phase.STARTING
                if failure is None:
                    return
                if not (joined and isinstance(failure, TransportError)):
                    raise failure
                log.error("the membership has failed, joining again", error=str(failure))
                await asyncio.wait([stopping], timeout=REJOIN_PAUSE)
                options = await self._read_again(options)
        finally:
            sweep.cancel()
            stopping.cancel()
            await asyncio.wait([sweep, stopping])

    async def _read_again(self, options: Mapping[str, Any]) -> Mapping[str, Any]:
        """The options with certificates as they are on the disk now: they may be renewed."""
        try:
            return await asyncio.to_thread(self.settings.connection.client_options)
        except OSError as error:  # just being replaced
            log.error("the certificate files cannot be used", error=str(error))
            return options

    def _begin(
        self,
        options: Mapping[str, Any],
        targets: Mapping[Block, Target],
        threads: ThreadPoolExecutor,
    ) -> Membership:
        settings = self.settings
        self.assigned.clear()  # of the membership before
        transport = AiokafkaTransport(
            options,
            settings.group,
            settings.splits_topic,
            settings.results_topic,
            settings.session_timeout,
        )
        rules = Rules(
            settings.group,
            settings.splits_topic,
            settings.results_topic,
            settings.dead_letters_topic,
            settings.horizon,
            settings.idle_timeout,
            settings.accept_loss,
            Limits(settings.max_open_requests, settings.max_item_size, settings.max_gaps),
        )

        def open_partition(number: int) -> Partition:
            workshop = Workshop(threads, Gauge(self._flow), settings.write_timeout)
            return Partition(
                number,
                rules,
                transport,
                targets,
                workshop,
                self._in_background,
                self.observer,
            )

        return Membership(transport, open_partition, self.assigned.set)

    async def _feed(self, membership: Membership) -> None:
        await membership.join()
        if self.phase is Phase.STARTING:
            self.phase = Phase.RUNNING
        await membership.feed()

    async def _drain(self, membership: Membership, feeding: asyncio.Task[None]) -> None:
        """Let what has ended be settled and published, within the grace."""
        self.phase = Phase.DRAINING
        log.info("stopping", grace=self.settings.grace)
        membership.drain()
        until = time.monotonic() + self.settings.grace
        # The poll goes on meanwhile, for it is the sign of life to the group.
        while not membership.drained:
            if self._abandoned or time.monotonic() > until or feeding.done():
                log.warning("stopped with work in flight; the next owner reads it again")
                break
            await asyncio.sleep(DRAIN_LOOK)

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)


async def _sweep(targets: Mapping[Block, Target]) -> None:
    """Clear away, now and then, what owners left that died."""
    while True:
        await asyncio.sleep(SWEEP_INTERVAL)
        for target in targets.values():
            try:
                await target.sweep()
            except (OSError, TargetUnusable) as error:
                log.warning("sweep failed", error=str(error))
            except Exception:
                log.exception("unexpected error in a sweep")
