"""Sending and receiving at once: from the first byte sent to the last result seen, beside a bare
aiokafka producer and a bare drain that do nothing with the bytes."""

from __future__ import annotations

import argparse
import asyncio
import secrets
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from load import GIB, KIB, MIB, PARTITIONS, Stage, options, stage
from rounds import Rounds, alternate, counted, save, table
from send import BEST, make_files, transmit
from sides import Results, consumer, drain_arguments, folder, while_watched
from watched import Measurement, Watched, watched

OWN, BARE = "send and consume", "bare aiokafka"


async def run(told: argparse.Namespace) -> dict[str, Rounds]:
    total = told.mebibytes * MIB
    measured: dict[str, Rounds] = {}
    async with stage(told, 4 * total + GIB) as here:
        for files in told.files:
            with folder(here, "files") as path:
                make_files(path, files, total)
                sides = {
                    OWN: partial(own, here, path, told, files),
                    BARE: partial(bare, here, path, told, files),
                }
                measured[counted(files)] = await alternate(sides, told.rounds)
    for part, rounds in measured.items():
        print(f"\n{part}, {told.mebibytes} MiB, splits of {told.split_size} KiB\n")
        print(table(rounds, total, [BARE]))
    return measured


async def own(here: Stage, path: Path, told: argparse.Namespace, files: int) -> Measurement:
    """To the moment when a read_committed reader of the results topic has the last result."""
    async with here.topics() as names, Results.of(here, names, PARTITIONS) as results:
        with folder(here, "received") as root:
            measurement = await _both(
                here,
                transmit(here, names.splits, path, told, "own"),
                consumer(here, names, f"bench-{secrets.token_hex(4)}", root),
                lambda receiver: receiver.printed("partition taken", PARTITIONS),
                lambda receiver: results.after(files),
            )
        results.check()
        return measurement


async def bare(here: Stage, path: Path, told: argparse.Namespace, files: int) -> Measurement:
    """To the moment when the last record was handed out."""
    async with here.topics() as names:
        records = files * -(-told.mebibytes * MIB // files // (told.split_size * KIB))
        return await _both(
            here,
            transmit(here, names.splits, path, told, "bare"),
            drain_arguments(here, names, range(min(files, PARTITIONS)), records),
            lambda receiver: receiver.printed("ready"),
            lambda receiver: receiver.printed("last"),
        )


async def _both(
    here: Stage,
    sending: Sequence[str],
    receiving: Sequence[str],
    ready: Callable[[Watched], Coroutine[Any, Any, float]],
    received: Callable[[Watched], Coroutine[Any, Any, float]],
) -> Measurement:
    """Start the receiver and, once it is ready, the sender; both costs together."""
    async with watched(receiving, here.directory / "receiver.log") as receiver:
        await while_watched(receiver, ready(receiver))
        async with watched(sending, here.directory / "program.log") as sender:
            work = while_watched(sender, received(receiver))
            last = await while_watched(receiver, work)
            first = (await sender.said("last"))["first"]
            return receiver.measured(first, last) + sender.measured(first, last)


def parser() -> argparse.ArgumentParser:
    made = options(__doc__, 3)
    made.add_argument("--files", type=int, nargs="+", default=[8], help="items of one run")
    made.add_argument("--mebibytes", type=int, default=1024, help="of all files together")
    made.add_argument("--split-size", type=int, default=512, help="KiB")
    made.set_defaults(**BEST)
    return made


def main(arguments: list[str] | None = None) -> None:
    told = parser().parse_args(arguments)
    measured = asyncio.run(run(told))
    print(f"\nevery run: {save('end_to_end', told, measured)}")


if __name__ == "__main__":
    main()
