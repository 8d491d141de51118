"""Who may read what is published, and that nobody else may, whatever the umask is."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from splitferry_consumer.catalogue import Catalogue
from splitferry_consumer.modes import directory_mode, mode_problem
from splitferry_consumer.segment import DIRECTORY
from splitferry_consumer.service import Service, Settings, StartError
from splitferry_consumer.targets import Item, Target, Verdict
from splitferry_consumer.targets.file import FileTarget
from splitferry_consumer.targets.limit import MemoryLimit
from splitferry_consumer.targets.memory import MemoryTarget
from splitferry_protocol.connection import ConnectionSettings
from splitferry_protocol.ids import RequestId, RequestKey
from splitferry_protocol.records import Status

NOBODY = 65534
DATA = b"private"
as_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can run as another user")


@pytest.fixture(params=[0o000, 0o077], ids="umask {:03o}".format)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.fixture
def root() -> Iterator[Path]:
    """Where everyone may go, unlike in pytest's own directories; not made yet."""
    above = Path(tempfile.mkdtemp())
    above.chmod(0o755)
    yield above / "srv" / "root"
    shutil.rmtree(above)


@asynccontextmanager
async def files(root: Path, mode: int = 0o640) -> AsyncIterator[FileTarget]:
    target = await FileTarget.open(root, mode=mode)
    yield target
    await asyncio.to_thread(target.close)


async def publish(target: Target, unique_id: str) -> Verdict:
    item = Item(RequestKey("group", "splits", 0, RequestId(1, 1), 0), unique_id, 1)
    incoming = target.begin(item)
    await asyncio.to_thread(incoming.write_at, 0, DATA)
    digest = hashlib.sha256(DATA).digest()
    return await incoming.settle(Verdict(Status.COMPLETED, None, len(DATA), digest))


def bits(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def reads(path: Path, group: int = NOBODY) -> bool:
    """Whether a user who is nobody here, but perhaps of a group, gets at the bytes."""
    tried = subprocess.run(
        ["cat", path], user=NOBODY, group=group, extra_groups=[], capture_output=True, check=False
    )
    assert (tried.stdout == DATA) is (tried.returncode == 0)
    return tried.returncode == 0


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o660, 0o644])
async def test_files_and_their_directories_get_the_mode(root: Path, umask: int, mode: int) -> None:
    async with files(root, mode) as target:
        await publish(target, "a/b/item")
        assert bits(root / "a/b/item") == mode
        for directory in (root.parent, root, root / "a", root / "a/b"):
            assert bits(directory) == directory_mode(mode), directory


@pytest.mark.parametrize(
    ("mode", "directories"), [(0o600, 0o700), (0o640, 0o750), (0o660, 0o770), (0o644, 0o755)]
)
def test_who_may_read_files_may_look_them_up(mode: int, directories: int) -> None:
    assert directory_mode(mode) == directories


async def test_what_is_private_is_nobodys_business(root: Path, umask: int) -> None:
    async with files(root, 0o644) as target:
        await publish(target, "item")
        incoming = target.begin(
            Item(RequestKey("group", "splits", 0, RequestId(1, 2), 1), "other", 1)
        )
        await asyncio.to_thread(incoming.write_at, 0, DATA)
        private = root / ".splitferry"
        found = {path.name: bits(path) for path in [private, *private.rglob("*")]}
        assert {"catalog.db", "catalog.db-journal", "incoming", "lock"} < found.keys()
        for path in [private, *private.rglob("*")]:
            assert bits(path) == (0o700 if path.is_dir() else 0o600), path
        await asyncio.to_thread(incoming.discard)


async def test_a_catalogue_that_others_could_read_is_closed_to_them(root: Path) -> None:
    async with files(root) as target:
        await publish(target, "item")
    database = root / ".splitferry" / "catalog.db"
    kept = [database, database.with_name("catalog.db-journal")]
    for path in kept:
        path.chmod(0o644)
    await asyncio.to_thread(lambda: Catalogue(str(database)).close())
    assert [bits(path) for path in kept] == [0o600, 0o600]


async def test_segments_get_the_mode(umask: int) -> None:
    for mode in (0o600, 0o640):
        target = await MemoryTarget.open(MemoryLimit(2**20), lifetime=0.0, mode=mode)
        verdict = await publish(target, "item")
        assert verdict.target is not None
        assert bits(Path(DIRECTORY, verdict.target["shm"])) == mode
        assert bits(Path(DIRECTORY, target.owner.name)) == 0o700
        await asyncio.to_thread(target.close)


@as_root
async def test_the_group_of_a_root_with_the_set_group_id_bit_goes_to_all_in_it(
    root: Path, umask: int
) -> None:
    root.mkdir(parents=True)
    os.chown(root, 0, NOBODY)
    root.chmod(0o2750)
    async with files(root) as target:
        await publish(target, "a/b/item")
    assert (root / "a/b/item").stat().st_gid == NOBODY
    assert bits(root / "a/b") == 0o2750
    assert bits(root / ".splitferry") == 0o2700


@as_root
async def test_another_user_reads_what_the_mode_allows(root: Path, umask: int) -> None:
    allowed = {0o600: (False, False), 0o640: (False, True), 0o644: (True, True)}
    for mode, (everyone, group) in allowed.items():
        async with files(root.with_name(f"{mode:o}"), mode) as target:
            root.parent.chmod(0o755)
            await publish(target, "a/item")
            item = Path(target.root, "a/item")
            assert (reads(item), reads(item, os.getgid())) == (everyone, group), oct(mode)
            assert not reads(Path(target.root, ".splitferry/catalog.db"), os.getgid())


@as_root
async def test_another_user_reads_no_segment(umask: int) -> None:
    for mode, group in ((0o600, False), (0o640, True)):
        target = await MemoryTarget.open(MemoryLimit(2**20), lifetime=0.0, mode=mode)
        verdict = await publish(target, "item")
        assert verdict.target is not None
        segment = Path(DIRECTORY, verdict.target["shm"])
        assert (reads(segment), reads(segment, os.getgid())) == (False, group)
        await asyncio.to_thread(target.close)


@pytest.mark.parametrize("mode", [0o646, 0o666, 0o622, 0o755, 0o641, 0o440, 0o200, 0o4640, 0o1640])
async def test_an_unsafe_mode_is_refused(mode: int, root: Path) -> None:
    assert mode_problem(mode)
    with pytest.raises(StartError, match="files cannot have the mode"):
        await Service(Settings(ConnectionSettings(), root, file_mode=mode)).run()
    assert not root.exists()
