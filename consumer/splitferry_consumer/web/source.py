"""What the pages are about: one consumer process, or several (`workers.py`)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

from splitferry_consumer.service import Service
from splitferry_consumer.web.health import Check, Health
from splitferry_consumer.web.metrics import exposition
from splitferry_consumer.web.status import Key, RequestView, Snapshot, Snapshots, View
from splitferry_protocol.ids import RequestId

SETTLES = 15.0
"""Seconds after the last news in which rates still change."""


class Unanswered(Exception):
    """Who may know of it does not answer; one line for people."""


class Source(Protocol):
    async def watch(self) -> None:
        """Look at it until cancelled."""

    async def looked(self) -> None:
        """Wait, within a bound, until `watch` has looked once."""

    async def snapshot(self, view: View) -> Snapshot: ...

    async def news(self, view: View, seen: object) -> tuple[object, Snapshot | None]:
        """A snapshot, unless it shows nothing but what was `seen`; and what to see next time."""

    async def request(self, request: RequestId) -> RequestView | None:
        """One open request with all its ranges. Raises Unanswered."""

    async def before(self, view: View) -> Sequence[Key]:
        """The keys of the requests before the window, in its order."""

    async def metrics(self) -> bytes: ...

    async def alive(self) -> Check:
        """Whether going on makes sense. Brokers that are gone are no reason to be restarted."""

    async def ready(self) -> dict[str, Check]:
        """What has to hold for work to get done, by name."""


class OneProcess(Source):
    """The consumer in this process."""

    def __init__(self, service: Service) -> None:
        self._observer = service.observer
        self._health = Health(service)
        self._snapshots = Snapshots(service, lambda: self._health.disk)
        self._metrics = exposition(service, lambda: self._health.disk)

    async def watch(self) -> None:
        await self._health.watch()

    async def looked(self) -> None:
        await self._health.looked()

    async def snapshot(self, view: View) -> Snapshot:
        return self._snapshots.snapshot(view)

    async def news(self, view: View, seen: object) -> tuple[object, Snapshot | None]:
        mark = self._snapshots.mark()
        if mark == seen and time.monotonic() - self._observer.active_at >= SETTLES:
            return mark, None
        return mark, self._snapshots.snapshot(view)

    async def request(self, request: RequestId) -> RequestView | None:
        return self._snapshots.request(request)

    async def before(self, view: View) -> Sequence[Key]:
        return self._snapshots.before(view)

    async def metrics(self) -> bytes:
        return self._metrics()

    async def alive(self) -> Check:
        return self._health.alive

    async def ready(self) -> dict[str, Check]:
        return self._health.ready
