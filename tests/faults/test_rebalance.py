"""Consumers join and leave under load, politely and by SIGKILL."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from brokers import Topics
from checker import violations
from stage import Consumer, Stage, stage, until
from workload import KIB, MIB, make_load, send_slowly, sending

SEED = int(os.environ.get("SPLITFERRY_FAULT_SEED", random.SystemRandom().randrange(2**32)))
STEPS = 14
REQUESTS = 150
PARTITIONS = 4


@pytest.mark.timeout(400)
async def test_joining_and_leaving(
    bootstrap_servers: str, topics: Callable[..., Awaitable[Topics]], tmp_path: Path
) -> None:
    print(f"SPLITFERRY_FAULT_SEED={SEED}")
    rng = random.Random(SEED)
    load = make_load(rng, REQUESTS, PARTITIONS, [0, 1, 700, 20 * KIB, 300 * KIB, 2 * MIB])
    names = await topics(partitions=PARTITIONS)
    async with stage(bootstrap_servers, names, tmp_path) as run, sending(run.servers) as producer:
        members = [await run.consumer(), await run.consumer()]
        await until(lambda: sum(m.heard("partition taken") for m in members) > 0, "a start")
        # Each step brings its share, so that every change of the group happens under load.
        for number in range(STEPS):
            share = load[len(load) * number // STEPS : len(load) * (number + 1) // STEPS]
            feeding = asyncio.create_task(send_slowly(producer, names.splits, share, 1.5))
            await asyncio.sleep(rng.uniform(0.1, 1.0))
            await change(run, members, rng, number)
            await feeding
            run.look()
        await run.settle()
        await run.stop()
        assert violations(await run.history()) == [], f"seed {SEED}"
        assert run.errors() == []
        taken = sum(consumer.heard("partition taken") for consumer in run.consumers)
        assert taken > 2 * PARTITIONS, "partitions have moved"


async def change(run: Stage, members: list[Consumer], rng: random.Random, number: int) -> None:
    """One member more, or one less; two of three leave by SIGTERM. Never nobody, at most three."""
    if len(members) == 1 or (len(members) == 2 and rng.random() < 0.5):
        members.append(await run.consumer())
        if rng.random() < 0.7:
            await until(lambda: members[-1].heard("partitions assigned") > 0, "a member joins")
        return
    leaving = members.pop(rng.randrange(len(members)))
    if number % 3 == 0:
        await leaving.kill()
    elif leaving.heard("partitions assigned"):
        assert await leaving.stop() == 0
    else:  # not even started: SIGTERM would find no handler yet
        await leaving.kill()
