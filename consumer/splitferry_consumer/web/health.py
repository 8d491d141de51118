"""What can keep the consumer from working: asked again and again, so that an answer is at hand.

File systems and brokers that hang must not hold up who asks about them: a question that is not
answered in time is an answer too.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypedDict

import structlog

from splitferry_consumer.partition import PartitionState
from splitferry_consumer.service import Phase, Service
from splitferry_consumer.transport import TransportError

log = structlog.get_logger(__name__)

LOOK_INTERVAL = 2.0
"""Seconds between two looks."""
LOOK_BOUND = 5.0
"""Seconds after which a file system or a broker counts as silent."""
STALLED = 90.0
"""Seconds without a poll after which the consumer counts as dead: more than a membership that
watches itself, and the next one's joining, may take."""


class Disk(TypedDict):
    """The root's file system, in bytes. None: it was not told yet."""

    free: int | None
    total: int | None
    reserve: int


class Check(TypedDict):
    ok: bool
    detail: str


class _Question:
    """Something that is asked again and again, one at a time, and may never be answered.

    It is not cancelled for being late: a thread would run on, and a client of Kafka would keep
    the connection that is dead.
    """

    def __init__(self, ask: Callable[[], Awaitable[str | None]], fine: str, silent: str) -> None:
        """`ask` returns what is wrong, or None; `fine` and `silent` name the other answers."""
        self._ask = ask
        self._fine = fine
        self._silent = silent
        self._problem: str | None = "not asked yet"
        self._asked_at: float | None = None
        self.answered = asyncio.Event()
        """Set from the first answer on."""

    async def go_on(self) -> None:
        """Ask until cancelled."""
        while True:
            self._asked_at = time.monotonic()
            try:
                self._problem = await self._ask()
            except Exception as error:
                log.exception("unexpected error in a look at the consumer's health")
                self._problem = str(error) or type(error).__name__
            self._asked_at = None
            self.answered.set()
            await asyncio.sleep(LOOK_INTERVAL)

    @property
    def check(self) -> Check:
        asked_at, problem = self._asked_at, self._problem
        if asked_at is not None and time.monotonic() - asked_at > LOOK_BOUND:
            problem = self._silent
        return {"ok": problem is None, "detail": problem or self._fine}


class Health:
    """Looks at one service as long as `watch` runs."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._root = Path(service.settings.root).absolute()
        self.disk: Disk = {
            "free": None,
            "total": None,
            "reserve": service.settings.disk_reserve,
        }
        self._root_question = _Question(
            lambda: asyncio.to_thread(self._look_at_root),
            "writable",
            f"{self._root} does not answer",
        )
        self._broker_question = _Question(
            self._ask_broker, "reachable", "no broker answers: see the log"
        )

    # ---- looking

    async def watch(self) -> None:
        """Look until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._root_question.go_on())
            group.create_task(self._broker_question.go_on())

    async def looked(self) -> None:
        """Wait until `watch` has looked at the root, for `LOOK_BOUND` seconds at most."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LOOK_BOUND):
                await self._root_question.answered.wait()

    def _look_at_root(self) -> str | None:
        """In a thread."""
        try:
            # Before the start has made it, the file system is that of the directory above.
            there = next(p for p in (self._root, *self._root.parents) if p.exists())
            space = os.statvfs(there)
            # Not what its mode says, but what the kernel would: a file system may be read-only.
            writable = os.access(self._root, os.W_OK | os.X_OK)
        except OSError as error:
            return f"{self._root}: {error.strerror}"
        self.disk = {
            **self.disk,
            "free": space.f_bavail * space.f_frsize,
            "total": space.f_blocks * space.f_frsize,
        }
        if not writable:
            return f"{self._root} cannot be written to: mount it, or give us the right"
        return None

    async def _ask_broker(self) -> str | None:
        membership = self._service.membership
        if membership is None:
            return "not joined yet"
        try:
            await membership.reach(LOOK_INTERVAL)
        except TransportError as error:
            return str(error)
        return None

    # ---- what is asked

    @property
    def alive(self) -> Check:
        """Whether going on makes sense. Brokers that are gone are no reason to be restarted."""
        membership = self._service.membership
        if self._service.phase is Phase.STARTING or membership is None:
            return {"ok": True, "detail": "starting"}
        silence = membership.silence
        if silence > STALLED:
            return {"ok": False, "detail": f"nothing was asked of Kafka for {silence:.0f} s"}
        return {"ok": True, "detail": self._service.phase.value}

    @property
    def ready(self) -> dict[str, Check]:
        """What has to hold for work to get done, by name."""
        return {
            "assigned": self._assigned(),
            "root": self._root_question.check,
            "broker": self._broker_question.check,
        }

    def _assigned(self) -> Check:
        service = self._service
        if service.phase is not Phase.RUNNING:
            return {"ok": False, "detail": service.phase.value}
        if not service.assigned.is_set():
            return {"ok": False, "detail": "the group has assigned nothing yet"}
        partitions = service.partitions
        if not partitions:
            return {"ok": True, "detail": "all partitions are with other members of the group"}
        waiting = [
            f"{partition.number} ({partition.trouble or partition.state})"
            for partition in partitions
            if partition.state in {PartitionState.TAKING, PartitionState.REFUSED}
        ]
        if len(waiting) == len(partitions):
            return {"ok": False, "detail": f"no partition is taken: {', '.join(waiting)}"}
        return {"ok": True, "detail": f"{len(partitions) - len(waiting)} partitions taken"}
