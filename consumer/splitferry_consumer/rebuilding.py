"""Carries a replay out: reads the log, and feeds the consumer's own ledger and targets with it.

What is a transaction for the consumer is nothing here: what a batch says is taken as told, so
that the ledger goes on, and goes nowhere. Nothing is written but below the directory, if one is
given.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping
from concurrent.futures import Executor
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Protocol

from aiokafka import TopicPartition

from splitferry_protocol.codec import InvalidRecord, NewerVersion, decode_outcome
from splitferry_protocol.errors import BatchTransferFailed, WsDataError
from splitferry_protocol.ids import RequestId, RequestKey
from splitferry_protocol.partitioning import partition_for
from splitferry_protocol.records import Block, Result, Status

from .bookmark import HORIZON, Bookmark, NewerCommit
from .coverage import Range
from .flow import Flow, Gauge
from .group import Ending, Workshop, WriteSplitDataTaskHandle, open_group
from .inquiry import TopicView
from .ledger import Decision, Ledger, Limits, Recorded, WriteSplit
from .replay import (
    Outcome,
    Report,
    Stretch,
    as_recorded,
    belonging,
    ended,
    not_found,
    only_these,
    still_open,
    whole_range,
)
from .request import ReceiveState, RequestPhase
from .taking import newer_result
from .targets import Incoming, Item, Verdict
from .targets.file import FileTarget
from .targets.verifying import VerifyingIncoming
from .transport import HangingTransaction, OutOfRange, Record, TransportError

SIDE_BY_SIDE = 4
"""Partitions that are read at a time: each holds what two fetches bring, and the results."""
FLOW_HIGH = 64 * 1024 * 1024
"""Bytes read and not yet written, of all partitions together."""
WRITE_TIMEOUT = 5.0
"""Seconds for which a write is tried again: somebody waits, and can run the replay again."""
GROUP = "splitferry replay"
"""In the place of the group in the catalogue: the verdicts of consumers do not bind a replay."""
FOR_EVER = 2**63 - 1
"""Above every offset."""


class Logs(Protocol):
    """What is asked of Kafka; see `LogReader`."""

    async def topic(self, name: str) -> TopicView: ...

    async def bounds(self, partition: TopicPartition) -> tuple[int, int]: ...

    async def offset_at(self, partition: TopicPartition, moment: int) -> int | None: ...

    async def committed(self, group: str, partition: TopicPartition) -> tuple[int, str] | None: ...

    def records(
        self, partition: TopicPartition, start: int, end: int
    ) -> AsyncGenerator[Record, None]: ...


@dataclass(frozen=True, slots=True)
class Bounds:
    """Which requests are asked for: those that ended within, in each of these partitions.

    Attributes:
        starts, ends: offsets by partition; with any, other partitions are left out.
        since, until: Unix times in ms.
    """

    since: int | None = None
    until: int | None = None
    starts: Mapping[int, int] = field(default_factory=dict)
    ends: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Watch:
    """Who is told, of partitions by their number. A trouble is what kept one from being read to
    its end; a note is only good to know."""

    report: Callable[[Report], None]
    trouble: Callable[[int, str], None]
    note: Callable[[int | None, str], None]
    to_read: Callable[[int], None]
    """So many offsets more are to be read."""
    have_read: Callable[[int, int], None]
    """So many offsets more, and bytes: of the log, or of files that are there."""


@dataclass(frozen=True, slots=True)
class Source:
    """Whose requests are rebuilt: where they lie, and the group whose results count."""

    splits_topic: str
    results_topic: str
    group: str
    horizon: int | None = None


@dataclass(frozen=True, slots=True)
class _Log:
    """A splits partition as it stands, and what the group has committed of it."""

    number: int
    start: int
    end: int
    watermark: int | None
    """W; None: nothing was committed, or by hand, or of topics that were deleted since."""
    results_known: bool
    """Whether W speaks of these very topics, so that a request below it has its result there, or
    had one that was deleted."""
    horizon: int

    def lost(self) -> list[Range]:
        """Offsets that retention has deleted, to be added to."""
        return [(0, self.start)] if self.start else []


class Replay:
    """One run. `files` None: nothing is written; what goes to memory never is.

    All methods raise TransportError, and what the targets raise for the whole (`Condemned`);
    trouble with one partition is told, and keeps no other from being rebuilt.
    """

    def __init__(
        self,
        log: Logs,
        source: Source,
        files: FileTarget | None,
        threads: Executor,
        watch: Watch,
    ) -> None:
        self.log = log
        self.source = source
        self.files = files
        self.watch = watch
        self.threads = threads
        self.begin: Mapping[Block, Callable[[Item], Incoming]] = {
            Block.FILE: files.begin if files is not None else VerifyingIncoming,
            Block.MEM: VerifyingIncoming,
        }
        self.flow = Flow(FLOW_HIGH)
        self._topics = ("", "")
        self._spoken = False
        """Whether the group has a result, or has committed anything."""
        self._troubles: set[tuple[int, str]] = set()
        """Told already: a partition that is read twice meets its trouble twice."""
        self._places = asyncio.Semaphore(SIDE_BY_SIDE)

    async def within(self, bounds: Bounds) -> None:
        """Replay all requests that ended within `bounds`."""
        partitions = await self._partitions()
        named = {*bounds.starts, *bounds.ends}
        if wrong := named - {*partitions}:
            raise TransportError(
                f"topic {self.source.splits_topic} has no partition {min(wrong)}, only 0 to "
                f"{partitions[-1]}"
            )
        later: dict[int, Callable[[], Awaitable[object]]] = {}
        await self._each(sorted(named) or partitions, self._range_of, bounds, later)
        # Of two requests with one name and version the first one wins, and must be the one that
        # did: what nobody has recorded waits for what somebody has, in all partitions.
        await self._each(later, lambda number: later[number]())
        if not self._spoken:
            self.watch.note(
                None,
                f"group {self.source.group} has recorded nothing there: all is judged by the log "
                "alone",
            )

    async def requests(self, ids: Iterable[RequestId]) -> None:
        """Replay these requests, each read from where its result says; those without a result
        are looked for in all partitions from W on."""
        wanted, found, searched = frozenset(ids), set[RequestId](), set[int]()
        partitions = await self._partitions()
        likely = {partition_for(request.key, len(partitions)) for request in wanted}
        # A request stays in the partition that was chosen for it when it opened, and partitions
        # may have been added since.
        for some in (likely, {*partitions} - likely):
            if left := wanted - found:
                await self._each(sorted(some), self._recorded_in, left, found, searched)
        # Where results could not be read, one may say `failed`: the log alone does not decide.
        if (left := wanted - found) and len(searched) == len(partitions):
            await self._each(partitions, self._new_in, left, found)
        if (left := wanted - found) and self._troubles:
            names = ", ".join(map(str, sorted(left)))
            self.watch.note(None, f"{names}: not found, but not all could be read: try again")
            return
        for request in sorted(wanted - found):
            reason = (
                f"group {self.source.group} has recorded no result of it, and none of its splits "
                "lies at W or behind"
            )
            self.watch.report(Report(request, Outcome.UNKNOWN, reason=reason))

    async def _partitions(self) -> list[int]:
        splits = await self.log.topic(self.source.splits_topic)
        results = await self.log.topic(self.source.results_topic)
        self._topics = (splits.id, results.id)
        return sorted(splits.leaders)

    async def _each(
        self, partitions: Iterable[int], work: Callable[..., Awaitable[object]], *asked: object
    ) -> None:
        async def guarded(number: int) -> None:
            async with self._places:
                try:
                    await work(number, *asked)
                except TransportError as error:
                    trouble = (number, str(error))
                    if trouble not in self._troubles:
                        self.watch.trouble(*trouble)
                    self._troubles.add(trouble)

        try:
            async with asyncio.TaskGroup() as tasks:
                for number in partitions:
                    tasks.create_task(guarded(number))
        except ExceptionGroup as group:
            raise group.exceptions[0] from group  # the others were ended by it

    # ---- one partition

    async def _range_of(
        self, number: int, bounds: Bounds, later: dict[int, Callable[[], Awaitable[object]]]
    ) -> None:
        """Replay what has a result; how to replay what has none is left in `later`."""
        log = await self._log(number)
        starts = [bounds.starts[number]] if number in bounds.starts else []
        if bounds.since is not None:
            starts.append(await self._offset_at(log, bounds.since))
        start = max(starts, default=log.start)
        end = min(log.end, bounds.ends.get(number, log.end))
        if bounds.until is not None:
            end = min(end, await self._offset_at(log, bounds.until))
        results, complete = await self._results(number, None)
        self._spoken |= bool(results) or log.watermark is not None
        asked = belonging(results, start, end)
        before = [
            one
            for one in results
            if one.last < min(start, log.start, end)
            # Nothing that is left says when it ended, so its result does.
            and (bounds.until is None or one.result.finished_at < bounds.until)
        ]
        if bounds.since is not None:
            asked += [one for one in before if one.result.finished_at >= bounds.since]
        elif before and not starts:
            self.watch.note(
                number,
                f"the log begins at offset {log.start}: the records of {len(before)} requests "
                "that ended before are deleted",
            )
        expected = [one for one in asked if await self._left(log, one)]
        # Below W every request has a result, and with all results there it is known.
        sure = complete and log.results_known
        new_from = start if log.watermark is None else min(start, log.watermark)
        if sure and log.watermark is not None:
            new_from = log.watermark
        new = whole_range(number, new_from, end, (), log.start)
        if new is not None:
            stretch = replace(new, ended_from=start, sure=sure)
            # Only these, since all partitions keep theirs until then.
            recent = [one for one in results if one.last >= new.start - log.horizon]
            later[number] = lambda: self._read(log, stretch, recent)
        behind = max((one.last + 1 for one in expected), default=0)
        known = whole_range(number, behind, behind, expected, log.start)
        if known is not None:
            left = {id(one) for one in expected}
            await self._read(log, known, [one for one in results if id(one) not in left])

    async def _recorded_in(
        self,
        number: int,
        wanted: frozenset[RequestId],
        found: set[RequestId],
        searched: set[int],
    ) -> None:
        results, _ = await self._results(number, wanted)
        searched.add(number)
        if not results:
            return
        log = await self._log(number)
        found.update(one.request for one in results)
        expected = [one for one in results if await self._left(log, one)]
        for stretch in only_these(number, expected, log.start):
            await self._read(log, stretch, ())

    async def _new_in(
        self, number: int, wanted: frozenset[RequestId], found: set[RequestId]
    ) -> None:
        log = await self._log(number)
        start = max(log.start, log.watermark or 0)
        if start < log.end:
            sure = log.results_known and log.watermark == start
            stretch = Stretch(number, start, log.end, (), start, wanted, sure)
            await self._read(log, stretch, (), found)

    async def _log(self, number: int) -> _Log:
        splits = TopicPartition(self.source.splits_topic, number)
        start, end = await self.log.bounds(splits)
        committed = await self.log.committed(self.source.group, splits)
        watermark, horizon, known = None, self.source.horizon, False
        if committed is not None:
            with suppress(NewerCommit):
                bookmark = Bookmark.parse(*committed)
                horizon = horizon or bookmark.horizon
                known = bookmark.topics == self._topics
                # An offset that was set by hand says nothing of the requests below it, and one of
                # other topics nothing at all.
                if bookmark.horizon is not None and bookmark.topics in {None, self._topics}:
                    watermark = bookmark.watermark
        return _Log(number, start, end, watermark, known, horizon or HORIZON)

    async def _offset_at(self, log: _Log, moment: int) -> int:
        splits = TopicPartition(self.source.splits_topic, log.number)
        found = await self.log.offset_at(splits, moment)
        return log.end if found is None else found

    async def _results(
        self, number: int, wanted: frozenset[RequestId] | None
    ) -> tuple[list[Recorded], bool]:
        """The results of the partition's requests, and whether these are all there ever were."""
        source = self.source
        topic = TopicPartition(source.results_topic, number)
        keys = None if wanted is None else {request.key for request in wanted}
        start, end = await self.log.bounds(topic)
        lost = [(0, start)] if start else []
        found: list[Recorded] = []
        async with aclosing(self._records(topic, start, end, lost)) as records:
            async for record in records:
                if keys is not None and record.key not in keys:
                    continue
                try:
                    told = decode_outcome(record.key, record.value)
                except NewerVersion:  # Perhaps of this group: passed over, it would not count.
                    raise TransportError(newer_result(record.offset)) from None
                except InvalidRecord:
                    continue  # nobody's result; the consumer warns of it
                if (
                    isinstance(told, Result)
                    and not told.repeat
                    and told.group == source.group
                    and told.input[:2] == (source.splits_topic, number)
                ):
                    assert record.value is not None
                    first, last = told.input.first, told.input.last
                    found.append(
                        Recorded(told.request, first, last, record.offset, None, record.value)
                    )
        return found, not lost

    async def _left(self, log: _Log, one: Recorded) -> bool:
        """Whether the request is to be read; tells of it otherwise."""
        result = one.result
        outcome: Outcome | None
        if not result.success:
            outcome = None
        elif (there := await self._there(result)) is not None:
            outcome = there
            self.watch.have_read(0, result.size or 0)
        elif one.last < log.start:
            outcome = Outcome.DELETED
        else:
            return True
        self.watch.report(as_recorded(log.number, one, outcome))
        return False

    async def _there(self, result: Result) -> Outcome | None:
        if self.files is None or result.block is not Block.FILE:
            return None
        held = await self.files.verified(result.unique_id)
        if held is None or held.version < result.version:
            return None
        if held.version > result.version:
            return Outcome.SUPERSEDED
        return Outcome.PRESENT if held.sha256 == result.sha256 else None

    async def _read(
        self,
        log: _Log,
        stretch: Stretch,
        others: Iterable[Recorded],
        found: set[RequestId] | None = None,
    ) -> None:
        """Replay a stretch; requests without a result that are told of are added to `found`."""
        self.watch.to_read(stretch.end - stretch.start)
        # A verdict of a run that was interrupted must not bind this one, which may have to write
        # again what that one wrote.
        await self._forget(log.number)
        reading = _Reading(self, log, stretch, others, set() if found is None else found)
        try:
            await reading.run()
        finally:
            await reading.close()
        await self._forget(log.number)

    async def _forget(self, number: int) -> None:
        """Clear the verdicts of this partition's replays from the catalogue."""
        if self.files is not None:
            await self.files.passed(GROUP, self.source.splits_topic, number, FOR_EVER)

    async def _records(
        self, partition: TopicPartition, start: int, end: int, lost: list[Range]
    ) -> AsyncGenerator[Record, None]:
        """As `LogReader.records`; what retention deletes meanwhile is added to `lost`."""
        while start < end:
            try:
                async with aclosing(self.log.records(partition, start, end)) as records:
                    async for record in records:
                        start = record.offset + 1
                        yield record
            except OutOfRange:
                first, _ = await self.log.bounds(partition)
                if first <= start:  # the log was truncated
                    raise
                lost.append((start, first))
                start = first
            else:
                return


class _Reading:
    """A stretch on its way from the log through the ledger to the targets."""

    def __init__(
        self,
        replay: Replay,
        log: _Log,
        stretch: Stretch,
        others: Iterable[Recorded],
        found: set[RequestId],
    ) -> None:
        self._replay = replay
        # The horizon of those days may have been a longer one: what completed was within it.
        longest = max((one.last - one.first + 1 for one in stretch.expected), default=0)
        self._log = log = replace(log, horizon=max(log.horizon, longest))
        self._stretch = stretch
        self._lost = log.lost()
        self._changed = asyncio.Event()
        self._gauge = Gauge(replay.flow, self._changed.set)
        self._workshop = Workshop(replay.threads, self._gauge, WRITE_TIMEOUT)
        begin = Bookmark(stretch.start, None, stretch.start, log.horizon)
        # The consumer's limits were settings of its own: what it has taken must be taken here.
        # No more requests open than there are records within the horizon, nor gaps.
        limits = Limits(open_requests=log.horizon, gaps=log.horizon)
        topic = replay.source.splits_topic
        self._ledger = Ledger(GROUP, topic, stretch.partition, log.horizon, begin, limits=limits)
        for one in sorted(others, key=lambda one: one.offset):
            if one.last >= stretch.start - log.horizon:
                self._ledger.load(one.offset, one.result, one.value)
        self._expected: dict[RequestId, list[Recorded]] = defaultdict(list)
        for one in stretch.expected:
            self._expected[one.request].append(one)
        self._found = found
        self._handles: dict[ReceiveState, WriteSplitDataTaskHandle] = {}
        self._known: dict[ReceiveState, Recorded | None] = {}
        self._numbers = count()
        self._broken: Exception | None = None

    async def run(self) -> None:
        stretch = self._stretch
        splits = TopicPartition(self._replay.source.splits_topic, stretch.partition)
        read, hidden = stretch.start, None
        try:
            async with aclosing(
                self._replay._records(splits, stretch.start, stretch.end, self._lost)
            ) as records:
                async for record in records:
                    size = len(record.value or b"")
                    self._replay.watch.have_read(record.offset + 1 - read, size)
                    read = record.offset + 1
                    if self._wanted(record):
                        await self._make_way(record)
                        self._deliver(record)
                        await self._until(lambda: not self._full)
        except HangingTransaction as error:
            hidden = error
        self._ledger.advance(stretch.end)
        await self._until(lambda: not self._busy)
        self._replay.watch.have_read(stretch.end - read, 0)
        self._tell_the_rest()
        if hidden is not None:
            raise hidden

    async def close(self) -> None:
        """Drop what has not ended."""
        handles, self._handles = self._handles, {}
        for handle in handles.values():
            await handle.close()

    # ---- reading

    def _wanted(self, record: Record) -> bool:
        """Whether the record is of a request that is asked for; by its key, which is the same."""
        stretch = self._stretch
        try:
            request = RequestId.from_key(record.key)
        except ValueError:
            return False  # it is nobody's
        if request in self._expected:
            return True
        return record.offset >= stretch.new_from and (
            stretch.named is None or request in stretch.named
        )

    async def _make_way(self, record: Record) -> None:
        """Where an opening is expected, no other one of its id is within the horizon: the one
        before has ended (and the horizon was shorter then), and those to come hide nothing."""
        request = RequestId.from_key(record.key)
        one = self._expectation(request, record.offset)
        if one is None:
            return
        before = self._ledger.states.get(request)
        if before is not None and before.first < one.first:
            await self._until(
                lambda: before.phase is RequestPhase.OPEN or before not in self._handles
            )
        if request not in self._ledger.states:
            self._ledger.forget(request)

    def _deliver(self, record: Record) -> None:
        self._carry_out(self._ledger.read(record, record.content(), 0))
        self._take_as_told()

    @property
    def _full(self) -> bool:
        return self._gauge.full or self._ledger.full

    @property
    def _busy(self) -> bool:
        ledger = self._ledger
        return ledger.unsettled > 0 or any(s.comparing for s in ledger.open_requests)

    async def _until(self, condition: Callable[[], bool]) -> None:
        while True:
            if self._broken is not None:
                raise self._broken
            if condition():
                return
            self._changed.clear()
            await self._changed.wait()

    # ---- decisions

    def _carry_out(self, decisions: Iterable[Decision]) -> None:
        for decision in decisions:
            state = decision.state
            handle = self._handles.get(state)
            if handle is None:
                handle = self._handles[state] = self._open(state)
            if isinstance(decision, WriteSplit):
                handle.submit_split(decision)
            else:
                handle.end(self._ending(state))

    def _ending(self, state: ReceiveState) -> Ending:
        known = self._known[state]
        if self._unasked(state, known):
            before = BatchTransferFailed(state.request, "not asked for")
            return Ending(Status.ABORTED, before)
        sha256 = state.sha256 if known is None else known.result.sha256
        return Ending(state.status, state.error, state.total, sha256, state.labels)

    def _open(self, state: ReceiveState) -> WriteSplitDataTaskHandle:
        self._known[state] = self._expectation(state.request, state.first)
        number, replay = self._stretch.partition, self._replay
        key = RequestKey(GROUP, replay.source.splits_topic, number, state.request, state.first)
        begin = replay.begin[state.block]
        handle = open_group(key, state, begin, self._workshop, _Reports(self, state))
        handle.start()
        return handle

    def _expectation(self, request: RequestId, first: int) -> Recorded | None:
        """The result of this very opening; where the beginning of the request is deleted, it
        opens later than it did."""
        for one in self._expected.get(request, ()):
            if one.first <= first <= one.last:
                return one
        return None

    def _unasked(self, state: ReceiveState, known: Recorded | None) -> bool:
        """Whether the request has no result and opened where such are not looked for, or has
        ended before the range. One that was given up has no end in the log yet."""
        if known is not None:
            return False
        before = state.last < self._stretch.ended_from and state.phase is not RequestPhase.OPEN
        return state.first < self._stretch.new_from or (before and not state.by_owner)

    def _settled(self, state: ReceiveState, verdict: Verdict) -> None:
        known, number = self._known.pop(state), self._log.number
        if not self._unasked(state, known):
            report = ended(number, state, verdict, known, self._log.horizon, self._lost)
            self._tell(report, known)
        self._ledger.settled(state, verdict, 0)

    def _advance(self) -> None:
        """Something has gone on: what waited for it can be told, and there may be room."""
        self._take_as_told()
        self._changed.set()

    def _take_as_told(self) -> None:
        """What would be published is counted as published, so that the ledger lets go of it."""
        ledger = self._ledger
        while ledger.has_news and (batch := ledger.gather()) is not None:
            ledger.published(batch, [next(self._numbers) for _ in batch.results])
            for state in batch.states:
                self._handles.pop(state, None)

    # ---- what is told

    def _tell(self, report: Report, known: Recorded | None) -> None:
        if known is None:
            self._found.add(report.request)
        else:
            self._expected[known.request].remove(known)
        self._replay.watch.report(report)

    def _tell_the_rest(self) -> None:
        number, stretch = self._log.number, self._stretch
        for state in self._ledger.open_requests:
            known = self._expectation(state.request, state.first)
            if self._unasked(state, known):
                continue
            begin = 0 if stretch.sure else stretch.start
            self._tell(still_open(number, state, known, begin, self._lost), known)
        for left in list(self._expected.values()):
            for one in list(left):
                self._tell(not_found(number, one, self._lost), one)


@dataclass(frozen=True, slots=True)
class _Reports:
    """Brings what a write group tells to the ledger."""

    reading: _Reading
    state: ReceiveState

    def compared(self, same: bool) -> None:
        self.reading._carry_out(self.reading._ledger.compared(self.state, same, 0))
        self.reading._advance()

    def failed(self, error: WsDataError) -> None:
        decisions = self.reading._ledger.give_up(self.state, Status.FAILED, error)
        self.reading._carry_out(decisions)
        self.reading._advance()

    def settled(self, verdict: Verdict) -> None:
        self.reading._settled(self.state, verdict)
        self.reading._advance()

    def broken(self, error: Exception) -> None:
        self.reading._broken = error
        self.reading._changed.set()
