"""Taking a partition: the only recovery path (DESIGN, "Taking a partition").

The order is the point. The previous owner is fenced first, so that the committed offset is read
after its last transaction was settled; the end of the results is taken after that, so that its
last result is below it; and the results are read until that end is reached, so that none of
them is missed.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace

import structlog

from splitferry_protocol.codec import InvalidRecord, decode_outcome
from splitferry_protocol.records import Result

from .bookmark import Bookmark
from .ledger import Ledger
from .transport import Transport, Writer

log = structlog.get_logger(__name__)

Bounds = tuple[int, int]
"""Start and end of a log, in offsets."""


class Misfit(Exception):
    """What was committed does not fit the logs. The message says what to do."""


def misfit(bookmark: Bookmark, splits: Bounds, results: Bounds) -> str | None:
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


def accepting_loss(bookmark: Bookmark, splits: Bounds, results: Bounds, horizon: int) -> Bookmark:
    """The nearest bookmark that fits: from the log's start where the log no longer reaches."""
    if max(bookmark.watermark, bookmark.told) > splits[1]:
        return made_anew(splits, results, horizon)
    known = bookmark.results is not None and results[0] <= bookmark.results <= results[1]
    return replace(
        bookmark,
        watermark=max(bookmark.watermark, splits[0]),
        told=max(bookmark.told, splits[0]),
        results=bookmark.results if known else None,
    )


def made_anew(splits: Bounds, results: Bounds, horizon: int) -> Bookmark:
    """For a splits log that is not the one which the results so far speak of."""
    return Bookmark(splits[0], results[1], splits[0], horizon)


async def take(
    transport: Transport,
    group: str,
    topic: str,
    partition: int,
    horizon: int,
    accept_loss: bool,
) -> tuple[Writer, Ledger]:
    """Steps 1 to 4; the caller seeks to the ledger's position.

    Raises:
        Misfit: the logs do not fit what was committed, and `accept_loss` is not set.
        TransportError: Kafka did not answer, or an open transaction hides results.
    """
    writer = await transport.writer(partition)
    try:
        ledger = await _load(transport, group, topic, partition, horizon, accept_loss)
    except BaseException:
        await writer.close()
        raise
    return writer, ledger


async def _load(
    transport: Transport, group: str, topic: str, partition: int, horizon: int, accept_loss: bool
) -> Ledger:
    committed = await transport.committed(partition)
    splits = await transport.splits_bounds(partition)
    results = await transport.results_bounds(partition)
    if committed is None:
        bookmark = Bookmark(splits[0], None, splits[0], None)
    else:
        bookmark = Bookmark.parse(*committed)
    problem = misfit(bookmark, splits, results)
    if problem is not None:
        if not accept_loss:
            raise Misfit(f"{problem}; to go on without what is lost, start with --accept-loss")
        log.warning("loss accepted", topic=topic, partition=partition, lost=problem)
        bookmark = accepting_loss(bookmark, splits, results, horizon)
    ledger = Ledger(group, topic, partition, horizon, bookmark, results[1])
    start = bookmark.results_from(horizon, results[0])
    async for offset, result in _results(transport, partition, start, results[1]):
        if result.group != group or result.input[:2] != (topic, partition):
            continue
        if result.input.last >= splits[1]:
            lost = (
                f"request {result.request} ended at {result.input.last}, but the splits end at "
                f"{splits[1]}: the topic was truncated or made anew"
            )
            if not accept_loss:
                raise Misfit(f"{lost}; to go on without what is lost, start with --accept-loss")
            log.warning("loss accepted", topic=topic, partition=partition, lost=lost)
            bookmark = made_anew(splits, results, horizon)
            return Ledger(group, topic, partition, horizon, bookmark, results[1])
        ledger.load(offset, result)
    return ledger


async def _results(
    transport: Transport, partition: int, start: int, end: int
) -> AsyncIterator[tuple[int, Result]]:
    async for record in transport.results(partition, start, end):
        try:
            outcome = decode_outcome(record.key, record.value)
        except InvalidRecord as invalid:
            log.warning(
                "unreadable record among the results",
                partition=partition,
                offset=record.offset,
                error=invalid.message,
            )
            continue
        if isinstance(outcome, Result):
            yield record.offset, outcome
