"""A set of byte ranges: which bytes of an item are there.

Its memory grows with the gaps, not with the bytes: an item that comes in order is one range,
and each gap costs 16 bytes. To add a range takes as long with many gaps as with few.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from itertools import islice
from operator import itemgetter

Range = tuple[int, int]
"""Half-open: first byte, first byte after."""

CHUNK = 1024
"""Edges; what one insertion moves at the most."""

_first, _last = itemgetter(0), itemgetter(-1)


class Coverage:
    """Disjoint ranges that do not touch, in order.

    So their edges rise: start, end, start, end. They lie in chunks of whole ranges, none empty.
    In a chunk, where a bisection comes out odd, it is inside a range.
    """

    def __init__(self) -> None:
        self._chunks: list[array[int]] = []
        self._count = 0
        self.size = 0
        """Bytes covered."""

    def add(self, start: int, end: int) -> None:
        """Cover [start, end). Bytes that were covered already count once."""
        if start >= end:
            return
        # Chunks first..after-1 overlap or touch the new range; where none does, it goes to a
        # neighbour.
        first = bisect_left(self._chunks, start, key=_last)
        after = bisect_right(self._chunks, end, key=_first)
        if first == after:
            first = max(0, first - 1)
            after = first + 1
        edges = self._chunks[first] if self._chunks else array("Q")
        for chunk in self._chunks[first + 1 : after]:
            edges += chunk
        # The same for its ranges: left..right-1 melt into the new one.
        left = bisect_left(edges, start) & ~1
        right = (bisect_right(edges, end) + 1) & ~1
        if left < right:
            melted = edges[left:right]
            self.size -= sum(melted[1::2]) - sum(melted[::2])
            start, end = min(start, melted[0]), max(end, melted[-1])
        edges[left:right] = array("Q", (start, end))
        self.size += end - start
        self._count += 1 - (right - left) // 2
        half = len(edges) // 4 * 2
        halves = [edges[:half], edges[half:]] if len(edges) > CHUNK else [edges]
        self._chunks[first:after] = halves

    def covered(self, start: int, end: int) -> list[Range]:
        """The parts of [start, end) that are there, in order."""
        first = bisect_right(self._chunks, start, key=_last)
        after = bisect_left(self._chunks, end, key=_first)
        found: list[Range] = []
        for edges in self._chunks[first:after]:
            left = bisect_right(edges, start) & ~1
            right = (bisect_left(edges, end) + 1) & ~1
            found += zip(edges[left:right:2], edges[left + 1 : right : 2], strict=True)
        if found:
            found[0] = max(start, found[0][0]), found[0][1]
            found[-1] = found[-1][0], min(end, found[-1][1])
        return found

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

    def outline(self, most: int) -> list[Range]:
        """What is there, in at most `most` ranges, for a drawing of that many cells.

        In each cell the gaps between its first and its last covered byte are left out.
        """
        if len(self) <= most:
            return list(self)
        drawn: list[Range] = []
        for cell in range(most):
            start, end = (self.end * edge // most for edge in (cell, cell + 1))
            # A cell ends below `end`, so that there is a range after its start.
            edges = self._chunks[bisect_right(self._chunks, start, key=_last)]
            start = max(start, edges[bisect_right(edges, start) & ~1])
            if start >= end:
                continue
            edges = self._chunks[bisect_left(self._chunks, end, key=_first) - 1]
            end = min(end, edges[(bisect_left(edges, end) - 1) | 1])
            if drawn and drawn[-1][1] == start:
                start = drawn.pop()[0]
            drawn.append((start, end))
        return drawn

    def first_missing(self, total: int | None, most: int) -> Sequence[tuple[int, int | None]]:
        """The first `most` ranges that are not there; None: up to an end that is not known."""
        gaps: list[tuple[int, int | None]] = []
        before = 0
        for start, end in islice(self, most + 1):
            if before < start:
                gaps.append((before, start))
            before = end
        if total is None or before < total:
            gaps.append((before, total))
        return gaps[:most]

    def count_missing(self, total: int | None) -> int:
        """How many ranges `first_missing` has, without a bound."""
        return self.gaps + (total is None or self.end < total)

    @property
    def prefix(self) -> int:
        """Bytes that are there without a gap from 0 on."""
        return self._chunks[0][1] if self._chunks and self._chunks[0][0] == 0 else 0

    @property
    def gaps(self) -> int:
        """Ranges below `end` that are not there."""
        return len(self) - (self.prefix > 0)

    @property
    def end(self) -> int:
        """The first byte after everything covered."""
        return self._chunks[-1][-1] if self._chunks else 0

    def __iter__(self) -> Iterator[Range]:
        for edges in self._chunks:
            yield from zip(edges[::2], edges[1::2], strict=True)

    def __len__(self) -> int:
        return self._count

    def __repr__(self) -> str:
        return f"Coverage({list(self)})"
