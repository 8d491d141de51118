"""Who a record speaks for: the request id, and the place of a request in the log."""

from __future__ import annotations

import re
from typing import NamedTuple

U32_MAX = 2**32 - 1
U64_MAX = 2**64 - 1

_DECIMAL = r"(0|[1-9][0-9]{0,19})"
_KEY = re.compile(rf"{_DECIMAL}-{_DECIMAL}", re.ASCII)
_KEY_MAX = len(f"{U32_MAX}-{U64_MAX}")


class RequestId(NamedTuple):
    """A request.

    Attributes:
        node_id: the node that sent it (u32).
        sequence: the node's own counter (u64), never used twice.
    """

    node_id: int
    sequence: int

    def __str__(self) -> str:
        return f"{self.node_id}-{self.sequence}"

    @property
    def key(self) -> bytes:
        """The Kafka key of all records of this request: ``NODE-SEQ`` in plain decimals."""
        return b"%d-%d" % self

    @classmethod
    def parse(cls, text: str) -> RequestId:
        """Read ``NODE-SEQ``: decimals without sign or leading zeros.

        Raises:
            ValueError: the text has another form, or a number is out of its range.
        """
        match = _KEY.fullmatch(text)
        if match is None:
            raise ValueError(f"{text!r} is not a request id: expected NODE-SEQUENCE, as in 7-42")
        node_id, sequence = int(match[1]), int(match[2])
        if node_id > U32_MAX or sequence > U64_MAX:
            raise ValueError(
                f"{text!r} is not a request id: the node id is at most {U32_MAX}, "
                f"the sequence at most {U64_MAX}"
            )
        return cls(node_id, sequence)

    @classmethod
    def from_key(cls, key: bytes | None) -> RequestId:
        """Read a Kafka key. Raises ValueError as `parse` does."""
        if key is None:
            raise ValueError("the record has no key; its key must be the request id")
        # Kafka takes keys as large as records: one must not be quoted in what is told of it.
        if len(key) > _KEY_MAX:
            raise ValueError(f"the record's key has {len(key)} bytes, a request id {_KEY_MAX}")
        try:
            text = key.decode("ascii")
        except UnicodeDecodeError:
            raise ValueError("the record's key is not ASCII text") from None
        return cls.parse(text)

    @classmethod
    def from_wire(cls, value: object) -> RequestId:
        """Read ``[u32, u64]`` as it stands in headers and errors. Raises ValueError."""
        if type(value) is list and len(value) == 2:
            node_id, sequence = value
            # A bool is an int too, but not here.
            if (
                type(node_id) is type(sequence) is int
                and 0 <= node_id <= U32_MAX
                and 0 <= sequence <= U64_MAX
            ):
                return cls(node_id, sequence)
        raise ValueError("request: not [node id: u32, sequence: u64]")


class RequestKey(NamedTuple):
    """One opening of a request as one group sees it: what verdicts are filed under.

    A request id alone would not do: beyond the horizon an id may open again, at
    another first offset, and each opening has a verdict of its own (DESIGN, "Every end
    of a file request").

    Attributes:
        group: the consumer group.
        topic: the splits topic.
        partition: its partition.
        first: offset of the opening's first split.
    """

    group: str
    topic: str
    partition: int
    request: RequestId
    first: int
