"""How a partition stands, by its log alone: what a consumer that takes it now would hold.

Pure: the same ledger that consumers have, fed by an onlooker, who writes nothing and decides
nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from splitferry_protocol.codec import InvalidRecord
from splitferry_protocol.ids import RequestId
from splitferry_protocol.records import Result, Status

from .bookmark import HORIZON, Bookmark
from .ledger import Ledger, Limits, WriteSplit
from .request import ReceiveState, RequestPhase
from .transport import Record

MISSING_SHOWN = 16
"""Missing ranges of a request that are told; of more there is the number."""
REQUESTS_MAX = 20_000
"""Requests without a result at which an onlooker reads no further: 2 kB each. Where consumers
have been away for long there can be millions."""
_NEVER = 2**63 - 1
_NOTHING = InvalidRecord("a record that changes nothing")


@dataclass(frozen=True, slots=True)
class SurveyedRequest:
    """A request without a recorded result.

    Attributes:
        first: offset of its first split.
        status: how it has ended, as far as the log can tell; None: it is open.
        cause: why, when it has not ended well.
        total: bytes of the item, None while no split has said it.
        missing: the first ranges that are not there; the last one may be open-ended.
        gaps: how many there are.
        opened_at, grown_at: when the log got its first split, and the last one that added bytes;
            Unix time in ms.
    """

    request: RequestId
    first: int
    unique_id: str
    version: int
    block: str
    status: Status | None
    cause: str | None
    total: int | None
    received: int
    missing: Sequence[tuple[int, int | None]]
    gaps: int
    opened_at: int
    grown_at: int


class Survey:
    """One partition, from the bookmark on that was committed.

    Bytes that overlap are taken to agree: they are compared where they were written, and here
    nothing is. A request whose splits contradict each other is shown as if they did not.
    """

    def __init__(self, group: str, topic: str, partition: int, start: Bookmark) -> None:
        horizon = start.horizon or HORIZON
        # Nothing is ever told from here, so nothing that would be is kept. And what a consumer may
        # hold is set where it was started, which nobody knows here: no limit bites.
        start, limits = replace(start, told=_NEVER), Limits(open_requests=horizon, gaps=horizon)
        self._ledger = Ledger(group, topic, partition, horizon, start, limits=limits)

    @property
    def position(self) -> int:
        """The next offset to be read."""
        return self._ledger.position

    def obey(self, offset: int, result: Result, value: bytes) -> None:
        """A committed result of this group and partition, in their order; `value` encodes it."""
        self._ledger.obey(offset, result, value)

    def read(self, record: Record) -> None:
        """The next record of the splits."""
        content = record.content()
        if content.request is not None:
            state = self._ledger.states.get(content.request)
            if state is not None and state.phase is not RequestPhase.OPEN:
                # It has ended. The ledger would keep what only its verdict can judge.
                content = _NOTHING
        decisions = self._ledger.read(record, content, 0)
        while decisions:
            decision = decisions.pop()
            if isinstance(decision, WriteSplit) and decision.overlaps:
                decisions += self._ledger.compared(decision.state, same=True, now=0)

    def advance(self, position: int) -> None:
        """All that can be read below `position` was read."""
        self._ledger.advance(position)

    @property
    def watermark(self) -> int:
        """W, once all that has a result is committed."""
        return self._ledger.watermark

    def passed_over(self, committed: int) -> bool:
        """Whether a request without a result opened below that offset."""
        return any(state.first < committed for state in islice(self._ledger.states.values(), 1))

    @property
    def full(self) -> bool:
        """Whether so much is held that no more should be read until some of it has a result."""
        return len(self._ledger.states) >= REQUESTS_MAX

    @property
    def open(self) -> int:
        return self._ledger.open

    @property
    def unsettled(self) -> int:
        """Requests that have ended, without a result."""
        return self._ledger.unsettled

    def requests(self, most: int) -> Iterator[SurveyedRequest]:
        """Up to `most` without a result, the oldest first: it holds W."""
        return map(_view, islice(self._ledger.states.values(), most))


def _view(state: ReceiveState) -> SurveyedRequest:
    ended = state.phase is not RequestPhase.OPEN
    return SurveyedRequest(
        state.request,
        state.first,
        state.unique_id,
        state.version,
        state.block,
        state.status if ended else None,
        None if state.error is None else state.error.message,
        state.total,
        state.coverage.size,
        state.coverage.first_missing(state.total, MISSING_SHOWN),
        state.coverage.count_missing(state.total),
        state.opened_at,
        state.grown_at,
    )
