"""The wall clock of real consumers steps while they run."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from aiokafka.admin.config_resource import ConfigResource

from brokers import Topics, administrator
from ferrying import ferrying
from shim import Shim, needs_shim
from splitferry_protocol.records import Block, Status
from stage import PATIENT, until
from workload import KIB

pytestmark = needs_shim

Make = Callable[..., Awaitable[Topics]]
HOUR, YEAR = 3600.0, 365 * 86400.0
IDLE = 10.0


@pytest.mark.timeout(180)
async def test_steps_of_the_wall_clock(
    bootstrap_servers: str, topics: Make, tmp_path: Path
) -> None:
    async with asyncio.TaskGroup() as both:
        for fault in (unnoticed, refused):
            both.create_task(fault(bootstrap_servers, topics, tmp_path / fault.__name__))


async def unnoticed(servers: str, topics: Make, directory: Path) -> None:
    """Forwards and backwards, by an hour and by a year. Nobody notices, but `finished_at`: items
    go through, an idle request expires after its true time, and what a dead consumer left in
    the shared memory goes after its lifetime."""
    async with ferrying(servers, topics, directory) as ferry:
        run = ferry.run
        shim = Shim(run.root, directory / "shim")
        run.environment |= shim.environment
        consumer = await run.consumer(IDLE_TIMEOUT=str(IDLE), SESSION_TIMEOUT=PATIENT)
        await ferry.ends(await ferry.send(*ferry.item()), why="a start")
        began = time.monotonic()  # before it is read: that may be before the broker's answer
        idle = await ferry.send(*ferry.item()[:-1])
        for step in (HOUR, -HOUR, YEAR, -YEAR):
            shim.step_clock(step)
            request = await ferry.send(*ferry.item())
            await ferry.ends(request, why=f"after a step of {step:g} s")
            await ferry.goes_on(f"after a step of {step:g} s")
            finished = run.results[request].finished_at / 1000
            assert abs(finished - time.time() - step) < 60
            await asyncio.sleep(1)  # the next step finds it at rest
        await ferry.ends(idle, "BatchTransferFailed", "idle too long")
        assert time.monotonic() - began > IDLE
        assert run.results[idle].status is Status.EXPIRED
        left = await ferry.send(*ferry.item(KIB, block=Block.MEM))
        await ferry.ends(left)
        await consumer.kill()
        shim.step_clock(-2 * YEAR)
        successor = await run.consumer()
        await until(lambda: successor.heard("partition taken") >= 1, "a successor")
        await run.freed()
        await ferry.finish({idle: (Status.EXPIRED, "BatchTransferFailed")})
        assert consumer.log.read_text().count("partition taken") == 1
        assert run.errors() == []


async def refused(servers: str, topics: Make, directory: Path) -> None:
    """The results topic keeps its writers' times, not as `splitferry topics create` makes it,
    and takes none that is more than an hour ahead. The log tells `partition is taken again` with
    the remedy; within 30 s after the clock was set right requests have their results."""

    async def keeping_writers_times(partitions: int) -> Topics:
        names = await topics(partitions=partitions)
        settings = {"message.timestamp.type": "CreateTime"}
        async with administrator(servers) as admin:
            await admin.alter_configs([ConfigResource("topic", names.results, settings)])
        return names

    async with ferrying(servers, keeping_writers_times, directory) as ferry:
        shim = Shim(ferry.run.root, directory / "shim")
        ferry.run.environment |= shim.environment
        consumer = await ferry.run.consumer()
        await ferry.ends(await ferry.send(*ferry.item()), why="a start")
        shim.step_clock(2 * HOUR)
        request = await ferry.send(*ferry.item())
        await until(lambda: consumer.heard("partition is taken again") > 1, "it is told")
        assert "set this host's clock right" in consumer.log.read_text()
        assert ferry.told(request) is None
        shim.step_clock(0)
        await ferry.ends(request, why="the clock is right")
        await ferry.finish()
