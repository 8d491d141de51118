"""Requests that aiokafka does not have, or not in the version that is needed."""

from __future__ import annotations

from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Sequence
from io import BytesIO
from typing import Any

from aiokafka.protocol.abstract import AbstractType
from aiokafka.protocol.api import Request, RequestStruct, Response
from aiokafka.protocol.types import (
    Boolean,
    CompactArray,
    CompactString,
    Int16,
    Int32,
    Int64,
    Schema,
    TaggedFields,
)
from aiokafka.structs import TopicPartition


class _Uuid(AbstractType[str]):
    """In the form that Kafka's tools show."""

    @classmethod
    def encode(cls, value: str) -> bytes:
        return urlsafe_b64decode(value + "==")

    @classmethod
    def decode(cls, data: BytesIO) -> str:
        return urlsafe_b64encode(data.read(16)).decode().rstrip("=")


class _TopicResponse(Response):
    API_KEY = 3
    API_VERSION = 12
    SCHEMA = Schema(
        ("throttle_time_ms", Int32),
        (
            "brokers",
            CompactArray(
                ("node_id", Int32),
                ("host", CompactString()),
                ("port", Int32),
                ("rack", CompactString()),
                ("tags", TaggedFields),
            ),
        ),
        ("cluster_id", CompactString()),
        ("controller_id", Int32),
        (
            "topics",
            CompactArray(
                ("error_code", Int16),
                ("name", CompactString()),
                ("id", _Uuid),
                ("is_internal", Boolean),
                (
                    "partitions",
                    CompactArray(
                        ("error_code", Int16),
                        ("partition", Int32),
                        ("leader", Int32),
                        ("leader_epoch", Int32),
                        ("replicas", CompactArray(Int32)),
                        ("isr", CompactArray(Int32)),
                        ("offline_replicas", CompactArray(Int32)),
                        ("tags", TaggedFields),
                    ),
                ),
                ("authorized_operations", Int32),
                ("tags", TaggedFields),
            ),
        ),
        ("tags", TaggedFields),
    )


class _TopicRequest(RequestStruct):
    """Metadata of version 12 (Kafka 2.8 and later)."""

    FLEXIBLE_VERSION = True
    API_KEY = 3
    API_VERSION = 12
    RESPONSE_TYPE = _TopicResponse
    SCHEMA = Schema(
        ("topics", CompactArray(("id", _Uuid), ("name", CompactString()), ("tags", TaggedFields))),
        ("allow_auto_topic_creation", Boolean),
        ("include_authorized_operations", Boolean),
        ("tags", TaggedFields),
    )


class DescribeTopics(Request[_TopicRequest]):
    API_KEY = 3

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names

    def build(self, request_struct_class: type[_TopicRequest]) -> _TopicRequest:
        topics: list[tuple[str, str, dict[int, bytes]]]
        topics = [("A" * 22, name, {}) for name in self._names]
        return request_struct_class(topics, False, False, {})


_PARTITIONS = (
    "topics",
    CompactArray(
        ("name", CompactString()),
        ("partitions", CompactArray(Int32)),
        ("tags", TaggedFields),
    ),
)
"""Which partitions a request is about."""


def _of(tp: TopicPartition) -> list[tuple[Any, ...]]:
    """One of them."""
    return [(tp.topic, [tp.partition], {})]


class _OffsetResponse(Response):
    API_KEY = 9
    API_VERSION = 7
    SCHEMA = Schema(
        ("throttle_time_ms", Int32),
        (
            "topics",
            CompactArray(
                ("name", CompactString()),
                (
                    "partitions",
                    CompactArray(
                        ("partition", Int32),
                        ("offset", Int64),
                        ("leader_epoch", Int32),
                        ("metadata", CompactString()),
                        ("error_code", Int16),
                        ("tags", TaggedFields),
                    ),
                ),
                ("tags", TaggedFields),
            ),
        ),
        ("error_code", Int16),
        ("tags", TaggedFields),
    )


class _OffsetRequest(RequestStruct):
    """OffsetFetch of version 7 (Kafka 2.5 and later), which can ask for stable offsets."""

    FLEXIBLE_VERSION = True
    API_KEY = 9
    API_VERSION = 7
    RESPONSE_TYPE = _OffsetResponse
    SCHEMA = Schema(
        ("group", CompactString()),
        _PARTITIONS,
        ("require_stable", Boolean),
        ("tags", TaggedFields),
    )


class FetchOffset(Request[_OffsetRequest]):
    """Asks for what is committed, and nothing else.

    Not asked for `stable` offsets, a coordinator answers from the last state that it knows to be on
    all its replicas. After a failover that may be older than what the group was told of its
    last commit: P would be old, and what rests on it would be told twice.
    """

    API_KEY = 9

    def __init__(self, group: str, tp: TopicPartition, stable: bool) -> None:
        self._group = group
        self._tp = tp
        self._stable = stable

    def build(self, request_struct_class: type[_OffsetRequest]) -> _OffsetRequest:
        return request_struct_class(self._group, _of(self._tp), self._stable, {})


class _ProducersResponse(Response):
    API_KEY = 61
    API_VERSION = 0
    SCHEMA = Schema(
        ("throttle_time_ms", Int32),
        (
            "topics",
            CompactArray(
                ("name", CompactString()),
                (
                    "partitions",
                    CompactArray(
                        ("partition", Int32),
                        ("error_code", Int16),
                        ("error_message", CompactString()),
                        (
                            "producers",
                            CompactArray(
                                ("id", Int64),
                                ("epoch", Int32),
                                ("last_sequence", Int32),
                                ("last_timestamp", Int64),
                                ("coordinator_epoch", Int32),
                                ("transaction_start", Int64),
                                ("tags", TaggedFields),
                            ),
                        ),
                        ("tags", TaggedFields),
                    ),
                ),
                ("tags", TaggedFields),
            ),
        ),
        ("tags", TaggedFields),
    )


class _ProducersRequest(RequestStruct):
    """DescribeProducers of version 0 (Kafka 2.8 and later)."""

    FLEXIBLE_VERSION = True
    API_KEY = 61
    API_VERSION = 0
    RESPONSE_TYPE = _ProducersResponse
    SCHEMA = Schema(
        _PARTITIONS,
        ("tags", TaggedFields),
    )


class DescribeProducers(Request[_ProducersRequest]):
    """Asks who writes a partition."""

    API_KEY = 61

    def __init__(self, tp: TopicPartition) -> None:
        self._tp = tp

    def build(self, request_struct_class: type[_ProducersRequest]) -> _ProducersRequest:
        return request_struct_class(_of(self._tp), {})
