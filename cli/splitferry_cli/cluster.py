"""What the commands ask of Kafka: topics and their settings, offsets, records."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from typing import Any, TypeAlias

from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.errors import (
    GroupCoordinatorNotAvailableError,
    GroupLoadInProgressError,
    NoError,
    NotCoordinatorForGroupError,
    TopicAlreadyExistsError,
    UnknownTopicOrPartitionError,
    for_code,
)
from aiokafka.structs import OffsetAndMetadata
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_delay, wait_fixed

from splitferry_protocol.connection import ConnectionSettings

from .topic_rules import Topic

Record: TypeAlias = "ConsumerRecord[bytes | None, bytes | None]"
POLL_MS = 500
FETCH_BYTES = 4 * 1024 * 1024
COORDINATOR_SECONDS = 15
_COORDINATOR_MOVES = (
    GroupCoordinatorNotAvailableError,
    GroupLoadInProgressError,
    NotCoordinatorForGroupError,
)


class Cluster:
    """An administrator's connection. Every method raises aiokafka's KafkaError."""

    def __init__(self, client: AIOKafkaAdminClient) -> None:
        self._client = client

    async def topics(self, names: Sequence[str]) -> dict[str, Topic]:
        """Those of the named topics that exist (and that this user may see)."""
        # Asked for by name, a topic would be created on the spot where the broker allows it.
        found = {
            topic["topic"]: topic["partitions"]
            for topic in await self._client.describe_topics()
            if topic["topic"] in names
        }
        settings: dict[str, dict[str, str]] = {}
        resources = [ConfigResource(ConfigResourceType.TOPIC, name) for name in found]
        answers: list[Any] = await self._client.describe_configs(resources) if found else []
        for response in answers:
            for code, message, _, name, entries in response.resources:
                _check(code, f"{name}: {message}")
                settings[name] = {entry[0]: entry[1] for entry in entries}
        return {
            name: Topic(name, len(parts), min(len(p["replicas"]) for p in parts), settings[name])
            for name, parts in found.items()
        }

    async def partitions(self, topic: str) -> int:
        """How many partitions `topic` has. Raises UnknownTopicOrPartitionError."""
        for found in await self._client.describe_topics():
            if found["topic"] == topic:
                return len(found["partitions"])
        raise UnknownTopicOrPartitionError(f"topic {topic} does not exist")

    async def create(
        self, name: str, partitions: int, replication: int, settings: Mapping[str, str]
    ) -> bool:
        """Create a topic; False: it was there. `replication` -1 is the broker's default."""
        # aiokafka takes a -1 only together with an assignment, be it an empty one.
        assignment: dict[int, int] | None = {} if replication == -1 else None
        topic = NewTopic(name, partitions, replication, assignment, dict(settings))
        response: Any = await self._client.create_topics([topic])
        for answer in response.topic_errors:
            if for_code(answer[1]) is TopicAlreadyExistsError:
                return False
            _check(answer[1], f"{name}: {answer[2]}")
        return True

    async def delete(self, names: Sequence[str]) -> None:
        """Delete the topics that are there."""
        response: Any = await self._client.delete_topics(list(names))
        for name, code in response.topic_error_codes:
            if for_code(code) is not UnknownTopicOrPartitionError:
                _check(code, name)

    async def committed(self, group: str, topic: str) -> dict[int, int]:
        """The group's committed offset by partition, where there is one."""
        offsets: dict[TopicPartition, OffsetAndMetadata] = {}
        # A cluster that has had no group yet first makes the topic for their offsets.
        async for attempt in AsyncRetrying(
            retry=retry_if_exception_type(_COORDINATOR_MOVES),
            stop=stop_after_delay(COORDINATOR_SECONDS),
            wait=wait_fixed(0.2),
            reraise=True,
        ):
            with attempt:
                offsets = await self._client.list_consumer_group_offsets(group)
        return {
            where.partition: held.offset
            for where, held in offsets.items()
            if where.topic == topic and held.offset >= 0
        }


def _check(code: int, message: str) -> None:
    kind = for_code(code)
    if kind is not NoError:
        raise kind(message)


@contextlib.asynccontextmanager
async def administration(connection: ConnectionSettings) -> AsyncIterator[Cluster]:
    """Connect as an administrator for the length of the context."""
    client = AIOKafkaAdminClient(**await asyncio.to_thread(connection.client_options))
    try:
        await client.start()
        yield Cluster(client)
    finally:
        await client.close()


@contextlib.asynccontextmanager
async def _reader(
    connection: ConnectionSettings, wanted: Sequence[TopicPartition]
) -> AsyncIterator[AIOKafkaConsumer]:
    """A read_committed reader of these partitions, outside any group."""
    consumer = AIOKafkaConsumer(
        **await asyncio.to_thread(connection.client_options),
        isolation_level="read_committed",
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        max_partition_fetch_bytes=FETCH_BYTES,
    )
    try:
        await consumer.start()
        consumer.assign(wanted)
        yield consumer
    finally:
        await consumer.stop()


async def ends(
    connection: ConnectionSettings, topic: str, partitions: Sequence[int]
) -> dict[int, int]:
    """Where the committed part of each partition ends."""
    wanted = [TopicPartition(topic, partition) for partition in partitions]
    async with _reader(connection, wanted) as consumer:
        found = await consumer.end_offsets(wanted)
    return {where.partition: end for where, end in found.items()}


async def records(
    connection: ConnectionSettings,
    topic: str,
    partitions: Sequence[int],
    starts: Mapping[int, int] | None = None,
) -> AsyncGenerator[Record]:
    """All committed records of the partitions as they stand now, in offset order in each.

    Args:
        starts: first offset to read, by partition; from the beginning where there is none.
    """
    wanted = [TopicPartition(topic, partition) for partition in partitions]
    async with _reader(connection, wanted) as consumer:
        first = await consumer.beginning_offsets(wanted)
        end = await consumer.end_offsets(wanted)
        for where in wanted:
            consumer.seek(where, max(first[where], (starts or {}).get(where.partition, 0)))
        left = set(wanted)
        while left := {where for where in left if await consumer.position(where) < end[where]}:
            for batch in (await consumer.getmany(*left, timeout_ms=POLL_MS)).values():
                for record in batch:
                    yield record


async def follow(
    connection: ConnectionSettings, topic: str, partition: int, start: int
) -> AsyncGenerator[Record]:
    """Committed records of one partition from the offset `start` on, without end."""
    where = TopicPartition(topic, partition)
    async with _reader(connection, [where]) as consumer:
        consumer.seek(where, start)
        while True:
            for batch in (await consumer.getmany(where, timeout_ms=POLL_MS)).values():
                for record in batch:
                    yield record
