"""Small requests of one split from a backlog: requests a second until the last committed result
is seen, to shared memory, to a handler in the process and to files, beside what the disk does."""

from __future__ import annotations

import argparse
import asyncio
from functools import partial

from load import GIB, KIB, Stage, options, stage
from rounds import Rounds, alternate, save, spread
from sides import consume, disk, embedded
from splitferry_protocol.records import Block

MEMORY, HANDLER, FILES, DISK = "memory", "handler", "files", "disk"
IN_MEMORY = ["--memory-limit=8GiB"]
"""Segments stay for some minutes after their result; the default limit would refuse the later."""


async def run(told: argparse.Namespace) -> dict[str, Rounds]:
    async with stage(told, 2 * GIB) as here:
        measured = {}
        if {MEMORY, HANDLER} & set(told.sides):
            measured["to memory"] = await _compare(here, told, Block.MEM)
        if {FILES, DISK} & set(told.sides):
            measured["to files"] = await _compare(here, told, Block.FILE)
    for part, rounds in measured.items():
        print(f"\n{part}, {told.requests} requests of {told.size} bytes\n")
        for side, runs in rounds.items():
            rates = [told.requests / run.seconds for run in runs]
            cpu = [run.cpu_seconds / told.requests * 1e6 for run in runs]
            print(f"  {side:<8} {spread(rates, '.0f')} a second, {spread(cpu, '.0f')} CPU µs each")
    return dict(measured)


async def _compare(here: Stage, told: argparse.Namespace, block: Block) -> Rounds:
    total = told.requests * told.size
    async with here.loaded(told.requests, total, told.size, block=block, together=1) as load:
        sides = {
            Block.MEM: {
                MEMORY: partial(consume, here, load, IN_MEMORY),
                HANDLER: partial(embedded, here, load),
            },
            Block.FILE: {FILES: partial(consume, here, load), DISK: partial(disk, here, load)},
        }[block]
        wanted = {name: side for name, side in sides.items() if name in told.sides}
        return await alternate(wanted, told.rounds)


def parser() -> argparse.ArgumentParser:
    made = options(__doc__, 5)
    made.add_argument("--requests", type=int, default=6_000)
    made.add_argument("--size", type=int, default=KIB, help="bytes of each")
    sides = [MEMORY, HANDLER, FILES, DISK]
    made.add_argument("--sides", nargs="+", choices=sides, default=sides)
    return made


def main(arguments: list[str] | None = None) -> None:
    told = parser().parse_args(arguments)
    measured = asyncio.run(run(told))
    print(f"\nevery run: {save('small', told, measured)}")


if __name__ == "__main__":
    main()
