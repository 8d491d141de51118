"""Looks at a partition from outside its group, again and again, and reads only what is new.

Nothing is joined, fenced, committed or written. Commit, splits and results cannot be read at one
moment, so they are read in the order in which one can follow from the other: what a commit speaks
of lies in the logs that are read after it, and a result is looked for after its splits' end was
taken. So a request that is told to be open was open when the look began, and may have ended since.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

from aiokafka import TopicPartition

from splitferry_protocol.codec import InvalidRecord, NewerVersion, decode_outcome
from splitferry_protocol.records import Result

from .bookmark import HORIZON, Bookmark, NewerCommit
from .log_reader import LogReader
from .survey import Survey, SurveyedRequest
from .taking import ACCEPT_LOSS, LogBounds, beyond, newer_commit, newer_result, unfit


@dataclass(frozen=True, slots=True)
class SurveyedPartition:
    """Where a partition stands. All numbers are offsets, or counts of requests.

    Attributes:
        committed: W, as the group has committed it; None: it never has.
        watermark: W, as it will be once everything that has ended is settled.
        readable: end of what can be read; an open transaction hides the rest up to `end`.
        position: up to where the splits were read for this.
        unsettled: have ended, without a result.
        holder: the oldest of both kinds, which holds W.
        requests: the oldest of both kinds.
        problem: why no consumer can take the partition, and what to do about it. Nothing is known
            of its requests then.
    """

    partition: int
    committed: int | None
    start: int
    end: int
    readable: int
    watermark: int
    position: int
    open: int = 0
    unsettled: int = 0
    holder: SurveyedRequest | None = None
    requests: Sequence[SurveyedRequest] = ()
    problem: str | None = None

    @property
    def lag(self) -> int:
        """Offsets from W to the end."""
        return self.end - (self.start if self.committed is None else self.committed)


Seen = Callable[[int, int], object]


class _Unfit(Exception):
    """The results do not fit the splits."""


class Onlooker:
    """Args:
    most: offsets to be read from W on at most; None: all.
    """

    def __init__(
        self,
        log: LogReader,
        group: str,
        splits: TopicPartition,
        results_topic: str,
        most: int | None = None,
    ) -> None:
        self._log = log
        self._group = group
        self._splits = splits
        self._results = TopicPartition(results_topic, splits.partition)
        self._most = most
        self._survey: Survey | None = None
        self._results_read = 0
        self._committed = 0
        self._topics = ("", "")

    @property
    def partition(self) -> int:
        return self._splits.partition

    async def look(self, shown: int, seen: Seen | None = None) -> SurveyedPartition:
        """How the partition stands, with up to `shown` of its requests.

        Args:
            seen: is told how many offsets were read, as they are, and of how many.

        Raises:
            TransportError: the logs could not be read to the end; the next look goes on.
        """
        log, splits = self._log, self._splits
        committed = await log.committed(self._group, splits)
        view = await log.topic(splits.topic), await log.topic(self._results.topic)
        topics = view[0].id, view[1].id
        bounds = await log.bounds(splits)
        readable = await log.stable_end(splits)
        results = await log.bounds(self._results)
        results_readable = await log.stable_end(self._results)
        known = None if committed is None else committed[0]
        told = SurveyedPartition(
            splits.partition, known, *bounds, readable, watermark=known or bounds[0], position=0
        )
        try:
            bookmark = Bookmark.parse(*(committed or (bounds[0], "")))
            problem = unfit(bookmark, bounds, results, topics)
        except NewerCommit as newer:
            problem = newer_commit(str(newer))
        if problem is not None:
            self._survey = None
            return _refused(told, problem)
        if self._survey is not None and self._outdated(bookmark, bounds, topics):
            self._survey = None
        try:
            survey = self._survey
            if survey is not None:
                await self._read_results(survey, results_readable, bounds)
            if survey is None or survey.passed_over(bookmark.watermark):
                # No owner commits past what is open: this commit was set by hand.
                survey = self._begin(bookmark, results[0])
                await self._read_results(survey, results_readable, bounds)
        except _Unfit as unfitting:
            self._survey = None
            return _refused(told, str(unfitting))
        self._survey, self._committed, self._topics = survey, bookmark.watermark, topics
        end = readable if self._most is None else min(readable, bookmark.watermark + self._most)
        await self._read_splits(survey, end, seen)
        oldest = list(survey.requests(max(1, shown)))
        return SurveyedPartition(
            splits.partition,
            known,
            *bounds,
            readable,
            survey.watermark,
            survey.position,
            survey.open,
            survey.unsettled,
            oldest[0] if oldest else None,
            oldest[:shown],
        )

    def _begin(self, bookmark: Bookmark, results_start: int) -> Survey:
        self._results_read = bookmark.results_from(bookmark.horizon or HORIZON, results_start)
        return Survey(self._group, self._splits.topic, self._splits.partition, bookmark)

    def _outdated(self, bookmark: Bookmark, splits: LogBounds, topics: tuple[str, str]) -> bool:
        """Whether what was read lies in another log, or W was set back."""
        assert self._survey is not None
        position = self._survey.position
        return (
            topics != self._topics
            or bookmark.watermark < self._committed
            or not splits[0] <= position <= splits[1]
        )

    async def _read_results(self, survey: Survey, end: int, splits: LogBounds) -> None:
        source = self._splits.topic, self._splits.partition
        start = self._results_read
        async with aclosing(self._log.records(self._results, start, end)) as records:
            async for record in records:
                try:
                    outcome = decode_outcome(record.key, record.value)
                except NewerVersion as newer:
                    raise _Unfit(newer_result(record.offset)) from newer
                except InvalidRecord:
                    continue
                if not isinstance(outcome, Result) or outcome.group != self._group:
                    continue
                if outcome.input[:2] == source:
                    if beyond(outcome, splits) is not None:
                        # The splits may have grown since their end was taken.
                        splits = await self._log.bounds(self._splits)
                    if (cut_off := beyond(outcome, splits)) is not None:
                        raise _Unfit(cut_off)
                    assert record.value is not None
                    survey.obey(record.offset, outcome, record.value)
        self._results_read = max(start, end)

    async def _read_splits(self, survey: Survey, end: int, seen: Seen | None) -> None:
        start = survey.position
        async with aclosing(self._log.records(self._splits, start, end)) as records:
            async for record in records:
                if survey.full:
                    return
                survey.read(record)
                if seen is not None:
                    seen(survey.position - start, end - start)
        survey.advance(end)


def _refused(told: SurveyedPartition, problem: str) -> SurveyedPartition:
    return replace(told, problem=problem + ACCEPT_LOSS)
