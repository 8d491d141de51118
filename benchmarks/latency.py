"""From the moment when a small request is due to its result, at several rates, open loop: the
next request is sent when it is due, whatever became of those before."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from load import GIB, KIB, Stage, options, stage
from rounds import Rounds, alternate, save, spread
from sides import consumer, folder, while_watched
from splitferry_cli.topic_rules import Names
from splitferry_producer import MemorySource, Producer
from splitferry_protocol.records import Block
from watched import Measurement, watched

WARM = 1.0
"""Seconds of requests that are not counted."""
KEPT = 1001


@dataclass(frozen=True, slots=True)
class Latencies(Measurement):
    """`seconds` and `cpu_seconds` are the consumer's while all requests were sent and answered.

    Attributes:
        delays: seconds, of the requests counted, from the least to the largest; of many, `KEPT`
            evenly spread over their ranks.
    """

    delays: list[float]

    def percentile(self, part: float) -> float:
        """Seconds within which `part` of the requests had their result."""
        return self.delays[round(part * (len(self.delays) - 1))]


def latencies(runs: Sequence[Measurement]) -> list[Latencies]:
    return [run for run in runs if isinstance(run, Latencies)]


async def run(told: argparse.Namespace) -> dict[str, Rounds]:
    measured: dict[str, Rounds] = {}
    async with stage(told, GIB) as here:
        for rate in told.rates:
            sides = {
                "memory": partial(ask, here, told, rate, Block.MEM),
                "files": partial(ask, here, told, rate, Block.FILE),
            }
            measured[f"{rate} a second"] = await alternate(
                {name: side for name, side in sides.items() if name in told.sides}, told.rounds
            )
    for part, rounds in measured.items():
        print(f"\n{part}, {told.size} bytes, {told.seconds} s\n")
        for side, runs in rounds.items():
            halves, most = (
                [run.percentile(p) * 1e3 for run in latencies(runs)] for p in (0.5, 0.99)
            )
            print(f"  {side:<8} p50 {spread(halves, '.0f')} ms, p99 {spread(most, '.0f')} ms")
    return measured


async def ask(here: Stage, told: argparse.Namespace, rate: int, block: Block) -> Measurement:
    """Send for some seconds to a consumer that is there, and wait for every result."""
    group = f"bench-{secrets.token_hex(4)}"
    async with here.topics() as names:
        with folder(here, "received") as root:
            arguments = consumer(here, names, group, root)
            async with watched(arguments, here.directory / "consumer.log") as process:
                work = _ask(here, names, told, rate, block)
                first, last, delays = await while_watched(process, work)
                found = process.measured(first, last)
    return Latencies(**dataclasses.asdict(found), delays=delays)


async def _ask(
    here: Stage, names: Names, told: argparse.Namespace, rate: int, block: Block
) -> tuple[float, float, list[float]]:
    data = secrets.token_bytes(told.size)
    uncounted = round(WARM * rate)
    count = uncounted + round(told.seconds * rate)
    delays = [0.0] * count

    async def one(number: int, due: float) -> None:
        result = await producer.send(
            MemorySource(data, block), unique_id=f"bench/{number}", version=1
        )
        assert result.success, result
        delays[number] = time.monotonic() - due

    async with Producer(
        here.connection,
        node_id=1,
        splits_topic=names.splits,
        results_topic=names.results,
        state_dir=here.directory / f"state-{names.splits}",
    ) as producer:
        warm = await producer.send(MemorySource(data, block), unique_id="bench/warm", version=1)
        assert warm.success, warm
        first, began = time.time(), time.monotonic()
        async with asyncio.TaskGroup() as group:
            for number in range(count):
                due = began + number / rate
                await asyncio.sleep(due - time.monotonic())
                group.create_task(one(number, due))
        return first, time.time(), thinned(delays[uncounted:])


def thinned(delays: list[float]) -> list[float]:
    ranked = [round(delay, 5) for delay in sorted(delays)]
    last = len(ranked) - 1
    return ranked if last < KEPT else [ranked[n * last // (KEPT - 1)] for n in range(KEPT)]


def parser() -> argparse.ArgumentParser:
    made = options(__doc__, 2)
    made.add_argument("--rates", type=int, nargs="+", default=[10, 100, 1000], help="a second")
    made.add_argument("--seconds", type=float, default=3.0, help="that are counted, of each run")
    made.add_argument("--size", type=int, default=KIB, help="bytes of each")
    sides = ["memory", "files"]
    made.add_argument("--sides", nargs="+", choices=sides, default=sides)
    return made


def main(arguments: list[str] | None = None) -> None:
    told = parser().parse_args(arguments)
    measured = asyncio.run(run(told))
    print(f"\nevery run: {save('latency', told, measured)}")


if __name__ == "__main__":
    main()
