"""All faults, mixed at random from a seed, over real consumers and a real broker.

    python tests/soak/run.py [--minutes M] [--seed N] [--only WORD…] [--keep DIRECTORY]

Storms of one to three faults at once, each followed by a calm in which every partition has to
give a result within 30 s. Requests of every kind flow all the time. At the end everything is
compared with what the log says must have happened (`checker`). Exit code 1: something that may
never happen did.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import logging
import random
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError

sys.path.insert(0, str(Path(__file__).parents[1]))

from brokers import KillableBroker, make_topics
from checker import read_topic, reference, violations
from shim import Shim
from small_disk import can_mount, small_disk
from soak.storm import FAULTS, IGNORED, MIB, World, schema_is_sound
from splitferry_protocol.ids import RequestId
from splitferry_protocol.partitioning import partition_for
from splitferry_protocol.records import Abort
from stage import Stage, stage, until
from workload import KIB, Message, cut, make_load, message, send, sending

SIZES = [0, 1, 700, 20 * KIB, 200 * KIB, 20 * KIB, MIB]
PARTITIONS = 3
RESUMED = 30.0
"""Seconds: rule 8."""
PATIENCE = 90.0
"""Seconds that a stall is watched for, to say how long it was."""
PACE = 0.03
"""Seconds between two records."""
DISK = 1024 * MIB


class Feeder:
    """Sends requests of every kind without end, whatever the weather."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._nodes = itertools.count(10)
        self._producer: AIOKafkaProducer | None = None
        self._partitions = 0
        """As many as the producer knows of."""
        self.requests = 0
        self.bytes = 0

    async def run(self) -> None:
        while True:
            world = self._world
            load = make_load(world.rng, 8, world.partitions, SIZES, node=next(self._nodes))
            self.requests += 8
            for single in load:
                await self.send([single])
                await asyncio.sleep(PACE)

    async def send(self, messages: list[Message]) -> None:
        """Until it is sent. Twice is well, too: the log tells what was."""
        while True:
            try:
                if self._partitions != self._world.partitions:
                    await self.close()
                if self._producer is None:
                    self._partitions = self._world.partitions
                    self._producer = sending(self._world.run.servers)
                    await self._producer.start()
                await send(self._producer, self._world.run.names.splits, messages)
            except KafkaError:
                await self.close()
                await asyncio.sleep(0.5)
            else:
                self.bytes += sum(len(one.value or b"") for one in messages)
                return

    async def close(self) -> None:
        producer, self._producer = self._producer, None
        if producer is not None:
            with suppress(KafkaError, TimeoutError):
                async with asyncio.timeout(10):
                    await producer.stop()


async def storm(world: World, names: Sequence[str]) -> list[str]:
    """One to three of the faults `names`, of different families, for some seconds."""
    names = world.rng.sample(names, len(names))
    families: set[str] = set()
    chosen: list[str] = []
    for name in names:
        family = FAULTS[name][0]
        if family not in families and len(chosen) < world.rng.choice([1, 2, 3, 3]):
            families.add(family)
            chosen.append(name)
    await asyncio.gather(*(one_fault(world, name) for name in chosen))
    return chosen


async def one_fault(world: World, name: str) -> None:
    await asyncio.sleep(world.rng.uniform(0, 2))
    try:
        async with FAULTS[name][1](world):
            await asyncio.sleep(world.rng.uniform(0.5, 7))
    except IGNORED as trouble:  # its own tools met another fault
        world.counts["faults cut short"] += 1
        logging.getLogger(__name__).debug("%s: %s", name, trouble)
    world.counts[name] += 1


async def calm(world: World, feeder: Feeder, sequences: itertools.count[int]) -> float:
    """Seconds until every partition has given a result, from the end of the last fault."""
    began = time.monotonic()
    await world.man()
    waiting: list[RequestId] = []
    for partition in range(world.partitions):
        while True:
            request = RequestId(3, next(sequences))
            if partition_for(request.key, world.partitions) == partition:
                break
        await feeder.send([message(cut(request, b"after a storm", 100)[0], world.partitions)])
        waiting.append(request)
    await until(
        lambda: all(request in world.run.results for request in waiting), "progress", PATIENCE
    )
    return time.monotonic() - began


async def finish(world: World, feeder: Feeder) -> None:
    """End what producers left open, as an operator does, and let everything settle."""
    splits, _ = await read_topic(world.run.servers, world.run.names.splits)
    left = [o for o in reference(splits).openings.values() if o.status is None]
    world.counts["requests left open and aborted"] = len(left)
    for opening in left:
        ending = message(Abort(opening.request, "left by its producer"), world.partitions)
        await feeder.send([Message(ending.key, ending.value, ending.headers, opening.partition)])
    await world.run.settle()
    await asyncio.gather(*world.leaving)
    await world.run.stop()


@asynccontextmanager
async def setting(seed: int, directory: Path) -> AsyncIterator[World]:
    async with AsyncExitStack() as stack:
        broker = KillableBroker(directory / "broker")
        await stack.enter_async_context(broker)
        names = await make_topics(broker.bootstrap_servers, PARTITIONS)
        proxy = await stack.enter_async_context(broker.proxy())
        run: Stage = await stack.enter_async_context(
            stage(broker.bootstrap_servers, names, directory)
        )
        # Longer than any storm: a segment must still be there when its result can be read.
        run.lifetime = str(45 + float(run.lifetime) / 100)
        disk = await stack.enter_async_context(small_disk(run.root, DISK)) if can_mount() else None
        shim = Shim(run.root, directory / "shim")
        run.environment |= shim.environment
        yield World(run, broker, proxy, disk, shim, random.Random(seed), PARTITIONS)


async def soak(minutes: float, seed: int, directory: Path, faults: Sequence[str]) -> dict[str, Any]:
    storms = 0
    stalls: list[float] = []
    found: list[str] = []
    async with setting(seed, directory) as world:
        feeder = Feeder(world)
        sequences = itertools.count(1)
        await world.man()
        tasks = [asyncio.create_task(world.keep_manned()), asyncio.create_task(feeder.run())]
        until_then = time.monotonic() + minutes * 60
        try:
            while time.monotonic() < until_then:
                storms += 1
                weather = await storm(world, faults)
                try:
                    stalls.append(await calm(world, feeder, sequences))
                except AssertionError as cause:
                    found.append(f"8: after {', '.join(weather)}: {cause}")
                    break
                if stalls[-1] > RESUMED:
                    found.append(f"8: progress {stalls[-1]:.0f} s after {', '.join(weather)}")
                world.run.look()
                print(f"{stalls[-1]:5.1f} s after {', '.join(weather)}", flush=True)
                for task in tasks:
                    if task.done():
                        task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        if len(stalls) == storms:
            await finish(world, feeder)
        await feeder.close()
        history = await world.run.history()
        found += violations(history)
        found += [f"7: {line}" for line in unexpected(world.run)]
        if not schema_is_sound(world.run.root):
            found.append("the catalogue is damaged")
        return {
            "seed": seed,
            "minutes": minutes,
            "requests": len(reference(history.splits).openings),
            "results": len(world.run.results),
            "records": sum(len(log) for log in history.splits.values()),
            "bytes": sum(len(r.value or b"") for log in history.splits.values() for r in log),
            "partitions": world.partitions,
            "storms": storms,
            "faults": {name: world.counts[name] for name in FAULTS},
            "also": {k: v for k, v in sorted(world.counts.items()) if k not in FAULTS},
            "longest_stall_s": round(max(stalls), 1),
            "violations": found,
        }


def unexpected(run: Stage) -> list[str]:
    """Lines of the consumers' logs that nobody foresaw. What aiokafka logs is its own affair: it
    leaves futures of a fenced producer that nobody retrieves."""
    lines = [line for c in run.consumers for line in c.log.read_text().splitlines()]
    ours = [line for line in lines if '"logger": "splitferry_' in line or line[:1] != "{"]
    return [line for line in ours if "unexpected error" in line or "Traceback" in line]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    parser.add_argument("--only", nargs="+", default=[""], help="faults whose name has a word")
    parser.add_argument("--keep", type=Path, help="directory that keeps logs and data")
    given = parser.parse_args()
    faults = [name for name in sorted(FAULTS) if any(word in name for word in given.only)]
    logging.disable(logging.CRITICAL)  # of aiokafka in this process: the faults are wanted
    print(f"seed {given.seed}, {given.minutes:g} minutes", flush=True)
    with tempfile.TemporaryDirectory(prefix="soak-") as temporary:
        directory = given.keep or Path(temporary)
        directory.mkdir(parents=True, exist_ok=True)
        figures = asyncio.run(soak(given.minutes, given.seed, directory, faults))
    print(json.dumps(figures, indent=2))
    for violation in figures["violations"]:
        print(f"VIOLATION {violation}")
    return 1 if figures["violations"] else 0


if __name__ == "__main__":
    sys.exit(main())
