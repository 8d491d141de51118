"""What is compared: each side does its work once, in a fresh process, and tells what it cost."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

from aiokafka import AIOKafkaConsumer, TopicPartition

from load import MIB, Load, Stage
from splitferry_protocol.codec import decode_outcome
from splitferry_protocol.records import Result
from watched import Measurement, Watched, watched

HERE = Path(__file__).parent
FETCH_BYTES = 4 * MIB
"""Of each partition. With 2 MiB aiokafka drains as fast, with 1 and with 8 more slowly."""
TIMEOUT = 600.0
"""Seconds after which a side counts as stuck."""

T = TypeVar("T")


async def drain(stage: Stage, load: Load, check_crcs: bool) -> Measurement:
    """From the first record handed out to the last."""
    arguments = [
        str(HERE / "drain.py"),
        stage.servers,
        load.names.splits,
        str(load.partitions),
        "--check-crcs" if check_crcs else "--no-check-crcs",
        f"--fetch-bytes={FETCH_BYTES}",
    ]
    return await _program(stage, arguments)


async def disk(stage: Stage, load: Load) -> Measurement:
    """From before the first write to after the last sync."""
    with _folder(stage, "disk") as folder:
        sizes = [load.items, load.size, load.split_size]
        arguments = [str(HERE / "disk.py"), str(folder), *map(str, sizes)]
        return await _program(stage, arguments)


async def consume(stage: Stage, load: Load, options: Sequence[str] = ()) -> Measurement:
    """`splitferry consume` with a fresh group and root: files synced, hashed, announced once.

    From the first record handed out (the opening of the first request) to the moment when a
    read_committed reader of the results topic, in this process, has the last result.
    """
    group = f"bench-{secrets.token_hex(4)}"
    with _folder(stage, "received") as root:
        arguments = [
            *("-m", "splitferry_cli", "consume", "--verbose"),
            f"--root={root}",
            f"--group={group}",
            f"--bootstrap-servers={stage.servers}",
            f"--splits-topic={load.names.splits}",
            f"--results-topic={load.names.results}",
            f"--dead-letters-topic={load.names.dead_letters}",
            *options,
        ]
        async with (
            _results(stage, load, group) as results,
            watched(arguments, stage.directory / "consumer.log") as process,
        ):
            last = await _while_watched(process, _last_result(results, load, group))
            first = await process.logged("task group created")
            measurement = process.measured(first, last)
        sizes = [path.stat().st_size for path in (root / "bench").iterdir()]
        assert sizes == [load.size] * load.items, sizes
        return measurement


async def _program(stage: Stage, arguments: Sequence[str]) -> Measurement:
    async with watched(arguments, stage.directory / "program.log") as process:
        told = await _while_watched(process, process.said("last"))
        return process.measured(told["first"], told["last"])


async def _while_watched(process: Watched, work: Coroutine[Any, Any, T]) -> T:
    """Await `work`; raises `Ended` when the process ends before."""
    os.sync()  # what others left to be written is not this side's to wait for
    watching, working = asyncio.create_task(process.watch()), asyncio.create_task(work)
    try:
        async with asyncio.timeout(TIMEOUT):
            await asyncio.wait([watching, working], return_when=asyncio.FIRST_COMPLETED)
        if watching.done():
            await watching
        return await working
    finally:
        for task in (watching, working):
            task.cancel()
        await asyncio.wait([watching, working])


@contextlib.asynccontextmanager
async def _results(stage: Stage, load: Load, group: str) -> AsyncIterator[AIOKafkaConsumer]:
    """A reader of what is committed to the results topic from now on."""
    async with AIOKafkaConsumer(
        bootstrap_servers=stage.servers,
        isolation_level="read_committed",
        enable_auto_commit=False,
        auto_offset_reset="latest",
        fetch_max_wait_ms=50,
    ) as reader:
        partitions = [TopicPartition(load.names.results, p) for p in range(load.partitions)]
        reader.assign(partitions)
        await reader.seek_to_end(*partitions)
        yield reader


async def _last_result(reader: AIOKafkaConsumer, load: Load, group: str) -> float:
    """When the last result was there. All must be good: the digests are compared before."""
    results = 0
    async for record in reader:
        outcome = decode_outcome(record.key, record.value)
        if isinstance(outcome, Result) and outcome.group == group:
            assert outcome.success, outcome
            results += 1
            if results == load.items:
                return time.time()
    raise AssertionError("unreachable")


@contextlib.contextmanager
def _folder(stage: Stage, name: str) -> Any:
    path = stage.directory / name
    path.mkdir()
    try:
        yield path
    finally:
        shutil.rmtree(path)
