"""Taking a partition: the only recovery path (DESIGN, "One crash").

The order is the point.

1. The previous owner is fenced, which settles its last transaction.
2. So the committed offset cannot move any more, and is read: W, S and P.
3. So the last result of that owner lies below the end of the results, which is taken now.
4. The results are read from S until that end is reached, so that none of them is missed.
5. Reading the splits goes on at W.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace

import structlog

from splitferry_protocol.codec import InvalidRecord, NewerVersion, decode_outcome
from splitferry_protocol.records import Result

from .bookmark import Bookmark, NewerCommit, TopicIds
from .ledger import DEFAULT_LIMITS, Ledger, Limits
from .transport import Record, Transport, Writer

log = structlog.get_logger(__name__)

ACCEPT_LOSS = "; to go on without what is lost, start with --accept-loss"

LogBounds = tuple[int, int]
"""Start and end of a log, in offsets."""


@dataclass(frozen=True, slots=True)
class Rules:
    """What holds for every partition of a consumer. Times in seconds, the horizon in offsets."""

    group: str
    splits_topic: str
    results_topic: str
    dead_letters_topic: str
    horizon: int
    idle_timeout: float
    accept_loss: bool
    limits: Limits = DEFAULT_LIMITS


class Misfit(Exception):
    """What was committed does not fit the logs. The message says what to do."""


def misfit(bookmark: Bookmark, splits: LogBounds, results: LogBounds) -> str | None:
    """How the commit disagrees with the logs, or None. Pure.

    Retention that deletes too early, and topics that were truncated or made anew, show here.
    """
    start, end = splits
    if bookmark.watermark < start:
        return (
            f"records {bookmark.watermark} to {start} of the splits were deleted before they "
            "were settled; lengthen the retention of the splits topic"
        )
    if max(bookmark.watermark, bookmark.told) > end:
        return (
            f"the group has read up to {max(bookmark.watermark, bookmark.told)}, but the splits "
            f"end at {end}: the topic was truncated or made anew"
        )
    if bookmark.results is not None and bookmark.results < results[0]:
        return (
            f"results {bookmark.results} to {results[0]} were deleted, so requests that ended "
            "there are not known any more; lengthen the retention of the results topic"
        )
    if bookmark.results is not None and bookmark.results > results[1]:
        return (
            f"the results were read up to {bookmark.results}, but end at {results[1]}: "
            "the topic was truncated or made anew"
        )
    return None


def replaced(bookmark: Bookmark, topics: TopicIds) -> list[str]:
    """Which of the topics are not those that the commit speaks of. Pure.

    The offsets may fit all the same, and would lead into the middle of another log.
    """
    if bookmark.topics is None:
        return []
    pairs = zip(("splits", "results"), bookmark.topics, topics, strict=True)
    return [name for name, before, now in pairs if before != now]


def unfit(
    bookmark: Bookmark, splits: LogBounds, results: LogBounds, topics: TopicIds
) -> str | None:
    """Why the commit cannot be gone on from, or None. Pure."""
    anew = replaced(bookmark, topics)
    if anew:
        return (
            f"the {' and the '.join(anew)} topic was deleted and made anew since the last "
            "commit, so its offsets mean nothing there"
        )
    return misfit(bookmark, splits, results)


def beyond(result: Result, splits: LogBounds) -> str | None:
    """How a recorded result disagrees with the splits log, or None. Pure."""
    if result.input.last < splits[1]:
        return None
    return (
        f"request {result.request} ended at {result.input.last}, but the splits end at "
        f"{splits[1]}: the topic was truncated or made anew"
    )


def newer_commit(metadata: str) -> str:
    return f"the offset was committed by a newer splitferry ({metadata}): upgrade this one"


def newer_result(offset: int) -> str:
    return (
        f"the record at offset {offset} of the results was written by a newer splitferry: upgrade "
        "this one"
    )


def accepting_loss(
    bookmark: Bookmark,
    splits: LogBounds,
    results: LogBounds,
    horizon: int,
    topics: TopicIds,
) -> Bookmark:
    """The nearest bookmark that fits: from the log's start where the log no longer reaches."""
    anew = replaced(bookmark, topics)
    if "splits" in anew or max(bookmark.watermark, bookmark.told) > splits[1]:
        return made_anew(splits, results, horizon)
    known = bookmark.results is not None and results[0] <= bookmark.results <= results[1]
    known = known and "results" not in anew
    return replace(
        bookmark,
        watermark=max(bookmark.watermark, splits[0]),
        told=max(bookmark.told, splits[0]),
        results=bookmark.results if known else None,
    )


def made_anew(splits: LogBounds, results: LogBounds, horizon: int) -> Bookmark:
    """For a splits log that is not the one which the results so far speak of."""
    return Bookmark(splits[0], results[1], splits[0], horizon)


async def take(
    transport: Transport, rules: Rules, partition: int, topics: TopicIds
) -> tuple[Writer, Ledger]:
    """Steps 1 to 4; the caller seeks to the ledger's position.

    Args:
        topics: their ids.

    Raises:
        Misfit: the logs do not fit what was committed, and a loss is not accepted.
        TransportError: Kafka did not answer, or a transaction was or is open.
    """
    writer = await transport.writer(partition)
    try:
        await writer.settle()
        ledger = await _load(transport, rules, partition, topics)
    except BaseException:
        await writer.close()
        raise
    return writer, ledger


async def _load(transport: Transport, rules: Rules, partition: int, topics: TopicIds) -> Ledger:
    """Steps 2 to 4."""
    group, topic, horizon = rules.group, rules.splits_topic, rules.horizon
    lost: list[str] = []

    def refuse(problem: str) -> None:
        """Raise Misfit, unless the loss is accepted."""
        if not rules.accept_loss:
            raise Misfit(problem + ACCEPT_LOSS)
        log.warning("loss accepted", topic=topic, partition=partition, lost=problem)
        lost.append(problem)

    def ledger_from(bookmark: Bookmark) -> Ledger:
        return Ledger(group, topic, partition, horizon, bookmark, results[1], rules.limits)

    committed = await transport.committed(partition)
    splits = await transport.splits_bounds(partition)
    results = await transport.results_bounds(partition)
    watermark, metadata = committed or (splits[0], "")
    try:
        bookmark = Bookmark.parse(watermark, metadata)
    except NewerCommit:
        refuse(newer_commit(metadata))
        bookmark = Bookmark(watermark, None, watermark, None)
    if committed is not None and bookmark.horizon is None and not lost:
        log.warning(
            "the committed offset was set by hand: all results are read again, and requests "
            "that opened below it and have none are given up",
            topic=topic,
            partition=partition,
            offset=watermark,
        )
    problem = unfit(bookmark, splits, results, topics)
    if problem is not None:
        refuse(problem)
        bookmark = accepting_loss(bookmark, splits, results, horizon, topics)
    ledger = ledger_from(bookmark)
    start = bookmark.results_from(horizon, results[0])
    # Closed here, also by a refusal, and not at some time by the collector of garbage.
    async with aclosing(_results(transport, partition, start, results[1], refuse)) as found:
        async for record, result in found:
            if result.group != group or result.input[:2] != (topic, partition):
                continue
            if (cut_off := beyond(result, splits)) is not None:
                refuse(cut_off)
                ledger = ledger_from(made_anew(splits, results, horizon))
                break
            assert record.value is not None
            ledger.load(record.offset, result, record.value)
    if lost:
        # What was accepted is over with the next commit; only a result of a later version is met
        # again until S has passed it. And a log made anew soon grows past the old W: with that
        # still committed, the next owner would see nothing amiss, and begin in the middle.
        ledger.commit_anew()
    return ledger


async def _results(
    transport: Transport, partition: int, start: int, end: int, refuse: Callable[[str], None]
) -> AsyncGenerator[tuple[Record, Result], None]:
    async with aclosing(transport.results(partition, start, end)) as records:
        async for record in records:
            try:
                outcome = decode_outcome(record.key, record.value)
            except NewerVersion:
                # Perhaps a result of this group. Passed over, it could come a second time.
                refuse(newer_result(record.offset))
                continue
            except InvalidRecord as invalid:
                log.warning(
                    "unreadable record among the results",
                    partition=partition,
                    offset=record.offset,
                    error=invalid.message,
                )
                continue
            if isinstance(outcome, Result):
                yield record, outcome
