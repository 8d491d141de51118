"""Peak RSS of the consumer while it receives one large file: it must not grow with the payload."""

from __future__ import annotations

import argparse
import asyncio

from load import GIB, KIB, MIB, options, require_space, stage
from rounds import Rounds, save, table
from sides import consume

MOST = 200
"""MiB."""


async def run(told: argparse.Namespace) -> dict[str, Rounds]:
    total = told.mebibytes * MIB
    require_space(told.directory, 2 * total + 2 * GIB)
    async with stage(told) as here, here.loaded(1, total, told.split_size * KIB, 8) as load:
        measured = {"1 file": {"consume": [await consume(here, load)]}}
    print(f"\n1 file of {told.mebibytes} MiB, splits of {told.split_size} KiB\n")
    print(table(measured["1 file"], total, []))
    print(f"\nat most {MOST} MiB of RSS are wanted")
    return dict(measured)


def parser() -> argparse.ArgumentParser:
    made = options(__doc__)
    made.add_argument("--mebibytes", type=int, default=4096, help="of the file")
    made.add_argument("--split-size", type=int, default=512, help="KiB")
    return made


def main(arguments: list[str] | None = None) -> None:
    told = parser().parse_args(arguments)
    measured = asyncio.run(run(told))
    settings = {"mebibytes": told.mebibytes, "split_kib": told.split_size}
    print(f"\nevery run: {save('memory', settings, measured)}")


if __name__ == "__main__":
    main()
