"""Where items go. One small interface: write at, read back, settle, discard.

A write group calls the blocking methods of an `Incoming` from worker threads, one call at a
time per request; `settle` is awaited on the event loop. What a method raises decides what
happens next, and this is the whole of it:

- `OSError`: may heal (disk full, EIO, a locked catalogue). The group tries again, with pauses,
  until the write time-out; then the request is given up.
- `Refused`: will not heal by waiting (quota, a directory where the file should go, a name that
  is a symbolic link). The request is given up at once.
- `Condemned`: an fsync failed, so nothing is known of what the inode holds (a second fsync
  would succeed without a write). The bytes must be received again: the partition is retaken.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from splitferry_protocol.errors import WsDataError
from splitferry_protocol.ids import RequestKey
from splitferry_protocol.records import Status


@dataclass(frozen=True, slots=True)
class Item:
    """What is being received: the opening it belongs to, and the item's name and version.

    `labels` are whole before `settle`: not every split has to carry them.
    """

    key: RequestKey
    unique_id: str
    version: int
    labels: dict[str, str] = field(default_factory=dict, hash=False)


class Verdict(NamedTuple):
    """What became of a request at its target.

    `size` is bytes and `sha256` the digest of what was written, where it was all written;
    `target` is the result's `target` map.
    """

    status: Status
    error: WsDataError | None = None
    size: int | None = None
    sha256: bytes | None = None
    target: Mapping[str, Any] | None = None


class TargetUnusable(Exception):
    """The target as a whole cannot work; the message is one line with cause and remedy."""


class Refused(Exception):
    """The target will not take this request, however often it is asked."""

    def __init__(self, error: WsDataError) -> None:
        super().__init__(error.message)
        self.error = error


class Condemned(Exception):
    """The bytes of this request can no longer be trusted; receive them again."""


class Incoming(Protocol):
    """The bytes of one request on their way in."""

    def write_at(self, offset: int, data: memoryview | bytes) -> None:
        """Write all of `data` at `offset` bytes, reserving room in steps. Blocks."""

    def read_at(self, offset: int, size: int) -> bytes:
        """Read back `size` bytes that were written at `offset`. Blocks."""

    async def settle(self, proposal: Verdict) -> Verdict:
        """Make the outcome final and durable, and return the one that holds.

        A proposal to complete publishes the item; any other discards the bytes. The verdict
        that comes back may differ from the proposal: an earlier attempt at the same opening
        was first, or the target holds a newer version. May be called again after it raised.
        """

    def put(self, data: memoryview | bytes, proposal: Verdict) -> None:
        """Write `data`, the whole item, and do all that blocks of settling it as proposed.

        `Target.settle_whole` does the rest. Blocks, and raises as `write_at` and `settle` do:
        then both can still be called.
        """

    def discard(self) -> None:
        """Drop the bytes without a verdict (the partition was lost). Blocks; never raises."""


@dataclass(frozen=True, slots=True, eq=False)
class Whole:
    """An item that came whole, in one split, with its bytes at the target.

    `tell` is called once, on the event loop, with the verdict or with what `settle` would raise.
    """

    incoming: Incoming
    proposal: Verdict
    tell: Callable[[Verdict | Exception], None]


async def settle_each(items: Sequence[Whole]) -> None:
    """`Target.settle_whole` for a target that gains nothing by settling many at once."""

    async def settle(one: Whole) -> None:
        try:
            outcome: Verdict | Exception = await one.incoming.settle(one.proposal)
        except Exception as error:  # noqa: BLE001  whatever it is, somebody waits to hear of it
            outcome = error
        one.tell(outcome)

    await asyncio.gather(*map(settle, items))


class Target(Protocol):
    """A place for items of one block type."""

    in_memory: bool
    """Whether `Incoming.put` waits for no disk: a little of it may be done on the event loop."""

    def begin(self, item: Item) -> Incoming:
        """Start a request. No I/O: the first write does it."""

    async def settle_whole(self, items: Sequence[Whole]) -> None:
        """Settle items whose bytes were `put` here, many in one step where that saves steps.

        Each is told as soon as its own outcome is there: a slow one holds up no other.
        """

    async def passed(self, group: str, topic: str, partition: int, before: int) -> None:
        """Openings with a first offset below `before` cannot come back: forget their verdicts."""

    async def sweep(self) -> None:
        """Clear away what dead owners left, and what has had its time."""

    def close(self) -> None:
        """Give back what is held. Blocks."""
