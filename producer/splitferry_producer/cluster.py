"""What a producer asks the brokers before it sends, and what their errors mean to people."""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from aiokafka import errors as kafka
from aiokafka.client import AIOKafkaClient
from aiokafka.conn import collect_hosts, create_conn
from aiokafka.protocol.admin import DescribeConfigsRequest
from aiokafka.protocol.metadata import MetadataRequest

from .errors import (
    DeliveryFailed,
    LoginRefused,
    MissingRights,
    NoBroker,
    ProducerError,
    UnknownTopic,
)

START_TIMEOUT = 30.0
"""Seconds to connect and to be told about topics."""
_TOPIC = 2  # the resource type in DescribeConfigs


@dataclass(frozen=True, slots=True)
class TopicFacts:
    """Attributes: `max_message_bytes`, None where this user is not told."""

    partitions: int
    max_message_bytes: int | None


async def inspect(options: Mapping[str, Any], topic: str) -> TopicFacts:
    """Ask about a topic, without ever creating it.

    Args:
        options: of `ConnectionSettings.client_options`.

    Raises:
        NoBroker, LoginRefused, UnknownTopic, MissingRights
    """
    async with explained(options, "Describe", topic), asyncio.timeout(START_TIMEOUT):
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
async def explained(options: Mapping[str, Any], right: str, topic: str) -> AsyncIterator[None]:
    """Turn errors of the block into ProducerError. `right`: what it does, on which topic."""
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
        raise explain(error, servers, right, topic) from error


async def _diagnosed(options: Mapping[str, Any]) -> ProducerError:
    """Why none of the bootstrap servers could be used; aiokafka only logs it."""
    servers = options["bootstrap_servers"]
    causes = []
    for host, port, _ in collect_hosts(servers):
        try:
            settings = {k: v for k, v in options.items() if k != "bootstrap_servers"}
            connection = await create_conn(host, port, request_timeout_ms=5000, **settings)
        except ssl.SSLError as error:
            causes.append(f"TLS: {error.reason or error}")
        except OSError as error:
            known = error.errno is not None and error.errno > 0  # asyncio rewrites strerror
            causes.append(os.strerror(error.errno or 0) if known else error.strerror or str(error))
        except kafka.KafkaError as error:
            told = explain(error, servers, "Describe", "")
            if isinstance(told, LoginRefused):
                return told
            causes.append(str(error) or type(error).__name__)
        else:
            connection.close()
            causes.append("it took the connection but does not speak Kafka as it should")
    return NoBroker(
        f"no Kafka broker answers at {servers} ({'; '.join(dict.fromkeys(causes))}): "
        "start one, or name yours in bootstrap_servers"
    )


def explain(error: BaseException | None, servers: str, right: str, topic: str) -> ProducerError:
    """The typed error for one of aiokafka's; `right` is what was done, on which topic."""
    match error:
        case ProducerError():
            return error
        case kafka.TopicAuthorizationFailedError():
            return MissingRights(right, f"topic {topic}")
        case kafka.ClusterAuthorizationFailedError():
            return MissingRights("IdempotentWrite", "the cluster")
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
        case kafka.MessageSizeTooLargeError() | kafka.RecordListTooLargeError():
            return DeliveryFailed(
                f"topic {topic} does not take splits of this size any more: "
                "raise its max.message.bytes, or give a smaller split size"
            )
        case (
            kafka.KafkaConnectionError()
            | kafka.NodeNotReadyError()
            | kafka.RequestTimedOutError()
            | kafka.KafkaTimeoutError()
        ):
            return NoBroker(f"no broker of {servers} answers ({error}): check that it is up")
    said = str(error) or type(error).__name__
    return DeliveryFailed(f"Kafka did not take a record for topic {topic}: {said}; send it again")
