"""A place to try write groups at: real targets, and faults where a test plans them."""

from __future__ import annotations

import asyncio
import errno
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog

from splitferry_consumer.flow import Flow, Gauge
from splitferry_consumer.group import (
    GROUPS,
    Ending,
    Workshop,
    WriteSplitDataTaskGroup,
    WriteSplitDataTaskHandle,
)
from splitferry_consumer.ledger import WriteSplit
from splitferry_consumer.request import ReceiveState
from splitferry_consumer.targets import Incoming, Item, Target, Verdict
from splitferry_consumer.targets.file import FileTarget
from splitferry_consumer.targets.limit import MemoryLimit
from splitferry_consumer.targets.memory import MemoryTarget
from splitferry_protocol.errors import WsDataError
from splitferry_protocol.ids import RequestId, RequestKey
from splitferry_protocol.records import Block, Split, Status

REQUEST = RequestId(7, 1)
ITEM = Item(RequestKey("group", "splits", 3, REQUEST, 42), "a/item.bin", 5)
EIO = OSError(errno.EIO, "the disk does not answer")


@dataclass
class Recorder:
    """What a group reported, in order."""

    told: list[tuple[str, Any]] = field(default_factory=list)

    def compared(self, same: bool) -> None:
        self.told.append(("compared", same))

    def failed(self, error: WsDataError) -> None:
        self.told.append(("failed", error))

    def settled(self, verdict: Verdict) -> None:
        self.told.append(("settled", verdict))

    def broken(self, error: Exception) -> None:
        self.told.append(("broken", error))


class Faulty:
    """A real `Incoming` whose next calls of a method raise what a test plans."""

    def __init__(self, inner: Incoming) -> None:
        self.inner = inner
        self.faults: dict[str, deque[Exception | None]] = {}
        self.calls: list[str] = []
        self.free = threading.Event()
        """A call in a thread waits while it is cleared."""
        self.free.set()
        self.entered = threading.Event()
        self.put_in: int | None = None
        """The thread of the last `put`."""

    def plan(self, method: str, *faults: Exception | None) -> None:
        self.faults[method] = deque(faults)

    def _meet(self, method: str) -> None:
        self.calls.append(method)
        if self.faults.get(method):
            fault = self.faults[method].popleft()
            if fault is not None:
                raise fault

    def write_at(self, offset: int, data: memoryview | bytes) -> None:
        self.entered.set()
        self.free.wait()
        self._meet("write_at")
        self.inner.write_at(offset, data)

    def read_at(self, offset: int, size: int) -> bytes:
        self._meet("read_at")
        return self.inner.read_at(offset, size)

    async def settle(self, proposal: Verdict) -> Verdict:
        self._meet("settle")
        return await self.inner.settle(proposal)

    def put(self, data: memoryview | bytes, proposal: Verdict) -> None:
        self.entered.set()
        self.free.wait()
        self.put_in = threading.get_ident()
        self._meet("put")
        self.inner.put(data, proposal)

    def discard(self) -> None:
        self._meet("discard")
        self.inner.discard()


@dataclass
class Bench:
    """A workshop, real targets, and the groups that a test starts there."""

    root: Path
    targets: dict[Block, Target]
    threads: ThreadPoolExecutor
    gauge: Gauge
    handles: list[WriteSplitDataTaskHandle] = field(default_factory=list)

    def group(
        self, block: Block = Block.FILE, item: Item = ITEM, write_timeout: float = 60.0
    ) -> tuple[WriteSplitDataTaskGroup, Faulty, Recorder]:
        incoming, reports = Faulty(self.targets[block].begin(item)), Recorder()
        workshop = Workshop(self.threads, self.gauge, write_timeout)
        return GROUPS[block](item, block, incoming, workshop, reports), incoming, reports

    def start(
        self, block: Block = Block.FILE, item: Item = ITEM, write_timeout: float = 60.0
    ) -> tuple[WriteSplitDataTaskHandle, Faulty, Recorder]:
        group, incoming, reports = self.group(block, item, write_timeout)
        handle = WriteSplitDataTaskHandle(group, reports)
        handle.start()
        self.handles.append(handle)
        return handle, incoming, reports

    @property
    def temporaries(self) -> list[str]:
        incoming = self.root / ".splitferry/incoming"
        return [path.name for path in incoming.glob("*/*") if path.name != "lock"]


@asynccontextmanager
async def open_bench(root: Path) -> AsyncIterator[Bench]:
    """A bench, which has to be clean in the end, whatever happened to its requests."""
    with ThreadPoolExecutor(4) as threads:
        file = await FileTarget.open(root, executor=threads)
        memory = await MemoryTarget.open(MemoryLimit(2**20), executor=threads)
        made = Bench(root, {Block.FILE: file, Block.MEM: memory}, threads, Gauge(Flow(2**30)))
        yield made
        for handle in made.handles:
            await handle.close()
        for target in (file, memory):
            await asyncio.to_thread(target.close)
        assert made.gauge.bytes == 0
        assert made.temporaries == []


def task(offset: int, payload: bytes, index: int = 0, overlap: int = 0) -> WriteSplit:
    """The split's first `overlap` bytes are there already; the rest is a gap."""
    split = Split(REQUEST, "a/item.bin", 5, Block.FILE, index, offset, None, memoryview(payload))
    middle, end = offset + overlap, offset + len(payload)
    return WriteSplit(
        ReceiveState.opened_by(split, 0, 0.0, 0),
        split,
        [(middle, end)] if middle < end else [],
        [(offset, middle)] if overlap else (),
    )


def complete(data: bytes, sha256: bytes | None = None) -> Ending:
    return Ending(Status.COMPLETED, None, len(data), sha256)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.001)


@contextmanager
def captured_logs() -> Iterator[list[Any]]:
    """What is logged. Commands tried in this process may have set up logging of their own."""
    before = structlog.get_config()
    structlog.reset_defaults()
    try:
        with structlog.testing.capture_logs() as captured:
            yield captured
    finally:
        structlog.configure(**before)
