"""Record batches as a hostile producer makes them: little to send, much to unpack."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable, Sequence
from typing import Any

import cramjam
import google_crc32c
from aiokafka.client import AIOKafkaClient
from aiokafka.codec import lz4_encode
from aiokafka.errors import (
    NotLeaderForPartitionError,
    UnknownTopicOrPartitionError,
    for_code,
)
from aiokafka.protocol.produce import ProduceRequest
from aiokafka.record.util import encode_varint

GZIP, SNAPPY, LZ4, ZSTD = 1, 2, 3, 4
CODECS = {"gzip": GZIP, "snappy": SNAPPY, "lz4": LZ4, "zstd": ZSTD}
CHUNK = bytes(1 << 20)
HEAD = struct.Struct(">qiibIhiqqqhii")


def varint(number: int) -> bytes:
    made = bytearray()
    encode_varint(number, made.append)
    return bytes(made)


def record(
    delta: int,
    key: bytes | None = None,
    value: bytes | None = None,
    headers: Sequence[tuple[bytes, bytes]] = (),
) -> bytes:
    """One record as it lies in a batch. Names of headers are bytes: any."""
    content = b"\0\0" + varint(delta) + _nullable(key) + _nullable(value) + varint(len(headers))
    content += b"".join(varint(len(n)) + n + _nullable(v) for n, v in headers)
    return varint(len(content)) + content


def _nullable(content: bytes | None) -> bytes:
    return varint(-1) if content is None else varint(len(content)) + content


def batch(records: bytes, count: int, codec: int = 0) -> bytes:
    """A batch of `count` records, whose `records` are compressed already."""
    head: list[Any] = [0, HEAD.size - 12 + len(records), -1, 2, 0, codec, count - 1]
    made = bytearray(HEAD.pack(*head, 1000, 1000, -1, -1, -1, count) + records)
    crc: int = google_crc32c.value(bytes(made[21:]))
    struct.pack_into(">I", made, 17, crc)
    return bytes(made)


def lz4() -> Any:
    """Kafka reads no linked blocks."""
    return cramjam.lz4.Compressor(content_checksum=False, block_linked=False)


def xerial(records: bytes) -> bytes:
    """Snappy in the blocks of the Java library."""
    blocks = [bytes(cramjam.snappy.compress_raw(records[n : n + 32768])) for n in
              range(0, len(records), 32768)]  # fmt: skip
    return b"\x82SNAPPY\0\0\0\0\1\0\0\0\1" + b"".join(
        struct.pack(">I", len(block)) + block for block in blocks
    )


PACK: dict[int, Callable[[bytes], bytes]] = {
    0: lambda records: records,
    GZIP: lambda records: bytes(cramjam.gzip.compress(records)),
    SNAPPY: xerial,
    LZ4: lz4_encode,
    ZSTD: lambda records: bytes(cramjam.zstd.compress(records)),
}


def bomb(codec: int, size: int) -> bytes:
    """A batch of one record whose value is `size` zeros."""
    plain = varint(size)
    content = b"\0\0\0" + varint(-1) + plain
    head = varint(len(content) + size + 1) + content
    if codec == SNAPPY:  # has no stream of its own; blocks of zeros are all alike
        block = bytes(cramjam.snappy.compress_raw(CHUNK))
        parts = [bytes(cramjam.snappy.compress_raw(head))] + [block] * (size // len(CHUNK))
        parts.append(bytes(cramjam.snappy.compress_raw(bytes(size % len(CHUNK)) + b"\0")))
        packed = b"\x82SNAPPY\0\0\0\0\1\0\0\0\1"
        packed += b"".join(struct.pack(">I", len(part)) + part for part in parts)
        return batch(packed, 1, codec)
    stream: Any = {GZIP: cramjam.gzip.Compressor, LZ4: lz4, ZSTD: cramjam.zstd.Compressor}[codec]()
    stream.compress(head)
    for _ in range(size // len(CHUNK)):
        stream.compress(CHUNK)
    stream.compress(bytes(size % len(CHUNK)) + b"\0")  # and no headers
    return batch(bytes(stream.finish()), 1, codec)


_NOT_YET = {NotLeaderForPartitionError.errno, UnknownTopicOrPartitionError.errno}


async def send_batch(servers: str, topic: str, made: bytes, partition: int = 0) -> None:
    """Produce the bytes as they are, to the only broker. Raises its refusal.

    A topic just created is in the metadata a moment before its broker leads it: for so long the
    batch is refused as one for another leader, and sent again.
    """
    client = AIOKafkaClient(bootstrap_servers=servers)
    await client.bootstrap()
    try:
        await client._wait_on_metadata(topic)
        (broker,) = (b.nodeId for b in client.cluster.brokers())
        async with asyncio.timeout(30):
            while True:
                request = ProduceRequest(None, -1, 60_000, [(topic, [(partition, made)])])
                response = await client.send(broker, request)
                ((_, ((_, code, *_),)),) = response.topics
                if code not in (
                    NotLeaderForPartitionError.errno,
                    UnknownTopicOrPartitionError.errno,
                ):
                    break
                await asyncio.sleep(0.1)
    finally:
        await client.close()
    if code:
        raise for_code(code)
