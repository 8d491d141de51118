"""The catalogue is locked, deleted, damaged, replaced: under a real consumer, and then mended."""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path

import pytest

from brokers import Topics
from ferrying import ferrying
from shim import Shim, needs_shim
from stage import PATIENT, Consumer, until

Make = Callable[..., Awaitable[Topics]]


def delete(path: Path) -> None:
    path.unlink()


def delete_with_its_journal(path: Path) -> None:
    path.unlink()
    path.with_name("catalog.db-journal").unlink()


def overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"\xff" * path.stat().st_size)


def cut_off(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def make_a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def make_foreign(path: Path) -> None:
    path.unlink()
    with closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE items (name)")
        database.execute("PRAGMA user_version = 1")


def make_newer(path: Path) -> None:
    path.unlink()
    with closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE verdicts (name)")
        database.execute("PRAGMA user_version = 99")


def move_away(path: Path) -> None:
    path.rename(path.with_name(f"moved-{os.urandom(4).hex()}"))
    path.with_name("catalog.db-journal").unlink(missing_ok=True)


def unusable(consumer: Consumer, times: int) -> Callable[[], bool]:
    return lambda: consumer.heard("catalogue unusable") == times


MADE_ANEW = [delete, delete_with_its_journal, empty]
"""What forgets the versions held, and stops nothing."""
UNUSABLE = [overwrite, cut_off, make_a_directory, make_foreign, make_newer]
"""What waits until somebody has moved the catalogue away, or has put back a copy."""


@pytest.mark.timeout(240)
async def test_a_catalogue_that_breaks_under_a_consumer(
    bootstrap_servers: str, topics: Make, tmp_path: Path
) -> None:
    """Deleted or emptied: the log tells `no catalogue`, and the next one knows no versions; it
    goes on at once. Damaged or replaced: the log tells `catalogue unusable` with the remedy,
    files wait, others go on; within 30 s after it was moved away, or a copy put back, files go
    on. No result is wrong, and none comes twice."""
    async with ferrying(bootstrap_servers, topics, tmp_path) as ferry:
        consumer = await ferry.run.consumer(SESSION_TIMEOUT=PATIENT)
        path = ferry.run.root / ".splitferry" / "catalog.db"
        await ferry.ends(await ferry.send(*ferry.item()), why="a start")
        for number, damage in enumerate(MADE_ANEW, 1):
            damage(path)
            await ferry.ends(await ferry.send(*ferry.item()), why=damage.__name__)
            assert consumer.heard("no catalogue") == number, damage
        for number, damage in enumerate(UNUSABLE, 1):
            sound = path.read_bytes()
            damage(path)
            request = await ferry.send(*ferry.item(unique_id="known", version=number))
            await until(unusable(consumer, number), damage.__name__)
            await ferry.goes_on(damage.__name__)
            assert ferry.told(request) is None, damage
            move_away(path)
            if damage is cut_off:
                path.write_bytes(sound)
            await ferry.ends(request, why=damage.__name__)
        assert consumer.heard("partition taken") == 1
        await ferry.finish()


@pytest.mark.timeout(180)
async def test_a_catalogue_that_is_gone_when_a_consumer_starts(
    bootstrap_servers: str, topics: Make, tmp_path: Path
) -> None:
    """The log tells `no catalogue`. Requests without a committed result are received again;
    those with one keep it, and their files. What is lost is the versions held: an older one of
    the item that arrives from now on goes over a newer one."""
    async with ferrying(bootstrap_servers, topics, tmp_path) as ferry:
        consumer = await ferry.run.consumer()
        path = ferry.run.root / ".splitferry" / "catalog.db"
        assert consumer.heard("no catalogue") == 0
        told = await ferry.send(*ferry.item(unique_id="known", version=2))
        await ferry.ends(told)
        open_ = ferry.item(unique_id="open")
        await ferry.send(*open_[:-1])
        await until(lambda: ferry.run.writing() == 1, "half an item")
        await consumer.kill()
        delete(path)
        consumer = await ferry.run.consumer()
        await ferry.ends(await ferry.send(open_[-1]))
        assert consumer.heard("no catalogue") == 1
        await ferry.finish()


@needs_shim
@pytest.mark.timeout(240)
async def test_a_catalogue_that_stays_locked(
    bootstrap_servers: str, topics: Make, tmp_path: Path
) -> None:
    async with asyncio.TaskGroup() as all_:
        all_.create_task(locked(bootstrap_servers, topics, tmp_path / "locked"))
        for heals in ("thawed", "killed"):
            all_.create_task(frozen(bootstrap_servers, topics, tmp_path / heals, heals))


async def locked(servers: str, topics: Make, directory: Path) -> None:
    """By another process, longer than we wait. The log tells `file write error` with the id of
    that process, files wait, others go on; within 30 s after it let go files go on."""
    async with ferrying(servers, topics, directory) as ferry:
        consumer = await ferry.run.consumer()
        await ferry.ends(await ferry.send(*ferry.item()), why="a start")
        path = ferry.run.root / ".splitferry" / "catalog.db"
        with closing(sqlite3.connect(path, isolation_level=None)) as database:
            database.execute("BEGIN EXCLUSIVE")
            request = await ferry.send(*ferry.item())
            await until(lambda: consumer.heard("file write error") > 0, "it is told")
            assert f"locked by process {os.getpid()}" in consumer.log.read_text()
            await ferry.goes_on("while the catalogue is locked")
            assert ferry.told(request) is None
        await ferry.ends(request, why="unlocked")
        await ferry.finish()
        assert ferry.run.errors() == []


async def frozen(servers: str, topics: Make, directory: Path, heals: str) -> None:
    """A consumer is stopped within a transaction of the catalogue. The one that takes its
    partitions tells `file write error` with the process to continue or to end; files wait,
    others go on; within 30 s after that was done files go on."""
    async with ferrying(servers, topics, directory, partitions=2) as ferry:
        run = ferry.run
        shim = Shim(run.root, directory / "shim")
        run.environment |= shim.environment
        stopped = await run.consumer()
        await until(lambda: stopped.heard("partition taken") >= 2, "a start")
        run.environment.clear()
        other = await run.consumer()
        await until(lambda: other.heard("partition taken") >= 1, "another")
        shim.delay("fsync", 5.0, where="catalog.db")
        requests = [await ferry.send(*ferry.item()) for _ in range(12)]
        await until(lambda: shim.hits("fsync") > 0, "a transaction")
        held = other.heard("partition taken")
        stopped.freeze()
        assert run.catalogue_locked()
        await until(lambda: other.heard("partition taken") >= held + 2, "it has both")
        await until(lambda: other.heard("file write error") > 0, "it is told")
        assert f"locked by process {stopped.pid}" in other.log.read_text()
        await ferry.goes_on("while the catalogue is locked")
        assert "WriteDataFailed" not in {ferry.told(request) for request in requests}
        shim.heal()
        if heals == "thawed":
            stopped.thaw()
        else:
            await stopped.kill()
        for request in requests:
            await ferry.ends(request, why=heals)
        await ferry.finish()
