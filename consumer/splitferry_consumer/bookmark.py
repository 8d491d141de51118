"""What a commit leaves for the next owner: the offset W, and S, P and the horizon beside it."""

from __future__ import annotations

import re
from dataclasses import dataclass

_METADATA = re.compile(r"splitferry/1 S=(\d{1,19}) P=(\d{1,19}) H=(\d{1,19})", re.ASCII)


@dataclass(frozen=True, slots=True)
class Bookmark:
    """DESIGN, "Per splits partition"."""

    watermark: int
    """W: no request with a first offset below it is without a committed result."""
    results: int | None
    """S: an offset in the results partition at or before every result that still matters.
    None when it is not known: the start of the results log then."""
    told: int
    """P: what is told besides results was told for all records below."""
    horizon: int | None
    """The horizon that S was reckoned with."""

    @property
    def metadata(self) -> str:
        assert self.results is not None
        return f"splitferry/1 S={self.results} P={self.told} H={self.horizon}"

    @classmethod
    def parse(cls, watermark: int, metadata: str) -> Bookmark:
        """Read a committed offset.

        Metadata that is not ours (an operator reset the offset by hand) leaves the safe
        bounds: results from the start of their log, nothing told beyond W.
        """
        match = _METADATA.fullmatch(metadata)
        if match is None:
            return cls(watermark, None, watermark, None)
        results, told, horizon = (int(group) for group in match.groups())
        return cls(watermark, results, told, horizon)

    def results_from(self, horizon: int, start: int) -> int:
        """Where the results must be read from, given the horizon in force now.

        A horizon that grew reaches back to results which S, reckoned with the smaller one,
        may have left behind.
        """
        if self.results is None or self.horizon is None or horizon > self.horizon:
            return start
        return self.results
