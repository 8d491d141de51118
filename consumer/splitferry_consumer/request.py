"""The receive state: all that is known of one request that has no committed result yet."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from splitferry_protocol.codec import InvalidRecord
from splitferry_protocol.errors import (
    BatchTransferFailed,
    SplitTaskFailed,
    VersionMismatch,
    WsDataError,
)
from splitferry_protocol.ids import RequestId
from splitferry_protocol.records import Abort, Block, Result, Split, Status

from .coverage import Coverage
from .pace import Pace
from .responder import SharedWithBatchHandler
from .transport import Record


class RequestPhase(Enum):
    OPEN = "open"
    ENDED = "ended"
    """The log or the owner ended it; the target is making the outcome final."""
    SETTLED = "settled"
    """The outcome is durable; the result waits for its transaction."""
    PUBLISHING = "publishing"
    """The result is in the running transaction."""


class Arrival(NamedTuple):
    """A record of the log with what it says. `content` None is the horizon being reached."""

    offset: int
    record: Record | None
    content: Split | Abort | InvalidRecord | None

    @property
    def timestamp(self) -> int:
        """Of the record, Unix time in ms."""
        assert self.record is not None
        return self.record.timestamp


@dataclass(slots=True, eq=False)
class ReceiveState:
    """Facts of one opening: what its first split said, what was learnt since, how it ended."""

    request: RequestId
    first: int
    """Offset of the first valid split (DESIGN, "The idea": *f*)."""
    unique_id: str
    version: int
    block: Block
    active_at: float
    """When a split last added bytes, on the owner's monotonic clock, in seconds."""
    total: int | None = None
    sha256: bytes | None = None
    labels: Mapping[str, str] | None = None

    opened_at: int = 0
    """When the log got the first split, Unix time in ms."""
    grown_at: int = 0
    """When it got the last one that added bytes."""
    pace: Pace = field(default_factory=Pace)

    coverage: Coverage = field(default_factory=Coverage)
    responder: SharedWithBatchHandler = field(default_factory=SharedWithBatchHandler)
    splits: int = 0
    duplicates: int = 0

    comparing: Arrival | None = None
    """A split over bytes that are there already, whose comparison is under way. What arrives
    meanwhile waits, because decisions of one request apply in offset order. None once it ended."""
    waiting: deque[Arrival] = field(default_factory=deque)
    """Behind a comparison; after the end, from the first that only the verdict can judge."""

    phase: RequestPhase = RequestPhase.OPEN
    last: int = -1
    """Offset where the request ended (*e*)."""
    by_owner: bool = False
    """Ended by the owner's decision and not by a record: another owner may decide otherwise
    until the result is committed."""
    status: Status = Status.COMPLETED
    """How it ended by the log or the owner, like `error`; the target's verdict is in `result`."""
    error: WsDataError | None = None
    result: Result | None = None
    repeats: list[tuple[int, bytes]] = field(default_factory=list)
    """Tokens read after the end, with their offsets: owed the result once more."""

    @classmethod
    def opened_by(cls, split: Split, offset: int, now: float, timestamp: int) -> ReceiveState:
        """`timestamp` is the record's, Unix time in ms."""
        return cls(
            split.request,
            offset,
            split.unique_id,
            split.version,
            split.block,
            now,
            split.total,
            split.sha256,
            split.labels,
            opened_at=timestamp,
            grown_at=timestamp,
        )

    def contradiction(self, split: Split) -> WsDataError | None:
        """How `split` disagrees with the splits before it, or with itself (WIRE, "split")."""
        if split.version != self.version:
            return VersionMismatch(self.version, split.version)
        said = {
            "unique_id": (self.unique_id, split.unique_id),
            "block": (self.block, split.block),
            "total": (self.total, split.total),
            "sha256": (self.sha256, split.sha256),
            "labels": (self.labels, split.labels),
        }
        for name, (before, now) in said.items():
            if before is not None and now is not None and before != now:
                return BatchTransferFailed(
                    self.request,
                    f"splits contradict each other: split {split.index} differs in {name}",
                )
        total = self.total if split.total is None else split.total
        if total is None:
            return None
        if split.end > total:
            return SplitTaskFailed(
                self.request,
                split.index,
                f"bytes {split.offset} to {split.end} lie outside the item of {total} bytes",
            )
        if self.coverage.end > total:
            return BatchTransferFailed(
                self.request,
                f"splits contradict each other: split {split.index} says {total} bytes in all, "
                f"earlier ones brought bytes up to {self.coverage.end}",
            )
        return None

    def take_in(self, split: Split, now: float, timestamp: int) -> None:
        """The split fits: count it and its bytes. `timestamp` is the record's."""
        self.total = self.total if split.total is None else split.total
        self.sha256 = self.sha256 or split.sha256
        self.labels = self.labels if split.labels is None else split.labels
        before = self.coverage.size
        self.coverage.add(split.offset, split.end)
        # An empty item's one split brings no byte, and is no duplicate of anything.
        if self.coverage.size > before or (self.total == 0 and self.splits == 0):
            self.splits += 1
            self.active_at = now
            self.grown_at = timestamp
            self.pace.add(self.coverage.size - before, now)
        else:
            self.duplicates += 1

    @property
    def complete(self) -> bool:
        return self.total is not None and self.coverage.size == self.total

    def needs_verdict(self, split: Split) -> bool:
        """Whether only the verdict can say if a split read after the end is of another item.

        Judged before it, the same record would be a duplicate or a reused id depending on when
        it was read: the digest is known once it was computed, and counts if the item was taken.
        """
        return split.sha256 not in {None, self.sha256} or (
            split.total is not None and self.total is None
        )

    def is_reused_by(self, split: Split) -> bool:
        """Whether a split read after the end speaks of another item (WIRE, "result").

        Without a result yet, of a split that does not need the verdict.
        """
        if self.result is not None:
            return reuses(split, self.result)
        return (
            split.unique_id != self.unique_id
            or split.version != self.version
            or _differ(split.total, self.total)
        )

    @property
    def newest_reply(self) -> bytes | None:
        """The token that was last owed the result."""
        return self.repeats[-1][1] if self.repeats else self.responder.reply


def reuses(split: Split, result: Result) -> bool:
    """The same question about a recorded result."""
    return (
        split.unique_id != result.unique_id
        or split.version != result.version
        or _differ(split.total, result.size)
        or (result.success and _differ(split.sha256, result.sha256))
    )


def _differ(said: object, known: object) -> bool:
    return said is not None and known is not None and said != known
