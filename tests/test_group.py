"""Write handle and write group, on real files and shared memory; faults where a test plans them."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import tempfile
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
from tenacity import wait_none

from bench import (
    EIO,
    REQUEST,
    Bench,
    Faulty,
    Recorder,
    captured_logs,
    complete,
    open_bench,
    task,
    until,
)
from failing import unprivileged
from splitferry_consumer import group as group_module
from splitferry_consumer.flow import weight
from splitferry_consumer.group import (
    PROMPT_MAX,
    WHOLE_MAX,
    Ending,
    WriteSplitDataTaskHandle,
    put_whole,
)
from splitferry_consumer.targets import (
    Condemned,
    Item,
    Refused,
    Target,
    Verdict,
    Whole,
    settle_each,
)
from splitferry_protocol.errors import (
    BatchTransferFailed,
    SplitTaskFailed,
    WriteDataFailed,
)
from splitferry_protocol.ids import RequestId, RequestKey
from splitferry_protocol.records import Block, Status


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    async with open_bench(tmp_path / "root") as made:
        yield made


@pytest.fixture
def logs() -> Iterator[list[Any]]:
    with captured_logs() as captured:
        yield captured


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_module, "PAUSES", wait_none())


def events(logs: list[Any], event: str) -> list[Any]:
    return [entry for entry in logs if entry["event"] == event]


# ---- the write handle


async def test_a_handle_tells_the_version_takes_splits_and_waits(bench: Bench) -> None:
    handle, _, reports = bench.start()
    assert handle.version() == 5
    handle.submit_split(task(0, b"hello "))
    handle.submit_split(task(6, b"world"))
    handle.end(complete(b"hello world", hashlib.sha256(b"hello world").digest()))
    verdict = await handle.wait()
    digest = hashlib.sha256(b"hello world").digest()
    assert verdict == Verdict(Status.COMPLETED, None, 11, digest, {"path": "a/item.bin"})
    assert reports.told == [("settled", verdict)]
    assert (bench.root / "a/item.bin").read_bytes() == b"hello world"
    assert await handle.wait() == verdict


async def test_waiting_may_be_given_up_without_harm(bench: Bench) -> None:
    handle, _, _ = bench.start()
    waiting = asyncio.create_task(handle.wait())
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    handle.submit_split(task(0, b"x"))
    handle.end(complete(b"x"))
    assert (await handle.wait()).status is Status.COMPLETED


@pytest.mark.parametrize("shut", ["end", "close"])
async def test_a_split_on_a_closed_channel_is_an_error_with_its_index(
    bench: Bench, logs: list[Any], shut: str
) -> None:
    handle, _, _ = bench.start()
    if shut == "end":
        handle.end(Ending(Status.ABORTED, BatchTransferFailed(REQUEST, "enough")))
    else:
        await handle.close()
    with pytest.raises(SplitTaskFailed) as caught:
        handle.submit_split(task(0, b"late", index=9))
    assert (caught.value.request_id, caught.value.idx) == (REQUEST, 9)
    (entry,) = events(logs, "task submit error")
    assert (entry["index"], entry["request"], entry["log_level"]) == (9, "7-1", "error")
    assert bench.gauge.bytes == 0, "a refused split is not in flight"


@pytest.mark.parametrize("problem", [Condemned("lost"), RuntimeError("a mistake")])
async def test_what_breaks_a_group_is_reported_and_raised_by_wait(
    bench: Bench, problem: Exception
) -> None:
    handle, incoming, reports = bench.start()
    incoming.plan("write_at", problem)
    handle.submit_split(task(0, b"x"))
    with pytest.raises(type(problem)):
        await handle.wait()
    assert reports.told == [("broken", problem)]


# ---- creation


@pytest.mark.parametrize("block", list(Block))
async def test_the_creation_of_a_group_is_logged(
    bench: Bench, logs: list[Any], block: Block
) -> None:
    bench.group(block)
    (entry,) = events(logs, "task group created")
    assert entry == {
        "event": "task group created",
        "log_level": "debug",
        "unique_id": "a/item.bin",
        "block": block.value,
        "version": 5,
        "request": "7-1",
        "partition": 3,
        "offset": 42,
    }


# ---- the completion check


async def test_a_group_is_complete_when_the_expected_size_is_there(bench: Bench) -> None:
    handle, incoming, _ = bench.start()
    group = handle._group
    assert (group.expected_size, group.current_size) == (None, 0)
    handle.submit_split(task(0, b"abc"))
    await until(lambda: group.current_size == 3)
    assert not group.try_complete(), "who knows what follows"
    incoming.free.clear()
    handle.submit_split(task(3, b"de"))
    handle.end(complete(b"abcde"))
    assert group.expected_size == 5
    assert not group.try_complete(), "it is still to be written"
    await until(lambda: not group._tasks)
    assert not group.try_complete(), "a thread writes it"
    incoming.free.set()
    await handle.wait()
    assert group.current_size == 5
    assert group.try_complete()


async def test_a_request_that_failed_in_the_log_is_complete_whatever_is_there(
    bench: Bench,
) -> None:
    group, _, _ = bench.group()
    group.end(Ending(Status.EXPIRED, BatchTransferFailed(REQUEST, "expired"), size=100))
    assert group.try_complete()


async def test_a_group_is_not_complete_before_the_log_says_so(bench: Bench) -> None:
    group, _, _ = bench.group()
    assert not group.try_complete()


async def test_an_empty_item_needs_no_task(bench: Bench) -> None:
    handle, _, _ = bench.start()
    handle.end(complete(b""))
    assert (await handle.wait()).size == 0
    assert (bench.root / "a/item.bin").read_bytes() == b""


# ---- the process loop


@pytest.mark.parametrize("block", list(Block))
async def test_splits_in_any_order_make_the_item_and_its_digest(bench: Bench, block: Block) -> None:
    data = os.urandom(50_000)
    handle, incoming, _ = bench.start(block)
    for start in (40_000, 10_000, 0, 30_000, 20_000):
        handle.submit_split(task(start, data[start : start + 10_000]))
        await asyncio.sleep(0)
    handle.end(complete(data))
    verdict = await handle.wait()
    assert (verdict.size, verdict.sha256) == (50_000, hashlib.sha256(data).digest())
    assert verdict.target is not None
    folder = bench.root if block is Block.FILE else Path("/dev/shm")
    assert (folder / str(next(iter(verdict.target.values())))).read_bytes() == data
    if block is Block.MEM:
        await asyncio.to_thread(incoming.discard)


async def test_the_digest_of_splits_in_order_reads_nothing_back(bench: Bench) -> None:
    data = os.urandom(30_000)
    handle, incoming, _ = bench.start()
    for start in range(0, 30_000, 10_000):
        handle.submit_split(task(start, data[start : start + 10_000]))
    handle.end(complete(data, hashlib.sha256(data).digest()))
    assert (await handle.wait()).status is Status.COMPLETED
    assert "read_at" not in incoming.calls


async def test_the_digest_catches_up_when_a_gap_has_closed(bench: Bench) -> None:
    handle, incoming, _ = bench.start()
    handle.submit_split(task(2, b"cd"))
    await until(lambda: handle._group.current_size == 2)
    assert "read_at" not in incoming.calls, "bytes 0 and 1 come first"
    handle.submit_split(task(0, b"ab"))
    await until(lambda: handle._group._digested == 4)
    assert "read_at" in incoming.calls
    handle.submit_split(task(4, b"ef"))
    handle.end(complete(b"abcdef", hashlib.sha256(b"abcdef").digest()))
    assert (await handle.wait()).status is Status.COMPLETED


async def test_another_digest_fails_the_request_and_tells_both(bench: Bench) -> None:
    handle, _, reports = bench.start()
    handle.submit_split(task(0, b"abc"))
    handle.end(complete(b"abc", b"\1" * 32))
    verdict = await handle.wait()
    digest = hashlib.sha256(b"abc").digest()
    assert (verdict.status, verdict.sha256, verdict.target) == (Status.FAILED, digest, None)
    assert isinstance(verdict.error, BatchTransferFailed)
    assert digest.hex() in verdict.error.reason
    assert "01" * 32 in verdict.error.reason
    assert reports.told == [("settled", verdict)]
    assert not (bench.root / "a/item.bin").exists()


async def test_bytes_that_nobody_wants_any_more_are_not_written(bench: Bench) -> None:
    handle, incoming, _ = bench.start()
    handle.submit_split(task(0, b"abc"))
    error = BatchTransferFailed(REQUEST, "aborted: enough")
    handle.end(Ending(Status.ABORTED, error))
    assert await handle.wait() == Verdict(Status.ABORTED, error)
    assert "write_at" not in incoming.calls


async def test_bytes_in_flight_are_counted_until_they_are_written(bench: Bench) -> None:
    handle, incoming, _ = bench.start()
    incoming.free.clear()
    handle.submit_split(task(0, b"abc"))
    handle.submit_split(task(3, b"de"))
    assert bench.gauge.bytes == weight(b"abc") + weight(b"de")
    await until(incoming.entered.is_set)
    assert bench.gauge.bytes == weight(b"abc") + weight(b"de")
    incoming.free.set()
    await until(lambda: bench.gauge.bytes == 0)


async def test_one_slow_request_does_not_hold_up_another(bench: Bench) -> None:
    slow, held, _ = bench.start()
    held.free.clear()
    slow.submit_split(task(0, b"slow"))
    await until(held.entered.is_set)
    other = Item(RequestKey("group", "splits", 3, RequestId(7, 2), 43), "other", 1)
    quick, _, _ = bench.start(item=other)
    quick.submit_split(task(0, b"quick"))
    quick.end(complete(b"quick"))
    assert (await quick.wait()).status is Status.COMPLETED
    held.free.set()


# ---- comparing


async def test_the_same_bytes_again_are_reported_as_the_same(bench: Bench) -> None:
    handle, incoming, reports = bench.start()
    handle.submit_split(task(0, b"abcd"))
    handle.submit_split(task(2, b"cdef", overlap=2))
    await until(lambda: reports.told)
    assert reports.told == [("compared", True)]
    assert handle._group.current_size == 6
    handle.end(complete(b"abcdef", hashlib.sha256(b"abcdef").digest()))
    assert (await handle.wait()).status is Status.COMPLETED
    assert incoming.calls.count("write_at") == 2


async def test_other_bytes_are_reported_and_nothing_of_the_split_is_written(bench: Bench) -> None:
    handle, incoming, reports = bench.start()
    handle.submit_split(task(0, b"abcd"))
    handle.submit_split(task(2, b"cXef", overlap=2))
    await until(lambda: reports.told)
    assert reports.told == [("compared", False)]
    assert incoming.inner.read_at(0, 4) == b"abcd"
    assert handle._group.current_size == 4


async def test_a_comparison_is_reported_though_the_digest_cannot_catch_up_yet(
    bench: Bench, no_pauses: None
) -> None:
    # The ledger decides nothing more of the request until it is told: a comparison that was made,
    # and then forgotten because reading back for the digest failed, would hold W for ever.
    handle, incoming, reports = bench.start()
    incoming.plan("read_at", None, EIO)
    handle.submit_split(task(2, b"cd"))
    handle.submit_split(task(0, b"ab"))
    handle.submit_split(task(0, b"abcd", overlap=4))
    await until(lambda: reports.told)
    assert reports.told == [("compared", True)]


# ---- errors of the target


@pytest.mark.parametrize(
    ("block", "event"),
    [(Block.FILE, "file write error"), (Block.MEM, "memory write error")],
)
async def test_a_write_error_is_logged_with_its_offset_and_tried_again(
    bench: Bench, logs: list[Any], no_pauses: None, block: Block, event: str
) -> None:
    handle, incoming, _ = bench.start(block)
    handle.submit_split(task(0, b"abc"))
    await until(lambda: handle._group.current_size == 3)
    incoming.plan("write_at", EIO, EIO)
    handle.submit_split(task(5, b"fg"))
    handle.submit_split(task(3, b"de"))
    handle.end(complete(b"abcdefg", hashlib.sha256(b"abcdefg").digest()))
    assert (await handle.wait()).status is Status.COMPLETED
    failures = events(logs, event)
    assert [(entry["at"], entry["attempt"]) for entry in failures] == [(5, 1), (5, 2)]
    assert {entry["log_level"] for entry in failures} == {"warning"}
    assert "does not answer" in failures[0]["error"]
    await asyncio.to_thread(incoming.discard)


async def test_a_second_try_goes_on_with_the_task_that_failed(
    bench: Bench, no_pauses: None
) -> None:
    handle, incoming, _ = bench.start()
    incoming.plan("write_at", None, EIO)
    handle.submit_split(task(0, b"abc"))
    handle.submit_split(task(3, b"de"))
    handle.end(complete(b"abcde", hashlib.sha256(b"abcde").digest()))
    assert (await handle.wait()).status is Status.COMPLETED
    assert incoming.calls.count("write_at") == 3


async def test_a_target_that_does_not_heal_in_time_is_given_up(
    bench: Bench, no_pauses: None
) -> None:
    handle, incoming, reports = bench.start(write_timeout=0.5)
    incoming.plan("write_at", *[EIO] * 1_000_000)
    handle.submit_split(task(0, b"abc"))
    await until(lambda: reports.told)
    ((kind, error),) = reports.told
    assert kind == "failed"
    assert isinstance(error, WriteDataFailed)
    assert error.request_id == REQUEST
    assert incoming.calls.count("write_at") > 1
    # The ledger decides where the request ends; until then its bytes are let go unwritten.
    tries = incoming.calls.count("write_at")
    handle.submit_split(task(3, b"de"))
    await until(lambda: bench.gauge.bytes == 0)
    handle.end(Ending(Status.FAILED, error))
    assert await handle.wait() == Verdict(Status.FAILED, error)
    assert incoming.calls.count("write_at") == tries


async def test_a_target_that_gives_out_after_the_end_fails_the_request(
    bench: Bench, no_pauses: None
) -> None:
    handle, incoming, reports = bench.start(write_timeout=0)
    incoming.plan("write_at", EIO)
    handle.submit_split(task(0, b"abc"))
    handle.end(complete(b"abc"))
    verdict = await handle.wait()
    assert verdict.status is Status.FAILED
    assert isinstance(verdict.error, WriteDataFailed)
    assert reports.told == [("settled", verdict)], "the ledger has ended it already"


async def test_what_the_log_has_ended_keeps_its_own_end(bench: Bench, no_pauses: None) -> None:
    handle, incoming, reports = bench.start(write_timeout=0)
    incoming.plan("write_at", EIO)
    incoming.free.clear()
    handle.submit_split(task(0, b"abc"))
    await until(incoming.entered.is_set)
    aborted = BatchTransferFailed(REQUEST, "aborted: enough")
    handle.end(Ending(Status.ABORTED, aborted))
    incoming.free.set()
    assert await handle.wait() == Verdict(Status.ABORTED, aborted)
    assert reports.told == [("settled", Verdict(Status.ABORTED, aborted))]


async def test_a_refusal_is_not_tried_again(bench: Bench) -> None:
    handle, incoming, reports = bench.start()
    refusal = BatchTransferFailed(REQUEST, "quota")
    incoming.plan("write_at", Refused(refusal))
    handle.submit_split(task(0, b"abc"))
    await until(lambda: reports.told)
    assert reports.told == [("failed", refusal)]
    assert incoming.calls == ["write_at"]


async def test_a_refusal_at_the_end_fails_the_request(bench: Bench) -> None:
    handle, incoming, _ = bench.start()
    refusal = BatchTransferFailed(REQUEST, "a newer version is there")
    incoming.plan("settle", Refused(refusal))
    handle.submit_split(task(0, b"abc"))
    handle.end(complete(b"abc"))
    assert await handle.wait() == Verdict(Status.FAILED, refusal)


async def test_a_verdict_is_proposed_until_it_is_recorded(bench: Bench) -> None:
    handle, incoming, _ = bench.start()
    incoming.plan("settle", EIO)
    handle.submit_split(task(0, b"abc"))
    handle.end(complete(b"abc"))
    assert (await handle.wait()).status is Status.COMPLETED
    assert incoming.calls.count("settle") == 2


async def test_a_completion_that_cannot_be_recorded_in_time_becomes_a_failure(
    bench: Bench,
) -> None:
    handle, incoming, _ = bench.start(write_timeout=-1)
    incoming.plan("settle", EIO, EIO)
    handle.submit_split(task(0, b"abc"))
    handle.end(complete(b"abc"))
    verdict = await handle.wait()
    assert verdict.status is Status.FAILED
    assert isinstance(verdict.error, WriteDataFailed)
    assert incoming.calls.count("settle") == 3, "the failure itself is proposed until it is held"


async def test_a_digest_that_cannot_be_read_back_fails_the_request(
    bench: Bench, no_pauses: None
) -> None:
    handle, incoming, _ = bench.start(write_timeout=0)
    handle.submit_split(task(2, b"cd"))
    incoming.plan("read_at", *[EIO] * 10)
    handle.submit_split(task(0, b"ab"))
    handle.end(complete(b"abcd"))
    verdict = await handle.wait()
    assert verdict.status is Status.FAILED
    assert isinstance(verdict.error, WriteDataFailed)


async def test_a_condemned_settlement_breaks_the_group(bench: Bench) -> None:
    handle, incoming, reports = bench.start()
    problem = Condemned("fsync failed")
    incoming.plan("settle", problem)
    handle.submit_split(task(0, b"abc"))
    handle.end(complete(b"abc"))
    with pytest.raises(Condemned):
        await handle.wait()
    assert reports.told == [("broken", problem)]


# ---- closing


async def test_closing_waits_for_the_thread_at_work(bench: Bench) -> None:
    # Else the descriptor would be closed under it, and its number could be another file's by
    # the time of the write.
    handle, incoming, reports = bench.start()
    incoming.free.clear()
    handle.submit_split(task(0, b"abc"))
    handle.submit_split(task(3, b"de"))
    await until(incoming.entered.is_set)
    closing = asyncio.create_task(handle.close())
    await until(lambda: bench.gauge.bytes == 0)
    for _ in range(10):
        await asyncio.sleep(0.001)
    assert not closing.done()
    assert "discard" not in incoming.calls
    incoming.free.set()
    await closing
    # The write came through, into the place that was its own until then.
    assert incoming.calls == ["write_at"] * 2 + ["discard"]
    assert bench.temporaries == []
    assert reports.told == [], "nobody asks any more"


async def test_a_settlement_under_way_comes_to_its_end(bench: Bench) -> None:
    # Dropping the temporary file between verdict and rename would leave a verdict without bytes.
    handle, incoming, reports = bench.start()
    reached, go_on = asyncio.Event(), asyncio.Event()
    settle = incoming.inner.settle

    async def slow(proposal: Verdict) -> Verdict:
        reached.set()
        await go_on.wait()
        return await settle(proposal)

    incoming.inner.settle = slow  # type: ignore[method-assign]
    handle.submit_split(task(0, b"abc"))
    handle.end(complete(b"abc"))
    await reached.wait()
    closing = asyncio.create_task(handle.close())
    await asyncio.sleep(0.01)
    assert not closing.done()
    go_on.set()
    await closing
    assert (bench.root / "a/item.bin").read_bytes() == b"abc"
    assert reports.told == [], "the next owner finds the verdict, and tells it"


@pytest.mark.parametrize("keep", [False, True])
async def test_an_announced_segment_stays_only_if_its_result_may_be_told(
    bench: Bench, keep: bool
) -> None:
    handle, incoming, _ = bench.start(Block.MEM)
    handle.submit_split(task(0, b"abc"))
    handle.end(complete(b"abc"))
    verdict = await handle.wait()
    assert verdict.target is not None
    await handle.close(keep=keep)
    assert (Path("/dev/shm") / str(verdict.target["shm"])).exists() == keep
    await asyncio.to_thread(incoming.discard)


async def test_closing_before_the_first_step_leaves_nothing(bench: Bench) -> None:
    handle, incoming, reports = bench.start()
    handle.submit_split(task(0, b"abc"))
    await handle.close()
    assert bench.gauge.bytes == 0
    assert incoming.calls == ["discard"]
    assert reports.told == []
    with pytest.raises(asyncio.CancelledError):
        await handle.wait()


# ---- items that came whole


@dataclass
class Putting:
    """What `put_whole` asks of a target."""

    in_memory: bool = False
    settle_whole: Callable[[Sequence[Whole]], Awaitable[None]] = settle_each


def put(
    bench: Bench, *payloads: bytes, block: Block = Block.FILE, target: Putting | None = None
) -> list[tuple[WriteSplitDataTaskHandle, Faulty, Recorder]]:
    """Have items put together, of each of which one split brought all. Awaits nothing."""
    made = []
    for number, payload in enumerate(payloads):
        item = Item(RequestKey("group", "splits", 3, RequestId(7, number), number), f"{number}", 1)
        group, incoming, reports = bench.group(block, item)
        handle = WriteSplitDataTaskHandle(group, reports)
        bench.handles.append(handle)
        handle.submit_split(task(0, payload))
        handle.end(complete(payload, hashlib.sha256(payload).digest()))
        assert handle.whole
        made.append((handle, incoming, reports))
    handles = [handle for handle, _, _ in made]
    put_whole(handles, cast("Target", target or Putting()), bench.threads)
    return made


async def told(made: list[tuple[WriteSplitDataTaskHandle, Faulty, Recorder]]) -> list[Any]:
    """What each reported: "broken", or the status that it settled with."""
    await until(lambda: all(reports.told for _, _, reports in made))
    assert all(len(reports.told) == 1 for _, _, reports in made)
    said = [reports.told[0] for _, _, reports in made]
    return [what.status if kind == "settled" else kind for kind, what in said]


async def test_items_that_came_whole_are_settled_without_a_task_each(bench: Bench) -> None:
    made = put(bench, b"one", b"two", b"three")
    assert await told(made) == [Status.COMPLETED] * 3
    for number, data in enumerate((b"one", b"two", b"three")):
        handle, incoming, _ = made[number]
        assert (bench.root / f"{number}").read_bytes() == data
        assert handle._task is None
        assert incoming.calls == ["put", "settle"]
    assert bench.gauge.bytes == 0


@pytest.mark.parametrize(
    ("in_memory", "sizes", "on_the_loop"),
    [
        (True, [PROMPT_MAX // 2, PROMPT_MAX // 2], True),
        (True, [PROMPT_MAX // 2, PROMPT_MAX // 2, 1], False),
        (False, [1, 1], False),
    ],
    ids=["a little in memory", "too much at once", "on a disk"],
)
async def test_only_a_little_in_memory_is_put_on_the_event_loop(
    bench: Bench, in_memory: bool, sizes: list[int], on_the_loop: bool
) -> None:
    made = put(bench, *map(bytes, sizes), block=Block.MEM, target=Putting(in_memory))
    assert await told(made) == [Status.COMPLETED] * len(sizes)
    ours = threading.get_ident()
    assert [incoming.put_in == ours for _, incoming, _ in made] == [on_the_loop] * len(sizes)
    assert None not in [incoming.put_in for _, incoming, _ in made]


@pytest.mark.parametrize("size", [WHOLE_MAX, WHOLE_MAX + 1])
async def test_only_small_items_go_with_others(bench: Bench, size: int) -> None:
    group, _, reports = bench.group()
    handle = WriteSplitDataTaskHandle(group, reports)
    bench.handles.append(handle)
    handle.submit_split(task(0, bytes(size)))
    assert not handle.whole, "who knows what follows"
    handle.end(complete(bytes(size)))
    assert handle.whole is (size == WHOLE_MAX)


@pytest.mark.parametrize("step", ["put", "settle"])
@pytest.mark.parametrize("fault", [EIO, Refused(BatchTransferFailed(REQUEST, "no room"))])
async def test_what_goes_wrong_with_one_of_many_is_left_to_its_own_task(
    bench: Bench, step: str, fault: Exception
) -> None:
    made = put(bench, b"one", b"two")
    made[0][1].plan(step, fault)
    assert await told(made) == [Status.COMPLETED] * 2
    assert [handle._task is None for handle, _, _ in made] == [False, True]
    assert (bench.root / "0").read_bytes() == b"one"
    assert bench.gauge.bytes == 0


async def test_another_digest_of_one_of_many_fails_it_alone(bench: Bench) -> None:
    made = put(bench, b"one", b"two")
    made[0][0].end(complete(b"one", b"\1" * 32))
    assert await told(made) == [Status.FAILED, Status.COMPLETED]
    assert not (bench.root / "0").exists()


@pytest.mark.parametrize("step", ["put", "settle"])
async def test_a_lost_write_of_one_of_many_is_not_tried_again(bench: Bench, step: str) -> None:
    # A second fsync after a failed one lies: the bytes have to be received again.
    made = put(bench, b"one", b"two")
    made[0][1].plan(step, Condemned("lost"))
    assert await told(made) == ["broken", Status.COMPLETED]
    assert made[0][0]._task is None


async def test_what_fails_for_many_is_told_by_each_of_them(bench: Bench) -> None:
    async def settle(items: object) -> None:
        raise RuntimeError("a mistake")

    made = put(bench, b"one", b"two", target=Putting(settle_whole=settle))
    assert await told(made) == ["broken"] * 2


async def test_closing_waits_for_the_step_that_puts_many(bench: Bench) -> None:
    made = put(bench, b"one", b"two")
    held = made[0][1]
    held.free.clear()
    await until(held.entered.is_set)
    closing = [asyncio.create_task(handle.close()) for handle, _, _ in made]
    await until(lambda: bench.gauge.bytes == 0)
    assert [closed.done() for closed in closing] == [False] * 2
    held.free.set()
    await asyncio.gather(*closing)
    assert all(reports.told == [] for _, _, reports in made), "nobody asks any more"
    assert all(incoming.calls[-1] == "discard" for _, incoming, _ in made)
    assert bench.temporaries == []
    assert bench.gauge.bytes == 0


async def test_a_directory_that_we_may_not_write_to_ends_the_request() -> None:
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    (folder / "root").mkdir(mode=0o777)
    (folder / "root").chmod(0o777)
    (folder / "root/a").mkdir(mode=0o755)  # Another user's.
    try:
        with unprivileged():
            async with open_bench(folder / "root") as bench:
                handle, _, _ = bench.start(write_timeout=0.5)
                handle.submit_split(task(0, b"bytes"))
                handle.end(complete(b"bytes"))
                async with asyncio.timeout(30):
                    verdict = await handle.wait()
                assert verdict.status is Status.FAILED
    finally:
        shutil.rmtree(folder)
