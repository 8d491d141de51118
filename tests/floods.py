"""A splits log without an end to it: records are made as they are read, and what is published is
only counted, so that all memory that grows is the consumer's."""

from __future__ import annotations

import asyncio
import tracemalloc
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from memory_transport import RESULTS, Kafka, MemoryTransport
from owners import Owner
from splitferry_consumer.transport import Outgoing, Record
from splitferry_protocol.codec import crc_header, decode_outcome, encode_abort, encode_split
from splitferry_protocol.records import Abort, Result, Split

Make = Callable[[int], Split | Abort | Record]
"""The record at an offset."""
BATCH = 500
PACE = 0.02
"""Seconds that a transaction takes: reading is faster."""


def as_record(offset: int, content: Split | Abort | Record) -> Record:
    if isinstance(content, Record):
        return content
    value = encode_split(content) if isinstance(content, Split) else encode_abort(content)
    return Record(offset, content.request.key, value, [crc_header(value)], 1000)


class Flood(MemoryTransport):
    """A member that reads `count` records of partition 0. Also its own `Writer`.

    Attributes:
        told: results by status or code, and what else was published.
        held: bytes of records that the ledger held at most, as seen by each transaction.
        largest: records of one transaction at most.
        watermark: W, as committed.
    """

    def __init__(self, make: Make, count: int) -> None:
        super().__init__(Kafka())
        self._make = make
        self.count = count
        self.told: Counter[str] = Counter()
        self.largest = 0
        self.held = 0
        self.watermark = 0
        self.owner: Owner | None = None
        self._appended = 0

    @property
    def read(self) -> bool:
        """Whether all was handed out."""
        return self.positions[0] == self.count

    @property
    def kept(self) -> int:
        """Bytes that are read and not yet written, results that are owed and not yet told."""
        assert self.owner is not None
        partition = self.owner.partition
        return partition.gauge.bytes + (not partition.drained)

    async def poll(self, wanted: Collection[int], wait: float) -> Mapping[int, Sequence[Record]]:
        start = self.positions[0]
        end = min(self.count, start + BATCH)
        await asyncio.sleep(0 if wanted and start < end else 0.001)
        if not wanted:
            return {}
        self.positions[0] = end
        return {0: [as_record(offset, self._make(offset)) for offset in range(start, end)]}

    async def position(self, partition: int) -> int:
        return self.positions[partition]

    def end(self, partition: int) -> int:
        return self.count

    def stable_end(self, partition: int) -> int:
        return self.count

    async def splits_bounds(self, partition: int) -> tuple[int, int]:
        return 0, self.count

    async def writer(self, partition: int) -> Flood:  # type: ignore[override]
        return self

    async def publish(
        self, records: Sequence[Outgoing], commit: Callable[[Sequence[int]], tuple[int, str]]
    ) -> list[int]:
        await asyncio.sleep(PACE)
        assert self.owner is not None
        ledger = self.owner.partition._ledger
        self.held = max(self.held, ledger.held_bytes if ledger else 0)
        self.largest = max(self.largest, len(records))
        self.told.update(_name(record) for record in records)
        offsets = list(range(self._appended, self._appended + len(records)))
        self._appended += len(records)
        self.watermark, _ = commit(offsets)
        return offsets

    async def settle(self) -> None: ...

    async def close(self) -> None: ...


def _name(record: Outgoing) -> str:
    if record.topic != RESULTS:
        return record.topic
    outcome = decode_outcome(record.key, record.value)
    if not isinstance(outcome, Result):
        return "accepted"
    if outcome.repeat:
        return "repeat"
    return outcome.error.code if outcome.error else outcome.status.value


@dataclass
class Memory:
    peak: int = 0
    """Bytes."""


@contextmanager
def memory() -> Iterator[Memory]:
    """How much more Python holds meanwhile than at the beginning."""
    measured = Memory()
    tracemalloc.start()
    try:
        yield measured
        measured.peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
