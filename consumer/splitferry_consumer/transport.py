"""The narrow interface to Kafka: what the consumer needs of it, and nothing else.

`kafka.py` is its aiokafka form. Offsets are in records, times in seconds.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Mapping, Sequence
from typing import NamedTuple, Protocol

from splitferry_protocol.codec import InvalidRecord, decode_record
from splitferry_protocol.records import Abort, Split

from .bookmark import TopicIds


class Record(NamedTuple):
    """A record as it was read."""

    offset: int
    key: bytes | None
    value: bytes | None
    headers: Sequence[tuple[str, bytes]] = ()
    timestamp: int = 0
    """Unix time in ms."""
    unreadable: str | None = None
    """Why it stands, empty, for a whole batch that could not be unpacked."""

    def content(self) -> Split | Abort | InvalidRecord:
        """What it says, or why it says nothing."""
        try:
            if self.unreadable is not None:
                raise InvalidRecord(self.unreadable)
            return decode_record(self.key, self.value, self.headers)
        except InvalidRecord as invalid:
            # Kept, its traceback would lead to whoever keeps it: a circle, in which all records
            # at hand would wait for the collector.
            return invalid.with_traceback(None)


class Outgoing(NamedTuple):
    """A record to be published. `partition` None lets the key decide."""

    topic: str
    partition: int | None
    key: bytes | None
    value: bytes | None
    headers: Sequence[tuple[str, bytes]] = ()


class TransportError(Exception):
    """Kafka did not do what was asked. The message is for people."""


class Fenced(TransportError):
    """Another owner, or the broker, ended this writer's epoch."""


class FateUnknown(TransportError):
    """The transaction may have been committed or not: only the log can tell."""


class LeftOpen(TransportError):
    """A transaction of this writer's id was open, though Kafka takes all of them for complete."""


class TooLarge(TransportError):
    """The broker refuses some records for their size; nothing of the transaction was committed."""

    def __init__(self, indexes: Sequence[int]) -> None:
        super().__init__(f"{len(indexes)} records are larger than their topic takes")
        self.indexes = indexes


class OutOfRange(TransportError):
    """The log no longer holds the position of `partitions`."""

    def __init__(self, partitions: Collection[int]) -> None:
        super().__init__(f"the position lies outside the log of partitions {sorted(partitions)}")
        self.partitions = partitions


class Excluded(TransportError):
    """The group does not take us for a member any more, and only joining it anew may help."""


class TopicUnusable(TransportError):
    """A topic is not there, or cannot take what has to go there. The message says what to do."""


class HangingTransaction(TransportError):
    """Somebody's open transaction keeps part of a partition from being read."""


class Writer(Protocol):
    """The right to publish for one splits partition: a transactional producer, fenced."""

    async def publish(
        self,
        records: Sequence[Outgoing],
        commit: Callable[[Sequence[int]], tuple[int, str]],
    ) -> list[int]:
        """Publish `records` and commit an offset in one transaction.

        `commit` is given the offsets at which the records were appended, and returns the
        offset of the splits partition to commit, with its metadata. Returns those offsets.
        Every exception means: retake the partition; after `TooLarge` with less in the batch.
        """

    async def settle(self) -> None:
        """See that no transaction before is open any more, though Kafka takes it for complete.

        Raises `LeftOpen` when one was, or `Fenced`: the partition has to be taken again. While
        Kafka does not answer, TransportError.
        """

    async def close(self) -> None:
        """Give up the right; bounded, never raises."""


Rebalanced = Callable[[Collection[int]], Awaitable[None]]
"""Told partitions by their numbers."""


class Transport(Protocol):
    """One member of the group, subscribed to the splits topic."""

    async def start(self, assigned: Rebalanced, revoked: Rebalanced) -> None:
        """Join the group. `assigned` and `revoked` are awaited during a rebalance."""

    async def stop(self) -> None:
        """Leave the group; bounded."""

    async def poll(self, wanted: Collection[int], wait: float) -> Mapping[int, Sequence[Record]]:
        """Records of the `wanted` partitions, in order; nothing after `wait` seconds.

        Every exception but `Excluded` means: ask again.

        Must go on being called when nothing is wanted: it is the sign of life to the group.
        """

    def seek(self, partition: int, offset: int) -> None: ...

    def pause(self, partition: int) -> None: ...

    def resume(self, partition: int) -> None: ...

    async def position(self, partition: int) -> int | None:
        """The offset after all that was handed out, past what is no record (markers); None when
        the partition is not ours any more, or that is not known now."""

    def end(self, partition: int) -> int | None:
        """The end of a splits partition, with what open transactions hide; None when it was not
        told lately."""

    def stable_end(self, partition: int) -> int | None:
        """The end of what can be read: no transaction that begins below it is open."""

    def silence(self, partition: int) -> float:
        """Seconds since the broker last answered for a splits partition; it is asked all the
        time, unless the partition is paused."""

    async def topics(self, age: float) -> TopicIds:
        """The ids of the splits and the results topic, as they were at most `age` seconds ago.

        Raises `TopicUnusable` when one is not there.
        """

    async def writer(self, partition: int) -> Writer:
        """Fence the previous owner, and settle what it left."""

    async def committed(self, partition: int) -> tuple[int, str] | None:
        """The group's committed offset of a splits partition, with its metadata."""

    async def splits_bounds(self, partition: int) -> tuple[int, int]:
        """Start and end of a splits partition; the end counts open transactions."""

    async def results_bounds(self, partition: int) -> tuple[int, int]:
        """Start and end of a results partition; the end counts open transactions."""

    def results(self, partition: int, start: int, end: int) -> AsyncGenerator[Record, None]:
        """Committed records of a results partition from `start` until `end` is reached.

        Raises `HangingTransaction` when an open transaction keeps the end from being reached.
        """
