"""The broker dies, freezes and is started again, with consumers at work."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from brokers import KillableBroker, make_topics
from checker import violations
from stage import stage, until
from workload import KIB, MIB, make_load, send_slowly, sending

SEED = int(os.environ.get("SPLITFERRY_FAULT_SEED", random.SystemRandom().randrange(2**32)))
FROZEN = float(os.environ.get("SPLITFERRY_FROZEN", "5"))
"""Seconds. Longer than the session time-out, and than a request may take at 12 and more."""
PARTITIONS = 3
SIZES = [0, 1, 700, 20 * KIB, 300 * KIB, 2 * MIB]
RESUMED = 30.0
"""Seconds after the broker answers again (rule 8)."""


async def killed(broker: KillableBroker) -> None:
    """SIGKILL, and a new start with the same data. The test waits for a transaction first."""
    await broker.kill()
    await broker.start()


async def restarted(broker: KillableBroker) -> None:
    """Stopped as an operator does, and started again."""
    await broker.stop()
    await broker.start()


async def frozen(broker: KillableBroker) -> None:
    """SIGSTOP: all connections stay, and nothing is answered."""
    broker.freeze()
    try:
        await asyncio.sleep(FROZEN)
    finally:
        broker.thaw()


FAULTS: list[Callable[[KillableBroker], Awaitable[None]]] = [killed, restarted, frozen]


@pytest.mark.timeout(400)
async def test_a_broker_that_dies_or_freezes(
    killable_broker: KillableBroker, tmp_path: Path
) -> None:
    """The log tells of failed polls and of partitions that are taken again, as warnings; no
    consumer ends. Results wait until the broker is back, none is lost or told twice, and within
    30 s of its first answer all that was sent before has its result.
    """
    print(f"SPLITFERRY_FAULT_SEED={SEED}")
    rng = random.Random(SEED)
    servers = killable_broker.bootstrap_servers
    names = await make_topics(servers, PARTITIONS)
    async with stage(servers, names, tmp_path) as run, sending(servers) as producer:
        members = [await run.consumer(), await run.consumer()]
        await until(lambda: sum(m.heard("partition taken") for m in members) > 0, "a start")
        for number, fault in enumerate(FAULTS):
            share = make_load(rng, 24, PARTITIONS, SIZES, node=10 + number)
            # It goes on while the broker is away, as any producer would.
            feeding = asyncio.create_task(send_slowly(producer, names.splits, share, 3))
            await asyncio.sleep(1)
            if fault is killed:
                await until(run.transaction_open, "a transaction")
            await fault(killable_broker)
            back = time.monotonic()
            await feeding
            await until(run.caught_up, f"all is done after {fault.__name__}", RESUMED)
            print(f"{fault.__name__}: all done {time.monotonic() - back:.1f} s after its return")
        await run.settle()
        await run.stop()
        assert violations(await run.history()) == [], f"seed {SEED}"
        # Beyond 20 s of silence a membership is ended, as an error, and another begun.
        assert [line for line in run.errors() if "joining again" not in line] == []
