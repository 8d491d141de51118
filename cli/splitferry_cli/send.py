"""`splitferry send`: files, folders or standard input, each item one request."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rich.text import Text

from splitferry_producer import (
    DataItemSource,
    FileSource,
    Producer,
    ProducerError,
    Sent,
    SourceError,
    StreamSource,
    list_folder,
)
from splitferry_protocol.ids import U32_MAX, U64_MAX, RequestId
from splitferry_protocol.paths import path_problem
from splitferry_protocol.records import PAYLOAD_MAX, Block, Result

from .bars import Bars
from .command import Command, Common, run
from .failures import Failure
from .options import option
from .output import Output, counted, human_size, printable
from .values import ByteSize, Label, Seconds


@dataclass(frozen=True, slots=True)
class Item:
    """What is to be sent. `path` None is standard input."""

    path: Path | None
    unique_id: str
    problem: str | None = None
    """Why it cannot be: a folder in a folder, which nobody may list."""

    def source(self, block: Block) -> DataItemSource:
        """Raises SourceError."""
        if self.problem is not None:
            raise SourceError(str(self.path), self.problem)
        if self.path is None:
            if sys.stdin is None:  # closed by who started us
                raise SourceError("standard input", "is closed")
            return StreamSource(sys.stdin.buffer, block, "standard input")
        return FileSource(self.path, block)

    def size(self) -> int | None:
        """Bytes, for the progress bar."""
        if self.problem is not None:
            return 0
        try:
            return None if self.path is None else self.path.stat().st_size
        except OSError:
            return None  # the sending says what is wrong with it


@dataclass(frozen=True, slots=True)
class Wanted:
    """How items are to be sent."""

    version: int
    block: Block
    labels: dict[str, str] | None
    wait: bool
    timeout: float | None
    parallel: int


@click.command(
    "send",
    cls=Command,
    examples="""
    splitferry send big.iso
    splitferry send photos/ --label album=2024
    tar c src | splitferry send - --unique-id src.tar
    splitferry send table.bin --memory --json
    """,
)
@click.argument("paths", nargs=-1, required=True, metavar="PATH…", type=click.Path(allow_dash=True))
@option("--unique-id", metavar="ID", help="Name of a single item; else the file's own name.")
@option(
    "--version",
    type=click.IntRange(0, U64_MAX),
    metavar="V",
    help="Only a later version replaces an item; else the time in ms.",
)
@option(
    "--node-id",
    type=click.IntRange(0, U32_MAX),
    metavar="N",
    help="First part of the request ids; else drawn once, and kept.",
)
@option(
    "--split-size",
    type=ByteSize(1, PAYLOAD_MAX),
    help="Payload of a split; else 512KiB, more for large items.",
)
@option("--memory/--no-memory", help="Send into the consumer's memory, not into a file.")
@option(
    "--label",
    "labels",
    type=Label(),
    multiple=True,
    help="Handed through to the result; may be given again.",
)
@option("--no-wait/--wait", "no_wait", help="Do not wait for the results.")
@option("--timeout", type=Seconds(), help="Time for each item, its result included; else no limit.")
@option(
    "--group",
    metavar="GROUP",
    help="Consumer group whose results count; else the first.",
)
@option(
    "--parallel", type=click.IntRange(1, 64), default=4, metavar="N", help="Items sent at a time."
)
@click.pass_obj
def send(
    common: Common,
    paths: Sequence[str],
    unique_id: str | None,
    version: int | None,
    node_id: int | None,
    split_size: int | None,
    memory: bool,
    labels: Sequence[tuple[str, str]],
    no_wait: bool,
    timeout: float | None,
    group: str | None,
    parallel: int,
) -> None:
    """Send files, folders (each file is one request, named by its path in the folder) or `-`,
    standard input. Waits for the results; exit code 1 when an item did not complete.

    Standard input counts as whole wherever it ends: `set -o pipefail` shows whether its source
    failed.
    """
    wanted = Wanted(
        time.time_ns() // 1_000_000 if version is None else version,
        Block.MEM if memory else Block.FILE,
        dict(labels) or None,
        not no_wait,
        timeout,
        parallel,
    )

    async def work() -> int:
        items = await items_of(paths, unique_id, wanted.block)
        if not items:
            common.output.note("There is nothing to send.")
            return 0
        async with Producer(
            common.connection,
            node_id=node_id,
            splits_topic=common.names.splits,
            results_topic=common.names.results,
            group=group,
            split_size=split_size,
        ) as producer:
            return await send_all(producer, items, wanted, common.output)

    if failed := run(work()):
        raise Failure(f"{counted(failed, 'item', 'items')} did not complete")


async def items_of(paths: Sequence[str], unique_id: str | None, block: Block) -> list[Item]:
    """What the arguments name.

    Raises:
        click.UsageError: an argument is not there, or the names do not fit.
    """
    items: list[Item] = []
    for given, path in zip(paths, map(Path, paths), strict=True):
        if given == "-":  # and not ./-
            if unique_id is None:
                raise click.UsageError("standard input has no name: give it one with --unique-id")
            items.append(Item(None, unique_id))
        elif await asyncio.to_thread(path.is_dir):
            if unique_id is not None:
                raise click.UsageError(f"--unique-id is for a single item, {path} is a folder")
            listing = await list_folder(path)
            items += [Item(file.path, file.unique_id) for file in listing.files]
            items += [
                Item(below, below.relative_to(path).as_posix(), cause)
                for below, cause in listing.failed
            ]
        elif await asyncio.to_thread(path.exists):
            name = (await asyncio.to_thread(path.absolute)).name if unique_id is None else unique_id
            items.append(Item(path, name))
        else:
            raise click.UsageError(f"{path} does not exist")
    if unique_id is not None and len(items) > 1:
        raise click.UsageError(f"--unique-id is for a single item, these are {len(items)}")
    named: dict[str, Item] = {}
    for item in items:
        if item.problem is not None:
            continue
        problem = path_problem(item.unique_id) if block is Block.FILE else None
        if problem is not None:
            raise click.UsageError(
                f"{item.unique_id!r} cannot name a file: {problem}; name it with --unique-id"
            )
        if (other := named.setdefault(item.unique_id, item)) is not item:
            raise click.UsageError(
                f"{other.path} and {item.path} have the same unique id {item.unique_id!r}: "
                "send them with a --unique-id each"
            )
    return items


async def send_all(
    producer: Producer,
    items: Sequence[Item],
    wanted: Wanted,
    output: Output,
    done: Callable[[Result], None] = lambda result: None,
) -> int:
    """Send all items, some at a time, and tell what became of each; returns how many failed."""
    queue = iter(items)
    failed = 0
    sizes = [item.size() for item in items]
    total = None if None in sizes else sum(size or 0 for size in sizes)
    with Bars(output, total) as bars:

        async def worker() -> None:
            nonlocal failed
            for item in queue:
                result = await _send_one(producer, item, wanted, output, bars)
                if isinstance(result, Result):
                    failed += not result.success
                    done(result)
                elif result is None:
                    failed += 1

        async with asyncio.TaskGroup() as group:
            for _ in range(min(wanted.parallel, len(items))):
                group.create_task(worker())
    return failed


async def _send_one(
    producer: Producer, item: Item, wanted: Wanted, output: Output, bars: Bars
) -> Result | Sent | None:
    """What became of the item, or, without a wait, what was sent; None: an error, told."""
    try:
        with bars.item(printable(item.unique_id), item.size()) as progress:
            result = await producer.send(
                item.source(wanted.block),
                unique_id=item.unique_id,
                version=wanted.version,
                labels=wanted.labels,
                wait=wanted.wait,
                timeout=wanted.timeout,
                progress=progress,
            )
    except ProducerError as error:
        output.tell(
            _fields(item, wanted, "failed", getattr(error, "request", None), error=error),
            Text.assemble(
                ("failed   ", "red"), f" {printable(item.unique_id)}  {printable(error.message)}"
            ),
        )
        return None
    if isinstance(result, Result):
        output.result(result)
    else:
        output.tell(
            _fields(item, wanted, "sent", result.request, result.size, result.sha256),
            f"sent      {result.request}  {printable(item.unique_id)}  {human_size(result.size)}",
        )
    return result


def _fields(
    item: Item,
    wanted: Wanted,
    status: str,
    request: RequestId | None = None,
    size: int | None = None,
    sha256: bytes | None = None,
    error: ProducerError | None = None,
) -> dict[str, Any]:
    """For programs, keys that a result has, too (CLI, `--json`)."""
    return {
        "request": request,
        "unique_id": item.unique_id,
        "version": wanted.version,
        "status": status,
        "size": size,
        "sha256": sha256,
        "error": error and {"code": type(error).__name__, "message": error.message},
    }
