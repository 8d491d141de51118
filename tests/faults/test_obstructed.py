"""What stands in the way of an item's path, and a root that goes away and comes back."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from brokers import Topics
from checker import violations
from ferrying import Ferrying, ferrying
from shim import Shim, needs_shim
from small_disk import needs_mount, small_disk
from splitferry_protocol.ids import RequestId
from splitferry_protocol.records import Split, Status
from stage import PATIENT, Consumer, until
from workload import MIB

Make = Callable[..., Awaitable[Topics]]


@needs_shim
@needs_mount
@pytest.mark.timeout(240)
async def test_obstructed_paths_and_a_root_that_goes_away(
    bootstrap_servers: str, topics: Make, tmp_path: Path
) -> None:
    async with asyncio.TaskGroup() as all_:
        for fault in (obstructed, removed, moved, unmounted):
            all_.create_task(fault(bootstrap_servers, topics, tmp_path / fault.__name__))


async def obstructed(servers: str, topics: Make, directory: Path) -> None:
    """A directory, a file or a symbolic link where the path leads, from the beginning or since
    the verdict: the result says WriteDataFailed with the obstacle, others go on, and the next
    request for the path goes through once it is free. Nothing is written beyond the link."""
    async with ferrying(servers, topics, directory) as ferry:
        root = ferry.run.root
        shim = Shim(root, directory / "shim")
        ferry.run.environment |= shim.environment
        consumer = await ferry.run.consumer(SESSION_TIMEOUT=PATIENT)
        await ferry.ends(await ferry.send(*ferry.item()), why="a start")
        elsewhere = directory / "elsewhere"
        elsewhere.mkdir()
        (root / "directory").mkdir()
        (root / "file").symlink_to(elsewhere / "file")
        (root / "linked").symlink_to(elsewhere)
        paths = ("directory", "file", "linked/item", f"items/{RequestId(1, 1)}/below")
        refused = [await ferry.send(*ferry.item(unique_id=path)) for path in paths]
        shim.delay("rename", 5.0, times=1, where="/late")
        refused.append(await ferry.send(*ferry.item(unique_id="late")))
        await until(lambda: shim.hits("rename") == 1, "between the verdict and the rename")
        (root / "late").mkdir()
        said = []
        for request in refused:
            await ferry.ends(request, "WriteDataFailed", "obstructed")
            error = ferry.run.results[request].error
            assert error is not None
            said.append(error.message.partition(": ")[2])
        assert said == [
            "a directory stands there",
            "a symbolic link stands there",
            "the path leads through a file or a symbolic link",
            "the path leads through a file or a symbolic link",
            "a directory stands there",
        ]
        await ferry.goes_on("beside what is obstructed")
        assert list(elsewhere.iterdir()) == []
        (root / "directory").rmdir()
        (root / "late").rmdir()
        for name in ("file", "linked"):
            (root / name).unlink()
        for unique_id in ("directory", "file", "linked/item", "late"):
            await ferry.ends(await ferry.send(*ferry.item(unique_id=unique_id)), why="free")
        await ferry.finish(dict.fromkeys(refused, (Status.FAILED, "WriteDataFailed")))
        assert consumer.heard("partition taken") == 1


async def half(ferry: Ferrying) -> tuple[RequestId, list[Split]]:
    """A request that is being written, and the splits that it lacks."""
    splits = ferry.item()
    request = await ferry.send(*splits[:2])
    await until(lambda: ferry.run.writing() == 1, "half an item")
    return request, splits[2:]


async def waits(
    ferry: Ferrying, consumer: Consumer, request: RequestId, event: str, remedy: str
) -> None:
    await until(lambda: consumer.heard(event) > 0, "it is told")
    assert remedy in consumer.log.read_text()
    await ferry.goes_on("without the root")
    assert ferry.told(request) is None


async def removed(servers: str, topics: Make, directory: Path) -> None:
    """Our own directories below the root are removed under a consumer, in the middle of an item:
    the log tells that they are made anew, what was on its way in is received again, and within
    30 s it is complete."""
    async with ferrying(servers, topics, directory) as ferry:
        private = ferry.run.root / ".splitferry"
        consumer = await ferry.run.consumer()
        await ferry.ends(await ferry.send(*ferry.item()), why="a start")
        for number, path in enumerate((private, private / "incoming"), 1):
            request, rest = await half(ferry)
            shutil.rmtree(path)
            await ferry.send(*rest)
            await ferry.ends(request, why=f"without {path.name}")
            assert consumer.heard("our directories were removed and are made anew") == number
        await ferry.finish()


async def moved(servers: str, topics: Make, directory: Path) -> None:
    """The root is moved under a consumer, in the middle of an item: the log tells `catalogue
    unusable` with the remedy, files wait, others go on; within 30 s after it is back files go
    on. It is deleted: the log tells `root unusable`, and the same holds until one is made."""
    async with ferrying(servers, topics, directory) as ferry:
        root = ferry.run.root
        consumer = await ferry.run.consumer()
        await ferry.ends(await ferry.send(*ferry.item()), why="a start")
        request, rest = await half(ferry)
        away = root.with_name("away")
        root.rename(away)
        await ferry.send(*rest)
        await waits(ferry, consumer, request, "catalogue unusable", "put that one back")
        assert not root.exists()
        away.rename(root)
        await ferry.ends(request, why="the root is back")

        shutil.rmtree(root)
        request = await ferry.send(*ferry.item())
        await waits(ferry, consumer, request, "root unusable", "make it, or put it back")
        assert not root.exists()
        root.mkdir()
        await ferry.ends(request, why="a new root")
        await ferry.run.settle()
        await ferry.run.stop()
        lost = [v for v in violations(await ferry.run.history()) if "is missing" not in v]
        assert lost == []


async def unmounted(servers: str, topics: Make, directory: Path) -> None:
    """The file system of the root is unmounted under a consumer. The log tells `catalogue
    unusable`, nothing is written to the directory below, others go on; within 30 s after it was
    mounted again files go on."""
    async with (
        ferrying(servers, topics, directory) as ferry,
        small_disk(ferry.run.root, 24 * MIB) as disk,
    ):
        consumer = await ferry.run.consumer(DISK_RESERVE="0")
        await ferry.ends(await ferry.send(*ferry.item()), why="a start")
        request, rest = await half(ferry)
        await disk.take_away()
        await ferry.send(*rest)
        await waits(ferry, consumer, request, "catalogue unusable", "put that one back")
        assert list(ferry.run.root.iterdir()) == []
        await disk.give_back()
        await ferry.ends(request, why="mounted again")
        await ferry.finish()
