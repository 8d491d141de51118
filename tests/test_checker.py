"""The checker finds each thing that may never happen, and nothing in a sound run."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from checker import (
    LETTER_HEADERS,
    History,
    Kept,
    Opening,
    Outcome,
    Sighting,
    Tree,
    reference,
    violations,
)
from splitferry_protocol.errors import BatchTransferFailed, WsDataError
from splitferry_protocol.ids import RequestId
from splitferry_protocol.records import Abort, Accepted, Block, Input, Result, Status
from workload import cut, damaged, make_load, message

GROUP, TOPIC = "group", "splits"


def sound(splits: dict[int, list[Kept]]) -> History:
    """What a consumer without faults makes of a log."""
    expected = reference(splits)
    outcomes: list[Outcome] = []
    files = {}
    for opening in expected.openings.values():
        if opening.status is not None:
            outcomes.append(Outcome(opening.partition, len(outcomes), result_of(opening)))
        if opening.status is Status.COMPLETED and opening.split.block is Block.FILE:
            files[opening.split.unique_id] = opening.digest
    for request, index, reply in expected.accepted:
        told = Accepted(request, GROUP, index, reply)
        outcomes.append(Outcome(expected.openings[request].partition, len(outcomes), told))
    for request, reply in expected.repeats:
        again = result_of(expected.openings[request])._replace(repeat=True, reply=reply)
        outcomes.append(Outcome(expected.openings[request].partition, len(outcomes), again))
    held = {
        number: min(
            (
                opening.first
                for opening in expected.openings.values()
                if opening.status is None and opening.partition == number
            ),
            default=len(log),
        )
        for number, log in splits.items()
    }
    return History(
        group=GROUP,
        topic=TOPIC,
        splits=splits,
        ends={number: len(log) for number, log in splits.items()},
        outcomes=outcomes,
        dead_letters=[
            letter_of(splits[partition][offset], code)
            for partition, offset, code in expected.dead_letters
        ],
        committed={
            number: (watermark, "splitferry/1 S=0 P=0 H=1000") for number, watermark in held.items()
        },
        tree=Tree(files),
        sightings=[
            Sighting(outcome.told, files[outcome.told.unique_id])
            for outcome in outcomes
            if isinstance(outcome.told, Result) and outcome.told.unique_id in files
        ],
        trees=[Tree(files)],
    )


def result_of(opening: Opening) -> Result:
    assert opening.status is not None
    split = opening.split
    error: WsDataError | None = None
    if opening.code is not None:
        error = BatchTransferFailed(opening.request, "so it is")
        error.code = opening.code
    completed = opening.status is Status.COMPLETED
    return Result(
        opening.request, split.unique_id, split.version, split.block, opening.labels, GROUP,
        opening.status, error, len(opening.data) if completed else None,
        opening.digest if completed else None, {"path": split.unique_id} if completed else None,
        opening.splits, opening.duplicates,
        Input(TOPIC, opening.partition, opening.first, opening.last), opening.reply, False, 0,
    )  # fmt: skip


def letter_of(record: Kept, code: str) -> Kept:
    values = [TOPIC, record.partition, record.offset, code, "so it is", 0]
    added = [(n, str(v).encode()) for n, v in zip(LETTER_HEADERS, values, strict=True)]
    return Kept(0, 0, record.key, record.value, [*record.headers, *added])


def log_of(*messages: object) -> dict[int, list[Kept]]:
    """A log of one partition."""
    records = [
        m if isinstance(m, tuple) else (m.key, m.value, m.headers)  # type: ignore[attr-defined]
        for m in messages
    ]
    return {0: [Kept(0, offset, *record) for offset, record in enumerate(records)]}


ONE, TWO, OPEN, AGAIN = (RequestId(7, number) for number in (1, 2, 3, 4))


@pytest.fixture
def history() -> History:
    whole = cut(ONE, b"0123456789", 4)
    bad = cut(TWO, b"abcdef", 3)[1]._replace(version=9)
    items = [
        *(message(split, 1) for split in whole),
        message(whole[0]._replace(reply=b"late"), 1),
        message(cut(TWO, b"abcdef", 3)[0], 1),
        message(bad, 1),
        message(cut(AGAIN, b"xy", 1, reply=b"r1")[0], 1),
        message(cut(AGAIN, b"xy", 1)[1]._replace(reply=b"r2"), 1),
        message(cut(OPEN, b"wxyz", 2)[0], 1),
    ]
    return sound(log_of(*items, (None, b"poison", [])))


def test_a_sound_run_has_no_violations(history: History) -> None:
    assert violations(history) == []
    assert {ONE, TWO, AGAIN} <= {o.told.request for o in history.outcomes}


@pytest.mark.parametrize("seed", range(3))
def test_a_sound_run_of_every_kind_of_request(seed: int) -> None:
    load = make_load(random.Random(seed), 48, 1, [0, 1, 100, 5000])
    # What becomes of two versions of an item does not stand in the log alone.
    history = sound(log_of(*[m for m in load if b"versions/" not in (m.value or b"")]))
    assert violations(history) == []
    expected = reference(history.splits)
    assert {o.status for o in expected.openings.values()} >= {
        Status.COMPLETED, Status.FAILED, Status.ABORTED,
    }  # fmt: skip
    assert None not in {o.status for o in expected.openings.values()}
    codes = {o.code for o in expected.openings.values()}
    assert codes >= {"VersionMismatch", "BatchTransferError", "BatchTransferFailed"}
    assert expected.accepted
    assert expected.repeats


def test_the_reference_knows_how_requests_end() -> None:
    ended = reference(
        log_of(
            message(cut(ONE, b"0123", 4)[0], 1),
            message(cut(TWO, b"0123", 4)[0]._replace(sha256=bytes(32)), 1),
            message(cut(OPEN, b"0123", 2)[0], 1),
            message(Abort(OPEN, "x"), 1),
            message(cut(AGAIN, b"0123", 2)[0], 1),
            damaged(message(cut(AGAIN, b"0123", 2)[1], 1)),
        )
    )
    assert {r.sequence: (o.status, o.last, o.code) for r, o in ended.openings.items()} == {
        1: (Status.COMPLETED, 0, None),
        2: (Status.FAILED, 1, "BatchTransferFailed"),
        3: (Status.ABORTED, 3, "BatchTransferFailed"),
        4: (Status.FAILED, 5, "SplitTaskFailed"),
    }
    assert ended.dead_letters == [(0, 5, "SplitTaskFailed")]


# ---- each rule, broken


def of(history: History, request: RequestId, repeat: bool = False) -> tuple[int, Result]:
    """Index and value of a result."""
    for index, outcome in enumerate(history.outcomes):
        told = outcome.told
        if isinstance(told, Result) and (told.request, told.repeat) == (request, repeat):
            return index, told
    raise AssertionError(request)


def changed(history: History, index: int, *outcomes: Outcome) -> History:
    kept: Sequence[Outcome] = history.outcomes
    return replace(history, outcomes=[*kept[:index], *outcomes, *kept[index + 1 :]])


def with_result(history: History, **changes: object) -> History:
    index, result = of(history, ONE)
    before = history.outcomes[index]
    return changed(history, index, before._replace(told=result._replace(**changes)))  # type: ignore[arg-type]


def without(request: RequestId, repeat: bool = False) -> Callable[[History], History]:
    return lambda history: changed(history, of(history, request, repeat)[0])


def twice(request: RequestId, repeat: bool = False) -> Callable[[History], History]:
    def mutate(history: History) -> History:
        index, _ = of(history, request, repeat)
        return changed(history, index, *[history.outcomes[index]] * 2)

    return mutate


def at(
    watermark: int, metadata: str = "splitferry/1 S=0 P=0 H=1000"
) -> Callable[[History], History]:
    return lambda history: replace(history, committed={0: (watermark, metadata)})


def with_tree(**changes: object) -> Callable[[History], History]:
    return lambda history: replace(history, tree=replace(history.tree, **changes))  # type: ignore[arg-type]


def without_accepted(history: History) -> History:
    return replace(
        history, outcomes=[o for o in history.outcomes if not isinstance(o.told, Accepted)]
    )


def with_letters(change: Callable[[list[Kept]], list[Kept]]) -> Callable[[History], History]:
    return lambda history: replace(history, dead_letters=change(list(history.dead_letters)))


def stopped_at(offset: int) -> Callable[[History], History]:
    """Nothing is told from that record on."""

    def mutate(history: History) -> History:
        kept = [
            o
            for o in history.outcomes
            if not isinstance(o.told, Result) or o.told.input.last < offset
        ]
        return replace(history, outcomes=kept, dead_letters=[], committed={0: (offset, "")})

    return mutate


OTHER = hashlib.sha256(b"other").digest()
ITEM = f"items/{ONE}"
MUTATIONS: list[tuple[str, str, Callable[[History], History]]] = [
    ("1", "other bytes", with_tree(files={ITEM: OTHER})),
    ("1", "for a while", lambda h: replace(h, trees=[Tree({ITEM: OTHER})])),
    ("2", "no result", without(TWO)),
    ("2", "W too far", at(12)),
    ("2", "foreign metadata", at(8, "by hand")),
    ("3", "no result", without(ONE)),
    ("3", "two results", twice(ONE)),
    ("3", "never sent", lambda h: with_result(h, request=RequestId(9, 9))),
    ("3", "wrong status", lambda h: with_result(h, status=Status.EXPIRED)),
    ("3", "wrong end", lambda h: with_result(h, input=Input(TOPIC, 0, 0, 3))),
    ("3", "wrong start", lambda h: with_result(h, input=Input(TOPIC, 0, 1, 2))),
    ("3", "wrong digest", lambda h: with_result(h, sha256=OTHER)),
    ("3", "wrong size", lambda h: with_result(h, size=3)),
    ("3", "wrong count", lambda h: with_result(h, duplicates=1)),
    ("3", "wrong token", lambda h: with_result(h, reply=b"?")),
    ("3", "wrong place", lambda h: with_result(h, target={"path": "elsewhere"})),
    (
        "3",
        "unfounded mismatch",
        lambda h: with_result(
            h, status=Status.FAILED, error=WsDataError("x"), target=None, sha256=None
        ),
    ),
    ("3", "published though failed", without(ONE)),
    ("3", "accepted event lost", without_accepted),
    ("3", "dead letter lost", with_letters(lambda letters: letters[1:])),
    ("3", "dead letter twice", with_letters(lambda letters: [*letters, letters[0]])),
    ("3", "dead letter changed", with_letters(lambda ls: [ls[0]._replace(value=b""), *ls[1:]])),
    ("3", "dead letter bare", with_letters(lambda ls: [ls[0]._replace(headers=[]), *ls[1:]])),
    ("4", "too early", lambda h: replace(h, sightings=[Sighting(of(h, ONE)[1], None)])),
    ("4", "early, old bytes", lambda h: replace(h, sightings=[Sighting(of(h, ONE)[1], OTHER)])),
    ("5", "item lost", with_tree(files={})),
    ("5", "repeat lost", without(ONE, repeat=True)),
    ("5", "repeat twice", twice(ONE, repeat=True)),
    ("5", "S too far", at(8, "splitferry/1 S=2 P=0 H=1000")),
    ("6", "left behind", with_tree(temporary=[".splitferry/incoming/x/1"])),
    ("7", "a bad record stops", stopped_at(5)),
    ("8", "W behind", at(3)),
    ("8", "nothing committed", lambda h: replace(h, committed={})),
    ("9", "outside", with_tree(outside=["/elsewhere"])),
    ("9", "outside for a while", lambda h: replace(h, trees=[Tree({}, outside=["/elsewhere"])])),
]


@pytest.mark.parametrize(
    ("rule", "mutate"), [m[::2] for m in MUTATIONS], ids=[f"{m[0]} {m[1]}" for m in MUTATIONS]
)
def test_a_broken_rule_is_found(
    history: History, rule: str, mutate: Callable[[History], History]
) -> None:
    found = violations(mutate(history))
    assert [problem for problem in found if problem.startswith(f"{rule}: ")], found


def test_a_mismatch_needs_another_request_with_that_version() -> None:
    newer = cut(TWO, b"new", 3, unique_id=f"items/{ONE}", version=2)
    history = sound(log_of(message(newer[0], 1), message(cut(ONE, b"old", 3)[0], 1)))
    assert violations(history) != [], "the older one must not replace the newer one"
    index, result = of(history, ONE)
    error = WsDataError("too old")
    error.code = "VersionMismatch"
    refused = result._replace(status=Status.FAILED, error=error, target=None)
    digest = hashlib.sha256(b"new").digest()
    history = changed(history, index, history.outcomes[index]._replace(told=refused))
    history = replace(history, tree=Tree({f"items/{ONE}": digest}), sightings=[])
    assert violations(history) == []


def test_two_versions_of_an_item_may_have_the_same_bytes() -> None:
    newer = cut(ONE, b"same", 4, unique_id="item", version=2)
    older = cut(TWO, b"same", 4, unique_id="item", version=1)
    history = sound(
        {
            0: log_of(message(newer[0], 1))[0],
            1: [record._replace(partition=1) for record in log_of(message(older[0], 1))[0]],
        }
    )
    assert violations(history) == []
