"""Replays within the process of the test, of a real log or of one in memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from aiokafka import TopicPartition

from checker import Opening
from splitferry_consumer.bookmark import Bookmark
from splitferry_consumer.inquiry import TopicView
from splitferry_consumer.rebuilding import Bounds, Logs, Replay, Source, Watch
from splitferry_consumer.replay import Outcome, Report
from splitferry_consumer.targets.file import FileTarget
from splitferry_consumer.transport import HangingTransaction, OutOfRange, Record, TransportError
from splitferry_protocol.codec import encode_result
from splitferry_protocol.errors import BatchTransferFailed
from splitferry_protocol.ids import RequestId
from splitferry_protocol.records import Input, Result, Status
from workload import Message

SOURCE = Source("splits", "results", "group")


@dataclass
class MemoryLogs:
    """The splits and the results in memory, one partition each unless told otherwise."""

    splits: list[list[Record]] = field(default_factory=lambda: [[]])
    results: list[list[Record]] = field(default_factory=lambda: [[]])
    start: int = 0
    """Of the splits: what lies below is deleted."""
    deleted_later: int = 0
    """The start that retention moves to once reading has begun."""
    watermark: int | None = None
    horizon: int = 1000
    """As committed."""
    anew: bool = False
    """Whether the topics are others than those of the commit."""
    hidden: bool = False
    """Whether an open transaction hides the end of the splits, behind all that is there."""
    unreadable_results: int | None = None
    """The partition whose results cannot be read."""
    read: list[int] = field(default_factory=list)
    """Offsets of the splits that were read."""

    def _log(self, partition: TopicPartition) -> list[Record]:
        return (self.splits if partition.topic == "splits" else self.results)[partition.partition]

    async def topic(self, name: str) -> TopicView:
        return TopicView(
            f"{name[0]}{'anew' * self.anew:_<21}", dict.fromkeys(range(len(self.splits)), 0)
        )

    async def bounds(self, partition: TopicPartition) -> tuple[int, int]:
        log = self._log(partition)
        return self.start if log in self.splits else 0, len(log)

    async def offset_at(self, partition: TopicPartition, moment: int) -> int | None:
        there = self._log(partition)[self.start :]
        return next((r.offset for r in there if r.timestamp >= moment), None)

    async def committed(self, group: str, partition: TopicPartition) -> tuple[int, str] | None:
        if self.watermark is None:
            return None
        topics = ("s" + 21 * "_", "r" + 21 * "_")
        bookmark = Bookmark(self.watermark, 0, self.watermark, self.horizon, topics)
        return self.watermark, bookmark.metadata

    async def records(
        self, partition: TopicPartition, start: int, end: int
    ) -> AsyncGenerator[Record, None]:
        topic, number = partition
        if topic == "results" and number == self.unreadable_results:
            raise TransportError("not readable")
        for record in self._log(partition)[start:end]:
            if partition.topic == "splits":
                if record.offset < self.start:
                    raise OutOfRange([partition.partition])
                self.read.append(record.offset)
            yield record
            if partition.topic == "splits":
                self.start = max(self.start, self.deleted_later)
        if partition.topic == "splits" and self.hidden:
            raise HangingTransaction("a transaction is open there")

    # ---- filling

    def append(self, messages: Iterable[Message], partition: int = 0) -> None:
        log = self.splits[partition]
        for message in messages:
            where = len(log)
            log.append(Record(where, message.key, message.value, message.headers, 1000 * where))

    def record(self, result: Result) -> None:
        log = self.results[result.input.partition]
        log.append(Record(len(log), result.request.key, encode_result(result)))


def result_of(opening: Opening, status: Status | None = None) -> Result:
    """What a consumer records of it; with another `status`, for reasons of its own."""
    status = status or opening.status
    assert status is not None
    split, whole = opening.split, status is Status.COMPLETED
    failure = BatchTransferFailed(opening.request, f"it was {status}")
    return Result(
        opening.request, split.unique_id, split.version, split.block, opening.labels, "group",
        status, None if whole else failure, len(opening.data), opening.digest if whole else None,
        {"path": split.unique_id} if whole else None, opening.splits, opening.duplicates,
        Input("splits", opening.partition, opening.first, opening.last), None, False, 5000,
    )  # fmt: skip


@dataclass
class Told:
    """What a replay told."""

    reports: list[Report] = field(default_factory=list)
    troubles: list[tuple[int, str]] = field(default_factory=list)
    notes: list[tuple[int | None, str]] = field(default_factory=list)
    offsets: int = 0
    bytes: int = 0
    left: int = 0
    """Offsets that were to be read and were not."""

    def of(self, request: RequestId) -> Report:
        (found,) = [report for report in self.reports if report.request == request]
        return found

    def outcomes(self) -> dict[RequestId, Outcome]:
        """All of them; each request is told once."""
        found = {report.request: report.outcome for report in self.reports}
        assert len(found) == len(self.reports), self.reports
        return found

    def _have_read(self, offsets: int, size: int) -> None:
        self.offsets += offsets
        self.bytes += size
        self.left -= offsets

    def _to_read(self, offsets: int) -> None:
        self.left += offsets


async def replayed(
    logs: Logs,
    source: Source = SOURCE,
    *,
    to: Path | None = None,
    ids: Sequence[RequestId] = (),
    bounds: Bounds | None = None,
) -> Told:
    """Replay to the end, into `to` or nowhere."""
    told = Told()
    watch = Watch(
        told.reports.append,
        lambda partition, said: told.troubles.append((partition, said)),
        lambda partition, said: told.notes.append((partition, said)),
        told._to_read,
        told._have_read,
    )
    with ThreadPoolExecutor(4) as threads:
        files = None if to is None else await FileTarget.open(to, executor=threads)
        try:
            replay = Replay(logs, source, files, threads, watch)
            await (replay.requests(ids) if ids else replay.within(bounds or Bounds()))
        finally:
            if files is not None:
                await asyncio.to_thread(files.close)
    return told
