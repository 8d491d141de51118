"""aiokafka's idempotent producer, with the bytes copied once and Kafka's checksum in hardware.

aiokafka builds a batch by copying, sums it up in software, and copies it again in each layer of
the request. Here a batch stays in parts until the request is put together. And a broker may have
a request of each partition under way, where aiokafka has one for all: while the broker works on
one, the next is made. A partition still has a single one, so its order and sequence are aiokafka's.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import google_crc32c
from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.producer.message_accumulator import MessageAccumulator
from aiokafka.producer.sender import Sender, SendProduceReqHandler
from aiokafka.protocol.api import Request
from aiokafka.protocol.produce import ProduceRequest_v7
from aiokafka.protocol.types import Int16, Int32, String

_PREAMBLE = struct.Struct(">qiibI")
"""Base offset, length behind it, leader's epoch, magic, checksum of what follows."""
_HEAD = struct.Struct(">hiqqqhii")
"""Attributes, last offset, first and last timestamp, producer's id and epoch, sequence, count."""
_UNSEEN = _PREAMBLE.size - struct.calcsize(">qi")
"""Bytes of the preamble that count in its length."""
_TEXT = String("utf-8")


class Place(NamedTuple):
    """What aiokafka remembers of a record until its batch is confirmed."""

    offset: int
    """In the batch."""
    timestamp: int
    """Unix time in ms."""


class RecordBatch:
    """A batch as Kafka's format 2 has it, not compressed; stands where aiokafka's builder does.

    All its records have the time at which it was begun.

    Args:
        limit: bytes. A first record may be larger; no other is appended then.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._records: list[bytes] = []
        self._count = 0
        self._size = _PREAMBLE.size + _HEAD.size
        self._producer = (-1, -1, -1)
        self._timestamp = time.time_ns() // 1_000_000
        self._closed = False

    def append(
        self,
        *,
        timestamp: int | None,
        key: bytes,
        value: bytes,
        headers: Sequence[tuple[str, bytes]] = (),
    ) -> Place | None:
        """Add a record; None when it is full. `timestamp` is not used."""
        before = b"\0\0%b%b%b%b" % (
            _varint(self._count),
            _varint(len(key)),
            key,
            _varint(len(value)),
        )
        after = _varint(len(headers)) + b"".join(
            b"%b%b%b%b" % (_varint(len(name)), name, _varint(len(content)), content)
            for name, content in ((name.encode(), content) for name, content in headers)
        )
        length = len(before) + len(value) + len(after)
        before = _varint(length) + before
        size = len(before) + len(value) + len(after)
        if self._closed or (self._count and self._size + size > self._limit):
            self._closed = True
            return None
        self._records += (before, value, after)
        self._size += size
        self._count += 1
        return Place(self._count - 1, self._timestamp)

    def parts(self) -> Iterable[bytes]:
        """The batch, whose length is `size()`."""
        head = _HEAD.pack(
            0, self._count - 1, self._timestamp, self._timestamp, *self._producer, self._count
        )
        checksum = google_crc32c.value(head)
        for part in self._records:
            checksum = google_crc32c.extend(checksum, part)
        length = self._size - _PREAMBLE.size + _UNSEEN
        return (_PREAMBLE.pack(0, length, 0, 2, checksum), head, *self._records)

    def size(self) -> int:
        return self._size

    def record_count(self) -> int:
        return self._count

    def close(self) -> None:
        self._closed = True

    def closed(self) -> bool:
        return self._closed

    def _set_producer_state(self, producer_id: int, epoch: int, sequence: int) -> None:
        self._producer = (producer_id, epoch, sequence)

    def _build(self) -> RecordBatch:
        """Called for each try."""
        self._closed = True
        return self


def _varint(number: int) -> bytes:
    """`number` >= 0 as Kafka's records have it: zigzag, seven bits to a byte, the lowest first."""
    number <<= 1
    if number < 0x80:
        return bytes((number,))
    made = bytearray()
    while number >= 0x80:
        made.append(number & 0x7F | 0x80)
        number >>= 7
    made.append(number)
    return bytes(made)


class _Produce(ProduceRequest_v7):
    """The request on the wire, put together in one step."""

    timeout: int
    topics: Sequence[tuple[str, Sequence[tuple[int, RecordBatch]]]]

    def encode(self) -> bytes:
        parts = [
            _TEXT.encode(None),  # not transactional
            Int16.encode(-1),  # acknowledged by all replicas in sync
            Int32.encode(self.timeout),
            Int32.encode(len(self.topics)),
        ]
        for topic, batches in self.topics:
            parts += (_TEXT.encode(topic), Int32.encode(len(batches)))
            for partition, batch in batches:
                parts += (Int32.encode(partition), Int32.encode(batch.size()), *batch.parts())
        return b"".join(parts)


class _ProduceRequest(Request[_Produce]):
    API_KEY = _Produce.API_KEY
    required_acks = -1

    def __init__(self, timeout: int, topics: Sequence[tuple[str, Any]]) -> None:
        self._timeout = timeout
        self._topics = topics

    def build(self, request_struct_class: type[_Produce]) -> _Produce:
        return request_struct_class(None, self.required_acks, self._timeout, self._topics)


class _Handler(SendProduceReqHandler):
    def create_request(self) -> _ProduceRequest:
        topics: dict[str, list[tuple[int, RecordBatch]]] = {}
        for where, batch in self._batches.items():
            topics.setdefault(where.topic, []).append((where.partition, batch.get_data_buffer()))
        return _ProduceRequest(self._sender._request_timeout_ms, list(topics.items()))


class _Sender(Sender):
    async def _send_produce_req(self, node_id: int, batches: Mapping[TopicPartition, Any]) -> None:
        self._in_flight.discard(node_id)  # other partitions need not wait
        handler: SendProduceReqHandler = _Handler(self, batches)  # type: ignore[no-untyped-call]
        await handler.do(node_id)
        self._muted_partitions.difference_update(batches)


class _Accumulator(MessageAccumulator):
    def create_builder(self, key_serializer: None = None, value_serializer: None = None) -> Any:
        return RecordBatch(self._batch_size)


def idempotent_producer(**options: Any) -> AIOKafkaProducer:
    """A producer that waits for all replicas in sync, and takes no compression, transactions or
    serializers."""
    producer = AIOKafkaProducer(enable_idempotence=True, acks="all", **options)
    # It makes both itself; they are not started yet, and these keep nothing of their own.
    producer._message_accumulator.__class__ = _Accumulator
    producer._sender.__class__ = _Sender
    return producer
