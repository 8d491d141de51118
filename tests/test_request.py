from __future__ import annotations

from typing import Any

import pytest

from splitferry_consumer.pace import Pace
from splitferry_consumer.request import ReceiveState, RequestPhase, reuses
from splitferry_protocol.errors import (
    BatchTransferFailed,
    SplitTaskFailed,
    VersionMismatch,
    WsDataError,
)
from splitferry_protocol.ids import RequestId
from splitferry_protocol.records import Block, Input, Result, Split, Status
from world import split

ONE = RequestId(1, 1)


def received(*splits: Split) -> ReceiveState:
    """The state after `splits`, each of which fits, read a second apart from second 10 on."""
    state = ReceiveState.opened_by(splits[0], 7, 10.0, 1000)
    for second, content in enumerate(splits):
        assert state.contradiction(content) is None
        state.take_in(content, 10.0 + second, 1000 + second)
    return state


def result(**changes: Any) -> Result:
    facts: dict[str, Any] = {
        "request": ONE, "unique_id": "item-1", "version": 1, "block": Block.MEM, "labels": None,
        "group": "group", "status": Status.COMPLETED, "error": None, "size": 4,
        "sha256": b"a" * 32, "target": None, "splits": 2, "duplicates": 0,
        "input": Input("splits", 0, 7, 8), "reply": None, "repeat": False, "finished_at": 0,
    }  # fmt: skip
    return Result(**(facts | changes))


def test_the_first_split_opens_a_request_without_being_counted() -> None:
    facts: dict[str, Any] = {"total": 4, "sha256": b"a" * 32, "labels": {"a": "1"}}
    state = ReceiveState.opened_by(split(1, 0, b"ab", version=3, **facts), 7, 10.0, 1000)
    assert (state.request, state.first, state.unique_id, state.version, state.block) == (
        ONE, 7, "item-1", 3, Block.MEM,
    )  # fmt: skip
    assert (state.phase, state.splits, state.coverage.size, state.active_at) == (
        RequestPhase.OPEN, 0, 0, 10.0,
    )  # fmt: skip
    assert (state.opened_at, state.grown_at) == (1000, 1000)
    told = {name: getattr(state, name) for name in facts}
    assert told == facts, "a result that fails at once tells them too"
    assert not state.complete


# ---- contradictions


@pytest.mark.parametrize(
    ("later", "error"),
    [
        (split(1, 2, b"cd", version=2), VersionMismatch(1, 2)),
        (split(1, 2, b"cd", unique_id="other"), "unique_id"),
        (split(1, 2, b"cd", block=Block.FILE), "block"),
        (split(1, 2, b"cd", total=5), "total"),
        (split(1, 2, b"cd", sha256=b"b" * 32), "sha256"),
        (split(1, 2, b"cd", labels={"a": "2"}), "labels"),
        (split(1, 2, b"cd", labels={}), "labels"),
        (split(1, 2, b"cde", index=3), SplitTaskFailed(ONE, 3)),
    ],
)
def test_a_split_that_disagrees_is_told_by_its_kind_and_field(
    later: Split, error: WsDataError | str
) -> None:
    state = received(split(1, 0, b"ab", total=4, sha256=b"a" * 32, labels={"a": "1"}))
    found = state.contradiction(later)
    if isinstance(error, str):
        assert isinstance(found, BatchTransferFailed)
        assert found.request_id == ONE
        assert found.reason.endswith(f"differs in {error}")
    else:
        assert type(found) is type(error)
        names = {name for name in error.fields() if name != "message"}
        assert found is not None
        assert {n: found.fields()[n] for n in names} == {n: error.fields()[n] for n in names}


def test_the_first_split_can_contradict_itself() -> None:
    alone = split(1, 3, b"abc", total=5)
    found = ReceiveState.opened_by(alone, 7, 0, 0).contradiction(alone)
    assert isinstance(found, SplitTaskFailed)
    assert found.message.endswith("bytes 3 to 6 lie outside the item of 5 bytes")


def test_a_late_total_below_what_is_there_is_a_contradiction() -> None:
    state = received(split(1, 0, b"abcd"))
    found = state.contradiction(split(1, 0, b"a", total=3, index=2))
    assert isinstance(found, BatchTransferFailed)
    assert found.request_id == ONE
    assert "split 2 says 3 bytes in all" in found.reason
    assert "bytes up to 4" in found.reason


def test_what_is_given_once_need_not_be_given_again() -> None:
    state = received(split(1, 0, b"ab", total=4, sha256=b"a" * 32, labels={"a": "1"}))
    assert state.contradiction(split(1, 2, b"cd")) is None


# ---- taking in


def test_facts_are_kept_from_whichever_split_gives_them() -> None:
    state = received(
        split(1, 0, b"ab"),
        split(1, 2, b"cd", sha256=b"a" * 32),
        split(1, 4, b"", total=4, labels={"a": "1"}),
        split(1, 0, b"ab"),
    )
    assert (state.total, state.sha256, state.labels) == (4, b"a" * 32, {"a": "1"})


def test_only_a_split_that_adds_bytes_counts_as_activity() -> None:
    state = received(
        split(1, 0, b"abc"),  # 10.0
        split(1, 0, b"ab"),  # all there
        split(1, 2, b"cd"),  # 12.0: one new byte
        split(1, 9, b""),  # no byte at all
        split(1, 1, b"bcd"),  # all there
    )
    assert (state.splits, state.duplicates, state.active_at) == (2, 3, 12.0)
    assert state.grown_at == 1002
    pace = Pace()
    for size, moment in ((3, 10.0), (1, 12.0)):
        pace.add(size, moment)
    assert state.pace.rate(14.0) == pace.rate(14.0), "its rate is that of new bytes"


def test_an_empty_item_has_one_split_and_then_duplicates() -> None:
    state = received(split(1, total=0))
    assert (state.splits, state.duplicates) == (1, 0)
    assert state.complete
    state.take_in(split(1, total=0), 11.0, 1001)
    assert (state.splits, state.duplicates, state.active_at) == (1, 1, 10.0)


def test_a_request_is_complete_when_the_last_gap_is_closed_and_the_total_known() -> None:
    state = received(split(1, 0, b"ab"), split(1, 3, b"d"))
    seen = [state.complete]
    for later in (split(1, 2, b"c"), split(1, 4, total=4)):
        state.take_in(later, 12.0, 1002)
        seen.append(state.complete)
    assert seen == [False, False, True], "at first nobody has said how long it is"


# ---- a reused id


REUSES = [
    (split(1, 0, b"ab"), False),
    (split(1, 0, b"ab", total=4, sha256=b"a" * 32), False),
    (split(1, 0, b"ab", unique_id="other"), True),
    (split(1, 0, b"ab", version=2), True),
    (split(1, 0, b"ab", total=5), True),
    (split(1, 0, b"ab", sha256=b"b" * 32), True),
]


@pytest.mark.parametrize(("late", "reused"), REUSES)
def test_a_late_split_of_another_item_is_a_reused_id(late: Split, reused: bool) -> None:
    state = received(split(1, 0, b"abcd", total=4, sha256=b"a" * 32))
    if state.needs_verdict(late):
        state.result = result()
    assert state.is_reused_by(late) is reused
    assert reuses(late, result()) is reused


def test_the_digest_of_a_failed_request_proves_nothing() -> None:
    # What was written need not be what was meant: that may be why it failed.
    late = split(1, 0, b"ab", sha256=b"b" * 32)
    state = received(split(1, 0, b"abcd", total=4, sha256=b"a" * 32))
    assert state.needs_verdict(late)
    error = BatchTransferFailed(ONE, "the digest differs")
    state.result = result(status=Status.FAILED, error=error)
    assert not state.is_reused_by(late)
    assert not reuses(late, state.result)


def test_what_was_never_known_cannot_differ() -> None:
    late = split(1, 0, b"ab", total=5, sha256=b"b" * 32)
    assert not received(split(1, 0, b"ab")).is_reused_by(late)
    assert not reuses(late, result(size=None, sha256=None))


@pytest.mark.parametrize(
    ("late", "needs"),
    [
        (split(1, 0, b"ab"), False),
        (split(1, 0, b"ab", sha256=b"a" * 32), True),
        (split(1, 0, b"ab", total=4), True),
    ],
)
def test_what_the_splits_did_not_say_only_the_verdict_tells(late: Split, needs: bool) -> None:
    assert received(split(1, 0, b"ab")).needs_verdict(late) is needs
    whole = received(split(1, 0, b"abcd", total=4, sha256=b"a" * 32))
    assert not whole.needs_verdict(late)


# ---- who waits


def test_the_newest_token_is_the_last_that_is_owed_the_result() -> None:
    state = received(split(1, 0, b"ab"))
    newest = [state.newest_reply]
    state.responder.update(b"first")
    newest.append(state.newest_reply)
    state.repeats += [(9, b"second"), (11, b"third")]
    assert [*newest, state.newest_reply] == [None, b"first", b"third"]
