"""The write group: one task per request that carries the ledger's decisions to the target.

The ledger decides on the event loop, in the order of the log; the group writes in worker
threads, at most one thread at a time for a request, so that a slow target holds up its own
request and no other. The group reports back; it decides nothing about the log.

A request whose first split is the whole item needs no task to wait for more: `put_whole` has
many of them written, digested and settled in one step. What goes wrong with one of them there
starts its task, which tries it again as it would any other.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

import structlog
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception_type,
    stop_after_delay,
    wait_exponential_jitter,
)

from splitferry_protocol.errors import (
    BatchTransferFailed,
    SplitTaskFailed,
    WriteDataFailed,
    WsDataError,
)
from splitferry_protocol.ids import RequestKey
from splitferry_protocol.records import Block, Status

from . import tracing
from .coverage import Coverage
from .flow import Gauge, weight
from .ledger import WriteSplit
from .request import ReceiveState
from .targets import Incoming, Item, Refused, Target, Verdict, Whole

log = structlog.get_logger(__name__)

BATCH = 8 * 1024 * 1024
"""Bytes handed to a worker thread at once: the hop costs little, and memory is let go often."""
WHOLE_ITEMS = 64
"""Items that came whole and are handed to a worker thread at once: a disk may take a while for
each, and none is told of before all are written."""
WHOLE_MAX = BATCH // WHOLE_ITEMS
"""Bytes of an item that goes with others."""
PROMPT_MAX = 256 * 1024
"""Bytes of whole items together that a target in memory takes on the event loop: copied and hashed
well within a millisecond. In a thread each system call of theirs waits for the interpreter's lock,
which costs more than all else."""
READ_BACK = 1024 * 1024
"""Bytes read at once when the digest catches up from the target."""
PAUSES = wait_exponential_jitter(multiplier=0.1, max=2.0, jitter=0.1)

T = TypeVar("T")


class Ending(NamedTuple):
    """How the request ended in the log; the last three are what the splits declared."""

    status: Status
    error: WsDataError | None = None
    size: int | None = None
    sha256: bytes | None = None
    labels: Mapping[str, str] | None = None


class Reports(Protocol):
    """Where a group tells what happened, on the event loop."""

    def compared(self, same: bool) -> None:
        """The comparison of the last submitted task is done (and its gaps are written)."""

    def failed(self, error: WsDataError) -> None:
        """The target will not take the request; it waits to be told how the request ends."""

    def settled(self, verdict: Verdict) -> None:
        """The outcome is final and durable."""

    def broken(self, error: Exception) -> None:
        """Nothing more can be said of this request by this owner: retake the partition."""


@dataclass(frozen=True, slots=True)
class Workshop:
    """What all groups of a partition share."""

    threads: Executor
    gauge: Gauge
    write_timeout: float
    """Seconds for which a target is tried again before the request is given up."""
    log: structlog.typing.FilteringBoundLogger = field(default_factory=log.bind)
    """Bound once: binding costs more than all else in the creation of a group."""


class WriteSplitDataTaskGroup:
    """Receives the bytes of one request. Subclasses name the kind of target in the log."""

    write_error: ClassVar[str]

    def __init__(
        self, item: Item, block: Block, incoming: Incoming, workshop: Workshop, reports: Reports
    ) -> None:
        self.item = item
        self._incoming = incoming
        self._workshop = workshop
        self._reports = reports
        self._tasks: deque[WriteSplit] = deque()
        self._changed = asyncio.Event()
        self._ending: Ending | None = None
        self._failed = False
        self._closed = False
        self._thread: asyncio.Future[Any] | None = None
        # Touched by worker threads only, one at a time.
        self._written = Coverage()
        self._digest = hashlib.sha256()
        self._digested = 0
        self._at = 0
        """Byte of the item at which the last read or write began."""
        workshop.log.debug(
            "task group created", block=block.value, version=item.version, **self._facts()
        )

    def _facts(self) -> dict[str, Any]:
        """What each line of the log says of the request."""
        key = self.item.key
        return {
            "request": str(key.request),
            "partition": key.partition,
            "offset": key.first,
            "unique_id": self.item.unique_id,
            **tracing.bound(self.item.labels),
        }

    @cached_property
    def _log(self) -> structlog.typing.FilteringBoundLogger:
        """Made when it is needed: most requests never have anything to tell."""
        return self._workshop.log.bind(**self._facts())

    @property
    def expected_size(self) -> int | None:
        """Bytes of the whole item, once the request has ended complete."""
        return self._ending.size if self._ending else None

    @property
    def current_size(self) -> int:
        """Bytes that are written."""
        return self._written.size

    def submit(self, task: WriteSplit) -> None:
        """Queue a task. Raises SplitTaskFailed when the group takes no more."""
        if self._closed or self._ending is not None:
            self._log.error("task submit error", index=task.split.index)
            raise SplitTaskFailed(
                self.item.key.request, task.split.index, "the request's channel is closed"
            )
        self._workshop.gauge.add(weight(task.split.payload))
        self._tasks.append(task)
        self._changed.set()

    def end(self, ending: Ending) -> None:
        """The request has ended; settle it when what was submitted is written."""
        self._ending = ending
        self.item.labels.update(ending.labels or {})
        self._changed.set()

    @property
    def whole(self) -> bool:
        """Whether one split brought all of a small item."""
        ending = self._ending
        if ending is None or ending.status is not Status.COMPLETED or len(self._tasks) != 1:
            return False
        (task,) = self._tasks
        size = len(task.split.payload)
        return size == ending.size and size <= WHOLE_MAX

    def put(self, work: WriteSplit) -> Verdict | Exception | None:
        """In a thread. Put the whole item, which came as `work`, to the target.

        Returns what the target is then to settle, or what it raised; None for another digest.
        What is not put there leaves everything as it was, for `process_tasks`.
        """
        data = work.split.payload
        digest = hashlib.sha256(data)
        proposal = self._judged(len(data), digest.digest())
        if proposal.status is not Status.COMPLETED:
            return None
        try:
            self._incoming.put(data, proposal)
        except Exception as error:  # noqa: BLE001  each of the many has its own
            return error
        self._written.add(0, len(data))
        self._digest, self._digested = digest, len(data)
        return proposal

    def as_whole(self, proposal: Verdict, tell: Callable[[Verdict | Exception], None]) -> Whole:
        """The target has the bytes: let them go."""
        self._let_go(self._tasks)
        self._tasks.clear()
        return Whole(self._incoming, proposal, tell)

    async def process_tasks(self) -> Verdict:
        """Take tasks until the request has ended and all is written, then settle it."""
        while not self.try_complete():
            await self._changed.wait()
            self._changed.clear()
            while self._tasks:
                tasks = self._next_tasks()
                try:
                    if self._wanted:
                        await self._write(tasks)
                finally:
                    self._let_go(tasks)
        return await self._settle()

    @property
    def _wanted(self) -> bool:
        """Whether the bytes may still become an item."""
        ending = self._ending
        return not self._failed and (ending is None or ending.status is Status.COMPLETED)

    def try_complete(self) -> bool:
        """Whether the request has ended and nothing of it is left to write."""
        if self._ending is None or self._tasks:
            return False
        return not self._wanted or self.current_size == self.expected_size

    def _next_tasks(self) -> list[WriteSplit]:
        tasks, size = [], 0
        while self._tasks and size < BATCH:
            tasks.append(self._tasks.popleft())
            size += len(tasks[-1].split.payload)
        return tasks

    def _let_go(self, tasks: Sequence[WriteSplit]) -> None:
        self._workshop.gauge.add(-sum(weight(task.split.payload) for task in tasks))

    # ---- writing

    async def _write(self, tasks: list[WriteSplit]) -> None:
        """Carry out `tasks`, trying again while the target may heal."""
        left = deque(tasks)
        try:
            same = await self._persist(lambda: self._in_thread(lambda: self._work_off(left)))
        except OSError as error:
            self._give_up(WriteDataFailed(self.item.key.request, str(error)))
        except Refused as refusal:
            self._give_up(refusal.error)
        else:
            if same is not None:
                self._reports.compared(same)

    def _give_up(self, error: WsDataError) -> None:
        self._failed = True
        if self._ending is None:
            self._reports.failed(error)
        elif self._ending.status is Status.COMPLETED:
            # An end that came meanwhile and is none of ours stays: the log has decided it.
            self._ending = Ending(Status.FAILED, error)

    async def _persist(self, action: Callable[[], Awaitable[T]]) -> T:
        """Await `action`, again after an OSError, until the write time-out."""
        retrying = AsyncRetrying(
            retry=retry_if_exception_type(OSError),
            wait=PAUSES,
            stop=stop_after_delay(self._workshop.write_timeout),
            before_sleep=self._note,
            reraise=True,
        )
        async for attempt in retrying:
            with attempt:
                return await action()
        raise AssertionError("unreachable")

    def _note(self, attempt: RetryCallState) -> None:
        assert attempt.outcome is not None
        self._log.warning(
            self.write_error,
            at=self._at,
            attempt=attempt.attempt_number,
            error=str(attempt.outcome.exception()),
        )

    def _work_off(self, left: deque[WriteSplit]) -> bool | None:
        """In a thread. Tasks leave `left` when done, so that a second try goes on with the rest.

        Returns whether the overlaps of the last task were the same; None when it had none.
        The ledger submits nothing behind a comparison before it knows how that went.
        """
        same: bool | None = None
        while left:
            task = left[0]
            if task.overlaps:
                same = all(
                    self._read(start, end - start) == task.part((start, end))
                    for start, end in task.overlaps
                )
            for gap in task.gaps if same is not False else ():
                data = task.part(gap)
                self._at = gap[0]
                self._incoming.write_at(gap[0], data)
                self._written.add(*gap)
                if gap[0] == self._digested:
                    self._digest.update(data)
                    self._digested = gap[1]
            left.popleft()
        # After a gap has closed the digest follows from the target, a few steps at a time, so
        # that neither the end has to wait for it nor the writes. What cannot be read back now
        # is tried again then: a second try here would find no task left, and lose `same`.
        with suppress(OSError):
            self._catch_up(min(self._written.prefix, self._digested + 2 * BATCH))
        return same

    def _catch_up(self, until: int) -> None:
        """In a thread. Digest what was written, up to `until` bytes."""
        while self._digested < until:
            data = self._read(self._digested, min(READ_BACK, until - self._digested))
            self._digest.update(data)
            self._digested += len(data)

    def _read(self, offset: int, size: int) -> bytes:
        """In a thread."""
        self._at = offset
        return self._incoming.read_at(offset, size)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        """Run `work` in a worker thread. A cancelled wait does not stop the thread: `close`
        waits for it, since it uses the descriptor that is then closed."""
        loop = asyncio.get_running_loop()
        future = loop.run_in_executor(self._workshop.threads, work)
        self._thread = future
        return await asyncio.shield(future)

    # ---- the end

    async def _settle(self) -> Verdict:
        proposal = await self._proposal()
        started = asyncio.get_running_loop().time()
        for attempt in count(1):
            try:
                settling = asyncio.ensure_future(self._incoming.settle(proposal))
                self._thread = settling
                return await asyncio.shield(settling)
            except Refused as refusal:
                proposal = Verdict(Status.FAILED, refusal.error)
            except OSError as error:
                # Without a verdict there is no result (DESIGN, "Every end of a file
                # request"), so even a failure is proposed until it is recorded. The
                # partition reads on meanwhile.
                elapsed = asyncio.get_running_loop().time() - started
                self._log.warning(self.write_error, attempt=attempt, error=str(error))
                late = elapsed > self._workshop.write_timeout
                if late and proposal.status is Status.COMPLETED:
                    failure = WriteDataFailed(self.item.key.request, str(error))
                    proposal = Verdict(Status.FAILED, failure)
                else:
                    await asyncio.sleep(min(0.1 * attempt, 2.0))
        raise AssertionError("unreachable")

    async def _proposal(self) -> Verdict:
        assert self._ending is not None
        size = self._written.size
        if self._wanted and self._digested < size:
            try:
                await self._persist(lambda: self._in_thread(lambda: self._catch_up(size)))
            except OSError as error:
                self._give_up(WriteDataFailed(self.item.key.request, str(error)))
        ending = self._ending
        if ending.status is not Status.COMPLETED:
            return Verdict(ending.status, ending.error)
        return self._judged(self._written.size, self._digest.digest())

    def _judged(self, size: int, digest: bytes) -> Verdict:
        """What to propose for an item that is whole."""
        declared = None if self._ending is None else self._ending.sha256
        if declared not in (None, digest):
            reason = (
                f"the digest differs: the splits say {(declared or b'').hex()}, "
                f"their bytes make {digest.hex()}"
            )
            failure = BatchTransferFailed(self.item.key.request, reason)
            return Verdict(Status.FAILED, failure, size, digest)
        return Verdict(Status.COMPLETED, None, size, digest)

    async def close(self, keep: bool) -> None:
        """Take no more; let the thread at work end, then drop the bytes unless `keep`.

        A settlement under way is let to its end too: dropping the temporary file between the
        verdict and the rename would leave a verdict without its bytes.
        """
        self._closed = True
        self._let_go(self._tasks)
        self._tasks.clear()
        if self._thread is not None:
            await asyncio.wait([self._thread])
            if not self._thread.cancelled():
                self._thread.exception()
        if not keep:
            await asyncio.get_running_loop().run_in_executor(
                self._workshop.threads, self._incoming.discard
            )


class WriteSplitDataTaskGroupToFile(WriteSplitDataTaskGroup):
    write_error = "file write error"


class WriteSplitDataTaskGroupToMem(WriteSplitDataTaskGroup):
    write_error = "memory write error"


GROUPS: dict[Block, type[WriteSplitDataTaskGroup]] = {
    Block.FILE: WriteSplitDataTaskGroupToFile,
    Block.MEM: WriteSplitDataTaskGroupToMem,
}


class WriteSplitDataTaskHandle:
    """The partition's end of a write group."""

    def __init__(self, group: WriteSplitDataTaskGroup, reports: Reports) -> None:
        self._group = group
        self._reports = reports
        self._closing = False
        self._task: asyncio.Task[Verdict] | None = None

    def start(self) -> None:
        """Carry out what is submitted, from now on."""
        key = self._group.item.key
        self._task = asyncio.create_task(
            self._run(), name=f"request {key.request} from {key.first}"
        )

    async def _run(self) -> Verdict:
        try:
            verdict = await self._group.process_tasks()
            self._reports.settled(verdict)
        except asyncio.CancelledError:
            if not self._closing:  # by something inside, and nobody would hear of it
                self._reports.broken(RuntimeError("the write group was cancelled"))
            raise
        except Exception as error:
            self._reports.broken(error)
            raise
        return verdict

    def version(self) -> int:
        """The version of the item that is being received."""
        return self._group.item.version

    def submit_split(self, task: WriteSplit) -> None:
        """Hand over a split. Raises SplitTaskFailed when the group takes no more."""
        self._group.submit(task)

    def end(self, ending: Ending) -> None:
        """No split follows: settle the request."""
        self._group.end(ending)

    @property
    def whole(self) -> bool:
        """Whether `put_whole` is for it, before it has started."""
        return self._group.whole

    async def wait(self) -> Verdict:
        """The outcome, when it is final. Raises what broke the group."""
        assert self._task is not None, "not started"
        return await asyncio.shield(self._task)

    async def close(self, keep: bool = False) -> None:
        """Stop the group, and drop the bytes unless `keep`. Never raises."""
        self._closing = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
            if not self._task.cancelled():
                self._task.exception()  # reported already
        await self._group.close(keep)

    def _told(self, outcome: Verdict | Exception | None) -> None:
        """What became of the whole item."""
        if outcome is not None and not isinstance(outcome, Verdict | OSError | Refused):
            self._break(outcome)
        elif not self._closing:
            if isinstance(outcome, Verdict):
                self._reports.settled(outcome)
            else:
                self.start()

    def _break(self, error: Exception) -> None:
        if not self._closing:
            self._reports.broken(error)


def open_group(
    key: RequestKey,
    state: ReceiveState,
    begin: Callable[[Item], Incoming],
    workshop: Workshop,
    reports: Reports,
) -> WriteSplitDataTaskHandle:
    """Begin the opening `key` at its target. The handle is to be started, or put whole."""
    item = Item(key, state.unique_id, state.version, dict(state.labels or {}))
    group = GROUPS[state.block](item, state.block, begin(item), workshop, reports)
    return WriteSplitDataTaskHandle(group, reports)


def put_whole(
    handles: Sequence[WriteSplitDataTaskHandle], target: Target, threads: Executor
) -> None:
    """Put items that came whole to their target and settle them; the handles are not started."""
    step = asyncio.create_task(_put_whole(handles, target, threads))
    for handle in handles:
        handle._group._thread = step


async def _put_whole(
    handles: Sequence[WriteSplitDataTaskHandle], target: Target, threads: Executor
) -> None:
    # Closing one later takes its task away.
    work = [(handle, handle._group, handle._group._tasks[0]) for handle in handles]

    def put() -> list[Verdict | Exception | None]:
        return [group.put(task) for _, group, task in work]

    try:
        if target.in_memory and sum(len(task.split.payload) for _, _, task in work) <= PROMPT_MAX:
            outcomes = put()
        else:
            outcomes = await asyncio.get_running_loop().run_in_executor(threads, put)
        items: list[Whole] = []
        for (handle, group, _), outcome in zip(work, outcomes, strict=True):
            if isinstance(outcome, Verdict):
                items.append(group.as_whole(outcome, handle._told))
            else:
                handle._told(outcome)
        await target.settle_whole(items)
    except Exception as error:  # noqa: BLE001
        # It is of none of them, and nobody else would tell the partition.
        for handle, _, _ in work:
            handle._break(error)
