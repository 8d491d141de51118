"""The records of the contract as values (WIRE, "Values"). No bytes here: see `codec`.

Named tuples, as every value that is made for each record or request: a frozen dataclass takes
four times as long to make.
"""

from __future__ import annotations

from collections.abc import Mapping
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
    """Below the consumer's root."""
    MEM = "mem"
    """A named shared-memory segment, or the consumer's handler."""


class Status(StrEnum):
    """What became of a request."""

    COMPLETED = "completed"
    """The item is whole, and durable at its target."""
    FAILED = "failed"
    """The result's `error` says why."""
    ABORTED = "aborted"
    """Its producer or an operator ended it."""
    EXPIRED = "expired"
    """No split added bytes for the consumer's idle time-out."""


class Split(NamedTuple):
    """One part of an item (WIRE, "split").

    Attributes:
        unique_id: names the item, 1 to 512 bytes of UTF-8.
        version: of the item (u64).
        index: number of the split in the request, from 0.
        offset: where in the item the payload's first byte belongs.
        total: bytes of the whole item; None while the producer does not know it.
        payload: its bytes; may be a view into the record's value.
        sha256: digest of the whole item, 32 bytes.
        reply: correlation token, 1 to 256 bytes.
        labels: handed through to the result; at most 16 pairs and 2 KiB.
    """

    request: RequestId
    unique_id: str
    version: int
    block: Block
    index: int  # type: ignore[assignment]  # hides the method of tuples
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


class Abort(NamedTuple):
    """A producer or an operator ends the request (WIRE, "abort").

    Attributes:
        reason: up to 1 KiB.
    """

    request: RequestId
    reason: str


class Input(NamedTuple):
    """Where in the log a request lies.

    Attributes:
        topic: the splits topic.
        partition: its partition.
        first: offset of the request's first split.
        last: offset of the record that it ended at.
    """

    topic: str
    partition: int
    first: int
    last: int


class Result(NamedTuple):
    """The one word on a request (WIRE, "result").

    Attributes:
        labels: as the splits gave them.
        group: the consumer group that speaks.
        error: why it is not completed, as the exception of that code; it is not raised.
        size: bytes of the item.
        sha256: digest of what was written, 32 bytes.
        target: `path`, relative to the consumer's root, or `shm`, the name of a shared-memory
            segment, with its `host`; None where a handler took the item, or nothing is there.
        splits: records that added bytes.
        duplicates: records that added none.
        input: where in the splits topic the request lies.
        reply: the newest correlation token that was seen before the end.
        repeat: whether it is told once more, to a later token.
        finished_at: Unix time in ms.
    """

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
        """Whether the item is whole, and durable at its target."""
        return self.status is Status.COMPLETED


class Accepted(NamedTuple):
    """Told to the holder of an older `reply`: its splits were received.

    Attributes:
        group: the consumer group that speaks.
        index: of the split that brought a newer token.
        reply: the older token.
    """

    request: RequestId
    group: str
    index: int  # type: ignore[assignment]  # hides the method of tuples
    reply: bytes
