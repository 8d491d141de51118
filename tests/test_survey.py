"""What an onlooker learns of a partition, compared with what its owner knows."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitferry_consumer.bookmark import Bookmark
from splitferry_consumer.ledger import DEFAULT_LIMITS
from splitferry_consumer.request import RequestPhase
from splitferry_consumer.survey import MISSING_SHOWN, Survey, SurveyedRequest
from splitferry_consumer.transport import Record
from splitferry_protocol.codec import (
    InvalidRecord,
    crc_header,
    decode_record,
    encode_result,
    encode_split,
)
from splitferry_protocol.ids import RequestId
from splitferry_protocol.records import Result, Split, Status
from workload import Message, cut, make_load, message
from world import GROUP, PARTITION, TOPIC, Content, World

CONTRADICTING = 4
"""Kind of load whose bytes differ where they overlap: nobody sees that without the bytes."""


def records(messages: Sequence[Message]) -> list[Record]:
    """As they lie in a log, a second apart."""
    return [
        Record(offset, m.key, m.value, list(m.headers), timestamp=1000 * offset)
        for offset, m in enumerate(messages)
    ]


def contents(log: Sequence[Record]) -> list[Content]:
    found: list[Content] = []
    for record in log:
        try:
            found.append(decode_record(record.key, record.value, record.headers))
        except InvalidRecord as invalid:
            found.append(invalid)
    return found


def survey(start: Bookmark | None = None) -> Survey:
    return Survey(GROUP, TOPIC, PARTITION, start or Bookmark(0, 0, 0, 1000))


def looked(log: Sequence[Message], start: Bookmark | None = None) -> Survey:
    made = survey(start)
    for record in records(log)[made.position :]:
        made.read(record)
    return made


def views(of: Survey) -> list[SurveyedRequest]:
    return list(of.requests(10**6))


def splits(number: int, size: int, step: int) -> list[Split]:
    return cut(RequestId(7, number), bytes(range(size)), step)


def test_what_is_missing_and_since_when() -> None:
    first, second, third, _ = splits(1, 40, 10)
    log = [message(split, 1) for split in (first, third, third)]
    made = looked(log)
    (view,) = views(made)
    assert (view.first, view.received, view.total) == (0, 20, 40)
    assert view.missing == [(10, 20), (30, 40)]
    assert view.gaps == 2
    assert view.status is None
    assert (view.opened_at, view.grown_at) == (0, 1000)  # the third record added nothing
    assert (made.watermark, made.open, made.unsettled) == (0, 1, 0)
    assert looked([*log, message(second, 1)]).open == 1


def test_the_oldest_request_holds_w() -> None:
    one, other = splits(1, 10, 10), splits(2, 20, 10)
    made = looked([message(split, 1) for split in (other[0], *one)])
    assert [(view.request.sequence, view.status) for view in views(made)] == [
        (2, None),
        (1, Status.COMPLETED),
    ]
    assert (made.open, made.unsettled) == (1, 1)
    assert [view.request.sequence for view in made.requests(1)] == [2]


def test_a_size_that_nobody_has_said_leaves_the_end_open() -> None:
    value = encode_split(Split(RequestId(7, 1), "a", 1, splits(1, 1, 1)[0].block, 1, 5, None, b"x"))
    made = looked([Message(b"7-1", value, [crc_header(value)])])
    (view,) = views(made)
    assert view.missing == [(0, 5), (6, None)]
    assert view.gaps == 2
    assert view.total is None


def test_of_many_missing_ranges_the_first_are_told() -> None:
    every_other = splits(1, 200, 1)[1::2]
    (view,) = views(looked([message(split, 1) for split in every_other]))
    assert len(view.missing) == MISSING_SHOWN
    assert view.gaps == 100


def test_a_request_that_failed_says_why() -> None:
    first, second = splits(1, 20, 10)
    broken = message(second, 1)
    assert broken.value is not None
    damaged = Message(broken.key, broken.value[:-1] + b"?", broken.headers)
    (view,) = views(looked([message(first, 1), damaged]))
    assert view.status is Status.FAILED
    assert "CRC-32C" in (view.cause or "")


def test_what_comes_after_the_end_is_not_kept() -> None:
    whole = splits(1, 10, 10)[0]
    late = Split(
        whole.request, whole.unique_id, 1, whole.block, 0, 0, 10, whole.payload, bytes(32), b"token"
    )
    made = looked([message(whole, 1), *[message(late, 1)] * 50])
    assert made.unsettled == 1
    assert made._ledger.held_bytes == 0
    state = made._ledger.states[whole.request]
    assert not state.waiting
    assert not state.repeats


def test_a_result_settles_whatever_is_held() -> None:
    opened, ended = splits(1, 20, 10)[0], splits(2, 10, 10)[0]
    log = [message(opened, 1), message(ended, 1)]
    world = World(contents(records(log)))
    world.finish()
    (result,) = [one for one in world.results if isinstance(one, Result)]
    made = looked(log)
    made.obey(0, result, encode_result(result))
    assert [view.request.sequence for view in views(made)] == [1]
    assert (made.open, made.unsettled) == (1, 0)
    assert not made.passed_over(0)
    assert made.passed_over(1)


# ---- against the owner's ledger


seeds = st.integers(0, 2**32)


def test_no_limit_of_a_consumer_is_taken_for_its_own() -> None:
    """It may have been started with larger ones."""
    many = DEFAULT_LIMITS.open_requests + 1
    log = [message(cut(RequestId(7, n), b"ab", 1)[0], 1) for n in range(many)]
    found = looked(log, Bookmark(0, 0, 0, 10 * many))
    assert (found.open, found.unsettled) == (many, 0)
    assert not found.full


def test_what_is_held_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("splitferry_consumer.survey.REQUESTS_MAX", 3)
    log = [message(cut(RequestId(7, n), b"", 1)[0], 1) for n in range(4)]
    assert not looked(log[:2]).full
    found = looked(log[:3])
    assert found.full
    assert found.unsettled == 3


def load(seed: int) -> list[Message]:
    return make_load(random.Random(seed), 24, 1, (0, 1, 30, 300))


def resembling(world: World) -> World:
    """Another owner, who has taken from what was committed and read to the end."""
    other = World(world.log, world.horizon)
    other.results, other.bookmark = list(world.results), world.bookmark
    other.take()
    while other.read() or other.compare():
        pass
    return other


def same_bytes(request: RequestId) -> bool:
    return request.sequence % 12 != CONTRADICTING


def begun(world: World, log: Sequence[Record]) -> Survey:
    """A survey of what is committed now."""
    start = world.bookmark or Bookmark(0, 0, 0, world.horizon)
    made = survey(start)
    for offset in range(start.results_from(world.horizon, 0), len(world.results)):
        outcome = world.results[offset]
        if isinstance(outcome, Result):
            made.obey(offset, outcome, encode_result(outcome))
    for record in log[made.position :]:
        made.read(record)
    return made


def stagger(world: World, rng: random.Random, steps: int) -> None:
    for _ in range(steps):
        rng.choice((world.read, world.compare, world.settle, world.begin, world.commit))()


@settings(max_examples=60, deadline=None)
@given(seeds, st.sampled_from([1000, 60]))
def test_an_onlooker_knows_what_the_next_owner_would(seed: int, horizon: int) -> None:
    rng = random.Random(seed)
    log = records(load(seed))
    world = World(contents(log), horizon)
    for _ in range(4):
        stagger(world, rng, len(log))
        owner = resembling(world).ledger
        made = begun(world, log)
        expected = {
            state.request: (state.first, state.phase is RequestPhase.OPEN, list(state.coverage))
            for state in owner.states.values()
            if same_bytes(state.request)
        }
        found = {
            state.request: (state.first, state.phase is RequestPhase.OPEN, list(state.coverage))
            for state in made._ledger.states.values()
            if same_bytes(state.request)
        }
        assert found == expected


@settings(max_examples=60, deadline=None)
@given(seeds, st.sampled_from([1000, 60]))
def test_looking_again_tells_the_same_as_looking_anew(seed: int, horizon: int) -> None:
    rng = random.Random(seed)
    log = records(load(seed))
    world = World(contents(log), horizon)
    last = {content.request: offset for offset, content in enumerate(world.log)}
    watching, results_read, part = survey(Bookmark(0, 0, 0, horizon)), 0, 0
    while part < len(log):
        part = min(len(log), part + rng.randrange(1, len(log)))
        # The owner reads on while the onlooker has stopped here.
        stagger(world, rng, 2 * len(log))
        for offset in range(results_read, len(world.results)):
            outcome = world.results[offset]
            if isinstance(outcome, Result):
                watching.obey(offset, outcome, encode_result(outcome))
        results_read = len(world.results)
        for record in log[watching.position : part]:
            watching.read(record)
        anew = begun(world, log[:part])
        # What came later than a horizon after an end opens its request once more, but only where
        # the result is known by then: an owner that is slow to settle counts it among the rest.
        late = {
            outcome.request
            for outcome in world.results
            if isinstance(outcome, Result) and last[outcome.request] > outcome.input.last + horizon
        }
        kept = [[view for view in views(of) if view.request not in late] for of in (watching, anew)]
        assert kept[0] == kept[1]
        if watching.position == anew.position and not late:
            assert watching.watermark == anew.watermark
