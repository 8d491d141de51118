"""A partition without Kafka: a log, a results log, and the real ledger between them.

The world carries out what the ledger decides, in any order the caller likes, and can crash it
between any two steps. What it publishes and commits, it does as one transaction.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from splitferry_consumer.bookmark import Bookmark
from splitferry_consumer.ledger import (
    DEFAULT_LIMITS,
    Batch,
    DeadLetter,
    Decision,
    Ledger,
    Limits,
    Settle,
    Told,
    WriteSplit,
)
from splitferry_consumer.request import ReceiveState, RequestPhase
from splitferry_consumer.targets import Verdict
from splitferry_consumer.transport import Record
from splitferry_protocol.codec import InvalidRecord, encode_result
from splitferry_protocol.ids import RequestId
from splitferry_protocol.records import Abort, Accepted, Block, Result, Split, Status

Content = Split | Abort | InvalidRecord

GROUP, TOPIC, PARTITION = "group", "splits", 0


def split(
    request: int,
    offset: int = 0,
    payload: bytes = b"",
    *,
    total: int | None = None,
    reply: bytes | None = None,
    version: int = 1,
    unique_id: str | None = None,
    block: Block = Block.MEM,
    index: int = 0,
    sha256: bytes | None = None,
    labels: dict[str, str] | None = None,
) -> Split:
    name = f"item-{request}" if unique_id is None else unique_id
    return Split(
        RequestId(1, request), name, version, block, index, offset, total, payload, sha256, reply,
        labels,
    )  # fmt: skip


def abort(request: int) -> Abort:
    return Abort(RequestId(1, request), "enough")


def poison() -> InvalidRecord:
    return InvalidRecord("no valid header")


@dataclass
class Incoming:
    """What the target holds of one request."""

    data: bytearray = field(default_factory=bytearray)
    comparison: WriteSplit | None = None
    ended: bool = False

    def write(self, task: WriteSplit) -> bool:
        """Compare and write; whether the overlaps were the same."""
        payload = bytes(task.split.payload)
        base = task.split.offset
        if any(self.data[s:e] != payload[s - base : e - base] for s, e in task.overlaps):
            return False
        for start, end in task.gaps:
            self.data.extend(b"\0" * (end - len(self.data)))
            self.data[start:end] = payload[start - base : end - base]
        return True


class World:
    """One owner after another of one partition."""

    def __init__(
        self, log: Sequence[Content], horizon: int = 1000, limits: Limits = DEFAULT_LIMITS
    ) -> None:
        self.log = list(log)
        self.horizon = horizon
        self.limits = limits
        self.results: list[Result | Accepted] = []
        self.told: list[tuple[int, str]] = []
        """(offset, kind) of everything told besides results."""
        self.dead_letters: list[DeadLetter] = []
        self.bookmark: Bookmark | None = None
        self.items: dict[RequestId, list[bytes]] = {}
        """Bytes of completed requests, as announced."""
        self.take()

    # ---- taking and losing

    def take(self) -> None:
        start = self.bookmark or Bookmark(0, 0, 0, self.horizon)
        self.ledger = Ledger(
            GROUP, TOPIC, PARTITION, self.horizon, start, len(self.results), self.limits
        )
        for offset in range(start.results_from(self.horizon, 0), len(self.results)):
            outcome = self.results[offset]
            if isinstance(outcome, Result):
                self.ledger.load(offset, outcome, encode_result(outcome))
        self.incoming: dict[ReceiveState, Incoming] = {}
        self.batch: Batch | None = None

    # ---- steps; each returns whether it could be taken

    def read(self) -> bool:
        offset = self.ledger.position
        if offset >= len(self.log):
            return False
        record = Record(offset, b"key", b"value")
        self._carry_out(self.ledger.read(record, self.log[offset], float(offset)))
        return True

    def compare(self) -> bool:
        for state, incoming in self.incoming.items():
            if incoming.comparison is not None and state.phase is RequestPhase.OPEN:
                task, incoming.comparison = incoming.comparison, None
                same = incoming.write(task)
                self._carry_out(self.ledger.compared(state, same, 0.0))
                return True
        return False

    def settle(self, which: int = 0) -> bool:
        ended = [s for s in self.incoming if s.phase is RequestPhase.ENDED]
        if not ended:
            return False
        state = ended[which % len(ended)]
        data = bytes(self.incoming[state].data)
        verdict = Verdict(state.status, state.error)
        if state.status is Status.COMPLETED:
            assert len(data) == state.total, "complete means all bytes are there"
            verdict = Verdict(state.status, None, len(data), b"\1" * 32)
        self.ledger.settled(state, verdict, finished_at=0)
        return True

    def begin(self) -> bool:
        """Start a transaction with what has gathered."""
        if self.batch is None:
            self.batch = self.ledger.gather()
            return self.batch is not None
        return False

    def commit(self, heard: bool = True, applied: bool = True) -> bool:
        """End the transaction. Not `heard`: the owner does not learn how, and takes again."""
        batch, self.batch = self.batch, None
        if batch is None:
            return False
        base = len(self.results)
        offsets = [base + n for n in range(len(batch.results))]
        bookmark = self.ledger.bookmark(batch, offsets)
        assert bookmark.results is not None
        assert Bookmark.parse(bookmark.watermark, bookmark.metadata) == bookmark
        if applied:
            self._publish(batch)
            self.bookmark = bookmark
        if heard:
            assert applied
            self.ledger.published(batch, offsets)
        else:
            self.take()
        return True

    def finish(self) -> None:
        """Let the owner do all there is to do."""
        while any((self.read(), self.compare(), self.settle(), self.begin(), self.commit())):
            pass

    # ---- what happened

    def outcomes(self) -> dict[tuple[RequestId, int], tuple[Status, int, str | None]]:
        """The one result of each opening: how it ended, where, and with which error."""
        found: dict[tuple[RequestId, int], tuple[Status, int, str | None]] = {}
        for result in self.results:
            if isinstance(result, Result) and not result.repeat:
                key = (result.request, result.input.first)
                assert key not in found, f"two results for {key}"
                code = result.error.code if result.error else None
                found[key] = (result.status, result.input.last, code)
        return found

    def _publish(self, batch: Batch) -> None:
        for state, result in zip(batch.states, batch.results, strict=True):
            if result.success:
                data = bytes(self.incoming[state].data)
                self.items.setdefault(result.request, []).append(data)
            self.results.append(result)
        for event in batch.events:
            kind = "dead letter"
            if isinstance(event, Told):
                kind = f"{type(event.event).__name__} {event.event.reply!r}"
                self.results.append(event.event)
            else:
                self.dead_letters.append(event)
            assert (event.offset, kind) not in self.told, f"told twice: {kind} at {event.offset}"
            self.told.append((event.offset, kind))

    def _carry_out(self, decisions: Iterable[Decision]) -> None:
        for decision in decisions:
            incoming = self.incoming.setdefault(decision.state, Incoming())
            if isinstance(decision, Settle):
                assert not incoming.ended, "ended twice"
                incoming.ended = True
            elif decision.overlaps:
                assert incoming.comparison is None, "a comparison is under way"
                incoming.comparison = decision
            else:
                assert incoming.comparison is None, "decided before the comparison"
                assert incoming.write(decision)


__all__ = ["Content", "DeadLetter", "World", "abort", "poison", "split"]
