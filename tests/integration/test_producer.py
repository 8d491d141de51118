"""The producer on a real broker, with a small consumer of the test's own that answers it."""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.admin import NewPartitions
from structlog.testing import capture_logs

from brokers import Topics, administrator, configure
from splitferry_cli import abort as cli_abort
from splitferry_producer import (
    ConnectionSettings,
    DeliveryFailed,
    FileSource,
    InvalidItem,
    MemorySource,
    NoBroker,
    Producer,
    ProducerError,
    Sent,
    SourceChanged,
    SplitTooLarge,
    StreamSource,
    TimedOut,
    TooFewPartitions,
    UnknownTopic,
)
from splitferry_producer.sending import Link
from splitferry_protocol.codec import encode_abort, encode_accepted, encode_result
from splitferry_protocol.errors import BatchTransferFailed
from splitferry_protocol.ids import RequestId
from splitferry_protocol.partitioning import partition_for
from splitferry_protocol.records import (
    Abort,
    Accepted,
    Block,
    Input,
    Result,
    Split,
    Status,
)
from splits_log import first_split, logged, read
from stage import until

Create = Callable[..., Awaitable[Topics]]
Connect = Callable[..., Producer]
KIB = 1024


@pytest.fixture
def connect(bootstrap_servers: str, tmp_path: Path) -> Connect:
    def make(topics: Topics, **options: Any) -> Producer:
        options.setdefault("state_dir", tmp_path / "state")
        return Producer(
            ConnectionSettings(bootstrap_servers),
            splits_topic=topics.splits,
            results_topic=topics.results,
            **options,
        )

    return make


def result_for(split: Split, group: str, status: Status, item: bytes = b"") -> Result:
    completed = status is Status.COMPLETED
    return Result(
        split.request,
        split.unique_id,
        split.version,
        split.block,
        split.labels,
        group,
        status,
        None if completed else BatchTransferFailed(split.request, "as the test wants it"),
        len(item),
        hashlib.sha256(item).digest(),
        {"path": split.unique_id} if completed else None,
        1,
        0,
        Input("splits", 0, 0, 0),
        split.reply,
        False,
        1,
    )


@asynccontextmanager
async def answering(
    servers: str, topics: Topics, group: str = "g", early: Status | None = None
) -> AsyncIterator[dict[RequestId, bytes]]:
    """Answers each request in a transaction of its own: when its digest fits, or, with `early`,
    at its first split. The dict fills with the items that were put together."""
    items: dict[RequestId, bytes] = {}
    parts: dict[RequestId, dict[int, bytes]] = {}
    firsts: dict[RequestId, Split] = {}

    async def answer() -> None:
        async with AIOKafkaProducer(
            bootstrap_servers=servers, transactional_id=f"{topics.results}/{group}"
        ) as producer:
            async for partition, split in read(servers, topics.splits):
                if isinstance(split, Abort):
                    continue
                first = firsts.setdefault(split.request, split)
                parts.setdefault(split.request, {})[split.offset] = bytes(split.payload)
                if early is not None and split is first:
                    result = result_for(first, group, early)
                elif early is None and split.sha256 is not None:
                    item = b"".join(part for _, part in sorted(parts.pop(split.request).items()))
                    assert hashlib.sha256(item).digest() == split.sha256
                    assert len(item) == split.total
                    items[split.request] = item
                    result = result_for(first, group, Status.COMPLETED, item)
                else:
                    continue
                async with producer.transaction():
                    await producer.send_and_wait(
                        topics.results,
                        encode_result(result),
                        key=split.request.key,
                        partition=partition,
                    )

    task = asyncio.create_task(answer())
    try:
        yield items
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def test_items_of_all_sources_arrive_and_are_answered(
    bootstrap_servers: str, topics: Create, connect: Connect, tmp_path: Path
) -> None:
    names = await topics()
    data = os.urandom(1_300_000)
    (tmp_path / "file").write_bytes(data)
    sources = [
        FileSource(tmp_path / "file"),
        MemorySource(data),
        StreamSource(io.BytesIO(data)),
        StreamSource(io.BytesIO(b""), Block.MEM),
        MemorySource(b""),
    ]
    told: list[int] = []
    async with answering(bootstrap_servers, names) as items, connect(names) as producer:
        for number, source in enumerate(sources):
            result = await producer.send(
                source,
                unique_id=f"item/{number}",
                labels={"n": str(number)},
                reply=b"token",
                progress=told.append,
            )
            assert isinstance(result, Result)
            assert result.success
            assert (result.unique_id, result.block) == (f"item/{number}", source.block)
            assert (result.labels, result.reply) == ({"n": str(number)}, b"token")
            assert items[result.request] == (data if number < 3 else b"")
    assert sum(told) == 3 * len(data)


async def test_records_are_pinned_checked_and_complete(
    bootstrap_servers: str, topics: Create, connect: Connect
) -> None:
    names = await topics()
    async with connect(names, node_id=7, split_size=1000) as producer:
        before = time.time_ns() // 1_000_000
        sent = await producer.send(MemorySource(bytes(2500)), unique_id="x", wait=False)
        assert isinstance(sent, Sent)
        assert sent.request.node_id == producer.node_id == 7
        assert before <= sent.version <= time.time_ns() // 1_000_000
    found = await logged(bootstrap_servers, names)
    assert {partition for partition, _ in found} == {partition_for(sent.request.key, 4)}
    splits = [split for _, split in found]
    assert [(s.index, s.offset, s.total) for s in splits] == [
        (0, 0, 2500),
        (1, 1000, 2500),
        (2, 2000, 2500),
    ]
    assert [s.sha256 for s in splits] == [None, None, sent.sha256]
    assert sent.sha256 == hashlib.sha256(bytes(2500)).digest()


async def test_many_at_once_share_the_memory(
    bootstrap_servers: str, topics: Create, connect: Connect
) -> None:
    names = await topics()
    items = {f"item-{number}": os.urandom(number * 3_000) for number in range(64)}
    async with (
        answering(bootstrap_servers, names) as received,
        connect(names, memory=64 * KIB, split_size=10_000) as producer,
    ):
        results = await asyncio.gather(
            *(
                producer.send(
                    StreamSource(io.BytesIO(item)) if len(name) % 2 else MemorySource(item),
                    unique_id=name,
                )
                for name, item in items.items()
            )
        )
        assert producer._budget.used == 0
    assert {r.unique_id: received[r.request] for r in results} == items
    assert len({result.request for result in results}) == 64


async def test_results_of_other_groups_requests_and_garbage_are_passed_over(
    bootstrap_servers: str, topics: Create, connect: Connect
) -> None:
    names = await topics(partitions=1)
    accepted: list[Accepted] = []
    async with (
        connect(names, group="mine", on_accepted=accepted.append) as producer,
        AIOKafkaProducer(bootstrap_servers=bootstrap_servers) as other,
    ):
        # What lies there before the request opens, and what follows it, in every form.
        await other.send_and_wait(names.results, b"garbage", key=b"key", partition=0)
        sending = asyncio.create_task(
            producer.send(MemorySource(b"x"), unique_id="x", reply=b"mine")
        )
        split = await first_split(bootstrap_servers, names)
        stranger = split._replace(request=RequestId(1, 1))
        for key, value in [
            (split.request.key, b"garbage"),
            (b"1-1", encode_result(result_for(stranger, "mine", Status.FAILED))),
            (split.request.key, encode_result(result_for(split, "other", Status.FAILED))),
            (split.request.key, encode_accepted(Accepted(split.request, "mine", 0, b"mine"))),
            (split.request.key, encode_result(result_for(split, "mine", Status.COMPLETED))),
            (split.request.key, encode_result(result_for(split, "mine", Status.FAILED))),
        ]:
            await other.send_and_wait(names.results, value, key=key, partition=0)
        result = await sending
    assert isinstance(result, Result)
    assert (result.group, result.status) == ("mine", Status.COMPLETED)
    assert accepted == [Accepted(split.request, "mine", 0, b"mine")]


async def test_an_early_result_ends_the_sending(
    bootstrap_servers: str, topics: Create, connect: Connect
) -> None:
    names = await topics()

    async def endless() -> AsyncIterator[bytes]:
        yield bytes(2000)
        await asyncio.Event().wait()

    async with (
        answering(bootstrap_servers, names, early=Status.FAILED),
        connect(names, split_size=1000) as producer,
    ):
        result = await producer.send(StreamSource(endless()), unique_id="x")
    assert isinstance(result, Result)
    assert result.status is Status.FAILED
    # Another group would wait for the rest.
    *_, (_, last) = await logged(bootstrap_servers, names)
    assert last == Abort(result.request, "group g has ended it as failed")


async def test_no_progress_is_told_of_a_request_that_has_ended(
    bootstrap_servers: str, topics: Create, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Splits may still be on their way when the result comes early."""
    names = await topics(partitions=1)
    told: list[int] = []
    late: list[asyncio.Future[None]] = []

    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield bytes(100_000)

    async with connect(names, split_size=100_000, memory=4_000_000) as producer:
        link = await producer._connected()
        send = link.send

        async def confirmed_later(*record: Any) -> asyncio.Future[None]:
            await send(*record)
            late.append(asyncio.get_running_loop().create_future())
            return late[-1]

        monkeypatch.setattr(link, "send", confirmed_later)
        async with answering(bootstrap_servers, names, early=Status.FAILED):
            await producer.send(StreamSource(endless()), unique_id="x", progress=told.append)
        for confirmed in late:
            confirmed.set_result(None)
        await asyncio.sleep(0)
    assert late
    assert told == []


async def test_a_time_out_aborts_the_request(
    bootstrap_servers: str, topics: Create, connect: Connect
) -> None:
    names = await topics()
    async with connect(names) as producer:
        with pytest.raises(TimedOut, match=r"no result after 4 s; it was aborted") as told:
            await producer.send(MemorySource(b"x"), unique_id="x", timeout=4)
    (where, split), (abort_where, abort) = await logged(bootstrap_servers, names)
    assert isinstance(split, Split)
    assert abort == Abort(told.value.request, "no result within 4 s")
    assert abort_where == where


async def test_a_stream_that_brings_nothing_in_time_was_not_aborted(
    bootstrap_servers: str, topics: Create, connect: Connect
) -> None:
    names = await topics()

    async def silent() -> AsyncIterator[bytes]:
        await asyncio.Event().wait()
        yield b""

    async with connect(names) as producer:
        with pytest.raises(TimedOut, match="nothing of it was sent"):
            await producer.send(StreamSource(silent()), unique_id="x", timeout=0.5)
    assert await logged(bootstrap_servers, names) == []


@pytest.mark.parametrize("name", [b"f", b"f\xff"], ids=["UTF-8", "other bytes"])
async def test_a_file_that_changes_aborts_its_request(
    bootstrap_servers: str, topics: Create, connect: Connect, tmp_path: Path, name: bytes
) -> None:
    names = await topics()
    path = tmp_path / os.fsdecode(name)
    path.write_bytes(bytes(5000))

    def change(_: int) -> None:
        os.utime(path, (1, 1))

    # Memory for one split at a time: the second is read after the first was confirmed.
    async with connect(names, split_size=1000, memory=1000) as producer:
        with pytest.raises(SourceChanged, match="send it again"):
            await producer.send(FileSource(path), unique_id="f", progress=change)
    *splits, (_, abort) = await logged(bootstrap_servers, names)
    assert [split.index for _, split in splits] == [0, 1, 2, 3]  # not the last: nothing completes
    assert isinstance(abort, Abort)
    assert "modification time" in abort.reason


async def test_the_partition_stays_when_some_are_added(
    bootstrap_servers: str, topics: Create, connect: Connect
) -> None:
    names = await topics(partitions=1)
    more = asyncio.Event()

    async def stream() -> AsyncIterator[bytes]:
        yield bytes(3000)
        await more.wait()
        yield bytes(3000)

    async with connect(names, split_size=1000) as producer:
        sending = asyncio.create_task(producer.send(StreamSource(stream()), unique_id="x"))
        first = await first_split(bootstrap_servers, names)
        async with administrator(bootstrap_servers) as admin:
            await admin.create_partitions({names.splits: NewPartitions(8)})
        link = await producer._connected()
        async with asyncio.timeout(30):
            while await link.partitions() < 8:
                await link._client.client.force_metadata_update()
        more.set()

        async def whole() -> bool:
            return len(await logged(bootstrap_servers, names, first.request)) == 6

        await until(whole, "six splits")
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
        found = await logged(bootstrap_servers, names, first.request)
        assert [partition for partition, _ in found] == [0] * 7  # six splits and the abort
        # The next requests use them all.
        for _ in range(40):
            await producer.send(MemorySource(b""), unique_id="y", wait=False)
    assert len({partition for partition, _ in await logged(bootstrap_servers, names)}) > 3


async def test_abort_ends_a_request_of_any_producer(
    bootstrap_servers: str, topics: Create, connect: Connect
) -> None:
    names = await topics()
    async with connect(names) as producer:
        await producer.abort(RequestId(7, 42), "not wanted")
        await producer.abort(RequestId(7, 42), "elsewhere", partition=3)
        with pytest.raises(TimedOut):
            await producer.abort(RequestId(7, 42), "waited", wait=True, timeout=0.2)
        with pytest.raises(InvalidItem, match="reason"):
            await producer.abort(RequestId(7, 42), "x" * 2000)
        with pytest.raises(InvalidItem, match="not one of the topic's 4"):
            await producer.abort(RequestId(7, 42), "nowhere", partition=4)
    default = partition_for(b"7-42", 4)
    assert sorted(await logged(bootstrap_servers, names), key=repr) == sorted(
        [
            (default, Abort(RequestId(7, 42), "not wanted")),
            (3, Abort(RequestId(7, 42), "elsewhere")),
            (default, Abort(RequestId(7, 42), "waited")),
        ],
        key=repr,
    )


@pytest.mark.parametrize(
    "wrong", [{"unique_id": ""}, {"version": -1}, {"reply": b""}, {"labels": {"x": "y" * 3000}}]
)
async def test_what_the_contract_does_not_allow_is_not_sent(
    bootstrap_servers: str, topics: Create, connect: Connect, wrong: dict[str, Any]
) -> None:
    names = await topics()
    async with connect(names) as producer:
        with pytest.raises(InvalidItem):
            await producer.send(MemorySource(b"x"), **({"unique_id": "x"} | wrong))
    assert await logged(bootstrap_servers, names) == []


async def test_topics_that_do_not_fit_are_told_and_never_created(
    bootstrap_servers: str, topics: Create, connect: Connect
) -> None:
    names, narrow = await topics(partitions=2), await topics(partitions=1)
    missing = f"{names.splits}.missing"
    with pytest.raises(UnknownTopic, match=missing):
        async with connect(replace(names, splits=missing)):
            pass
    for results, expected in [(missing, UnknownTopic), (narrow.results, TooFewPartitions)]:
        async with connect(replace(names, results=results)) as producer:
            with pytest.raises(expected):
                await producer.send(MemorySource(b"x"), unique_id="x")
            # Without waiting, the results topic is not needed.
            await producer.send(MemorySource(b"x"), unique_id="x", wait=False)
    with pytest.raises(SplitTooLarge):
        async with connect(names, split_size=17 * KIB * KIB):
            pass
    async with administrator(bootstrap_servers) as admin:
        assert missing not in await admin.list_topics()


async def test_a_refused_record_fails_its_request_and_no_later_one(
    bootstrap_servers: str, topics: Create, connect: Connect
) -> None:
    names = await topics(partitions=1)
    async with connect(names) as producer:
        async with administrator(bootstrap_servers) as admin:
            await configure(admin, names.splits, {"max.message.bytes": "20000"})
        with pytest.raises(DeliveryFailed, match="smaller split size"):
            await producer.send(MemorySource(bytes(30_000)), unique_id="x", wait=False)
        # aiokafka's sequence is ahead of the broker's now: only a new client can go on.
        await producer.send(MemorySource(bytes(10_000)), unique_id="y", wait=False)
    (_, abort), (_, split) = await logged(bootstrap_servers, names)
    assert isinstance(abort, Abort)
    assert split.unique_id == "y"


async def test_a_broker_that_falls_silent_is_told_within_the_bound(
    bootstrap_servers: str, topics: Create, tmp_path: Path
) -> None:
    names = await topics(partitions=1)
    async with (
        silenceable(bootstrap_servers) as (address, silence),
        Producer(
            ConnectionSettings(address),
            splits_topic=names.splits,
            results_topic=names.results,
            state_dir=tmp_path,
            stall_timeout=3.0,
        ) as producer,
    ):
        link = await producer._connected()
        await producer.send(MemorySource(b"x"), unique_id="x", wait=False)
        silence.set()
        async with asyncio.timeout(60):
            with pytest.raises(NoBroker, match="has confirmed anything"):
                await producer.send(MemorySource(bytes(9_000_000)), unique_id="y", wait=False)
        assert isinstance(link.failed, NoBroker)
        assert producer._budget.used == 0


@asynccontextmanager
async def silenceable(servers: str) -> AsyncIterator[tuple[str, asyncio.Event]]:
    """A way to the broker that stops answering: the client goes on to the address that the
    broker advertises, so the answers are rewritten to name this one, of the same length."""
    host, port = servers.rsplit(":", 1)
    silent = asyncio.Event()
    tasks: set[asyncio.Task[None]] = set()
    own = 0

    async def carry(source: asyncio.StreamReader, to: asyncio.StreamWriter, back: bool) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                size = await source.readexactly(4)
                frame = await source.readexactly(int.from_bytes(size, "big"))
                if silent.is_set():
                    await asyncio.Event().wait()
                if back:
                    advertised = b"127.0.0.1" + int(port).to_bytes(4, "big")
                    frame = frame.replace(advertised, b"127.0.0.1" + own.to_bytes(4, "big"))
                to.write(size + frame)
                await to.drain()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream_reader, upstream = await asyncio.open_connection(host, int(port))
        for work in (carry(reader, upstream, False), carry(upstream_reader, writer, True)):
            tasks.add(asyncio.create_task(work))
        writers.update((writer, upstream))

    writers: set[asyncio.StreamWriter] = set()
    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    own = server.sockets[0].getsockname()[1]
    try:
        yield f"127.0.0.1:{own}", silent
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for writer in writers:
            writer.close()
        await asyncio.gather(*(w.wait_closed() for w in writers), return_exceptions=True)


async def test_closing_fails_what_is_waited_for(
    bootstrap_servers: str, topics: Create, connect: Connect
) -> None:
    names = await topics(partitions=1)
    async with connect(names) as producer:
        sending = asyncio.create_task(producer.send(MemorySource(b"x"), unique_id="x"))
        await first_split(bootstrap_servers, names)
    with pytest.raises(ProducerError, match="closed"):
        await sending


async def test_closing_aborts_what_is_being_sent_behind_its_last_split(
    bootstrap_servers: str, topics: Create, connect: Connect
) -> None:
    """Before it, the abort record would be followed by splits that open the request anew."""
    names = await topics(partitions=1)
    with capture_logs() as logs:
        async with connect(names, split_size=1000, memory=4000) as producer:
            sending = asyncio.create_task(
                producer.send(MemorySource(bytes(30_000_000)), unique_id="x")
            )
            first = await first_split(bootstrap_servers, names)
    with pytest.raises(ProducerError, match="the producer was closed"):
        await sending
    *splits, (_, abort) = await logged(bootstrap_servers, names)
    assert 0 < len(splits) < 30_000
    assert abort == Abort(first.request, "the producer was closed")
    assert not any(isinstance(record, Abort) for _, record in splits)
    assert [line for line in logs if line["log_level"] == "warning"] == []


async def test_an_abort_record_that_nobody_confirms_is_told(
    bootstrap_servers: str, topics: Create, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kafka's client would try for ever, and wait for that at its end, too."""
    names = await topics(partitions=1)
    monkeypatch.setattr(cli_abort, "WRITE_BOUND", 1.0)
    start, request = Link.start, RequestId(1, 1)
    async with silenceable(bootstrap_servers) as (servers, silent):

        async def connect(link: Link) -> None:
            await start(link)
            silent.set()

        monkeypatch.setattr(Link, "start", connect)
        value = encode_abort(Abort(request, "enough"))
        with pytest.raises(NoBroker, match=r"has confirmed anything .* in-sync replicas"):
            async with asyncio.timeout(20):
                await cli_abort.write(ConnectionSettings(servers), names.splits, 0, request, value)
