"""What a replay reads, and what it says of each request. Pure: no I/O, no clock.

The recorded result decides (docs/DESIGN.md, "Replay"): what completed is rebuilt and compared
with it, what ended otherwise is told as recorded and not rebuilt, and what has no result is
judged by the log alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from splitferry_protocol.errors import VersionMismatch
from splitferry_protocol.ids import RequestId
from splitferry_protocol.records import Block, Status

from .coverage import Range
from .ledger import Recorded
from .request import ReceiveState
from .targets import Verdict


class Outcome(StrEnum):
    """What a replay found of one request."""

    COMPLETE = "complete"
    """Whole, and the same as its result says; with a directory: written there."""
    PRESENT = "present"
    """Was there already, and verified."""
    SUPERSEDED = "superseded"
    """A newer version of the item stands in its place."""
    INCOMPLETE = "incomplete"
    """Bytes are missing in what was read."""
    DELETED = "deleted"
    """Retention has deleted records of it, and what is left is not the item."""
    DAMAGED = "damaged"
    """A check failed: of a split, of the digest, of splits against each other."""
    UNWRITTEN = "unwritten"
    """The directory did not take it."""
    FAILED = "failed"
    ABORTED = "aborted"
    EXPIRED = "expired"
    """These three as recorded (aborted also by the log alone); nothing is rebuilt."""
    UNKNOWN = "unknown"
    """Asked for by its id, and neither a result nor a split of it was found."""


THERE = frozenset({Outcome.COMPLETE, Outcome.PRESENT, Outcome.SUPERSEDED})
AS_RECORDED = frozenset({Outcome.FAILED, Outcome.ABORTED, Outcome.EXPIRED})
"""What a replay of a range has to leave as it is, and an id that was asked for is not there."""


@dataclass(frozen=True, slots=True)
class Report:
    """What became of one request. Offsets are of the splits partition, sizes in bytes."""

    request: RequestId
    outcome: Outcome
    partition: int | None = None
    first: int | None = None
    last: int | None = None
    """Where it opened, and where it ended; None: it has not."""
    unique_id: str | None = None
    version: int | None = None
    block: Block | None = None
    size: int | None = None
    sha256: bytes | None = None
    missing: Sequence[tuple[int, int | None]] = ()
    """Ranges of bytes; an end of None is not known."""
    reason: str | None = None
    recorded: bool = False
    """Whether it has a result."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """A part of a partition that is read at one go, for `expected` requests and for new ones."""

    partition: int
    start: int
    end: int
    expected: Sequence[Recorded]
    """Completed, and to be found here again."""
    new_from: int
    """From here on requests without a result are looked for, too."""
    named: frozenset[RequestId] | None = None
    """Only these of them; None: all."""
    sure: bool = False
    """Whether none of them can have opened earlier."""
    ended_from: int = 0
    """What of these has ended below belongs to another range."""


def belonging(results: Iterable[Recorded], start: int, end: int) -> list[Recorded]:
    """Requests belong to the range of offsets in which they ended: ranges side by side share
    none, and what a backup lacks is what has ended since."""
    return [one for one in results if start <= one.last < end]


def whole_range(
    partition: int, new_from: int, end: int, expected: Sequence[Recorded], log_start: int
) -> Stretch | None:
    """One stretch that begins early enough to read each request whole; None: nothing is left.

    Args:
        new_from: requests that opened below it are not looked for without a result.
    """
    start = max(log_start, min([new_from, *(one.first for one in expected)]))
    return Stretch(partition, start, end, expected, new_from) if start < end else None


def only_these(partition: int, expected: Sequence[Recorded], log_start: int) -> list[Stretch]:
    """The parts of a partition in which the requests lie, and nothing between."""
    found: list[Stretch] = []
    for one in sorted(expected, key=lambda one: one.first):
        start, end, ones = max(log_start, one.first), one.last + 1, [one]
        if start >= end:
            continue
        if found and start <= found[-1].end:
            before = found.pop()
            start, end = before.start, max(before.end, end)
            ones = [*before.expected, one]
        found.append(Stretch(partition, start, end, ones, new_from=end))
    return found


# ---- what is said


def as_recorded(partition: int, one: Recorded, outcome: Outcome | None = None) -> Report:
    """Of a request that is not read: it is there, deleted, or has not completed."""
    result = one.result
    reason = None if result.error is None else f"{result.error.code}: {result.error.message}"
    if outcome is Outcome.DELETED:
        reason = f"its records, offsets {one.first} to {one.last}, are deleted"
    return Report(
        request=one.request,
        outcome=outcome or Outcome(result.status),
        partition=partition,
        first=one.first,
        last=one.last,
        unique_id=result.unique_id,
        version=result.version,
        block=result.block,
        size=result.size,
        sha256=result.sha256,
        reason=reason,
        recorded=True,
    )


def not_found(partition: int, one: Recorded, lost: Sequence[Range]) -> Report:
    """Of a request that completed, and of which no split was read."""
    if _deleted(one.first, one.last, lost):
        return as_recorded(partition, one, Outcome.DELETED)
    told = as_recorded(partition, one, Outcome.INCOMPLETE)
    reason = f"no split of it lies at offsets {one.first} to {one.last}"
    return replace(told, missing=[(0, told.size)], reason=reason)


def ended(
    partition: int,
    state: ReceiveState,
    verdict: Verdict,
    known: Recorded | None,
    horizon: int,
    lost: Sequence[Range],
) -> Report:
    """Of a request that has ended, and was settled at the target with `verdict`."""
    outcome, reason = _judged(state, verdict, known, horizon)
    told = replace(_seen(partition, state, outcome, known, reason), last=state.last)
    if verdict.size is not None:
        told = replace(told, size=verdict.size, sha256=verdict.sha256)
    return _cut_off(told, known, lost)


def still_open(
    partition: int, state: ReceiveState, known: Recorded | None, begin: int, lost: Sequence[Range]
) -> Report:
    """Of a request that has not ended where the reading did; it may have opened below `begin`."""
    told = _seen(partition, state, Outcome.INCOMPLETE, known, None)
    if known is None and not state.coverage.prefix and begin > 0:
        reason = f"its first splits may lie below offset {begin}, where the reading began"
        told = replace(told, reason=reason)
    return _cut_off(told, known, lost)


def _deleted(first: int, last: int, lost: Sequence[Range]) -> bool:
    return any(start <= last and first < end for start, end in lost)


def _judged(
    state: ReceiveState, verdict: Verdict, known: Recorded | None, horizon: int
) -> tuple[Outcome, str | None]:
    if verdict.status is Status.COMPLETED:
        return Outcome.COMPLETE, None
    error = verdict.error
    assert error is not None
    told = f"{error.code}: {error.message}"
    if state.status is Status.ABORTED:
        return Outcome.ABORTED, told
    if state.status is Status.FAILED and not state.by_owner:
        if state.last == state.first + horizon:  # before a record there is read
            return Outcome.INCOMPLETE, told
        return Outcome.DAMAGED, f"{told} (at offset {state.last})"
    if state.status is Status.COMPLETED:
        said = state.sha256 if known is None else known.result.sha256
        if None not in {said, verdict.sha256} and said != verdict.sha256:
            return Outcome.DAMAGED, f"{told} (at offset {state.last})"
        if isinstance(error, VersionMismatch) and error.expected > state.version + 1:
            return Outcome.SUPERSEDED, f"version {error.expected - 1} is published"
    return Outcome.UNWRITTEN, told


def _seen(
    partition: int,
    state: ReceiveState,
    outcome: Outcome,
    known: Recorded | None,
    reason: str | None,
) -> Report:
    size = state.total
    if size is None and known is not None:
        size = known.result.size
    missing: list[tuple[int, int | None]] = []
    if outcome in {Outcome.INCOMPLETE, Outcome.DAMAGED}:
        missing += state.coverage.missing(0, state.coverage.end if size is None else size)
        if size is None:
            missing.append((state.coverage.end, None))
    return Report(
        request=state.request,
        outcome=outcome,
        partition=partition,
        first=state.first,
        unique_id=state.unique_id,
        version=state.version,
        block=state.block,
        size=size,
        missing=missing,
        reason=reason,
        recorded=known is not None,
    )


def _cut_off(told: Report, known: Recorded | None, lost: Sequence[Range]) -> Report:
    """What is not whole because records are gone is no damage."""
    if told.outcome not in {Outcome.INCOMPLETE, Outcome.DAMAGED}:
        return told
    assert told.first is not None
    first, last = told.first, told.last
    if known is not None:
        first, last = known.first, known.last
    if not _deleted(first, first if last is None else last, lost):
        return told
    gone = " and ".join(f"{start} to {end - 1}" for start, end in lost)
    return replace(told, outcome=Outcome.DELETED, reason=f"records at offsets {gone} are deleted")
