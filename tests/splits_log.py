"""What lies on a splits topic, as the contract reads it."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from aiokafka import AIOKafkaConsumer, TopicPartition

from brokers import Topics
from splitferry_protocol.codec import decode_record
from splitferry_protocol.ids import RequestId
from splitferry_protocol.records import Abort, Split


async def read(servers: str, topic: str) -> AsyncGenerator[tuple[int, Split | Abort], None]:
    """Every record of the splits topic with its partition, for ever; each obeys the contract."""
    async with AIOKafkaConsumer(
        topic,
        bootstrap_servers=servers,
        auto_offset_reset="earliest",
        metadata_max_age_ms=200,
        fetch_max_wait_ms=50,
    ) as consumer:
        async for record in consumer:
            yield record.partition, decode_record(record.key, record.value, record.headers)


async def first_split(servers: str, topics: Topics) -> Split:
    async with aclosing(read(servers, topics.splits)) as records:
        _, split = await anext(records)
        assert isinstance(split, Split)
        return split


async def logged(servers: str, topics: Topics, request: RequestId | None = None) -> list[Any]:
    """(partition, record) of all that lies on the splits topic now, payloads as bytes."""
    async with AIOKafkaConsumer(bootstrap_servers=servers, auto_offset_reset="earliest") as reader:
        partitions = await reader._client._wait_on_metadata(topics.splits)
        wanted = [TopicPartition(topics.splits, partition) for partition in partitions]
        reader.assign(wanted)
        ends = await reader.end_offsets(wanted)
        found = []
        for where in wanted:
            while await reader.position(where) < ends[where]:
                for record in (await reader.getmany(where, timeout_ms=500)).get(where, []):
                    made = decode_record(record.key, record.value, record.headers)
                    if isinstance(made, Split):
                        made = made._replace(payload=bytes(made.payload))
                    if request in (None, made.request):
                        found.append((where.partition, made))
        return found
