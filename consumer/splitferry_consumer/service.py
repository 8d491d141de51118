"""The consumer as a whole: starts, feeds the partitions that the group assigns, ends in phases."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import structlog

from splitferry_protocol.connection import ConnectionSettings
from splitferry_protocol.records import Block

from .flow import Flow, Gauge
from .group import Workshop
from .kafka import AiokafkaTransport, StartError, check_topics
from .partition import Partition, Rules
from .targets import Target, TargetUnusable
from .targets.file import FileTarget
from .targets.handler import Handler, HandlerTarget
from .targets.limit import MemoryLimit
from .targets.memory import MemoryTarget
from .transport import Transport, TransportError

__all__ = ["Phase", "Service", "Settings", "StartError"]

log = structlog.get_logger(__name__)

WRITERS = 16
"""Threads that write. A request uses one at a time."""
POLL_WAIT = 0.2
"""Seconds that a poll waits for records."""
FAILED_POLL_WAIT = 1.0
PAUSED_WAIT = 0.01
"""The same while a partition is paused: how late it may be noticed that it can go on."""
BACKGROUND_BOUND = 10.0
"""Seconds that clean-up work may take at the end."""
SWEEP_INTERVAL = 10.0
"""Seconds between looks for what dead owners left."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What a consumer is told. Sizes in bytes, times in seconds, the horizon in offsets."""

    connection: ConnectionSettings
    root: Path
    group: str = "splitferry"
    splits_topic: str = "splitferry.splits"
    results_topic: str = "splitferry.results"
    dead_letters_topic: str = "splitferry.dead-letters"
    horizon: int = 250_000
    idle_timeout: float = 3600.0
    write_timeout: float = 120.0
    accept_loss: bool = False
    grace: float = 30.0
    """How long a stop waits for what is in flight."""
    quota: int | None = None
    disk_reserve: int = 64 * 1024 * 1024
    memory_limit: int = 256 * 1024 * 1024
    segment_lifetime: float = 600.0
    flow_high: int = 64 * 1024 * 1024
    file_mode: int = 0o640
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
    """

    def __init__(self, settings: Settings, handler: Handler | None = None) -> None:
        self._settings = settings
        self._handler = handler
        self.phase = Phase.STARTING
        self._stopping = asyncio.Event()
        self._abandoned = False
        self._partitions: dict[int, Partition] = {}
        self._flow = Flow(settings.flow_high)
        self._background: set[asyncio.Task[None]] = set()

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
            StartError: the settings, the root or the cluster do not allow a start; one line
                that names the remedy.
        """
        settings = self._settings
        options = await asyncio.to_thread(settings.connection.client_options)
        await check_topics(
            options, settings.splits_topic, settings.results_topic, settings.dead_letters_topic
        )
        transport = AiokafkaTransport(
            options,
            settings.group,
            settings.splits_topic,
            settings.results_topic,
            settings.session_timeout,
        )
        threads = ThreadPoolExecutor(WRITERS, thread_name_prefix="write")
        targets: dict[Block, Target] = {}
        try:
            await self._open_targets(targets, threads)
            await self._receive(transport, targets, threads)
        except TargetUnusable as error:
            raise StartError(str(error)) from error
        except TransportError as error:
            raise StartError(f"the consumer could not join its group: {error}") from error
        finally:
            await self._put_away(transport)
            for target in targets.values():
                await asyncio.to_thread(target.close)
            # Waiting here would let one hung write hold up the loop, and the stop.
            threads.shutdown(wait=False, cancel_futures=True)
            self.phase = Phase.STOPPED

    async def _open_targets(
        self, targets: dict[Block, Target], threads: ThreadPoolExecutor
    ) -> None:
        settings = self._settings
        targets[Block.FILE] = await FileTarget.open(
            settings.root,
            quota=settings.quota,
            disk_reserve=settings.disk_reserve,
            mode=settings.file_mode,
            executor=threads,
        )
        limit = MemoryLimit(settings.memory_limit)
        if self._handler is not None:
            targets[Block.MEM] = HandlerTarget(self._handler, limit)
        else:
            targets[Block.MEM] = await MemoryTarget.open(
                limit,
                lifetime=settings.segment_lifetime,
                mode=settings.file_mode & 0o666,
                executor=threads,
            )

    # ---- receiving

    async def _receive(
        self,
        transport: Transport,
        targets: Mapping[Block, Target],
        threads: ThreadPoolExecutor,
    ) -> None:
        settings = self._settings
        rules = Rules(
            settings.group,
            settings.splits_topic,
            settings.results_topic,
            settings.dead_letters_topic,
            settings.horizon,
            settings.idle_timeout,
            settings.accept_loss,
        )

        async def taken(partitions: Collection[int]) -> None:
            log.info("partitions assigned", partitions=sorted(partitions))
            for number in partitions:
                workshop = Workshop(threads, Gauge(self._flow), settings.write_timeout)
                self._partitions[number] = Partition(
                    number, rules, transport, targets, workshop, self._in_background
                )
            self._flow.divide(len(self._partitions))

        await transport.start(taken, self._lose)
        self.phase = Phase.RUNNING
        sweep = asyncio.create_task(_sweep(targets))
        try:
            while not self._stopping.is_set():
                await self._poll(transport)
            await self._drain(transport)
        finally:
            sweep.cancel()
            await asyncio.wait([sweep])

    async def _poll(self, transport: Transport) -> None:
        """Feed the partitions once. What cannot take records now is paused, never forgotten."""
        for number, partition in self._partitions.items():
            (transport.resume if partition.ready else transport.pause)(number)
        wanted = [number for number, partition in self._partitions.items() if partition.ready]
        try:
            all_wanted = len(wanted) == len(self._partitions)
            batches = await transport.poll(wanted, POLL_WAIT if all_wanted else PAUSED_WAIT)
        except TransportError as error:
            # Nothing is awaited between the failed poll and this: no partition may believe in
            # a position whose records were lost with the exception.
            for partition in self._partitions.values():
                partition.realign(error)
            log.warning("poll failed", error=str(error))
            await asyncio.sleep(FAILED_POLL_WAIT)
            return
        for number, records in batches.items():
            held = self._partitions.get(number)
            if held is not None:
                held.deliver(records)

    async def _lose(self, partitions: Collection[int]) -> None:
        if partitions:
            log.info("partitions revoked", partitions=sorted(partitions))
        held = [p for number in partitions if (p := self._partitions.pop(number, None))]
        await asyncio.gather(*(partition.lose() for partition in held))

    # ---- stopping

    async def _drain(self, transport: Transport) -> None:
        self.phase = Phase.DRAINING
        log.info("stopping", grace=self._settings.grace)
        for partition in self._partitions.values():
            partition.drain()
        until = time.monotonic() + self._settings.grace
        # The poll goes on, for it is the sign of life to the group.
        while not all(partition.drained for partition in self._partitions.values()):
            if self._abandoned or time.monotonic() > until:
                log.warning("stopped with work in flight; the next owner reads it again")
                break
            await self._poll(transport)

    async def _put_away(self, transport: Transport) -> None:
        await self._lose(list(self._partitions))
        await transport.stop()
        if self._background:
            await asyncio.wait(self._background, timeout=BACKGROUND_BOUND)

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
