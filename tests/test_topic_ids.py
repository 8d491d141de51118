"""Topics that were deleted and made anew, whose offsets fit all the same."""

from __future__ import annotations

from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from memory_transport import Kafka, MemoryTransport
from owners import Owner, results, rules, until
from splitferry_consumer.bookmark import Bookmark
from splitferry_consumer.ledger import Ledger
from splitferry_consumer.taking import Misfit, take
from splitferry_consumer.targets.handler import HandlerTarget
from splitferry_consumer.targets.limit import MemoryLimit
from splitferry_protocol.records import Block
from world import split

HORIZON = 100
OLD = ("a" * 22, "b" * 22)
SPLITS_ANEW = ("c" * 22, "b" * 22)
RESULTS_ANEW = ("a" * 22, "c" * 22)


async def ignore(_: object) -> None:
    pass


@pytest.fixture
async def kafka() -> Kafka:
    made = Kafka()
    made.topics = OLD
    return made


@pytest.fixture
async def owner(kafka: Kafka) -> AsyncIterator[Owner]:
    threads = ThreadPoolExecutor(1)
    made = Owner(kafka, {Block.MEM: HandlerTarget(ignore, MemoryLimit(2**20))}, threads)
    yield made
    await made.lose()
    threads.shutdown()


async def taken(kafka: Kafka, accept_loss: bool = False) -> Ledger:
    transport = MemoryTransport(kafka)
    return (await take(transport, rules(HORIZON, accept_loss=accept_loss), 0, kafka.topics))[1]


def test_the_commit_carries_the_ids() -> None:
    bookmark = Bookmark(7, 3, 8, HORIZON, OLD)
    assert Bookmark.parse(7, bookmark.metadata) == bookmark
    assert Bookmark.parse(7, Bookmark(7, 3, 8, HORIZON).metadata).topics is None


@pytest.mark.parametrize(
    ("now", "named", "position"), [(SPLITS_ANEW, "splits", 0), (RESULTS_ANEW, "results", 2)]
)
async def test_a_commit_for_another_topic_is_refused(
    kafka: Kafka, now: tuple[str, str], named: str, position: int
) -> None:
    for number in range(5):
        kafka.send(split(number, total=0))
    kafka.offsets[0] = (2, Bookmark(2, 0, 2, HORIZON, OLD).metadata)
    assert (await taken(kafka)).position == 2
    kafka.topics = now
    with pytest.raises(Misfit, match=f"the {named} topic was deleted and made anew"):
        await taken(kafka)
    assert (await taken(kafka, accept_loss=True)).position == position


async def test_what_was_read_in_the_middle_of_a_new_log_is_not_published(
    kafka: Kafka, owner: Owner
) -> None:
    """The topic is made anew under a running owner, and the client reads on at its position."""
    kafka.send(split(1, total=0, block=Block.MEM))
    await until(lambda: owner.finished)
    kafka.topics = SPLITS_ANEW
    kafka.send(split(2, total=0, block=Block.MEM))
    await until(lambda: owner.partition._ledger is None)
    assert [result.request.sequence for result in results(kafka)] == [1]
    assert kafka.offsets[0] == (1, Bookmark(1, 0, 1, 1000, OLD).metadata)
