"""Reading a log from outside any group, on a real broker."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, RecordsToDelete

from bombs import ZSTD, batch, bomb, record, send_batch
from brokers import Topics, administrator
from splitferry_consumer.batches import UNPACKED_MAX
from splitferry_consumer.log_reader import LogReader
from splitferry_consumer.transport import (
    HangingTransaction,
    OutOfRange,
    Record,
    TopicUnusable,
    TransportError,
)
from stage import until
from workload import sending

MakeTopics = Callable[..., Awaitable[Topics]]


@pytest.fixture
async def partition(topics: MakeTopics) -> TopicPartition:
    return TopicPartition((await topics(partitions=2)).splits, 1)


@pytest.fixture
async def reader(bootstrap_servers: str) -> AsyncIterator[LogReader]:
    async with LogReader({"bootstrap_servers": bootstrap_servers}) as made:
        yield made


async def fill(servers: str, partition: TopicPartition, count: int) -> list[int]:
    """Send `count` records; returns their times, all different."""
    times = [1_700_000_000_000 + 1000 * number for number in range(count)]
    async with sending(servers) as producer:
        for time in times:
            await producer.send_and_wait(
                partition.topic, b"%d" % time, partition=partition.partition, timestamp_ms=time
            )
    return times


async def read(reader: LogReader, partition: TopicPartition, start: int, end: int) -> list[Record]:
    return [record async for record in reader.records(partition, start, end)]


async def read_into(
    found: list[int], reader: LogReader, partition: TopicPartition, start: int, end: int
) -> None:
    async for one in reader.records(partition, start, end):
        found += [one.offset]


async def delete_before(servers: str, partition: TopicPartition, offset: int) -> None:
    async with administrator(servers) as admin:
        await admin.delete_records({partition: RecordsToDelete(offset)})


async def groups(admin: AIOKafkaAdminClient) -> list[str]:
    return [group[0] for group in await admin.list_consumer_groups()]


async def test_a_part_of_a_log_is_read_and_nobody_is_told(
    bootstrap_servers: str, reader: LogReader, partition: TopicPartition
) -> None:
    async with administrator(bootstrap_servers) as admin:
        before = await groups(admin)
        await fill(bootstrap_servers, partition, 10)
        assert await reader.partitions(partition.topic) == [0, 1]
        assert await reader.bounds(partition) == (0, 10)
        assert await reader.bounds(TopicPartition(partition.topic, 0)) == (0, 0)
        assert [r.offset for r in await read(reader, partition, 3, 7)] == [3, 4, 5, 6]
        assert await read(reader, partition, 7, 7) == []
        assert await reader.committed("nobody", partition) is None
        # Kafka may take away groups of others meanwhile.
        assert {*await groups(admin)} <= {*before}


async def test_a_moment_leads_to_the_first_record_that_is_not_older(
    bootstrap_servers: str, reader: LogReader, topics: MakeTopics
) -> None:
    names = await topics(partitions=1)
    partition = TopicPartition(names.results, 0)
    times = [r.timestamp for r in await _filled(bootstrap_servers, reader, partition)]
    assert await reader.offset_at(partition, 0) == 0
    assert await reader.offset_at(partition, times[-1] + 1) is None
    for time in times:
        assert await reader.offset_at(partition, time) == times.index(time)


async def _filled(servers: str, reader: LogReader, partition: TopicPartition) -> list[Record]:
    await fill(servers, partition, 5)
    return await read(reader, partition, 0, 5)


async def test_what_retention_has_deleted_is_told(
    bootstrap_servers: str, reader: LogReader, partition: TopicPartition
) -> None:
    await fill(bootstrap_servers, partition, 6)
    await delete_before(bootstrap_servers, partition, 4)
    assert await reader.bounds(partition) == (4, 6)
    with pytest.raises(OutOfRange) as caught:
        await read(reader, partition, 0, 6)
    assert caught.value.partitions == [1]
    assert [r.offset for r in await read(reader, partition, 4, 6)] == [4, 5]


async def test_an_open_transaction_hides_what_lies_behind_it(
    bootstrap_servers: str,
    reader: LogReader,
    partition: TopicPartition,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("splitferry_consumer.log_reader.STALL_BOUND", 1.0)
    await fill(bootstrap_servers, partition, 2)
    producer = AIOKafkaProducer(
        bootstrap_servers=bootstrap_servers, transactional_id=f"hanging in {partition.topic}"
    )
    await producer.start()
    try:
        await producer.begin_transaction()
        await producer.send_and_wait(partition.topic, b"?", partition=partition.partition)
        await fill(bootstrap_servers, partition, 1)
        assert await reader.bounds(partition) == (0, 4)
        assert await reader.stable_end(partition) == 2
        found: list[int] = []
        with pytest.raises(HangingTransaction, match=r"from offset 2 to 4 .*open there; end it"):
            await read_into(found, reader, partition, 0, 4)
        assert found == [0, 1]
        await producer.abort_transaction()
        # An aborted record and its marker are passed over.

        async def ended() -> bool:
            return await reader.stable_end(partition) == 5

        await until(ended, "the marker")
        assert [r.offset for r in await read(reader, partition, 0, 5)] == [0, 1, 3]
    finally:
        await producer.stop()


async def test_bombs_and_names_that_are_not_utf8_cost_no_other_record(
    bootstrap_servers: str, reader: LogReader, partition: TopicPartition
) -> None:
    where = partition.topic, partition.partition
    await fill(bootstrap_servers, partition, 1)
    await send_batch(bootstrap_servers, where[0], bomb(ZSTD, 4 * UNPACKED_MAX), where[1])
    hostile = record(0, b"k", b"v", [(b"\xff", b"")])
    await send_batch(bootstrap_servers, where[0], batch(hostile, 1), where[1])
    await fill(bootstrap_servers, partition, 1)
    _, end = await reader.bounds(partition)
    first, stub, mended, last = await read(reader, partition, 0, end)
    assert first.value == last.value
    assert "does not unpack within" in (stub.unreadable or "")
    assert (mended.key, mended.value, mended.headers) == (b"k", b"v", (("?", b""),))


async def test_what_cannot_be_asked_names_the_remedy(
    bootstrap_servers: str, reader: LogReader
) -> None:
    with pytest.raises(TopicUnusable, match="create it with `splitferry topics create`"):
        await reader.partitions("nothing-of-this-name")
    nowhere = {"bootstrap_servers": "127.0.0.1:1", "security_protocol": "PLAINTEXT"}
    async with LogReader(nowhere) as dead:
        with pytest.raises(TransportError, match="Connection refused"):
            await dead.bounds(TopicPartition("t", 0))
