"""One partition from taking to losing: feeds the ledger and carries out what it decides.

Everything here runs on the event loop, and the steps that change state do not await: a record
is read, decided and handed on before anything else can happen. What awaits is the publishing
loop, which is the partition's task.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import suppress
from enum import StrEnum
from typing import Any, NamedTuple

import structlog

from splitferry_protocol.codec import InvalidRecord
from splitferry_protocol.errors import BatchTransferFailed, WsDataError
from splitferry_protocol.ids import RequestKey
from splitferry_protocol.records import Block, Split, Status

from .bookmark import TopicIds
from .bounded import CANCEL_AGAIN, is_ours
from .flow import Gauge
from .group import (
    WHOLE_ITEMS,
    Ending,
    Workshop,
    WriteSplitDataTaskHandle,
    open_group,
    put_whole,
)
from .ledger import (
    Batch,
    Decision,
    Ledger,
    WriteSplit,
)
from .observing import Observer
from .publisher import Publisher
from .request import ReceiveState, RequestPhase
from .taking import Misfit, Rules, take
from .targets import Condemned, Target, TargetUnusable, Verdict
from .transport import (
    Fenced,
    HangingTransaction,
    LeftOpen,
    OutOfRange,
    Record,
    TooLarge,
    TopicUnusable,
    Transport,
    TransportError,
)

log = structlog.get_logger(__name__)

TICK = 0.5
"""Seconds between looks at what no record brings about: expiry, a moved end of the log."""
LOOK_AGAIN = 1.0
"""Seconds after which it is asked again whether the topics are still the same."""
COMMIT_INTERVAL = 1.0
"""Seconds that a moved W waits for a result to travel with."""
HIDDEN_ALARM = 15.0
"""Seconds that records may be hidden by an open transaction without a word."""
VERDICTS_INTERVAL = 60.0
"""Seconds between clearings of verdicts that nobody can ask for any more."""
RETAKE_PAUSES = (0.1, 0.5, 1.0, 3.0, 5.0)
"""Seconds before a partition is taken again, by the number of failures in a row."""
FENCED_PAUSE = 3
"""The least pause after being fenced, as an index of RETAKE_PAUSES."""
QUIET = 10.0
"""Seconds without a publication after which the last one is seen to have been ended by Kafka."""
UNWATCHED = 5.0
"""Seconds between two looks at the end of the log after which the process may have stood still."""
LOSE_BOUND = 10.0
"""Seconds that a running transaction has to end in when the partition is lost."""


class PartitionState(StrEnum):
    """What a partition is about, for those who look at it."""

    TAKING = "taking"
    READING = "reading"
    FULL = "full"
    """See `Partition.full`."""
    REFUSED = "refused"
    """It is not read, and mostly that needs somebody's hand; it is tried again all the same."""
    DRAINING = "draining"


class _Lost(Exception):
    """Another member may own the partition."""


class Vigil:
    """When a request counts as idle.

    Time counts against a request only while there is nothing left to read: what would keep it
    alive may lie in the part of the log that was not read yet. Under steady traffic the position
    hardly ever is at the end, so having reached the end of the last look is enough. Nor does
    the time count in which nobody looked: a process that was frozen wakes with an old end, and what
    came meanwhile still lies in the log.
    """

    def __init__(self, idle_timeout: float, now: float) -> None:
        self._idle_timeout = idle_timeout
        self._caught_up_since = self._looked_at = now
        self._end: int | None = None

    def look(self, now: float, position: int, end: int | None) -> float | None:
        """Requests without activity since the moment returned are idle; None: no request is."""
        frozen = now - self._looked_at > UNWATCHED
        if frozen or end is None or self._end is None or position < self._end:
            self._caught_up_since = now
        self._looked_at, self._end = now, end
        moment = now - self._idle_timeout
        return moment if self._caught_up_since <= moment else None


class Hidden:
    """When records have been hidden for too long by a transaction that nobody ends."""

    def __init__(self, now: float) -> None:
        self._since = now
        self._stable: int | None = None

    def look(self, now: float, position: int, end: int | None, stable: int | None) -> bool:
        """Whether to say so, which is due every `HIDDEN_ALARM` seconds."""
        moved = stable != self._stable
        self._stable = stable
        if moved or end is None or stable is None or position < stable or stable >= end:
            self._since = now
        due = now - self._since >= HIDDEN_ALARM
        if due:
            self._since = now
        return due


class Partition:
    """A partition that the group has assigned to this process."""

    def __init__(
        self,
        number: int,
        rules: Rules,
        transport: Transport,
        targets: Mapping[Block, Target],
        workshop: Workshop,
        background: Callable[[Coroutine[Any, Any, None]], object],
        observer: Observer,
    ) -> None:
        """`background` takes clean-up work that nobody needs to wait for."""
        self.number = number
        self._rules = rules
        self._transport = transport
        self._targets = targets
        self._workshop = workshop
        self._background = background
        self._observer = observer
        self._log = log.bind(topic=rules.splits_topic, partition=number)
        self._stubs: dict[int, int] = {}
        self._ledger: Ledger | None = None
        self._publisher: Publisher | None = None
        self._topics: TopicIds | None = None
        self._handles: dict[ReceiveState, WriteSplitDataTaskHandle] = {}
        self._unsure: list[tuple[ReceiveState, WriteSplitDataTaskHandle]] = []
        """Whose results were in a transaction that failed: the next taking tells its fate."""
        self._whole: dict[Block, list[WriteSplitDataTaskHandle]] = {block: [] for block in Block}
        """Requests that came whole, until all records at hand are read."""
        self._changed = asyncio.Event()
        self._broken: Exception | None = None
        self._publishing: asyncio.Task[None] | None = None
        self._draining = False
        self._failures = 0
        self._unseen_since: float | None = None
        """When the last publication was, as long as it is not known that Kafka has ended it."""
        self._trouble: BaseException | None = None
        """Why it is not, or not yet, taken again."""
        self._task = asyncio.create_task(self._hold(), name=f"partition {number}")

    def __repr__(self) -> str:
        return f"<Partition {self.number} {self._ledger} {self.gauge} open={len(self._handles)}>"

    # ---- the task: taken, served, dropped, and taken again

    async def _hold(self) -> None:
        """Take the partition, serve it, and take it again after whatever went wrong."""
        while True:
            stubs = sum(self._stubs.values())
            try:
                await self._take()
                await self._serve()
            except (Exception, asyncio.CancelledError) as trouble:
                if isinstance(trouble, asyncio.CancelledError) and is_ours():
                    raise
                # Whatever it is, the log is still there: better taken again than held, silent.
                self._trouble = trouble
                if not self._draining:  # nor lost
                    self._observer.retaken()
                with suppress(Exception):  # the log of a program may raise where its disk is full
                    self._explain(trouble)
                if isinstance(trouble, TooLarge) and sum(self._stubs.values()) > stubs:
                    self._failures = 0  # one less is in the way
                elif isinstance(trouble, Fenced):
                    # Either we were thought dead, and the group is about to say so, or the broker
                    # timed our transaction out, and the partition is still ours. Taking it at once
                    # would fence its new owner in the first case.
                    self._failures = max(self._failures, FENCED_PAUSE)
            finally:
                self._drop()
            pause = RETAKE_PAUSES[min(self._failures, len(RETAKE_PAUSES) - 1)]
            self._failures += 1
            await asyncio.sleep(pause)

    def _explain(self, trouble: BaseException) -> None:
        """Log why the partition is taken again. Where somebody has to look, as an error."""
        match trouble:
            case _Lost():  # and not taken again
                pass
            case Misfit() | HangingTransaction():
                self._log.error("partition refused", reason=str(trouble))
            case Condemned():
                self._log.error("partition is taken again: a write was lost", error=str(trouble))
            case TargetUnusable():
                event = "partition is taken again: the target is unusable"
                self._log.error(event, error=str(trouble))
            case TopicUnusable():
                event = "partition is taken again: a topic is unusable"
                self._log.error(event, error=str(trouble))
            case Fenced():
                self._log.warning("partition was fenced", error=str(trouble))
            case TransportError():
                self._log.warning("partition is taken again", error=str(trouble))
            case asyncio.CancelledError():
                event = "partition is taken again after a cancellation of nobody's"
                self._log.error(event, exc_info=trouble)
            case _:
                event = "partition is taken again after an unexpected error"
                self._log.error(event, exc_info=trouble)

    async def _take(self) -> None:
        rules = self._rules
        self._transport.pause(self.number)
        # Before anything else: what is made anew from here on, the next look finds.
        self._topics = await self._transport.topics(LOOK_AGAIN)
        writer, ledger = await take(self._transport, rules, self.number, self._topics)
        self._publisher = Publisher(
            writer,
            (rules.splits_topic, self.number),
            rules.results_topic,
            rules.dead_letters_topic,
            self._stubs,
            self._topics,
        )
        self._broken = self._trouble = self._unseen_since = None
        for state, handle in self._unsure:
            self._background(handle.close(keep=ledger.has_result(state)))
        self._unsure.clear()
        self._ledger = ledger
        self._transport.seek(self.number, ledger.position)
        self._transport.resume(self.number)
        self._log.info("partition taken", watermark=ledger.position)

    def _drop(self) -> None:
        """Forget everything; the log has it. What may take long is done in the background."""
        self._transport.pause(self.number)
        for state, handle in self._handles.items():
            if state.phase is RequestPhase.PUBLISHING:
                # Its result may have announced the item: kept, unless the log says otherwise.
                self._unsure.append((state, handle))
            else:
                self._background(handle.close())
        self._handles = {}
        for handles in self._whole.values():
            handles.clear()
        if self._ledger is not None:
            self._observer.late(self._ledger.late_duplicates)
        if self._publisher is not None:
            self._background(self._publisher.close())
        self._publisher = self._ledger = None

    # ---- reading: a record is read, decided and handed on

    @property
    def _reading(self) -> Ledger | None:
        """The ledger, while it is to be told of records."""
        return None if self._broken is not None or self._draining else self._ledger

    @property
    def ready(self) -> bool:
        """Whether records are wanted: taken, and below the marks."""
        return self._reading is not None and not self.full

    @property
    def full(self) -> bool:
        """Whether it reads no further until some of what it holds is written or told."""
        return self._ledger is not None and (self.gauge.full or self._ledger.full)

    def deliver(self, records: Sequence[Record]) -> None:
        """The next records of the log, in order. Does not await."""
        ledger = self._reading
        if ledger is None:
            return
        now = time.monotonic()
        for record in records:
            try:
                content = record.content()
                if isinstance(content, Split):
                    self._observer.read(content)
                elif isinstance(content, InvalidRecord):
                    self._log.warning(
                        "invalid record",
                        offset=record.offset,
                        request=str(content.request) if content.request else None,
                        error=content.message,
                    )
                self._carry_out(ledger, ledger.read(record, content, now))
            except Exception as error:  # noqa: BLE001
                # Nobody else may suffer for it, and no record may be passed over half decided.
                self._log.exception("unexpected error", offset=record.offset)
                self.retake(error)
                return
        self._put_whole()
        if ledger.has_news:
            self._changed.set()

    def _carry_out(self, ledger: Ledger, decisions: Iterable[Decision]) -> None:
        opened: list[tuple[Block, WriteSplitDataTaskHandle]] = []
        for decision in decisions:
            state = decision.state
            handle = self._handles.get(state)
            if handle is None:
                handle = self._handles[state] = self._open(ledger, state)
                opened.append((state.block, handle))
            if isinstance(decision, WriteSplit):
                handle.submit_split(decision)
            else:
                handle.end(
                    Ending(state.status, state.error, state.total, state.sha256, state.labels)
                )
        for block, handle in opened:
            if handle.whole:
                self._whole[block].append(handle)
            else:
                handle.start()

    def _open(self, ledger: Ledger, state: ReceiveState) -> WriteSplitDataTaskHandle:
        rules = self._rules
        key = RequestKey(rules.group, rules.splits_topic, self.number, state.request, state.first)
        reports = _Reports(self, ledger, state)
        return open_group(key, state, self._targets[state.block].begin, self._workshop, reports)

    def _put_whole(self) -> None:
        for block, handles in self._whole.items():
            for start in range(0, len(handles), WHOLE_ITEMS):
                some = handles[start : start + WHOLE_ITEMS]
                put_whole(some, self._targets[block], self._workshop.threads)
            handles.clear()

    # ---- publishing: what is settled is told

    async def _serve(self) -> None:
        """Publish, one transaction at a time, what gathered while the last one ran."""
        ledger, publisher = self._ledger, self._publisher
        assert ledger is not None
        assert publisher is not None
        committed_at = ticked_at = cleared_at = time.monotonic()
        vigil = Vigil(self._rules.idle_timeout, committed_at)
        hidden = Hidden(committed_at)
        while True:
            await _within(TICK, self._changed.wait())
            self._changed.clear()
            self._raise_if_broken()
            now = time.monotonic()
            if now - ticked_at >= TICK and not self._draining:
                ticked_at = now
                await self._tick(ledger, vigil, hidden, now)
                await self._see_ended(publisher, now)
            if now - cleared_at >= VERDICTS_INTERVAL:
                cleared_at = now
                self._background(self._clear_verdicts(ledger.committed[0] - self._rules.horizon))
            # Meanwhile a record may have failed half-way, with the position beyond it already.
            self._raise_if_broken()
            due = self._draining or now - committed_at >= COMMIT_INTERVAL
            batch = ledger.gather() if due or ledger.has_news else None
            if batch is None:
                continue
            # All that the batch follows from was read before this look. A topic that is made
            # anew after it changes nothing: the commit names the one that it speaks of.
            await self._look_at_topics(0)
            self._publishing = asyncio.create_task(self._publish(publisher, ledger, batch))
            await asyncio.shield(self._publishing)
            committed_at = self._unseen_since = time.monotonic()
            self._failures = 0
            for state in batch.states:
                self._handles.pop(state, None)
            self._changed.set()

    async def _publish(self, publisher: Publisher, ledger: Ledger, batch: Batch) -> None:
        began = time.monotonic()
        await publisher.publish(ledger, batch)
        # Here, since nobody may be left to wait for this when the partition is lost meanwhile.
        self._observer.published(self.number, batch, time.monotonic() - began)

    async def _look_at_topics(self, age: float) -> None:
        """Hear of a topic that was deleted and made anew, by an answer of at most `age` seconds.

        The client reads on at its old position, in the middle of the new log, if that is long
        enough. What it read there must not be published: it would be taken for all there is.
        """
        try:
            topics = await self._transport.topics(age)
        except TopicUnusable:
            raise
        except TransportError as error:  # whatever it is, the poll meets it too
            self._log.debug("the topics could not be looked at", error=str(error))
            return
        if topics != self._topics:
            raise TransportError("a topic was deleted and made anew")

    def _raise_if_broken(self) -> None:
        """Raise what happened after which only the log can be trusted."""
        if self._broken is not None:
            raise self._broken

    # ---- what no record brings about

    async def _tick(self, ledger: Ledger, vigil: Vigil, hidden: Hidden, now: float) -> None:
        """See to what no record brings about."""
        await self._look_at_topics(LOOK_AGAIN)
        position = await self._transport.position(self.number)
        self._raise_if_broken()  # a poll that failed may have lost records below that position
        if self._draining:  # and a poll that was under way brings records that nobody reads now
            return
        if position is not None:
            ledger.advance(position)
        end, stable = self._transport.end(self.number), self._transport.stable_end(self.number)
        if hidden.look(now, ledger.position, end, stable):
            self._log.warning(
                "records are hidden by an open transaction of a producer: end it, or wait for "
                "its time-out",
                offset=stable,
                end=end,
            )
        moment = vigil.look(now, ledger.position, end)
        for state in ledger.idle_since(moment) if moment is not None else ():
            error = BatchTransferFailed(
                state.request,
                f"expired: no split added bytes for {self._rules.idle_timeout:g} s",
            )
            self._carry_out(ledger, ledger.give_up(state, Status.EXPIRED, error))

    async def _see_ended(self, publisher: Publisher, now: float) -> None:
        """Find the publication that Kafka has left open: with the next one it would be ended, and
        until then its results are hidden."""
        if self._unseen_since is None or now - self._unseen_since < QUIET:
            return
        try:
            await publisher.settle()
        except (LeftOpen, Fenced):
            raise
        except TransportError as error:
            self._log.debug("it cannot be seen what Kafka has ended", error=str(error))
            self._unseen_since = now
        else:
            self._unseen_since = None

    async def _clear_verdicts(self, before: int) -> None:
        rules = self._rules
        for target in set(self._targets.values()):
            try:
                await target.passed(rules.group, rules.splits_topic, self.number, before)
            except (OSError, TargetUnusable) as error:
                self._log.warning("verdicts could not be cleared", error=str(error))

    # ---- what others bring about

    def realign(self, error: TransportError) -> None:
        """A poll failed, and may have lost records that aiokafka counts as handed out."""
        if isinstance(error, OutOfRange) and self.number in error.partitions:
            self.retake(error)
        elif self._ledger is not None:
            self._transport.seek(self.number, self._ledger.position)

    def retake(self, reason: Exception) -> None:
        """Something happened after which only the log can be trusted."""
        if self._broken is None:
            self._broken = reason
            self._changed.set()

    def drain(self) -> None:
        """Read no more; publish what has ended."""
        self._draining = True
        self._changed.set()

    async def lose(self) -> None:
        """Another member may own the partition from now on. Bounded; never raises."""
        self._draining = True
        self._broken = self._broken or _Lost()
        if self._publishing is not None and not self._publishing.done():
            await asyncio.wait([self._publishing], timeout=LOSE_BOUND)
        # One cancellation may be lost: a client of aiokafka that is being stopped swallows what
        # arrives while it awaits its own cancelled tasks, and the taking would go on.
        while not self._task.done():
            self._task.cancel()
            await asyncio.wait([self._task], timeout=CANCEL_AGAIN)
        for _, handle in self._unsure:  # the log will tell another
            self._background(handle.close(keep=True))
        self._unsure.clear()

    # ---- what can be seen of it

    @property
    def gauge(self) -> Gauge:
        return self._workshop.gauge

    @property
    def ledger(self) -> Ledger | None:
        """What is known of the partition; None while it is not taken."""
        return self._ledger

    @property
    def end(self) -> int | None:
        """The end of its log, where that was told lately."""
        return self._transport.end(self.number)

    @property
    def state(self) -> PartitionState:
        if self._draining:
            return PartitionState.DRAINING
        if self._ledger is None or self._broken is not None:
            refused = (Misfit, HangingTransaction, TargetUnusable, TopicUnusable)
            held_up = isinstance(self._trouble, refused)
            return PartitionState.REFUSED if held_up else PartitionState.TAKING
        return PartitionState.READING if self.ready else PartitionState.FULL

    @property
    def trouble(self) -> str | None:
        """Why it is not, or not yet, taken again."""
        trouble = self._trouble
        return None if trouble is None else str(trouble) or type(trouble).__name__

    @property
    def drained(self) -> bool:
        """Whether all that may be published is committed: the result of every request that has
        ended, unless P of the previous owner is not reached, which no record brings nearer now."""
        ledger = self._ledger
        if ledger is None or not ledger.may_publish:
            return True
        return ledger.unsettled == 0 and not ledger.has_news


class _Reports(NamedTuple):
    """Brings what a write group tells to the ledger that opened the request."""

    partition: Partition
    ledger: Ledger
    state: ReceiveState

    @property
    def _heard(self) -> bool:
        """Not after a thread has ended, then the partition was dropped, then this group was woken,
        which is closed in the background: what follows from its report is the next owner's."""
        return self.partition._ledger is self.ledger

    def compared(self, same: bool) -> None:
        if self._heard:
            self._act(self.ledger.compared(self.state, same, time.monotonic()))

    def failed(self, error: WsDataError) -> None:
        if self._heard:
            self._act(self.ledger.give_up(self.state, Status.FAILED, error))

    def settled(self, verdict: Verdict) -> None:
        if self._heard:
            finished_at = time.time_ns() // 1_000_000
            self.ledger.settled(self.state, verdict, finished_at)
            self._act(())

    def broken(self, error: Exception) -> None:
        if self._heard:
            self.partition.retake(error)

    def _act(self, decisions: Sequence[Decision]) -> None:
        self.partition._carry_out(self.ledger, decisions)
        self.partition._changed.set()


async def _within(seconds: float, waiting: Coroutine[Any, Any, object]) -> None:
    """Await at most so long."""
    try:
        async with asyncio.timeout(seconds):
            await waiting
    except TimeoutError:
        pass
