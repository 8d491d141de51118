"""Peak RSS of the consumer while 8 partitions have a backlog of one file each: it must not grow
with the payload."""

from __future__ import annotations

import argparse
import asyncio
from functools import partial

from load import GIB, KIB, MIB, PARTITIONS, options, stage
from rounds import Rounds, alternate, save, table
from sides import consume


async def run(told: argparse.Namespace) -> dict[str, Rounds]:
    measured: dict[str, Rounds] = {}
    async with stage(told, 2 * max(told.mebibytes) * MIB + 2 * GIB) as here:
        for mebibytes in told.mebibytes:
            total = mebibytes * MIB
            async with here.loaded(PARTITIONS, total, told.split_size * KIB) as load:
                name = f"{mebibytes} MiB"
                measured[name] = await alternate(
                    {"consume": partial(consume, here, load)}, told.rounds
                )
                print(f"\n{name}\n\n{table(measured[name], total, [])}\n")
    return measured


def parser() -> argparse.ArgumentParser:
    made = options(__doc__, 1)
    sizes = [64, 512, 4096]
    made.add_argument("--mebibytes", type=int, nargs="+", default=sizes, help="of all files")
    made.add_argument("--split-size", type=int, default=512, help="KiB")
    return made


def main(arguments: list[str] | None = None) -> None:
    told = parser().parse_args(arguments)
    measured = asyncio.run(run(told))
    print(f"\nevery run: {save('memory', told, measured)}")


if __name__ == "__main__":
    main()
