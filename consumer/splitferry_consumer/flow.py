"""Back-pressure: bytes that were read and not yet written, with a high and a low mark.

Each partition that is busy has its share of the whole, so that one whose disk does not answer
stops itself and no other, and one that is alone has all. Between the marks nothing changes:
what is left to write at the low mark keeps the disk busy until the next records are there.
"""

from __future__ import annotations

MINIMUM_SHARE = 4 * 1024 * 1024
"""Bytes: a share below a few splits would make every write wait for a fetch."""


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
    """Bytes in flight of one partition."""

    def __init__(self, flow: Flow) -> None:
        self._flow = flow
        self.bytes = 0
        self.full = False

    def add(self, size: int) -> None:
        """`size` bytes more are held in memory; negative when they are let go."""
        before, self.bytes = self.bytes, self.bytes + size
        self._flow.busy += (self.bytes > 0) - (before > 0)
        if self.bytes >= self._flow.high:
            self.full = True
        elif self.bytes <= self._flow.low:
            self.full = False

    def __repr__(self) -> str:
        return f"<Gauge {self.bytes} of {self._flow.high} bytes{' full' * self.full}>"
