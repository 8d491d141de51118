"""Dead letters as they lie on their topic (WIRE, "Dead letters"), and the notes beside them of
what was sent again. Pure: records to values and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from splitferry_protocol.ids import RequestId

from .transport import Outgoing, Record

PREFIX = "__connect.errors."
"""Of the headers that tell where a dead letter comes from, and what was wrong with it."""
REQUEUED = "__splitferry.requeued"
"""Header of a note: the dead letter that was sent again, as `PARTITION:OFFSET`."""
REQUEUED_TO = "__splitferry.requeued.to"
"""Header of a note: where the record lies now, in the topic that it came from."""
_ABOUT = ("topic", "partition", "offset", "exception.class.name", "exception.message", "timestamp")

Headers = Sequence[tuple[str, bytes]]


class Position(NamedTuple):
    """A place in a topic. Names a dead letter, which keeps it as long as it exists."""

    partition: int
    offset: int

    def __str__(self) -> str:
        return f"{self.partition}:{self.offset}"

    @classmethod
    def parse(cls, text: str) -> Position:
        """Raises ValueError: it is not `PARTITION:OFFSET`."""
        partition, colon, offset = text.partition(":")
        numbers = [part for part in (partition, offset) if part.isascii() and part.isdecimal()]
        if not colon or len(numbers) < 2 or int(partition) >= 2**31 or int(offset) >= 2**63:
            raise ValueError(f"{text!r} is not PARTITION:OFFSET, as in 0:12")
        return cls(int(partition), int(offset))


@dataclass(frozen=True, slots=True)
class Letter:
    """A dead letter.

    Attributes:
        at: its own place.
        written_at: when it got there, Unix time in ms.
        topic, source: where the record lay that it is a copy of.
        code, message: the error.
        sent_at: the time of that record, Unix time in ms.
        key, value, headers: those of that record.
    """

    at: Position
    written_at: int
    topic: str
    source: Position
    code: str
    message: str
    sent_at: int
    key: bytes | None
    value: bytes | None
    headers: Headers

    @property
    def request(self) -> RequestId | None:
        """The request that the key names, whatever the value says."""
        try:
            return RequestId.from_key(self.key)
        except ValueError:
            return None

    @property
    def is_stub(self) -> bool:
        """Nothing of the value was kept; or there was none."""
        return not self.value

    @property
    def outgoing(self) -> Outgoing:
        """The record as it was, for the partition where it lay."""
        return Outgoing(self.topic, self.source.partition, self.key, self.value, self.headers)


@dataclass(frozen=True, slots=True)
class Requeued:
    """The note that the dead letter at `letter` was sent again and lies at `to` since `at`, in
    Unix time in ms."""

    letter: Position
    to: Position
    at: int = 0

    def outgoing(self, topic: str) -> Outgoing:
        """For the partition of the dead letter, so that whoever reads on from there finds it."""
        headers = [(REQUEUED, str(self.letter).encode()), (REQUEUED_TO, str(self.to).encode())]
        # With a value, because without a key nothing else would be a record.
        return Outgoing(topic, self.letter.partition, None, b"", headers)


def read_letter(partition: int, record: Record) -> Letter | Requeued | None:
    """What a record of the dead-letter topic is; None: neither of ours.

    Whoever wrote the record that died wrote its headers, perhaps like ours: those that count are
    the last six, which only a consumer adds.
    """
    about = record.headers[-len(_ABOUT) :]
    if [name for name, _ in about] == [PREFIX + name for name in _ABOUT]:
        topic, origin, offset, code, message, timestamp = (
            (text or b"").decode("utf-8", "replace") for _, text in about
        )
        try:
            source, sent_at = Position.parse(f"{origin}:{offset}"), int(timestamp)
        except ValueError:
            return None
        return Letter(
            Position(partition, record.offset),
            record.timestamp,
            topic,
            source,
            code,
            message,
            sent_at,
            record.key,
            record.value,
            record.headers[: -len(_ABOUT)],
        )
    told = dict(record.headers)
    try:
        letter, to = (
            Position.parse((told.get(name) or b"").decode()) for name in (REQUEUED, REQUEUED_TO)
        )
    except ValueError:
        return None
    return Requeued(letter, to, record.timestamp)
