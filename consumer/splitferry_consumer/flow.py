"""Back-pressure: bytes that were read and not yet written, with a high and a low mark.

Each partition has its own share of the whole, so that one whose disk does not answer stops
itself and no other. Between the marks nothing changes, or every record would pause and resume.
"""

from __future__ import annotations

MINIMUM_SHARE = 4 * 1024 * 1024
"""Bytes: a share below a few splits would make every write wait for a fetch."""


class Flow:
    """The shares of all partitions of one process. Knows nothing of Kafka: see `Service`."""

    def __init__(self, high: int) -> None:
        self._high = high
        self._partitions = 1

    def divide(self, partitions: int) -> None:
        """There are now so many partitions to share among."""
        self._partitions = max(1, partitions)

    @property
    def high(self) -> int:
        """Bytes in flight at which a partition is paused."""
        return max(self._high // self._partitions, MINIMUM_SHARE)

    @property
    def low(self) -> int:
        """Bytes in flight at which it goes on."""
        return self.high // 2


class Gauge:
    """Bytes in flight of one partition."""

    def __init__(self, flow: Flow) -> None:
        self._flow = flow
        self.bytes = 0
        self.paused = False

    def add(self, size: int) -> None:
        """`size` bytes more are held in memory; negative when they are let go."""
        self.bytes += size
        if self.bytes >= self._flow.high:
            self.paused = True
        elif self.bytes <= self._flow.low:
            self.paused = False

    def __repr__(self) -> str:
        return f"<Gauge {self.bytes} of {self._flow.high} bytes{' paused' * self.paused}>"
