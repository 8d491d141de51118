"""The rules of docs/DESIGN.md, on the real ledger in a world without Kafka."""

from __future__ import annotations

import copy
import itertools
import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from splitferry_consumer.bookmark import Bookmark
from splitferry_consumer.flow import RECORD_OVERHEAD
from splitferry_consumer.ledger import Decision, Ledger, Limits, Told
from splitferry_consumer.request import ReceiveState, RequestPhase
from splitferry_consumer.targets import Verdict
from splitferry_consumer.transport import Record
from splitferry_protocol.codec import InvalidRecord, encode_result
from splitferry_protocol.errors import BatchTransferError, BatchTransferFailed, WriteDataFailed
from splitferry_protocol.ids import RequestId
from splitferry_protocol.paths import path_problem
from splitferry_protocol.records import (
    HEADER_MAX,
    Accepted,
    Block,
    Input,
    Result,
    Split,
    Status,
)
from world import GROUP, PARTITION, TOPIC, Content, World, abort, poison, split

ONE, TWO = RequestId(1, 1), RequestId(1, 2)


def results(world: World) -> list[Result]:
    return [result for result in world.results if isinstance(result, Result)]


def run(*log: Content, horizon: int = 1000) -> World:
    world = World(log, horizon)
    world.finish()
    return world


# ---- where a request opens and ends


def test_a_request_opens_at_its_first_split_and_ends_where_the_last_gap_closes() -> None:
    world = run(
        poison(), split(1, 0, b"ab", total=4), split(2, 0, b"x"), split(1, 2, b"cd"), split(1)
    )
    (result,) = results(world)
    assert (result.status, result.input, result.size) == (
        Status.COMPLETED,
        ("splits", 0, 1, 3),
        4,
    )
    assert world.items == {ONE: [b"abcd"]}
    assert world.ledger.watermark == 2, "the open request holds W"
    (letter,) = world.dead_letters
    assert (letter.request, letter.code) == (None, poison().code)
    assert letter.message == poison().message


def test_an_empty_item_is_one_split() -> None:
    (result,) = results(run(split(1, total=0)))
    assert (result.status, result.size, result.splits, result.duplicates) == (
        Status.COMPLETED, 0, 1, 0,
    )  # fmt: skip


def test_the_size_may_come_last_and_without_bytes() -> None:
    world = run(split(1, 0, b"abc"), split(1, 3, b"", total=3))
    assert world.items == {ONE: [b"abc"]}


@pytest.mark.parametrize(
    ("second", "code"),
    [
        (split(1, 2, b"cd", version=2), "VersionMismatch"),
        (split(1, 2, b"cd", unique_id="other"), "BatchTransferFailed"),
        (split(1, 2, b"cd", block=Block.FILE, unique_id="item-1"), "BatchTransferFailed"),
        (split(1, 2, b"cd", total=5), "BatchTransferFailed"),
        (split(1, 2, b"cd", sha256=b"b" * 32), "BatchTransferFailed"),
        (split(1, 2, b"cd", labels={"a": "2"}), "BatchTransferFailed"),
        (split(1, 2, b"cde"), "SplitTaskFailed"),
        (split(1, 1, b"x"), "BatchTransferFailed"),
        (InvalidRecord("bad", ONE, 1), "BatchTransferError"),
        (InvalidRecord("bad", ONE, 1, damaged=True), "SplitTaskFailed"),
    ],
)
def test_a_record_that_contradicts_ends_the_request_and_is_a_dead_letter(
    second: Content, code: str
) -> None:
    first = split(1, 0, b"ab", total=4, sha256=b"a" * 32, labels={"a": "1"})
    world = run(first, second)
    assert world.outcomes() == {(ONE, 0): (Status.FAILED, 1, code)}
    assert world.told == [(1, "dead letter")]
    assert results(world)[0].error is not None
    assert (results(world)[0].error.partition, results(world)[0].error.offset) == (0, 1)  # type: ignore[union-attr]
    assert world.ledger.watermark == 2
    (letter,) = world.dead_letters
    assert (letter.offset, letter.request, letter.code) == (1, ONE, code)
    assert letter.record.offset == 1
    assert letter.message == results(world)[0].error.message  # type: ignore[union-attr]


@pytest.mark.parametrize("when", ["not known", "ended", "with a result"])
def test_a_damaged_record_of_no_open_request_is_a_dead_letter(when: str) -> None:
    damaged = InvalidRecord("bad", ONE, 1, damaged=True)
    world = World([damaged] if when == "not known" else [split(1, total=0), damaged])
    while when == "ended" and world.read():
        pass
    world.finish()
    (letter,) = world.dead_letters
    assert (letter.offset, letter.request) == (len(world.log) - 1, ONE)
    assert (letter.code, letter.message) == (damaged.code, damaged.message)


def test_a_size_below_what_was_brought_contradicts() -> None:
    world = run(split(1, 2, b"cd"), split(1, 0, b"ab", total=3))
    assert world.outcomes() == {(ONE, 0): (Status.FAILED, 1, "BatchTransferFailed")}


def test_an_unsafe_file_name_opens_the_request_and_ends_it_there() -> None:
    world = run(split(1, 0, b"ab", total=2, block=Block.FILE, unique_id="../x"))
    assert world.outcomes() == {(ONE, 0): (Status.FAILED, 0, "BatchTransferError")}
    assert world.told == [(0, "dead letter")]
    error = results(world)[0].error
    assert isinstance(error, BatchTransferError)
    assert (error.request_id, error.msg) == (ONE, path_problem("../x"))


def test_an_item_of_memory_may_have_a_name_that_no_file_can_have() -> None:
    world = run(split(1, 0, b"ab", total=2, unique_id="../x"))
    assert world.outcomes() == {(ONE, 0): (Status.COMPLETED, 0, None)}


def test_an_abort_ends_an_open_request_and_is_ignored_otherwise() -> None:
    world = run(abort(1), split(1, 0, b"a"), abort(1), abort(1), split(2, 0, b"a", total=1))
    assert world.outcomes() == {
        (ONE, 1): (Status.ABORTED, 2, "BatchTransferFailed"),
        (TWO, 4): (Status.COMPLETED, 4, None),
    }
    assert world.told == []


def test_a_request_still_open_a_horizon_after_its_first_split_fails_there() -> None:
    world = run(split(1, 0, b"a"), *[poison()] * 9, split(1, 1, b"b", total=2), horizon=10)
    assert world.outcomes() == {(ONE, 0): (Status.FAILED, 10, "BatchTransferFailed")}
    world = run(split(1, 0, b"a"), *[poison()] * 8, split(1, 1, b"b", total=2), horizon=10)
    assert world.outcomes() == {(ONE, 0): (Status.COMPLETED, 9, None)}


def test_the_horizon_waits_for_its_turn_behind_a_comparison() -> None:
    world = World([split(1, 0, b"ab"), split(1, 1, b"bc", total=3), *[poison()] * 4], horizon=3)
    while world.read():
        pass
    world.finish()
    assert world.outcomes() == {(ONE, 0): (Status.COMPLETED, 1, None)}


# ---- limits: by the owner's decision, since another owner may have others


def failure(world: World, request: RequestId) -> str:
    (result,) = (r for r in results(world) if r.request == request)
    assert isinstance(result.error, BatchTransferFailed)
    assert result.error.request_id == request
    return result.error.reason


def test_a_request_too_many_is_refused_and_a_small_one_is_not() -> None:
    log = [
        split(1, 0, b"a", total=2),
        split(2, 0, b"a", total=2),
        split(3, 0, b"ab", total=2),
        split(1, 1, b"b"),
        split(4, 0, b"a", total=2),
        split(4, 1, b"b"),
    ]
    world = World(log, limits=Limits(open_requests=1))
    world.finish()
    assert world.outcomes() == {
        (ONE, 0): (Status.COMPLETED, 3, None),
        (TWO, 1): (Status.FAILED, 1, "BatchTransferFailed"),
        (RequestId(1, 3), 2): (Status.COMPLETED, 2, None),
        (RequestId(1, 4), 4): (Status.COMPLETED, 5, None),
    }
    assert failure(world, TWO).endswith(" already, the limit (--max-open-requests)")
    assert world.told == [], "a setting is exceeded: the record is as the contract has it"


@pytest.mark.parametrize("brings", [split(1, 0, b"a", total=11), split(1, 10, b"a")])
def test_an_item_too_large_is_refused_as_soon_as_it_is_known(brings: Split) -> None:
    world = World([split(1, 0, b"a"), brings], limits=Limits(item_size=10))
    world.finish()
    assert world.outcomes() == {(ONE, 0): (Status.FAILED, 1, "BatchTransferFailed")}
    assert failure(world, ONE).endswith(" the limit is 10 (--max-item-size)")


@pytest.mark.parametrize("limit", [10, 0])
def test_an_item_as_large_as_the_limit_is_taken(limit: int) -> None:
    log = [split(1, 0, b"a" * limit, total=limit)]
    world = World(log, limits=Limits(item_size=limit))
    world.finish()
    assert world.outcomes() == {(ONE, 0): (Status.COMPLETED, 0, None)}


def test_gaps_made_on_purpose_end_the_request() -> None:
    spread = [split(1, 2 * n, b"x", total=100) for n in range(1, 4)]
    world = World([*spread, split(1, 8, b"x")], limits=Limits(gaps=3))
    for _ in spread:
        world.read()
    world.finish()
    assert world.outcomes() == {(ONE, 0): (Status.FAILED, 3, "BatchTransferFailed")}
    assert failure(world, ONE).endswith(" the limit (--max-gaps)")
    closing = World([*spread, split(1, 0, b"xx")], limits=Limits(gaps=3))
    closing.finish()
    assert closing.ledger.open_requests, "a split that closes a gap is welcome"


def test_what_is_to_be_told_counts_as_held_until_it_is_told() -> None:
    tokens = [bytes([n]) for n in range(65, 75)]
    log = [split(1, 0, b"a", total=2, reply=token) for token in tokens]
    log += [split(1, 1, b"b", reply=b"last"), *(split(1, 1, b"b", reply=t) for t in tokens)]
    world = World(log)
    while world.read() or world.compare():
        pass
    assert world.ledger.held_bytes > len(log) * RECORD_OVERHEAD / 2
    world.finish()
    assert world.ledger.held_bytes == 0


def test_what_one_transaction_leaves_behind_is_told_after_a_crash(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("splitferry_consumer.ledger.EVENTS_IN_A_TRANSACTION", 2)
    world = World([poison()] * 5)
    while world.read():
        pass
    assert world.begin()
    assert world.commit(heard=False)
    assert world.told == [(0, "dead letter"), (1, "dead letter")]
    assert world.ledger.position == 2
    world.finish()
    assert [offset for offset, _ in world.told] == [0, 1, 2, 3, 4]


# ---- overlaps


def test_decisions_of_one_request_apply_in_order_although_a_comparison_takes_long() -> None:
    world = World([split(1, 0, b"ab", total=3), split(1, 0, b"aX"), split(1, 2, b"c")])
    while world.read():
        pass
    assert world.ledger.open_requests, "the third split has closed the gap, but is not its turn"
    world.finish()
    assert world.outcomes() == {(ONE, 0): (Status.FAILED, 1, "BatchTransferFailed")}
    assert world.told == [(1, "dead letter")]


def test_p_stays_below_what_is_not_decided() -> None:
    world = World([split(1, 0, b"ab", total=3), split(1, 0, b"ab"), poison(), split(2, total=0)])
    while world.read():
        pass
    world.settle()
    assert world.begin()
    assert world.batch is not None
    assert (world.batch.told, len(world.batch.results)) == (1, 1)
    assert world.batch.events == [], "the poison at 2 would be told again after a crash"


# ---- replies


def test_an_older_reply_is_accepted_and_the_newest_gets_the_result() -> None:
    world = run(
        split(1, 0, b"a", total=2, reply=b"old"),
        split(1, 0, b"a", reply=b"new", index=7),
        split(1, 1, b"b", reply=b"new"),
    )
    accepted, result = world.results
    assert accepted == Accepted(ONE, "group", 7, b"old")
    assert isinstance(result, Result)
    assert result.reply == b"new"


@pytest.mark.parametrize("when", ["before the verdict", "in flight", "after the commit"])
def test_a_new_reply_after_the_end_gets_the_result_once_more(when: str) -> None:
    first = split(1, 0, b"a", total=1, reply=b"a")
    world = World([first, split(1, 0, b"a", reply=b"b"), split(1, 0, b"a", reply=b"b")])
    world.read()
    if when == "in flight":
        assert all((world.settle(), world.begin()))
    if when == "after the commit":
        assert all((world.settle(), world.begin(), world.commit()))
    world.read(), world.read()
    world.commit()
    world.finish()
    assert [(r.reply, r.repeat) for r in results(world)] == [(b"a", False), (b"b", True)]
    assert (world.ledger.late_duplicates, world.ledger.held_bytes) == (2, 0)


def test_a_reply_read_at_the_very_end_goes_with_the_result() -> None:
    """The horizon ends a request before the record there is read, which the next owner passes over
    as it does with all up to *e*. Meanwhile another request keeps P below."""
    holder = split(1, 0, b"a", total=3)
    late = [split(2, n, b"x", total=2, reply=reply) for n, reply in enumerate((b"old", b"new"))]
    world = World([holder, late[0], holder, poison(), poison(), late[1]], horizon=4)
    while world.read():
        pass
    assert all((world.settle(), world.begin(), world.commit(heard=False)))
    world.finish()
    assert world.outcomes()[TWO, 1] == (Status.FAILED, 5, "BatchTransferFailed")
    assert [(r.reply, r.repeat) for r in results(world) if r.request == TWO] == [
        (b"old", False),
        (b"new", True),
    ]


def test_a_request_knows_when_the_log_got_its_first_split_and_the_last_new_bytes() -> None:
    """By the log's clock: the owner's may have begun long after."""
    ledger = taken(7)
    for content in (split(1, 0, b"a"), split(1, 1, b"b"), split(1, 0, b"ab")):
        record = Record(ledger.position, b"key", b"value", timestamp=1000 + ledger.position)
        ledger.read(record, content, 0.0)
    (state,) = ledger.open_requests
    ledger.compared(state, True, 0.0)
    assert (state.opened_at, state.grown_at) == (1007, 1008)


# ---- the result


@pytest.mark.parametrize(("measured", "told"), [(4, 4), (None, 9)])
def test_a_result_is_what_the_splits_said_and_what_the_verdict_was(
    measured: int | None, told: int
) -> None:
    ledger = taken(7)
    state = start(ledger, split(1, 0, b"ab", total=9, reply=b"r", labels={"a": "1"}))
    read(ledger, split(1, 0, b"ab"))
    ledger.compared(state, True, 0.0)
    read(ledger, abort(1))
    phases = [state.phase]
    error = WriteDataFailed(ONE)
    target = {"path": "item-1"}
    verdict = Verdict(Status.FAILED, error, measured, b"\1" * 32, target)
    ledger.settled(state, verdict, finished_at=77)
    phases.append(state.phase)
    batch = ledger.gather()
    assert batch is not None
    assert [*phases, state.phase] == [
        RequestPhase.ENDED,
        RequestPhase.SETTLED,
        RequestPhase.PUBLISHING,
    ]
    assert batch.results == [
        Result(
            ONE, "item-1", 1, Block.MEM, {"a": "1"}, "group", Status.FAILED, error, told,
            b"\1" * 32, target, 1, 1, Input("splits", 0, 7, 9), b"r", False, 77,
        )
    ]  # fmt: skip


# ---- after the end


def test_late_splits_are_counted_and_a_reused_id_is_a_dead_letter() -> None:
    world = run(
        split(1, 0, b"ab", total=2),
        split(1, 0, b"ab"),
        split(1, 0, b"zz", total=2, version=2),
        split(1, 0, b"ab", total=3),
        split(1, 0, b"ab", sha256=b"\1" * 32),
    )
    assert world.ledger.late_duplicates == 2
    assert world.told == [(2, "dead letter"), (3, "dead letter")]
    assert len(results(world)) == 1
    for letter in world.dead_letters:
        assert (letter.request, letter.code) == (ONE, "BatchTransferError")
        assert letter.message.startswith(f"request {ONE}: this request id has ended with another")
        assert letter.message.endswith("item, version, size or digest")


@pytest.mark.parametrize("read_first", [True, False])
def test_a_digest_that_nobody_declared_is_judged_by_the_verdict_whenever_it_is_read(
    read_first: bool,
) -> None:
    """Read between the end and the verdict, the same record was a duplicate."""
    other = split(1, 0, b"a", total=1, reply=b"b", sha256=b"?" * 32)
    log = [split(1, 0, b"a", total=1, reply=b"a"), other, split(1, 0, b"a", reply=b"c")]
    world = World(log)
    world.read()
    if read_first:
        world.read(), world.read()
        assert world.ledger.held_bytes, "it waits, and the token behind it too"
    else:
        assert all((world.settle(), world.begin(), world.commit()))
    world.finish()
    assert sorted(world.told) == [(1, "dead letter"), (2, "Result b'c'")]
    assert [r.reply for r in results(world)] == [b"a", b"c"]
    assert world.ledger.held_bytes == 0


@pytest.mark.parametrize("last", [split(1, 1, b"b"), split(1, 0, b"ab")], ids=["", "compared"])
def test_p_stays_below_a_late_split_that_only_the_verdict_can_judge(last: Split) -> None:
    """Above it, a crash would lose the dead letter that it may turn out to be."""
    log: list[Content] = [split(1, 0, b"a", total=2), split(2, total=0), last]
    world = World([*log, split(1, 0, b"a", total=2, sha256=b"?" * 32), poison()])
    while world.read() or world.compare():
        pass
    world.settle(1)
    assert all((world.begin(), world.commit()))
    assert world.bookmark is not None
    assert world.bookmark.told == 3
    world.take()
    world.finish()
    assert sorted(world.told) == [(3, "dead letter"), (4, "dead letter")]


def test_beyond_the_horizon_an_id_opens_again() -> None:
    log: list[Content] = [split(1, total=0), *[poison()] * 9, split(1, total=0), *[poison()] * 10]
    world = run(*log, split(1, total=0), horizon=10)
    assert list(world.outcomes()) == [(ONE, 0), (ONE, 21)]


def test_the_ended_set_forgets_what_no_record_can_ask_for() -> None:
    world = run(*[split(n, total=0) for n in range(100)], horizon=10)
    world.log += [split(1000, total=0)]
    world.finish()
    assert len(world.ledger._recorded) <= 12


# ---- what was committed before


def ended(first: int, last: int, *, reply: bytes | None = None, version: int = 1) -> Result:
    """The result of request 1, of one byte, as a reader of the results finds it."""
    (result,) = results(run(split(1, 0, b"a", total=1, version=version)))
    at = Input("splits", 0, first, last)
    return result._replace(input=at, reply=reply)


def taken(
    at: int, *committed: Result, horizon: int = 10, told: int = 0, results_end: int = 9
) -> Ledger:
    """A partition that is taken at that offset, with its results."""
    bookmark = Bookmark(at, 0, told or at, horizon)
    ledger = Ledger("group", "splits", 0, horizon, bookmark, results_end)
    for offset, result in enumerate(committed):
        ledger.load(offset, result, encode_result(result))
    return ledger


def read(ledger: Ledger, content: Content, value: bytes = b"value") -> list[Decision]:
    headers: Any = [("h", b"12"), ("none", None)]  # Kafka has headers without a value too
    record = Record(ledger.position, b"key", value, headers)
    return ledger.read(record, content, 0.0)


def start(ledger: Ledger, first: Split) -> ReceiveState:
    """The state of the request that this split opens."""
    read(ledger, first)
    return ledger.states[first.request]


@pytest.mark.parametrize(("at", "known"), [(15, True), (16, False)])
def test_a_result_is_known_up_to_a_horizon_after_its_end(at: int, known: bool) -> None:
    ledger = taken(at, ended(0, 5))
    read(ledger, split(1, 0, b"a", total=2))
    assert (ledger.late_duplicates, len(ledger.open_requests)) == (0, 0 if known else 1)


def test_a_token_that_a_repeat_was_told_is_not_told_again() -> None:
    repeat = ended(0, 1, reply=b"b")._replace(repeat=True)
    ledger = taken(5, ended(0, 1, reply=b"a"), repeat)
    read(ledger, split(1, 0, b"a", reply=b"b"))
    assert not ledger.has_news
    read(ledger, split(1, 0, b"a", reply=b"c"))
    batch = ledger.gather()
    assert batch is not None
    (told,) = batch.events
    assert isinstance(told, Told)
    assert told == Told(6, repeat._replace(reply=b"c"))
    assert ledger.bookmark(batch, []).results == 0, "S is where its first result lies"


def test_of_two_results_of_an_id_the_later_opening_counts() -> None:
    ledger = taken(30, ended(0, 20), ended(22, 25, version=2))
    read(ledger, split(1, 0, b"a", version=2))
    assert (ledger.late_duplicates, ledger.has_news) == (1, False)
    read(ledger, split(1, 0, b"a", version=1))
    assert ledger.has_news, "a reused id"


def test_s_is_the_end_of_the_results_when_none_of_them_matters_any_more() -> None:
    ledger = taken(0, results_end=9)
    (state,) = (decision.state for decision in read(ledger, split(1, total=0)))
    ledger.settled(state, Verdict(Status.COMPLETED, None, 0, b"\1" * 32), 0)
    ends = []
    for offsets in ([20], []):
        batch = ledger.gather()
        assert batch is not None
        ends.append(ledger.bookmark(batch, offsets).results)
        ledger.published(batch, offsets)
        for _ in range(20):
            read(ledger, poison())
    assert ends == [20, 21]


def test_s_is_the_start_of_the_results_where_nobody_said_how_far_they_go() -> None:
    ledger = Ledger("group", "splits", 0, 10, Bookmark(0, 0, 0, 10))
    read(ledger, poison())
    batch = ledger.gather()
    assert batch is not None
    assert ledger.bookmark(batch, []).results == 0


def test_where_no_record_was_the_log_was_read_all_the_same() -> None:
    """Markers of transactions, and what was aborted: W passes them."""
    ledger = taken(5)
    positions = []
    for position in (9, 8):
        ledger.advance(position)
        positions.append((ledger.position, ledger.watermark))
    assert positions == [(9, 9), (9, 9)]


def test_a_result_is_news_and_a_moved_w_is_not() -> None:
    ledger = taken(0)
    state = start(ledger, split(1, total=0))
    news = [ledger.has_news]
    ledger.settled(state, Verdict(Status.COMPLETED, None, 0, b"\1" * 32), 0)
    news.append(ledger.has_news)
    batch = ledger.gather()
    assert batch is not None
    ledger.published(batch, [9])
    read(ledger, abort(2))
    assert [*news, ledger.has_news] == [False, True, False]


@pytest.mark.parametrize("at", [0, 1, 5])
def test_after_a_loss_the_next_transaction_commits_w_although_it_did_not_move(at: int) -> None:
    ledger = taken(at)
    assert ledger.gather() is None
    ledger.commit_anew()
    batch = ledger.gather()
    assert batch is not None
    assert (batch.watermark, batch.told, batch.results, batch.events) == (at, at, [], [])
    ledger.published(batch, [])
    assert ledger.gather() is None


# ---- who only looks on


def obey(onlooker: Ledger, offset: int, result: Result) -> None:
    onlooker.obey(offset, result, encode_result(result))


@pytest.mark.parametrize("second", [[], [split(1, 1, b"b")]], ids=["open", "ended"])
def test_what_is_settled_elsewhere_is_settled_here(second: list[Content]) -> None:
    onlooker = taken(0)
    for content in (split(1, 0, b"a", total=2), *second, split(2, 0, b"a"), split(3, 0, b"a")):
        read(onlooker, content)
    assert repr(onlooker).endswith(f"open={3 - len(second)} unsettled={len(second)} recorded=0>")
    obey(onlooker, 0, ended(0, 1)._replace(size=2))
    assert repr(onlooker).endswith("open=2 unsettled=0 recorded=1>")
    assert [state.request for state in onlooker.open_requests] == [TWO, RequestId(1, 3)]
    assert onlooker.watermark == onlooker.position - 2
    read(onlooker, split(1, 0, b"a", total=2))
    assert onlooker.late_duplicates == 1


def test_what_waits_for_a_word_that_was_said_elsewhere_is_let_go() -> None:
    onlooker = taken(0)
    for content in (split(1, 0, b"a"), split(1, 0, b"a"), split(1, 1, b"b"), split(1, 2, b"c")):
        read(onlooker, content)
    assert onlooker.held_bytes
    obey(onlooker, 0, ended(0, 3))
    assert onlooker.held_bytes == 0
    batch = onlooker.gather()
    assert batch is not None
    assert (batch.told, batch.watermark) == (4, 4)


def test_a_result_of_an_earlier_opening_settles_nothing() -> None:
    onlooker = taken(30)
    read(onlooker, split(1, 0, b"a", total=2))
    obey(onlooker, 0, ended(5, 8))
    assert len(onlooker.open_requests) == 1
    assert onlooker.watermark == 30


def test_two_requests_that_an_owner_ended_at_once_are_both_settled() -> None:
    onlooker = taken(0)
    for number in (1, 2):
        read(onlooker, split(number, 0, b"a", total=2))
    for offset, request in enumerate((ONE, TWO)):
        obey(onlooker, offset, ended(offset, 1)._replace(request=request))
    assert (onlooker.open_requests, onlooker.watermark) == ([], 2)


def test_an_onlooker_forgets_what_no_record_can_ask_for() -> None:
    onlooker = taken(0)
    for number in range(100):
        read(onlooker, poison())
        obey(onlooker, number, ended(number, number)._replace(request=RequestId(1, number)))
    assert len(onlooker._recorded) <= 12


# ---- what is held


@pytest.mark.parametrize(
    ("log", "weight"),
    [
        ([split(1, 0, b"a", reply=b"a"), split(1, 1, b"b", reply=b"b")], RECORD_OVERHEAD),
        ([split(3, 0, b"a", total=1, reply=b"b")], RECORD_OVERHEAD + HEADER_MAX),
        ([poison()], RECORD_OVERHEAD + 1000 + len("key") + len("h12") + len("none")),
        ([split(1, 0, b"a"), split(1, 0, b"a"), split(1, 1, b"b")],
         RECORD_OVERHEAD + 1000 + len("key") + len("h12") + len("none")),
    ],
    ids=["accepted", "repeat", "dead letter", "behind a comparison"],
)  # fmt: skip
def test_what_is_kept_is_weighed(log: list[Content], weight: int) -> None:
    ledger = taken(5, ended(0, 1)._replace(request=RequestId(1, 3), unique_id="item-3"))
    for content in log:
        read(ledger, content, b"v" * 1000)
    assert ledger.held_bytes == weight


@pytest.mark.parametrize(("told", "weight"), [(1, RECORD_OVERHEAD + HEADER_MAX), (2, 0)])
def test_below_the_previous_owners_p_no_token_weighs(told: int, weight: int) -> None:
    ledger = taken(0, told=told)
    read(ledger, split(1, 0, b"a", total=1))
    read(ledger, split(1, 0, b"a", reply=b"b"))
    assert ledger.held_bytes == weight


# ---- the owner's decisions


def test_the_owner_gives_up_at_the_last_record_read() -> None:
    world = World([split(1, 0, b"a", total=9), poison(), poison()])
    while world.read():
        pass
    (state,) = world.ledger.open_requests
    assert world.ledger.idle_since(0.0) == [state]
    assert world.ledger.idle_since(-1.0) == []
    error = BatchTransferFailed(ONE, "expired")
    world._carry_out(world.ledger.give_up(state, Status.EXPIRED, error))
    assert world.ledger.give_up(state, Status.EXPIRED, error) == []
    world.finish()
    assert world.outcomes() == {(ONE, 0): (Status.EXPIRED, 2, "BatchTransferFailed")}


def test_a_request_that_brought_no_byte_is_idle_since_it_opened() -> None:
    world = World([poison(), split(1, 0, b"", total=9)])
    world.read(), world.read()
    assert world.ledger.idle_since(1.0)
    assert not world.ledger.idle_since(0.9)


def test_only_splits_that_add_bytes_count_as_activity() -> None:
    world = World([split(1, 0, b"a", total=9), split(1, 0, b"a"), split(1, 1, b"b")])
    world.read()
    world.read(), world.compare()
    assert world.ledger.idle_since(0.0)
    world.read()
    assert not world.ledger.idle_since(0.0)


def test_what_follows_an_owners_decision_is_told_only_with_its_result() -> None:
    """Another owner would find the request open there, and decide otherwise."""
    world = World([split(1, 0, b"a", total=9, reply=b"a"), poison(), split(2, total=0)])
    world.read()
    (state,) = world.ledger.open_requests
    world._carry_out(world.ledger.give_up(state, Status.FAILED, WriteDataFailed(ONE)))
    world.read(), world.read()
    world.settle(1)  # request 2
    assert world.begin()
    assert world.batch is not None
    assert (world.batch.told, world.batch.events) == (1, [])
    world.commit()
    world.finish()
    assert world.told == [(1, "dead letter")]
    world.log.append(poison())
    world.finish()
    assert world.bookmark is not None
    assert world.bookmark.told == 4, "once it is committed, P goes on"


def test_what_a_decision_told_of_the_queue_waits_for_its_result() -> None:
    """Another owner, whose comparison ends in time, finds that the record at 2 ended it."""
    log: list[Content] = [split(1, 0, b"a", total=2, reply=b"a"), split(1, 0, b"a"), abort(1)]
    world = World([*log, split(1, 1, b"b", reply=b"b")])
    while world.read():
        pass
    (state,) = world.ledger.open_requests
    world._carry_out(world.ledger.give_up(state, Status.FAILED, WriteDataFailed(ONE)))
    if world.begin():
        world.commit()
    world.take()
    world.finish()
    assert [r.reply for r in results(world)] == [b"a", b"b"]
    assert world.told == [(3, "Result b'b'")]


def test_giving_up_keeps_the_dead_letters_and_the_tokens_of_the_queue() -> None:
    damaged = InvalidRecord("bad", ONE, 1, damaged=True)
    log: list[Content] = [split(1, 0, b"a", total=2, reply=b"a"), split(1, 0, b"a"), damaged]
    world = World([*log, split(1, 1, b"b", reply=b"b", index=4), split(1, 1, b"b")])
    while world.read():
        pass
    (state,) = world.ledger.open_requests
    world._carry_out(world.ledger.give_up(state, Status.FAILED, WriteDataFailed(ONE)))
    assert world.ledger.compared(state, True, 0.0) == [], "it comes too late"
    world.settle()
    world.log.append(split(1, 1, b"b", reply=b"c"))
    world.finish()
    assert sorted(world.told) == [(2, "dead letter"), (3, "Accepted b'a'"), (5, "Result b'c'")]
    (letter,) = world.dead_letters
    assert (letter.request, letter.code, letter.message) == (ONE, damaged.code, damaged.message)
    assert Accepted(ONE, "group", 4, b"a") in world.results
    assert [r.reply for r in results(world)] == [b"b", b"c"]
    assert world.ledger.held_bytes == 0


def test_a_late_digest_behind_an_owners_decision_leaves_p_at_the_decision(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its verdict is known, but another owner may decide otherwise until the result commits."""
    monkeypatch.setattr("splitferry_consumer.ledger.RESULTS_IN_A_TRANSACTION", 1)
    log: list[Content] = [split(1, 0, b"a", total=2), split(2, total=0)]
    world = World([*log, poison(), split(1, 0, b"a", sha256=b"?" * 32), poison()])
    world.read(), world.read()
    (state,) = world.ledger.open_requests
    world._carry_out(world.ledger.give_up(state, Status.FAILED, WriteDataFailed(ONE)))
    while world.read():
        pass
    world.settle(1), world.settle()  # request 2 before request 1
    assert world.begin()
    assert world.batch is not None
    assert (world.batch.told, world.batch.events) == (2, [])
    world.finish()
    assert [offset for offset, _ in world.told] == [2, 4]


def test_nothing_is_published_before_p_is_reached_again() -> None:
    """A result that went out earlier would leave the tokens behind that are still to be read
    below P: they go with it, since nothing else is told there."""
    world = World([split(1, 0, b"a", total=1), split(1, 0, b"a", reply=b"b"), poison()])
    while world.read():
        pass
    assert all((world.begin(), world.commit()))
    assert world.told == [(2, "dead letter")]
    world.take()
    world.read()
    world.settle()
    assert not world.begin()
    world.finish()
    assert [r.reply for r in results(world)] == [None, b"b"]


def test_owners_decisions_below_p_do_not_wait_for_each_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each keeps P back, and none may be published below P: that P was committed long ago."""
    monkeypatch.setattr("splitferry_consumer.ledger.RESULTS_IN_A_TRANSACTION", 1)
    opened: list[Content] = [split(n, 0, b"a", total=2) for n in range(3)]
    world = World([*opened, poison()])
    while world.read():
        pass
    assert all((world.begin(), world.commit()))
    world.take()
    while world.ledger.position < 3:
        world.read()
    for state in world.ledger.open_requests:
        error = WriteDataFailed(state.request)
        world._carry_out(world.ledger.give_up(state, Status.FAILED, error))
    world.finish()
    assert len(results(world)) == 3
    assert world.told == [(3, "dead letter")]


def test_a_limit_met_behind_a_comparison_keeps_p_below_what_queues_there() -> None:
    """Another owner, with other limits, finds that the record at 3 is a dead letter."""
    log: list[Content] = [
        split(1, 0, b"ab"),
        split(1, 0, b"ab"),
        split(1, 3, b"x"),
        split(1, 1, b"b", unique_id="other"),
        split(2, total=0),
    ]
    world = World(log, limits=Limits(item_size=2))
    while world.read():
        pass
    assert world.compare()
    world.settle(1)
    if world.begin():
        world.commit()
    world.limits = Limits()
    world.take()
    world.finish()
    assert world.told == [(3, "dead letter")]


def test_tokens_for_a_result_count_for_its_transaction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("splitferry_consumer.ledger.EVENTS_IN_A_TRANSACTION", 2)
    tokens = [bytes([n]) for n in range(65, 75)]
    world = World([split(1, total=0), *(split(1, total=0, reply=token) for token in tokens)])
    while world.read():
        pass
    world.settle()
    most = 0
    while world.begin():
        assert world.batch is not None
        most = max(most, len(world.batch.events))
        world.commit()
    assert most == 2
    assert [r.reply for r in results(world)] == [None, *tokens]


@pytest.mark.parametrize(
    "log",
    [
        [poison(), split(1, total=0, reply=b"a"), poison(), poison()],
        [split(1, total=0, reply=token) for token in (b"a", b"b", b"c", b"d")],
    ],
    ids=["with dead letters", "from P on"],
)
def test_tokens_count_beside_everything_else(
    log: list[Content], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("splitferry_consumer.ledger.EVENTS_IN_A_TRANSACTION", 2)
    ledger = taken(0, told=1)
    state = start(ledger, split(1, total=0))
    for content in log:
        read(ledger, content)
    ledger.settled(state, Verdict(Status.COMPLETED, None, 0, b"\1" * 32), 0)
    batch = ledger.gather()
    assert batch is not None
    assert sorted(event.offset for event in batch.events) == [1, 2]


def test_p_never_goes_back_for_tokens_that_its_transaction_leaves_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Tokens wait for their result while P passes them. Were P to end at one of them then, what
    was told behind it would be told again after a crash."""
    monkeypatch.setattr("splitferry_consumer.ledger.EVENTS_IN_A_TRANSACTION", 1)
    world = World(
        [
            split(1, total=0),
            *(split(1, total=0, reply=token) for token in (b"a", b"b")),
            split(2, 0, b"?"),
            split(2, total=0),  # contradicts, so it is a dead letter
        ]
    )
    while world.read():
        pass
    assert world.begin()
    assert world.commit()
    assert world.told == [(4, "dead letter")]
    world.settle()
    assert world.begin()
    assert world.commit(heard=False)
    world.finish()
    assert sorted(world.told) == [(1, "Result b'a'"), (2, "Result b'b'"), (4, "dead letter")]


def test_an_owners_decision_below_p_is_not_kept_waiting_behind_others() -> None:
    """It keeps P back, and nothing is published below P: among the last it would wait for ever."""
    log: list[Content] = [split(n, total=0) for n in range(2, 702)]
    world = World([split(1, 0, b"a", total=9), *log])
    while world.read():
        pass
    while world.settle():
        pass
    assert all((world.begin(), world.commit()))
    world.take()  # P is behind all of them now
    while world.ledger.position < 600:
        world.read()
    (state,) = world.ledger.open_requests
    world._carry_out(world.ledger.give_up(state, Status.FAILED, WriteDataFailed(ONE)))
    world.finish()
    assert len(world.outcomes()) == 701


def test_more_requests_than_fit_a_transaction_below_p_are_published_after_a_crash() -> None:
    world = World([split(n, total=0) for n in range(3000)])
    while world.read():
        pass
    while world.settle():
        pass
    assert all((world.begin(), world.commit()))
    world.take()
    assert not world.ledger.may_publish
    world.finish()
    assert len(world.outcomes()) == 3000


# ---- properties


@st.composite
def cuts(draw: st.DrawFn, request: int, reply: bool = False) -> list[Content]:
    """Splits of one item: any cut, with overlaps and duplicates, in any order."""
    item = bytes(range(65, 65 + draw(st.integers(0, 8))))
    size = len(item)
    parts = [(0, size)] if draw(st.booleans()) else []
    edges = sorted(draw(st.sets(st.integers(0, size))) | {0, size})
    parts += list(itertools.pairwise(edges)) or [(0, 0)]
    parts += draw(st.lists(st.tuples(st.integers(0, size), st.integers(0, size)), max_size=3))
    parts = [(start, max(start, end)) for start, end in parts]
    parts = draw(st.permutations(parts))
    knows = draw(st.integers(0, len(parts) - 1))
    tokens = st.sampled_from([None, b"a", b"b"]) if reply else st.none()
    return [
        split(
            request,
            start,
            item[start:end],
            total=size if n == knows or draw(st.booleans()) else None,
            reply=draw(tokens),
            index=n,
        )
        for n, (start, end) in enumerate(parts)
    ]


@st.composite
def logs(draw: st.DrawFn) -> list[Content]:
    """Interleaved requests, some of them cut short, contradicted, aborted or poisoned."""
    queues = [draw(cuts(request, reply=True)) for request in range(draw(st.integers(1, 3)))]
    for request, queue in enumerate(queues):
        fault = draw(
            st.sampled_from(
                [
                    None,
                    abort(request),
                    split(request, 0, b"?", reply=b"c"),
                    split(request, version=2),
                    InvalidRecord("bad", RequestId(1, request), 0),
                    poison(),
                ]
            )
        )
        if fault is not None:
            queue.insert(draw(st.integers(0, len(queue))), fault)
        if draw(st.booleans()) and len(queue) > 1:
            queue.pop()
    log: list[Content] = []
    while any(queues):
        queue = draw(st.sampled_from([queue for queue in queues if queue]))
        log.append(queue.pop(0))
    return log


@st.composite
def chatter(draw: st.DrawFn) -> list[Content]:
    """Whole items sent again and again under changing tokens, behind a request that holds W."""
    tokens = st.sampled_from([b"a", b"b", b"c"])
    whole = st.builds(lambda reply: split(1, 0, b"x", total=1, reply=reply), tokens)
    half = st.builds(
        lambda offset, reply: split(2, offset, b"x", total=2, reply=reply),
        st.sampled_from([0, 1]),
        tokens,
    )
    holder = split(0, 0, b"a", total=3)
    rest = st.one_of(whole, half, half, st.builds(poison), st.just(holder))
    return [holder, *draw(st.lists(rest, min_size=3, max_size=9))]


seeds = st.integers(0, 2**32).map(random.Random)
relaxed = settings(
    deadline=None,
    max_examples=3 * settings().max_examples,
    suppress_health_check=[HealthCheck.too_slow],
)


@relaxed
@given(cuts(1), seeds)
def test_any_cut_order_overlap_and_duplicate_gives_the_same_bytes_and_one_result(
    log: list[Content], rng: random.Random
) -> None:
    world = World(log)
    _stagger(world, rng, crashes=False)
    total = next(s.total for s in log if s.total is not None)  # type: ignore[union-attr]
    assert world.items == {ONE: [bytes(range(65, 65 + total))]}
    assert len(world.outcomes()) == 1


@relaxed
@given(logs() | chatter(), seeds, st.sampled_from([1000, 8, 4]), st.sampled_from([1, 2, 1000]))
def test_any_crash_and_restart_from_the_commit_gives_the_same_outcomes(
    log: list[Content], rng: random.Random, horizon: int, events: int
) -> None:
    """Results, bytes, accepted events, repeats and dead letters: all as without any crash."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("splitferry_consumer.ledger.EVENTS_IN_A_TRANSACTION", events)
        _crash_and_restart(log, rng, horizon)


def _crash_and_restart(log: list[Content], rng: random.Random, horizon: int) -> None:
    calm = World(log, horizon)
    calm.finish()
    opened = [request for request, _ in calm.outcomes()]
    opened += [state.request for state in calm.ledger.open_requests]
    assume(len(opened) == len(set(opened)))  # beyond the horizon the guarantee ends (WIRE)
    stormy = World(log, horizon)
    _stagger(stormy, rng, crashes=True)
    assert stormy.outcomes() == calm.outcomes()
    assert stormy.items == calm.items
    assert sorted(stormy.told) == sorted(calm.told)
    assert stormy.ledger.watermark == calm.ledger.watermark
    assert (stormy.ledger.held_bytes, stormy.ledger.unsettled) == (0, 0)


def _stagger(world: World, rng: random.Random, crashes: bool) -> None:
    """Take the steps in any order; at most a few crashes, then let the owner finish."""
    for _ in range(60):
        step = rng.randrange(8)
        if step <= 2:
            world.read()
        elif step == 3:
            world.compare()
        elif step == 4:
            world.settle(rng.randrange(5))
        elif step == 5:
            world.begin()
        elif step == 6:
            world.commit()
        elif crashes and rng.random() < 0.5:
            if world.batch is not None and rng.random() < 0.7:
                world.commit(heard=False, applied=rng.random() < 0.5)
            else:
                world.take()
    world.finish()


@pytest.mark.parametrize("told", [3, 2], ids=["the token behind it was read", "it was not"])
def test_who_waited_for_the_result_of_one_owner_hears_of_that_of_the_next(told: int) -> None:
    world = World(
        [
            split(1, 1, b"BCD", total=4, reply=b"first"),
            split(1, 0, b"ABC", reply=b"waits"),  # closes the last gap, if its bytes are the same
            split(1, 3, b"D", reply=b"late"),
        ]
    )
    for _ in range(3):
        world.read()
    world.compare()  # it has ended: "waits" gets the result, "late" gets it once more
    assert (world.begin(), world.commit()) == (True, True)
    assert world.told == [(1, "Accepted b'first'")]
    assert world.bookmark is not None
    assert world.bookmark.told == 3
    world.bookmark = replace(world.bookmark, told=told)
    world.take()  # before the result was told
    for _ in range(3):
        world.read()
    # The next owner cannot read back what it is to compare, and gives the request up.
    (state,) = world.ledger.open_requests
    error = BatchTransferFailed(state.request, "cannot be read")
    world._carry_out(world.ledger.give_up(state, Status.FAILED, error))
    world.finish()
    assert {outcome.reply for outcome in world.results} == {b"first", b"waits", b"late"}
    assert ((2, "Accepted b'waits'") in world.told) is (told == 2), "an older token, as ever"


# ---- what a taking is asked of the tenancy before, and a replay of an opening


def states_of(world: World) -> dict[int, ReceiveState]:
    return {state.request.sequence: state for state in world.incoming}


def test_a_taking_knows_which_openings_of_the_tenancy_before_have_a_result() -> None:
    world = World([split(1, 0, b"a", total=2), split(2, 0, b"a", total=1), split(3, total=0)])
    while world.read():
        pass
    world.settle()  # 2, and not 3; 1 is half there
    assert (world.begin(), world.commit()) == (True, True)
    before = states_of(world)
    world.take()
    assert world.ledger.position == 0
    assert {n: world.ledger.has_result(state) for n, state in before.items()} == {
        1: False,
        2: True,
        3: False,
    }
    again = copy.copy(before[2])
    again.first += 1
    assert not world.ledger.has_result(again), "an opening of the same id, and another one"


def test_what_w_has_passed_has_a_result() -> None:
    world = World([split(1, total=0), split(2, total=0)])
    while world.read():
        pass
    before = states_of(world)
    owner = Ledger(GROUP, TOPIC, PARTITION, 1000, Bookmark(1, 0, 1, 1000), 0)
    assert {n: owner.has_result(state) for n, state in before.items()} == {1: True, 2: False}


def test_an_opening_that_is_made_way_for_is_a_new_one() -> None:
    one, two = split(1, total=0), split(2, total=0)
    world = World([one, one, two], horizon=2)
    world.read()
    world.settle()
    assert (world.begin(), world.commit()) == (True, True)
    world.ledger.forget(RequestId(9, 9))  # of which nothing is known
    world.ledger.forget(one.request)
    world.read()
    assert [state.first for state in states_of(world).values()] == [1]
    world.settle()
    assert (world.begin(), world.commit()) == (True, True)
    # The result before is over with the horizon now, and does not take the next one along.
    world.finish()
    assert sorted(world.outcomes()) == [(one.request, 0), (one.request, 1), (two.request, 2)]
    assert {*world.ledger._recorded} == {one.request, two.request}
