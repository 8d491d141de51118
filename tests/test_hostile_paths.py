"""Hostile ids and planted links, through the real target: nothing outside the root changes."""

from __future__ import annotations

import asyncio
import ctypes
import hashlib
import os
import sqlite3
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, closing
from pathlib import Path

import pytest

if sys.platform != "linux":
    pytest.skip("what is touched is seen by inotify", allow_module_level=True)

from hostile_paths import SAFE, UNSAFE, around, untouched
from memory_transport import Kafka
from owners import Owner, results, until
from splitferry_consumer.targets import Condemned, Item, Refused, TargetUnusable, Verdict
from splitferry_consumer.targets.file import FileTarget
from splitferry_consumer.targets.handler import HandlerTarget
from splitferry_consumer.targets.limit import MemoryLimit
from splitferry_protocol.errors import WriteDataFailed
from splitferry_protocol.ids import RequestId, RequestKey
from splitferry_protocol.paths import path_problem
from splitferry_protocol.records import UNIQUE_ID_MAX, Block, Split, Status
from workload import cut

PRIVATE = {"catalog.db", "catalog.db-journal", "incoming"}
DATA = b"what was sent"


@pytest.fixture
def root() -> Iterator[Path]:
    """In memory, where fsync costs nothing: nothing here depends on the disk."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as sandbox:
        root = Path(sandbox, "root")
        root.mkdir()
        around(root)
        yield root


@asynccontextmanager
async def opened(root: Path) -> AsyncIterator[FileTarget]:
    target = await FileTarget.open(root)
    try:
        yield target
    finally:
        await asyncio.to_thread(target.close)


async def publish(
    target: FileTarget,
    unique_id: str,
    number: int,
    data: bytes = DATA,
    between: Callable[[], None] = lambda: None,
) -> Verdict:
    """Receive an item; `between` happens after the first write and before the verdict."""
    request = RequestId(1, number)
    item = Item(RequestKey("group", "splits", 0, request, number), unique_id, number)
    incoming = target.begin(item)
    proposal = Verdict(Status.COMPLETED, None, len(data), hashlib.sha256(data).digest())
    try:
        await target.in_thread(lambda: incoming.write_at(0, data))
        between()
        return await incoming.settle(proposal)
    except Refused as refusal:
        return await incoming.settle(Verdict(Status.FAILED, refusal.error))


def files_below(root: Path) -> dict[str, bytes]:
    """What was published; checks that the private directory holds nothing strange."""
    private = root / ".splitferry"
    assert {path.name for path in private.iterdir()} <= PRIVATE
    assert not private.is_symlink()
    with closing(sqlite3.connect(private / "catalog.db")) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and not path.is_symlink() and private not in path.parents
    }


# ---- ids


def test_the_corpus_is_large_and_each_id_stands_once() -> None:
    assert len(UNSAFE) + len(SAFE) >= 150
    assert Counter(UNSAFE + SAFE).most_common(1)[0][1] == 1, Counter(UNSAFE + SAFE).most_common(3)


async def test_an_unsafe_id_is_refused_and_makes_nothing(root: Path) -> None:
    async with opened(root) as target:
        with untouched(root):
            for number, unique_id in enumerate(UNSAFE):
                verdict = await publish(target, unique_id, number)
                assert isinstance(verdict.error, WriteDataFailed), unique_id
    assert files_below(root) == {}
    assert {path.name for path in root.iterdir()} == {".splitferry"}


async def test_a_strange_id_is_a_file_of_that_very_name_below_the_root(root: Path) -> None:
    """Names that only look alike are different files here; where the file system folds them,
    versions of one catalogue row for each name go over the same file."""
    sent = {name: name.encode() * 3 for name in SAFE}
    first = {name: data for name, data in sent.items() if not clashes(name)}
    async with opened(root) as target:
        with untouched(root):
            for number, (unique_id, data) in enumerate(first.items()):
                verdict = await publish(target, unique_id, number, data)
                assert verdict.target == {"path": unique_id}, unique_id
    assert files_below(root) == first


def clashes(name: str) -> bool:
    """Whether another id of the corpus is a file where this one wants a directory."""
    return any(name.startswith(other + "/") for other in SAFE)


async def test_end_to_end_the_sender_of_an_unsafe_id_hears_of_it(root: Path) -> None:
    async def nobody(_: object) -> None:
        raise AssertionError("no item goes to memory")

    names = [name for name in UNSAFE if 0 < len(name.encode()) <= UNIQUE_ID_MAX]
    kafka = Kafka()
    for number, unique_id in enumerate([*names, *SAFE[:30]]):
        for split in cut(RequestId(3, number), DATA, 5, unique_id=unique_id):
            assert isinstance(split, Split)
            kafka.send(split)
    with ThreadPoolExecutor(2) as threads:
        target = await FileTarget.open(root, executor=threads)
        with untouched(root):
            memory = HandlerTarget(nobody, MemoryLimit(0))
            owner = Owner(kafka, {Block.FILE: target, Block.MEM: memory}, threads)
            await until(lambda: owner.finished, 30)
            await owner.lose()
        await asyncio.to_thread(target.close)
    codes = {r.unique_id: r.error and r.error.code for r in results(kafka)}
    assert codes == dict.fromkeys(names, "BatchTransferError") | dict.fromkeys(SAFE[:30])
    assert files_below(root) == dict.fromkeys(SAFE[:30], DATA)
    assert all(path_problem(name) for name in names)


# ---- links


PATH = ("a", "b", "c", "file")
GOALS: dict[str, Callable[[Path], str]] = {
    "a directory outside": lambda root: str(root.parent / "outside"),
    "a file outside": lambda root: str(root.parent / "outside/secret"),
    "a relative way out": lambda _: "../" * 9 + "dev/shm",
    "nothing": lambda root: str(root.parent / "outside/new"),
    "itself": lambda _: "file",
    "the file system's root": lambda _: "/",
    "the catalogue": lambda root: str(root / ".splitferry/catalog.db"),
    "the private directory": lambda root: str(root / ".splitferry"),
    "the temporary files": lambda root: str(root / ".splitferry/incoming"),
    "the root": str,
    "our own descriptors": lambda _: "/proc/self/fd",
}


def plant(root: Path, depth: int, goal: str) -> None:
    """A link in the place of the segment at `depth`, with real directories above it."""
    above = root.joinpath(*PATH[:depth])
    above.mkdir(parents=True, exist_ok=True)
    (above / PATH[depth]).symlink_to(GOALS[goal](root))


@pytest.mark.parametrize("goal", GOALS)
@pytest.mark.parametrize("depth", range(len(PATH)))
async def test_a_link_in_the_place_of_a_segment_is_not_followed(
    root: Path, depth: int, goal: str
) -> None:
    async with opened(root) as target:
        plant(root, depth, goal)
        with untouched(root):
            verdict = await publish(target, "/".join(PATH), 1)
    assert verdict.error is not None
    assert "link" in verdict.error.message
    assert files_below(root) == {}


@pytest.mark.parametrize("goal", GOALS)
@pytest.mark.parametrize("depth", range(len(PATH)))
async def test_a_link_that_comes_during_the_write_is_not_followed(
    root: Path, depth: int, goal: str
) -> None:
    async with opened(root) as target:
        with untouched(root):
            verdict = await publish(
                target, "/".join(PATH), 1, DATA, lambda: plant(root, depth, goal)
            )
    assert isinstance(verdict.error, WriteDataFailed)
    assert files_below(root) == {}


def exchange(one: Path, other: Path) -> None:
    """Both names change places, with no moment in between."""
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(here, bytes(one), here, bytes(other), swap):
        raise OSError(ctypes.get_errno(), "renameat2")


@pytest.mark.parametrize("depth", [0, 2])
async def test_a_link_that_comes_and_goes_all_the_time_is_never_followed(
    root: Path, depth: int
) -> None:
    """The race between looking at a name and using it, tried hundreds of times."""
    directory = root.joinpath(*PATH[: depth + 1])
    root.joinpath(*PATH[:-1]).mkdir(parents=True)
    link = directory.with_name("link")
    link.symlink_to(root.parent / "outside/deep")
    ended = threading.Event()

    def swap() -> None:
        while not ended.is_set():
            exchange(directory, link)

    swapper = threading.Thread(target=swap)
    told: Counter[str] = Counter()
    async with opened(root) as target:
        with untouched(root):
            swapper.start()
            try:
                for number in range(300):
                    try:
                        verdict = await publish(target, "/".join(PATH), number)
                        told[verdict.status.value] += 1
                    except Condemned:  # swapped before the directories were synced: again
                        told["again"] += 1
            finally:
                ended.set()
                swapper.join()
    assert set(files_below(root).values()) <= {DATA}
    assert told["completed"] > 0
    assert told["failed"] > 0


@pytest.mark.parametrize("name", [".splitferry", ".splitferry/incoming", ".splitferry/catalog.db"])
async def test_a_root_whose_private_parts_are_links_is_not_used(root: Path, name: str) -> None:
    (root / name).parent.mkdir(exist_ok=True)
    goal = "outside/secret" if name.endswith("db") else "outside"
    (root / name).symlink_to(root.parent / goal)
    with untouched(root), pytest.raises(TargetUnusable, match=r"regular file|choose another root"):
        await FileTarget.open(root)


def made(directory: Path) -> Path:
    directory.mkdir()
    return directory


def test_the_watch_sees_what_it_is_there_for(root: Path) -> None:
    outside = root.parent / "outside"
    with untouched(root):
        (root / "inside").write_bytes(b"")
    touches: list[Callable[[], object]] = [
        lambda: (outside / "deep/er/new").write_bytes(b""),
        lambda: made(outside / "brief").rmdir(),
        lambda: (outside / "secret").chmod(0o600),
        lambda: os.utime(outside / "deep"),
        lambda: (root.parent / "x").rename(root.parent / "y"),
        lambda: os.link(outside / "secret", root / "stolen"),
    ]
    for touch in touches:
        with pytest.raises(AssertionError), untouched(root):
            touch()
