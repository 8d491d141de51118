"""A write group that is closed at any of its await points leaves nothing behind."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from tenacity import wait_none

from bench import EIO, Bench, Faulty, Recorder, complete, open_bench, task
from splitferry_consumer import group as group_module
from splitferry_consumer.group import WriteSplitDataTaskHandle
from splitferry_consumer.targets.memory import MemoryTarget
from splitferry_protocol.records import Block
from stepping import stepped


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_module, "PAUSES", wait_none())


def descriptors() -> set[str]:
    """What files this process has open."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            found.add(os.readlink(f"/proc/self/fd/{name}"))
        except FileNotFoundError:
            continue
    return found


async def receive(
    bench: Bench, block: Block, number: int, here: asyncio.Event
) -> tuple[WriteSplitDataTaskHandle, Faulty, Recorder]:
    """Start a request that compares, catches up, and has its writing and settling tried twice.

    Sets `here` when the group waits for the time `number`.
    """
    group, incoming, reports = bench.group(block)
    incoming.plan("write_at", None, EIO)
    incoming.plan("settle", EIO)
    process_tasks = group.process_tasks

    def reached(step: int) -> None:
        if step == number:
            here.set()

    group.process_tasks = lambda: stepped(process_tasks(), reached)  # type: ignore[method-assign]
    handle = WriteSplitDataTaskHandle(group, reports)
    handle.start()
    handle.submit_split(task(4, b"ef"))
    await asyncio.sleep(0)
    handle.submit_split(task(0, b"abcd"))
    handle.submit_split(task(2, b"cdef", overlap=4))
    handle.end(complete(b"abcdef", hashlib.sha256(b"abcdef").digest()))
    return handle, incoming, reports


def steps(start: int = 1) -> Iterator[int]:
    yield from range(start, 100)
    raise AssertionError("a request of three splits takes no hundred steps")


@pytest.mark.parametrize("block", list(Block))
async def test_a_group_closed_at_any_step_leaves_nothing(tmp_path: Path, block: Block) -> None:
    stopped_at = []
    for number in steps():
        async with open_bench(tmp_path / str(number)) as bench:
            tasks, files = asyncio.all_tasks(), await asyncio.to_thread(descriptors)
            here = asyncio.Event()
            handle, incoming, reports = await receive(bench, block, number, here)
            waiting = asyncio.create_task(handle.wait())
            arriving = asyncio.create_task(here.wait())
            await asyncio.wait([arriving, waiting], return_when=asyncio.FIRST_COMPLETED)
            arriving.cancel()
            settled = waiting.done()
            await handle.close()
            await asyncio.wait([waiting, arriving])
            if not settled:
                stopped_at.append(number)
                assert waiting.cancelled()
                assert [kind for kind, _ in reports.told] in [[], ["compared"]]
            assert bench.gauge.bytes == 0
            assert bench.temporaries == []
            memory = bench.targets[Block.MEM]
            assert isinstance(memory, MemoryTarget)
            assert memory.limit.used == 0
            assert await asyncio.to_thread(descriptors) <= files
            assert asyncio.all_tasks() == tasks
            assert incoming.calls[-1] == "discard"
        if settled:
            break
    # All waits were met: for a first task, for threads, between tries, for the settlement.
    assert len(stopped_at) >= 4


async def test_a_close_that_is_cancelled_can_be_asked_for_again(tmp_path: Path) -> None:
    async with open_bench(tmp_path / "root") as bench:
        handle, incoming, _ = bench.start()
        incoming.free.clear()
        handle.submit_split(task(0, b"abc"))
        await asyncio.to_thread(incoming.entered.wait)
        closing = asyncio.create_task(handle.close())
        await asyncio.sleep(0.001)
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        assert "discard" not in incoming.calls, "the thread still writes"
        incoming.free.set()
        await handle.close()
        assert incoming.calls[-1] == "discard"
