"""How fast files are sent, beside a bare aiokafka producer that sends as many bytes from memory,
and beside OpenMSIStream's upload."""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
from functools import partial
from pathlib import Path

import openmsistream
from load import GIB, KIB, MIB, Stage, options, stage
from rounds import Rounds, alternate, counted, save, table
from sides import HERE, folder, program
from watched import Measurement

SEND, BARE, OPENMSISTREAM = "send", "bare aiokafka", "OpenMSIStream"
BEST = {"batch_size": MIB, "in_flight": 16, "linger": 0}
"""Of the bare producer, with idempotence, acks=all and no compression."""
_nodes = itertools.count(1)


async def run(told: argparse.Namespace) -> dict[str, Rounds]:
    measured: dict[str, Rounds] = {}
    total = told.mebibytes * MIB
    if OPENMSISTREAM in told.sides and not openmsistream.installed():
        told.sides.remove(OPENMSISTREAM)
    async with stage(told, 6 * total + GIB) as here:
        for files in told.files:
            with folder(here, "files") as path:
                make_files(path, files, total)
                sides = {
                    SEND: partial(send, here, path, told, "own"),
                    BARE: partial(send, here, path, told, "bare"),
                    OPENMSISTREAM: partial(openmsistream.upload, here, path),
                }
                measured[counted(files)] = await alternate(
                    {name: side for name, side in sides.items() if name in told.sides}, told.rounds
                )
    for part, rounds in measured.items():
        print(f"\n{part}, {told.mebibytes} MiB, splits of {told.split_size} KiB\n")
        print(table(rounds, total, [side for side in (BARE, OPENMSISTREAM) if side in rounds]))
    return measured


def make_files(folder: Path, files: int, total: int) -> None:
    """As many of equal size, in the page cache and on the disk."""
    for number in range(files):
        with (folder / f"{number}.bin").open("wb") as file:
            for _ in range(0, total // files, MIB):
                file.write(os.urandom(MIB))
    os.sync()


async def send(stage: Stage, path: Path, told: argparse.Namespace, side: str) -> Measurement:
    """From the first byte, connected, to the last confirmation, into topics of its own."""
    async with stage.topics() as names:
        return await program(stage, transmit(stage, names.splits, path, told, side))


def transmit(
    stage: Stage, topic: str, path: Path, told: argparse.Namespace, side: str
) -> list[str]:
    return [
        *(str(HERE / "transmit.py"), side, stage.servers, topic, str(path)),
        f"--split-size={told.split_size * KIB}",
        f"--node-id={next(_nodes)}",
        *(f"--{name.replace('_', '-')}={getattr(told, name)}" for name in BEST),
    ]


def parser() -> argparse.ArgumentParser:
    made = options(__doc__, 5)
    made.add_argument("--files", type=int, nargs="+", default=[8, 1], help="items of one run")
    made.add_argument("--mebibytes", type=int, default=1024, help="of all files together")
    made.add_argument("--split-size", type=int, default=512, help="KiB")
    for name, best in BEST.items():
        made.add_argument(f"--{name.replace('_', '-')}", type=int, default=best, help="bare")
    sides = [SEND, BARE, OPENMSISTREAM]
    made.add_argument("--sides", nargs="+", choices=sides, default=list(sides))
    return made


def main(arguments: list[str] | None = None) -> None:
    told = parser().parse_args(arguments)
    measured = asyncio.run(run(told))
    print(f"\nevery run: {save('send', told, measured)}")


if __name__ == "__main__":
    main()
