"""What a record may hold (WIRE, "Values"), asked of records on their way out and in alike.

One set of rules for both directions: a producer cannot send what a consumer refuses.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .ids import U32_MAX, U64_MAX, RequestId
from .records import (
    GROUP_MAX,
    LABELS_BYTES_MAX,
    LABELS_MAX,
    PAYLOAD_MAX,
    REASON_MAX,
    REPLY_MAX,
    SHA256_SIZE,
    TARGET_MAX,
    TOPIC_MAX,
    UNIQUE_ID_MAX,
    Abort,
    Accepted,
    Block,
    Result,
    Split,
    Status,
)

TARGETS = (frozenset({"path"}), frozenset({"shm", "host"}))
"""The keys of a `target` map: a file's, or a memory segment's."""


def check(record: Split | Abort | Result | Accepted) -> None:
    """Raises ValueError naming the field that breaks the contract."""
    RequestId.from_wire(list(record.request))
    match record:
        case Split():
            _check_split(record)
        case Abort():
            text("reason", record.reason, 0, REASON_MAX)
        case Result():
            _check_result(record)
        case Accepted():
            text("group", record.group, 1, GROUP_MAX)
            integer("index", record.index, U64_MAX)
            binary("reply", record.reply, 1, REPLY_MAX)


def _check_split(split: Split) -> None:
    _check_item(split.unique_id, split.version, split.block, split.labels)
    integer("index", split.index, U64_MAX)
    integer("offset", split.offset, U64_MAX)
    if split.total is not None:
        integer("total", split.total, U64_MAX)
    if split.sha256 is not None:
        binary("sha256", split.sha256, SHA256_SIZE, SHA256_SIZE)
    if split.reply is not None:
        binary("reply", split.reply, 1, REPLY_MAX)
    payload: object = split.payload
    if not isinstance(payload, bytes | bytearray | memoryview) or (
        isinstance(payload, memoryview)
        and not (payload.contiguous and payload.ndim == payload.itemsize == 1)
    ):
        raise ValueError("payload: neither bytes nor a flat, contiguous view of bytes")
    if len(payload) > PAYLOAD_MAX:
        raise ValueError(f"payload: {len(payload)} bytes, the limit is {PAYLOAD_MAX}")
    if split.end > U64_MAX:
        raise ValueError("offset: the payload ends beyond the largest u64")


def _check_result(result: Result) -> None:
    _check_item(result.unique_id, result.version, result.block, result.labels)
    text("group", result.group, 1, GROUP_MAX)
    if not isinstance(result.status, Status):
        raise ValueError("status: not one of the contract's")
    if (result.error is None) is not result.success:
        raise ValueError("error: given exactly when the status is not completed")
    if result.size is not None:
        integer("size", result.size, U64_MAX)
    if result.sha256 is not None:
        binary("sha256", result.sha256, SHA256_SIZE, SHA256_SIZE)
    if result.target is not None:
        if result.target.keys() not in TARGETS:
            raise ValueError("target: holds neither path nor shm with host")
        for name, value in result.target.items():
            text(f"target.{name}", value, 1, TARGET_MAX)
    integer("splits", result.splits, U64_MAX)
    integer("duplicates", result.duplicates, U64_MAX)
    text("input.topic", result.input.topic, 1, TOPIC_MAX)
    integer("input.partition", result.input.partition, U32_MAX)
    integer("input.last", result.input.last, U64_MAX)
    integer("input.first", result.input.first, result.input.last)
    if result.reply is not None:
        binary("reply", result.reply, 1, REPLY_MAX)
    if type(result.repeat) is not bool:
        raise ValueError("repeat: not a boolean")
    integer("finished_at", result.finished_at, U64_MAX)


def _check_item(unique_id: Any, version: Any, block: Any, labels: Any) -> None:
    text("unique_id", unique_id, 1, UNIQUE_ID_MAX)
    integer("version", version, U64_MAX)
    if not isinstance(block, Block):
        raise ValueError("block: neither file nor mem")
    if labels is None:
        return
    if not isinstance(labels, Mapping) or len(labels) > LABELS_MAX:
        raise ValueError(f"labels: not a map of at most {LABELS_MAX} pairs")
    size = sum(
        text("labels", part, 0, LABELS_BYTES_MAX) for pair in labels.items() for part in pair
    )
    if size > LABELS_BYTES_MAX:
        raise ValueError(f"labels: {size} bytes, the limit is {LABELS_BYTES_MAX}")


def integer(field: str, value: Any, maximum: int) -> None:
    if type(value) is not int:  # a bool is an int too, but not here
        raise ValueError(f"{field}: not an integer")
    if not 0 <= value <= maximum:
        raise ValueError(f"{field}: {value} is not from 0 to {maximum}")


def text(field: str, value: Any, minimum: int, maximum: int) -> int:
    """Check a string and its length in bytes of UTF-8; returns that length."""
    if not isinstance(value, str):
        raise ValueError(f"{field}: not a string")
    try:
        size = len(value.encode())
    except UnicodeEncodeError:
        raise ValueError(f"{field}: not valid UTF-8") from None
    if not minimum <= size <= maximum:
        raise ValueError(f"{field}: {size} bytes, allowed are {minimum} to {maximum}")
    return size


def binary(field: str, value: Any, minimum: int, maximum: int) -> None:
    if not isinstance(value, bytes):
        raise ValueError(f"{field}: not binary")
    if not minimum <= len(value) <= maximum:
        raise ValueError(f"{field}: {len(value)} bytes, allowed are {minimum} to {maximum}")
