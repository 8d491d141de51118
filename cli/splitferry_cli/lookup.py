"""What the log says about one request: its results, and where its splits lie."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from splitferry_protocol.codec import InvalidRecord, decode_outcome, decode_record
from splitferry_protocol.connection import ConnectionSettings
from splitferry_protocol.ids import RequestId
from splitferry_protocol.partitioning import partition_for
from splitferry_protocol.records import Result, Split

from .cluster import Record, administration, follow, records
from .topic_rules import Names


def result_in(key: bytes | None, value: bytes | None) -> Result | None:
    """The result in a record of the results topic; None for anything else."""
    try:
        outcome = decode_outcome(key, value)
    except InvalidRecord:
        return None
    return outcome if isinstance(outcome, Result) else None


def in_order(request: RequestId, partitions: int) -> list[int]:
    """All partitions, the most likely one first.

    A request stays in the partition that Kafka's default partitioner chose when it opened;
    partitions may have been added since, and then the choice for today's number misleads.
    """
    likely = partition_for(request.key, partitions)
    return [likely, *(other for other in range(partitions) if other != likely)]


async def recorded_results(
    connection: ConnectionSettings, names: Names, request: RequestId, group: str | None = None
) -> list[Result]:
    """The results of `request`, of `group` or of all groups, as recorded first (no repeats)."""
    async with administration(connection) as cluster:
        splits = await cluster.partitions(names.splits, "Describe")
        results = await cluster.partitions(names.results)
    order = in_order(request, splits)
    for some in ([order[0]], [p for p in range(results) if p != order[0]]):
        wanted = [partition for partition in some if partition < results]
        found = [
            result
            async for record in records(connection, names.results, wanted)
            if record.key == request.key
            and (result := result_in(record.key, record.value)) is not None
            and not result.repeat
            and group in (None, result.group)
        ]
        if found:
            return found
    return []


async def open_in(
    connection: ConnectionSettings, names: Names, request: RequestId, group: str
) -> int | None:
    """The partition where splits of `request` lie that `group` has not settled yet."""
    async with administration(connection) as cluster:
        partitions = await cluster.partitions(names.splits)
        committed = await cluster.committed(group, names.splits)
    for partition in in_order(request, partitions):
        async for record in records(connection, names.splits, [partition], committed):
            if record.key == request.key and _is_split(record):
                return partition
    return None


def _is_split(record: Record) -> bool:
    try:
        return isinstance(decode_record(record.key, record.value, record.headers), Split)
    except InvalidRecord:
        return False


async def results_from(
    connection: ConnectionSettings, names: Names, partition: int, start: int
) -> AsyncGenerator[Result]:
    """Results of one partition from the offset `start` on, and those to come, without end."""
    async for record in follow(connection, names.results, partition, start):
        result = result_in(record.key, record.value)
        if result is not None:
            yield result
