"""How fast a backlog is received, beside a bare aiokafka drain of the same topic, OpenMSIStream's
download of the same files from a topic of its own, and writing the same bytes to the disk."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
from functools import partial

import openmsistream
from load import GIB, KIB, MIB, options, stage
from rounds import Rounds, alternate, counted, save, table
from send import make_files
from sides import consume, disk, drain, folder

DRAIN, UNCHECKED, CONSUME, DISK = "drain, CRC on", "drain, CRC off", "consume", "disk"
OPENMSISTREAM = {threads: f"OpenMSIStream, {threads} threads" for threads in (2, 4)}
BASES = [DRAIN, UNCHECKED, *OPENMSISTREAM.values(), DISK]


async def run(told: argparse.Namespace) -> dict[str, Rounds]:
    total = told.mebibytes * MIB
    others = set(OPENMSISTREAM.values()) & set(told.sides)
    if others and not openmsistream.installed():
        told.sides = [side for side in told.sides if side not in others]
        others = set()
    measured: dict[str, Rounds] = {}
    async with stage(told, 6 * total + GIB) as here:
        for files in told.files:
            async with contextlib.AsyncExitStack() as held:
                load = await held.enter_async_context(
                    here.loaded(files, total, told.split_size * KIB)
                )
                sides = {
                    DRAIN: partial(drain, here, load, check_crcs=True),
                    UNCHECKED: partial(drain, here, load, check_crcs=False),
                    CONSUME: partial(consume, here, load),
                    DISK: partial(disk, here, load),
                }
                if others:
                    with folder(here, "files") as path:
                        make_files(path, files, total)
                        topic = await held.enter_async_context(openmsistream.uploaded(here, path))
                    sides |= {
                        name: partial(openmsistream.download, here, topic, files, threads)
                        for threads, name in OPENMSISTREAM.items()
                    }
                measured[counted(files)] = await alternate(
                    {name: side for name, side in sides.items() if name in told.sides}, told.rounds
                )
    for part, rounds in measured.items():
        print(f"\n{part}, {told.mebibytes} MiB, splits of {told.split_size} KiB\n")
        print(table(rounds, total, [side for side in BASES if side in rounds]))
    return measured


def parser() -> argparse.ArgumentParser:
    made = options(__doc__, 5)
    made.add_argument("--files", type=int, nargs="+", default=[8, 1], help="items of one run")
    made.add_argument("--mebibytes", type=int, default=1024, help="of all files together")
    made.add_argument("--split-size", type=int, default=512, help="KiB")
    sides = [CONSUME, *BASES]
    made.add_argument("--sides", nargs="+", choices=sides, default=list(sides))
    return made


def main(arguments: list[str] | None = None) -> None:
    told = parser().parse_args(arguments)
    measured = asyncio.run(run(told))
    print(f"\nevery run: {save('receive', told, measured)}")


if __name__ == "__main__":
    main()
