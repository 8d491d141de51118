"""Taking a partition on a real broker: from nothing, again, by hand, and where the log does not
fit (DESIGN, "One crash")."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import NewTopic, RecordsToDelete
from aiokafka.protocol.admin import DeleteGroupsRequest
from aiokafka.structs import OffsetAndMetadata
from structlog.testing import capture_logs

from brokers import Topics, administrator
from checker import read_committed, read_outcomes, violations
from place import BOUND, Place
from splitferry_protocol.ids import RequestId
from splitferry_protocol.records import Result
from workload import cut, message

pytestmark = pytest.mark.timeout(180)

Log = list[Any]


@pytest.fixture
async def place(
    bootstrap_servers: str, topics: Callable[..., Awaitable[Topics]], tmp_path: Path
) -> Place:
    """With one partition."""
    root = tmp_path / "sandbox" / "root"
    root.mkdir(parents=True)
    return Place(bootstrap_servers, await topics(partitions=1), root, tmp_path)


async def send_items(place: Place, *numbers: int) -> None:
    """Two records each."""
    splits = [split for n in numbers for split in cut(RequestId(5, n), b"abcd", 2)]
    await place.send([message(split, 1) for split in splits])


async def told(log: Log, event: str, count: int = 1) -> list[Any]:
    """Wait until the consumer has logged `event`."""
    async with asyncio.timeout(BOUND):
        while len(found := [line for line in log if line["event"] == event]) < count:
            await asyncio.sleep(0.02)
    return found


async def results(place: Place, count: int = 0) -> list[tuple[int, bool]]:
    """Sequence and repeat of all results, when there are `count` of them."""
    async with asyncio.timeout(BOUND):
        while True:
            outcomes = await read_outcomes(place.servers, place.names.results)
            found = [o.told for o in outcomes if isinstance(o.told, Result)]
            if len(found) >= count:
                return sorted((result.request.sequence, result.repeat) for result in found)
            await asyncio.sleep(0.05)


async def committed(place: Place) -> tuple[int, str]:
    return (await read_committed(place.servers, place.group, place.names.splits))[0]


async def commit_by_hand(place: Place, offset: int) -> None:
    """As an operator resets a group: without metadata."""
    consumer = AIOKafkaConsumer(
        bootstrap_servers=place.servers, group_id=place.group, enable_auto_commit=False
    )
    await consumer.start()
    try:
        partition = TopicPartition(place.names.splits, 0)
        consumer.assign([partition])
        await consumer.commit({partition: OffsetAndMetadata(offset, "")})
    finally:
        await consumer.stop()


async def test_the_first_start_is_at_the_start_of_the_log(place: Place) -> None:
    await send_items(place, 1, 2, 3)
    with capture_logs() as log:
        async with place.serving():
            await place.settled()
    assert [line["watermark"] for line in await told(log, "partition taken")] == [0]
    assert await results(place) == [(1, False), (2, False), (3, False)]
    assert violations(await place.history()) == []


async def test_a_restart_goes_on_at_w_and_s(place: Place) -> None:
    held = cut(RequestId(5, 9), b"wxyz", 2)
    async with place.serving(horizon=4):
        await send_items(place, *range(1, 9))
        await place.settled()
        await place.send([message(held[0], 1)])
        await send_items(place, 10)
        await results(place, 9)
    # A transaction's results can be read before its offset: each has a marker of its own.
    watermark = bound = 0
    async with asyncio.timeout(BOUND):
        while watermark < 16 or bound == 0:  # old results are not read again
            watermark, metadata = await committed(place)
            bound = int(re.findall(r"S=(\d+)", metadata)[0])
    assert watermark == 16
    again = cut(RequestId(5, 10), b"abcd", 2)[0]._replace(reply=b"again")
    with capture_logs() as log:
        async with place.serving(horizon=4):
            await place.send([message(held[1], 1), message(again, 1)])
            await place.settled()
    assert [line["watermark"] for line in await told(log, "partition taken")] == [16]
    assert await results(place) == [
        *((n, False) for n in range(1, 11)), (10, True),
    ]  # fmt: skip
    assert violations(await place.history()) == []


@pytest.mark.parametrize("how", ["deleted", "set to the start", "set into the middle"])
async def test_offsets_deleted_or_reset_by_hand_change_nothing(place: Place, how: str) -> None:
    async with place.serving():
        await send_items(place, 1, 2, 3)
        await place.settled()
    before = await results(place)
    inode = (place.root / "items/5-1").stat().st_ino
    if how == "deleted":
        async with administrator(place.servers) as admin:
            coordinator = await admin.find_coordinator(place.group)
            answer: Any = None
            async with asyncio.timeout(BOUND):
                # Not before the group has heard that its member has left.
                while answer is None or answer.results != [(place.group, 0)]:
                    request = DeleteGroupsRequest([place.group])
                    answer = await admin._send_request(request, coordinator)
        assert await read_committed(place.servers, place.group, place.names.splits) == {}
    else:
        await commit_by_hand(place, 0 if how == "set to the start" else 3)
    async with place.serving():
        await send_items(place, 4)
        await place.settled()
    assert await results(place) == [*before, (4, False)]
    assert (place.root / "items/5-1").stat().st_ino == inode, "published once only"
    assert violations(await place.history()) == []


async def test_deleted_records_are_refused_until_the_loss_is_accepted(place: Place) -> None:
    held = cut(RequestId(5, 9), b"wxyz", 2)
    async with place.serving():
        await place.send([message(held[0], 1)])
        await send_items(place, 1, 2)
        await results(place, 2)
    async with administrator(place.servers) as admin:
        partition = TopicPartition(place.names.splits, 0)
        await admin.delete_records({partition: RecordsToDelete(before_offset=3)})
    with capture_logs() as log:
        async with place.serving():
            refused = await told(log, "partition refused", 2)
            await send_items(place, 3)
    assert refused[0]["log_level"] == "error"
    assert "--accept-loss" in refused[0]["reason"]
    assert "records 0 to 3 of the splits were deleted" in refused[0]["reason"]
    assert [line for line in log if line["event"] == "partition taken"] == []
    assert await results(place) == [(1, False), (2, False)]
    assert (await committed(place))[0] == 0
    with capture_logs() as log:
        async with place.serving(accept_loss=True):
            await place.settled()
    assert "were deleted" in (await told(log, "loss accepted"))[0]["lost"]
    # The results of before are still known: what is left of their splits changes nothing.
    assert await results(place) == [(1, False), (2, False), (3, False)]
    # And then it fits again, without the option.
    with capture_logs() as log:
        async with place.serving():
            await told(log, "partition taken")


async def test_a_recreated_topic_is_refused_until_the_loss_is_accepted(place: Place) -> None:
    async with place.serving():
        await send_items(place, 1, 2, 3)
        await place.settled()
    async with administrator(place.servers) as admin:
        await admin.delete_topics([place.names.splits])
        async with asyncio.timeout(BOUND):
            while True:
                new = NewTopic(place.names.splits, 1, 1)
                answer: Any = await admin.create_topics([new])
                if answer.topic_errors[0][1] == 0:
                    break
                await asyncio.sleep(0.1)
    await send_items(place, 4)
    with capture_logs() as log:
        async with place.serving():
            refused = await told(log, "partition refused")
    assert "the topic was truncated or made anew" in refused[0]["reason"]
    assert "--accept-loss" in refused[0]["reason"]
    assert [n for n, _ in await results(place)] == [1, 2, 3]
    async with place.serving(accept_loss=True):
        await place.settled()
    # Accepted once, it is over: the results of the old log are not read again.
    await send_items(place, 5)
    async with place.serving():
        await place.settled()
    assert [n for n, _ in await results(place)] == [1, 2, 3, 4, 5]
    assert (place.root / "items/5-4").read_bytes() == b"abcd"
