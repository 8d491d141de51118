"""`splitferry demo`: broker, topics, consumer and producer together, and every file compared."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rich.text import Text

from splitferry_producer import Producer
from splitferry_protocol.records import Block, Result

from . import checks
from .broker import LocalBroker
from .cluster import administration
from .command import Command, Common, run
from .consumer_process import ConsumerProcess
from .failures import Failure
from .options import option
from .output import Output, counted, human_size
from .send import Item, Wanted, items_of, send_all
from .topic_rules import Names
from .topics import create_topics
from .values import ByteSize

KIB, MIB = 1024, 1024 * 1024
SAMPLES = (0, 1, 100_000, 512 * KIB, 5 * MIB, 20 * MIB, 55 * MIB, 120 * MIB)
"""Bytes of the sample files."""
SAMPLES_KILL = (
    *(0, 1, 777, 4 * KIB, 64 * KIB - 1, 512 * KIB - 1, 512 * KIB, 512 * KIB + 1),
    *(MIB, 3 * MIB, 5 * MIB, 8 * MIB, 12 * MIB, 16 * MIB, 24 * MIB, 32 * MIB),
    *(48 * MIB, 64 * MIB, 128 * MIB, 512 * MIB),
)
PARTITIONS = 4
SESSION_SECONDS = 6
"""The least that a broker takes by default: how long a killed consumer counts as alive."""
SETTLE_SECONDS = 30
ITEM_SECONDS = 900


@click.command(
    "demo",
    cls=Command,
    examples="""
    splitferry demo
    splitferry demo photos/ big.iso
    splitferry demo --kill
    splitferry demo --bootstrap-servers kafka:9092 --size 50MiB
    """,
)
@click.argument("paths", nargs=-1, metavar="[PATH…]", type=click.Path(exists=True, readable=True))
@option("--kill/--no-kill", help="Kill the consumer with SIGKILL half-way and start it again.")
@option("--size", type=ByteSize(), help="Total of the sample files; else about 200 MiB.")
@click.pass_context
def demo(ctx: click.Context, paths: Sequence[str], kill: bool, size: int | None) -> None:
    """Send files through a real Kafka to a consumer, and compare every byte that arrives.

    Without PATH it makes sample files. It starts a broker of its own unless --bootstrap-servers
    is given; either way it uses topics of its own, and leaves nothing behind.
    """
    given = ctx.get_parameter_source("bootstrap_servers")
    own_broker = given is click.core.ParameterSource.DEFAULT
    run(_demo(ctx.obj, paths, kill, size, own_broker))


@dataclass(frozen=True, slots=True)
class Stage:
    """What a run has to work with."""

    common: Common
    root: Path
    group: str
    consumer: ConsumerProcess


async def _demo(
    common: Common, paths: Sequence[str], kill: bool, size: int | None, own_broker: bool
) -> None:
    say = common.output.note
    async with _directory() as directory, contextlib.AsyncExitStack() as stack:
        if paths:
            items = await items_of(paths, None, Block.FILE)
        else:
            sizes = _scaled(SAMPLES_KILL if kill else SAMPLES, size)
            say(f"Making {len(sizes)} sample files, {human_size(sum(sizes))}.")
            items = await asyncio.to_thread(_make_samples, directory / "samples", sizes)
        if own_broker:
            say("Starting Apache Kafka (the first time it is fetched).")
            broker = await stack.enter_async_context(LocalBroker(directory / "broker"))
            common = _at(common, broker.bootstrap_servers)
        stage = await _stage(common, directory, stack, keep_topics=own_broker)
        say(f"Kafka at {common.connection.bootstrap_servers}; the consumer writes to a new root.")
        await _perform(stage, items, kill)


def _at(common: Common, servers: str) -> Common:
    connection = dataclasses.replace(common.connection, bootstrap_servers=servers)
    environment = {**common.environment, "SPLITFERRY_BOOTSTRAP_SERVERS": servers}
    return dataclasses.replace(common, connection=connection, environment=environment)


async def _stage(
    common: Common, directory: Path, stack: contextlib.AsyncExitStack, *, keep_topics: bool
) -> Stage:
    """Topics of this run, and a consumer of them in a process of its own."""
    name = f"splitferry-demo-{secrets.token_hex(4)}"
    names = Names(f"{name}.splits", f"{name}.results", f"{name}.dead-letters")
    common = dataclasses.replace(common, names=names)
    async with administration(common.connection) as cluster:
        await create_topics(cluster, names, PARTITIONS, -1, 16 * MIB)
    if not keep_topics:
        stack.push_async_callback(_delete_topics, common)
    root = directory / "received"
    root.mkdir()
    environment = {
        **common.environment,
        "SPLITFERRY_SPLITS_TOPIC": names.splits,
        "SPLITFERRY_RESULTS_TOPIC": names.results,
        "SPLITFERRY_DEAD_LETTERS_TOPIC": names.dead_letters,
    }
    arguments = [f"--root={root}", f"--group={name}", f"--session-timeout={SESSION_SECONDS}"]
    consumer = ConsumerProcess(arguments, environment, directory / "consumer.log")
    stack.push_async_callback(consumer.stop)
    await consumer.start()
    return Stage(common, root, name, consumer)


async def _delete_topics(common: Common) -> None:
    async with administration(common.connection) as cluster:
        await cluster.delete(list(dataclasses.astuple(common.names)))


async def _perform(stage: Stage, items: Sequence[Item], kill: bool) -> None:
    output, consumer = stage.common.output, stage.consumer
    total = await asyncio.to_thread(lambda: sum(item.size() or 0 for item in items))
    begun = time.monotonic()
    results, recovery = await _transfer(stage, items, total, kill)
    seconds = time.monotonic() - begun
    found = await _check(stage, items, results)
    if kill:
        found["results came after the kill"] = None if recovery else "all had come before"
    code = await consumer.stop()
    found["the consumer stopped cleanly"] = f"exit code {code}" if code else None
    _summary(output, found, len(items), total, seconds, recovery)
    if wrong := [problem for problem in found.values() if problem]:
        raise Failure(f"{'; '.join(wrong)} (the consumer's last words: {consumer.last_words()})")


async def _transfer(
    stage: Stage, items: Sequence[Item], total: int, kill: bool
) -> tuple[list[Result], float | None]:
    """Send everything; the results, and the s from the kill to the first result after it."""
    results: list[Result] = []
    killed_at: float | None = None
    recovery: float | None = None

    def done(result: Result) -> None:
        nonlocal recovery
        results.append(result)
        if killed_at is not None and recovery is None:
            recovery = time.monotonic() - killed_at

    async def supervise() -> None:
        nonlocal killed_at
        if kill:
            await _first(_half_written(stage.root, total), stage.consumer.watch())
            await stage.consumer.kill()
            killed_at = time.monotonic()
            stage.common.output.note(
                Text("The consumer was killed with SIGKILL half-way; starting it again.", "bold")
            )
            await stage.consumer.start()
        await stage.consumer.watch()

    wanted = Wanted(time.time_ns() // 1_000_000, Block.FILE, None, True, ITEM_SECONDS, 4)
    connection, names = stage.common.connection, stage.common.names
    async with Producer(
        connection, splits_topic=names.splits, results_topic=names.results, group=stage.group
    ) as producer:
        sending = send_all(producer, items, wanted, stage.common.output, done)
        await _first(sending, supervise())
    return results, recovery


async def _first(*works: Coroutine[Any, Any, object]) -> None:
    """Until the first of the works is done; the others are cancelled, and may clean up."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _half_written(root: Path, total: int) -> None:
    while await asyncio.to_thread(_bytes_below, root) < total // 2:  # noqa: ASYNC110
        await asyncio.sleep(0.02)


def _bytes_below(root: Path) -> int:
    size = 0
    for folder, _, names in os.walk(root):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # renamed between the two calls
                size += os.stat(os.path.join(folder, name), follow_symlinks=False).st_size
    return size


async def _check(
    stage: Stage, items: Sequence[Item], results: Sequence[Result]
) -> dict[str, str | None]:
    """What has to hold, and what is wrong with it."""
    connection, names = stage.common.connection, stage.common.names
    pairs = [
        (item.path, stage.root / item.unique_id)
        for item in items
        if item.path and item.problem is None
    ]
    requests = {result.request for result in results}
    failed = len(items) - sum(result.success for result in results)
    return {
        "every request completed": f"{counted(failed, 'request', 'requests')} did not complete"
        if failed
        else None,
        "every file is the same, byte for byte": await asyncio.to_thread(checks.same_files, pairs),
        "one result each": await checks.one_result_each(connection, names, stage.group, requests),
        "W is at the end of the log": await checks.watermark_at_end(
            connection, names.splits, stage.group, SETTLE_SECONDS
        ),
        "no dead letters": await checks.topic_empty(connection, names.dead_letters),
        "no temporary file is left": await asyncio.to_thread(checks.nothing_left, stage.root),
    }


def _summary(
    output: Output,
    found: dict[str, str | None],
    files: int,
    total: int,
    seconds: float,
    recovery: float | None,
) -> None:
    for name, problem in found.items():
        mark = ("✗", "bold red") if problem else ("✓", "green")
        output.note(Text.assemble(mark, f" {name}", f": {problem}" if problem else ""))
    if recovery is not None:
        output.note(f"First result {recovery:.1f} s after the kill.")
    fields = {
        "files": files,
        "bytes": total,
        "seconds": round(seconds, 2),
        "mb_per_second": round(total / seconds / 1e6, 1),
        "recovery_seconds": recovery and round(recovery, 2),
        "checks": found,
    }
    output.tell(
        fields,
        f"{files} files, {human_size(total)} in {seconds:.1f} s: "
        f"{fields['mb_per_second']} MB/s from the first read to the last result.",
    )


def _scaled(sizes: Sequence[int], total: int | None) -> list[int]:
    if total is None:
        return list(sizes)
    return [size * total // sum(sizes) for size in sizes]


def _make_samples(folder: Path, sizes: Sequence[int]) -> list[Item]:
    """Random files in a few folders."""
    items = []
    for number, size in enumerate(sizes):
        name = (
            f"{('small', 'middle', 'large')[(size > 4 * KIB) + (size > 8 * MIB)]}/{number:02}.bin"
        )
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            for begin in range(0, size, MIB):
                file.write(os.urandom(min(MIB, size - begin)))
        items.append(Item(path, name))
    return items


@contextlib.asynccontextmanager
async def _directory() -> AsyncIterator[Path]:
    """A temporary directory, removed at the end whatever happens."""
    path = Path(tempfile.mkdtemp(prefix="splitferry-demo-"))
    try:
        yield path
    finally:
        await asyncio.to_thread(shutil.rmtree, path, ignore_errors=True)
