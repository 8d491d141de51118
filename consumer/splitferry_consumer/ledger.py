"""The ledger of one splits partition: records in, decisions out. No I/O, no clock.

It holds the rules of DESIGN, "The idea": where a request opens and ends, what W, P and the
ended set are, what is told besides results, and what one transaction may say. Everything it
decides follows from the log, except `give_up`, which is the owner's word and becomes true only
when its result is committed.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, assert_never

from splitferry_protocol.codec import InvalidRecord, decode_outcome, encode_result
from splitferry_protocol.errors import BatchTransferError, BatchTransferFailed, WsDataError
from splitferry_protocol.ids import RequestId
from splitferry_protocol.paths import path_problem
from splitferry_protocol.records import (
    HEADER_MAX,
    Abort,
    Accepted,
    Block,
    Input,
    Result,
    Split,
    Status,
)

from .bookmark import Bookmark
from .coverage import Range
from .flow import RECORD_OVERHEAD, weight
from .request import Arrival, ReceiveState, RequestPhase, reuses
from .targets import Verdict
from .transport import Record

RESULTS_IN_A_TRANSACTION = 500
"""Bounds the memory and the duration of one transaction; the rest goes into the next."""
EVENTS_IN_A_TRANSACTION = 4000
"""The same for what is told besides results: one fetch may bring tens of thousands."""
HELD_MAX = 32 * 1024 * 1024
"""Bytes of dead letters and queued splits at which no more is to be read."""
UNSETTLED_MAX = 4 * RESULTS_IN_A_TRANSACTION
"""Ended requests at which no more is to be read: small ones end faster than they settle."""


@dataclass(frozen=True)
class Limits:
    """What one partition may be made to hold. A request beyond them is given up.

    They are settings of a consumer and no facts of the log, so giving up is the owner's
    decision: the next owner may have other limits, until the result is committed.
    """

    open_requests: int = 10_000
    """Each holds some 17 KiB and, for a file, a descriptor."""
    item_size: int | None = None
    """Bytes of one item; None: no limit."""
    gaps: int = 100_000
    """Between the received ranges of one request; each costs 16 bytes, in up to four places."""


DEFAULT_LIMITS = Limits()


# ---- what the ledger asks for


class WriteSplit(NamedTuple):
    """Compare `overlaps` with what is there, then write `gaps`, all ranges of the item.

    With overlaps the ledger must be told by `compared`, and decides nothing more of the
    request until then.
    """

    state: ReceiveState
    split: Split
    gaps: Sequence[Range]
    overlaps: Sequence[Range] = ()

    def part(self, part: Range) -> memoryview:
        """The split's bytes in a range of the item."""
        payload = memoryview(self.split.payload)
        return payload[part[0] - self.split.offset : part[1] - self.split.offset]


class Settle(NamedTuple):
    """The request has ended: make `status` and `error` final at the target, then `settled`."""

    state: ReceiveState


Decision = WriteSplit | Settle


# ---- what is published


class Told(NamedTuple):
    """An event besides results, owed for the record at `offset`: an accepted event or a repeat."""

    offset: int
    event: Accepted | Result

    @property
    def request(self) -> RequestId:
        return self.event.request


class DeadLetter(NamedTuple):
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
    values: Sequence[bytes]
    """The same, encoded: what is published is what the ended set keeps."""
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
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        self._group = group
        self._topic = topic
        self._partition = partition
        self._horizon = horizon
        self._limits = limits
        self._told = start.told
        self._results_end = results_end
        self.position = start.watermark
        """The next offset to be read."""
        self.committed = (start.watermark, start.told)
        """W and P of the last commit."""
        self.late_duplicates = 0
        """Splits of ended requests that were dropped."""
        self.held_bytes = 0
        """Bytes that the ledger keeps: what is to be told besides results, splits in a queue."""
        self.unsettled = 0
        """Requests that have ended, with work left until their result is committed."""

        self.open = 0
        """Requests that have not ended."""
        self._states: dict[RequestId, ReceiveState] = {}
        """Requests without a committed result, in the order of *f*, as they opened."""
        self._next_horizon = self.position + horizon
        """A lower bound of *f* + H of all open requests."""
        self._holding: dict[ReceiveState, int] = {}
        """Those that keep P back, with the offset where they keep it: being compared, ended by
        the owner, or with a record in the queue that only the verdict can judge."""
        self._ready: list[ReceiveState] = []
        self._publishing: Batch | None = None
        self._events: list[Told | DeadLetter] = []

        self._recorded: dict[RequestId, Recorded] = {}
        self._by_offset: deque[Recorded] = deque()
        self._by_last: list[tuple[int, int, Recorded]] = []

    def load(self, offset: int, result: Result, value: bytes) -> None:
        """A committed result of this group and partition, in their order; before any record.

        `value` is what it was decoded from.
        """
        if result.input.last < self.position - self._horizon:
            return
        held = self._recorded.get(result.request)
        if held is not None and held.first == result.input.first:
            held.reply = result.reply
        else:
            self._record(offset, result, value, result.reply)

    def obey(self, offset: int, result: Result, value: bytes) -> None:
        """As `load`, of a result that its owner has committed since.

        For who only looks on: what is open here, or has ended, is settled there.
        """
        state = self._states.get(result.request)
        if state is not None and state.first == result.input.first:
            del self._states[state.request]
            self._holding.pop(state, None)
            if state.phase is RequestPhase.OPEN:
                self.open -= 1
            else:
                self.unsettled -= 1
            while state.waiting:
                self._resume(state)
        self.load(offset, result, value)
        self._forget(self.watermark)

    def has_result(self, state: ReceiveState) -> bool:
        """Whether an opening of an earlier tenancy has a committed result. Before any record."""
        recorded = self._recorded.get(state.request)
        told = recorded is not None and recorded.first == state.first
        return told or state.first < self.position  # W has passed it

    def forget(self, request: RequestId) -> None:
        """What is read of the request from now on is a new opening, however near. For a replay."""
        recorded = self._recorded.pop(request, None)
        if recorded is not None:
            recorded.forgotten = True

    def commit_anew(self) -> None:
        """What is committed holds no more: the next transaction commits W, moved or not."""
        self.committed = (-1, -1)

    # ---- what is known

    @property
    def open_requests(self) -> list[ReceiveState]:
        return [state for state in self._states.values() if state.phase is RequestPhase.OPEN]

    @property
    def states(self) -> Mapping[RequestId, ReceiveState]:
        """Requests without a committed result, in the order of *f*."""
        return self._states

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

    @property
    def full(self) -> bool:
        """Whether so much waits to be told that no more is to be read."""
        # Before P is reached nothing is published, so waiting for it would be for ever.
        unsettled = self.may_publish and self.unsettled >= UNSETTLED_MAX
        return unsettled or self.held_bytes >= HELD_MAX

    def idle_since(self, moment: float) -> list[ReceiveState]:
        """Open requests to which no split has added bytes since `moment`."""
        return [state for state in self.open_requests if state.active_at <= moment]

    def __repr__(self) -> str:
        return (
            f"<Ledger {self._topic}/{self._partition} position={self.position} "
            f"open={self.open} unsettled={self.unsettled} "
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
        if arrival is None:
            return []
        assert isinstance(arrival.content, Split)
        split = arrival.content
        state.comparing = None
        del self._holding[state]
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
        decisions.extend(self._catch_up(state, now))
        return decisions

    def _arrive(self, request: RequestId, arrival: Arrival, now: float) -> Iterator[Decision]:
        state = self._states.get(request)
        if state is None:
            recorded = self._recorded.get(request)
            if recorded is not None and recorded.last >= arrival.offset - self._horizon:
                self._after_result(recorded, arrival)
            elif isinstance(arrival.content, Split):
                state = ReceiveState.opened_by(
                    arrival.content, arrival.offset, now, arrival.timestamp
                )
                self._states[request] = state
                self.open += 1
                yield from self._apply(state, arrival, now)
            elif isinstance(arrival.content, InvalidRecord):
                self._dead_letter(arrival, arrival.content.code, arrival.content.message)
            # An abort record of a request that is not open is ignored (WIRE, "abort").
        elif state.waiting or _undecidable(state, arrival):
            self._wait(state, arrival)
        else:
            yield from self._apply(state, arrival, now)

    def _catch_up(self, state: ReceiveState, now: float) -> Iterator[Decision]:
        """Apply what waits, as far as it can be decided now."""
        while state.waiting and not _undecidable(state, state.waiting[0]):
            yield from self._apply(state, self._resume(state), now)
        if state.waiting:
            self._holding.setdefault(state, state.waiting[0].offset)

    def _wait(self, state: ReceiveState, arrival: Arrival) -> None:
        state.waiting.append(arrival)
        self._holding.setdefault(state, arrival.offset)
        self.held_bytes += _weight(arrival.record)

    def _resume(self, state: ReceiveState) -> Arrival:
        arrival = state.waiting.popleft()
        self.held_bytes -= _weight(arrival.record)
        return arrival

    def _reach_horizons(self, offset: int) -> Iterator[Decision]:
        """End the requests that are still open a horizon after *f*, before `offset` is read."""
        if offset < self._next_horizon:
            return
        due: list[ReceiveState] = []
        self._next_horizon = offset + self._horizon
        for state in self._states.values():
            if state.phase is RequestPhase.OPEN:
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
        if state.phase is not RequestPhase.OPEN:
            self._after_end(state, arrival)
        elif isinstance(content, Split):
            yield from self._receive(state, arrival, content, now)
        elif isinstance(content, Abort):
            aborted = BatchTransferFailed(state.request, f"aborted: {content.reason}")
            yield self._end(state, arrival.offset, Status.ABORTED, aborted)
        elif isinstance(content, InvalidRecord):
            yield self._fail(state, arrival, content.error())
        elif content is None:
            late = BatchTransferFailed(
                state.request, f"still open {self._horizon} records after its first split (horizon)"
            )
            yield self._end(state, arrival.offset, Status.FAILED, late)
        else:
            assert_never(content)

    def _receive(
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
        excess = self._excess(state, arrival, split)
        if excess is not None:
            yield from self.give_up(state, Status.FAILED, excess)
            return
        overlaps = state.coverage.covered(split.offset, split.end)
        if not overlaps:
            if split.payload:
                yield WriteSplit(state, split, [(split.offset, split.end)])
            yield from self._take_in(state, arrival, split, now)
            return
        state.comparing = arrival
        self._holding[state] = arrival.offset
        gaps = state.coverage.missing(split.offset, split.end)
        yield WriteSplit(state, split, gaps, overlaps)

    def _unacceptable(self, split: Split) -> WsDataError | None:
        """The name is judged here and not at the target, so that every owner judges alike."""
        problem = path_problem(split.unique_id) if split.block is Block.FILE else None
        return BatchTransferError(split.request, problem) if problem else None

    def _excess(self, state: ReceiveState, arrival: Arrival, split: Split) -> WsDataError | None:
        """How the request would go beyond the limits with `split`."""
        limits, size = self._limits, max(split.end, split.total or 0)
        stays_open = split.total != len(split.payload)
        if arrival.offset == state.first and stays_open and self.open > limits.open_requests:
            cause = (
                f"{limits.open_requests} requests are open in this partition already, "
                "the limit (--max-open-requests)"
            )
        elif limits.item_size is not None and size > limits.item_size:
            cause = (
                f"the item has {size} bytes or more, the limit is {limits.item_size} "
                "(--max-item-size)"
            )
        else:
            return None
        return BatchTransferFailed(state.request, cause)

    def _take_in(
        self, state: ReceiveState, arrival: Arrival, split: Split, now: float
    ) -> Iterator[Decision]:
        state.take_in(split, now, arrival.timestamp)
        if state.complete:
            yield self._end(state, arrival.offset, Status.COMPLETED, None)
        elif state.coverage.gaps > self._limits.gaps:
            cause = f"its splits leave more than {self._limits.gaps} gaps, the limit (--max-gaps)"
            excess = BatchTransferFailed(state.request, cause)
            yield from self.give_up(state, Status.FAILED, excess)

    # ---- the end

    def _fail(self, state: ReceiveState, arrival: Arrival, error: WsDataError) -> Settle:
        """The record itself makes the request fail, and is kept as a dead letter."""
        self._dead_letter(arrival, error.code, error.message)
        return self._end(state, arrival.offset, Status.FAILED, error)

    def _end(
        self, state: ReceiveState, last: int, status: Status, error: WsDataError | None
    ) -> Settle:
        state.phase = RequestPhase.ENDED
        self.open -= 1
        self.unsettled += 1
        state.last = last
        state.status = status
        state.error = error and error.at(self._partition, last)
        state.responder.final()
        return Settle(state)

    def give_up(self, state: ReceiveState, status: Status, error: WsDataError) -> list[Decision]:
        """The owner ends an open request that no record settles; it ends at the last one read."""
        if state.phase is not RequestPhase.OPEN:
            return []
        # What queues behind a comparison is told by this decision, so P stays below it.
        queue = state.waiting[0].offset if state.waiting else self.position
        self._holding.setdefault(state, queue)
        state.comparing = None
        while state.waiting:
            arrival = self._resume(state)
            content = arrival.content
            if isinstance(content, Split):
                older = state.responder.update(content.reply)
                if older is not None and arrival.offset < self._told:
                    # Perhaps not told: the owner before may have found an earlier end, and have
                    # kept the result for it.
                    state.repeats.append((arrival.offset, older))
                elif older is not None:
                    accepted = Accepted(state.request, self._group, content.index, older)
                    self._tell(Told(arrival.offset, accepted))
            elif isinstance(content, InvalidRecord):
                self._dead_letter(arrival, content.code, content.message)
        state.by_owner = True
        return [self._end(state, self.position - 1, status, error)]

    def settled(self, state: ReceiveState, verdict: Verdict, finished_at: int) -> None:
        """The target has made `verdict` final; it need not be what was proposed.

        Args:
            finished_at: Unix time in ms.
        """
        assert state.phase is RequestPhase.ENDED, state.phase
        state.phase = RequestPhase.SETTLED
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
        if state.waiting and not state.by_owner:
            del self._holding[state]
        while state.waiting:
            self._after_end(state, self._resume(state))

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
                if arrival.offset >= self._told:
                    self.held_bytes += _REPEAT_WEIGHT

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
            self.held_bytes += _cost(event)

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
            (offset for state, offset in self._holding.items() if state not in leaving),
            default=self.position,
        )

    # ---- publishing

    def gather(self) -> Batch | None:
        """What the next transaction says, or None when there is nothing to say.

        While it is under way the next one gathers: a second call before `published` would
        count the same things twice.
        """
        assert self._publishing is None
        states = self._ready[:RESULTS_IN_A_TRANSACTION]
        leaving = set(states)
        if not self.may_publish:
            return None
        # What lies below the previous owner's P was told, and stays so, whatever keeps P back
        # there. More decisions than fit a transaction would otherwise wait for each other.
        floor = max(self._told, self.committed[1])
        told = max(self._told_up_to(leaving), floor)
        offsets = [event.offset for event in self._events]
        for state in states:
            # Those that P has passed go with their result, and cannot be left behind.
            offsets += [offset for offset, _ in state.repeats if offset >= floor]
        if len(offsets) > EVENTS_IN_A_TRANSACTION:
            # P then ends at the first that is left behind, and W may not pass P: what lies
            # between would not be read again, and so never be told.
            told = min(told, sorted(offsets)[EVENTS_IN_A_TRANSACTION])
        watermark = next(
            (state.first for state in self._states.values() if state not in leaving),
            self.position,
        )
        watermark = min(watermark, told)
        events: list[Told | DeadLetter] = []
        kept: list[Told | DeadLetter] = []
        # What was told of a request up to its end must not stay behind its result, also above P:
        # the next owner finds the request in the ended set, and passes over its records up to
        # *e*. For the same reason it cannot be told twice.
        ends: dict[RequestId | None, int] = {state.request: state.last for state in states}
        for event in self._events:
            last = ends.get(event.request, -1)
            goes = event.offset < told or event.offset <= last
            (events if goes else kept).append(event)
        for state in states:
            assert state.result is not None
            # Tokens read before the result went out go with it. A token at or above P would be
            # owed again after a crash: it waits, and is told by the next transaction. But not one
            # read at *e* itself, which is possible at the horizon.
            events += [
                Told(offset, _repeat(state.result, reply))
                for offset, reply in state.repeats
                if offset < told or offset <= state.last
            ]
        if not states and not events and watermark == self.committed[0]:
            return None
        self._events = kept
        self._ready = self._ready[RESULTS_IN_A_TRANSACTION:]
        for state in states:
            state.phase = RequestPhase.PUBLISHING
        self._forget(watermark)
        results = [state.result for state in states if state.result is not None]
        values = [encode_result(result) for result in results]
        self._publishing = Batch(states, results, values, events, watermark, told)
        return self._publishing

    def bookmark(self, batch: Batch, offsets: Sequence[int]) -> Bookmark:
        """What to commit with `batch`, whose results were appended at `offsets`, one for each."""
        known = [self._by_offset[0].offset] if self._by_offset else []
        least = min([*known, *offsets], default=self._results_end)
        return Bookmark(batch.watermark, least, batch.told, self._horizon)

    def published(self, batch: Batch, offsets: Sequence[int]) -> None:
        """The transaction with `batch` was committed."""
        assert self._publishing is batch
        self._publishing = None
        for state, result, value, offset in zip(
            batch.states, batch.results, batch.values, offsets, strict=True
        ):
            del self._states[state.request]
            self._holding.pop(state, None)
            self._record(offset, result, value, state.newest_reply)
            for late, reply in state.repeats:
                if late >= batch.told and late > state.last:
                    self.held_bytes -= _REPEAT_WEIGHT
                    self._tell(Told(late, _repeat(result, reply)))
        if offsets:
            self._results_end = max(self._results_end, max(offsets) + 1)
        self.unsettled -= len(batch.states)
        # Repeats below the previous owner's P were not counted, nor had they to be waited for.
        counted = (event for event in batch.events if event.offset >= self._told)
        self.held_bytes -= sum(map(_cost, counted))
        self.committed = (batch.watermark, batch.told)

    # ---- the ended set

    def _record(self, offset: int, result: Result, value: bytes, reply: bytes | None) -> None:
        held = self._recorded.get(result.request)
        if held is not None:
            held.forgotten = True
        last = result.input.last
        recorded = Recorded(result.request, result.input.first, last, offset, reply, value)
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
        while self._by_offset and self._by_offset[0].forgotten:
            self._by_offset.popleft()


def _undecidable(state: ReceiveState, arrival: Arrival) -> bool:
    """Whether what the record does depends on a comparison, or a verdict, that is under way."""
    if state.phase is RequestPhase.ENDED:
        return isinstance(arrival.content, Split) and state.needs_verdict(arrival.content)
    return state.comparing is not None


_REPEAT_WEIGHT = RECORD_OVERHEAD + HEADER_MAX


def _weight(record: Record | None) -> int:
    """Bytes in memory. With None it is the horizon that waits for its turn."""
    if record is None:
        return RECORD_OVERHEAD
    headers = sum(len(name) + len(value or b"") for name, value in record.headers)
    return weight(record.value) + len(record.key or b"") + headers


def _cost(event: Told | DeadLetter) -> int:
    if isinstance(event, DeadLetter):
        return _weight(event.record)
    return _REPEAT_WEIGHT if isinstance(event.event, Result) else RECORD_OVERHEAD


def _repeat(result: Result, reply: bytes | None) -> Result:
    return result._replace(reply=reply, repeat=True)
