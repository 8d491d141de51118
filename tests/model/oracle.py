"""What a reader with an infinite memory, who reads the whole log at once, says of it (WIRE).

It shares nothing with the program but its records and the rule for names of files. Three things
it cannot know, and is told: where owners' decisions ended a request; which ids opened again beyond
the horizon, where nothing is guaranteed; and whether a request that was complete completed.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from splitferry_protocol.codec import InvalidRecord
from splitferry_protocol.ids import RequestId
from splitferry_protocol.paths import path_problem
from splitferry_protocol.records import Abort, Block, Split, Status
from world import Content

Log = Sequence[Content | None]
"""None is an offset without a record (a transaction marker)."""

Opening = tuple[RequestId, int]
Event = tuple[str, RequestId | None, int | bytes | None]
"""("letter", request, offset), ("accepted", request, reply) or ("repeat", request, reply)."""


@dataclass
class Fate:
    """One opening: how it stands, or how it ended."""

    first: Split
    offset: int
    total: int | None = None
    sha256: bytes | None = None
    labels: Mapping[str, str] | None = None
    content: dict[int, int] = field(default_factory=dict)
    splits: int = 0
    duplicates: int = 0
    reply: bytes | None = None
    last: int | None = None
    status: Status | None = None
    code: str | None = None
    decided: bool = False
    """Ended by its owner."""
    newest: bytes | None = None

    @property
    def digest(self) -> bytes:
        return hashlib.sha256(bytes(self.content[n] for n in sorted(self.content))).digest()

    def end(self, last: int, status: Status, code: str | None = None) -> None:
        self.last, self.status, self.code, self.newest = last, status, code, self.reply

    def take(self, split: Split) -> str | None:
        """Add the split; returns the code of the error that it is instead."""
        if split.version != self.first.version:
            return "VersionMismatch"
        pairs = [
            (split.unique_id, self.first.unique_id),
            (split.block, self.first.block),
            (split.total, self.total),
            (split.sha256, self.sha256),
            (split.labels, self.labels),
        ]
        if any(None not in pair and pair[0] != pair[1] for pair in pairs):
            return "BatchTransferFailed"
        total = self.total if split.total is None else split.total
        if total is not None and split.end > total:
            return "SplitTaskFailed"
        if total is not None and any(position >= total for position in self.content):
            return "BatchTransferFailed"
        if split.block is Block.FILE and path_problem(split.unique_id):
            return "BatchTransferError"
        brought = {split.offset + n: byte for n, byte in enumerate(bytes(split.payload))}
        if any(self.content.get(position, byte) != byte for position, byte in brought.items()):
            return "BatchTransferFailed"
        new = brought.keys() - self.content.keys() or (total == 0 and self.splits == 0)
        self.content.update(brought)
        self.total, self.sha256 = total, self.sha256 or split.sha256
        self.labels = self.labels if split.labels is None else split.labels
        if new:
            self.splits += 1
        else:
            self.duplicates += 1
        return None

    def is_other(self, split: Split, refused: bool) -> bool:
        """Whether a split read after the end reuses the id for another item."""
        completed = self.status is Status.COMPLETED and not refused
        return (
            split.unique_id != self.first.unique_id
            or split.version != self.first.version
            or (None not in (split.total, self.total) and split.total != self.total)
            or (completed and split.sha256 not in (None, self.digest))
        )


@dataclass
class Reading:
    """What the log says, as far as it goes."""

    fates: dict[Opening, Fate] = field(default_factory=dict)
    events: Counter[Event] = field(default_factory=Counter)


def read(
    log: Log,
    horizon: int,
    decisions: Mapping[Opening, int],
    again: Collection[int],
    refused: Collection[Opening],
    start: int = 0,
) -> Reading:
    """Read the log.

    Args:
        decisions: where owners ended requests, whatever the log said of them up to there.
        again: first offsets of ids that opened beyond the horizon.
        refused: openings that are complete, and that their target did not take.
    """
    reading = Reading()
    current: dict[RequestId, Fate] = {}
    for offset, content in enumerate(log[start:], start):
        if content is None:
            continue
        for fate in current.values():
            if fate.last is None and fate.offset + horizon <= offset:
                fate.end(fate.offset + horizon, Status.FAILED, "BatchTransferFailed")
        request = content.request
        if request is None:
            reading.events["letter", None, offset] += 1
            continue
        held = current.get(request)
        beyond = held is not None and held.last is not None and offset > held.last + horizon
        if held is None or (beyond and offset in again):
            if isinstance(content, Split):
                held = current[request] = Fate(content, offset)
                held.total, held.sha256, held.labels = content.total, content.sha256, content.labels
                held.last = decisions.get((request, offset))
                held.decided = held.last is not None
                reading.fates[request, offset] = held
            elif isinstance(content, InvalidRecord):
                reading.events["letter", request, offset] += 1
                continue
            else:
                continue
        if held.decided and held.last is not None and offset <= held.last:
            _before_decision(reading, held, offset, content)
        elif held.last is None:
            _open(reading, held, offset, content)
        else:
            _late(reading, held, offset, content, (request, held.offset) in refused)
    return reading


def _token(reading: Reading, fate: Fate, split: Split) -> None:
    if split.reply is not None and split.reply != fate.reply:
        if fate.reply is not None:
            reading.events["accepted", split.request, fate.reply] += 1
        fate.reply = fate.newest = split.reply


def _before_decision(reading: Reading, fate: Fate, offset: int, content: Content) -> None:
    if isinstance(content, Split):
        _token(reading, fate, content)
    elif isinstance(content, InvalidRecord):
        reading.events["letter", content.request, offset] += 1


def _open(reading: Reading, fate: Fate, offset: int, content: Content) -> None:
    if isinstance(content, Abort):
        fate.end(offset, Status.ABORTED, "BatchTransferFailed")
        return
    code: str | None
    if isinstance(content, Split):
        _token(reading, fate, content)
        code = fate.take(content)
    else:
        code = content.code
    if code is not None:
        reading.events["letter", content.request, offset] += 1
        fate.end(offset, Status.FAILED, code)
    elif fate.total == len(fate.content):
        fate.end(offset, Status.COMPLETED)


def _late(reading: Reading, fate: Fate, offset: int, content: Content, refused: bool) -> None:
    if isinstance(content, InvalidRecord):
        reading.events["letter", content.request, offset] += 1
    elif isinstance(content, Split):
        if fate.is_other(content, refused):
            reading.events["letter", content.request, offset] += 1
        elif content.reply is not None and content.reply != fate.newest:
            reading.events["repeat", content.request, content.reply] += 1
            fate.newest = content.reply
