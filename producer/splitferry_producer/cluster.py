"""What a producer asks the brokers before it sends, and what their errors mean to people."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from aiokafka import errors as kafka
from aiokafka.client import AIOKafkaClient
from aiokafka.conn import create_conn
from aiokafka.protocol.admin import DescribeConfigsRequest
from aiokafka.protocol.metadata import MetadataRequest

from splitferry_protocol.connection import ConnectionSettings
from splitferry_protocol.reach import why_unreachable
from splitferry_protocol.rights import Right

from .errors import (
    LoginRefused,
    MissingRights,
    NoBroker,
    ProducerError,
    UnknownTopic,
)

START_TIMEOUT = 30.0
"""Seconds to connect and to be told about topics."""
ATTEMPT_TIMEOUT = 5.0
"""Seconds for another try at a server, to learn what is wrong with it."""
_TOPIC = 2  # the resource type in DescribeConfigs


@dataclass(frozen=True, slots=True)
class TopicFacts:
    """Attributes: `max_message_bytes`, None where this user is not told."""

    partitions: int
    max_message_bytes: int | None


async def client_options(connection: ConnectionSettings) -> dict[str, Any]:
    """For any aiokafka client. Raises ProducerError."""
    try:
        return await asyncio.to_thread(connection.client_options)
    except OSError as error:
        raise ProducerError(f"the certificate files cannot be used: {error}") from error


async def inspect(options: Mapping[str, Any], wanted: Right) -> TopicFacts:
    """Ask about a topic, without ever creating it.

    Args:
        options: of `ConnectionSettings.client_options`.
        wanted: what is to be done with the topic. That includes the right to ask.

    Raises:
        NoBroker, LoginRefused, UnknownTopic, MissingRights
    """
    topic = wanted.name
    async with explained(options, wanted), asyncio.timeout(START_TIMEOUT):
        client = AIOKafkaClient(**options)
        try:
            await client.bootstrap()
            # By default, asking for a topic by name creates it where the broker allows that.
            metadata: Any = await client.send(
                client.get_random_node(), MetadataRequest([topic], allow_auto_topic_creation=False)
            )
            ((code, *_, partitions),) = metadata.topics
            if code:
                raise kafka.for_code(code)(topic)
            request = DescribeConfigsRequest([(_TOPIC, topic, ["max.message.bytes"])])
            settings: Any = await client.send(client.get_random_node(), request)
            ((code, *_, entries),) = settings.resources
            return TopicFacts(len(partitions), None if code else int(entries[0][1]))
        finally:
            await client.close()


@asynccontextmanager
async def explained(options: Mapping[str, Any], wanted: Right) -> AsyncIterator[None]:
    """Turn errors of the block into ProducerError. `wanted`: what it does, on which topic."""
    servers = options["bootstrap_servers"]
    try:
        yield
    except kafka.KafkaConnectionError as error:
        raise await _diagnosed(options) from error
    except TimeoutError as error:
        raise NoBroker(
            f"no broker of {servers} answered in time: check the address, and that it is up"
        ) from error
    except kafka.KafkaError as error:
        raise explain(error, servers, wanted) from error


async def _diagnosed(options: Mapping[str, Any]) -> ProducerError:
    """Why none of the bootstrap servers could be used; aiokafka only logs it."""
    bound = partial(asyncio.timeout, ATTEMPT_TIMEOUT)
    message, login = await why_unreachable(options, create_conn, MetadataRequest([]), bound)
    return LoginRefused(message) if login else NoBroker(message)


def explain(error: BaseException | None, servers: str, wanted: Right) -> ProducerError:
    """The typed error for one of aiokafka's; `wanted` is what was done, on which topic."""
    topic = wanted.name
    match error:
        case ProducerError():
            return error
        case kafka.TopicAuthorizationFailedError():
            return MissingRights(wanted)
        case kafka.ClusterAuthorizationFailedError():
            # Who may write to a topic may do so idempotently, and who may not is told that the
            # cluster refuses it.
            return MissingRights(
                wanted, "; a broker before Kafka 2.8 wants IdempotentWrite on cluster, too"
            )
        case kafka.UnknownTopicOrPartitionError() | kafka.InvalidTopicError():
            return UnknownTopic(topic)
        case (
            kafka.SaslAuthenticationFailed()
            | kafka.AuthenticationFailedError()
            | kafka.UnsupportedSaslMechanismError()
            | kafka.AuthenticationMethodNotSupported()
            | kafka.IllegalSaslStateError()
        ):
            return LoginRefused(
                f"the broker refuses the login ({error}): check the user name, the password "
                "and the SASL mechanism"
            )
        case (
            kafka.KafkaConnectionError()
            | kafka.NodeNotReadyError()
            | kafka.RequestTimedOutError()
            | kafka.KafkaTimeoutError()
        ):
            return NoBroker(f"no broker of {servers} answers ({error}): check that it is up")
    return ProducerError(f"topic {topic} cannot be used now: {said(error)}; try again")


def said(error: BaseException | None) -> str:
    return str(error) or type(error).__name__
