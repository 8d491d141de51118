"""What a restart costs after a kill or a stop: the time from the start of the process to its first
new write, and how fast it reads again what was open behind W, beside the bare drain."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import secrets
import time
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from load import GIB, KIB, MIB, PARTITIONS, Load, Stage, options, stage
from rounds import Rounds, Side, alternate, ratios, save, spread
from sides import CONSUME, EMBEDDED, Results, consumer, drain, folder, while_watched
from splitferry_protocol.records import Block
from watched import INTERVAL, Measurement, Watched, watched

DRAIN, RESTART = "drain", "restart"
ITEM = 16
"""Bytes of an ended request."""


@dataclass(frozen=True, slots=True)
class Restart(Measurement):
    """`seconds` and `cpu_seconds`: from the first write to the last of what is to be done again.

    Attributes:
        to_first_write: seconds from the start of the process.
    """

    to_first_write: float


async def run(told: argparse.Namespace) -> dict[str, Rounds]:
    measured: dict[str, Rounds] = {}
    largest = max(told.mebibytes, default=0) * MIB
    async with stage(told, 4 * largest + 2 * GIB) as here:
        for requests in told.ended:
            name = f"{requests:,} ended requests"
            measured[name] = await _ended(here, told, requests)
        for mebibytes in told.mebibytes:
            measured[f"{mebibytes} MiB open"] = await _open(here, told, mebibytes * MIB)
    for part, rounds in measured.items():
        writes = [run.to_first_write for run in rounds[RESTART] if isinstance(run, Restart)]
        print(f"\n{part}: first new write {spread(writes)} s after the start")
        if DRAIN in rounds:
            print(f"  read again at {spread(ratios(rounds, RESTART, DRAIN))} of the drain")
    return measured


async def _ended(here: Stage, told: argparse.Namespace, requests: int) -> Rounds:
    """Everything is committed; a new request waits."""
    group = f"bench-{secrets.token_hex(4)}"
    some = max(requests, 1)  # without any there is still one, so that the group has committed
    with folder(here, "received") as root:
        async with here.loaded(some, some * ITEM, ITEM, block=Block.MEM, together=1) as load:
            async with (
                Results.of(here, load.names, PARTITIONS) as results,
                _started(here, load, group, root, EMBEDDED) as process,
            ):
                await while_watched(process, results.after(load.items))
                results.check()
            fresh = replace(load, items=1, total=KIB, split_size=KIB, block=Block.FILE)

            async def once() -> Measurement:
                nonlocal fresh
                fresh = replace(fresh, first=fresh.first + load.items)
                async with Results.of(here, load.names, PARTITIONS) as results:
                    await here.send(fresh)
                    async with _started(here, load, group, root, CONSUME) as process:
                        last = await while_watched(process, results.after(1))
                        results.check()
                        return await _measured(process, last)

            return await alternate({RESTART: once}, told.rounds)


async def _open(here: Stage, told: argparse.Namespace, total: int) -> Rounds:
    """Nothing is committed, since no request has ended; the consumer before was killed."""
    group = f"bench-{secrets.token_hex(4)}"
    with folder(here, "received") as root:
        async with here.loaded(PARTITIONS, total, told.split_size * KIB, open=True) as load:
            wanted = load.items * (load.splits - 1) * load.split_size

            async def once() -> Measurement:
                async with _started(here, load, group, root, CONSUME) as process:
                    last = await while_watched(process, _written(process, wanted))
                    measured = await _measured(process, last)
                    process.kill()
                    return measured

            await once()  # leaves what the first of the restarts finds
            sides: dict[str, Side] = {RESTART: once, DRAIN: partial(drain, here, load)}
            return await alternate(sides, told.rounds)


def _started(
    here: Stage, load: Load, group: str, root: Path, command: Sequence[str]
) -> AbstractAsyncContextManager[Watched]:
    verbose = ["--verbose"] if command == CONSUME else []
    arguments = consumer(here, load.names, group, root, verbose, command)
    return watched(arguments, here.directory / "consumer.log")


async def _measured(process: Watched, last: float) -> Restart:
    first = await process.logged("task group created")
    found = process.measured(first, last)
    return Restart(**dataclasses.asdict(found), to_first_write=first - process.started)


async def _written(process: Watched, wanted: int) -> float:
    """When it had given so many bytes to its files. Their sizes would not tell: space is reserved
    ahead of the writes."""
    while process.written < wanted:
        await asyncio.sleep(INTERVAL)
    return time.time()


def parser() -> argparse.ArgumentParser:
    made = options(__doc__, 1)
    made.add_argument("--ended", type=int, nargs="*", default=[0, 100_000], help="requests")
    made.add_argument("--mebibytes", type=int, nargs="*", default=[1024, 4096], help="open")
    made.add_argument("--split-size", type=int, default=512, help="KiB")
    return made


def main(arguments: list[str] | None = None) -> None:
    told = parser().parse_args(arguments)
    measured = asyncio.run(run(told))
    print(f"\nevery run: {save('restart', told, measured)}")


if __name__ == "__main__":
    main()
