"""The aiokafka form of the transport, on a real broker."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import suppress
from typing import Any

import pytest
from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.errors import (
    KafkaConnectionError,
    MessageSizeTooLargeError,
    NotLeaderForPartitionError,
    ProducerFenced,
)
from aiokafka.errors import OutOfOrderSequenceNumber as Gap
from aiokafka.protocol.fetch import FetchRequest
from aiokafka.structs import OffsetAndMetadata

from brokers import Topics, administrator
from splitferry_consumer.bounded import bounded
from splitferry_consumer.fetching import FETCH_MAX
from splitferry_consumer.kafka import (
    AiokafkaTransport,
    StartError,
    _refuse,
    check_topics,
)
from splitferry_consumer.requests import _OffsetRequest
from splitferry_consumer.transport import FateUnknown, Fenced, Outgoing, TooLarge, TransportError

MakeTopics = Callable[..., Awaitable[Topics]]


async def ignore(partitions: Collection[int]) -> None:
    pass


class Member:
    def __init__(self, servers: str, names: Topics) -> None:
        self.names = names
        self.servers = servers
        self.transport = AiokafkaTransport(
            {"bootstrap_servers": servers},
            names.splits + "-group",
            names.splits,
            names.results,
            6.0,
        )

    def told(self, text: bytes) -> Outgoing:
        return Outgoing(self.names.results, 0, b"key", text)


async def test_a_client_that_stops_with_a_cancellation_of_its_own_is_over() -> None:
    """aiokafka awaits a fetch that it has cancelled in its pause after a failure."""

    async def stop() -> None:
        pausing = asyncio.create_task(asyncio.sleep(10))
        await asyncio.sleep(0)
        pausing.cancel()
        await pausing

    await bounded(stop())


@pytest.fixture
async def member(bootstrap_servers: str, topics: MakeTopics) -> AsyncIterator[Member]:
    made = Member(bootstrap_servers, await topics(partitions=2))
    await made.transport.start(ignore, ignore)
    yield made
    await made.transport.stop()


async def test_a_client_that_stops_in_a_pause_after_a_failure_leaves_no_connection(
    member: Member, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cancelled pause comes out of its `stop` before its connections are closed."""
    consumer: Any = member.transport._consumer
    client = consumer._client
    failed = asyncio.Event()

    async def fail(*_: object, **__: object) -> None:
        failed.set()
        raise KafkaConnectionError("cut")

    monkeypatch.setattr(client, "send", fail)
    monkeypatch.setattr(consumer._fetcher, "_retry_backoff", 60)
    consumer._fetcher._pending_tasks.add(
        asyncio.create_task(
            consumer._fetcher._proc_fetch_request(None, 1, FetchRequest(1, 1, 1, 1, []))
        )
    )
    await failed.wait()
    monkeypatch.undo()
    connections = list(client._conns.values())
    assert any(connection.connected() for connection in connections)
    await member.transport.stop()
    assert not any(connection.connected() for connection in connections)


async def test_what_was_committed_is_read_with_its_metadata(member: Member) -> None:
    assert await member.transport.committed(0) is None
    writer = await member.transport.writer(0)
    offsets = await writer.publish([member.told(b"a")], lambda offsets: (7, f"S={offsets}"))
    assert offsets == [0]
    # In the order of taking: until the next owner has its epoch, the commit may not be seen.
    following = await member.transport.writer(0)
    assert await member.transport.committed(0) == (7, "S=[0]")
    assert await member.transport.committed(1) is None
    await writer.close()
    await following.close()


async def test_no_answer_is_not_taken_for_no_commit(
    member: Member, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log would be read from its start."""
    monkeypatch.setattr("splitferry_consumer.requests.FetchOffset.build", asked_for_nothing)
    with pytest.raises(TransportError, match="gave no offsets"):
        await member.transport.committed(0)


def asked_for_nothing(_: object, struct: type[_OffsetRequest]) -> _OffsetRequest:
    return struct("group", [], True, {})


async def test_a_commit_that_is_not_settled_is_not_passed_over(member: Member) -> None:
    """Its fate is open, so what was committed before may be an answer of yesterday."""
    writer = await member.transport.writer(0)
    await writer.publish([], lambda _: (1, "first"))
    other = AIOKafkaProducer(bootstrap_servers=member.servers, transactional_id="other")
    await other.start()
    await other.begin_transaction()
    source = TopicPartition(member.names.splits, 0)
    group = member.names.splits + "-group"
    await other.send_offsets_to_transaction({source: OffsetAndMetadata(2, "second")}, group)
    with pytest.raises(TransportError, match="not been settled yet"):
        await member.transport.committed(0)
    await other.abort_transaction()
    async with asyncio.timeout(30):
        while True:  # until the marker is written
            with suppress(TransportError):
                assert await member.transport.committed(0) == (1, "first")
                break
            await asyncio.sleep(0.05)
    await other.stop()
    await writer.close()


async def test_a_writer_fences_the_one_before(member: Member) -> None:
    old = await member.transport.writer(0)
    await old.publish([member.told(b"old")], lambda _: (1, "old"))
    other = await member.transport.writer(1)
    new = await member.transport.writer(0)
    with pytest.raises(Fenced):
        await old.publish([member.told(b"zombie")], lambda _: (2, "zombie"))
    assert await member.transport.committed(0) == (1, "old")
    await other.publish([], lambda _: (3, "another partition's"))
    for writer in (old, other, new):
        await writer.close()


async def test_results_are_read_to_the_end_past_what_was_aborted(member: Member) -> None:
    writer = await member.transport.writer(0)
    await writer.publish([member.told(b"a"), member.told(b"b")], lambda _: (0, ""))
    foreign = AIOKafkaProducer(bootstrap_servers=member.servers, transactional_id="foreign")
    await foreign.start()
    await foreign.begin_transaction()
    await foreign.send_and_wait(member.names.results, b"aborted", partition=0)
    await foreign.abort_transaction()
    await foreign.stop()
    start = end = 0
    async with asyncio.timeout(30):
        while end < 5:  # the last marker comes behind the answer to the one who aborts
            start, end = await member.transport.results_bounds(0)
    assert (start, end) == (0, 5)  # a, b, a marker, what was aborted, a marker
    found = [record.value async for record in member.transport.results(0, start, end)]
    assert found == [b"a", b"b"]
    assert [r.value async for r in member.transport.results(0, 1, 2)] == [b"b"]
    await writer.close()


async def test_topics_are_checked_before_the_start(
    bootstrap_servers: str, topics: MakeTopics
) -> None:
    few, many = await topics(partitions=1), await topics(partitions=2)
    options = {"bootstrap_servers": bootstrap_servers}
    await check_topics(options, few.splits, many.results, few.dead_letters)
    with pytest.raises(StartError, match=r"has 1 partitions, fewer than the 2 of"):
        await check_topics(options, many.splits, few.results, few.dead_letters)
    with pytest.raises(StartError, match="splitferry topics create"):
        await check_topics(options, few.splits, few.results, "there-is-none")


def test_the_cause_is_told_apart_from_what_follows_from_it() -> None:
    _refuse([object(), object()])
    with pytest.raises(TooLarge) as refusal:
        _refuse([object(), MessageSizeTooLargeError(), Gap(), MessageSizeTooLargeError()])
    assert refusal.value.indexes == [1, 3]
    with pytest.raises(NotLeaderForPartitionError):
        _refuse([MessageSizeTooLargeError(), Gap(), NotLeaderForPartitionError()])
    with pytest.raises(Gap):
        _refuse([object(), Gap()])


async def test_one_response_is_bounded_whatever_the_partitions_hold(
    bootstrap_servers: str, topics: MakeTopics
) -> None:
    """On a slow network it has to come before its request times out."""
    partitions = range(4)
    member = Member(bootstrap_servers, await topics(partitions=len(partitions)))
    async with AIOKafkaProducer(bootstrap_servers=bootstrap_servers) as producer:
        for number in [*partitions] * 8:
            await producer.send_and_wait(member.names.splits, bytes(2**19), partition=number)
    transport = member.transport
    await transport.start(ignore, ignore)
    sizes: list[int] = []
    client: Any = transport._consumer._client  # type: ignore[union-attr]
    send = client.send

    async def measured(node: int, request: Any, **options: Any) -> Any:
        response = await send(node, request, **options)
        if isinstance(request, FetchRequest):
            sizes.append(sum(len(p[-1]) for _, told in response.topics for p in told))
        return response

    client.send = measured
    for number in partitions:
        transport.seek(number, 0)
        transport.resume(number)
    left = 8 * len(partitions)
    async with asyncio.timeout(30):
        while left:
            batches = await transport.poll(partitions, 0.1)
            left -= sum(map(len, batches.values()))
    await transport.stop()
    assert FETCH_MAX // 2 < max(sizes) <= FETCH_MAX


@pytest.mark.parametrize("step", [3600.0, -3600.0])
async def test_silence_does_not_hang_on_the_wall_clock(
    member: Member, monkeypatch: pytest.MonkeyPatch, step: float
) -> None:
    """aiokafka notes the wall clock's time with each answer. After a step back a dead connection
    would have counted as heard for as long as the step is, and after one forward as silent."""
    transport = member.transport
    transport.seek(0, 0)
    transport.resume(0)
    async with asyncio.timeout(30):
        while transport.end(0) is None:
            await transport.poll([0], 0.1)
    transport.pause(0)
    fetcher: Any = transport._consumer._fetcher  # type: ignore[union-attr]
    async with asyncio.timeout(30):
        while fetcher._pending_tasks:  # the fetch under way ends
            await asyncio.sleep(0.05)
    before = transport.silence(0)
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + step)
    await asyncio.sleep(1)
    assert before + 1 <= transport.silence(0) < before + 60


async def test_a_topic_that_takes_no_records_is_named(
    member: Member, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A producer that knows a topic sends to it for ever, also when it was deleted."""
    writer = await member.transport.writer(0)
    await writer.publish([member.told(b"a")], lambda _: (1, ""))
    async with administrator(member.servers) as admin:
        await admin.delete_topics([member.names.results])
        async with asyncio.timeout(30):
            while member.names.results in await admin.list_topics():  # it still takes records
                await asyncio.sleep(0.05)
    monkeypatch.setattr("splitferry_consumer.kafka.PUBLISH_BOUND", 3.0)
    with pytest.raises(TransportError, match=f"topic {member.names.results} took no records"):
        await writer.publish([member.told(b"b")], lambda _: (2, ""))
    # What it still has to send is never taken. Whoever sends it would go on, and connect anew.
    producer: Any = writer._producer
    await writer.close()
    assert producer._sender.sender_task.done()
    assert not any(connection.connected() for connection in producer.client._conns.values())


async def test_a_client_that_asserts_what_is_not_so_is_met_as_any_other_trouble(
    member: Member, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A broker that has just started names no brokers, not even itself."""

    async def no_brokers(*_: object) -> None:
        raise AssertionError("Did we not perform bootstrap?")

    monkeypatch.setattr("aiokafka.client.AIOKafkaClient.coordinator_lookup", no_brokers)
    with pytest.raises(TransportError, match=r"no transactional producer: .*bootstrap"):
        await member.transport.writer(0)


@pytest.mark.timeout(60)
async def test_a_client_that_swallows_its_time_out_is_given_up(
    member: Member, monkeypatch: pytest.MonkeyPatch
) -> None:
    """aiokafka does so while it awaits tasks that it has cancelled itself."""

    heard = 0

    async def deaf(_: object) -> None:
        nonlocal heard
        while heard < 2:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                heard += 1

    monkeypatch.setattr("splitferry_consumer.kafka.REQUEST_BOUND", 0.1)
    monkeypatch.setattr("aiokafka.AIOKafkaProducer.start", deaf)
    with pytest.raises(TransportError, match="did not answer in time"):
        await member.transport.writer(0)
    async with asyncio.timeout(30):
        while heard < 2:
            await asyncio.sleep(0.05)


async def test_a_commit_that_hangs_is_of_unknown_fate(
    member: Member, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def deaf(_: object) -> None:
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(60)
        await asyncio.sleep(60)

    writer = await member.transport.writer(0)
    await writer.publish([member.told(b"a")], lambda _: (1, ""))
    # Longer than all that comes before the commit may take.
    monkeypatch.setattr("splitferry_consumer.kafka.PUBLISH_BOUND", 4.0)
    with monkeypatch.context() as patch:
        patch.setattr("aiokafka.AIOKafkaProducer.commit_transaction", deaf)
        with pytest.raises(FateUnknown):
            await writer.publish([member.told(b"a")], lambda _: (1, ""))
    await writer.close()


async def test_a_cancellation_out_of_the_client_is_an_error_of_the_call(
    member: Member, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def cancelled(*_: object, **__: object) -> None:
        raise asyncio.CancelledError

    for name in (
        "AIOKafkaProducer.start",
        "AIOKafkaConsumer.getmany",
        "client.AIOKafkaClient.send",
    ):
        monkeypatch.setattr(f"aiokafka.{name}", cancelled)
    with pytest.raises(TransportError, match="cancelled its own work"):
        await member.transport.writer(0)
    with pytest.raises(TransportError, match="cancelled its own work"):
        await member.transport.poll([0], 0.1)
    with pytest.raises(TransportError, match="cancelled its own work"):
        await member.transport.committed(0)


async def test_an_owner_that_is_fenced_between_two_steps_hears_it(member: Member) -> None:
    """aiokafka then says that there is no transaction, which would be met as a bug: the partition
    would be taken again at once, from its new owner."""
    writer = await member.transport.writer(0)

    def fence(_: object) -> tuple[int, str]:
        writer._producer._txn_manager.fatal_error(ProducerFenced())
        return 1, ""

    with pytest.raises(Fenced):
        await writer.publish([], fence)
    await writer.close()
