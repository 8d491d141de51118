"""What is compared: each side does its work once, in a fresh process, and tells what it cost."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
import time
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from aiokafka import AIOKafkaConsumer, TopicPartition

from load import KIB, MIB, Load, Stage
from splitferry_cli.topic_rules import Names
from splitferry_protocol.codec import decode_outcome
from splitferry_protocol.records import Block, Result
from watched import Ended, Measurement, Watched, watched

HERE = Path(__file__).parent
FETCH_BYTES = 4 * MIB + 64 * KIB
"""Of each partition, as `FETCH_MAX` of the consumer. With 2 MiB aiokafka drains as fast, with 1 and
with 8 more slowly."""
TIMEOUT = 240.0
"""Seconds after which a side counts as stuck."""
CONSUME = ("-m", "splitferry_cli", "consume")
EMBEDDED = (str(HERE / "embedded.py"),)
VERBOSE_MOST = 100
"""Items up to which a consumer may log each: with more, the log would be what is measured."""

T = TypeVar("T")


async def drain(stage: Stage, load: Load, check_crcs: bool = True) -> Measurement:
    """From the first record handed out to the last."""
    check = "--check-crcs" if check_crcs else "--no-check-crcs"
    return await program(
        stage, [*drain_arguments(stage, load.names, load.used, load.records), check]
    )


def drain_arguments(
    stage: Stage, names: Names, partitions: Sequence[int], records: int
) -> list[str]:
    return [
        str(HERE / "drain.py"),
        stage.servers,
        names.splits,
        *map(str, partitions),
        f"--records={records}",
        f"--fetch-bytes={FETCH_BYTES}",
    ]


async def disk(stage: Stage, load: Load) -> Measurement:
    """From before the first file is created to after the last is synced and renamed."""
    with folder(stage, "disk") as path:
        sizes = [load.items, load.size, load.split_size]
        return await program(stage, [str(HERE / "disk.py"), str(path), *map(str, sizes)])


async def consume(
    stage: Stage, load: Load, options: Sequence[str] = (), command: Sequence[str] = CONSUME
) -> Measurement:
    """A consumer with a fresh group and root: files synced, hashed, announced once.

    From the first record handed out (the opening of the first request; with many small items
    from the taking of the first partition) to the moment when a read_committed reader of the
    results topic, in this process, has the last result.
    """
    group = f"bench-{secrets.token_hex(4)}"
    few = load.items <= VERBOSE_MOST
    with folder(stage, "received") as root:
        arguments = consumer(stage, load.names, group, root, options, command)
        async with (
            Results.of(stage, load.names, load.partitions) as results,
            watched([*arguments, *(["--verbose"] * few)], stage.directory / "consumer.log") as run,
        ):
            last = await while_watched(run, results.after(load.items))
            first = await run.logged("task group created" if few else "partition taken")
            measurement = run.measured(first, last)
        results.check()
        if load.block is Block.FILE:
            sizes = [path.stat().st_size for path in (root / "bench").iterdir()]
            assert sizes == [load.size] * load.items, sizes
        return measurement


async def embedded(stage: Stage, load: Load) -> Measurement:
    """`Consumer` in a program, with a handler that does nothing, as `consume`."""
    return await consume(stage, load, command=EMBEDDED)


def consumer(
    stage: Stage,
    names: Names,
    group: str,
    root: Path,
    options: Sequence[str] = (),
    command: Sequence[str] = CONSUME,
) -> list[str]:
    """The arguments to Python that start it."""
    return [
        *command,
        f"--root={root}",
        f"--group={group}",
        f"--bootstrap-servers={stage.servers}",
        f"--splits-topic={names.splits}",
        f"--results-topic={names.results}",
        f"--dead-letters-topic={names.dead_letters}",
        *options,
    ]


async def program(
    stage: Stage, arguments: Sequence[str], python: Path | None = None
) -> Measurement:
    """A program that prints the moments between which it worked, as `first` and `last`."""
    async with watched(arguments, stage.directory / "program.log", python) as process:
        told = await while_watched(process, process.said("last"))
        return process.measured(told["first"], told["last"])


async def while_watched(process: Watched, work: Coroutine[Any, Any, T]) -> T:
    """Await `work`; raises `Ended` when the process ends before."""
    os.sync()  # what others left to be written is not this side's to wait for
    watching, working = asyncio.create_task(process.watch()), asyncio.create_task(work)
    try:
        async with asyncio.timeout(TIMEOUT):
            await asyncio.wait([watching, working], return_when=asyncio.FIRST_COMPLETED)
        if watching.done():
            await watching
        return await working
    except TimeoutError:
        raise Ended(f"not done after {TIMEOUT:.0f} s; it said last: {process.last_word}") from None
    finally:
        for task in (watching, working):
            task.cancel()
        await asyncio.wait([watching, working])


class Results:
    """A reader of what is committed to a results topic from now on. All must be good: consumers
    compare the digests before. They are decoded only when `check` is called, after the timing."""

    def __init__(self, reader: AIOKafkaConsumer) -> None:
        self._reader = reader
        self._records: list[tuple[bytes | None, bytes | None]] = []

    @classmethod
    @contextlib.asynccontextmanager
    async def of(cls, stage: Stage, names: Names, partitions: int) -> AsyncIterator[Results]:
        async with AIOKafkaConsumer(
            bootstrap_servers=stage.servers,
            isolation_level="read_committed",
            enable_auto_commit=False,
            auto_offset_reset="latest",
            fetch_max_wait_ms=50,
        ) as reader:
            known = [TopicPartition(names.results, number) for number in range(partitions)]
            reader.assign(known)
            await reader.seek_to_end(*known)
            for one in known:
                await reader.position(one)
            yield cls(reader)

    async def after(self, count: int) -> float:
        """When `count` results were there."""
        while len(self._records) < count:
            for some in (await self._reader.getmany(timeout_ms=1000)).values():
                self._records += [(record.key, record.value) for record in some]
        return time.time()

    def check(self) -> None:
        """Raises AssertionError unless each is a good result, and of another request."""
        outcomes = [decode_outcome(*record) for record in self._records]
        for outcome in outcomes:
            assert isinstance(outcome, Result), outcome
            assert outcome.success, outcome
        assert len({outcome.request for outcome in outcomes}) == len(outcomes)


@contextlib.contextmanager
def folder(stage: Stage, name: str) -> Iterator[Path]:
    path = stage.directory / name
    path.mkdir()
    try:
        yield path
    finally:
        shutil.rmtree(path)
