"""Kafka in memory, as far as the consumer's narrow interface shows it.

Logs with transactions, whose markers take an offset; writers that are fenced by epoch, and whose
successor settles what they left; commits whose fate the writer does not learn; and errors where a
test plans them. Every operation is recorded in `Kafka.calls`, and yields to the loop at least
once, so that others come in between wherever a real client would let them.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict, deque
from collections.abc import AsyncGenerator, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from splitferry_consumer.bookmark import TopicIds
from splitferry_consumer.transport import (
    FateUnknown,
    Fenced,
    HangingTransaction,
    Outgoing,
    Rebalanced,
    Record,
    TooLarge,
    TransportError,
)
from splitferry_protocol.codec import crc_header, encode_abort, encode_split
from splitferry_protocol.records import Abort, Split

SPLITS, RESULTS, DEAD_LETTERS = "splits", "results", "dead-letters"
TOPIC_IDS: TopicIds = ("splits-1".ljust(22, "_"), "results-1".ljust(22, "_"))
EVERYTHING = 2**62


class Fate(Enum):
    """How a planned fault lets a transaction end; its writer hears `FateUnknown`."""

    COMMITTED = "committed"
    """At once, and only the answer was lost."""
    COMMITTED_LATER = "committed later"
    """When the next writer asks; until then it is open, and hides what follows."""
    ABORTED = "aborted"
    """When the next writer asks."""


@dataclass(slots=True, eq=False)
class Transaction:
    commit: tuple[int, str] | None = None
    committed: bool | None = None
    """None while it is open."""
    prepared: bool = False
    """Whoever settles it has to commit it."""


@dataclass(slots=True)
class Entry:
    """A place in a log. A marker has no record."""

    record: Record | None
    transaction: Transaction | None = None

    @property
    def open(self) -> bool:
        return self.transaction is not None and self.transaction.committed is None

    @property
    def visible(self) -> bool:
        committed = self.transaction is None or self.transaction.committed
        return self.record is not None and bool(committed)


class Log:
    def __init__(self) -> None:
        self.start = 0
        self.entries: list[Entry] = []

    @property
    def end(self) -> int:
        return len(self.entries)

    @property
    def stable(self) -> int:
        """The last stable offset: a read_committed reader gets no further."""
        return next((n for n, entry in enumerate(self.entries) if entry.open), self.end)

    def append(self, record: Outgoing, transaction: Transaction | None = None) -> int:
        offset = self.end
        read = Record(offset, record.key, record.value, record.headers, timestamp=1000 + offset)
        self.entries.append(Entry(read, transaction))
        return offset

    def read(self, start: int, end: int) -> list[Record]:
        return [e.record for e in self.entries[start:end] if e.visible and e.record is not None]


class Kafka:
    """The broker, and the group's coordinator as far as a test plays it."""

    def __init__(self, partitions: int = 1) -> None:
        self.partitions = range(partitions)
        self.logs: defaultdict[tuple[str, int], Log] = defaultdict(Log)
        self.offsets: dict[int, tuple[int, str]] = {}
        self.calls: list[str] = []
        self.faults: defaultdict[str, deque[BaseException | Fate | None]] = defaultdict(deque)
        """What goes wrong with the next calls of an operation; None: nothing. See `Fate`."""
        self.gates: defaultdict[str, asyncio.Event] = defaultdict(_opened)
        """A call of an operation waits while its gate is cleared."""
        self.size_limits: dict[str, int] = {}
        """Bytes that a value of a topic may have."""
        self.topics = TOPIC_IDS
        """Another id is another topic of the same name."""
        self.writers: list[MemoryWriter] = []
        """All that were handed out."""
        self.grown = asyncio.Event()
        self._epochs: dict[int, int] = {}
        self._ongoing: dict[int, Transaction] = {}

    # ---- what a test does

    def send(self, content: Split | Abort, partition: int = 0) -> int:
        """Append a record as a producer would; returns its offset."""
        value = encode_split(content) if isinstance(content, Split) else encode_abort(content)
        return self.send_raw(content.request.key, value, [crc_header(value)], partition)

    def send_raw(
        self,
        key: bytes | None,
        value: bytes | None,
        headers: Sequence[tuple[str, bytes]] = (),
        partition: int = 0,
    ) -> int:
        outgoing = Outgoing(SPLITS, partition, key, value, headers)
        offset = self.logs[SPLITS, partition].append(outgoing)
        self.grown.set()
        return offset

    def committed_records(self, topic: str, partition: int = 0) -> list[Record]:
        return self.logs[topic, partition].read(0, EVERYTHING)

    def fence(self, partition: int = 0) -> int:
        """Begin a new epoch, and settle what the one before left."""
        self._settle(partition)
        self._epochs[partition] = self._epochs.get(partition, 0) + 1
        return self._epochs[partition]

    # ---- what members and writers do

    async def ask(self, operation: str) -> Fate | None:
        """Record the call, let others run, and let the planned fault happen."""
        self.calls.append(operation)
        await asyncio.sleep(0)
        await self.gates[operation].wait()
        return self.strike(operation)

    def strike(self, operation: str) -> Fate | None:
        """The planned fault."""
        fault = self.faults[operation].popleft() if self.faults[operation] else None
        if isinstance(fault, BaseException):
            raise fault
        return fault

    def begin(self, partition: int, epoch: int) -> Transaction:
        self.check(partition, epoch)
        self._settle(partition)
        self._ongoing[partition] = Transaction()
        return self._ongoing[partition]

    def check(self, partition: int, epoch: int) -> None:
        if self._epochs[partition] != epoch:
            raise Fenced(f"epoch {epoch} has ended")

    def end(self, partition: int, transaction: Transaction, committed: bool) -> None:
        transaction.committed = committed
        self._ongoing.pop(partition, None)
        if committed and transaction.commit is not None:
            self.offsets[partition] = transaction.commit
        for log in self.logs.values():
            if any(entry.transaction is transaction for entry in log.entries):
                log.entries.append(Entry(None))

    def _settle(self, partition: int) -> None:
        left = self._ongoing.get(partition)
        if left is not None:
            self.end(partition, left, left.prepared)


def _opened() -> asyncio.Event:
    gate = asyncio.Event()
    gate.set()
    return gate


class MemoryTransport:
    """A member of the group; see `Transport`. A test assigns partitions by `assign`.

    Attributes:
        positions: by assigned partition.
    """

    def __init__(self, kafka: Kafka, batch: int = 1000) -> None:
        """`batch`: records that a poll hands out for a partition at most."""
        self.kafka = kafka
        self.paused: set[int] = set()
        self.positions: dict[int, int] = {}
        self.stopped = False
        self.silent_for = 0.0
        self._batch = batch
        self._assigned: Rebalanced | None = None
        self._revoked: Rebalanced | None = None

    # ---- the group

    async def start(self, assigned: Rebalanced, revoked: Rebalanced) -> None:
        await self.kafka.ask("start")
        self._assigned, self._revoked = assigned, revoked
        await self.assign(self.kafka.partitions)

    async def stop(self) -> None:
        self.stopped = True
        await self.kafka.ask("stop")

    async def assign(self, partitions: Collection[int]) -> None:
        """A rebalance: everything is revoked, then `partitions` are assigned."""
        assert self._assigned is not None
        assert self._revoked is not None
        await self._revoked(list(self.positions))
        self.positions = dict.fromkeys(partitions, 0)
        self.paused = set(partitions)
        await self._assigned(partitions)

    # ---- the splits

    async def poll(self, wanted: Collection[int], wait: float) -> Mapping[int, Sequence[Record]]:
        await self.kafka.ask("poll")
        batches = self._fetch(wanted)
        # As aiokafka does it: what was taken out of the buffers is lost with the exception.
        if batches:
            self.kafka.strike("fetch")
        if not batches:
            self.kafka.grown.clear()
            try:
                async with asyncio.timeout(wait):
                    await self.kafka.grown.wait()
            except TimeoutError:
                return {}
            batches = self._fetch(wanted)
        return batches

    def _fetch(self, wanted: Collection[int]) -> dict[int, Sequence[Record]]:
        batches: dict[int, Sequence[Record]] = {}
        for partition in (set(wanted) & self.positions.keys()) - self.paused:
            log = self.kafka.logs[SPLITS, partition]
            records = log.read(self.positions[partition], log.stable)[: self._batch]
            if records:
                batches[partition] = records
                self.positions[partition] = records[-1].offset + 1
        return batches

    def seek(self, partition: int, offset: int) -> None:
        if partition in self.positions:
            self.positions[partition] = offset

    def pause(self, partition: int) -> None:
        self.paused.add(partition)

    def resume(self, partition: int) -> None:
        self.paused.discard(partition)

    async def position(self, partition: int) -> int | None:
        await self.kafka.ask("position")
        if partition not in self.positions:
            return None
        log = self.kafka.logs[SPLITS, partition]
        position = self.positions[partition]
        while position < log.stable and not log.entries[position].visible:
            position += 1
        self.positions[partition] = position
        return position

    def silence(self, partition: int) -> float:
        return self.silent_for

    def end(self, partition: int) -> int | None:
        return self.kafka.logs[SPLITS, partition].end

    def stable_end(self, partition: int) -> int | None:
        return self.kafka.logs[SPLITS, partition].stable

    # ---- taking

    async def topics(self, age: float) -> TopicIds:
        await self.kafka.ask("topics")
        return self.kafka.topics

    async def writer(self, partition: int) -> MemoryWriter:
        await self.kafka.ask("writer")
        writer = MemoryWriter(self.kafka, partition, self.kafka.fence(partition))
        self.kafka.writers.append(writer)
        return writer

    async def committed(self, partition: int) -> tuple[int, str] | None:
        await self.kafka.ask("committed")
        return self.kafka.offsets.get(partition)

    async def splits_bounds(self, partition: int) -> tuple[int, int]:
        await self.kafka.ask("splits_bounds")
        log = self.kafka.logs[SPLITS, partition]
        return log.start, log.end

    async def results_bounds(self, partition: int) -> tuple[int, int]:
        await self.kafka.ask("results_bounds")
        log = self.kafka.logs[RESULTS, partition]
        return log.start, log.end

    async def results(self, partition: int, start: int, end: int) -> AsyncGenerator[Record, None]:
        await self.kafka.ask("results")
        log = self.kafka.logs[RESULTS, partition]
        for record in log.read(start, min(end, log.stable)):
            yield record
        if log.stable < end:
            raise HangingTransaction(f"the results end at {end}, but are stable to {log.stable}")


class MemoryWriter:
    """A transactional producer with an epoch; see `Writer`."""

    def __init__(self, kafka: Kafka, partition: int, epoch: int) -> None:
        self.closed = False
        self._kafka = kafka
        self._partition = partition
        self._epoch = epoch

    async def publish(
        self,
        records: Sequence[Outgoing],
        commit: Callable[[Sequence[int]], tuple[int, str]],
    ) -> list[int]:
        kafka, partition = self._kafka, self._partition
        await kafka.ask("begin")
        transaction = kafka.begin(partition, self._epoch)
        offsets = []
        too_large = []
        for index, record in enumerate(records):
            if len(record.value or b"") > kafka.size_limits.get(record.topic, EVERYTHING):
                too_large.append(index)
            else:
                log = kafka.logs[record.topic, record.partition or 0]
                offsets.append(log.append(record, transaction))
        if too_large:
            raise TooLarge(too_large)
        await kafka.ask("send")
        kafka.check(partition, self._epoch)
        transaction.commit = commit(offsets)
        fate = await kafka.ask("commit")
        kafka.check(partition, self._epoch)
        transaction.prepared = fate is Fate.COMMITTED_LATER
        if fate in {None, Fate.COMMITTED}:
            kafka.end(partition, transaction, committed=True)
        if fate is not None:
            raise FateUnknown(f"no answer to the commit (it was {fate.value})")
        return offsets

    async def settle(self) -> None:
        await self._kafka.ask("settle")

    async def close(self) -> None:
        self.closed = True
        await self._kafka.ask("close")


def broken(message: str = "the connection was lost") -> TransportError:
    return TransportError(message)
