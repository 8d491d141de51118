"""How fast bytes come, over the last seconds, in two numbers and no history."""

from __future__ import annotations

import math

SPAN = 5.0
"""Seconds after which what came counts for a third."""


class Pace:
    """A mean that decays. Moments are of one monotonic clock, in seconds."""

    __slots__ = ("_at", "_began", "_bytes")

    def __init__(self) -> None:
        self._began: float | None = None
        self._at = 0.0
        self._bytes = 0.0

    def add(self, size: int, now: float) -> None:
        """`size` bytes came."""
        if self._began is None:
            self._began = now
        self._bytes = self._decayed(now) + size
        self._at = now

    def rate(self, now: float) -> float:
        """Bytes a second."""
        if self._began is None:
            return 0.0
        # What the mean would weigh if it had been the same all the time since it began.
        lasted = max(1.0, now - self._began)
        return self._decayed(now) / (SPAN * (1 - math.exp(-lasted / SPAN)))

    def _decayed(self, now: float) -> float:
        return self._bytes * math.exp((self._at - now) / SPAN)
