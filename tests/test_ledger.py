"""The rules of docs/DESIGN.md, on the real ledger in a world without Kafka."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from splitferry_protocol.codec import InvalidRecord
from splitferry_protocol.errors import BatchTransferFailed, WriteDataFailed
from splitferry_protocol.ids import RequestId
from splitferry_protocol.records import Accepted, Block, Result, Status
from world import Content, World, abort, poison, split

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


def test_a_size_below_what_was_brought_contradicts() -> None:
    world = run(split(1, 2, b"cd"), split(1, 0, b"ab", total=3))
    assert world.outcomes() == {(ONE, 0): (Status.FAILED, 1, "BatchTransferFailed")}


def test_an_unsafe_file_name_opens_the_request_and_ends_it_there() -> None:
    world = run(split(1, 0, b"ab", total=2, block=Block.FILE, unique_id="../x"))
    assert world.outcomes() == {(ONE, 0): (Status.FAILED, 0, "BatchTransferError")}
    assert world.told == [(0, "dead letter")]


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
    assert isinstance(accepted, Accepted)
    assert (accepted.reply, accepted.index) == (b"old", 7)
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


def test_beyond_the_horizon_an_id_opens_again() -> None:
    log: list[Content] = [split(1, total=0), *[poison()] * 9, split(1, total=0), *[poison()] * 10]
    world = run(*log, split(1, total=0), horizon=10)
    assert list(world.outcomes()) == [(ONE, 0), (ONE, 21)]


def test_the_ended_set_forgets_what_no_record_can_ask_for() -> None:
    world = run(*[split(n, total=0) for n in range(100)], horizon=10)
    world.log += [split(1000, total=0)]
    world.finish()
    assert len(world.ledger._recorded) <= 12


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
relaxed = settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.too_slow])


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
@given(logs() | chatter(), seeds, st.sampled_from([1000, 8, 4]))
def test_any_crash_and_restart_from_the_commit_gives_the_same_outcomes(
    log: list[Content], rng: random.Random, horizon: int
) -> None:
    """Results, bytes, accepted events, repeats and dead letters: all as without any crash."""
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
