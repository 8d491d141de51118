"""The aiokafka form of the transport, on a real broker."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from typing import Any

import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.errors import MessageSizeTooLargeError, NotLeaderForPartitionError
from aiokafka.errors import OutOfOrderSequenceNumber as Gap

from brokers import Topics
from splitferry_consumer.kafka import AiokafkaTransport, StartError, _refuse, check_topics
from splitferry_consumer.transport import Fenced, Outgoing, TooLarge, TransportError

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


@pytest.fixture
async def member(bootstrap_servers: str, topics: MakeTopics) -> AsyncIterator[Member]:
    made = Member(bootstrap_servers, await topics(partitions=2))
    await made.transport.start(ignore, ignore)
    yield made
    await made.transport.stop()


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
    """So a coordinator answers that is just loading. The log would be read from its start."""

    async def loading(*_: Any, **__: Any) -> dict[Any, Any]:
        return {}

    monkeypatch.setattr(member.transport._admin, "list_consumer_group_offsets", loading)
    with pytest.raises(TransportError, match="gave no offsets"):
        await member.transport.committed(0)


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
