"""Whether a receive stays as cheap as it grows: in splits of a request, requests open at once, size
of the splits, order, partitions and workers. Every step of a scale runs once in each round."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from functools import partial

from load import GIB, KIB, MIB, Load, Stage, options, stage
from rounds import Rounds, Side, alternate, save, spread
from sides import CONSUME, consume, drain, embedded
from splitferry_protocol.records import Block

Steps = AsyncIterator[tuple[str, Load, Side]]
LEAST = 50_000
"""Splits of a run with few in a request, which is given so many requests."""
DRAINED = ", drain"
"""After the name of a step: the bare drain of the same load."""


async def run(told: argparse.Namespace) -> dict[str, Rounds]:
    measured: dict[str, Rounds] = {}
    told.records = {}
    async with stage(told, 5 * GIB) as here:
        for name in told.scales:
            print(f"{name}:", flush=True)
            async with contextlib.AsyncExitStack() as held:
                loads: dict[str, Load] = {}
                sides: dict[str, Side] = {}
                async for step, load, side in SCALES[name](here, told, held):
                    loads[step], sides[step] = load, side
                    if name in DRAINED_SCALES:
                        loads[step + DRAINED] = load
                        sides[step + DRAINED] = partial(drain, here, load)
                if not sides:
                    continue
                told.records[name] = {step: load.records for step, load in loads.items()}
                measured[name] = await alternate(sides, told.rounds)
                _tell(loads, measured[name])
    return measured


def _tell(loads: dict[str, Load], rounds: Rounds) -> None:
    for step, runs in rounds.items():
        records = loads[step].records
        times = [run.seconds / records * 1e6 for run in runs]
        costs = [run.cpu_seconds / records * 1e6 for run in runs]
        print(
            f"  {step:<20} {spread(times, '.0f')} µs each split, {spread(costs, '.0f')} CPU µs, "
            f"{max(run.peak_rss for run in runs) / MIB:.0f} MiB"
        )


async def splits(here: Stage, told: argparse.Namespace, held: contextlib.AsyncExitStack) -> Steps:
    """Splits of 256 bytes in one request, one request after the other in one partition; in order,
    and 100,000 of them shuffled."""
    for count in (1_000, 10_000, 100_000, 1_000_000):
        for shuffled in (False, True)[: 2 if count == 100_000 else 1]:
            each, items = round(count * told.scale), max(LEAST // count, 1)
            load = await held.enter_async_context(
                here.loaded(items, items * each * 256, 256, 1, together=1, shuffled=shuffled)
            )
            horizon = f"--horizon={10 * load.records}"
            name = f"{each:,}{' shuffled' * shuffled}"
            yield name, load, partial(consume, here, load, [horizon])


async def open_requests(
    here: Stage, told: argparse.Namespace, held: contextlib.AsyncExitStack
) -> Steps:
    """The same requests of 5 splits of 256 bytes each, more and more of them open at once."""
    items = round(10_000 * told.scale)
    for together in (each for each in (1, 100, 10_000) if each <= items):
        load = await held.enter_async_context(
            here.loaded(items, items * 5 * 256, 256, block=Block.MEM, together=together)
        )
        yield f"{together:,}", load, partial(embedded, here, load)


async def sizes(here: Stage, told: argparse.Namespace, held: contextlib.AsyncExitStack) -> Steps:
    """256 MiB as 8 files."""
    total = round(256 * told.scale) * MIB
    for size in (4, 64, 512, 4096):
        load = await held.enter_async_context(here.loaded(8, total, size * KIB))
        yield f"{size} KiB", load, partial(consume, here, load)
    load = await held.enter_async_context(here.loaded(8, total, 64 * KIB, shuffled=True))
    yield "64 KiB shuffled", load, partial(consume, here, load)


async def partitions(
    here: Stage, told: argparse.Namespace, held: contextlib.AsyncExitStack
) -> Steps:
    """256 MiB as 64 files in splits of 64 KiB."""
    total = round(256 * told.scale) * MIB
    for count in (1, 8, 64):
        load = await held.enter_async_context(here.loaded(64, total, 64 * KIB, count))
        yield f"{count}", load, partial(consume, here, load)


async def workers(here: Stage, told: argparse.Namespace, held: contextlib.AsyncExitStack) -> Steps:
    """512 MiB as 8 files in splits of 512 KiB, by processes in one group."""
    helped = subprocess.run([sys.executable, *CONSUME, "--help"], capture_output=True, check=True)
    if b"--workers" not in helped.stdout:
        return
    load = await held.enter_async_context(here.loaded(8, round(512 * told.scale) * MIB, 512 * KIB))
    for count in (1, 2, 4):
        yield f"{count}", load, partial(consume, here, load, [f"--workers={count}"])


Scale = Callable[[Stage, argparse.Namespace, contextlib.AsyncExitStack], Steps]
SCALES: dict[str, Scale] = {
    "splits": splits,
    "open requests": open_requests,
    "split size": sizes,
    "partitions": partitions,
    "workers": workers,
}
PER_SPLIT = {"splits": "splits in a request", "open requests": "open requests"}
"""The scales of which the cost of a split counts; in the others all steps are the same work."""
DRAINED_SCALES = {"split size", "partitions"}


def parser() -> argparse.ArgumentParser:
    made = options(__doc__, 1)
    made.add_argument("--scales", nargs="+", choices=list(SCALES), default=list(SCALES))
    made.add_argument("--scale", type=float, default=1.0, help="of all counts and sizes")
    return made


def main(arguments: list[str] | None = None) -> None:
    told = parser().parse_args(arguments)
    measured = asyncio.run(run(told))
    print(f"\nevery run: {save('growth', told, measured)}")


if __name__ == "__main__":
    main()
