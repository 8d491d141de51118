"""Compressed batches on a real broker: sound ones are read, bombs cost little and stop nothing."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Collection
from pathlib import Path

import pytest
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType

from bombs import CODECS, GZIP, LZ4, PACK, SNAPPY, ZSTD, batch, bomb, record, send_batch
from brokers import Topics, administrator
from checker import CONNECT, read_outcomes, read_topic, violations
from place import Place, results_of
from splitferry_consumer.batches import UNPACKED_MAX
from splitferry_consumer.fetching import POLL_MAX
from splitferry_consumer.kafka import AiokafkaTransport
from splitferry_protocol.ids import RequestId
from splitferry_protocol.records import Result, Status
from stage import stage, until
from workload import Message, cut, message, send, sending

MakeTopics = Callable[..., Awaitable[Topics]]
MIB = 1024 * 1024
MEMORY_MAX = 512 * MIB
"""Peak of a consumer's resident memory: about 100 MiB without bombs."""


def request(number: int) -> list[Message]:
    data = b"%06d" % number * 100
    return [message(split, 1) for split in cut(RequestId(7, number), data, 200)]


def as_batch(messages: list[Message], extra: bytes = b"") -> bytes:
    """All in one batch, each with a header besides that is named `extra`."""
    parts = [
        record(n, m.key, m.value, [(b"crc32c", m.headers[0][1])] + [(extra, b"")] * bool(extra))
        for n, m in enumerate(messages)
    ]
    return batch(b"".join(parts), len(parts))


async def test_bombs_cost_little_memory_and_hold_up_nothing(
    bootstrap_servers: str, topics: MakeTopics, tmp_path: Path
) -> None:
    names = await topics(partitions=1)
    splits = names.splits
    async with (
        stage(bootstrap_servers, names, tmp_path) as seen,
        sending(bootstrap_servers) as producer,
    ):
        consumer = await seen.consumer()
        for number, (codec, size) in enumerate(
            {GZIP: 512, LZ4: 512, ZSTD: 512, SNAPPY: 256}.items(), start=1
        ):
            first, *others = request(number)
            await send(producer, splits, [first])
            await send_batch(bootstrap_servers, splits, bomb(codec, size * MIB))
            await send(producer, splits, others)
        for _ in range(5):  # each within the limit, and all of them in one answer
            await send_batch(bootstrap_servers, splits, bomb(ZSTD, UNPACKED_MAX - MIB))
        await send(producer, splits, request(5))
        await until(lambda: len(seen.results) == 5, "the results of all requests")
        await seen.settle()
        peak = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{consumer.pid}/status").read_text())
        await seen.stop()
    assert {result.status for result in seen.results.values()} == {Status.COMPLETED}
    letters, _ = await read_topic(bootstrap_servers, names.dead_letters)
    told = [dict(letter.headers) for log in letters.values() for letter in log]
    causes = [headers[CONNECT + "exception.message"].decode() for headers in told]
    assert len(causes) == 4 + 5
    assert sum(f"does not unpack within {UNPACKED_MAX} bytes" in cause for cause in causes) == 4
    assert seen.consumers[0].log.read_text().count('"event": "unreadable batch"') >= 4
    assert peak is not None
    print(f"peak of the resident memory: {peak[1]} kB")
    assert int(peak[1]) * 1024 < MEMORY_MAX


async def test_what_the_broker_compressed_is_read_and_obeys_the_contract(
    bootstrap_servers: str, topics: MakeTopics, tmp_path: Path
) -> None:
    """The broker writes each batch anew in the codec of the topic: Java's own form of it."""
    place = Place(bootstrap_servers, await topics(partitions=1), tmp_path / "root", tmp_path)
    for number, codec in enumerate(CODECS):
        async with administrator(bootstrap_servers) as admin:
            await admin.alter_configs(
                [
                    ConfigResource(
                        ConfigResourceType.TOPIC,
                        place.names.splits,
                        {"compression.type": codec, "max.message.bytes": str(17 * MIB)},
                    )
                ]
            )
        await asyncio.sleep(0.5)  # the broker tells nobody when it takes effect
        await place.send(request(number))
    async with place.serving():
        await place.settled()
    history = await place.history()
    assert violations(history) == []
    assert [r.status for r in results_of(history).values()] == [Status.COMPLETED] * len(CODECS)


@pytest.mark.parametrize("name", [b"\xff\xfe", b"h\xe9"])
async def test_a_header_that_no_client_can_name_costs_no_record_of_its_batch(
    bootstrap_servers: str, topics: MakeTopics, tmp_path: Path, name: bytes
) -> None:
    """aiokafka raises for the whole poll."""
    place = Place(bootstrap_servers, await topics(partitions=1), tmp_path / "root", tmp_path)
    await place.send(request(1))
    await send_batch(place.servers, place.names.splits, as_batch(request(2) * 20, name))
    await place.send(request(3))
    async with place.serving():
        await place.settled()
    letters, _ = await read_topic(place.servers, place.names.dead_letters)
    assert letters == {0: []}
    outcomes = await read_outcomes(place.servers, place.names.results)
    told = [o.told for o in outcomes if isinstance(o.told, Result)]
    assert {(r.request.sequence, r.status) for r in told} == {
        (number, Status.COMPLETED) for number in (1, 2, 3)
    }


async def test_a_poll_hands_out_no_more_than_can_be_held(
    bootstrap_servers: str, topics: MakeTopics
) -> None:
    """Else 4 MiB of the smallest records make 300 MiB of objects, and hold up the loop."""
    names, count = await topics(partitions=1), 3 * POLL_MAX
    tiny = b"".join(record(n) for n in range(count))
    await send_batch(bootstrap_servers, names.splits, batch(PACK[ZSTD](tiny), count, ZSTD))
    options = {"bootstrap_servers": bootstrap_servers}
    transport = AiokafkaTransport(options, "tiny", names.splits, names.results, 6.0)

    async def taken(partitions: Collection[int]) -> None:
        transport.resume(0)

    async def lost(partitions: Collection[int]) -> None: ...

    await transport.start(taken, lost)
    try:
        offsets: list[int] = []
        async with asyncio.timeout(30):
            while len(offsets) < count:
                records = (await transport.poll([0], 0.2)).get(0, ())
                assert len(records) <= POLL_MAX
                offsets += [read.offset for read in records]
    finally:
        await transport.stop()
    assert offsets == list(range(count))
