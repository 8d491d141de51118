"""One membership in the group: feeds the partitions that are assigned, until it is ended or fails.

aiokafka keeps a membership going with tasks of its own. One of them can die unnoticed, and the
partitions then stand still while the group believes us alive; so a membership watches itself,
and ends with an error when nothing has been heard for too long. The service begins another.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection

import structlog

from .partition import Partition
from .transport import Excluded, Transport, TransportError

log = structlog.get_logger(__name__)

POLL_WAIT = 0.2
"""Seconds that a poll waits for records."""
FULL_WAIT = 0.01
"""The same while a partition has too much in flight: how late it may be noticed that it can go on.
What else makes it full lasts longer."""
FAILED_POLL_WAIT = 1.0
STALLED = 20.0
"""Seconds of failing polls, or of silence about a partition that is asked for."""
FROZEN = 5.0
"""Seconds between two polls in which the process itself did not run."""


class Stalled(TransportError):
    """Nothing was heard for too long, whatever the client believes."""


class Membership:
    """Args:
    open_partition: makes the partition of a number; it takes itself.
    on_assigned: told whenever the group has said which partitions are ours, be it none.
    """

    def __init__(
        self,
        transport: Transport,
        open_partition: Callable[[int], Partition],
        on_assigned: Callable[[], object],
    ) -> None:
        self._transport = transport
        self._open_partition = open_partition
        self._on_assigned = on_assigned
        self._ending = False
        self._failing_since: float | None = None
        self._watched_at = time.monotonic()
        """The last poll, or the beginning."""
        self._wanted_since: dict[int, float] = {}
        self.partitions: dict[int, Partition] = {}
        self._losing: set[asyncio.Task[None]] = set()
        """In tasks of their own: aiokafka, given up while it stops, cancels who listens to it."""

    async def join(self) -> None:
        """Become a member. Raises TransportError."""
        await self._transport.start(self._assigned, self._revoked)

    async def feed(self) -> None:
        """Hand records to the partitions until cancelled. Raises Stalled, Excluded."""
        while True:
            await self._poll()

    @property
    def silence(self) -> float:
        """Seconds since the last poll began, or since the membership did."""
        return time.monotonic() - self._watched_at

    async def reach(self, age: float) -> None:
        """Ask the brokers something, unless they answered it at most `age` seconds ago.

        Raises TransportError.
        """
        if self._ending:  # the client would make connections that nobody closes
            raise TransportError("the membership has ended")
        await self._transport.topics(age)

    def drain(self) -> None:
        """Read no further; what has ended is settled and published."""
        for partition in self.partitions.values():
            partition.drain()

    @property
    def drained(self) -> bool:
        return all(partition.drained for partition in self.partitions.values())

    async def end(self) -> None:
        """Give the partitions back and leave the group; bounded."""
        self._ending = True
        await self._revoked(list(self.partitions))
        await self._transport.stop()

    async def _assigned(self, partitions: Collection[int]) -> None:
        if self._ending:  # a rebalance crossed our leaving; the next member takes them
            return
        log.info("partitions assigned", partitions=sorted(partitions))
        for number in partitions:
            self.partitions[number] = self._open_partition(number)
        self._on_assigned()

    async def _revoked(self, partitions: Collection[int]) -> None:
        if partitions:
            log.info("partitions revoked", partitions=sorted(partitions))
        held = [p for number in partitions if (p := self.partitions.pop(number, None))]
        self._wanted_since.clear()
        self._losing |= {asyncio.create_task(partition.lose()) for partition in held}
        if self._losing:
            await asyncio.wait(self._losing)
            self._losing = {losing for losing in self._losing if not losing.done()}

    async def _poll(self) -> None:
        """Feed the partitions once.

        One that can take no records now is not asked for, and not paused either: its next
        records wait in the client, at most one response of them. A paused partition would be
        left out of the fetch, and then wait for the long poll of the others to end.
        """
        wanted = [number for number, partition in self.partitions.items() if partition.ready]
        self._watch(wanted)
        full = any(partition.gauge.full for partition in self.partitions.values())
        try:
            batches = await self._transport.poll(wanted, FULL_WAIT if full else POLL_WAIT)
        except Excluded:
            raise
        except TransportError as error:
            # Nothing is awaited between the failed poll and this: no partition may believe in
            # a position whose records were lost with the exception.
            for partition in self.partitions.values():
                partition.realign(error)
            log.warning("poll failed", error=str(error))
            self._failing_since = self._failing_since or time.monotonic()
            await asyncio.sleep(FAILED_POLL_WAIT)
            return
        self._failing_since = None
        for number, records in batches.items():
            held = self.partitions.get(number)
            if held is not None:
                held.deliver(records)

    def _watch(self, wanted: Collection[int]) -> None:
        now = time.monotonic()
        if now - self._watched_at > FROZEN:
            # We stood still ourselves (SIGSTOP, a virtual machine that was paused): nothing
            # could be heard, and nothing is known of the client.
            self._failing_since = None
            self._wanted_since.clear()
        self._watched_at = now
        if self._failing_since is not None and now - self._failing_since > STALLED:
            raise Stalled(f"every poll has failed for {STALLED:.0f} s")
        self._wanted_since = {n: self._wanted_since.get(n, now) for n in wanted}
        for number, since in self._wanted_since.items():
            if now - since > STALLED and self._transport.silence(number) > STALLED:
                raise Stalled(f"nothing was heard of partition {number} for {STALLED:.0f} s")
