"""Back-pressure: bytes that were read and not yet written, with a high and a low mark.

Each partition that is busy has its share of the whole, so that one whose disk does not answer
stops itself and no other, and one that is alone has all. Between the marks nothing changes:
what is left to write at the low mark keeps the disk busy until the next records are there.

What a record costs is its value, which its payload is only a view of, and `RECORD_OVERHEAD`:
by its payload alone a flood of splits of one byte would weigh nothing.
"""

from __future__ import annotations

from collections.abc import Callable

MINIMUM_SHARE = 4 * 1024 * 1024
"""Bytes: a share below a few splits would make every write wait for a fetch."""
RECORD_OVERHEAD = 1024
"""Bytes that a record holds besides its value: the objects that were made of it (measured)."""


def weight(value: memoryview | bytes | None) -> int:
    """Bytes that a record holds in memory, given its value or a view of a part of it."""
    whole = value.obj if isinstance(value, memoryview) else value
    return RECORD_OVERHEAD + (0 if whole is None else memoryview(whole).nbytes)


class Flow:
    """The shares of all partitions of one process. Knows nothing of Kafka: see `Membership`."""

    def __init__(self, high: int) -> None:
        self._high = high
        self.busy = 0
        """Partitions with bytes in flight."""

    @property
    def high(self) -> int:
        """Bytes in flight at which a busy partition is read no further."""
        return max(self._high // max(1, self.busy), MINIMUM_SHARE)

    @property
    def low(self) -> int:
        """Bytes in flight at which it goes on."""
        return self.high // 2


class Gauge:
    """Bytes in flight of one partition.

    Args:
        room: called when it is full no more.
    """

    def __init__(self, flow: Flow, room: Callable[[], None] = lambda: None) -> None:
        self._flow = flow
        self._room = room
        self.bytes = 0
        self.full = False

    def add(self, size: int) -> None:
        """`size` bytes more are held in memory; negative when they are let go."""
        before, self.bytes = self.bytes, self.bytes + size
        self._flow.busy += (self.bytes > 0) - (before > 0)
        if self.bytes >= self._flow.high:
            self.full = True
        elif self.full and self.bytes <= self._flow.low:
            self.full = False
            self._room()

    def __repr__(self) -> str:
        return f"<Gauge {self.bytes} of {self._flow.high} bytes{' full' * self.full}>"
