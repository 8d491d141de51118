"""One partition from taking to losing, on a Kafka in memory and real targets."""

from __future__ import annotations

import asyncio
import errno
import gc
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import structlog
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tenacity import wait_none

from bench import EIO, Faulty, captured_logs
from memory_transport import DEAD_LETTERS, SPLITS, Entry, Fate, Kafka, broken
from owners import Owner, announced, results, rules, temporaries, told, until
from splitferry_consumer import group as group_module
from splitferry_consumer import ledger as ledger_module
from splitferry_consumer import partition as partition_module
from splitferry_consumer.bookmark import Bookmark
from splitferry_consumer.flow import MINIMUM_SHARE, RECORD_OVERHEAD, Flow
from splitferry_consumer.partition import Partition, Vigil
from splitferry_consumer.targets import Condemned, Incoming, Item, Target, Whole, settle_each
from splitferry_consumer.targets.file import FileTarget
from splitferry_consumer.targets.handler import HandlerTarget, ReceivedItem
from splitferry_consumer.targets.limit import MemoryLimit
from splitferry_consumer.targets.memory import MemoryTarget
from splitferry_consumer.transport import Fenced, LeftOpen, OutOfRange, Record, TransportError
from splitferry_protocol.codec import crc_header, encode_split
from splitferry_protocol.errors import BatchTransferFailed
from splitferry_protocol.ids import RequestId
from splitferry_protocol.records import Block, Split, Status
from world import abort, split

FAST = "/dev/shm" if Path("/dev/shm").is_dir() else None
"""Where fsync costs nothing: for what survives only a kill."""


@pytest.fixture(autouse=True, scope="module")
def hasty() -> Iterator[None]:
    """The pauses of production are for the sake of others; nobody else is here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(partition_module, "TICK", 0.005)
        patch.setattr(partition_module, "COMMIT_INTERVAL", 0.005)
        patch.setattr(partition_module, "RETAKE_PAUSES", (0.001,) * 5)
        patch.setattr(group_module, "PAUSES", wait_none())
        yield


@dataclass(eq=False)
class FaultyTarget:
    """A real target; the test sees, and may plan faults for, the `Incoming`s that it begins."""

    inner: Target
    begun: list[Faulty] = field(default_factory=list)
    plan: Callable[[Faulty], None] | None = None
    refusal: Exception | None = None
    cleared: list[int] = field(default_factory=list)
    in_memory: bool = False

    def begin(self, item: Item) -> Incoming:
        if self.refusal is not None:
            refusal, self.refusal = self.refusal, None
            raise refusal
        incoming = Faulty(self.inner.begin(item))
        if self.plan is not None:
            self.plan(incoming)
        self.begun.append(incoming)
        return incoming

    async def settle_whole(self, items: Sequence[Whole]) -> None:
        await settle_each(items)

    async def passed(self, group: str, topic: str, partition: int, before: int) -> None:
        self.cleared.append(before)
        await self.inner.passed(group, topic, partition, before)

    async def sweep(self) -> None:
        await self.inner.sweep()

    def close(self) -> None:
        self.inner.close()


@dataclass
class Place:
    """A Kafka, a root, and the owners that a test lets in."""

    kafka: Kafka
    root: Path
    threads: ThreadPoolExecutor
    file: FaultyTarget
    handled: list[ReceivedItem] = field(default_factory=list)
    owners: list[Owner] = field(default_factory=list)

    def own(self, **options: Any) -> Owner:
        async def handle(item: ReceivedItem) -> None:
            self.handled.append(item)

        memory = HandlerTarget(handle, MemoryLimit(2**26))
        targets: dict[Block, Target] = {Block.FILE: self.file, Block.MEM: memory}
        owner = Owner(self.kafka, targets, self.threads, **options)
        self.owners.append(owner)
        return owner

    async def finish(self, owner: Owner | None = None) -> None:
        """Let all that is in the log come to its end."""
        held = owner or self.own()
        await until(lambda: held.finished)


@asynccontextmanager
async def open_place(root: Path) -> AsyncIterator[Place]:
    """Whatever happened there, nothing of it stays when the partition is lost."""
    with ThreadPoolExecutor(4) as threads:
        target = await FileTarget.open(root, executor=threads)
        place = Place(Kafka(), root, threads, FaultyTarget(target))
        before = asyncio.all_tasks()
        try:
            yield place
        finally:
            for gate in place.kafka.gates.values():
                gate.set()
            for incoming in place.file.begun:
                incoming.free.set()
            for owner in place.owners:
                await owner.lose()
        assert [owner.partition.gauge.bytes for owner in place.owners] == [0] * len(place.owners)
        assert temporaries(root) == []
        assert asyncio.all_tasks() - before <= {asyncio.current_task()}
        await asyncio.to_thread(target.close)


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Place]:
    async with open_place(tmp_path / "root") as made:
        yield made


def file(request: int, offset: int = 0, payload: bytes = b"", **facts: Any) -> Split:
    return split(request, offset, payload, block=Block.FILE, **facts)


def as_read(offset: int, content: Split) -> Record:
    value = encode_split(content)
    return Record(offset, content.request.key, value, [crc_header(value)])


# ---- the way of a request


async def test_a_request_becomes_an_item_a_result_and_a_commit(place: Place) -> None:
    place.kafka.send(file(1, 0, b"hello ", total=11, reply=b"token"))
    place.kafka.send(split(2, 0, b"in memory", total=9))
    place.kafka.send(file(1, 6, b"world"))
    await place.finish()
    by_request = {result.request.sequence: result for result in results(place.kafka)}
    assert {n: (r.status, r.target, r.input[2:]) for n, r in by_request.items()} == {
        1: (Status.COMPLETED, {"path": "item-1"}, (0, 2)),
        2: (Status.COMPLETED, None, (1, 1)),
    }
    assert by_request[1].reply == b"token"
    assert (place.root / "item-1").read_bytes() == b"hello world"
    assert [bytes(item.data) for item in place.handled] == [b"in memory"]
    bookmark = Bookmark.parse(*place.kafka.offsets[0])
    assert (bookmark.watermark, bookmark.told) == (3, 3)


async def test_a_record_that_nobody_can_read_is_a_dead_letter_and_the_next_goes_on(
    place: Place,
) -> None:
    place.kafka.send_raw(None, b"garbage")
    place.kafka.send(file(1, total=0))
    await place.finish()
    assert told(place.kafka) == {("dead letter", b"0"): 1}
    assert [result.status for result in results(place.kafka)] == [Status.COMPLETED]


async def test_what_was_read_does_not_wait_for_the_collector(place: Place) -> None:
    """A record that nobody can read may have 31 MiB, and many may come in one poll."""
    owner = place.own()
    await place.finish(owner)
    gc.collect()
    gc.disable()
    try:
        place.kafka.send_raw(b"k", b"nobody can read it")
        await place.finish(owner)
        reading = Partition.deliver.__code__
        held = [o for o in gc.get_objects() if isinstance(o, FrameType) and o.f_code is reading]
        assert held == []
    finally:
        gc.enable()


async def test_an_abort_ends_a_request_and_leaves_nothing(place: Place) -> None:
    place.kafka.send(file(1, 0, b"ab", total=4))
    place.kafka.send(abort(1))
    await place.finish()
    (result,) = results(place.kafka)
    assert (result.status, result.input.last) == (Status.ABORTED, 1)
    assert not (place.root / "item-1").exists()


async def test_bytes_that_come_again_are_compared_with_what_is_there(place: Place) -> None:
    for payload in (b"abcd", b"abcd", b"abXd"):
        place.kafka.send(file(1, 0, payload, total=6))
    place.kafka.send(file(2, 0, b"abcd", total=6))
    place.kafka.send(file(2, 2, b"cdef", total=6))
    await place.finish()
    found = {r.request.sequence: (r.status, r.splits, r.duplicates) for r in results(place.kafka)}
    assert found == {1: (Status.FAILED, 1, 1), 2: (Status.COMPLETED, 2, 0)}
    assert (place.root / "item-2").read_bytes() == b"abcdef"
    assert told(place.kafka) == {("dead letter", b"2"): 1}


async def test_labels_that_come_with_a_later_split_reach_the_handler(place: Place) -> None:
    place.kafka.send(split(1, 0, b"ab", total=4))
    place.kafka.send(split(1, 2, b"cd", labels={"kind": "sample"}))
    await place.finish()
    assert [item.labels for item in place.handled] == [{"kind": "sample"}]


async def test_a_moved_end_of_the_log_is_committed_though_nobody_has_news(place: Place) -> None:
    # Else every rebalance would read again what holds nothing (transaction markers).
    place.kafka.send(file(1, total=0))
    owner = place.own()
    await place.finish(owner)
    place.kafka.logs[SPLITS, 0].entries.append(Entry(None))
    await until(lambda: place.kafka.offsets[0][0] == 2)


async def test_verdicts_that_nobody_can_ask_for_are_cleared(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partition_module, "VERDICTS_INTERVAL", 0)
    for request in range(10):
        place.kafka.send(file(request, total=0))
    place.own(rules=rules(horizon=4))
    await until(lambda: place.file.cleared and place.file.cleared[-1] == 6)
    assert max(place.file.cleared) == 6, "W is 10, and a horizon of 4 reaches back to 6"


# ---- taking


async def test_nothing_is_read_before_the_partition_is_taken(place: Place) -> None:
    place.kafka.send(file(1, total=0))
    place.kafka.gates["results_bounds"].clear()
    owner = place.own()
    await until(lambda: "results_bounds" in place.kafka.calls)
    assert not owner.partition.ready
    assert owner.member.paused == {0}
    owner.partition.deliver([as_read(0, file(1, total=0))])  # a poll that was under way
    place.kafka.gates["results_bounds"].set()
    await place.finish(owner)
    assert len(results(place.kafka)) == 1
    steps = [
        c for c in place.kafka.calls if c in {"writer", "committed", "results_bounds", "begin"}
    ]
    assert steps[:4] == ["writer", "committed", "results_bounds", "begin"]


async def test_it_reads_from_w_and_obeys_the_results_that_are_there(place: Place) -> None:
    place.kafka.send(file(1, 0, b"ab", total=4))
    place.kafka.send(file(2, total=0))
    first = place.own()
    await place.finish(first)
    assert place.kafka.offsets[0][0] == 0, "request 1 is open and holds W"
    await first.lose()
    place.kafka.send(file(1, 2, b"cd"))
    await place.finish()
    assert [(r.request.sequence, r.status) for r in results(place.kafka)] == [
        (2, Status.COMPLETED),
        (1, Status.COMPLETED),
    ]


async def test_nothing_is_published_before_the_position_has_reached_p(place: Place) -> None:
    # What is read up to there was perhaps told, and by whom, only the rest of it shows.
    contents = [file(1, 0, b"ab", total=4), file(2, total=0), file(3, total=0), file(4, total=0)]
    for content in contents:
        place.kafka.send(content)
    place.kafka.offsets[0] = (0, Bookmark(0, 0, 4, 1000).metadata)
    owner = place.own(feed=False)
    await until(lambda: owner.partition.ready)
    for offset in range(3):
        owner.partition.deliver([as_read(offset, contents[offset])])
    ledger = owner.partition._ledger
    assert ledger is not None
    await until(lambda: len(ledger._ready) == 2)
    turns = place.kafka.calls.count("position")
    await until(lambda: place.kafka.calls.count("position") > turns + 3)
    assert "begin" not in place.kafka.calls
    owner.partition.deliver([as_read(3, contents[3])])
    await until(lambda: len(results(place.kafka)) == 3)


async def test_what_was_told_is_not_told_again(place: Place) -> None:
    place.kafka.send(file(1, 0, b"ab", total=4, reply=b"old"))
    place.kafka.send(file(1, 0, b"ab", reply=b"new"))
    place.kafka.send_raw(None, b"garbage")
    place.kafka.send(file(2, total=0, reply=b"first"))
    place.kafka.send(file(2, total=0, reply=b"again"))
    for _ in range(3):
        owner = place.own()
        await place.finish(owner)
        await owner.lose()
        assert place.kafka.offsets[0][0] == 0, "all of it is read again"
    assert told(place.kafka) == {
        ("Accepted", "1-1", b"old"): 1,
        ("dead letter", b"2"): 1,
        ("Result", "1-2", b"again"): 1,
    }


async def test_a_misfit_is_refused_until_the_logs_fit(place: Place) -> None:
    place.kafka.offsets[0] = (1, Bookmark(1, 0, 1, 1000).metadata)
    owner = place.own()
    await until(lambda: place.kafka.calls.count("writer") > 2)
    assert not owner.partition.ready
    assert not place.kafka.logs[SPLITS, 0].entries
    place.kafka.send(file(1, total=0))
    place.kafka.send(file(2, total=0))
    await place.finish(owner)
    assert [r.request.sequence for r in results(place.kafka)] == [2]


@pytest.mark.parametrize("step", ["writer", "committed", "splits_bounds", "results_bounds"])
async def test_an_error_while_taking_is_followed_by_another_try(place: Place, step: str) -> None:
    place.kafka.faults[step] += [broken(), broken()]
    place.kafka.send(file(1, total=0))
    await place.finish()
    assert len(results(place.kafka)) == 1


# ---- back-pressure


async def test_a_partition_that_cannot_write_stops_itself_and_no_other(place: Place) -> None:
    flow = Flow(MINIMUM_SHARE)
    big = b"x" * (MINIMUM_SHARE + 1)
    place.kafka.send(file(1, 0, big, total=len(big)))
    place.file.plan = lambda incoming: incoming.free.clear()
    stuck = place.own(flow=flow)
    await until(lambda: stuck.partition.gauge.full)
    assert not stuck.partition.ready
    place.kafka.send(file(2, total=0))
    place.kafka.send(split(3, 0, b"quick", total=5), partition=1)
    place.own(flow=flow, number=1)
    await until(lambda: results(place.kafka, 1))
    assert stuck.partition._ledger is not None
    assert stuck.partition._ledger.position == 1, "it has read no further"
    place.file.plan = None
    place.file.begun[0].free.set()
    await place.finish(stuck)
    assert len(results(place.kafka)) == 2


async def test_a_partition_reads_no_further_while_too_many_results_wait(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_module, "UNSETTLED_MAX", 3)
    place.kafka.gates["commit"].clear()
    for request in range(10):
        place.kafka.send(file(request, total=0))
    owner = place.own(batch=1)
    await until(lambda: "commit" in place.kafka.calls and not owner.partition.ready)
    assert owner.partition._ledger is not None
    assert owner.partition._ledger.unsettled == 3
    place.kafka.gates["commit"].set()
    await place.finish(owner)
    assert len(results(place.kafka)) == 10


async def test_a_partition_reads_no_further_while_too_many_dead_letters_wait(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_module, "HELD_MAX", 2 * RECORD_OVERHEAD + 250)
    place.kafka.gates["commit"].clear()
    for _ in range(10):
        place.kafka.send_raw(None, b"x" * 100)
    owner = place.own(batch=1)
    await until(lambda: "commit" in place.kafka.calls and not owner.partition.ready)
    assert owner.partition._ledger is not None
    assert owner.partition._ledger.held_bytes == 3 * (RECORD_OVERHEAD + 100)
    place.kafka.gates["commit"].set()
    await place.finish(owner)
    assert len(told(place.kafka)) == 10


# ---- expiry


def test_time_counts_only_while_there_is_nothing_left_to_read() -> None:
    vigil = Vigil(idle_timeout=10, now=0)
    assert vigil.look(20, position=5, end=None) is None, "who knows how much there is to read"
    assert vigil.look(21, position=5, end=9) is None
    assert vigil.look(25, position=9, end=9) is None
    assert vigil.look(29, position=9, end=9) is None
    assert vigil.look(31, position=9, end=9) == 21
    assert vigil.look(32, position=8, end=12) is None, "not where the end was at the last look"
    assert vigil.look(36, position=12, end=12) is None
    assert vigil.look(41, position=12, end=12) is None
    assert vigil.look(42, position=12, end=12) == 32


def test_steady_traffic_does_not_keep_a_request_from_expiring() -> None:
    vigil = Vigil(idle_timeout=10, now=0)
    looks = [vigil.look(now, position=now, end=now + 1) for now in range(30)]
    # Each look finds the position where the end was at the look before, and never at the end.
    assert looks == [None] * 10 + list(range(20))


async def test_a_request_without_activity_expires(place: Place) -> None:
    place.kafka.send(file(1, 0, b"ab", total=4))
    place.kafka.send(file(2, total=0))
    owner = place.own(rules=rules(idle_timeout=0.02))
    await until(lambda: len(results(place.kafka)) == 2)
    await place.finish(owner)
    (result,) = (r for r in results(place.kafka) if r.request.sequence == 1)
    assert (result.status, result.input[2:]) == (Status.EXPIRED, (0, 1))
    assert isinstance(result.error, BatchTransferFailed)
    assert "no split added bytes for 0.02 s" in result.error.reason
    assert place.kafka.offsets[0][0] == 2


# ---- the target gives trouble


async def test_a_request_that_cannot_be_written_fails_and_the_partition_goes_on(
    place: Place,
) -> None:
    place.file.plan = lambda incoming: incoming.plan("write_at", EIO)
    place.kafka.send(file(1, 0, b"ab", total=4))
    place.kafka.send(split(2, 0, b"ok", total=2))
    owner = place.own(write_timeout=0)
    await until(lambda: len(results(place.kafka)) == 2)
    await place.finish(owner)
    found = {r.request.sequence: r for r in results(place.kafka)}
    assert (found[1].status, found[2].status) == (Status.FAILED, Status.COMPLETED)
    assert found[1].error is not None
    assert found[1].error.code == "WriteDataFailed"


async def test_a_write_that_was_lost_is_received_again(place: Place) -> None:
    problems = iter([Condemned("fsync failed")])

    def plan(incoming: Faulty) -> None:
        incoming.plan("settle", next(problems, None))

    place.file.plan = plan
    place.kafka.send(file(1, 0, b"ab", total=4))
    place.kafka.send(file(1, 2, b"cd"))
    await place.finish()
    assert [(r.status, r.size) for r in results(place.kafka)] == [(Status.COMPLETED, 4)]
    assert (place.root / "item-1").read_bytes() == b"abcd"
    assert len(place.file.begun) == 2


async def test_an_unexpected_error_makes_the_partition_be_taken_again(place: Place) -> None:
    place.file.refusal = RuntimeError("a mistake")
    place.kafka.send(file(1, total=0))
    place.kafka.send(file(2, total=0))
    with captured_logs() as logs:
        await place.finish()
    assert len(results(place.kafka)) == 2
    assert place.kafka.calls.count("writer") == 2
    assert "unexpected error" in [entry["event"] for entry in logs]


# ---- the log gives trouble


@pytest.mark.parametrize(
    "step", ["topics", "writer", "committed", "results", "begin", "send", "commit", "position"]
)
async def test_a_cancellation_of_nobodys_makes_the_partition_be_taken_again(
    place: Place, step: str
) -> None:
    """Kafka's client lets out those of tasks that it has cancelled itself. Taken for ours it would
    end the partition without a word: nothing more told, and everything else goes on."""
    place.kafka.faults[step].append(asyncio.CancelledError())
    place.kafka.send(file(1, payload=b"1234", total=4))
    with captured_logs() as logs:
        await place.finish()
    assert [r.size for r in results(place.kafka)] == [4]
    assert [line["log_level"] for line in logs if "nobody" in line["event"]] == ["error"]


async def test_a_failed_poll_loses_no_record(place: Place) -> None:
    for request in range(4):
        place.kafka.send(file(request, total=0))
    place.kafka.faults["fetch"] += [None, broken(), None, broken()]
    await place.finish(place.own(batch=1))
    assert len(results(place.kafka)) == 4
    assert place.kafka.calls.count("writer") == 1, "no reason to take it again"


@pytest.mark.parametrize(("partition", "takings"), [(0, 2), (1, 1)])
async def test_a_position_outside_the_log_is_a_matter_of_its_own_partition(
    place: Place, partition: int, takings: int
) -> None:
    place.kafka.faults["fetch"] += [OutOfRange([partition])]
    for request in range(3):
        place.kafka.send(file(request, total=0))
    await place.finish()
    assert len(results(place.kafka)) == 3
    assert place.kafka.calls.count("writer") == takings


# ---- publishing gives trouble


@pytest.mark.parametrize("fate", list(Fate))
async def test_after_a_commit_of_unknown_fate_there_is_one_result(place: Place, fate: Fate) -> None:
    place.kafka.faults["commit"].append(fate)
    place.kafka.send(file(1, 0, b"ab", total=2, reply=b"token"))
    place.kafka.send_raw(None, b"garbage")
    await place.finish()
    assert [(r.status, r.reply) for r in results(place.kafka)] == [(Status.COMPLETED, b"token")]
    assert told(place.kafka) == {("dead letter", b"1"): 1}
    assert (place.root / "item-1").read_bytes() == b"ab"


async def test_what_kafka_has_left_open_is_found_when_nothing_follows(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partition_module, "QUIET", 0)
    # While taking, then without an answer, then with one.
    place.kafka.faults["settle"] += [None, broken(), LeftOpen("ended now")]
    place.kafka.send(file(1, total=0))
    owner = place.own()
    await until(lambda: place.kafka.calls.count("writer") == 2)
    await place.finish(owner)
    assert place.kafka.calls.count("settle") == 4
    assert len(results(place.kafka)) == 1


async def test_what_kafka_has_ended_is_looked_at_once(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partition_module, "QUIET", 0)
    calls = place.kafka.calls
    owner = place.own()
    place.kafka.send(file(1, total=0))
    await until(lambda: calls.count("settle") == 2)
    ticks = calls.count("topics")
    await until(lambda: calls.count("topics") > ticks + 3)
    assert calls.count("settle") == 2
    place.kafka.send(file(2, total=0))
    await until(lambda: calls.count("settle") == 3)
    await place.finish(owner)


@pytest.mark.parametrize(
    ("problem", "pauses"),
    [
        (Fenced("by another"), (3600, 3600, 3600, 0.001, 0.001)),
        (TransportError("no answer"), (0.001, 3600, 3600, 3600, 3600)),
    ],
)
async def test_a_fenced_partition_waits_longer_before_it_is_taken_again(
    place: Place,
    monkeypatch: pytest.MonkeyPatch,
    problem: Exception,
    pauses: Sequence[float],
) -> None:
    # Its new owner must have the time to work: taking it at once would fence that one.
    monkeypatch.setattr(partition_module, "RETAKE_PAUSES", pauses)
    place.kafka.faults["send"].append(problem)
    place.kafka.send(file(1, total=0))
    await place.finish()
    assert len(results(place.kafka)) == 1
    assert place.kafka.calls.count("writer") == 2


async def test_an_owner_that_was_fenced_while_it_committed_takes_what_it_finds(
    place: Place,
) -> None:
    place.kafka.gates["commit"].clear()
    place.kafka.send(file(1, 0, b"ab", total=2))
    owner = place.own()
    await until(lambda: "commit" in place.kafka.calls)
    place.kafka.fence()
    place.kafka.gates["commit"].set()
    await place.finish(owner)
    assert len(results(place.kafka)) == 1


async def test_a_dead_letter_that_is_too_large_becomes_a_stub(place: Place) -> None:
    place.kafka.size_limits[DEAD_LETTERS] = 10
    place.kafka.send(file(1, total=0))
    place.kafka.send_raw(None, b"much too large")
    await place.finish()
    assert [record.value for record in place.kafka.committed_records(DEAD_LETTERS)] == [b""]
    assert len(results(place.kafka)) == 1


async def test_pauses_grow_with_failures_in_a_row_and_start_anew_after_a_success(
    place: Place,
) -> None:
    place.kafka.faults["writer"] += [broken()] * 3
    owner = place.own()
    await until(lambda: owner.partition.ready)
    assert owner.partition._failures == 3
    place.kafka.send(file(1, total=0))
    await place.finish(owner)
    await until(lambda: owner.partition._failures == 0)


# ---- losing and draining


async def test_a_running_transaction_may_end_when_the_partition_is_lost(place: Place) -> None:
    place.kafka.gates["commit"].clear()
    place.kafka.send(file(1, total=0))
    owner = place.own()
    await until(lambda: "commit" in place.kafka.calls)
    losing = asyncio.create_task(owner.lose())
    await until(lambda: owner.partition._broken is not None)
    assert not owner.partition.ready
    place.kafka.gates["commit"].set()
    await losing
    assert len(results(place.kafka)) == 1
    await place.finish()
    assert len(results(place.kafka)) == 1


async def test_losing_is_bounded(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partition_module, "LOSE_BOUND", 0.01)
    place.kafka.gates["commit"].clear()
    place.kafka.send(file(1, 0, b"ab", total=2))
    owner = place.own()
    await until(lambda: "commit" in place.kafka.calls)
    await owner.partition.lose()
    assert results(place.kafka) == []
    place.kafka.gates["commit"].set()
    await place.finish()
    assert len(results(place.kafka)) == 1


async def test_losing_while_taking_gives_the_right_to_publish_back(place: Place) -> None:
    place.kafka.gates["committed"].clear()
    owner = place.own()
    await until(lambda: "committed" in place.kafka.calls)
    await owner.lose()
    assert place.kafka.calls.count("close") == 1
    assert repr(owner.partition).startswith("<Partition 0 None")


async def test_a_lost_partition_drops_what_was_open(place: Place) -> None:
    place.kafka.send(file(1, 0, b"ab", total=4))
    owner = place.own()
    await until(lambda: temporaries(place.root))
    await owner.lose()
    assert temporaries(place.root) == []
    assert "open=0" in repr(owner.partition)


async def test_a_thread_that_ends_when_the_partition_was_dropped_opens_nothing(
    place: Place,
) -> None:
    # The thread ends; before its group is woken, the partition's own task drops everything.
    # What the group then reports concerns a ledger that nobody follows any more.
    place.kafka.send(file(1, 0, b"ab", total=2))
    owner = place.own()
    await place.finish(owner)
    place.kafka.send(file(2, 0, b"ab", total=4))
    await until(lambda: temporaries(place.root))
    (handle,) = owner.partition._handles.values()
    reports = handle._reports
    owner.partition._drop()
    reports.failed(BatchTransferFailed(RequestId(1, 2), "quota"))
    assert "open=0" in repr(owner.partition)


async def test_draining_publishes_what_has_ended_and_reads_no_further(place: Place) -> None:
    place.kafka.gates["commit"].clear()
    place.kafka.send(file(1, total=0))
    place.kafka.send(file(2, 0, b"ab", total=4))
    owner = place.own()
    await until(lambda: "commit" in place.kafka.calls)
    assert not owner.partition.drained
    owner.partition.drain()
    assert not owner.partition.ready
    await until(lambda: owner.member.paused == {0})
    place.kafka.send(file(3, total=0))
    place.kafka.gates["commit"].set()
    await until(lambda: owner.partition.drained)
    assert [r.request.sequence for r in results(place.kafka)] == [1]
    assert place.kafka.offsets[0][0] == 1, "request 2 is open and holds W"


async def test_what_a_poll_brings_after_draining_began_is_left_to_the_next_owner(
    place: Place,
) -> None:
    """A look at the position that is under way must not take it for what was read."""
    contents = [file(1, total=0), file(2, total=0)]
    owner = place.own(feed=False)
    await until(lambda: owner.partition.ready)
    place.kafka.send(contents[0])
    owner.member.positions[0] = 1
    owner.partition.deliver([as_read(0, contents[0])])
    await until(lambda: results(place.kafka))
    ledger, calls = owner.partition.ledger, place.kafka.calls
    assert ledger is not None
    place.kafka.gates["position"].clear()
    await until(lambda: calls[-1] == "position")
    owner.partition.drain()
    place.kafka.send(contents[1])
    owner.member.positions[0] = 2  # as a poll does it that began before
    owner.partition.deliver([as_read(1, contents[1])])
    before = len(calls)
    place.kafka.gates["position"].set()
    # The tick goes on, and the partition comes to wait for something to publish.
    for _ in range(10):
        await asyncio.sleep(partition_module.TICK)
    assert calls[before:] == [], "nothing is published"
    assert ledger.position == 1
    await owner.lose()
    await place.finish()
    assert [r.request.sequence for r in results(place.kafka)] == [1, 2]


async def test_draining_does_not_wait_for_what_may_not_be_published(place: Place) -> None:
    """Below the previous owner's P, which no record brings nearer any more."""
    contents = [file(1, total=0), file(2, total=0)]
    for content in contents:
        place.kafka.send(content)
    place.kafka.offsets[0] = (0, Bookmark(0, 0, 2, 1000).metadata)
    owner = place.own(feed=False)
    await until(lambda: owner.partition.ready)
    owner.partition.deliver([as_read(0, contents[0])])
    owner.partition.drain()
    assert owner.partition.drained
    await owner.lose()
    await place.finish()
    assert {r.request.sequence for r in results(place.kafka)} == {1, 2}


async def test_a_partition_that_is_lost_is_not_said_to_be_taken_again(place: Place) -> None:
    place.kafka.gates["commit"].clear()
    place.kafka.send(file(1, total=0))
    with captured_logs() as logs:
        owner = place.own()
        await until(lambda: "commit" in place.kafka.calls)
        losing = asyncio.ensure_future(owner.lose())
        await asyncio.sleep(0)
        place.kafka.gates["commit"].set()
        await losing
    told = [entry["event"] for entry in logs if entry["log_level"] != "debug"]
    assert told == ["partition taken"]
    assert len(results(place.kafka)) == 1


# ---- any faults, at any time, with two owners


DATA = b"abcdef"


def parts(request: int) -> st.SearchStrategy[Split]:
    return st.builds(
        lambda start, size, wrong, total, reply: file(
            request,
            start,
            (DATA[start : start + size].upper() if wrong else DATA[start : start + size]),
            total=total,
            reply=reply,
        ),
        st.integers(0, 5),
        st.integers(1, 4),
        st.sampled_from([False] * 9 + [True]),
        st.sampled_from([None, 6]),
        st.sampled_from([None, b"a", b"b"]),
    )


def whole(request: int) -> st.SearchStrategy[list[Any]]:
    """All of an item in some order, and more of it than needed."""
    halves = [file(request, 0, b"abc", total=6), file(request, 3, b"def", total=6)]
    return st.lists(parts(request), max_size=4).flatmap(
        lambda more: st.permutations([*halves, *more])
    )


LOGS = st.tuples(whole(1), whole(2), whole(3), st.lists(st.sampled_from([abort(1), None]))).flatmap(
    lambda several: st.permutations([content for some in several for content in some])
)
FAULTS = st.one_of(
    st.tuples(st.just("commit"), st.sampled_from([*Fate, broken(), Fenced("the broker did")])),
    st.tuples(
        st.sampled_from(
            ["writer", "committed", "splits_bounds", "results_bounds", "results", "send", "fetch"]
        ),
        st.just(broken()),
    ),
)
STEPS = st.one_of(
    st.sampled_from(["read on", "fence", "move", "second owner", "lose one", "condemn"]), FAULTS
)


async def calm(root: Path, log: Sequence[Any]) -> Place:
    async with open_place(root) as place:
        for content in log:
            send(place.kafka, content)
        await place.finish()
    return place


def send(kafka: Kafka, content: Any) -> None:
    if content is None:
        kafka.send_raw(None, b"garbage")
    else:
        kafka.send(content)


async def troubled(root: Path, log: Sequence[Any], steps: Sequence[Any]) -> Place:
    async with open_place(root) as place:
        kafka, left = place.kafka, list(log)
        owners = [place.own(batch=2)]
        for step in steps:
            match step:
                case "read on":
                    for content in left[:3]:
                        send(kafka, content)
                    del left[:3]
                case "fence":
                    kafka.fence()
                case "move":
                    await owners.pop().lose()
                    owners.append(place.own(batch=2))
                case "second owner":
                    owners.append(place.own(batch=2))
                case "lose one" if len(owners) > 1:
                    await owners.pop(0).lose()
                case "condemn" if place.file.begun:
                    place.file.begun[-1].plan("settle", Condemned("fsync failed"))
                case (operation, fault):
                    kafka.faults[operation].append(fault)
                case _:
                    pass
            for _ in range(5):
                await asyncio.sleep(0.001)
        kafka.faults.clear()
        for content in left:
            send(kafka, content)
        for owner in owners[1:]:
            await owner.lose()
        await until(lambda: owners[0].finished)
    return place


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(log=LOGS, steps=st.lists(STEPS, max_size=12))
def test_faults_change_neither_outcomes_nor_their_number(
    log: Sequence[Any], steps: Sequence[Any]
) -> None:
    with tempfile.TemporaryDirectory(dir=FAST) as folder, asyncio.Runner() as runner:
        expected = runner.run(calm(Path(folder) / "calm", log))
        found = runner.run(troubled(Path(folder) / "troubled", log, steps))
        assert announced(found.kafka) == announced(expected.kafka)
        assert told(found.kafka) == told(expected.kafka)
        for result in results(found.kafka):
            published = found.root / result.unique_id
            assert published.exists() == result.success
            if result.success:
                # Other bytes where nothing else was sent contradict nothing: they are the item.
                assert published.read_bytes() == (expected.root / result.unique_id).read_bytes()


# ---- what a process that stood still does not know


def test_the_time_in_which_nobody_looked_does_not_count() -> None:
    """The process was frozen: what came meanwhile lies in the log, and was not read yet."""
    vigil = Vigil(idle_timeout=10, now=0)
    for now in range(9):
        vigil.look(now, position=5, end=5)
    assert vigil.look(5000, position=5, end=5) is None, "heard before it was frozen"
    vigil = Vigil(idle_timeout=10, now=0)
    for now in range(9):
        vigil.look(now, position=5, end=5)
    assert vigil.look(5000, position=5, end=None) is None, "nothing was heard lately"


async def test_a_request_goes_on_after_its_consumer_was_frozen(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = place.own(rules=rules(idle_timeout=60))
    place.kafka.send(file(1, 0, b"ab", total=4))
    await until(lambda: owner.partition.ledger and owner.partition.ledger.position == 1)
    await until(lambda: place.kafka.calls.count("position") > 3)
    monkeypatch.setattr(partition_module, "TICK", 30)
    place.kafka.gates["poll"].clear()
    await asyncio.sleep(0.1)  # a look that was under way is over
    # SIGSTOP. The rest of the item is sent meanwhile.
    place.kafka.send(file(1, 2, b"cd"))
    real = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: real() + 120)
    # SIGCONT: a look at what no record brings about comes before the first records.
    looks = place.kafka.calls.count("position")
    await until(lambda: place.kafka.calls.count("position") > looks)
    await asyncio.sleep(0.05)
    place.kafka.gates["poll"].set()
    await until(lambda: results(place.kafka))
    assert [r.status for r in results(place.kafka)] == [Status.COMPLETED]


async def test_a_partition_outlives_a_log_that_cannot_be_written(
    place: Place,
) -> None:
    """structlog prints by default: standard output may lie on a disk that is full."""
    full = True

    def print_it(_: object, __: str, event: Any) -> Any:
        if full:
            raise OSError(errno.ENOSPC, "no space left on device")
        raise structlog.DropEvent

    before = structlog.get_config()
    structlog.configure(processors=[print_it])
    try:
        place.kafka.faults["committed"].append(broken())
        owner = place.own()
        await until(lambda: place.kafka.calls.count("close") > 0)
        full = False
        place.kafka.send(file(1, total=0))
        await until(lambda: results(place.kafka))
        assert not owner.partition._task.done()
    finally:
        structlog.configure(**before)


async def test_transactions_that_fail_leave_no_segments_behind(tmp_path: Path) -> None:
    """Nothing of them was told: the topic took no records. Each taking receives the item anew."""
    kafka = Kafka()
    limit = MemoryLimit(1_000_000)
    with ThreadPoolExecutor(4) as threads:
        file = await FileTarget.open(tmp_path / "root", executor=threads)
        memory = await MemoryTarget.open(limit, executor=threads)
        kafka.faults["send"] += [broken("topic results took no records")] * 5
        kafka.send(split(1, 0, b"x" * 300_000, total=300_000))
        owner = Owner(kafka, {Block.FILE: file, Block.MEM: memory}, threads, write_timeout=0.2)
        try:
            await until(lambda: results(kafka))
            (result,) = results(kafka)
            assert (result.status, result.error) == (Status.COMPLETED, None)
            assert limit.used <= 310_000, "one segment was announced"
        finally:
            await owner.lose()
            for name in list(memory._announced):
                await asyncio.to_thread(memory.retract, name)
            await asyncio.to_thread(memory.close)
            await asyncio.to_thread(file.close)
