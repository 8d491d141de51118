"""Requests of every kind the contract knows, mixed, from a seed."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import cycle

from aiokafka import AIOKafkaProducer

from splitferry_consumer.dead_letters import PREFIX
from splitferry_protocol.codec import crc_header, encode_abort, encode_split
from splitferry_protocol.ids import RequestId
from splitferry_protocol.partitioning import partition_for
from splitferry_protocol.records import Abort, Block, Split

KIB, MIB = 1024, 1024 * 1024


@dataclass(frozen=True)
class Message:
    """A record to be sent."""

    key: bytes | None
    value: bytes | None
    headers: Sequence[tuple[str, bytes]] = ()
    partition: int = 0


def message(content: Split | Abort, partitions: int) -> Message:
    value = encode_split(content) if isinstance(content, Split) else encode_abort(content)
    key = content.request.key
    return Message(key, value, [crc_header(value)], partition_for(key, partitions))


def cut(
    request: RequestId,
    data: bytes,
    size: int,
    *,
    unique_id: str | None = None,
    version: int = 1,
    block: Block = Block.FILE,
    reply: bytes | None = None,
) -> list[Split]:
    """The splits of an item in their order, as a producer makes them."""
    name = f"items/{request}" if unique_id is None else unique_id
    digest = hashlib.sha256(data).digest()
    starts = range(0, len(data), size) or range(1)
    return [
        Split(
            request, name, version, block, index, start, len(data), data[start : start + size],
            digest if start == starts[-1] else None, reply if start == 0 else None,
        )
        for index, start in enumerate(starts)
    ]  # fmt: skip


def damaged(sound: Message) -> Message:
    assert sound.value is not None
    return replace(sound, value=sound.value[:-1] + bytes([sound.value[-1] ^ 1]))


def origin(topic: str, partition: int, offset: int) -> list[tuple[str, bytes]]:
    """The headers that make a dead letter of a record which lay there."""
    about = {
        "topic": topic,
        "partition": str(partition),
        "offset": str(offset),
        "exception.class.name": "BatchTransferError",
        "exception.message": "v: 2 is not a version known here (1)",
        "timestamp": "1",
    }
    return [(PREFIX + name, text.encode()) for name, text in about.items()]


def make_load(
    rng: random.Random,
    count: int,
    partitions: int,
    sizes: Sequence[int],
    side_by_side: int = 8,
    node: int = 7,
) -> list[Message]:
    """Records of `count` requests, up to `side_by_side` of them interleaved at any time."""
    waiting = [
        _records(rng, RequestId(node, number), number, sizes, partitions)
        for number in range(1, count + 1)
    ]
    active: list[list[Message]] = []
    mixed: list[Message] = []
    while waiting or active:
        while waiting and len(active) < side_by_side:
            active.append(waiting.pop(0))
        chosen = rng.choice(active)
        mixed.append(chosen.pop(0))
        if not chosen:
            active.remove(chosen)
    return mixed


def _records(
    rng: random.Random, request: RequestId, number: int, sizes: Sequence[int], partitions: int
) -> list[Message]:
    """One request: kinds and sizes take turns, so that each kind meets each size."""
    data = rng.randbytes(sizes[(number + number // 12) % len(sizes)])
    size = max(1, len(data) // rng.randint(2, 8), len(data) // 40)
    block = Block.MEM if rng.random() < 0.25 else Block.FILE
    splits = cut(request, data, size, block=block)
    first, last = splits[0], splits[-1]
    also: list[Message] = []

    def sent(*contents: Split | Abort) -> list[Message]:
        return [message(content, partitions) for content in contents]

    match number % 12:
        case 1:
            rng.shuffle(splits)
        case 2:
            splits += rng.choices(splits, k=3)
            rng.shuffle(splits)
        case 3:  # overlapping, where the bytes agree
            start, end = sorted(rng.choices(range(len(data) + 1), k=2))
            payload = data[start:end]
            splits.append(first._replace(index=99, offset=start, payload=payload, sha256=None))
            rng.shuffle(splits)
        case 4:  # other bytes where some were received
            other = bytes(len(first.payload)) if first.payload else b"?"
            splits.insert(1, first._replace(index=98, payload=other))
        case 5:
            return sent(*splits[:-1], Abort(request, "not wanted"), last)
        case 6:  # several tokens: before the end, then after it, some again
            tokens = [b"a", b"a", b"b", b"c", b"b"]
            splits = [s._replace(reply=t) for s, t in zip(splits, cycle(tokens), strict=False)] + [
                first._replace(reply=token) for token in (b"d", b"d", b"e", b"d")
            ]
        case 7:  # the same item in two versions, perhaps in two partitions
            name = f"versions/{request.node_id}-{number // 24}"
            splits = [s._replace(unique_id=name, version=1 + number // 12 % 2) for s in splits]
        case 8:
            also = [damaged(sent(first)[0])]
        case 9:
            wrong = {"sha256": bytes(32)}
            unsafe = {"unique_id": f"../outside/{number}", "block": Block.FILE}
            splits = [s._replace(**(wrong if number % 24 == 9 else unsafe)) for s in splits]
        case 10:  # late duplicates, and the id used again for something else
            splits += [first, first._replace(version=5), first._replace(reply=b"late")]
        case 11:
            splits.insert(len(splits) // 2, first._replace(version=first.version + 1))
        case _:
            pass
    mixed = sent(*splits) + also
    if rng.random() < 0.3:  # poison, tied to nothing
        where = partition_for(request.key, partitions)
        poison = rng.choice([(None, b"\xc1"), (b"no id", None), (request.key, rng.randbytes(20))])
        mixed.insert(rng.randrange(len(mixed) + 1), Message(*poison, partition=where))
    return mixed


async def send(producer: AIOKafkaProducer, topic: str, messages: Sequence[Message]) -> None:
    """In this order, and only then return."""
    due = [
        await producer.send(topic, m.value, key=m.key, partition=m.partition, headers=[*m.headers])
        for m in messages
    ]
    for future in due:
        await future


async def send_slowly(
    producer: AIOKafkaProducer, topic: str, messages: Sequence[Message], seconds: float
) -> None:
    """One by one, spread over that time."""
    for single in messages:
        await send(producer, topic, [single])
        await asyncio.sleep(seconds / len(messages))


def sending(servers: str) -> AIOKafkaProducer:
    """A producer that loses nothing while a broker is away, however long its start takes: a record
    without a leader is given up after the request time-out (aiokafka's default: 40 s)."""
    return AIOKafkaProducer(
        bootstrap_servers=servers,
        enable_idempotence=True,
        max_request_size=20 * MIB,
        request_timeout_ms=120_000,
    )
