"""The ledger of one splits partition: records in, decisions out. No I/O, no clock.

It holds the rules of DESIGN, "The one idea": where a request opens and ends, what W, P and the
ended set are, what is told besides results, and what one transaction may say. Everything it
decides follows from the log, except `give_up`, which is the owner's word and becomes true only
when its result is committed.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from splitferry_protocol.codec import InvalidRecord, decode_outcome, encode_result
from splitferry_protocol.errors import BatchTransferError, BatchTransferFailed, WsDataError
from splitferry_protocol.ids import RequestId
from splitferry_protocol.paths import path_problem
from splitferry_protocol.records import Abort, Accepted, Block, Input, Result, Split, Status

from .bookmark import Bookmark
from .coverage import Range
from .request import Arrival, Phase, ReceiveState, reuses
from .targets import Verdict
from .transport import Record

RESULTS_IN_A_TRANSACTION = 500
"""Bounds the memory and the duration of one transaction; the rest goes into the next."""


# ---- what the ledger asks for


@dataclass(frozen=True, slots=True)
class WriteSplit:
    """Compare `overlaps` with what is there, then write `gaps`, all ranges of the item.

    With overlaps the ledger must be told by `compared`, and decides nothing more of the
    request until then.
    """

    state: ReceiveState
    split: Split
    gaps: Sequence[Range]
    overlaps: Sequence[Range] = ()


@dataclass(frozen=True, slots=True)
class Settle:
    """The request has ended: make `status` and `error` final at the target, then `settled`."""

    state: ReceiveState


Decision = WriteSplit | Settle


# ---- what is published


@dataclass(frozen=True, slots=True)
class Told:
    """An event besides results, owed for the record at `offset`: an accepted event or a repeat."""

    offset: int
    event: Accepted | Result

    @property
    def request(self) -> RequestId:
        return self.event.request


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """The record at `offset`, and why it is one."""

    offset: int
    request: RequestId | None
    record: Record
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Batch:
    """What one transaction says. Results come first, in the order of `results`."""

    states: Sequence[ReceiveState]
    results: Sequence[Result]
    events: Sequence[Told | DeadLetter]
    watermark: int
    told: int


@dataclass(slots=True, eq=False)
class Recorded:
    """A request with a committed result: a member of the ended set."""

    request: RequestId
    first: int
    last: int
    offset: int
    """Of the result in the results partition; the earliest one, so that S stays a lower bound."""
    reply: bytes | None
    """The newest token that was told."""
    value: bytes
    """The encoded result. A decoded one would take four times the memory."""
    forgotten: bool = False

    @property
    def result(self) -> Result:
        result = decode_outcome(self.request.key, self.value)
        assert isinstance(result, Result)
        return result


class Ledger:
    """One tenancy of one partition, from the taking to the losing.

    Args:
        start: what the previous owner committed.
        results_end: an offset at or before every result that is still to come.
    """

    def __init__(
        self,
        group: str,
        topic: str,
        partition: int,
        horizon: int,
        start: Bookmark,
        results_end: int = 0,
    ) -> None:
        self._group = group
        self._topic = topic
        self._partition = partition
        self._horizon = horizon
        self._told = start.told
        self._results_end = results_end
        self.position = start.watermark
        """The next offset to be read."""
        self.committed = (start.watermark, start.told)
        """W and P of the last commit."""
        self.late_duplicates = 0
        """Splits of ended requests that were dropped."""
        self.held_bytes = 0
        """Bytes of records that the ledger keeps: dead letters to be, and splits in a queue."""
        self.unsettled = 0
        """Requests that have ended, with work left until their result is committed."""

        self._states: dict[RequestId, ReceiveState] = {}
        """Requests without a committed result, in the order of *f*, as they opened."""
        self._next_horizon = self.position + horizon
        """A lower bound of *f* + H of all open requests."""
        self._holding: set[ReceiveState] = set()
        """Those that keep P back: being compared, or ended by the owner."""
        self._ready: list[ReceiveState] = []
        self._publishing: Batch | None = None
        self._events: list[Told | DeadLetter] = []

        self._recorded: dict[RequestId, Recorded] = {}
        self._by_offset: deque[Recorded] = deque()
        self._by_last: list[tuple[int, int, Recorded]] = []

    def load(self, offset: int, result: Result) -> None:
        """A committed result of this group and partition, in their order; before any record."""
        if result.input.last < self.position - self._horizon:
            return
        held = self._recorded.get(result.request)
        if held is not None and held.first == result.input.first:
            held.reply = result.reply
        else:
            self._record(offset, result, result.reply)

    # ---- what is known

    @property
    def open_requests(self) -> list[ReceiveState]:
        return [state for state in self._states.values() if state.phase is Phase.OPEN]

    @property
    def watermark(self) -> int:
        """W, if everything that has a result were committed now."""
        return next((state.first for state in self._states.values()), self.position)

    @property
    def may_publish(self) -> bool:
        """Whether P of the previous owner is reached; nothing is published before."""
        return self.position >= self._told

    @property
    def has_news(self) -> bool:
        """Whether somebody waits for a transaction; a moved W alone can wait for company."""
        return bool(self._ready or self._events)

    def idle_since(self, moment: float) -> list[ReceiveState]:
        """Open requests to which no split has added bytes since `moment`."""
        return [state for state in self.open_requests if state.active_at <= moment]

    def __repr__(self) -> str:
        return (
            f"<Ledger {self._topic}/{self._partition} position={self.position} "
            f"open={len(self.open_requests)} unsettled={self.unsettled} "
            f"recorded={len(self._recorded)}>"
        )

    # ---- reading

    def read(
        self, record: Record, content: Split | Abort | InvalidRecord, now: float
    ) -> list[Decision]:
        """The next record of the log. `now` is a monotonic clock in seconds."""
        assert record.offset >= self.position, "the log is read forwards only"
        decisions = list(self._reach_horizons(record.offset))
        self.position = record.offset + 1
        arrival = Arrival(record.offset, record, content)
        if content.request is None:
            assert isinstance(content, InvalidRecord)
            self._dead_letter(arrival, content.code, content.message)
        else:
            decisions.extend(self._arrive(content.request, arrival, now))
        return decisions

    def advance(self, position: int) -> None:
        """What lies between was no record (transaction markers, aborted transactions)."""
        self.position = max(self.position, position)

    def compared(self, state: ReceiveState, same: bool, now: float) -> list[Decision]:
        """The comparison that `WriteSplit` asked for. Nothing happens if the request has ended."""
        arrival = state.comparing
        if state.phase is not Phase.OPEN or arrival is None:
            return []
        assert isinstance(arrival.content, Split)
        split = arrival.content
        state.comparing = None
        self._holding.discard(state)
        decisions: list[Decision] = []
        if same:
            decisions.extend(self._take_in(state, arrival, split, now))
        else:
            error = BatchTransferFailed(
                state.request,
                f"splits contradict each other: split {split.index} brings other bytes at "
                f"{split.offset} to {split.end} than are there",
            )
            decisions.append(self._fail(state, arrival, error))
        while state.waiting and state.comparing is None:
            decisions.extend(self._apply(state, self._resume(state), now))
        return decisions

    def _arrive(self, request: RequestId, arrival: Arrival, now: float) -> Iterator[Decision]:
        state = self._states.get(request)
        if state is None:
            recorded = self._recorded.get(request)
            if recorded is not None and recorded.last >= arrival.offset - self._horizon:
                self._after_result(recorded, arrival)
            elif isinstance(arrival.content, Split):
                state = ReceiveState.opened_by(arrival.content, arrival.offset, now)
                self._states[request] = state
                yield from self._apply(state, arrival, now)
            elif isinstance(arrival.content, InvalidRecord):
                self._dead_letter(arrival, arrival.content.code, arrival.content.message)
            # An abort record of a request that is not open is ignored (WIRE, "abort").
        elif state.comparing is not None:
            self._wait(state, arrival)
        else:
            yield from self._apply(state, arrival, now)

    def _wait(self, state: ReceiveState, arrival: Arrival) -> None:
        state.waiting.append(arrival)
        self.held_bytes += _size(arrival.record)

    def _resume(self, state: ReceiveState) -> Arrival:
        arrival = state.waiting.popleft()
        self.held_bytes -= _size(arrival.record)
        return arrival

    def _reach_horizons(self, offset: int) -> Iterator[Decision]:
        """End the requests that are still open a horizon after *f*, before `offset` is read."""
        if offset < self._next_horizon:
            return
        due: list[ReceiveState] = []
        self._next_horizon = offset + self._horizon
        for state in self._states.values():
            if state.phase is Phase.OPEN:
                if state.first + self._horizon > offset:
                    self._next_horizon = state.first + self._horizon
                    break
                due.append(state)
        for state in due:
            arrival = Arrival(state.first + self._horizon, None, None)
            if state.comparing is not None:
                self._wait(state, arrival)
            else:
                yield from self._apply(state, arrival, 0)

    def _apply(self, state: ReceiveState, arrival: Arrival, now: float) -> Iterator[Decision]:
        """One record of a known request, in its turn."""
        content = arrival.content
        if state.phase is not Phase.OPEN:
            self._after_end(state, arrival)
        elif isinstance(content, Split):
            yield from self._split(state, arrival, content, now)
        elif isinstance(content, Abort):
            aborted = BatchTransferFailed(state.request, f"aborted: {content.reason}")
            yield self._end(state, arrival.offset, Status.ABORTED, aborted)
        elif isinstance(content, InvalidRecord):
            yield self._fail(state, arrival, content.error())
        else:
            late = BatchTransferFailed(
                state.request, f"still open {self._horizon} records after its first split (horizon)"
            )
            yield self._end(state, arrival.offset, Status.FAILED, late)

    def _split(
        self, state: ReceiveState, arrival: Arrival, split: Split, now: float
    ) -> Iterator[Decision]:
        older = state.responder.update(split.reply)
        if older is not None:
            accepted = Accepted(state.request, self._group, split.index, older)
            self._tell(Told(arrival.offset, accepted))
        error = state.contradiction(split) or self._unacceptable(split)
        if error is not None:
            yield self._fail(state, arrival, error)
            return
        overlaps = state.coverage.covered(split.offset, split.end)
        if not overlaps:
            if split.payload:
                yield WriteSplit(state, split, [(split.offset, split.end)])
            yield from self._take_in(state, arrival, split, now)
            return
        state.comparing = arrival
        self._holding.add(state)
        gaps = state.coverage.missing(split.offset, split.end)
        yield WriteSplit(state, split, gaps, overlaps)

    def _unacceptable(self, split: Split) -> WsDataError | None:
        """The name is judged here and not at the target, so that every owner judges alike."""
        problem = path_problem(split.unique_id) if split.block is Block.FILE else None
        return BatchTransferError(split.request, problem) if problem else None

    def _take_in(
        self, state: ReceiveState, arrival: Arrival, split: Split, now: float
    ) -> Iterator[Decision]:
        state.take_in(split, now)
        if state.complete:
            yield self._end(state, arrival.offset, Status.COMPLETED, None)

    # ---- the end

    def _fail(self, state: ReceiveState, arrival: Arrival, error: WsDataError) -> Settle:
        """The record itself makes the request fail, and is kept as a dead letter."""
        self._dead_letter(arrival, error.code, error.message)
        return self._end(state, arrival.offset, Status.FAILED, error)

    def _end(
        self, state: ReceiveState, last: int, status: Status, error: WsDataError | None
    ) -> Settle:
        state.phase = Phase.ENDED
        self.unsettled += 1
        state.last = last
        state.status = status
        state.error = error and error.at(self._partition, last)
        state.responder.final()
        return Settle(state)

    def give_up(self, state: ReceiveState, status: Status, error: WsDataError) -> list[Decision]:
        """The owner ends an open request that no record settles; it ends at the last one read."""
        if state.phase is not Phase.OPEN:
            return []
        state.comparing = None
        while state.waiting:
            arrival = self._resume(state)
            if isinstance(arrival.content, Split):
                older = state.responder.update(arrival.content.reply)
                if older is not None:
                    accepted = Accepted(state.request, self._group, arrival.content.index, older)
                    self._tell(Told(arrival.offset, accepted))
        state.by_owner = True
        self._holding.add(state)
        return [self._end(state, self.position - 1, status, error)]

    def settled(self, state: ReceiveState, verdict: Verdict, finished_at: int) -> None:
        """The target has made `verdict` final; it need not be what was proposed.

        Args:
            finished_at: Unix time in ms.
        """
        assert state.phase is Phase.ENDED, state.phase
        state.phase = Phase.SETTLED
        state.status = verdict.status
        state.result = Result(
            request=state.request,
            unique_id=state.unique_id,
            version=state.version,
            block=state.block,
            labels=state.labels,
            group=self._group,
            status=verdict.status,
            error=verdict.error,
            size=state.total if verdict.size is None else verdict.size,
            sha256=verdict.sha256,
            target=verdict.target,
            splits=state.splits,
            duplicates=state.duplicates,
            input=Input(self._topic, self._partition, state.first, state.last),
            reply=state.responder.reply,
            repeat=False,
            finished_at=finished_at,
        )
        self._ready.append(state)

    def _after_end(self, state: ReceiveState, arrival: Arrival) -> None:
        """A record of a request that has ended, with its result not committed."""
        content = arrival.content
        if isinstance(content, InvalidRecord):
            self._dead_letter(arrival, content.code, content.message)
        elif isinstance(content, Split):
            if state.is_reused_by(content):
                self._reused(arrival, content)
                return
            self.late_duplicates += 1
            if content.reply is not None and content.reply != state.newest_reply:
                state.repeats.append((arrival.offset, content.reply))

    def _after_result(self, recorded: Recorded, arrival: Arrival) -> None:
        """A record of the ended set: nothing up to *e*, then what nobody was told yet."""
        content = arrival.content
        if arrival.offset <= recorded.last:
            return
        if isinstance(content, InvalidRecord):
            self._dead_letter(arrival, content.code, content.message)
        elif isinstance(content, Split):
            if reuses(content, recorded.result):
                self._reused(arrival, content)
                return
            self.late_duplicates += 1
            if content.reply is not None and content.reply != recorded.reply:
                recorded.reply = content.reply
                self._tell(Told(arrival.offset, _repeat(recorded.result, content.reply)))

    def _reused(self, arrival: Arrival, split: Split) -> None:
        error = BatchTransferError(
            split.request, "this request id has ended with another item, version, size or digest"
        )
        self._dead_letter(arrival, error.code, error.message)

    # ---- what is told besides results

    def _tell(self, event: Told | DeadLetter) -> None:
        if event.offset >= self._told:
            self._events.append(event)
            if isinstance(event, DeadLetter):
                self.held_bytes += _size(event.record)

    def _dead_letter(self, arrival: Arrival, code: str, message: str) -> None:
        assert arrival.record is not None
        assert arrival.content is not None
        request = arrival.content.request
        self._tell(DeadLetter(arrival.offset, request, arrival.record, code, message))

    def _told_up_to(self, leaving: Iterable[ReceiveState]) -> int:
        """P, if the results of `leaving` go along: everything owed below it is decided.

        Two things keep it back. A split that is being compared, with all that waits behind it,
        is not decided yet. And what was told after an end by the owner's decision would be told
        again, or differently, if that result did not commit: the next owner finds the request
        open there.
        """
        return min(
            (
                state.last + 1 if state.comparing is None else state.comparing.offset
                for state in self._holding
                if state not in leaving
            ),
            default=self.position,
        )

    # ---- publishing

    def gather(self) -> Batch | None:
        """What the next transaction says, or None when there is nothing to say.

        While it is under way the next one gathers: a second call before `published` would
        count the same things twice.
        """
        assert self._publishing is None
        # Those that keep P back go first: among the last they could keep it back for ever.
        first = sorted(self._ready, key=lambda state: not state.by_owner)
        states = first[:RESULTS_IN_A_TRANSACTION]
        leaving = set(states)
        told = self._told_up_to(leaving)
        if told < self._told:
            return None
        watermark = next(
            (state.first for state in self._states.values() if state not in leaving),
            self.position,
        )
        events: list[Told | DeadLetter] = []
        kept: list[Told | DeadLetter] = []
        # What was told of a request up to its end must not stay behind its result, also above P:
        # the next owner finds the request in the ended set, and passes over its records up to
        # *e*. For the same reason it cannot be told twice.
        ends = {state.request: state.last for state in states}
        for event in self._events:
            last = -1 if event.request is None else ends.get(event.request, -1)
            goes = event.offset < told or event.offset <= last
            (events if goes else kept).append(event)
        for state in states:
            assert state.result is not None
            # Tokens read before the result went out go with it. A token at or above P would be
            # owed again after a crash: it waits, and is told by the next transaction.
            events += [
                Told(offset, _repeat(state.result, reply))
                for offset, reply in state.repeats
                if offset < told
            ]
        if not states and not events and watermark == self.committed[0]:
            return None
        self._events = kept
        self._ready = first[RESULTS_IN_A_TRANSACTION:]
        for state in states:
            state.phase = Phase.PUBLISHING
        self._forget(watermark)
        results = [state.result for state in states if state.result is not None]
        self._publishing = Batch(states, results, events, watermark, told)
        return self._publishing

    def bookmark(self, batch: Batch, offsets: Sequence[int]) -> Bookmark:
        """What to commit with `batch`, whose results were appended at `offsets`."""
        while self._by_offset and self._by_offset[0].forgotten:
            self._by_offset.popleft()
        known = [self._by_offset[0].offset] if self._by_offset else []
        least = min([*known, *offsets[: len(batch.results)]], default=self._results_end)
        return Bookmark(batch.watermark, least, batch.told, self._horizon)

    def published(self, batch: Batch, offsets: Sequence[int]) -> None:
        """The transaction with `batch` was committed."""
        assert self._publishing is batch
        self._publishing = None
        for state, result, offset in zip(batch.states, batch.results, offsets, strict=False):
            del self._states[state.request]
            self._holding.discard(state)
            self._record(offset, result, state.newest_reply)
            for late, reply in state.repeats:
                if late >= batch.told:
                    self._tell(Told(late, _repeat(result, reply)))
        if offsets:
            self._results_end = max(self._results_end, max(offsets) + 1)
        self.unsettled -= len(batch.states)
        letters = (event for event in batch.events if isinstance(event, DeadLetter))
        self.held_bytes -= sum(_size(letter.record) for letter in letters)
        self.committed = (batch.watermark, batch.told)

    # ---- the ended set

    def _record(self, offset: int, result: Result, reply: bytes | None) -> None:
        held = self._recorded.get(result.request)
        if held is not None:
            held.forgotten = True
        last = result.input.last
        recorded = Recorded(
            result.request, result.input.first, last, offset, reply, encode_result(result)
        )
        self._recorded[result.request] = recorded
        self._by_offset.append(recorded)
        heapq.heappush(self._by_last, (last, offset, recorded))

    def _forget(self, watermark: int) -> None:
        """No record that is still to be read can belong to a request that ended so long ago."""
        while self._by_last and self._by_last[0][0] < watermark - self._horizon:
            recorded = heapq.heappop(self._by_last)[2]
            if not recorded.forgotten:
                recorded.forgotten = True
                del self._recorded[recorded.request]


def _size(record: Record | None) -> int:
    return 0 if record is None or record.value is None else len(record.value)


def _repeat(result: Result, reply: bytes | None) -> Result:
    return replace(result, reply=reply, repeat=True)
