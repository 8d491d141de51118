"""System calls that fail below the root of real consumers: what waits, what starts again."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from brokers import Topics
from ferrying import Ferrying, ferrying
from shim import Shim, needs_shim
from splitferry_protocol.records import Abort
from stage import PATIENT, Consumer, until

pytestmark = needs_shim

Make = Callable[..., Awaitable[Topics]]
CATALOGUE = "/.splitferry/catalog.db"
INCOMING = "/.splitferry/incoming/"


class Fault(NamedTuple):
    call: str
    error: int
    where: str

    def __str__(self) -> str:
        return f"{self.call} {errno.errorcode[self.error]} at {self.where}"


WAITS = [
    Fault("open", errno.EIO, INCOMING),
    Fault("open", errno.EROFS, INCOMING),
    Fault("fallocate", errno.EIO, INCOMING),
    Fault("fallocate", errno.EDQUOT, INCOMING),
    Fault("write", errno.EIO, INCOMING),
    Fault("write", errno.ENOSPC, INCOMING),
    Fault("read", errno.EIO, INCOMING),
    Fault("truncate", errno.EIO, INCOMING),
    Fault("mkdir", errno.EDQUOT, "/new"),
    Fault("rename", errno.EIO, "/new"),
    Fault("open", errno.EMFILE, CATALOGUE),
    Fault("write", errno.ENOSPC, CATALOGUE),
    Fault("write", errno.EIO, CATALOGUE),
    Fault("fsync", errno.EIO, CATALOGUE),
]


@pytest.mark.timeout(180)
async def test_what_fails_is_tried_again_until_it_heals(
    bootstrap_servers: str, topics: Make, tmp_path: Path
) -> None:
    async with asyncio.TaskGroup() as both:
        for faults, name in ((WAITS[::2], "even"), (WAITS[1::2], "odd")):
            both.create_task(wait_and_heal(bootstrap_servers, topics, tmp_path / name, faults))


async def wait_and_heal(
    servers: str, topics: Make, directory: Path, faults: Sequence[Fault]
) -> None:
    """A call fails for as long as the disk is ill. The log tells `file write error` with the
    cause, the request has no result, others go on; within 30 s after the disk has healed the
    result says completed."""
    async with ferrying(servers, topics, directory) as ferry:
        shim, consumer = await preloaded(ferry, directory, SESSION_TIMEOUT=PATIENT)
        for number, fault in enumerate(faults):
            await waits_and_heals(ferry, shim, consumer, fault, f"new{number}/item")
        await ferry.finish()
        assert consumer.log.read_text().count("partition taken") == 1
        assert ferry.run.errors() == []


async def waits_and_heals(
    ferry: Ferrying, shim: Shim, consumer: Consumer, fault: Fault, unique_id: str
) -> None:
    before = consumer.heard("file write error")
    shim.fail(fault.call, fault.error, where=fault.where)
    *splits, first = ferry.item(unique_id=unique_id)
    # Room behind an item's end, to be cut off, is reserved only for one that comes in its order.
    order = [first, *splits] if fault.call == "truncate" else [*splits, first]
    request = await ferry.send(*order)
    await until(lambda: shim.hits(fault.call) > 1, f"tried again: {fault}")
    await until(lambda: consumer.heard("file write error") > before, f"it is told: {fault}")
    await ferry.goes_on(str(fault))
    assert ferry.told(request) is None, fault
    shim.heal()
    await ferry.ends(request, why=str(fault))


async def preloaded(ferry: Ferrying, directory: Path, **options: str) -> tuple[Shim, Consumer]:
    shim = Shim(ferry.run.root, directory / "shim")
    ferry.run.environment |= shim.environment
    consumer = await ferry.run.consumer(**options)
    await ferry.ends(await ferry.send(*ferry.item()), why="a start")
    return shim, consumer


@pytest.mark.timeout(180)
async def test_short_and_interrupted_calls_are_carried_on(
    bootstrap_servers: str, topics: Make, tmp_path: Path
) -> None:
    """Writes and reads move half of what they should, or are interrupted: nobody notices."""
    async with ferrying(bootstrap_servers, topics, tmp_path) as ferry:
        shim, consumer = await preloaded(ferry, tmp_path, SESSION_TIMEOUT=PATIENT)
        for where in (INCOMING, CATALOGUE):
            shim.short("write", where=where)
            shim.short("read", where=where)
            splits = ferry.item()
            # One comes twice: what is there is read back, and compared.
            request = await ferry.send(*splits[:2], splits[1], *splits[2:])
            await ferry.ends(request, why=f"short at {where}")
            assert shim.hits("write") > 1, where
            for call in ("write", "read", "fsync", "truncate", "fallocate"):
                shim.fail(call, errno.EINTR, times=3, where=where)
            await ferry.ends(await ferry.send(*ferry.item()), why=f"EINTR at {where}")
            assert shim.hits("write") == 3, where
            shim.heal()
        assert consumer.heard("partition taken") == 1
        await ferry.finish()


CONDEMNS = [
    Fault("fsync", errno.EIO, INCOMING),
    Fault("fsync", errno.ENOSPC, INCOMING),
    Fault("fsync", errno.EDQUOT, INCOMING),
    Fault("fsync directory", errno.EIO, INCOMING),
    Fault("fsync directory", errno.EIO, "/items"),
]


@pytest.mark.timeout(180)
async def test_what_could_not_be_synced_is_received_again(
    bootstrap_servers: str, topics: Make, tmp_path: Path
) -> None:
    """An fsync fails, and (as Linux does it) the next one succeeds although a page is lost. The
    log tells `partition is taken again: a write was lost`, the bytes come from Kafka once more,
    and the only result says completed."""
    async with ferrying(bootstrap_servers, topics, tmp_path) as ferry:
        shim, consumer = await preloaded(ferry, tmp_path)
        lost = "partition is taken again: a write was lost"
        for number, fault in enumerate(CONDEMNS, 1):
            if fault == CONDEMNS[0]:
                shim.lose(times=1, where=fault.where)
            else:
                shim.fail(fault.call, fault.error, times=1, where=fault.where)
            await ferry.ends(await ferry.send(*ferry.item()), why=str(fault))
            assert shim.hits(fault.call) == 1
            assert consumer.heard(lost) == number, fault
        # It goes on failing: others go on all the same, and when it has healed all is well.
        shim.fail("fsync", errno.EIO, where=INCOMING)
        request = await ferry.send(*ferry.item())
        await until(lambda: shim.hits("fsync") > 2, "tried again")
        await ferry.goes_on("while no file can be synced")
        assert ferry.told(request) is None
        shim.heal()
        await ferry.ends(request, why="after no file could be synced")
        await ferry.finish()


@pytest.mark.timeout(180)
async def test_a_death_at_a_chosen_call(
    bootstrap_servers: str, topics: Make, tmp_path: Path
) -> None:
    """SIGKILL just before the verdict is durable, before the rename, after it, and between two
    pages of the catalogue: the next consumer finishes what is decided."""
    deaths = [
        ("fsync", f"{CATALOGUE}-journal", 0),
        ("write", CATALOGUE, 3),
        ("fsync", CATALOGUE, 1),
        ("rename", "/items/", 0),
        ("fsync directory", "/items", 0),
        ("unlink", INCOMING, 0),
    ]
    async with ferrying(bootstrap_servers, topics, tmp_path) as ferry:
        shim, consumer = await preloaded(ferry, tmp_path)
        for call, where, skip in deaths:
            shim.kill(call, where=where, skip=skip)
            splits = ferry.item()
            # What is refused leaves its temporary file to be unlinked.
            ending = [Abort(splits[0].request, "enough")] if call == "unlink" else splits[-1:]
            request = await ferry.send(*splits[:-1], *ending)
            await death(consumer, f"{call} {where}")
            ferry.run.look()
            consumer = await ferry.run.consumer()
            told = "BatchTransferFailed" if call == "unlink" else "completed"
            await ferry.ends(request, told, f"after a death at {call} {where}")
        await ferry.finish()


async def death(consumer: Consumer, why: str) -> None:
    process = consumer._process
    assert process is not None
    await until(lambda: process.returncode is not None, f"a death at {why}")
    await consumer.stop()
