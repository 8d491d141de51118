"""Owners of partition 0, on a Kafka in memory: the real partition, fed as the service feeds it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

from memory_transport import DEAD_LETTERS, RESULTS, SPLITS, Kafka, MemoryTransport
from splitferry_consumer.flow import Flow, Gauge
from splitferry_consumer.group import Workshop
from splitferry_consumer.observing import Observer
from splitferry_consumer.partition import Partition
from splitferry_consumer.taking import Rules
from splitferry_consumer.targets import Target
from splitferry_consumer.transport import TransportError
from splitferry_protocol.codec import decode_outcome
from splitferry_protocol.records import Block, Result

HORIZON = 1000


def rules(horizon: int = HORIZON, idle_timeout: float = 3600.0, accept_loss: bool = False) -> Rules:
    return Rules("group", SPLITS, RESULTS, DEAD_LETTERS, horizon, idle_timeout, accept_loss)


STANDARD = rules()


class Owner:
    """A member of the group that has been assigned partition `number`."""

    def __init__(
        self,
        kafka: Kafka,
        targets: Mapping[Block, Target],
        threads: Executor,
        *,
        rules: Rules = STANDARD,
        flow: Flow | None = None,
        number: int = 0,
        batch: int = 1000,
        write_timeout: float = 60.0,
        feed: bool = True,
        member: MemoryTransport | None = None,
    ) -> None:
        self.kafka = kafka
        self.member = member or MemoryTransport(kafka, batch)
        self.member.positions[number] = 0
        self.background: set[asyncio.Task[None]] = set()
        workshop = Workshop(threads, Gauge(flow or Flow(2**30)), write_timeout)
        self.partition = Partition(
            number, rules, self.member, targets, workshop, self._in_background, Observer()
        )
        self._feeding = asyncio.create_task(self._feed()) if feed else None

    async def _feed(self) -> None:
        partition, member = self.partition, self.member
        while True:
            (member.resume if partition.ready else member.pause)(partition.number)
            wanted = [partition.number] if partition.ready else []
            try:
                batches = await member.poll(wanted, 0.005)
            except TransportError as error:
                partition.realign(error)
                continue
            partition.deliver(batches.get(partition.number, ()))

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self.background.add(task)
        task.add_done_callback(self.background.discard)

    @property
    def finished(self) -> bool:
        """Whether all of the log is read, and all that it brought about is committed."""
        ledger = self.partition._ledger
        log = self.kafka.logs[SPLITS, self.partition.number]
        return (
            ledger is not None
            and self.partition._broken is None
            and ledger.position == log.end
            and not ledger._holding
            and self.partition.drained
            and ledger.committed == (ledger.watermark, ledger.position)
        )

    async def lose(self) -> None:
        await self.partition.lose()
        if self._feeding is not None:
            self._feeding.cancel()
            await asyncio.wait([self._feeding])
            assert self._feeding.cancelled(), self._feeding.exception()
        while self.background:
            await asyncio.wait(self.background)


async def until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    """Wait for what has to come about; what takes this long has not come."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.001)


# ---- what the world sees


def results(kafka: Kafka, partition: int = 0) -> list[Result]:
    """The committed results, without repeats."""
    outcomes = [
        decode_outcome(record.key, record.value)
        for record in kafka.committed_records(RESULTS, partition)
    ]
    return [o for o in outcomes if isinstance(o, Result) and not o.repeat]


def announced(kafka: Kafka) -> dict[tuple[str, int], tuple[object, ...]]:
    """What the results say of each opening; fails when one has two."""
    found: dict[tuple[str, int], tuple[object, ...]] = {}
    for result in results(kafka):
        opening = (str(result.request), result.input.first)
        assert opening not in found, f"two results for {opening}"
        error = result.error and (result.error.code, result.error.message)
        found[opening] = (
            result.status, error, result.input.last, result.size, result.sha256, result.target,
            result.splits, result.duplicates, result.reply,
        )  # fmt: skip
    return found


def told(kafka: Kafka) -> Counter[object]:
    """What was told besides results: accepted events, repeats and dead letters."""
    outcomes = [decode_outcome(r.key, r.value) for r in kafka.committed_records(RESULTS)]
    events: Counter[object] = Counter(
        (type(o).__name__, str(o.request), o.reply)
        for o in outcomes
        if not isinstance(o, Result) or o.repeat
    )
    events.update(
        ("dead letter", dict(letter.headers)["__connect.errors.offset"])
        for letter in kafka.committed_records(DEAD_LETTERS)
    )
    return events


def temporaries(root: Path) -> list[str]:
    incoming = root / ".splitferry/incoming"
    return [path.name for path in incoming.glob("*/*") if path.name != "lock"]
