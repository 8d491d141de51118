"""What a commit leaves for the next owner: the offset W, and S, P and the horizon beside it."""

from __future__ import annotations

import re
from dataclasses import dataclass

VERSION = 1
HORIZON = 250_000
"""The default H, in offsets."""
_METADATA = re.compile(
    r"splitferry/1 S=(\d{1,19}) P=(\d{1,19}) H=(\d{1,19})(?: T=([\w-]{22}),([\w-]{22}))?", re.ASCII
)
_FORMAT = re.compile(r"splitferry/(\d{1,9})(?: |$)", re.ASCII)

TopicIds = tuple[str, str]
"""Kafka's ids of the splits and of the results topic, in the form that its tools show."""


class NewerCommit(Exception):
    """The metadata is of a later version: what it says is not known here."""


@dataclass(frozen=True, slots=True)
class Bookmark:
    """The numbers of DESIGN, "The idea"."""

    watermark: int
    """W: no request with a first offset below it is without a committed result."""
    results: int | None
    """S: an offset in the results partition at or before every result that still matters.
    None when it is not known: the start of the results log then."""
    told: int
    """P: what is told besides results was told for all records below."""
    horizon: int | None
    """The horizon that S was reckoned with."""
    topics: TopicIds | None = None
    """What W and S are offsets in. A topic that is deleted and made anew gets another id."""

    @property
    def metadata(self) -> str:
        assert self.results is not None
        topics = "" if self.topics is None else f" T={self.topics[0]},{self.topics[1]}"
        return f"splitferry/1 S={self.results} P={self.told} H={self.horizon}{topics}"

    @classmethod
    def parse(cls, watermark: int, metadata: str) -> Bookmark:
        """Read a committed offset.

        Metadata that is not ours (an operator reset the offset by hand) leaves the safe
        bounds: results from the start of their log, nothing told beyond W. A later version
        of ours does not: taken for one of those, what was told above W would be told again.

        Raises:
            NewerCommit: the metadata was written by a later version.
        """
        version = _FORMAT.match(metadata)
        if version is not None and int(version[1]) > VERSION:
            raise NewerCommit(metadata)
        match = _METADATA.fullmatch(metadata)
        if match is None:
            return cls(watermark, None, watermark, None)
        results, told, horizon = (int(group) for group in match.groups()[:3])
        topics = (match[4], match[5]) if match[4] else None
        return cls(watermark, results, told, horizon, topics)

    def results_from(self, horizon: int, start: int) -> int:
        """Where the results must be read from, given the horizon in force now.

        A horizon that grew reaches back to results which S, reckoned with the smaller one,
        may have left behind.
        """
        if self.results is None or self.horizon is None or horizon > self.horizon:
            return start
        return self.results
