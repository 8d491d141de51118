"""A disk or the memory is full, and then is not: under real consumers, on small file systems."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from brokers import Topics
from ferrying import ferrying
from shim import Shim, needs_shim
from small_disk import needs_mount, small_disk
from splitferry_protocol.records import Abort, Block, Status
from stage import LIFETIME, PATIENT, SHARED_MEMORY, until
from workload import KIB, MIB

pytestmark = [needs_mount, needs_shim]

Make = Callable[..., Awaitable[Topics]]


@pytest.mark.timeout(240)
async def test_full_disks_and_full_memory(
    bootstrap_servers: str, topics: Make, tmp_path: Path
) -> None:
    async with asyncio.TaskGroup() as all_:
        for fault in (waits_for_room, gives_up, waits_for_memory):
            all_.create_task(fault(bootstrap_servers, topics, tmp_path / fault.__name__))


async def waits_for_room(servers: str, topics: Make, directory: Path) -> None:
    """The disk is full to the last byte, in the middle of an item, for less than the write
    time-out. The log tells `file write error` with the cause, the request has no result,
    others go on; within 30 s after room was made the result says completed."""
    async with (
        ferrying(servers, topics, directory) as ferry,
        small_disk(ferry.run.root, 24 * MIB) as disk,
    ):
        consumer = await ferry.run.consumer(DISK_RESERVE="0", SESSION_TIMEOUT=PATIENT)
        await ferry.ends(await ferry.send(*ferry.item()), why="a start")
        splits = ferry.item(4 * MIB)
        half = await ferry.send(*splits[:10])
        await until(lambda: ferry.run.writing() == 1, "the first bytes are written")
        disk.fill()
        await ferry.send(*splits[10:])
        whole = await ferry.send(*ferry.item())
        aborted = await ferry.send(*ferry.item()[:2])
        await until(lambda: consumer.heard("file write error") > 2, "it is told")
        assert (
            " bytes of disk are free, 0 of them in reserve: make room" in consumer.log.read_text()
        )
        await ferry.send(Abort(aborted, "enough"))
        await ferry.goes_on("while the disk is full")
        assert {ferry.told(half), ferry.told(whole)} == {None}
        disk.free()
        for request in (half, whole):
            await ferry.ends(request, why="after room was made")
        await ferry.ends(aborted, "BatchTransferFailed")
        await ferry.finish()
        assert consumer.heard("partition taken") == 1
        assert ferry.run.errors() == []


async def gives_up(servers: str, topics: Make, directory: Path) -> None:
    """Only the reserve is left, for longer than the write time-out. The result says
    WriteDataFailed, the partition goes on, and takes files again once there is room. An item
    beyond the quota fails at once."""
    async with (
        ferrying(servers, topics, directory) as ferry,
        small_disk(ferry.run.root, 24 * MIB) as disk,
    ):
        await ferry.run.consumer(DISK_RESERVE="8MiB", WRITE_TIMEOUT="3", QUOTA="6MiB")
        await ferry.ends(await ferry.send(*ferry.item()), why="a start")
        disk.fill(leave=8 * MIB)
        large = await ferry.send(*ferry.item(4 * MIB))
        open_ = ferry.item(500 * KIB)
        unfinished = await ferry.send(*open_[:-1])
        for request in (large, unfinished):
            await ferry.ends(request, "WriteDataFailed", "beyond the write time-out")
        error = ferry.run.results[large].error
        assert error is not None
        assert "8388608 of them in reserve: make room" in error.message
        await ferry.goes_on("behind those that were given up")
        await ferry.send(open_[-1])
        disk.free()
        await ferry.ends(await ferry.send(*ferry.item(4 * MIB)), why="there is room again")
        await ferry.ends(await ferry.send(*ferry.item(3 * MIB)), "BatchTransferFailed", "quota")
        excused = {
            request: (Status.FAILED, told)
            for request in ferry.run.results
            if (told := ferry.told(request)) in {"WriteDataFailed", "BatchTransferFailed"}
        }
        assert len(excused) == 3
        await ferry.finish(excused)
        assert ferry.run.errors() == []


async def waits_for_memory(servers: str, topics: Make, directory: Path) -> None:
    """Beyond `--memory-limit`, or with /dev/shm full: the log tells `memory write error` with the
    cause, items for the memory wait and files go on; within 30 s after room was made they are
    complete. One that is larger than the limit fails at once."""
    async with ferrying(servers, topics, directory) as ferry:
        shim = Shim(SHARED_MEMORY, directory / "shim")
        ferry.run.environment |= shim.environment
        # So that the first is still there when the second comes, however busy the machine is.
        ferry.run.lifetime = str(2 * LIFETIME + float(ferry.run.lifetime))
        consumer = await ferry.run.consumer(MEMORY_LIMIT="1MiB")

        async def waits(cause: str) -> None:
            await until(lambda: cause in consumer.log.read_text(), f"it is told: {cause}")
            assert consumer.heard("memory write error") > 0
            await ferry.goes_on("while the memory is full", Block.FILE)

        # Alone: beside another that waits with half of its bytes, both would hold what the other
        # one needs, up to the write time-out.
        large = await ferry.send(*ferry.item(2 * MIB, block=Block.MEM))
        await ferry.ends(large, "BatchTransferFailed", "larger than the limit")
        first = await ferry.send(*ferry.item(700 * KIB, block=Block.MEM))
        await ferry.ends(first)
        second = await ferry.send(*ferry.item(700 * KIB, block=Block.MEM))
        await waits("the memory limit of 1048576 bytes is reached")
        await ferry.ends(second, why="the lifetime of the first is over")

        shim.fail("fallocate", errno.ENOSPC, where="/splitferry-")
        third = await ferry.send(*ferry.item(block=Block.MEM))
        await waits("No space left on device")
        assert ferry.told(third) is None
        shim.heal()
        await ferry.ends(third, why="there is room again")
        await ferry.finish({large: (Status.FAILED, "BatchTransferFailed")})
        assert ferry.run.errors() == []
