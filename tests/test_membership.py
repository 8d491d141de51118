"""One membership in the group, on a Kafka in memory: when its client counts as silent."""

from __future__ import annotations

import asyncio
import time

import pytest

from memory_transport import Kafka, MemoryTransport
from splitferry_consumer.membership import FROZEN, STALLED, Membership, Stalled
from splitferry_consumer.transport import Excluded
from splitferry_protocol.rights import GROUP, Right


class Clock:
    """Time that goes on as a test wants it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


def member(kafka: Kafka) -> tuple[Membership, MemoryTransport]:
    def unopened(number: int) -> None:
        raise AssertionError(number)

    transport = MemoryTransport(kafka)
    return Membership(transport, unopened, print), transport  # type: ignore[arg-type]


def test_silence_about_what_is_asked_for_ends_the_membership(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock(monkeypatch)
    membership, transport = member(Kafka())
    membership._watch([0])
    transport.silent_for = STALLED + 1
    for _ in range(int(STALLED)):
        clock.now += 1
        membership._watch([0])
    clock.now += 1
    with pytest.raises(Stalled, match="nothing was heard of partition 0"):
        membership._watch([0])
    # What was not asked for need not be heard of.
    membership._watch([])
    membership._watch([0])


def test_the_time_of_a_frozen_process_is_no_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Woken, it has heard nothing yet, and could not."""
    clock = Clock(monkeypatch)
    membership, transport = member(Kafka())
    membership._watch([0])
    membership._failing_since = clock.now
    transport.silent_for = 10 * STALLED
    clock.now += 10 * STALLED + FROZEN
    membership._watch([0])


async def test_a_membership_ends_when_the_group_has_excluded_it() -> None:
    """Its client has given up its heartbeats: polling on would bring nothing but the refusal."""
    kafka = Kafka()
    membership, _ = member(kafka)
    kafka.faults["poll"].append(Excluded(Right("Read", GROUP, "g").missing))
    with pytest.raises(Excluded, match="no right to Read on group"):
        async with asyncio.timeout(10):
            await membership.feed()


# ---- losing partitions


class Losing:
    """A partition that is being lost for as long as the test wants."""

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self.may_end = asyncio.Event()
        self.lost = False

    async def lose(self) -> None:
        self.begun.set()
        await self.may_end.wait()
        self.lost = True


async def test_a_losing_goes_on_though_who_waits_for_it_is_cancelled() -> None:
    """By aiokafka, whose `stop` was given up while it waited for a rebalance. Lost half-way, the
    partition would take itself again, and fence its new owner."""
    membership, _ = member(Kafka())
    partition = Losing()
    membership.partitions[0] = partition  # type: ignore[assignment]
    rebalance = asyncio.create_task(membership._revoked([0]))
    await partition.begun.wait()
    rebalance.cancel()
    await asyncio.wait([rebalance])
    partition.may_end.set()
    await membership.end()
    assert partition.lost


async def test_the_end_waits_for_what_a_rebalance_is_losing() -> None:
    """Else the targets would be closed under a partition that still publishes."""
    membership, transport = member(Kafka())
    partition = Losing()
    membership.partitions[0] = partition  # type: ignore[assignment]
    rebalance = asyncio.create_task(membership._revoked([0]))
    await partition.begun.wait()
    ending = asyncio.create_task(membership.end())
    for _ in range(20):
        await asyncio.sleep(0)
    assert not transport.stopped
    partition.may_end.set()
    await rebalance
    await ending
    assert transport.stopped
