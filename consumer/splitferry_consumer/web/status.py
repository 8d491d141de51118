"""The JSON of the live page: everything there is to see, and one window on the open requests.

Moments are Unix times in ms, sizes are bytes, ranges are half-open. Versions are text, since a
u64 is more than JavaScript can count. What producers wrote (`unique_id`, labels, keys, messages)
is data and nothing else: whoever shows it escapes it.

A snapshot builds only the rows that are shown, and nothing of it grows with the gaps of a request
beyond what is drawn. By age it looks at no other request; by size, or to find something, once at
each.
"""

from __future__ import annotations

import heapq
import importlib.metadata
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import islice, repeat
from typing import Any, TypedDict

from splitferry_consumer.coverage import Range
from splitferry_consumer.observing import RecentDeadLetter, RecentResult, Second
from splitferry_consumer.partition import Partition
from splitferry_consumer.request import ReceiveState, RequestPhase
from splitferry_consumer.service import Service, Settings
from splitferry_consumer.web.health import Disk
from splitferry_protocol.errors import WsDataError
from splitferry_protocol.ids import RequestId
from splitferry_protocol.records import Block

HOST = socket.gethostname()
VERSION = importlib.metadata.version("splitferry")
LIMIT_MAX = 200
"""Rows of one window."""
FIND_MAX = 512
"""Characters of a search."""
DRAWN = 128
"""Ranges that a row holds of what is there."""
LISTED = 16
"""Ranges that it holds of what is missing."""
FREE_STEP = 16 * 1024 * 1024
"""Bytes of free disk that are worth a new snapshot by themselves."""
CLOCK_STEP = 0.1
"""Seconds by which the wall clock has gone another way than time: less is drift, or our own."""
KEY_MAX = 128
"""Characters of a dead letter's key."""

Gap = tuple[int, int | None]
"""A missing range; with None its end is not known, because the item's size is not."""

_STATES = {
    RequestPhase.OPEN: "open",
    RequestPhase.ENDED: "settling",
    RequestPhase.SETTLED: "publishing",
    RequestPhase.PUBLISHING: "publishing",
}


class Holder(TypedDict):
    """The request that holds W."""

    request: str
    unique_id: str
    first: int
    since: int
    """When its first split came."""
    active_at: int
    """When the last split came that added bytes."""
    state: str
    missing: Sequence[Gap]
    """The first ones."""
    gaps: int


class PartitionView(TypedDict):
    partition: int
    worker: int | None
    """Which of several workers holds it. None: there is one process."""
    state: str
    """`taking`, `reading`, `full`, `refused`, `draining`, or `missing`: its worker is, and what
    is told of it is what that said last."""
    reason: str | None
    """Why it is not, or not yet, taken again."""
    watermark: int | None
    """W, if all results that are known were committed now. None: not taken."""
    committed: int | None
    position: int | None
    """The next offset to be read."""
    end: int | None
    lag: int | None
    """Records that are not read yet."""
    open: int
    unsettled: int
    """Ended requests without a committed result."""
    in_flight: int
    holder: Holder | None


Key = tuple[int, int, int]
"""What a request is ordered by, with its partition."""


class RequestView(TypedDict):
    request: str
    partition: int
    first: int
    unique_id: str
    version: str
    block: str
    size: int | None
    received: int
    ranges: Sequence[Range]
    """What is there."""
    exact: bool
    """False: drawn in cells, small gaps are left out of `ranges`."""
    missing: Sequence[Gap]
    """The first ones."""
    gaps: int
    """How many are missing."""
    rate: float
    """Bytes a second, over the last seconds."""
    remaining: float | None
    """Seconds."""
    target: str | None
    state: str
    """`open`, `settling` (making the outcome durable) or `publishing`."""
    opened_at: int
    active_at: int
    splits: int
    duplicates: int
    labels: dict[str, str]


class Window(TypedDict):
    total: int
    """Requests without a committed result."""
    matching: int
    offset: int
    shown: list[RequestView]
    keys: list[Key]
    """What each of them is ordered by."""


class Failure(TypedDict):
    code: str
    message: str


class ResultView(TypedDict):
    request: str
    partition: int
    first: int
    last: int
    unique_id: str
    version: str
    block: str
    status: str
    error: Failure | None
    size: int | None
    sha256: str | None
    target: dict[str, Any] | None
    splits: int
    duplicates: int
    opened_at: int | None
    finished_at: int


class DeadLetterView(TypedDict):
    partition: int
    offset: int
    request: str | None
    key: str | None
    size: int
    error: str
    message: str
    at: int


class Moment(TypedDict):
    at: int
    bytes: int
    results: int


class WorkerView(TypedDict):
    worker: int
    pid: int | None
    """As it was told last."""
    missing: str | None
    """Why nothing is known of it. None: it answers."""


class Facts(TypedDict):
    """What is as true of several processes as of one."""

    version: str
    pid: int
    host: str
    group: str
    topics: dict[str, str]
    phase: str
    started_at: int
    now: int


class Snapshot(Facts):
    root: str
    disk: Disk
    flow: dict[str, int]
    memory: dict[str, int]
    workers: list[WorkerView]
    """Empty where there is one process."""
    partitions: list[PartitionView]
    requests: Window
    results: list[ResultView]
    failures: list[ResultView]
    dead_letters: list[DeadLetterView]
    throughput: list[Moment]


class Sort(StrEnum):
    OLDEST = "oldest"
    NEWEST = "newest"
    LARGEST = "largest"
    STALLED = "stalled"


@dataclass(frozen=True, slots=True)
class View:
    """Which open requests are looked at. `find` is looked for in their ids, whatever its case."""

    offset: int = 0
    limit: int = 50
    sort: Sort = Sort.OLDEST
    find: str = ""


_Opened = tuple[int, ReceiveState]
"""A request with its partition."""
_Ordered = tuple[int, int, int, ReceiveState]
"""The same behind what it is ordered by; *f* and the partition leave no two of them alike."""
_ORDER: dict[Sort, Callable[[_Opened], _Ordered]] = {
    Sort.OLDEST: lambda one: (one[1].opened_at, one[1].first, *one),
    Sort.NEWEST: lambda one: (-one[1].opened_at, -one[1].first, *one),
    Sort.LARGEST: lambda one: (-(one[1].total or one[1].coverage.end), one[1].first, *one),
    Sort.STALLED: lambda one: (one[1].grown_at, one[1].first, *one),
}
_IN_LOG_ORDER: dict[Sort, Callable[[Mapping[RequestId, ReceiveState]], Iterator[ReceiveState]]] = {
    Sort.OLDEST: lambda states: iter(states.values()),
    Sort.NEWEST: lambda states: reversed(list(states.values())),
}


def facts(settings: Settings, phase: str, started_at: int, now: int) -> Facts:
    """Of this process. Moments are Unix times in ms."""
    return {
        "version": VERSION,
        "pid": os.getpid(),
        "host": HOST,
        "group": settings.group,
        "topics": {
            "splits": settings.splits_topic,
            "results": settings.results_topic,
            "dead_letters": settings.dead_letters_topic,
        },
        "phase": phase,
        "started_at": started_at,
        "now": now,
    }


class Snapshots:
    """Makes the JSON of one service."""

    def __init__(self, service: Service, disk: Callable[[], Disk]) -> None:
        self._service = service
        self._disk = disk
        self._root = str(service.settings.root.absolute())

    @property
    def partitions(self) -> list[Partition]:
        """In order of their numbers."""
        return self._service.partitions

    def find(self, request: RequestId) -> tuple[Partition, ReceiveState] | None:
        """A request without a committed result."""
        for partition in self.partitions:
            if partition.ledger is not None and request in partition.ledger.states:
                return partition, partition.ledger.states[request]
        return None

    def request(self, request: RequestId) -> RequestView | None:
        """A request without a committed result, with all its ranges."""
        found = self.find(request)
        if found is None:
            return None
        partition, state = found
        view = self._row(_Clock(), partition.number, state)
        view["ranges"], view["exact"] = list(state.coverage), True
        view["missing"] = state.coverage.first_missing(state.total, len(state.coverage) + 1)
        return view

    def mark(self) -> object:
        """Another value whenever there is something new to show."""
        observer = self._service.observer
        partitions = [
            (
                partition.number,
                partition.state,
                partition.trouble,
                partition.end,
                partition.gauge.bytes,
                partition.ledger
                and (
                    partition.ledger.position,
                    partition.ledger.committed,
                    partition.ledger.unsettled,
                    len(partition.ledger.states),
                ),
            )
            for partition in self.partitions
        ]
        free = (self._disk()["free"] or 0) // FREE_STEP
        return observer.revision, self._service.phase, free, partitions

    def snapshot(self, view: View) -> Snapshot:
        service, settings, clock = self._service, self._service.settings, _Clock()
        observer = service.observer
        return {
            **facts(settings, service.phase.value, observer.started_at, clock.wall),
            "root": self._root,
            "disk": self._disk(),
            "flow": {
                "in_flight": sum(partition.gauge.bytes for partition in self.partitions),
                "high": settings.flow_high,
            },
            "memory": {"used": service.memory.used, "limit": service.memory.limit},
            "workers": [],
            "partitions": [_partition(clock, partition) for partition in self.partitions],
            "requests": self._window(clock, view),
            "results": [_result(told) for told in reversed(observer.results)],
            "failures": [_result(told) for told in reversed(observer.failures)],
            "dead_letters": [_dead_letter(letter) for letter in reversed(observer.dead)],
            "throughput": [_moment(s) for s in observer.recent_throughput(clock.wall / 1000)],
        }

    def before(self, view: View) -> list[Key]:
        """The keys of the requests before the window, in its order."""
        _, first = self._first(view, view.offset)
        return [ordered[:3] for ordered in first]

    def _window(self, clock: _Clock, view: View) -> Window:
        matching, first = self._first(view, view.offset + view.limit)
        shown = first[view.offset :]
        return {
            "total": sum(len(states) for _, states in self._open),
            "matching": matching,
            "offset": view.offset,
            "shown": [self._row(clock, number, state) for *_, number, state in shown],
            "keys": [ordered[:3] for ordered in shown],
        }

    def _first(self, view: View, end: int) -> tuple[int, list[_Ordered]]:
        """How many requests match, and the first ones, up to `end`."""
        if view.find:
            found = list(self._found(view.find.casefold()))
            return len(found), heapq.nsmallest(end, map(_ORDER[view.sort], found))
        total = sum(len(states) for _, states in self._open)
        if view.sort in _IN_LOG_ORDER:
            return total, list(islice(self._in_log_order(view.sort), end))
        return total, heapq.nsmallest(end, map(_ORDER[view.sort], self._all()))

    @property
    def _open(self) -> list[tuple[int, Mapping[RequestId, ReceiveState]]]:
        return [(p.number, p.ledger.states) for p in self.partitions if p.ledger is not None]

    def _all(self) -> Iterator[_Opened]:
        for number, states in self._open:
            for state in states.values():
                yield number, state

    def _found(self, wanted: str) -> Iterator[_Opened]:
        for number, state in self._all():
            if wanted in state.unique_id.casefold() or wanted in str(state.request):
                yield number, state

    def _in_log_order(self, sort: Sort) -> Iterator[_Ordered]:
        """Partitions are merged, so that only what is shown is looked at."""
        each = [
            map(_ORDER[sort], zip(repeat(number), _IN_LOG_ORDER[sort](states), strict=False))
            for number, states in self._open
        ]
        return heapq.merge(*each)

    def _row(self, clock: _Clock, number: int, state: ReceiveState) -> RequestView:
        received, rate = state.coverage.size, state.pace.rate(clock.monotonic)
        left = None if state.total is None else state.total - received
        return {
            "request": str(state.request),
            "partition": number,
            "first": state.first,
            "unique_id": state.unique_id,
            "version": str(state.version),
            "block": state.block.value,
            "size": state.total,
            "received": received,
            "ranges": state.coverage.outline(DRAWN),
            "exact": len(state.coverage) <= DRAWN,
            "missing": state.coverage.first_missing(state.total, LISTED),
            "gaps": state.coverage.count_missing(state.total),
            "rate": round(rate, 1),
            "remaining": round(left / rate, 1) if left is not None and rate >= 1 else None,
            "target": f"{self._root}/{state.unique_id}" if state.block is Block.FILE else None,
            "state": _STATES[state.phase],
            "opened_at": clock.of(state.opened_at, state),
            "active_at": clock.of(state.grown_at, state),
            "splits": state.splits,
            "duplicates": state.duplicates,
            "labels": dict(state.labels or {}),
        }


class _Clock:
    """One moment, by both clocks."""

    _between = 0.0
    """Seconds from the one to the other. Reckoned anew for each look, a moment would move by a
    millisecond, and with it its request from one window to the next: only a step counts."""

    def __init__(self) -> None:
        self.monotonic, wall = time.monotonic(), time.time()
        if abs(wall - self.monotonic - self._between) > CLOCK_STEP:
            _Clock._between = wall - self.monotonic
        self.wall = int(1000 * (self.monotonic + self._between))

    def of(self, timestamp: int, state: ReceiveState) -> int:
        """A moment of the log: its own word, or ours where that lies after what we saw."""
        seen = int(1000 * (self._between + state.active_at))
        return timestamp if 0 < timestamp <= seen else seen


def holder_of(partition: Partition) -> ReceiveState | None:
    """The request that holds W back."""
    ledger = partition.ledger
    return None if ledger is None else next(iter(ledger.states.values()), None)


def held_since(state: ReceiveState) -> tuple[float, float]:
    """Seconds since the first split of a request, and since the last one that added bytes."""
    clock = _Clock()
    return (
        (clock.wall - clock.of(state.opened_at, state)) / 1000,
        (clock.wall - clock.of(state.grown_at, state)) / 1000,
    )


def lag(partition: Partition) -> int | None:
    """Records that are not read yet; None when that is not known."""
    ledger, end = partition.ledger, partition.end
    return None if ledger is None or end is None else max(0, end - ledger.position)


def _partition(clock: _Clock, partition: Partition) -> PartitionView:
    ledger, state = partition.ledger, holder_of(partition)
    unsettled = 0 if ledger is None else ledger.unsettled
    holder: Holder | None = None
    if state is not None:
        holder = {
            "request": str(state.request),
            "unique_id": state.unique_id,
            "first": state.first,
            "since": clock.of(state.opened_at, state),
            "active_at": clock.of(state.grown_at, state),
            "state": _STATES[state.phase],
            "missing": state.coverage.first_missing(state.total, LISTED),
            "gaps": state.coverage.count_missing(state.total),
        }
    return {
        "partition": partition.number,
        "worker": None,
        "state": partition.state.value,
        "reason": partition.trouble,
        "watermark": None if ledger is None else ledger.watermark,
        "committed": None if ledger is None or ledger.committed[0] < 0 else ledger.committed[0],
        "position": None if ledger is None else ledger.position,
        "end": partition.end,
        "lag": lag(partition),
        "open": 0 if ledger is None else ledger.open,
        "unsettled": unsettled,
        "in_flight": partition.gauge.bytes,
        "holder": holder,
    }


def _result(told: RecentResult) -> ResultView:
    result = told.result
    return {
        "request": str(result.request),
        "partition": result.input.partition,
        "first": result.input.first,
        "last": result.input.last,
        "unique_id": result.unique_id,
        "version": str(result.version),
        "block": result.block.value,
        "status": result.status.value,
        "error": _failure(result.error),
        "size": result.size,
        "sha256": None if result.sha256 is None else result.sha256.hex(),
        "target": None if result.target is None else dict(result.target),
        "splits": result.splits,
        "duplicates": result.duplicates,
        "opened_at": told.opened_at or None,
        "finished_at": result.finished_at,
    }


def _failure(error: WsDataError | None) -> Failure | None:
    # As the result has it: cut, and whole characters.
    return None if error is None else {"code": error.code, "message": error.to_wire()["message"]}


def _dead_letter(letter: RecentDeadLetter) -> DeadLetterView:
    key = None if letter.key is None else letter.key.decode("utf-8", "replace")
    return {
        "partition": letter.partition,
        "offset": letter.offset,
        "request": letter.request,
        "key": None if key is None else key[:KEY_MAX],
        "size": letter.size,
        "error": letter.error,
        "message": letter.message,
        "at": letter.at,
    }


def _moment(second: Second) -> Moment:
    return {"at": second.at * 1000, "bytes": second.bytes, "results": second.results}
