"""Senders who want the consumer's memory, disk or time: each has a limit, and an error to it.

SPLITFERRY_FLOOD=1000000    records in each flood, instead of 4,000
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import pytest
import structlog

from floods import BATCH, Flood, Make, memory
from memory_transport import DEAD_LETTERS
from owners import STANDARD, Owner, temporaries, until
from splitferry_consumer import ledger as ledger_module
from splitferry_consumer import partition as partition_module
from splitferry_consumer.flow import RECORD_OVERHEAD
from splitferry_consumer.ledger import RESULTS_IN_A_TRANSACTION, Limits
from splitferry_consumer.taking import Rules
from splitferry_consumer.targets import Target
from splitferry_consumer.targets.file import FileTarget
from splitferry_consumer.targets.handler import HandlerTarget, ReceivedItem
from splitferry_consumer.targets.limit import MemoryLimit
from splitferry_consumer.transport import Record
from splitferry_protocol.ids import U64_MAX
from splitferry_protocol.records import HEADER_MAX, Block, Split
from world import split

FLOOD = int(os.environ.get("SPLITFERRY_FLOOD", "4000"))
BOUND = max(180.0, FLOOD / 100)
"""Seconds."""
MIB = 2**20
HELD = MIB
"""Bytes that a partition holds before it reads no further: less than in production, so that a
small flood reaches it."""
TRANSACTION = RESULTS_IN_A_TRANSACTION + HELD // RECORD_OVERHEAD + BATCH
"""Records of one transaction: what was told of a request goes with its result, however much."""

pytestmark = pytest.mark.timeout(2 * BOUND)


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "HELD_MAX", HELD)
    monkeypatch.setattr(partition_module, "TICK", 0.01)
    monkeypatch.setattr(partition_module, "COMMIT_INTERVAL", 0.01)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """A line for each of a million records is for nobody."""

    def drop(*_: object) -> NoReturn:
        raise structlog.DropEvent

    before = structlog.get_config()
    structlog.configure(processors=[drop])
    yield
    structlog.configure(**before)


@pytest.fixture
def root() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as path:
        yield Path(path, "root")


@asynccontextmanager
async def owning(make: Make, count: int, root: Path, rules: Rules) -> AsyncIterator[Flood]:
    """An owner of a partition with `count` records."""

    async def handle(_: ReceivedItem) -> None: ...

    flood = Flood(make, count)
    with ThreadPoolExecutor(2) as threads:
        files = await FileTarget.open(root, executor=threads)
        memory_target = HandlerTarget(handle, MemoryLimit(64 * MIB))
        targets: dict[Block, Target] = {Block.FILE: files, Block.MEM: memory_target}
        flood.owner = owner = Owner(flood.kafka, targets, threads, rules=rules, member=flood)
        try:
            yield flood
        finally:
            await owner.lose()
            await asyncio.to_thread(files.close)
    assert temporaries(root) == []


async def attack(
    make: Make,
    root: Path,
    count: int = FLOOD,
    rules: Rules = STANDARD,
    first_open: int | None = None,
) -> tuple[Flood, int]:
    """Read all of it, until W is at `first_open`, or the end. Returns what was told, and the peak
    of memory in bytes."""
    goal = count if first_open is None else first_open
    with memory() as measured:
        async with owning(make, count, root, rules) as flood:
            await until(lambda: flood.watermark == goal and flood.read and not flood.kept, BOUND)
    assert flood.largest <= TRANSACTION
    return flood, measured.peak


def limited(**limits: int) -> Rules:
    return replace(STANDARD, horizon=10 * FLOOD, limits=Limits(**limits))


async def test_a_flood_of_requests_that_never_go_on_opens_no_more_than_the_limit(
    root: Path,
) -> None:
    limit, horizon = FLOOD // 20, FLOOD // 2
    flood, peak = await attack(
        lambda offset: split(offset, 0, b"x", total=2),
        root,
        rules=replace(limited(open_requests=limit), horizon=horizon),
        first_open=FLOOD - horizon,
    )
    print(f"{peak / MIB:.1f} MiB")
    assert flood.told == {"BatchTransferFailed": FLOOD - limit}
    # Open ones, those on their way out, and the results that are remembered.
    assert peak < (limit + 2000) * 20_000 + horizon * 2000


@pytest.mark.parametrize(
    "record",
    [
        Record(0, None, None),
        Record(0, None, b"", [("x" * 2000, None)]),  # type: ignore[list-item]
        Record(0, b"k" * 2000, None),
        Record(0, b"no id", b"v" * 2000),
    ],
    ids=["nothing", "headers", "keys", "values"],
)
async def test_a_flood_of_dead_letters_holds_no_more_than_may_be_held(
    root: Path, record: Record
) -> None:
    flood, peak = await attack(lambda offset: record._replace(offset=offset), root)
    print(f"{peak / MIB:.1f} MiB")
    assert flood.told == {DEAD_LETTERS: FLOOD}
    assert HELD / 2 < flood.held < HELD + BATCH * 4096
    assert peak < 4 * (HELD + BATCH * 4096)


async def test_a_flood_of_tokens_before_and_after_the_end_is_told_and_forgotten(
    root: Path,
) -> None:
    def make(offset: int) -> Split:
        labels = {f"{n:02}": "x" * 126 for n in range(16)}
        bytes_, start = (b"ab", 0) if offset < FLOOD // 2 else (b"abcd", 0)
        reply = offset.to_bytes(256)
        return split(1, start, bytes_, total=4, reply=reply, labels=labels)

    flood, peak = await attack(make, root, rules=limited())
    print(f"{peak / MIB:.1f} MiB, {flood.told}")
    assert flood.told["completed"] == 1
    assert flood.told["accepted"] + flood.told["repeat"] == FLOOD - 1
    assert HELD / 2 < flood.held < HELD + BATCH * 10_000
    assert peak < 4 * (HELD + BATCH * 10_000)


async def test_results_are_remembered_for_the_horizon_and_no_longer(root: Path) -> None:
    """The largest that they can be: the bound is the horizon times a header."""
    horizon = FLOOD // 20
    labels = {f"{n:02}": "x" * 126 for n in range(16)}

    def make(offset: int) -> Split:
        return split(offset, total=0, unique_id="u" * 512, labels=labels, reply=bytes(256))

    async with owning(make, FLOOD, root, replace(STANDARD, horizon=horizon)) as flood:
        await until(lambda: flood.watermark == FLOOD, BOUND)
        assert flood.owner is not None
        ledger = flood.owner.partition._ledger
        assert ledger is not None
        sizes = [len(recorded.value) for recorded in ledger._recorded.values()]
    print(f"{len(sizes)} results of {max(sizes)} bytes")
    assert flood.told == {"completed": FLOOD}
    # Those of the last transaction are forgotten with the next one.
    assert len(sizes) <= horizon + RESULTS_IN_A_TRANSACTION
    assert max(sizes) <= HEADER_MAX


@pytest.mark.parametrize("block", Block)
async def test_tiny_ranges_with_gaps_between_them_end_at_the_limit(
    root: Path, block: Block
) -> None:
    limit = FLOOD // 20

    def make(offset: int) -> Split:
        return split(1, 4 * (offset % (2 * limit)), b"x", total=2**40, block=block)

    flood, peak = await attack(make, root, rules=limited(gaps=limit))
    print(f"{peak / MIB:.1f} MiB")
    assert flood.told == {"BatchTransferFailed": 1}
    assert peak < 32 * MIB


@pytest.mark.parametrize("block", Block)
async def test_tiny_ranges_that_overlap_cost_time_in_proportion(root: Path, block: Block) -> None:
    """Each is compared with what is there, one after the other."""
    count = FLOOD // 10

    def make(offset: int) -> Split:
        return split(1, offset, b"xx", total=count + 1, block=block)

    flood, peak = await attack(make, root, count, limited())
    print(f"{peak / MIB:.1f} MiB")
    assert flood.told == {"completed": 1}
    assert peak < 8 * MIB


async def test_a_request_that_never_ends_is_ended_by_the_horizon(root: Path) -> None:
    horizon = FLOOD // 4
    flood, peak = await attack(
        lambda offset: split(1 if offset < horizon else 2, offset, b"x"),
        root,
        horizon + 10,
        replace(STANDARD, horizon=horizon),
        first_open=horizon,
    )
    assert flood.told == {"BatchTransferFailed": 1}
    assert peak < 64 * MIB


async def test_a_request_whose_splits_bring_nothing_new_is_ended_by_its_idleness(
    root: Path,
) -> None:
    """However often they come: repeating what is there is no activity."""
    rules = replace(limited(), idle_timeout=2.0)
    async with owning(lambda _: split(1, 0, b"x", total=2), 1, root, rules) as flood:
        async with asyncio.timeout(15):
            while not flood.told:
                flood.count += 1
                await asyncio.sleep(0.02)
    assert flood.told == {"BatchTransferFailed": 1}


@pytest.mark.parametrize("block", Block)
@pytest.mark.parametrize("total", [2**40, 2**63 - 1, U64_MAX, None])
async def test_what_a_sender_announces_takes_neither_disk_nor_memory(
    root: Path, total: int | None, block: Block
) -> None:
    """The first byte and the last one of an item as large as can be said."""
    far = (U64_MAX if total is None else total) - 1

    def make(offset: int) -> Split:
        return split(1, offset and far, b"x", total=total, block=block)

    with memory() as measured:
        async with owning(make, 2, root, STANDARD) as flood:
            # Whether a file may have a hole of that size is the file system's to say.
            await until(lambda: flood.read and not flood.kept, 30)
            taken = sum(path.stat().st_blocks * 512 for path in root.rglob("*"))
    assert taken < 2 * MIB
    assert measured.peak < 8 * MIB
    if block is Block.MEM:
        assert flood.told == {"BatchTransferFailed": 1}, "more than the memory limit"
    else:
        assert flood.told in ({"WriteDataFailed": 1}, {})
        assert flood.told or far < 2**63


@pytest.mark.parametrize("field", ["total", "offset"])
async def test_the_limit_of_an_item_is_told_at_its_first_split(root: Path, field: str) -> None:
    contents = {
        "total": split(1, 0, b"x", total=1001, block=Block.FILE),
        "offset": split(1, 1000, b"x", block=Block.FILE),
    }
    flood, _ = await attack(lambda _: contents[field], root, 1, limited(item_size=1000))
    assert flood.told == {"BatchTransferFailed": 1}
