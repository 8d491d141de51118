"""What the commands ask of Kafka: topics and their settings, offsets, records."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.coordinator.protocol import ConsumerProtocolMemberAssignment
from aiokafka.errors import (
    GroupCoordinatorNotAvailableError,
    GroupLoadInProgressError,
    KafkaConnectionError,
    KafkaError,
    NoError,
    NotCoordinatorForGroupError,
    TopicAlreadyExistsError,
    UnknownTopicOrPartitionError,
    for_code,
)
from aiokafka.protocol.metadata import MetadataRequest
from aiokafka.structs import OffsetAndMetadata
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_delay, wait_fixed

from splitferry_consumer.fetching import Fetches, stop_consumer
from splitferry_consumer.inquiry import diagnosis
from splitferry_protocol.connection import ConnectionSettings
from splitferry_protocol.rights import GROUP, TOPIC, Right, missing_right

from .failures import Failure
from .topic_rules import Replicas, Topic

Record: TypeAlias = "ConsumerRecord[bytes | None, bytes | None]"
POLL_MS = 500
FETCH_BYTES = 4 * 1024 * 1024
COORDINATOR_SECONDS = 15
SILENCE = 30.0
"""Seconds without a record, where there are some, after which reading is given up."""
_COORDINATOR_MOVES = (
    GroupCoordinatorNotAvailableError,
    GroupLoadInProgressError,
    NotCoordinatorForGroupError,
)


@dataclass(frozen=True, slots=True)
class Members:
    """Who is in a group.

    Attributes:
        count: how many there are.
        owners: the address of the one that each partition of the topic is assigned to.
    """

    count: int
    owners: Mapping[int, str]


class Cluster:
    """An administrator's connection. Every method raises aiokafka's KafkaError, or the Failure
    that names the right which is missing."""

    def __init__(self, client: AIOKafkaAdminClient) -> None:
        self._client = client

    async def _metadata(self, *wanted: Right) -> dict[str, Any]:
        """Those of the topics that exist, each wanted for something that includes asking."""
        names = [right.name for right in wanted]
        # By default, asking for a topic by name creates it where the broker allows that.
        request = MetadataRequest(names, allow_auto_topic_creation=False)
        metadata: Any = await self._client._send_request(request)
        found = {topic["topic"]: topic for topic in metadata.to_object()["topics"]}
        for right in wanted:
            code = found[right.name]["error_code"]
            if for_code(code) is UnknownTopicOrPartitionError:
                del found[right.name]
            else:
                _check(code, right.name, right)
        return found

    async def topics(self, names: Sequence[str]) -> dict[str, Topic]:
        """Those of the named topics that exist."""
        metadata = await self._metadata(*(Right("Describe", TOPIC, name) for name in names))
        found = {name: topic["partitions"] for name, topic in metadata.items()}
        settings: dict[str, dict[str, str]] = {}
        resources = [ConfigResource(ConfigResourceType.TOPIC, name) for name in found]
        answers: list[Any] = await self._client.describe_configs(resources) if found else []
        for response in answers:
            for code, message, _, name, entries in response.resources:
                _check(code, f"{name}: {message}", Right("DescribeConfigs", TOPIC, name))
                settings[name] = {entry[0]: entry[1] for entry in entries}
        return {
            name: Topic(
                name,
                len(parts),
                min(len(part["replicas"]) for part in parts),
                settings[name],
                sorted(map(_replicas, parts), key=lambda one: one.partition),
            )
            for name, parts in found.items()
        }

    async def known_everywhere(self, names: Sequence[str]) -> bool:
        """Whether each broker tells that these topics exist, and who leads their partitions.

        Whoever asks next may ask any of them, and they learn of new topics one after the other.
        """
        brokers: Any = await self._client._send_request(MetadataRequest([]))
        for node, *_ in brokers.brokers:
            request = MetadataRequest(list(names), allow_auto_topic_creation=False)
            metadata: Any = await self._client._send_request(request, node)
            for topic in metadata.to_object()["topics"]:
                parts = topic["partitions"]
                if topic["error_code"] or any(part["leader"] < 0 for part in parts):
                    return False
        return True

    async def brokers(self) -> int:
        """How many brokers are up."""
        metadata: Any = await self._client._send_request(MetadataRequest([]))
        return len(metadata.brokers)

    async def partitions(self, topic: str, wanted: str = "Read") -> int:
        """How many partitions `topic` has. Raises UnknownTopicOrPartitionError.

        `wanted` is what is to be done with it, for which the right includes this question.
        """
        found = await self._metadata(Right(wanted, TOPIC, topic))
        if topic not in found:
            raise UnknownTopicOrPartitionError(f"topic {topic} does not exist")
        return len(found[topic]["partitions"])

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
            _check(answer[1], f"{name}: {answer[2]}", Right("Create", TOPIC, name))
        return True

    async def delete(self, names: Sequence[str]) -> None:
        """Delete the topics that are there."""
        response: Any = await self._client.delete_topics(list(names))
        for name, code in response.topic_error_codes:
            if for_code(code) is not UnknownTopicOrPartitionError:
                _check(code, name, Right("Delete", TOPIC, name))

    async def members(self, group: str, topic: str) -> Members:
        """Who is in `group` now."""
        asked = Right("Describe", GROUP, group)
        answer: Any = None
        async for attempt in _coordinator_found():
            with attempt, asking(asked):
                (response,) = await self._client.describe_consumer_groups([group])
                (answer,) = response.to_object()["groups"]
                _check(answer["error_code"], group, asked)
        owners = {
            partition: member["client_host"].removeprefix("/")
            for member in answer["members"]
            if member["member_assignment"]  # none yet while the group is in a rebalance
            for name, partitions in ConsumerProtocolMemberAssignment.decode(
                member["member_assignment"]
            ).assignment
            if name == topic
            for partition in partitions
        }
        return Members(len(answer["members"]), owners)

    async def committed(self, group: str, topic: str) -> dict[int, int]:
        """The group's committed offset by partition, where there is one."""
        offsets: dict[TopicPartition, OffsetAndMetadata] = {}
        async for attempt in _coordinator_found():
            with attempt, asking(Right("Describe", GROUP, group)):
                offsets = await self._client.list_consumer_group_offsets(group)
        return {
            where.partition: held.offset
            for where, held in offsets.items()
            if where.topic == topic and held.offset >= 0
        }


def _coordinator_found() -> AsyncRetrying:
    """Attempts to ask the coordinator of a group: a cluster that has had no group yet first makes
    the topic for their offsets."""
    return AsyncRetrying(
        retry=retry_if_exception_type(_COORDINATOR_MOVES),
        stop=stop_after_delay(COORDINATOR_SECONDS),
        wait=wait_fixed(0.2),
        reraise=True,
    )


def _replicas(partition: Mapping[str, Any]) -> Replicas:
    names = ("partition", "leader", "replicas", "isr")
    return Replicas(*(partition[name] for name in names))


def _check(code: int, message: str, asked: Right) -> None:
    kind = for_code(code)
    with asking(asked):
        if kind is not NoError:
            raise kind(message)


@contextlib.contextmanager
def asking(*asked: Right) -> Iterator[None]:
    """Turn the broker's refusal of one of the rights into the Failure that names it."""
    try:
        yield
    except KafkaError as error:
        if right := missing_right(error, *asked):
            raise Failure(right.missing) from error
        raise


@contextlib.asynccontextmanager
async def administration(connection: ConnectionSettings) -> AsyncIterator[Cluster]:
    """Connect as an administrator for the length of the context.

    Raises:
        Failure: no broker can be used; it says why.
    """
    options = await asyncio.to_thread(connection.client_options)
    client = AIOKafkaAdminClient(**options)
    try:
        try:
            await client.start()
        except KafkaConnectionError as error:
            raise Failure(await diagnosis(options)) from error
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
        check_crcs=False,  # mended batches do not keep Kafka's, and the contract has its own
    )
    # An operator's commands have to read on past whatever somebody has written.
    Fetches(consumer, FETCH_BYTES, mended=True)
    try:
        await consumer.start()
        consumer.assign(wanted)
        with asking(*(Right("Read", TOPIC, where.topic) for where in wanted)):
            yield consumer
    finally:
        await stop_consumer(consumer)


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
    if not wanted:
        return  # a reader stopped before its tasks have begun takes their end for a cancellation
    async with _reader(connection, wanted) as consumer:
        first = await consumer.beginning_offsets(wanted)
        end = await consumer.end_offsets(wanted)
        for where in wanted:
            consumer.seek(where, max(first[where], (starts or {}).get(where.partition, 0)))
        left = set(wanted)
        before, moved = dict[TopicPartition, int](), time.monotonic()
        while left := {where for where in left if await consumer.position(where) < end[where]}:
            for batch in (await consumer.getmany(*left, timeout_ms=POLL_MS)).values():
                for record in batch:
                    yield record
            now = {where: await consumer.position(where) for where in left}
            if now != before:
                before, moved = now, time.monotonic()
            elif time.monotonic() - moved > SILENCE:
                numbers = ", ".join(str(where.partition) for where in sorted(left))
                raise Failure(
                    f"nothing came of {topic}, partition {numbers}, for {SILENCE:g} s: see that "
                    "the brokers that lead it are up"
                )


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
