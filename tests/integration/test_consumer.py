"""The consumer and the feed of results as a program uses them, on a real broker."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from brokers import Topics
from place import BOUND, Place
from splitferry_producer import MemorySource, ResultFeed, UnknownTopic
from splitferry_protocol.ids import RequestId
from splitferry_protocol.records import Block, Result, Status
from workload import cut, message


@pytest.fixture
async def place(
    bootstrap_servers: str, topics: Callable[..., Awaitable[Topics]], tmp_path: Path
) -> Place:
    return Place(bootstrap_servers, await topics(partitions=2), tmp_path / "root", tmp_path)


def feed_of(place: Place, *, group: str | None = None, from_start: bool = False) -> ResultFeed:
    return ResultFeed(
        place.connection,
        results_topic=place.names.results,
        group=group,
        from_start=from_start,
    )


async def next_of(feed: ResultFeed, count: int) -> list[Result]:
    async with asyncio.timeout(BOUND):
        return [await anext(feed) for _ in range(count)]


async def test_a_transfer_within_one_program(place: Place) -> None:
    async with feed_of(place) as feed, place.serving() as consumer, place.producer() as producer:
        for number in range(4):
            source = MemorySource(b"x" * number, block=Block.FILE)
            await producer.send(source, unique_id=f"item-{number}")
        consumer.stop()
        own = [result async for result in consumer.results()]
        seen = await next_of(feed, 4)
    assert {r.request: r for r in own} == {r.request: r for r in seen}, (
        "the same, to the consumer itself and to others"
    )
    assert {result.status for result in own} == {Status.COMPLETED}
    assert sorted(path.name for path in place.root.glob("item-*")) == [
        f"item-{number}" for number in range(4)
    ]


async def test_the_feed_begins_where_it_is_told_to(place: Place) -> None:
    items = [cut(RequestId(5, n), bytes([n]), 1) for n in (1, 2)]
    async with place.serving():
        await place.send([message(split, 2) for split in items[0]])
        await place.settled()
        async with feed_of(place) as late, feed_of(place, from_start=True) as early:
            # Told once more to another token: it is the same result.
            await place.send([message(items[0][0]._replace(reply=b"again"), 2)])
            await place.settled()
            await place.send([message(split, 2) for split in items[1]])
            assert [result.request.sequence for result in await next_of(late, 1)] == [2]
            both = await next_of(early, 2)
            assert sorted(result.request.sequence for result in both) == [1, 2]


async def test_the_feed_of_one_group(place: Place) -> None:
    async with (
        feed_of(place, group=f"{place.group}-second") as feed,
        place.serving(),
        place.serving(group=f"{place.group}-second", root=place.root.with_name("second")),
    ):
        await place.send([message(split, 2) for split in cut(RequestId(5, 1), b"abcd", 2)])
        assert [result.group for result in await next_of(feed, 1)] == [f"{place.group}-second"]
        await place.settled()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await anext(feed)
        # Nothing is lost with a reader that gave up.
        await place.send([message(split, 2) for split in cut(RequestId(5, 2), b"abcd", 2)])
        assert [result.request.sequence for result in await next_of(feed, 1)] == [2]


async def test_a_feed_of_a_topic_that_is_not_there(place: Place) -> None:
    with pytest.raises(UnknownTopic, match="no-such-topic"):
        async with ResultFeed(place.connection, results_topic="no-such-topic"):
            pass
