"""The broker and the topics that the other tests get are what the contract needs."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition

from brokers import DEAD_LETTERS_BYTES, Topics
from splitferry_protocol.records import HEADER_MAX, PAYLOAD_MAX


async def test_topics_take_the_largest_records(
    bootstrap_servers: str, topics: Callable[..., Awaitable[Topics]]
) -> None:
    names = await topics(partitions=2)
    value = os.urandom(PAYLOAD_MAX + HEADER_MAX)
    async with AIOKafkaProducer(
        bootstrap_servers=bootstrap_servers,
        transactional_id=names.splits,
        max_request_size=DEAD_LETTERS_BYTES,
    ) as producer:
        async with producer.transaction():
            await producer.send_and_wait(names.splits, value, partition=1)
            letter = [("why", b"x" * 60_000)]
            await producer.send_and_wait(names.dead_letters, value, partition=0, headers=letter)
        # A consumer in a group with a session as short as tests want it.
        async with AIOKafkaConsumer(
            names.splits,
            bootstrap_servers=bootstrap_servers,
            group_id=names.splits,
            session_timeout_ms=1000,
            heartbeat_interval_ms=300,
            isolation_level="read_committed",
            auto_offset_reset="earliest",
        ) as consumer:
            record = await consumer.getone()
            assert record.value == value
            assert consumer.assignment() == {TopicPartition(names.splits, p) for p in range(2)}
