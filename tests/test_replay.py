"""Replay of logs in memory: what is read, and what is said of each request."""

from __future__ import annotations

import asyncio
import errno
import random
from collections.abc import Awaitable, Sequence
from pathlib import Path

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from brokers import run
from checker import Kept, Reference, look, reference
from replays import MemoryLogs, Told, replayed, result_of
from splitferry_consumer.flow import MINIMUM_SHARE
from splitferry_consumer.paths import Tree
from splitferry_consumer.rebuilding import Bounds, Source
from splitferry_consumer.replay import Outcome
from splitferry_consumer.transport import Record, TransportError
from splitferry_protocol.codec import encode_result
from splitferry_protocol.ids import RequestId
from splitferry_protocol.records import Abort, Block, Result, Split, Status
from workload import Message, cut, damaged, make_load, message

DATA = random.Random(1).randbytes(1000)
ONE, TWO, THREE = (RequestId(7, number) for number in (1, 2, 3))


def sent(*contents: Split | Abort | Sequence[Split]) -> list[Message]:
    flat = [[c] if isinstance(c, Split | Abort) else c for c in contents]
    return [message(content, 1) for some in flat for content in some]


def expected(logs: MemoryLogs) -> Reference:
    return reference(
        {
            number: [Kept(number, r.offset, r.key, r.value, r.headers) for r in log]
            for number, log in enumerate(logs.splits)
        }
    )


def recorded(logs: MemoryLogs) -> MemoryLogs:
    """With the results of all that has ended, in the order of their ends."""
    openings = [o for o in expected(logs).openings.values() if o.status is not None]
    for opening in sorted(openings, key=lambda opening: opening.last):
        logs.record(result_of(opening))
    return logs


def log_of(*contents: Split | Abort | Sequence[Split]) -> MemoryLogs:
    logs = MemoryLogs()
    logs.append(sent(*contents))
    return logs


# ---- the same outcome as the log's own


def messy(rng: random.Random, messages: Sequence[Message]) -> list[Message]:
    """Some twice, some lost, some damaged, some out of their order."""
    made: list[Message] = []
    for one in messages:
        match rng.randrange(12):
            case 0:
                made += [one, one]
            case 1:
                continue
            case 2 if one.value:
                made.append(damaged(one))
            case 3:
                made.insert(rng.randrange(len(made) + 1), one)
            case _:
                made.append(one)
    return made


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 14), st.booleans())
def test_a_replay_says_of_each_request_what_its_log_says(
    seed: int, count: int, with_results: bool
) -> None:
    rng = random.Random(seed)
    logs = MemoryLogs()
    logs.append(messy(rng, make_load(rng, count, 1, (0, 1, 100, 3000), side_by_side=3)))
    if with_results:
        recorded(logs)
    openings = expected(logs).openings
    told = run(replayed(logs))
    assert told.outcomes().keys() == openings.keys()
    assert not told.troubles
    assert told.left == 0
    for request, opening in openings.items():
        report = told.of(request)
        assert report.first == opening.first
        match opening.status:
            case Status.COMPLETED:
                assert report.outcome is Outcome.COMPLETE
                assert (report.size, report.sha256) == (len(opening.data), opening.digest)
            case Status.FAILED:
                assert report.outcome is (Outcome.FAILED if with_results else Outcome.DAMAGED)
                if not with_results:
                    assert (report.reason or "").startswith(f"{opening.code}: ")
            case Status.ABORTED:
                assert report.outcome is Outcome.ABORTED
            case None:
                assert report.outcome is Outcome.INCOMPLETE
                missing = bytearray(opening.there)
                for start, end in report.missing:
                    missing[start:end] = b"\1" * ((end or len(missing)) - start)
                assert missing[: len(opening.there)] == b"\1" * len(opening.there)
                gone = sum((end or start) - start for start, end in report.missing)
                total = len(opening.data) if opening.total is None else opening.total
                assert gone + opening.there.count(1) == total
        if opening.status is not None:
            assert report.last == opening.last


# ---- the recorded result decides


async def test_what_completed_is_compared_with_its_result() -> None:
    logs = log_of(cut(ONE, DATA, 300))
    opening = expected(logs).openings[ONE]
    logs.record(result_of(opening)._replace(sha256=bytes(32)))
    report = (await replayed(logs)).of(ONE)
    assert report.outcome is Outcome.DAMAGED
    assert "the digest differs" in (report.reason or "")
    assert "(at offset 3)" in (report.reason or "")


@pytest.mark.parametrize("status", [Status.FAILED, Status.EXPIRED, Status.ABORTED])
async def test_what_did_not_complete_is_told_and_not_rebuilt(
    status: Status, tmp_path: Path
) -> None:
    logs = log_of(cut(ONE, DATA, 300))
    logs.record(result_of(expected(logs).openings[ONE], status))
    report = (await replayed(logs, to=tmp_path)).of(ONE)
    assert report.outcome.value == status.value
    assert report.reason == f"BatchTransferFailed: request 7-1 failed: it was {status}"
    assert look(tmp_path).files == {}


async def test_what_has_no_result_takes_no_place_of_what_has_one(tmp_path: Path) -> None:
    """Of two with one version the first wins, and the recorded one comes first, wherever it is."""
    logs = MemoryLogs([[], [], []], [[], [], []])
    logs.append(sent(cut(TWO, DATA[::-1], 250, unique_id="a")), 0)
    logs.append(sent(*[cut(RequestId(8, n), DATA, 100) for n in range(50)]), 1)
    logs.append(sent(cut(ONE, DATA, 250, unique_id="a")), 1)
    logs.append(sent(cut(THREE, DATA[::-1], 250, unique_id="a")), 2)
    logs.record(result_of(expected(logs).openings[ONE]))
    told = await replayed(logs, to=tmp_path)
    assert told.of(ONE).outcome is Outcome.COMPLETE
    assert (tmp_path / "a").read_bytes() == DATA
    for loser in (TWO, THREE):
        assert told.of(loser).outcome is Outcome.UNWRITTEN
        assert (told.of(loser).reason or "").startswith("VersionMismatch: ")


async def test_an_id_that_comes_again_without_a_result_is_told_once_more() -> None:
    logs = log_of(cut(ONE, DATA, 250))
    logs = recorded(logs)
    logs.append(sent(*[cut(THREE, b"x", 1)] * 101, cut(ONE, DATA[::-1], 250), cut(TWO, DATA, 500)))
    told = await replayed(logs, Source("splits", "results", "group", horizon=50))
    assert [(r.first, r.recorded) for r in told.reports if r.request == ONE] == [
        (0, True),
        (105, False),
    ]


async def test_results_of_others_and_repeats_say_nothing() -> None:
    logs = log_of(cut(ONE, DATA, 300))
    result = result_of(expected(logs).openings[ONE], Status.FAILED)
    logs.record(result._replace(group="another"))
    logs.record(result._replace(repeat=True))
    logs.record(result._replace(input=result.input._replace(topic="another")))
    logs.results[0].append(Record(3, ONE.key, b"\xc1"))
    told = await replayed(logs)
    report = told.of(ONE)
    assert (report.outcome, report.recorded) == (Outcome.COMPLETE, False)
    assert told.notes == [
        (None, "group group has recorded nothing there: all is judged by the log alone")
    ]


async def test_late_splits_open_nothing_anew() -> None:
    splits = cut(ONE, DATA, 300)
    logs = recorded(log_of(splits, splits, cut(TWO, DATA, 500)))
    told = await replayed(logs, bounds=Bounds(starts={0: 5}))
    assert told.outcomes() == {TWO: Outcome.COMPLETE}


def came_again() -> tuple[MemoryLogs, Result, Result]:
    """An id that two items had, 100 records apart, and both results."""
    logs = log_of(cut(ONE, DATA, 1000), cut(TWO, DATA, 10), cut(ONE, DATA[::-1], 1000))
    first = result_of(expected(log_of(cut(ONE, DATA, 1000))).openings[ONE])
    other = log_of(*[cut(THREE, b"x", 1)] * 101, cut(ONE, DATA[::-1], 1000))
    last = result_of(expected(other).openings[ONE])
    logs.record(first)
    logs.record(last)
    return logs, first, last


async def test_an_id_that_comes_again_beyond_the_horizon_is_told_twice() -> None:
    logs, first, last = came_again()
    source = Source("splits", "results", "group", horizon=50)
    told = await replayed(logs, source, ids=[ONE])
    assert [(r.outcome, r.first, r.sha256) for r in told.reports] == [
        (Outcome.COMPLETE, 0, first.sha256),
        (Outcome.COMPLETE, 101, last.sha256),
    ]


# ---- what is read


async def test_an_id_is_read_where_its_result_says_and_nowhere_else() -> None:
    logs = recorded(log_of(cut(ONE, DATA, 250), cut(TWO, DATA, 250), cut(THREE, DATA, 250)))
    told = await replayed(logs, ids=[TWO])
    assert told.outcomes() == {TWO: Outcome.COMPLETE}
    assert logs.read == [4, 5, 6, 7]


async def test_ids_are_found_in_partitions_that_are_not_the_likely_ones() -> None:
    logs = MemoryLogs([[], [], []], [[], [], []])
    for number, request in enumerate((ONE, TWO, THREE)):
        logs.append(sent(cut(request, DATA, 400)), number)
    logs = recorded(logs)
    told = await replayed(logs, ids=[ONE, TWO, THREE])
    assert told.outcomes() == dict.fromkeys((ONE, TWO, THREE), Outcome.COMPLETE)


async def test_an_id_without_a_result_is_looked_for_from_w_on() -> None:
    logs = recorded(log_of(cut(ONE, DATA, 250), cut(TWO, DATA, 250)[1:]))
    logs.watermark = 4
    told = await replayed(logs, ids=[TWO, THREE])
    assert told.outcomes() == {TWO: Outcome.INCOMPLETE, THREE: Outcome.UNKNOWN}
    assert told.of(TWO).missing == [(0, 250)]
    assert told.of(TWO).reason is None
    assert "group group has recorded no result" in (told.of(THREE).reason or "")
    assert logs.read == [4, 5, 6]


async def test_where_results_cannot_be_read_nothing_is_judged_without_them(
    tmp_path: Path,
) -> None:
    """A result that says `failed` may be among them."""
    logs = MemoryLogs([[], []], [[], []], unreadable_results=1)
    logs.append(sent(cut(ONE, DATA, 250)), 0)
    logs.append(sent(cut(TWO, DATA, 250)), 1)
    openings = expected(logs).openings
    logs.record(result_of(openings[ONE]))
    logs.record(result_of(openings[TWO], Status.FAILED))
    told = await replayed(logs, to=tmp_path, ids=[ONE, TWO, THREE])
    assert told.outcomes() == {ONE: Outcome.COMPLETE}
    assert told.troubles == [(1, "not readable")]
    assert told.notes == [(None, "7-2, 7-3: not found, but not all could be read: try again")]
    assert look(tmp_path).files.keys() == {"items/7-1"}


async def test_an_id_is_called_unknown_only_where_all_was_read() -> None:
    logs = log_of(cut(ONE, DATA, 250))
    logs.hidden = True
    told = await replayed(logs, ids=[ONE, TWO])
    assert told.outcomes() == {ONE: Outcome.COMPLETE}
    assert told.notes == [(None, "7-2: not found, but not all could be read: try again")]


async def test_a_request_belongs_to_the_range_in_which_it_ended() -> None:
    """Ranges side by side share none and leave none out; what began before is read whole."""
    one, two, three = (cut(request, DATA, 250) for request in (ONE, TWO, THREE))
    logs = recorded(log_of(two[:2], one, three[:1], two[2:], three[1:]))
    for split_at in range(13):
        below = await replayed(logs, bounds=Bounds(ends={0: split_at}))
        above = await replayed(logs, bounds=Bounds(starts={0: split_at}))
        both = {**below.outcomes(), **above.outcomes()}
        assert both == dict.fromkeys((ONE, TWO, THREE), Outcome.COMPLETE)
        assert len(below.reports) + len(above.reports) == 3
    assert (await replayed(logs, bounds=Bounds(starts={0: 8}, ends={0: 9}))).outcomes() == {
        TWO: Outcome.COMPLETE
    }


async def test_times_bound_a_range_as_the_records_have_them() -> None:
    logs = recorded(log_of(cut(ONE, DATA, 500), cut(TWO, DATA, 500), cut(THREE, DATA, 500)))
    told = await replayed(logs, bounds=Bounds(since=1500, until=4000))
    assert told.outcomes() == {TWO: Outcome.COMPLETE}
    assert (await replayed(logs, bounds=Bounds(since=6000))).reports == []


async def test_what_began_before_the_range_without_a_result_is_not_called_damaged() -> None:
    logs = log_of(cut(ONE, DATA, 250))
    report = (await replayed(logs, bounds=Bounds(starts={0: 2}))).of(ONE)
    assert report.outcome is Outcome.INCOMPLETE
    assert report.missing == [(0, 500)]
    assert report.reason == "its first splits may lie below offset 2, where the reading began"


async def test_with_w_known_what_opened_before_the_range_is_found() -> None:
    logs = log_of(cut(ONE, DATA, 250))
    logs.watermark = 0
    told = await replayed(logs, bounds=Bounds(starts={0: 2}))
    assert told.outcomes() == {ONE: Outcome.COMPLETE}


async def test_what_ended_before_the_range_without_a_result_is_not_of_it(tmp_path: Path) -> None:
    """Also where the reading begins below the range, at W."""
    logs = log_of(cut(ONE, DATA, 250), cut(TWO, DATA, 250))
    logs.watermark = 0
    below = await replayed(logs, bounds=Bounds(ends={0: 4}), to=tmp_path / "below")
    above = await replayed(logs, bounds=Bounds(starts={0: 4}), to=tmp_path / "above")
    assert below.outcomes() == {ONE: Outcome.COMPLETE}
    assert above.outcomes() == {TWO: Outcome.COMPLETE}
    assert look(tmp_path / "above").files.keys() == {"items/7-2"}


async def test_w_of_other_topics_is_not_trusted() -> None:
    """The results were lost with their topic: below W there are requests without one."""
    logs = log_of(cut(ONE, DATA, 250))
    logs.watermark = 4
    assert (await replayed(logs)).reports == []
    logs.anew = True
    assert (await replayed(logs)).outcomes() == {ONE: Outcome.COMPLETE}
    assert (await replayed(logs, ids=[ONE])).outcomes() == {ONE: Outcome.COMPLETE}


async def test_a_range_ends_where_the_log_does() -> None:
    logs = recorded(log_of(cut(ONE, DATA, 250)))
    logs.watermark = 4
    told = await replayed(logs, bounds=Bounds(ends={0: 100}))
    assert told.outcomes() == {ONE: Outcome.COMPLETE}
    assert told.offsets == 4


async def test_a_partition_that_is_not_there_is_named() -> None:
    with pytest.raises(TransportError, match="topic splits has no partition 3, only 0 to 0"):
        await replayed(MemoryLogs(), bounds=Bounds(ends={3: 1}))


# ---- what is gone


async def test_records_that_retention_has_deleted_are_told() -> None:
    logs = recorded(log_of(cut(ONE, DATA, 250), cut(TWO, DATA, 250), cut(THREE, DATA, 250)))
    logs.start = 6
    told = await replayed(logs)
    assert told.outcomes() == {TWO: Outcome.DELETED, THREE: Outcome.COMPLETE}
    assert told.of(TWO).missing == [(0, 500)]
    assert told.of(TWO).reason == "records at offsets 0 to 5 are deleted"
    assert told.notes == [
        (0, "the log begins at offset 6: the records of 1 requests that ended before are deleted")
    ]
    asked = await replayed(logs, ids=[ONE, TWO])
    assert asked.outcomes() == {ONE: Outcome.DELETED, TWO: Outcome.DELETED}
    assert asked.of(ONE).reason == "its records, offsets 0 to 3, are deleted"
    assert (await replayed(logs, bounds=Bounds(starts={0: 2}))).of(ONE).outcome is Outcome.DELETED
    assert (await replayed(logs, bounds=Bounds(since=4000))).of(ONE).outcome is Outcome.DELETED


async def test_a_range_ends_for_what_is_deleted_as_well() -> None:
    logs = log_of(cut(ONE, DATA, 250), cut(TWO, DATA, 250), cut(THREE, DATA, 250))
    for number, opening in enumerate(expected(logs).openings.values()):
        logs.record(result_of(opening)._replace(finished_at=1000 * number))
    logs.start = 8
    for ends in (Bounds(since=0, until=1000), Bounds(since=0, ends={0: 4})):
        assert (await replayed(logs, bounds=ends)).outcomes() == {ONE: Outcome.DELETED}
    assert (await replayed(logs, bounds=Bounds(until=1000))).notes == [
        (0, "the log begins at offset 8: the records of 1 requests that ended before are deleted")
    ]


async def test_what_is_left_suffices_when_splits_came_twice() -> None:
    splits = cut(ONE, DATA, 250)
    logs = recorded(log_of(splits[:2], splits))
    logs.start = 2
    assert (await replayed(logs)).outcomes() == {ONE: Outcome.COMPLETE}


async def test_retention_may_be_quicker_than_the_reading() -> None:
    logs = recorded(log_of(cut(ONE, DATA, 250), cut(TWO, DATA, 250)))
    logs.deleted_later = 3
    told = await replayed(logs)
    assert told.outcomes() == {ONE: Outcome.DELETED, TWO: Outcome.COMPLETE}
    assert told.of(ONE).missing == [(250, 750)]
    assert told.of(ONE).reason == "records at offsets 1 to 2 are deleted"


async def test_a_result_without_a_split_in_the_log_is_told() -> None:
    logs = recorded(log_of(cut(ONE, DATA, 250), cut(TWO, DATA, 250)))
    logs.splits[0][:4] = [r._replace(key=b"9-9") for r in logs.splits[0][:4]]
    report = (await replayed(logs, ids=[ONE])).of(ONE)
    assert (report.outcome, report.missing) == (Outcome.INCOMPLETE, [(0, 1000)])
    assert report.reason == "no split of it lies at offsets 0 to 3"


async def test_a_split_damaged_since_is_named_with_its_offset() -> None:
    sound = log_of(cut(ONE, DATA, 250))
    logs = recorded(sound)
    record = logs.splits[0][2]
    assert record.value is not None
    logs.splits[0][2] = record._replace(value=record.value[:-1] + b"?")
    report = (await replayed(logs)).of(ONE)
    assert report.outcome is Outcome.DAMAGED
    assert (report.reason or "").startswith("SplitTaskFailed: ")
    assert "(at offset 2)" in (report.reason or "")
    assert report.missing == [(500, 1000)]


async def test_a_request_that_the_horizon_ends_is_incomplete() -> None:
    others = [cut(RequestId(8, number), b"x", 1) for number in range(30)]
    logs = log_of(cut(ONE, DATA, 500)[:1], *others)
    report = (await replayed(logs, Source("splits", "results", "group", horizon=20))).of(ONE)
    assert (report.outcome, report.missing) == (Outcome.INCOMPLETE, [(500, 1000)])
    assert "(horizon)" in (report.reason or "")


# ---- reading waits, and goes on


async def in_time(replaying: Awaitable[Told]) -> Told:
    """Nothing hangs, also where the log is quicker than the disk."""
    async with asyncio.timeout(20):
        return await replaying


async def test_reading_goes_on_once_what_was_read_is_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("splitferry_consumer.rebuilding.FLOW_HIGH", MINIMUM_SHARE)
    logs = log_of(cut(ONE, DATA * 10_000, MINIMUM_SHARE // 4))
    assert (await in_time(replayed(logs))).outcomes() == {ONE: Outcome.COMPLETE}


async def test_reading_goes_on_once_what_came_twice_is_compared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing behind the second split is told before, so that the ledger holds all of it."""
    monkeypatch.setattr("splitferry_consumer.ledger.HELD_MAX", 10_000)
    first, last = cut(ONE, DATA, 500)
    logs = log_of(first, first)
    logs.append([damaged(message(split, 1)) for split in cut(TWO, DATA, 50)])
    logs.append(sent(last))
    assert (await in_time(replayed(logs))).of(ONE).outcome is Outcome.COMPLETE


@pytest.mark.parametrize("horizon", [None, 5])
async def test_a_horizon_lowered_since_ends_nothing_that_completed(horizon: int | None) -> None:
    logs = recorded(log_of(cut(ONE, DATA, 100)))
    logs.watermark, logs.horizon = 10, 5
    told = await replayed(logs, Source("splits", "results", "group", horizon))
    assert told.outcomes() == {ONE: Outcome.COMPLETE}


# ---- into a directory


def versions(tmp_path: Path) -> tuple[MemoryLogs, Path]:
    logs = log_of(
        cut(ONE, DATA, 250, unique_id="a", version=2),
        cut(TWO, DATA[1:], 250, unique_id="a", version=1),
        cut(THREE, DATA, 250, unique_id="dir/b"),
        cut(RequestId(7, 4), DATA, 250, block=Block.MEM),
    )
    return logs, tmp_path / "root"


async def test_the_newest_version_wins_and_memory_is_only_verified(tmp_path: Path) -> None:
    logs, root = versions(tmp_path)
    told = await replayed(recorded(logs), to=root)
    # Settled together, the older one is placed first and the newer one over it.
    assert told.of(TWO).outcome in {Outcome.COMPLETE, Outcome.SUPERSEDED}
    others = [told.of(request).outcome for request in (ONE, THREE, RequestId(7, 4))]
    assert others == [Outcome.COMPLETE] * 3
    assert (root / "a").read_bytes() == (root / "dir/b").read_bytes() == DATA
    assert look(root).files.keys() == {"a", "dir/b"}


async def test_an_older_version_does_not_go_over_a_newer_one(tmp_path: Path) -> None:
    logs, root = versions(tmp_path)
    await replayed(recorded(logs), to=root, ids=[ONE])
    for _ in ("verified", "not verified"):
        report = (await replayed(logs, to=root, ids=[TWO])).of(TWO)
        assert report.outcome is Outcome.SUPERSEDED
        (root / "a").write_bytes(b"damaged")
    assert report.reason == "version 2 is published"
    assert (root / "a").read_bytes() == b"damaged"


async def test_what_is_there_is_skipped_and_what_is_not_is_repaired(tmp_path: Path) -> None:
    logs, root = versions(tmp_path)
    logs = recorded(logs)
    logs.watermark = len(logs.splits[0])
    await replayed(logs, to=root)
    logs.read.clear()
    again = await replayed(logs, to=root, ids=[ONE, TWO, THREE])
    assert again.outcomes() == {
        ONE: Outcome.PRESENT, TWO: Outcome.SUPERSEDED, THREE: Outcome.PRESENT
    }  # fmt: skip
    assert logs.read == []
    (root / "a").write_bytes(DATA[::-1])
    (root / "dir/b").unlink()
    repaired = await replayed(logs, to=root)
    assert repaired.of(ONE).outcome is repaired.of(THREE).outcome is Outcome.COMPLETE
    assert (root / "a").read_bytes() == (root / "dir/b").read_bytes() == DATA
    (root / "a").write_bytes(b"")
    assert (await replayed(logs, to=root, ids=[THREE])).of(THREE).outcome is Outcome.PRESENT


async def test_a_verdict_of_an_interrupted_run_keeps_nothing_from_being_repaired(
    tmp_path: Path,
) -> None:
    logs, root = versions(tmp_path)
    logs = recorded(logs)
    logs.hidden = True
    interrupted = await replayed(logs, to=root)
    assert interrupted.troubles == [(0, "a transaction is open there")]
    assert interrupted.of(THREE).outcome is Outcome.COMPLETE
    (root / "dir/b").write_bytes(b"damaged")
    assert (await replayed(logs, to=root)).of(THREE).outcome is Outcome.COMPLETE
    assert (root / "dir/b").read_bytes() == DATA


async def test_a_file_that_cannot_be_read_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logs, root = versions(tmp_path)
    await replayed(recorded(logs), to=root)
    holds = Tree.holds

    def broken(tree: Tree, unique_id: str, size: int, sha256: bytes) -> bool:
        if unique_id == "dir/b":
            raise OSError(errno.EIO, "Input/output error")
        return holds(tree, unique_id, size, sha256)

    monkeypatch.setattr(Tree, "holds", broken)
    with capture_logs() as logged:
        told = await replayed(logs, to=root)
    assert told.of(ONE).outcome is Outcome.PRESENT
    assert told.of(THREE).outcome is Outcome.COMPLETE
    (warned,) = [entry for entry in logged if entry["log_level"] == "warning"]
    assert warned["file"] == str(root / "dir/b")
    assert "Input/output error" in warned["cause"]


async def test_what_the_directory_does_not_take_is_told(tmp_path: Path) -> None:
    logs, root = versions(tmp_path)
    (root / "a").mkdir(parents=True)
    report = (await replayed(recorded(logs), to=root)).of(ONE)
    assert report.outcome is Outcome.UNWRITTEN
    assert "a directory stands there" in (report.reason or "")


async def test_a_dry_run_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    logs, _ = versions(tmp_path)
    told: Told = await replayed(recorded(logs))
    assert set(told.outcomes().values()) == {Outcome.COMPLETE}
    assert list(tmp_path.iterdir()) == []


async def test_an_id_that_came_again_and_expired_keeps_nothing_from_being_rebuilt(
    tmp_path: Path,
) -> None:
    logs = log_of(cut(ONE, DATA, 250))
    logs.record(result_of(expected(logs).openings[ONE]))
    again = log_of(*[cut(THREE, b"x", 1)] * 101, cut(ONE, DATA, 250)[:1])
    late = expected(again).openings[ONE]
    late.last = late.first
    logs.append(sent(*[cut(THREE, b"x", 1)] * (101 - 4), cut(ONE, DATA, 250)[:1]))
    result = result_of(late, Status.EXPIRED)
    logs.record(result)
    told = await replayed(logs, Source("splits", "results", "group", horizon=50), to=tmp_path)
    assert [r.outcome for r in told.reports if r.request == ONE and r.first == 0] == [
        Outcome.COMPLETE
    ]


async def test_a_result_of_a_later_version_is_not_taken_for_none(tmp_path: Path) -> None:
    logs = log_of(cut(ONE, DATA, 250))
    told = msgpack.unpackb(encode_result(result_of(expected(logs).openings[ONE], Status.FAILED)))
    logs.results[0].append(Record(0, ONE.key, msgpack.packb(told | {"v": 2})))
    done = await replayed(logs, to=tmp_path / "root")
    assert done.reports == []
    ((_, trouble),) = done.troubles
    assert "upgrade" in trouble


async def test_a_horizon_raised_since_hides_nothing_that_completed() -> None:
    logs, *_ = came_again()
    told = await replayed(logs)
    assert [(r.outcome, r.first) for r in told.reports if r.request == ONE] == [
        (Outcome.COMPLETE, 0),
        (Outcome.COMPLETE, 101),
    ]


async def test_an_id_that_comes_again_in_the_same_range_is_told_twice() -> None:
    logs, *_ = came_again()
    told = await replayed(logs, Source("splits", "results", "group", horizon=50))
    assert [(r.outcome, r.first) for r in told.reports if r.request == ONE] == [
        (Outcome.COMPLETE, 0),
        (Outcome.COMPLETE, 101),
    ]
