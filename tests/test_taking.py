"""Taking a partition: the order of the steps, what is loaded, and what is refused."""

from __future__ import annotations

import asyncio

import msgpack
import pytest

from memory_transport import RESULTS, SPLITS, TOPIC_IDS, Kafka, MemoryTransport, broken
from owners import rules
from splitferry_consumer.bookmark import Bookmark
from splitferry_consumer.ledger import Ledger
from splitferry_consumer.taking import LogBounds, Misfit, accepting_loss, misfit, take
from splitferry_consumer.transport import HangingTransaction, Outgoing, Record, TransportError
from splitferry_protocol.codec import encode_accepted, encode_result
from splitferry_protocol.ids import RequestId
from splitferry_protocol.records import Accepted, Block, Input, Result, Status
from world import split

HORIZON = 100


def result(request: int, first: int = 0, last: int = 0, group: str = "group") -> Result:
    return Result(
        RequestId(1, request), f"item-{request}", 1, Block.MEM, None, group, Status.COMPLETED,
        None, 0, b"\1" * 32, {"shm": "name", "host": "here"}, 1, 0,
        Input(SPLITS, 0, first, last), None, False, 0,
    )  # fmt: skip


def tell(kafka: Kafka, outcome: Result | Accepted | bytes) -> None:
    value = outcome
    if isinstance(outcome, Result):
        value = encode_result(outcome)
    elif isinstance(outcome, Accepted):
        value = encode_accepted(outcome)
    key = b"1-1" if isinstance(outcome, bytes) else outcome.request.key
    assert isinstance(value, bytes)
    kafka.logs[RESULTS, 0].append(Outgoing(RESULTS, 0, key, value))


def with_splits(count: int) -> Kafka:
    kafka = Kafka()
    for request in range(count):
        kafka.send(split(request, total=0))
    return kafka


async def taken(kafka: Kafka, accept_loss: bool = False, horizon: int = HORIZON) -> Ledger:
    transport = MemoryTransport(kafka)
    _, ledger = await take(transport, rules(horizon, accept_loss=accept_loss), 0, TOPIC_IDS)
    return ledger


def knows(ledger: Ledger, request: int, offset: int) -> bool:
    """Whether a split of the request, read at `offset`, is dropped as one of the ended set."""
    record = Record(offset, b"key", b"value")
    return ledger.read(record, split(request, total=0), 0.0) == []


# ---- the order


async def test_the_owner_before_is_fenced_before_anything_is_read() -> None:
    # Else it could still commit an offset, or a result, after we have looked.
    kafka = with_splits(1)
    tell(kafka, result(0))
    await taken(kafka)
    steps = ["writer", "settle", "committed", "splits_bounds", "results_bounds", "results"]
    assert kafka.calls == steps


async def test_what_the_owner_before_left_is_settled_and_seen() -> None:
    kafka = with_splits(2)
    transport = MemoryTransport(kafka)
    old = await transport.writer(0)
    kafka.gates["commit"].clear()
    outgoing = Outgoing(RESULTS, 0, b"1-0", encode_result(result(0)))
    metadata = Bookmark(1, 0, 1, HORIZON).metadata
    publishing = asyncio.create_task(old.publish([outgoing], lambda _: (1, metadata)))
    while "commit" not in kafka.calls:
        await asyncio.sleep(0)
    ledger = await taken(kafka)
    kafka.gates["commit"].set()
    with pytest.raises(TransportError):
        await publishing
    assert ledger.position == 0, "its transaction was aborted, so nothing of it holds"
    assert not knows(ledger, 0, 0)


# ---- where it starts


async def test_without_a_commit_it_starts_at_the_start_of_the_log() -> None:
    kafka = with_splits(5)
    kafka.logs[SPLITS, 0].start = 2
    ledger = await taken(kafka)
    assert (ledger.position, ledger.committed) == (2, (2, 2))


async def test_it_starts_at_what_was_committed() -> None:
    kafka = with_splits(5)
    kafka.offsets[0] = (2, Bookmark(2, 0, 4, HORIZON).metadata)
    ledger = await taken(kafka)
    assert (ledger.position, ledger.committed) == (2, (2, 4))


async def test_an_offset_that_was_set_by_hand_reads_all_results() -> None:
    kafka = with_splits(5)
    tell(kafka, result(3, 3, 3))
    kafka.offsets[0] = (2, "set by an operator")
    ledger = await taken(kafka)
    assert ledger.committed == (2, 2)
    assert knows(ledger, 3, 3)


# ---- what is loaded


async def test_results_before_s_are_left_out_unless_the_horizon_grew() -> None:
    kafka = with_splits(5)
    for request in range(3):
        tell(kafka, result(request, request, request))
    kafka.offsets[0] = (3, Bookmark(3, 1, 3, HORIZON).metadata)
    ledger = await taken(kafka)
    assert [knows(ledger, request, 3 + request) for request in range(3)] == [False, True, True]
    ledger = await taken(kafka, horizon=HORIZON + 1)
    assert [knows(ledger, request, 3 + request) for request in range(3)] == [True, True, True]


async def test_only_results_of_this_group_and_partition_are_obeyed() -> None:
    kafka = with_splits(5)
    tell(kafka, b"not msgpack")
    tell(kafka, Accepted(RequestId(1, 0), "group", 0, b"token"))
    tell(kafka, result(0, group="another"))
    tell(kafka, result(1)._replace(input=Input(SPLITS, 1, 1, 1)))
    tell(kafka, result(2)._replace(input=Input("other-splits", 0, 2, 2)))
    tell(kafka, result(3, 3, 3))
    ledger = await taken(kafka)
    assert [knows(ledger, request, request) for request in range(4)] == [False, False, False, True]


# ---- what is refused


@pytest.mark.parametrize(
    ("bookmark", "splits", "results", "remedy"),
    [
        (Bookmark(4, 5, 4, 1), (0, 4), (0, 5), None),
        (Bookmark(4, 5, 4, 1), (4, 4), (5, 5), None),
        (Bookmark(4, None, 4, None), (0, 4), (9, 9), None),
        (Bookmark(4, 5, 4, 1), (5, 9), (0, 9), "retention of the splits topic"),
        (Bookmark(4, 5, 4, 1), (0, 3), (0, 9), "truncated or made anew"),
        (Bookmark(4, 5, 6, 1), (0, 5), (0, 9), "truncated or made anew"),
        (Bookmark(4, 5, 4, 1), (0, 9), (6, 9), "retention of the results topic"),
        (Bookmark(4, 5, 4, 1), (0, 9), (0, 4), "truncated or made anew"),
    ],
)
def test_a_commit_that_does_not_fit_the_logs_is_told_with_the_remedy(
    bookmark: Bookmark, splits: LogBounds, results: LogBounds, remedy: str | None
) -> None:
    problem = misfit(bookmark, splits, results)
    if remedy is None:
        assert problem is None
    else:
        assert problem is not None
        assert remedy in problem
    accepted = accepting_loss(bookmark, splits, results, 1, TOPIC_IDS)
    assert misfit(accepted, splits, results) is None
    if remedy is None:
        assert accepted == bookmark, "what fits stays"


@pytest.mark.parametrize(
    ("bookmark", "splits", "accepted"),
    [
        (Bookmark(4, 5, 4, 1), (6, 9), Bookmark(6, 5, 6, 1)),
        (Bookmark(4, 5, 8, 1), (6, 9), Bookmark(6, 5, 8, 1)),
        (Bookmark(4, 5, 8, 1), (1, 3), Bookmark(1, 9, 1, 1)),
        (Bookmark(4, 5, 8, 1), (1, 6), Bookmark(1, 9, 1, 1)),
    ],
)
def test_accepting_loss_goes_on_from_the_start_of_the_log(
    bookmark: Bookmark, splits: LogBounds, accepted: Bookmark
) -> None:
    assert accepting_loss(bookmark, splits, (0, 9), 1, TOPIC_IDS) == accepted


async def test_a_misfit_is_refused_and_the_right_to_publish_given_back() -> None:
    kafka = with_splits(2)
    kafka.offsets[0] = (9, Bookmark(9, 0, 9, HORIZON).metadata)
    with pytest.raises(Misfit, match="--accept-loss"):
        await taken(kafka)
    assert kafka.calls[-1] == "close"
    assert (await taken(kafka, accept_loss=True)).position == 0


@pytest.mark.parametrize(
    ("committed", "loss"),
    [(Bookmark(9, 0, 9, HORIZON), True), (Bookmark(0, 0, 2, HORIZON), True), (None, False)],
)
async def test_an_accepted_loss_is_committed_although_nothing_was_read(
    committed: Bookmark | None, loss: bool
) -> None:
    """Else the log grows past the old W, and the owner after a crash begins there, in silence."""
    kafka = Kafka()
    tell(kafka, result(0, 0, 1))
    if committed is not None:
        kafka.offsets[0] = (committed.watermark, committed.metadata)
    else:
        kafka = with_splits(2)
    batch = (await taken(kafka, accept_loss=True)).gather()
    if loss:
        assert batch is not None
        assert (batch.watermark, batch.told) == (0, 0)
    else:
        assert batch is None


async def test_a_result_beyond_the_end_of_the_splits_is_a_misfit() -> None:
    kafka = with_splits(2)
    tell(kafka, result(0, 0, 1))
    tell(kafka, result(1, 1, 2))
    with pytest.raises(Misfit, match=r"request 1-1 ended at 2, but the splits end at 2.*anew"):
        await taken(kafka)
    ledger = await taken(kafka, accept_loss=True)
    # It is another log: no result speaks of it, and so the next start is not refused again.
    assert not knows(ledger, 0, 0)
    assert not knows(ledger, 1, 1)


async def test_a_commit_of_a_later_version_is_a_misfit() -> None:
    kafka = with_splits(2)
    kafka.offsets[0] = (1, "splitferry/2 S=0 P=2 H=1000 X=1")
    with pytest.raises(Misfit, match=r"newer splitferry \(splitferry/2 .*: upgrade.*--accept-loss"):
        await taken(kafka)
    ledger = await taken(kafka, accept_loss=True)
    assert ledger.position == 1
    batch = ledger.gather()
    assert batch is not None, "else the next start would be refused again"
    assert batch.watermark == 1


async def test_a_result_of_a_later_version_is_a_misfit() -> None:
    # Passed over it could be told again: it may be of this group.
    kafka = with_splits(2)
    tell(kafka, b"no outcome at all")
    tell(kafka, msgpack.packb({"v": 2, "kind": "result", "request": {"node": 1}}))
    tell(kafka, result(0))
    with pytest.raises(Misfit, match="offset 1 of the results was written by a newer splitferry"):
        await taken(kafka)
    ledger = await taken(kafka, accept_loss=True)
    batch = ledger.gather()
    assert batch is not None
    bookmark = ledger.bookmark(batch, [])
    kafka.offsets[0] = (bookmark.watermark, bookmark.metadata)
    assert knows(await taken(kafka), 0, 0), "the loss is over when S has passed it"


async def test_results_that_an_open_transaction_hides_are_waited_for() -> None:
    kafka = with_splits(2)
    tell(kafka, result(0))
    # Another producer, which our fencing does not touch.
    kafka.begin(5, kafka.fence(5))
    kafka.logs[RESULTS, 0].append(Outgoing(RESULTS, 0, b"1-1", b""), kafka._ongoing[5])
    with pytest.raises(HangingTransaction):
        await taken(kafka)
    kafka.fence(5)
    assert knows(await taken(kafka), 0, 0)


@pytest.mark.parametrize("step", ["writer", "committed", "splits_bounds", "results_bounds"])
async def test_an_error_at_any_step_leaves_no_writer_open(step: str) -> None:
    kafka = with_splits(1)
    kafka.faults[step].append(broken())
    with pytest.raises(TransportError):
        await taken(kafka)
    assert kafka.calls.count("close") == (0 if step == "writer" else 1)
