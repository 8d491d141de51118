"""What a consumer has seen and told since its start, for whoever looks at it.

The data path calls it at four points, on the event loop, each time with a step of constant
cost: a split was read, a transaction was committed, a partition was dropped, or is to be taken
again. Counters only grow. What is read twice, because a partition was taken again, is counted
twice.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from splitferry_protocol.records import Block, Result, Split, Status

from . import tracing
from .ledger import Batch, DeadLetter

RECENT_RESULTS = 200
RECENT_DEAD_LETTERS = 100
KEY_MAX = 512
"""Bytes that are kept of a dead letter's key."""
MESSAGE_MAX = 1024
"""Characters that are kept of its message."""
THROUGHPUT_SECONDS = 300
TRANSACTION_BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Seconds: the upper bounds of the histogram of transactions."""


@dataclass(slots=True)
class Second:
    """What came within one second."""

    at: int
    """Unix time in s."""
    bytes: int = 0
    results: int = 0


class RecentResult(NamedTuple):
    """A result, with what the log says of the request besides."""

    result: Result
    opened_at: int
    """When the log got the first split, Unix time in ms."""


class RecentDeadLetter(NamedTuple):
    """A dead letter that was published. A record may be as large as its topic takes, and so may
    its key: of them it keeps what is shown."""

    partition: int
    offset: int
    request: str | None
    key: bytes | None
    size: int
    """Bytes of the record's value."""
    error: str
    message: str
    at: int
    """When it was published, Unix time in ms."""


@dataclass(slots=True)
class Transactions:
    """A histogram of how long transactions took, in seconds."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(TRANSACTION_BOUNDS) + 1))
    """By `TRANSACTION_BOUNDS`, the last one for what took longer; not cumulated."""
    seconds: float = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(TRANSACTION_BOUNDS, seconds)] += 1
        self.seconds += seconds


class Observer:
    """One for each consumer process.

    Args:
        on_results: told the results of each transaction that is known to be committed; it must
            neither block nor raise.

    Attributes:
        revision: grows with everything that was seen.
        active_at: when it last grew, on the monotonic clock, in seconds.
    """

    def __init__(self, on_results: Callable[[Sequence[Result]], object] | None = None) -> None:
        self._on_results = on_results
        self.started_at = time.time_ns() // 1_000_000
        self.revision = 0
        self.active_at = time.monotonic()
        self.received = dict.fromkeys(Block, 0)
        """Bytes of payload that were read, repeated ones included."""
        self.splits = 0
        self.duplicates = 0
        """Splits that added no byte, of requests with a result and of ended ones."""
        self.requests = Counter(dict.fromkeys(Status, 0))
        self.dead_letters = 0
        self.retakes = 0
        self.transactions = Transactions()
        self.results: deque[RecentResult] = deque(maxlen=RECENT_RESULTS)
        self.failures: deque[RecentResult] = deque(maxlen=RECENT_RESULTS)
        self.dead: deque[RecentDeadLetter] = deque(maxlen=RECENT_DEAD_LETTERS)
        self.throughput: deque[Second] = deque(maxlen=THROUGHPUT_SECONDS)
        """Seconds in which something came, the last one last."""

    # ---- what the data path tells

    def read(self, split: Split) -> None:
        """A split was read from the log."""
        size = len(split.payload)
        self.splits += 1
        self.received[split.block] += size
        self._second().bytes += size

    def published(self, partition: int, batch: Batch, seconds: float) -> None:
        """A transaction that took so long is known to be committed."""
        self.transactions.add(seconds)
        for state, result in zip(batch.states, batch.results, strict=True):
            self.requests[result.status] += 1
            self.duplicates += result.duplicates
            told = RecentResult(result, state.opened_at)
            self.results.append(told)
            if not result.success:
                self.failures.append(told)
            tracing.record(result, state.opened_at)
        letters = [event for event in batch.events if isinstance(event, DeadLetter)]
        self.dead_letters += len(letters)
        self.dead.extend(_recent(partition, letter) for letter in letters[-RECENT_DEAD_LETTERS:])
        self._second().results += len(batch.results)
        if self._on_results is not None:
            self._on_results(batch.results)

    def late(self, duplicates: int) -> None:
        """The tenancy of a partition is over in which so many late duplicates were dropped."""
        self.duplicates += duplicates

    def retaken(self) -> None:
        """A partition has to be taken again, or its taking was refused."""
        self.retakes += 1
        self._second()

    def _second(self) -> Second:
        """The current one; something was seen in it."""
        self.revision += 1
        self.active_at = time.monotonic()
        at = int(time.time())
        if not self.throughput or self.throughput[-1].at != at:
            self.throughput.append(Second(at))
        return self.throughput[-1]

    # ---- what is asked

    def recent_throughput(self, now: float) -> Sequence[Second]:
        """The last `THROUGHPUT_SECONDS` before `now` (Unix time in s), idle seconds left out."""
        return [second for second in self.throughput if second.at > now - THROUGHPUT_SECONDS]


def _recent(partition: int, letter: DeadLetter) -> RecentDeadLetter:
    record = letter.record
    return RecentDeadLetter(
        partition,
        letter.offset,
        str(letter.request) if letter.request else None,
        None if record.key is None else record.key[:KEY_MAX],
        len(record.value or b""),
        letter.code,
        letter.message[:MESSAGE_MAX],
        time.time_ns() // 1_000_000,
    )
