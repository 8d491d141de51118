"""Answers to fetches, read without aiokafka's stream: its private parts that this hangs on, too."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.conn import create_conn
from aiokafka.errors import KafkaConnectionError
from aiokafka.protocol.fetch import FetchRequest
from aiokafka.record.default_records import DefaultRecordBatch

from brokers import Topics
from splitferry_consumer import batches
from splitferry_consumer.fetching import FETCH_MAX, Fetches
from splitferry_consumer.frames import ANSWER_MAX, FETCHES, Frames, _Answer
from workload import sending

MakeTopics = Callable[..., Awaitable[Topics]]
FETCH = FetchRequest(10, 1, 100, 1, [("topic", [(0, 0, 100)])])


async def test_a_large_answer_is_read_as_views_of_one_buffer(
    bootstrap_servers: str, topics: MakeTopics, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several fetches of large records, and of small ones, which are copied out of the answer."""
    topic = (await topics(partitions=2)).splits
    sent: dict[int, list[bytes]] = {0: [], 1: []}
    async with sending(bootstrap_servers) as producer:
        for number in range(20):
            for partition, size in ((0, 700_000), (1, 70_000)):
                value = b"%02d" % number * (size // 2)
                await producer.send_and_wait(topic, value, partition=partition)
                sent[partition].append(value)
    buffers: set[int] = set()

    def viewed(batch: memoryview) -> Any:
        buffers.add(id(batch.obj))
        return DefaultRecordBatch(batch)

    monkeypatch.setattr(batches, "DefaultRecordBatch", viewed)
    async with AsyncExitStack() as stack:
        consumer = AIOKafkaConsumer(
            bootstrap_servers=bootstrap_servers, max_partition_fetch_bytes=FETCH_MAX
        )
        Fetches(consumer, FETCH_MAX)
        await stack.enter_async_context(consumer)
        partitions = [TopicPartition(topic, number) for number in sent]
        consumer.assign(partitions)
        await consumer.seek_to_beginning(*partitions)
        found: dict[int, list[bytes]] = {0: [], 1: []}
        while found != sent:
            for source, records in (await consumer.getmany(timeout_ms=1000)).items():
                found[source.partition] += [r.value or b"" for r in records]
        connections = consumer._client._conns
        framed = [c for (_, group), c in connections.items() if group == FETCHES]
        assert [type(connection._protocol) for connection in framed] == [Frames]
        assert 3 <= len(buffers) <= 20  # of 14 MB
        closed = [connection._protocol for connection in framed]
    assert all(protocol._connection._reader is None for protocol in closed)


class Peer:
    """A broker that says its versions, and then what a test wants."""

    def __init__(self, *parts: bytes, ends: bool = False) -> None:
        self.parts = parts
        self.ends = ends
        self.done = asyncio.Event()

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        versions = await self._request(reader)
        writer.write(struct.pack(">iihihhh", 16, versions, 0, 1, FetchRequest.API_KEY, 4, 11))
        await self._request(reader)
        for part in self.parts:
            writer.write(part)
            await asyncio.sleep(0.001)
        with suppress(ConnectionError):
            if not self.ends:
                await reader.read()
            writer.close()
            await writer.wait_closed()
        self.done.set()

    async def _request(self, reader: asyncio.StreamReader) -> int:
        (size,) = struct.unpack(">i", await reader.readexactly(4))
        correlation_id: int = struct.unpack_from(">hhi", await reader.readexactly(size))[2]
        return correlation_id


def response(correlation_id: int, topic: str = "") -> bytes:
    """Of version 11, with no topic, or one without partitions."""
    topics = struct.pack(">h", len(topic)) + topic.encode() + bytes(4) if topic else b""
    content = struct.pack(">iihii", correlation_id, 0, 0, 0, bool(topic)) + topics
    return struct.pack(">i", len(content)) + content


async def ask(peer: Peer) -> tuple[bool, Any]:
    """Whether the connection lasts after its fetch, and what came of that."""
    async with AsyncExitStack() as stack:
        server = await asyncio.start_server(peer, "127.0.0.1", 0)
        stack.push_async_callback(peer.done.wait)
        stack.callback(server.close)
        port = server.sockets[0].getsockname()[1]
        connection = await create_conn("127.0.0.1", port, request_timeout_ms=5000)
        Frames(connection)
        try:
            answer: Any = await connection.send(FETCH)
        except Exception as error:
            answer = error
        finally:
            told = connection.connected()
            closing = connection.close()
            if closing is not None:
                await closing
        return told, answer


async def test_the_next_answer_is_awaited_after_a_good_one() -> None:
    connected, answer = await ask(Peer(response(2)))
    assert connected
    assert answer.topics == []


async def test_the_loop_is_not_woken_for_each_piece_of_an_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes: list[int] = []
    updated = Frames.buffer_updated

    def noted(frames: Frames, nbytes: int) -> None:
        sizes.append(nbytes)
        updated(frames, nbytes)

    monkeypatch.setattr(Frames, "buffer_updated", noted)
    answer = response(2, topic="t" * 30_000)
    parts = [answer[at : at + 1000] for at in range(0, len(answer), 1000)]
    connected, told = await ask(Peer(*parts))
    assert connected
    assert [name for name, _ in told.topics] == ["t" * 30_000]
    assert sizes == [4, len(answer) - 4]


@pytest.mark.parametrize(
    ("answer", "cause"),
    [
        (response(7), "answer 7 to request 2"),
        (struct.pack(">i", 3) + b"abc", "an answer of 3 bytes"),
        (struct.pack(">I", ANSWER_MAX + 1), f"an answer of {ANSWER_MAX + 1} bytes"),
        (struct.pack(">iiih", 10, 2, 0, 0), "convert value"),
    ],
    ids=["another", "too short", "too long", "cut"],
)
async def test_what_is_no_answer_ends_the_connection(answer: bytes, cause: str) -> None:
    connected, error = await ask(Peer(answer))
    assert not connected
    assert isinstance(error, KafkaConnectionError)
    assert cause in str(error.__cause__)


async def test_a_connection_that_ends_in_an_answer_fails_its_request() -> None:
    connected, error = await ask(Peer(response(2)[:9], ends=True))
    assert not connected
    assert isinstance(error, KafkaConnectionError)


def test_only_what_is_most_of_an_answer_stays_in_it() -> None:
    """The rest is copied, or a few bytes that nobody takes would hold all the others."""
    answer = _Answer(memoryview(bytearray(400_000)))
    assert [type(answer.read(size)) for size in (8, 100_000, 250_000)] == [bytes, bytes, memoryview]
    assert len(answer.read(100_000)) == 400_000 - 350_008  # cut: aiokafka complains of it
