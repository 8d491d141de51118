"""Several consumer processes as one: each serves its own page to us, and what they say is merged.

A process that does not answer in time holds nobody up: it counts as missing until it answers
again, and what it said last of its partitions is told as that.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from heapq import merge
from itertools import chain, islice
from operator import itemgetter
from pathlib import Path
from typing import Any, Protocol

import httpx
import structlog
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from splitferry_consumer.observing import RECENT_DEAD_LETTERS, RECENT_RESULTS
from splitferry_consumer.service import Phase, Settings
from splitferry_consumer.web.health import LOOK_INTERVAL, STALLED, Check, Disk
from splitferry_consumer.web.source import Source, Unanswered
from splitferry_consumer.web.status import (
    FREE_STEP,
    Key,
    Moment,
    PartitionView,
    RequestView,
    Snapshot,
    View,
    WorkerView,
    facts,
)
from splitferry_protocol.ids import RequestId

log = structlog.get_logger(__name__)

ASK_BOUND = 2.0
"""Seconds after which a worker counts as silent."""


class Worker(Protocol):
    """What the supervisor knows of a worker."""

    @property
    def number(self) -> int: ...
    @property
    def socket(self) -> Path:
        """Where its page is served."""

    @property
    def trouble(self) -> str | None:
        """Why it does not run; None: it does."""

    @property
    def restarts(self) -> int: ...


class _Asked:
    """One worker, as far as it answers."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._client = httpx.AsyncClient(
            transport=httpx.AsyncHTTPTransport(uds=str(worker.socket)),
            base_url="http://worker",
            timeout=ASK_BOUND,
        )
        self.number = worker.number
        self.restarts = 0
        self.pid: int | None = None
        self.partitions: Sequence[PartitionView] = ()
        """As it told them last."""
        self.alive: Check = {"ok": True, "detail": "starting"}
        self.ready: Mapping[str, Check] = {}
        self._silent = True
        self._heard_at = time.monotonic()

    @property
    def silence(self) -> float:
        """Seconds in which it did not answer although it runs."""
        return time.monotonic() - self._heard_at if self._silent else 0.0

    @property
    def missing(self) -> str | None:
        """Why nothing is known of it."""
        if self._worker.trouble is not None:
            return self._worker.trouble
        return "it does not answer" if self._silent else None

    async def ask(self, path: str, **query: str | int) -> httpx.Response | None:
        """None: it does not answer, or cannot."""
        answer: httpx.Response | None = None
        with contextlib.suppress(TimeoutError, httpx.HTTPError):
            async with asyncio.timeout(ASK_BOUND):
                answer = await self._client.get(path, params=query)
        self._silent = answer is None or answer.status_code == 500
        if self._silent:
            return None
        self._heard_at = time.monotonic()
        return answer

    async def status(self, view: View, offset: int) -> Snapshot | None:
        answer = await self.ask(
            "status", offset=offset, limit=view.limit, sort=view.sort, find=view.find
        )
        if answer is None:
            return None
        snapshot: Snapshot = answer.json()
        self.pid, self.partitions = snapshot["pid"], snapshot["partitions"]
        return snapshot

    async def look(self) -> None:
        """Whether it answers, and how it is."""
        self.restarts = self._worker.restarts
        if self._worker.trouble is not None:
            self._silent, self._heard_at = True, time.monotonic()
        elif await self.status(View(limit=0), 0) is not None:
            alive, ready = await self.ask("healthz"), await self.ask("readyz")
            if alive is not None and ready is not None:
                self.alive, self.ready = alive.json(), ready.json()["checks"]

    async def go_on(self) -> None:
        """Look until cancelled."""
        try:
            while True:
                try:
                    await self.look()
                except Exception:
                    self._silent = True
                    log.exception("unexpected error in a look at a worker", worker=self.number)
                await asyncio.sleep(LOOK_INTERVAL)
        finally:
            await self._client.aclose()


class Workers(Source):
    """The consumer processes of one supervisor, told what `settings` say for all together."""

    def __init__(self, workers: Iterable[Worker], settings: Settings) -> None:
        self._asked = [_Asked(worker) for worker in workers]
        self._settings = settings
        self._root = str(settings.root.absolute())
        self._started_at = time.time_ns() // 1_000_000

    async def watch(self) -> None:
        async with asyncio.TaskGroup() as group:
            for one in self._asked:
                group.create_task(one.go_on())

    async def looked(self) -> None:
        """They start when we serve."""

    async def _ask(self, path: str, **query: str | int) -> dict[_Asked, httpx.Response]:
        """Those who answer, and what."""
        present = [one for one in self._asked if one.missing is None]
        answers = await asyncio.gather(*(one.ask(path, **query) for one in present))
        return {one: told for one, told in zip(present, answers, strict=True) if told is not None}

    # ---- what there is to see

    async def snapshot(self, view: View) -> Snapshot:
        starts = await self._starts(view)
        present = [one for one in self._asked if one.missing is None]
        answers = await asyncio.gather(*(one.status(view, starts[one.number]) for one in present))
        return self._merged(
            view,
            {one.number: told for one, told in zip(present, answers, strict=True) if told},
        )

    async def _starts(self, view: View) -> Mapping[int, int]:
        """How many requests of each worker come before the window."""
        if not view.offset:
            return Counter()
        return Counter(number for _, number in await self._ordered(view))

    async def before(self, view: View) -> Sequence[Key]:
        return [key for key, _ in await self._ordered(view)]

    async def _ordered(self, view: View) -> list[tuple[Key, int]]:
        told = await self._ask("before", offset=view.offset, sort=view.sort, find=view.find)
        each = [[(tuple(key), one.number) for key in answer.json()] for one, answer in told.items()]
        return list(islice(merge(*each), view.offset))

    def _merged(self, view: View, told: Mapping[int, Snapshot]) -> Snapshot:
        settings, snapshots = self._settings, told.values()
        unknown: Disk = {"free": None, "total": None, "reserve": settings.disk_reserve}
        windows = [snapshot["requests"] for snapshot in snapshots]
        each = [zip(window["keys"], window["shown"], strict=True) for window in windows]
        shown = list(islice(merge(*each, key=itemgetter(0)), view.limit))
        phase = next(
            (s["phase"] for s in snapshots if s["phase"] != Phase.RUNNING.value),
            Phase.RUNNING.value if told else Phase.STARTING.value,
        )
        return {
            **facts(settings, phase, self._started_at, time.time_ns() // 1_000_000),
            "root": self._root,
            "disk": next((s["disk"] for s in snapshots if s["disk"]["free"] is not None), unknown),
            "flow": {
                "in_flight": sum(s["flow"]["in_flight"] for s in snapshots),
                "high": settings.flow_high,
            },
            "memory": {
                "used": sum(s["memory"]["used"] for s in snapshots),
                "limit": settings.memory_limit,
            },
            "workers": [self._worker(one) for one in self._asked],
            "partitions": self._partitions(told),
            "requests": {
                "total": sum(window["total"] for window in windows),
                "matching": sum(window["matching"] for window in windows),
                "offset": view.offset,
                "shown": [row for _, row in shown],
                "keys": [key for key, _ in shown],
            },
            "results": _latest((s["results"] for s in snapshots), "finished_at", RECENT_RESULTS),
            "failures": _latest((s["failures"] for s in snapshots), "finished_at", RECENT_RESULTS),
            "dead_letters": _latest(
                (s["dead_letters"] for s in snapshots), "at", RECENT_DEAD_LETTERS
            ),
            "throughput": _summed(s["throughput"] for s in snapshots),
        }

    def _worker(self, one: _Asked) -> WorkerView:
        return {"worker": one.number, "pid": one.pid, "missing": one.missing}

    def _partitions(self, told: Mapping[int, Snapshot]) -> list[PartitionView]:
        """Those that are held, and those that nobody has taken from a worker that is missing."""
        found: dict[int, PartitionView] = {}
        for one in self._asked:
            if one.number not in told:
                for view in one.partitions:
                    reason = f"worker {one.number}: {one.missing or 'it does not answer'}"
                    lost: PartitionView = {
                        **view, "worker": one.number, "state": "missing", "reason": reason,
                    }  # fmt: skip
                    found[view["partition"]] = lost
        for number, snapshot in told.items():
            found |= {v["partition"]: {**v, "worker": number} for v in snapshot["partitions"]}
        return [found[partition] for partition in sorted(found)]

    async def news(self, view: View, seen: object) -> tuple[object, Snapshot | None]:
        snapshot = await self.snapshot(view)
        free = (snapshot["disk"]["free"] or 0) // FREE_STEP
        mark = {**snapshot, "now": None, "disk": free}
        return mark, None if mark == seen else snapshot

    async def request(self, request: RequestId) -> RequestView | None:
        told = await self._ask(f"requests/{request}")
        for answer in told.values():
            if answer.is_success:
                view: RequestView = answer.json()
                return view
        silent = [f"worker {one.number}" for one in self._asked if one not in told]
        if silent:
            raise Unanswered(f"{', '.join(silent)} may have it, and does not answer: ask again")
        return None

    # ---- what machines ask for

    async def metrics(self) -> bytes:
        told = {one.number: answer.text for one, answer in (await self._ask("metrics")).items()}
        registry = CollectorRegistry()
        registry.register(_Metrics(self._asked, told))
        return generate_latest(registry)

    async def alive(self) -> Check:
        """One that runs and is silent for long is stuck; one that does not is started again."""
        for one in self._asked:
            stuck = one.silence > STALLED
            if stuck or not one.alive["ok"]:
                why = f"no answer for {one.silence:.0f} s" if stuck else one.alive["detail"]
                return {"ok": False, "detail": f"worker {one.number}: {why}"}
        return {"ok": True, "detail": f"{len(self._asked)} workers"}

    async def ready(self) -> dict[str, Check]:
        checks = {one.number: one.ready for one in self._asked if one.missing is None}
        missing = {
            one.number: _check(False, one.missing) for one in self._asked if one.missing is not None
        }
        answering = {number: _check(True, "answers") for number in checks}
        return {
            "workers": _all(answering | missing),
            **{
                name: _all({number: said[name] for number, said in checks.items() if said})
                for name in ("assigned", "root", "broker")
            },
        }


class _Metrics(Collector):
    """The series of all workers, each with its number: sums of counters would go back when one
    of several starts anew."""

    def __init__(self, asked: Sequence[_Asked], told: Mapping[int, str]) -> None:
        self._asked = asked
        self._told = told

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for number, text in self._told.items():
            for family in text_string_to_metric_families(text):
                name = family.name
                same = families.setdefault(name, Metric(name, family.documentation, family.type))
                same.samples += [
                    sample._replace(labels={"worker": str(number), **sample.labels})
                    for sample in family.samples
                ]
        yield from families.values()
        up = GaugeMetricFamily("splitferry_worker_up", "Whether it answers", labels=["worker"])
        restarts = CounterMetricFamily(
            "splitferry_worker_restarts", "Times that it was started again", labels=["worker"]
        )
        for one in self._asked:
            up.add_metric([str(one.number)], one.number in self._told)
            restarts.add_metric([str(one.number)], one.restarts)
        yield up
        yield restarts


def _check(ok: bool, detail: str) -> Check:
    return {"ok": ok, "detail": detail}


def _all(checks: Mapping[int, Check]) -> Check:
    """One check for all workers; what is wrong is told alone."""
    bad = {number: check for number, check in checks.items() if not check["ok"]}
    said = [
        f"worker {number}: {check['detail']}" for number, check in sorted((bad or checks).items())
    ]
    return _check(bool(checks) and not bad, "; ".join(said) or "no worker answers")


def _latest(each: Iterable[Sequence[Any]], when: str, most: int) -> list[Any]:
    return sorted(chain.from_iterable(each), key=itemgetter(when), reverse=True)[:most]


def _summed(each: Iterable[Sequence[Moment]]) -> list[Moment]:
    seconds: defaultdict[int, Moment] = defaultdict(lambda: {"at": 0, "bytes": 0, "results": 0})
    for moment in chain.from_iterable(each):
        second = seconds[moment["at"]]
        second["at"] = moment["at"]
        second["bytes"] += moment["bytes"]
        second["results"] += moment["results"]
    return [seconds[at] for at in sorted(seconds)]
