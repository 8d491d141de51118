"""One owner of a partition: the real taking, ledger and publisher, one step at a time.

A step is a function of what the owner knew and what it was answered: the real code reads no
clock and does no I/O besides. So a coroutine need not be kept half-way: it is begun anew with
the answers so far, and stops at its next question.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar, cast

from memory_transport import TOPIC_IDS
from model.storage import Violation
from splitferry_consumer.catalogue import Row
from splitferry_consumer.ledger import Batch, Decision, Ledger, Settle
from splitferry_consumer.publisher import Publisher
from splitferry_consumer.request import ReceiveState, RequestPhase
from splitferry_consumer.taking import Rules, take
from splitferry_consumer.targets import Item, Verdict
from splitferry_consumer.transport import Outgoing, Record, Transport, Writer
from splitferry_protocol.errors import BatchTransferFailed, WriteDataFailed, WsDataError
from splitferry_protocol.ids import RequestKey
from splitferry_protocol.records import Block, Status
from world import GROUP, TOPIC, Content, Incoming

RESULTS, DEAD_LETTERS = "results", "dead-letters"
T = TypeVar("T")


class Question(BaseException):
    """What the code asks of Kafka, and waits for."""

    def __init__(self, operation: str, *details: Any) -> None:
        self.operation = operation
        self.details = details


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """What the coroutine returns. It never waits: it is answered, or stops at a question."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return cast("T", stop.value)
    raise AssertionError("it waits for something that is not asked of Kafka")


# ---- taking


class Answered:
    """A transport and its writer that answer what was answered before, and then ask."""

    def __init__(self, answers: Sequence[Any]) -> None:
        self._answers = iter(answers)

    def _ask(self, operation: str, *details: Any) -> Any:
        for answer in self._answers:
            return answer
        raise Question(operation, *details)

    async def writer(self, partition: int) -> Answered:
        self._ask("fence")
        return self

    async def settle(self) -> None:
        self._ask("settle")

    async def committed(self, partition: int) -> tuple[int, str] | None:
        return cast("tuple[int, str] | None", self._ask("committed"))

    async def splits_bounds(self, partition: int) -> tuple[int, int]:
        return cast("tuple[int, int]", self._ask("splits_bounds"))

    async def results_bounds(self, partition: int) -> tuple[int, int]:
        return cast("tuple[int, int]", self._ask("results_bounds"))

    async def results(self, partition: int, start: int, end: int) -> AsyncGenerator[Record, None]:
        for record in self._ask("results", start, end):
            yield record

    async def close(self) -> None:
        pass


def taking(answers: Sequence[Any], partition: int, horizon: int, accept_loss: bool) -> Tenancy:
    """Take the partition. Raises Question at the first that has no answer, and Misfit."""
    transport = cast("Transport", Answered(answers))
    rules = Rules(GROUP, TOPIC, RESULTS, DEAD_LETTERS, horizon, 3600.0, accept_loss)
    _, ledger = run(take(transport, rules, partition, TOPIC_IDS))
    return Tenancy(partition, ledger)


# ---- holding


@dataclass
class Receiving(Incoming):
    """What the target holds of one request, and how far its settlement has come."""

    row: Row | None = None
    """The pending verdict: the rename follows."""
    temporary: str | None = None
    segment: str | None = None


class Appended(NamedTuple):
    """What a transaction sent, and the offset that it commits."""

    records: Sequence[Outgoing]
    commit: tuple[int, str]


class _Sending:
    """A writer that appends, and does not live to hear of the commit."""

    def __init__(self, base: int) -> None:
        self._base = base

    async def publish(
        self, records: Sequence[Outgoing], commit: Callable[[Sequence[int]], tuple[int, str]]
    ) -> list[int]:
        raise Question("commit", Appended(records, commit(_offsets(records, self._base))))


class _Committed:
    """A writer whose transaction has committed."""

    def __init__(self, base: int) -> None:
        self._base = base

    async def publish(
        self, records: Sequence[Outgoing], commit: Callable[[Sequence[int]], tuple[int, str]]
    ) -> list[int]:
        return _offsets(records, self._base)


def _offsets(records: Sequence[Outgoing], base: int) -> list[int]:
    """Where the records are appended. Dead letters lie elsewhere, at offsets of their own."""
    return [base + n if r.topic == RESULTS else 0 for n, r in enumerate(records)]


@dataclass
class Tenancy:
    """An owner after the taking: the ledger, and what its decisions have brought about."""

    partition: int
    ledger: Ledger
    incoming: dict[ReceiveState, Receiving] = field(default_factory=dict)
    batch: Batch | None = None
    base: int = 0
    """Where the running transaction began in the results partition."""

    # ---- what may happen next

    def comparing(self) -> list[int]:
        return [
            n
            for n, (state, incoming) in enumerate(self.incoming.items())
            if incoming.comparison is not None and state.phase is RequestPhase.OPEN
        ]

    def ended(self) -> list[int]:
        return [n for n, state in enumerate(self.incoming) if state.phase is RequestPhase.ENDED]

    def open(self) -> list[int]:
        return [n for n, state in enumerate(self.incoming) if state.phase is RequestPhase.OPEN]

    def request(self, number: int) -> tuple[ReceiveState, Receiving]:
        return list(self.incoming.items())[number]

    def is_file(self, number: int) -> bool:
        return self.request(number)[0].block is Block.FILE

    def temporary(self) -> list[str]:
        """Temporary files that live as long as this owner does."""
        return [i.temporary for i in self.incoming.values() if i.temporary is not None]

    def unannounced(self) -> list[str]:
        """Segments that a drop frees (`Partition._drop`): not those that are being announced."""
        return [
            incoming.segment
            for state, incoming in self.incoming.items()
            if incoming.segment is not None and state.phase is not RequestPhase.PUBLISHING
        ]

    # ---- steps

    def read(self, offset: int, content: Content | None) -> None:
        if content is None:  # a marker
            self.ledger.advance(offset + 1)
            return
        record = Record(offset, b"%d" % offset, b"value")
        self._carry_out(self.ledger.read(record, content, 0.0))

    def compare(self, number: int) -> None:
        state, incoming = self.request(number)
        task, incoming.comparison = incoming.comparison, None
        assert task is not None
        self._carry_out(self.ledger.compared(state, incoming.write(task), 0.0))

    def give_up(self, number: int, status: Status) -> tuple[RequestKey, int]:
        """Returns the opening, and where the decision ended it."""
        state, _ = self.request(number)
        self._carry_out(self.ledger.give_up(state, status, self._given_up(state, status)))
        return self._key(state), state.last

    def proposal(self, number: int, unwritable: bool) -> tuple[Item, Verdict, bytes]:
        """What the write group proposes of a request that has ended."""
        state, incoming = self.request(number)
        data = bytes(incoming.data)
        verdict = Verdict(state.status, state.error)
        if state.status is Status.COMPLETED:
            if len(data) != state.total:
                raise Violation(f"{state.request} is complete with {len(data)} bytes")
            verdict = Verdict(state.status, None, len(data), hashlib.sha256(data).digest())
        if unwritable:
            verdict = Verdict(Status.FAILED, self._given_up(state, Status.FAILED))
        return Item(self._key(state), state.unique_id, state.version), verdict, data

    def decided(self, number: int, row: Row, temporary: str | None) -> None:
        _, incoming = self.request(number)
        incoming.row, incoming.temporary = row, temporary

    def settled(self, number: int, verdict: Verdict) -> None:
        state, incoming = self.request(number)
        incoming.row = incoming.temporary = None
        if state.block is Block.MEM and verdict.target is not None:
            incoming.segment = verdict.target["shm"]
        self.ledger.settled(state, verdict, finished_at=0)

    def begin(self, base: int) -> Appended | None:
        """Gather, send, and add the offset to the transaction."""
        self.batch, self.base = self.ledger.gather(), base
        if self.batch is None:
            return None
        try:
            run(self._publisher(_Sending(base)).publish(self.ledger, self.batch))
        except Question as question:
            return cast("Appended", question.details[0])
        raise AssertionError("published without a commit")

    def commit(self) -> None:
        """The running transaction has committed."""
        assert self.batch is not None
        batch, self.batch = self.batch, None
        run(self._publisher(_Committed(self.base)).publish(self.ledger, batch))
        for state in batch.states:
            del self.incoming[state]

    def _publisher(self, writer: _Sending | _Committed) -> Publisher:
        source = (TOPIC, self.partition)
        return Publisher(cast("Writer", writer), source, RESULTS, DEAD_LETTERS, {}, TOPIC_IDS)

    def _carry_out(self, decisions: Iterable[Decision]) -> None:
        for decision in decisions:
            incoming = self.incoming.setdefault(decision.state, Receiving())
            if isinstance(decision, Settle):
                if incoming.ended:
                    raise Violation(f"{decision.state.request} ends twice")
                incoming.ended = True
            elif incoming.comparison is not None:
                raise Violation(f"{decision.state.request} is decided before its comparison")
            elif decision.overlaps:
                incoming.comparison = decision
            elif not incoming.write(decision):
                raise Violation(f"{decision.state.request} is written over other bytes")

    def _key(self, state: ReceiveState) -> RequestKey:
        return RequestKey(GROUP, TOPIC, self.partition, state.request, state.first)

    @staticmethod
    def _given_up(state: ReceiveState, status: Status) -> WsDataError:
        if status is Status.EXPIRED:
            return BatchTransferFailed(state.request, "expired")
        return WriteDataFailed(state.request)
