"""Shared memory and handlers: what other processes see, limits, lifetimes, deaths."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from failing import failing
from splitferry_consumer.segment import attach, free
from splitferry_consumer.targets import Condemned, Item, Refused, Verdict, inode, memory
from splitferry_consumer.targets.file import FileTarget
from splitferry_consumer.targets.handler import HandlerTarget, ReceivedItem
from splitferry_consumer.targets.inode import Descriptors
from splitferry_consumer.targets.limit import MemoryLimit
from splitferry_consumer.targets.memory import MemoryTarget, SegmentIncoming
from splitferry_protocol.errors import BatchTransferFailed
from splitferry_protocol.ids import U64_MAX, RequestId, RequestKey
from splitferry_protocol.records import Status

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="shared memory needs Linux")

MIB = 2**20


def item(sequence: int = 1) -> Item:
    key = RequestKey("g", "splits", 0, RequestId(1, sequence), sequence)
    return Item(key, "item", 1, {"kind": "test"})


def completed(data: bytes) -> Verdict:
    return Verdict(Status.COMPLETED, None, len(data), hashlib.sha256(data).digest())


async def announced(
    target: MemoryTarget, data: bytes, sequence: int = 1
) -> tuple[SegmentIncoming, str]:
    incoming = target.begin(item(sequence))
    await target.in_thread(lambda: incoming.write_at(0, data))
    verdict = await incoming.settle(completed(data))
    assert verdict.target is not None
    return incoming, verdict.target["shm"]


def segments(target: MemoryTarget) -> list[str]:
    """What there is of an owner: its directory, what is in it, what it announced."""
    found = Path("/dev/shm").glob(f"{target.owner.name}*")
    return sorted(str(below) for path in found for below in (path, *path.glob("*")))


def sweep_until(gone: Callable[[], bool], sweep: Callable[[], object]) -> None:
    """Others sweep too, consumers of other tests among them: while one holds what a dead owner
    left, ours passes it by."""
    end = time.monotonic() + 30
    while not gone():
        assert time.monotonic() < end
        sweep()


def let_its_time_pass(left: MemoryTarget, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on sweeps of this process find the lifetime of all that is left over. So they see
    nothing of others: consumers of other tests, which were killed, have readers."""
    later, listdir = memory._now() + left.lifetime, os.listdir

    def its_own(directory: int) -> list[str]:
        names = listdir(directory)
        shared = os.path.samestat(os.fstat(directory), os.stat("/dev/shm"))
        return [name for name in names if not shared or name.startswith(left.owner.name)]

    monkeypatch.setattr(memory, "_now", lambda: later)
    monkeypatch.setattr(os, "listdir", its_own)


@pytest.fixture
async def target() -> AsyncIterator[MemoryTarget]:
    opened = await MemoryTarget.open(MemoryLimit(64 * MIB), lifetime=0.0)
    yield opened
    await opened.in_thread(opened.close)
    assert segments(opened) == []


async def test_another_process_reads_the_segment_by_its_name(target: MemoryTarget) -> None:
    data = os.urandom(3 * MIB + 1)
    incoming = target.begin(item())

    def write() -> None:
        incoming.write_at(MIB, memoryview(data)[MIB:])
        incoming.write_at(0, memoryview(data)[:MIB])
        assert incoming.read_at(MIB - 1, 2) == data[MIB - 1 : MIB + 1]

    await target.in_thread(write)
    assert all(name.endswith((target.owner.name, "lock", ".part")) for name in segments(target))
    verdict = await incoming.settle(completed(data))
    assert verdict.status is Status.COMPLETED
    assert verdict.target is not None
    assert verdict.target["host"] == target.host
    assert target.limit.used == len(data) + -len(data) % 4096
    # The tracker would take the segment for the reader's own: see `splitferry_consumer.segment`.
    program = (
        "import hashlib, sys\n"
        "from multiprocessing import resource_tracker, shared_memory\n"
        "memory = shared_memory.SharedMemory(name=sys.argv[1])\n"
        "resource_tracker.unregister(memory._name, 'shared_memory')\n"
        "print(memory.size, hashlib.sha256(memory.buf).hexdigest()); memory.close()"
    )
    reader = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, verdict.target["shm"], stdout=-1, stderr=-1
    )
    told, errors = await reader.communicate()
    assert errors == b""
    assert told.decode().split() == [str(len(data)), hashlib.sha256(data).hexdigest()]
    with attach(verdict.target["shm"], verdict.size) as view:
        assert view == data
        assert view.readonly
    assert await incoming.settle(completed(data)) == verdict


async def test_a_view_may_outlive_its_block(target: MemoryTarget) -> None:
    _, name = await announced(target, b"bytes")
    with attach(name) as view:
        part = view[1:3]
    assert bytes(part) == b"yt"


async def test_an_empty_item_can_be_mapped(target: MemoryTarget) -> None:
    _, name = await announced(target, b"")
    with attach(name, 0) as view:
        assert len(view) == 0
    with attach(name) as view:
        assert bytes(view) == b"\0"
    with pytest.raises(ValueError, match="not 2"), attach(name, 2):
        pass


@pytest.mark.parametrize("name", ["other", "splitferry-/../x", "../splitferry-x", ""])
def test_only_names_of_segments_are_opened(name: str) -> None:
    with pytest.raises(ValueError, match="not the name of a segment"), attach(name):
        pass


async def test_a_failed_proposal_leaves_nothing(target: MemoryTarget) -> None:
    incoming = target.begin(item())
    await target.in_thread(lambda: incoming.write_at(0, b"bytes"))
    proposal = Verdict(Status.ABORTED, BatchTransferFailed(item().key.request, "aborted"))
    assert await incoming.settle(proposal) == proposal
    assert target.limit.used == 0
    assert len(segments(target)) == 2


@pytest.mark.parametrize("settled", [False, True])
async def test_discard_takes_the_segment_away(target: MemoryTarget, settled: bool) -> None:
    incoming = target.begin(item())
    await target.in_thread(lambda: incoming.write_at(0, b"bytes"))
    if settled:
        await incoming.settle(completed(b"bytes"))
    await target.in_thread(incoming.discard)
    await target.in_thread(incoming.discard)
    assert target.limit.used == 0
    assert len(segments(target)) == 2


async def test_a_segment_with_a_hole_is_condemned(target: MemoryTarget) -> None:
    incoming = target.begin(item())
    await target.in_thread(lambda: incoming.write_at(1, b"bytes"))
    with pytest.raises(Condemned):
        await incoming.settle(completed(b"_bytes"))
    await target.in_thread(incoming.discard)


async def test_putting_a_small_item_never_looks_through_the_announced_ones(
    target: MemoryTarget,
) -> None:
    """It may be done on the event loop, and they may be many."""
    target.limit.limit = 4096
    incoming, _ = await announced(target, b"first")
    second = target.begin(item(2))
    with pytest.raises(OSError, match="memory limit"):
        second.put(b"second", completed(b"second"))
    # In a thread, as whoever tries it again does, room is found: their lifetime is over.
    await target.in_thread(lambda: second.write_at(0, b"second"))
    assert (await second.settle(completed(b"second"))).status is Status.COMPLETED
    await target.in_thread(second.discard)
    await target.in_thread(incoming.discard)


async def test_the_limit_heals_when_a_reader_frees_or_the_lifetime_ends() -> None:
    target = await MemoryTarget.open(MemoryLimit(MIB))
    _, name = await announced(target, bytes(MIB // 2))
    incoming = target.begin(item(2))

    def write() -> None:
        for offset in range(0, MIB, MIB // 8):
            incoming.write_at(offset, bytes(MIB // 8))

    with pytest.raises(OSError, match="memory limit of 1048576 bytes is reached"):
        await target.in_thread(write)
    await asyncio.to_thread(free, name)
    await target.in_thread(write)
    with pytest.raises(Refused, match="more than the memory limit"):
        await target.in_thread(lambda: incoming.write_at(MIB, b"x"))
    target.lifetime = 0.0
    await incoming.settle(completed(bytes(MIB)))
    assert target.limit.used == MIB
    await target.sweep()
    assert target.limit.used == 0
    await target.in_thread(target.close)
    assert segments(target) == []


@pytest.mark.parametrize("offset", [2**63 - 1, 2**63, U64_MAX])
async def test_far_offsets_are_refused(target: MemoryTarget, offset: int) -> None:
    target.limit.limit = 2**70
    incoming = target.begin(item())
    with pytest.raises(Refused):
        await target.in_thread(lambda: incoming.write_at(offset, b"bytes"))
    assert target.limit.used == 0
    await target.in_thread(incoming.discard)


async def test_announced_segments_outlive_close_until_their_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = await MemoryTarget.open(MemoryLimit(MIB))
    _, name = await announced(first, b"bytes")
    unfinished = first.begin(item(2))
    await first.in_thread(lambda: unfinished.write_at(0, b"bytes"))
    await first.in_thread(first.close)
    await first.in_thread(unfinished.discard)
    second = await MemoryTarget.open(MemoryLimit(MIB), lifetime=0.0)
    with attach(name) as view:
        assert bytes(view) == b"bytes"
    assert not [path for path in segments(first) if path.endswith(".part")]
    let_its_time_pass(first, monkeypatch)
    await second.in_thread(lambda: sweep_until(lambda: segments(first) == [], second._sweep))
    await second.in_thread(second.close)


async def test_a_sweep_that_cannot_look_is_told_and_met_again_by_the_next(
    target: MemoryTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also by the first, in which nobody has the target yet, to close what it holds."""
    with monkeypatch.context() as patch, capture_logs() as logs:
        patch.setattr(os, "listdir", failing(errno.EMFILE))
        await target.sweep()
        second = await MemoryTarget.open(MemoryLimit(MIB))
    told = {"event": "shared memory cannot be looked at", "log_level": "error"}
    assert logs == [{**told, "cause": "[Errno 24] Too many open files"}] * 2
    await second.in_thread(second.close)


async def test_what_a_dead_owner_left_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be 100,000 segments, and each look is a system call."""
    first = await MemoryTarget.open(MemoryLimit(MIB))
    named = [(await announced(first, b"bytes", number))[1] for number in (1, 2)]
    await first.in_thread(first.close)
    looked: list[str] = []
    stat = os.stat

    def noted(path: str, **options: Any) -> os.stat_result:
        looked.append(path)
        return stat(path, **options)

    monkeypatch.setattr(os, "stat", noted)
    second = await MemoryTarget.open(MemoryLimit(MIB))
    for _ in range(3):
        await second.sweep()
    assert sorted(path for path in looked if path in named) == named
    await second.in_thread(lambda: free(named[0]))
    let_its_time_pass(first, monkeypatch)
    await second.in_thread(lambda: sweep_until(lambda: segments(first) == [], second._sweep))
    await second.in_thread(second.close)


DYING = """
import asyncio, hashlib, os, signal
from splitferry_consumer.targets import Item, Verdict
from splitferry_consumer.targets.limit import MemoryLimit
from splitferry_consumer.targets.memory import MemoryTarget
from splitferry_protocol.ids import RequestId, RequestKey
from splitferry_protocol.records import Status

async def main():
    target = await MemoryTarget.open(MemoryLimit(2**20), lifetime=1000.0)
    for sequence in (1, 2):
        key = RequestKey("g", "splits", 0, RequestId(1, sequence), sequence)
        incoming = target.begin(Item(key, "item", 1))
        incoming.write_at(0, b"bytes")
        if sequence == 1:
            digest = hashlib.sha256(b"bytes").digest()
            verdict = await incoming.settle(Verdict(Status.COMPLETED, None, 5, digest))
            print(verdict.target["shm"], flush=True)
    # A child has the lock, too: until it ends, nobody sweeps what we leave.
    if os.fork() == 0:
        os.read(0, 1)
        os._exit(0)
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


def test_what_a_killed_owner_left_is_removed_in_its_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = [sys.executable, "-c", DYING]
    with subprocess.Popen(command, stdin=-1, stdout=-1, text=True) as dying:
        assert dying.stdin is not None
        assert dying.stdout is not None
        name = dying.stdout.readline().strip()
        assert dying.wait() == -signal.SIGKILL
        owner = name.rpartition("-")[0]

        def left() -> list[str]:
            return sorted(path.name for path in Path("/dev/shm", owner).iterdir())

        assert left() == ["1.part", "lock"]
        dying.stdin.close()
        assert dying.stdout.read() == "", "the child has ended"
    # The sweeper's own lifetime does not count: the owner has promised its readers another.
    target = MemoryTarget(MemoryLimit(MIB), lifetime=0.0)
    sweep_until(lambda: left() == ["lock"], target._sweep)
    with attach(name) as view:
        assert bytes(view) == b"bytes"
    # A step of the wall clock does not count either.
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 1e9)
    target._sweep()
    with attach(name):
        pass
    os.utime(f"/dev/shm/{name}", (-1e6, -1e6))
    target.close()
    another = MemoryTarget(MemoryLimit(MIB))
    sweep_until(lambda: not list(Path("/dev/shm").glob(f"{owner}*")), another._sweep)
    another.close()


@pytest.mark.parametrize("data", [b"", b"bytes"])
async def test_elsewhere_items_are_refused(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    target = await MemoryTarget.open(MemoryLimit(MIB))
    incoming = target.begin(item())
    with pytest.raises(Refused, match="needs Linux"):
        await target.in_thread(lambda: incoming.write_at(0, data))
    with pytest.raises(Refused, match="needs Linux") as refused:
        await incoming.settle(completed(data))
    failed = Verdict(Status.FAILED, refused.value.error)
    assert await incoming.settle(failed) == failed
    await target.in_thread(incoming.discard)
    await target.sweep()
    target.close()


# Handlers


async def test_a_handler_gets_the_item() -> None:
    got: list[ReceivedItem] = []

    async def handler(received: ReceivedItem) -> None:
        assert limit.used == len(data)
        got.append(received)

    limit, data = MemoryLimit(64 * MIB), os.urandom(3 * MIB)
    incoming = HandlerTarget(handler, limit).begin(item())
    incoming.write_at(2 * MIB, memoryview(data)[2 * MIB :])
    incoming.write_at(0, memoryview(data)[: 2 * MIB])
    assert incoming.read_at(MIB, 3) == data[MIB : MIB + 3]
    proposal = completed(data)
    assert await incoming.settle(proposal) == proposal
    assert await incoming.settle(proposal) == proposal
    assert limit.used == 0
    digest = hashlib.sha256(data).digest()
    view = got[0].data
    assert (view.readonly, view == data) == (True, True)
    assert replace(got[0], data=view) == got[0]
    assert got == [ReceivedItem(RequestId(1, 1), "item", 1, {"kind": "test"}, view, digest)]


async def test_what_a_handler_raises_fails_the_request() -> None:
    async def handler(_: ReceivedItem) -> None:
        raise LookupError("no such table")

    limit = MemoryLimit(MIB)
    incoming = HandlerTarget(handler, limit).begin(item())
    incoming.write_at(0, b"bytes")
    verdict = await incoming.settle(completed(b"bytes"))
    assert verdict.status is Status.FAILED
    assert isinstance(verdict.error, BatchTransferFailed)
    assert verdict.error.reason == "the handler raised LookupError: no such table"
    assert limit.used == 0


async def test_a_cancellation_out_of_the_handler_fails_the_request() -> None:
    async def handler(received: ReceivedItem) -> None:
        task = asyncio.ensure_future(asyncio.sleep(60))
        task.cancel()
        await task

    incoming = HandlerTarget(handler, MemoryLimit(MIB)).begin(item())
    incoming.write_at(0, b"bytes")
    verdict = await incoming.settle(completed(b"bytes"))
    assert verdict.status is Status.FAILED
    assert "CancelledError" in str(verdict.error)


async def test_a_cancelled_handler_can_be_asked_again() -> None:
    started = asyncio.Event()
    calls: list[bytes] = []

    async def handler(received: ReceivedItem) -> None:
        calls.append(bytes(received.data))
        started.set()
        if len(calls) == 1:
            await asyncio.Event().wait()

    limit = MemoryLimit(MIB)
    incoming = HandlerTarget(handler, limit).begin(item())
    incoming.write_at(0, b"bytes")
    settling = asyncio.ensure_future(incoming.settle(completed(b"bytes")))
    await started.wait()
    settling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await settling
    assert (await incoming.settle(completed(b"bytes"))).status is Status.COMPLETED
    assert calls == [b"bytes", b"bytes"]


async def test_handlers_and_segments_share_a_limit(target: MemoryTarget) -> None:
    async def handler(_: ReceivedItem) -> None:
        raise AssertionError

    target.limit.limit = MIB
    handled = HandlerTarget(handler, target.limit).begin(item())
    handled.write_at(0, bytes(MIB - 4096))
    incoming = target.begin(item(2))
    await target.in_thread(lambda: incoming.write_at(0, bytes(4096)))
    with pytest.raises(OSError, match="limit"):
        await target.in_thread(lambda: incoming.write_at(4096, b"x"))
    with pytest.raises(Refused):
        handled.write_at(2**62, b"x")
    handled.discard()
    assert target.limit.used == 4096
    with pytest.raises(Condemned):
        handled.write_at(0, b"x")
    await target.in_thread(incoming.discard)


async def test_what_is_reserved_ahead_of_an_end_does_not_refuse_an_item_that_fits() -> None:
    target = await MemoryTarget.open(MemoryLimit(100 * 1024), lifetime=0.0)
    data = os.urandom(96 * 1024)
    incoming = target.begin(item())
    try:
        for start in (48, 72, 0, 24):
            part = memoryview(data)[start * 1024 : (start + 24) * 1024]
            await target.in_thread(partial(incoming.write_at, start * 1024, part))
        assert (await incoming.settle(completed(data))).status is Status.COMPLETED
    finally:
        await target.in_thread(incoming.discard)
        await target.in_thread(target.close)


async def test_empty_items_are_bounded_too() -> None:
    target = await MemoryTarget.open(MemoryLimit(4 * 4096))
    made = [await announced(target, b"", number) for number in range(4)]
    try:
        assert target.limit.used == 4 * 4096, "each takes a page"
        with pytest.raises(OSError, match="limit"):
            await announced(target, b"", 5)
    finally:
        for incoming, _ in made:
            await target.in_thread(incoming.discard)
        await target.in_thread(target.close)
    assert (target.limit.used, segments(target)) == (0, [])


async def test_shared_memory_that_somebody_removed_is_used_again() -> None:
    """As systemd-logind does at a log-out (RemoveIPC=yes)."""
    target = await MemoryTarget.open(MemoryLimit(MIB), lifetime=0.0)
    try:
        await announced(target, b"before")
        shutil.rmtree(f"/dev/shm/{target.owner.name}")
        await target.sweep()
        await announced(target, b"bytes", 2)
    finally:
        await target.in_thread(target.close)


async def test_segments_on_their_way_in_leave_descriptors_to_all_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without that nothing settles, and no descriptor is ever given back."""
    shared = Descriptors()
    files = await FileTarget.open(tmp_path / "root", descriptors=shared)
    memory = await MemoryTarget.open(MemoryLimit(64 * MIB), descriptors=shared)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    reserve = len(os.listdir("/proc/self/fd")) + 60  # whatever this process has open by now
    monkeypatch.setattr(inode, "DESCRIPTOR_RESERVE", reserve)
    most = reserve + 20
    held = [memory.begin(item(n)) for n in range(most + 10)]

    def begin() -> None:  # Each is half an item that never goes on.
        for one in held:
            with suppress(OSError):
                one.write_at(0, b"half")

    file = files.begin(item())
    await memory.in_thread(lambda: file.write_at(0, b"bytes"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, before[1]))
    try:
        await memory.in_thread(begin)
        assert (await file.settle(completed(b"bytes"))).status is Status.COMPLETED
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        for one in held:
            await memory.in_thread(one.discard)
        await asyncio.to_thread(memory.close)
        await asyncio.to_thread(files.close)
