"""The records of the contract as values (WIRE, "Values"). No bytes here: see `codec`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

from .errors import WsDataError
from .ids import RequestId

VERSION = 1
"""The wire version this package speaks (header key `v`)."""

CRC_HEADER = "crc32c"

HEADER_MAX = 8 * 1024
"""Bytes of a value's msgpack header."""
NESTING_MAX = 4
"""Maps and arrays inside each other, the header itself counted."""
PAYLOAD_MAX = 16 * 1024 * 1024
"""Bytes of one split's payload."""
UNIQUE_ID_MAX = 512
"""Bytes of UTF-8."""
REPLY_MAX = 256
LABELS_MAX = 16
"""Pairs."""
LABELS_BYTES_MAX = 2 * 1024
"""Bytes of UTF-8 of all names and values together."""
REASON_MAX = 1024
"""Bytes of UTF-8 of an abort record's reason."""
SHA256_SIZE = 32
GROUP_MAX = 256
"""Bytes of UTF-8 of a consumer group's name."""
TOPIC_MAX = 249
"""Kafka's own limit on a topic's name, in bytes."""
TARGET_MAX = 512
"""Bytes of UTF-8 of each text in a result's `target` map."""


class Block(StrEnum):
    """Where an item goes: to a file below the consumer's root, or to memory."""

    FILE = "file"
    MEM = "mem"


class Status(StrEnum):
    COMPLETED = "completed"
    FAILED = "failed"
    ABORTED = "aborted"
    EXPIRED = "expired"


@dataclass(frozen=True, slots=True)
class Split:
    """One part of an item. `payload` may be a view into the record's value."""

    request: RequestId
    unique_id: str
    version: int
    block: Block
    index: int
    offset: int
    total: int | None
    payload: memoryview | bytes
    sha256: bytes | None = None
    reply: bytes | None = None
    labels: Mapping[str, str] | None = None

    @property
    def end(self) -> int:
        """Offset in the item of the first byte after the payload."""
        return self.offset + len(self.payload)


@dataclass(frozen=True, slots=True)
class Abort:
    request: RequestId
    reason: str


class Input(NamedTuple):
    """Where in the log a request lies: offsets of its first record and of the one it ended at."""

    topic: str
    partition: int
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Result:
    """The one word on a request. `error` is the `error` map's exception form, or None."""

    request: RequestId
    unique_id: str
    version: int
    block: Block
    labels: Mapping[str, str] | None
    group: str
    status: Status
    error: WsDataError | None
    size: int | None
    sha256: bytes | None
    target: Mapping[str, Any] | None
    splits: int
    duplicates: int
    input: Input
    reply: bytes | None
    repeat: bool
    finished_at: int

    @property
    def success(self) -> bool:
        return self.status is Status.COMPLETED


@dataclass(frozen=True, slots=True)
class Accepted:
    """Told to the holder of an older `reply`: its splits were received."""

    request: RequestId
    group: str
    index: int
    reply: bytes
