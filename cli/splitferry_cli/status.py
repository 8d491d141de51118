"""`splitferry status`: how things stand, from the log alone."""

from __future__ import annotations

import asyncio
import contextlib
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import click
from aiokafka import TopicPartition
from aiokafka.errors import KafkaError
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from splitferry_consumer.log_reader import LogReader
from splitferry_consumer.onlooker import Onlooker, Seen, SurveyedPartition
from splitferry_consumer.survey import REQUESTS_MAX, SurveyedRequest
from splitferry_consumer.transport import TransportError
from splitferry_protocol.records import Status

from .cluster import Cluster, Members, administration
from .command import Command, Common, run
from .failures import Failure, explain
from .options import option
from .output import Output, human_size, local_time, printable, ranges
from .values import Seconds

ARRIVING_MS = 60_000
"""A request that got bytes so lately is on its way."""
AGAIN = 1.0
"""Seconds until another try, when no broker answered."""
AT_A_TIME = 8
"""Partitions that are read side by side: each may hold some MiB of what was fetched."""


@click.command(
    "status",
    cls=Command,
    examples="""
    splitferry status
    splitferry status --group archive --limit 100
    splitferry status --watch
    splitferry status --watch 10 --json
    splitferry status --max-records 100000
    """,
)
@option("--group", default="splitferry", metavar="GROUP", help="Consumer group to look at.")
@option(
    "--watch",
    type=Seconds(),
    is_flag=False,
    flag_value="2",
    help="Look again and again, so many seconds apart; 2 without a number.",
)
@option(
    "--limit",
    type=click.IntRange(0),
    default=20,
    metavar="N",
    help="Most requests told of each partition.",
)
@option(
    "--max-records",
    type=click.IntRange(1),
    metavar="N",
    help="Read only so many records of each partition, from W on; else all.",
)
@click.pass_obj
def status(
    common: Common, group: str, watch: float | None, limit: int, max_records: int | None
) -> None:
    """Tell where each partition stands, and which requests are not done.

    Per partition: W, its end, the lag from W to the end, who reads it, and the request that holds
    W, since when, with its missing bytes and what to do about it. Everything is read from the log:
    no consumer has to run, and nothing is joined, committed or written.
    """
    run(_status(common, group, watch, limit, max_records))


async def _status(
    common: Common, group: str, watch: float | None, limit: int, max_records: int | None
) -> None:
    output = common.output
    options = await asyncio.to_thread(common.connection.client_options)
    async with LogReader(options) as log, administration(common.connection) as cluster:
        sight = _Sight(common, log, cluster, group, limit, max_records)
        with _progress(output) as progress:
            look = await sight.look(progress)
        if watch is None:
            for row in _rows(group, look):
                output.tell(*row)
            if left := sum(isinstance(view, Unread) for view in look.views):
                raise Failure(f"{left} of {len(look.views)} partitions could not be read")
            return
        with _screen(output) as show:
            while True:
                show(_rows(group, look))
                await asyncio.sleep(watch)
                look = await _until_answered(sight, show)


Row = tuple[dict[str, Any], Text]
Show = Callable[[Sequence[Row]], None]


@dataclass(frozen=True, slots=True)
class Unread:
    """A partition that could not be read this time."""

    partition: int
    error: str


@dataclass(frozen=True, slots=True)
class Look:
    views: Sequence[SurveyedPartition | Unread]
    members: Members


class _Sight:
    """All partitions at once. Keeps what was read for the next look."""

    def __init__(
        self,
        common: Common,
        log: LogReader,
        cluster: Cluster,
        group: str,
        limit: int,
        most: int | None,
    ) -> None:
        self.servers = common.connection.bootstrap_servers
        self._names = common.names
        self._log = log
        self._cluster = cluster
        self._group = group
        self._limit = limit
        self._most = most
        self._onlookers: dict[int, Onlooker] = {}
        self._turn = asyncio.Semaphore(AT_A_TIME)

    async def look(self, progress: Progress | None = None) -> Look:
        """Raises TransportError: no broker answered."""
        for number in await self._log.partitions(self._names.splits):
            if number not in self._onlookers:
                splits = TopicPartition(self._names.splits, number)
                self._onlookers[number] = Onlooker(
                    self._log, self._group, splits, self._names.results, self._most
                )
        looks = (self._partition(one, progress) for one in self._onlookers.values())
        views = await asyncio.gather(*looks)
        members = await self._cluster.members(self._group, self._names.splits)
        return Look(views, members)

    async def _partition(
        self, onlooker: Onlooker, progress: Progress | None
    ) -> SurveyedPartition | Unread:
        async with self._turn:
            try:
                with _bar(progress, onlooker.partition) as seen:
                    return await onlooker.look(self._limit, seen)
            except TransportError as error:
                return Unread(onlooker.partition, str(error))


async def _until_answered(sight: _Sight, show: Show) -> Look:
    """A look that succeeds. What goes wrong meanwhile is told, and tried again."""
    while True:
        try:
            return await sight.look()
        except (TransportError, Failure, KafkaError, TimeoutError, OSError) as error:
            told = explain(error, sight.servers) or str(error)
            show([({"error": told, "at": _now()}, Text(f"{told}; trying again", style="red"))])
            await asyncio.sleep(AGAIN)


@contextlib.contextmanager
def _progress(output: Output) -> Iterator[Progress | None]:
    """Bars for a backlog that takes a while, where a person looks on."""
    if not output.live:
        yield None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("records"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=output.console, transient=True) as progress:
        yield progress


@contextlib.contextmanager
def _bar(progress: Progress | None, partition: int) -> Iterator[Seen | None]:
    """A bar for one partition; the function it gives is told how far the reading is."""
    if progress is None:
        yield None
        return
    bar = progress.add_task(f"partition {partition}", total=None)
    try:
        yield lambda done, total: progress.update(bar, completed=done, total=total)
    finally:
        progress.remove_task(bar)


@contextlib.contextmanager
def _screen(output: Output) -> Iterator[Show]:
    """A function that shows rows: in place on a terminal, else one after the other."""
    if not output.live:

        def tell(rows: Sequence[Row]) -> None:
            output.note(local_time(_now()))
            for row in rows:
                output.tell(*row)

        yield tell
        return
    with Live(console=output.console, auto_refresh=False, vertical_overflow="crop") as live:
        yield lambda rows: live.update(
            Text("\n", no_wrap=False, overflow="fold").join(
                [*(text for _, text in rows), Text(local_time(_now()), style="dim")]
            ),
            refresh=True,
        )


# ---- what is told


@dataclass(frozen=True, slots=True)
class _Row:
    """One partition in both forms."""

    group: str
    view: SurveyedPartition
    members: Members
    now: int

    @property
    def owner(self) -> str | None:
        return self.members.owners.get(self.view.partition)

    def fields(self) -> dict[str, Any]:
        view, holder = self.view, self.view.holder
        return {
            "partition": view.partition,
            "group": self.group,
            "members": self.members.count,
            "owner": self.owner,
            "committed": view.committed,
            "watermark": view.watermark,
            "start": view.start,
            "end": view.end,
            "readable": view.readable,
            "position": view.position,
            "lag": view.lag,
            "open": view.open,
            "unsettled": view.unsettled,
            "problem": view.problem,
            "holder": holder and {**_request(holder), "since": holder.opened_at},
            "advice": ": ".join(self.advice()) or None,
            "requests": [_request(one) for one in view.requests],
            "at": self.now,
        }

    def advice(self) -> Sequence[str]:
        """What to do about the request that holds W, then the command for it, if any.

        The problem names its own remedy.
        """
        holder = self.view.holder
        other = "" if self.group == "splitferry" else f" --group {shlex.quote(self.group)}"
        if holder is None or self.view.problem is not None:
            return []
        if self.owner is None:
            return [
                "no consumer reads the partition, and nothing goes on until one does",
                f"splitferry consume{other} --root DIR",
            ]
        if holder.status is not None:
            return [
                "it has ended, and its consumer is about to settle it: see its log if this lasts"
            ]
        abort = f'splitferry abort {holder.request}{other} --reason "TEXT"'
        quiet = self.now - holder.grown_at
        if quiet < ARRIVING_MS:
            return [f"new bytes came {_span(quiet)} ago: wait, or end it", abort]
        return [
            "without new bytes it expires by itself (consume --idle-timeout); or send the item "
            "again, and end this request",
            abort,
        ]

    def text(self) -> Text:
        view = self.view
        committed = "never committed" if view.committed is None else str(view.committed)
        text = Text()
        text.append(f"partition {view.partition}", style="bold")
        text.append(f"  W {committed}  end {view.end}  lag {view.lag}")
        text.append(f"  open {view.open}  unsettled {view.unsettled}")
        text.append(f"  read by {self.owner or 'nobody'}", style="dim")
        if view.problem is not None:
            text.append(f"\n  no consumer can take it: {printable(view.problem)}", style="red")
            return text
        if view.position < view.readable:
            why = (
                "--max-records" if view.open + view.unsettled < REQUESTS_MAX else "too much is open"
            )
            text.append(f"\n  read up to {view.position} only ({why})", style="yellow")
        if view.readable < view.end:
            text.append(
                f"\n  what follows {view.readable} is hidden by a producer's open transaction",
                style="yellow",
            )
        if view.holder is not None:
            opened = view.holder.opened_at
            text.append(
                f"\n  W is held by {view.holder.request} since {local_time(opened)}"
                f" ({_span(self.now - opened)})"
            )
            # The command alone on its line: a narrow terminal would wrap it, and so break a copy.
            text.append("\n    → " + ":\n      ".join(self.advice()))
        elif view.lag and view.position >= view.readable:
            text.append("\n  nothing holds W: no request is left, only records to pass over")
        for one in view.requests:
            text.append("\n  ")
            text.append_text(self._request_text(one))
        left = view.open + view.unsettled - len(view.requests)
        if left:
            text.append(f"\n  … and {left} requests more (--limit)", style="dim")
        return text

    def _request_text(self, one: SurveyedRequest) -> Text:
        text = Text(f"{one.request}  ")
        if one.status is None:
            text.append("open", style="cyan")
        else:
            style = "green" if one.status is Status.COMPLETED else "yellow"
            text.append(f"ended ({one.status}), not settled", style=style)
        total = "an unknown size" if one.total is None else human_size(one.total)
        text.append(f"  {human_size(one.received)} of {total}")
        if one.missing and one.status is None:
            text.append(f"  missing {ranges(one.missing, one.gaps)}")
        text.append(f"  last new bytes {_span(self.now - one.grown_at)} ago", style="dim")
        text.append(f"  {printable(one.unique_id)} v{one.version}")
        if one.cause is not None:
            text.append(f"  {printable(one.cause)}", style="yellow")
        return text


def _rows(group: str, look: Look) -> list[Row]:
    now = _now()
    rows: list[Row] = []
    for view in look.views:
        if isinstance(view, Unread):
            fields = {"partition": view.partition, "error": view.error, "at": now}
            rows.append((fields, Text(f"partition {view.partition}  {view.error}", style="red")))
        else:
            told = _Row(group, view, look.members, now)
            rows.append((told.fields(), told.text()))
    return rows


def _request(one: SurveyedRequest) -> dict[str, Any]:
    return {
        "request": one.request,
        "first": one.first,
        "unique_id": one.unique_id,
        "version": one.version,
        "block": one.block,
        "state": "open" if one.status is None else "ended",
        "status": one.status,
        "cause": one.cause,
        "size": one.total,
        "received": one.received,
        "missing": one.missing,
        "gaps": one.gaps,
        "opened_at": one.opened_at,
        "grown_at": one.grown_at,
    }


def _now() -> int:
    return time.time_ns() // 1_000_000


def _span(milliseconds: int) -> str:
    """A time for people: `45 s`, `3 min`, `2 h`, `5 d`. Clocks differ: it may be none."""
    seconds = max(0, milliseconds) // 1000
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length} {unit}"
    return f"{seconds} s"
