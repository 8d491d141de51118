"""A set of byte ranges: which bytes of an item are there.

Its memory grows with the gaps, not with the bytes: an item that comes in order is one range.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator

Range = tuple[int, int]
"""Half-open: first byte, first byte after."""


class Coverage:
    """Disjoint ranges that do not touch, in order; `_starts` and `_ends` run in parallel."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        self.size = 0
        """Bytes covered."""

    def add(self, start: int, end: int) -> None:
        """Cover [start, end). Bytes that were covered already count once."""
        if start >= end:
            return
        # Ranges left..right-1 overlap or touch the new one and melt into it.
        left = bisect_left(self._ends, start)
        right = bisect_right(self._starts, end)
        if left < right:
            self.size -= sum(
                e - s for s, e in zip(self._starts[left:right], self._ends[left:right], strict=True)
            )
            start = min(start, self._starts[left])
            end = max(end, self._ends[right - 1])
        self._starts[left:right] = [start]
        self._ends[left:right] = [end]
        self.size += end - start

    def covered(self, start: int, end: int) -> list[Range]:
        """The parts of [start, end) that are there, in order."""
        left = bisect_right(self._ends, start)
        right = bisect_left(self._starts, end)
        return [
            (max(start, s), min(end, e))
            for s, e in zip(self._starts[left:right], self._ends[left:right], strict=True)
        ]

    def missing(self, start: int, end: int) -> list[Range]:
        """The parts of [start, end) that are not there, in order."""
        gaps: list[Range] = []
        for covered_start, covered_end in self.covered(start, end):
            if start < covered_start:
                gaps.append((start, covered_start))
            start = covered_end
        if start < end:
            gaps.append((start, end))
        return gaps

    @property
    def prefix(self) -> int:
        """Bytes that are there without a gap from 0 on."""
        return self._ends[0] if self._starts and self._starts[0] == 0 else 0

    @property
    def end(self) -> int:
        """The first byte after everything covered."""
        return self._ends[-1] if self._ends else 0

    def __iter__(self) -> Iterator[Range]:
        return zip(self._starts, self._ends, strict=True)

    def __len__(self) -> int:
        return len(self._starts)

    def __repr__(self) -> str:
        return f"Coverage({list(self)})"
