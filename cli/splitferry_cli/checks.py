"""What has to hold after a transfer, looked up where it can be seen: topics, offsets, files.

Each check gives the sentence of what is wrong, or None.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

from splitferry_protocol.connection import ConnectionSettings
from splitferry_protocol.ids import RequestId
from splitferry_protocol.paths import PRIVATE_DIRECTORY
from splitferry_protocol.records import Result

from .cluster import administration, ends, records
from .lookup import result_in
from .topic_rules import Names

PIECE = 1024 * 1024


async def all_results(
    connection: ConnectionSettings, names: Names, group: str | None = None
) -> list[Result]:
    """Every committed result that is no repeat, of one group or of all."""
    async with administration(connection) as cluster:
        partitions = await cluster.partitions(names.results)
    return [
        result
        async for record in records(connection, names.results, range(partitions))
        if (result := result_in(record.key, record.value)) is not None
        and not result.repeat
        and group in (None, result.group)
    ]


async def one_result_each(
    connection: ConnectionSettings, names: Names, group: str, requests: Collection[RequestId]
) -> str | None:
    """Each request has one result, and nothing else has any."""
    counts = Counter(result.request for result in await all_results(connection, names, group))
    wrong = {
        request: counts[request]
        for request in {*requests, *counts}
        if counts[request] != (request in requests)
    }
    if wrong:
        told = ", ".join(f"{request} has {count}" for request, count in sorted(wrong.items()))
        return f"not one result for each request: {told}"
    return None


async def lag(connection: ConnectionSettings, topic: str, group: str) -> dict[int, int]:
    """Offsets from W to the end of the log, by partition that has any to go."""
    async with administration(connection) as cluster:
        partitions = range(await cluster.partitions(topic))
        committed = await cluster.committed(group, topic)
    end = await ends(connection, topic, partitions)
    behind = {where: end[where] - committed.get(where, 0) for where in partitions}
    return {where: offsets for where, offsets in behind.items() if offsets}


async def watermark_at_end(
    connection: ConnectionSettings, topic: str, group: str, within: float
) -> str | None:
    """W reaches the end of every partition within some seconds."""
    behind: dict[int, int] = {}
    try:
        async with asyncio.timeout(within):
            while behind := await lag(connection, topic, group):  # noqa: ASYNC110
                await asyncio.sleep(0.2)
    except TimeoutError:
        told = ", ".join(f"{offsets} in partition {where}" for where, offsets in behind.items())
        return f"W is not at the end of the log: {told or 'no answer'}"
    return None


async def topic_empty(connection: ConnectionSettings, topic: str) -> str | None:
    """No record in the topic."""
    async with administration(connection) as cluster:
        partitions = range(await cluster.partitions(topic))
    count = 0
    async for _ in records(connection, topic, partitions):
        count += 1
    return f"{count} records in {topic}" if count else None


def nothing_left(root: Path) -> str | None:
    """No temporary file under the consumer's root, besides a running owner's lock. Blocks."""
    incoming = root / PRIVATE_DIRECTORY / "incoming"
    left = [path for path in incoming.rglob("*") if path.is_file() and path.name != "lock"]
    if not left:
        return None
    return f"temporary files are left: {', '.join(sorted(path.name for path in left))}"


def same_files(pairs: Sequence[tuple[Path, Path]]) -> str | None:
    """Each pair of files is the same, byte for byte. Blocks."""
    different = [str(arrived) for sent, arrived in pairs if not _same(sent, arrived)]
    return f"files that differ or are missing: {', '.join(different)}" if different else None


def _same(one: Path, other: Path) -> bool:
    try:
        with one.open("rb") as left, other.open("rb") as right:
            while piece := left.read(PIECE):
                if piece != right.read(PIECE):
                    return False
            return not right.read(1)
    except FileNotFoundError:
        return False
