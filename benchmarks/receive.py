"""How fast a backlog is received, beside a bare aiokafka drain of the same topic and beside
writing the same bytes to the disk."""

from __future__ import annotations

import argparse
import asyncio
from functools import partial
from typing import Any

from load import GIB, KIB, MIB, options, require_space, stage
from rounds import Rounds, alternate, ratios, save, spread, table
from sides import consume, disk, drain

PARTITIONS = 8
DRAIN, DRAIN_UNCHECKED, CONSUME = "drain, CRC on", "drain, CRC off", "consume"
LEAST = 0.6
"""Of the speed of the bare drain."""


async def run(told: argparse.Namespace) -> dict[str, Rounds]:
    total = told.mebibytes * MIB
    require_space(told.directory, 4 * total + GIB)
    measured: dict[str, Rounds] = {}
    async with stage(told) as here:
        for files in told.files:
            async with here.loaded(files, total, told.split_size * KIB, PARTITIONS) as load:
                sides = {
                    DRAIN: partial(drain, here, load, check_crcs=True),
                    DRAIN_UNCHECKED: partial(drain, here, load, check_crcs=False),
                    CONSUME: partial(consume, here, load),
                    "disk": partial(disk, here, load),
                }
                measured[f"{files} files"] = await alternate(sides, told.rounds)
    for part, rounds in measured.items():
        print(f"\n{part}, {told.mebibytes} MiB, splits of {told.split_size} KiB\n")
        print(table(rounds, total, [DRAIN, DRAIN_UNCHECKED]))
        reached = ratios(rounds, CONSUME, DRAIN)
        print(f"\nconsume at {spread(reached)} of the bare drain; at least {LEAST} is wanted")
    return measured


def parser() -> argparse.ArgumentParser:
    made = options(__doc__)
    made.add_argument("--rounds", type=int, default=5)
    made.add_argument("--files", type=int, nargs="+", default=[8, 1], help="items of one run")
    made.add_argument("--mebibytes", type=int, default=1024, help="of all files together")
    made.add_argument("--split-size", type=int, default=512, help="KiB")
    return made


def main(arguments: list[str] | None = None) -> None:
    told = parser().parse_args(arguments)
    measured = asyncio.run(run(told))
    settings: dict[str, Any] = {
        "rounds": told.rounds,
        "mebibytes": told.mebibytes,
        "split_kib": told.split_size,
        "partitions": PARTITIONS,
    }
    print(f"\nevery run: {save('receive', settings, measured)}")


if __name__ == "__main__":
    main()
