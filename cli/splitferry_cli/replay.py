"""`splitferry replay`: rebuild files from the log, or verify what it holds."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import click
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from splitferry_consumer.log_reader import LogReader
from splitferry_consumer.rebuilding import Bounds, Replay, Source, Watch
from splitferry_consumer.replay import AS_RECORDED, THERE, Outcome, Report
from splitferry_consumer.targets import Condemned, TargetUnusable
from splitferry_consumer.targets.file import FileTarget
from splitferry_consumer.transport import TransportError
from splitferry_protocol.ids import RequestId

from . import open_files
from .bars import Shown
from .command import Command, Common, run
from .failures import Failure
from .options import option
from .output import Output, counted, human_size, printable, ranges
from .values import Moment, PartitionOffset, Request

WRITERS = 8
"""Threads that write. A request uses one at a time."""
DISK_RESERVE = 64 * 1024 * 1024
"""Bytes of disk that are left free."""
REFRESH = 0.1
"""Seconds between two looks of the bar."""
SHOWN = 5
"""Missing ranges of one request that a person is told; a program is told all."""


@click.command(
    "replay",
    cls=Command,
    examples="""
    splitferry replay --dry-run
    splitferry replay --to /srv/rebuilt
    splitferry replay --request 7-42 --request 7-43 --to /srv/rebuilt
    splitferry replay --since 2026-05-01T12:00 --until 2h --to /srv/rebuilt
    splitferry replay --from-offset 0:1200 --to-offset 0:5000 --dry-run --json
    """,
)
@option(
    "--request",
    "requests",
    type=Request(),
    multiple=True,
    help="Only this request; may be given again.",
)
@option("--since", type=Moment(), metavar="TIME", help="Requests that ended then or later.")
@option("--until", type=Moment(), metavar="TIME", help="Requests that ended before.")
@option(
    "--from-offset",
    "starts",
    type=PartitionOffset(),
    metavar="P:O",
    multiple=True,
    help="Requests of partition P that ended at offset O or later; of no other partition.",
)
@option(
    "--to-offset",
    "ends",
    type=PartitionOffset(),
    metavar="P:O",
    multiple=True,
    help="Requests of partition P that ended below offset O; of no other partition.",
)
@option(
    "--to",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Rebuild the files there; it becomes a root.",
)
@option("--dry-run/--no-dry-run", help="Verify only; nothing stays on the disk.")
@option(
    "--group",
    default="splitferry",
    metavar="GROUP",
    help="Consumer group whose results are obeyed.",
)
@option(
    "--horizon",
    type=click.IntRange(1, 2**40),
    metavar="OFFSETS",
    help="The consumers' horizon; else as they have committed it.",
)
@click.pass_obj
def replay(
    common: Common,
    requests: Sequence[RequestId],
    since: int | None,
    until: int | None,
    starts: Sequence[tuple[int, int]],
    ends: Sequence[tuple[int, int]],
    to: Path | None,
    dry_run: bool,
    group: str,
    horizon: int | None,
) -> None:
    """Rebuild files from the log in another directory, or only verify what the log holds.

    Obeys the recorded results: what completed is rebuilt and compared, what ended otherwise is
    told. Commits nothing, publishes nothing. Run again, it skips what is there and verified, and
    repairs the rest. Exit code 1 when something that was asked for is not there.
    """
    if dry_run is (to is not None):
        raise click.UsageError("give either --to DIR, to rebuild, or --dry-run, to verify only")
    if requests and (since is not None or until is not None or starts or ends):
        raise click.UsageError("--request names requests; a time or an offset would be for all")
    bounds = _bounds(since, until, starts, ends)
    source = Source(common.names.splits, common.names.results, group, horizon)
    open_files.take_all()
    with Account(common.output, {*requests}) as account:
        try:
            run(_replay(common, source, requests, bounds, to, account))
        except (TransportError, TargetUnusable, Condemned) as problem:
            raise Failure(str(problem)) from problem
    account.conclude()


def _bounds(
    since: int | None,
    until: int | None,
    starts: Sequence[tuple[int, int]],
    ends: Sequence[tuple[int, int]],
) -> Bounds:
    """Raises click.UsageError: nothing can lie within."""
    bounds = Bounds(since, until, dict(starts), dict(ends))
    if since is not None and until is not None and since > until:
        raise click.UsageError("--since lies behind --until")
    for partition, start in bounds.starts.items():
        end = bounds.ends.get(partition, start)
        if start > end:
            raise click.UsageError(
                f"--from-offset {partition}:{start} lies behind --to-offset {partition}:{end}"
            )
    return bounds


async def _replay(
    common: Common,
    source: Source,
    requests: Sequence[RequestId],
    bounds: Bounds,
    to: Path | None,
    account: Account,
) -> None:
    options = await asyncio.to_thread(common.connection.client_options)
    watch = Watch(account.report, account.trouble, account.note, account.to_read, account.have_read)
    threads = ThreadPoolExecutor(WRITERS, thread_name_prefix="write")
    try:
        async with LogReader(options) as log, _files(to, threads) as files:
            work = Replay(log, source, files, threads, watch)
            await (work.requests(requests) if requests else work.within(bounds))
    finally:
        threads.shutdown(wait=False, cancel_futures=True)


@asynccontextmanager
async def _files(to: Path | None, threads: ThreadPoolExecutor) -> AsyncIterator[FileTarget | None]:
    if to is None:
        yield None
        return
    files = await FileTarget.open(to, disk_reserve=DISK_RESERVE, executor=threads)
    try:
        if await files.shared():
            raise TargetUnusable(
                f"{to} is in use by a consumer or another replay: choose another directory, or "
                "stop it"
            )
        yield files
    finally:
        await asyncio.to_thread(files.close)


class Account(Shown):
    """What a replay tells: a line for each request, a bar for who looks on, and the sum."""

    def __init__(self, output: Output, asked: set[RequestId]) -> None:
        super().__init__(
            output,
            TextColumn("replay"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[read]}"),
            TimeRemainingColumn(),
        )
        self._output = output
        self._asked = asked
        self._outcomes: Counter[Outcome] = Counter()
        self._troubles = 0
        self._to_read = self._have_read = self._bytes = 0
        """The first two in offsets: how many bytes lie behind one is not known."""
        self._shown_at = 0.0
        self._bar = self._progress.add_task("", total=0, read="")

    # ---- what it is told

    def to_read(self, offsets: int) -> None:
        self._to_read += offsets
        self._show()

    def have_read(self, offsets: int, size: int) -> None:
        self._have_read += offsets
        self._bytes += size
        # It comes with every record, and drawing takes longer than reading one.
        if time.monotonic() - self._shown_at > REFRESH:
            self._show()

    def _show(self) -> None:
        self._shown_at = time.monotonic()
        elapsed = self._progress.tasks[0].elapsed or 0
        rate = human_size(self._bytes / elapsed) if elapsed else "?"
        self._progress.update(
            self._bar,
            total=self._to_read,
            completed=self._have_read,
            read=f"{human_size(self._bytes)} {rate}/s",
        )

    def report(self, report: Report) -> None:
        self._outcomes[report.outcome] += 1
        self._output.tell(fields_of(report), text_of(report))

    def trouble(self, partition: int, said: str) -> None:
        self._troubles += 1
        self._output.tell(
            {"partition": partition, "error": said},
            Text.assemble(("error     ", "red"), f" partition {partition}: {printable(said)}"),
        )

    def note(self, partition: int | None, said: str) -> None:
        where = "" if partition is None else f"partition {partition}: "
        self._output.tell({"partition": partition, "note": said}, f"note       {where}{said}")

    # ---- the end

    def conclude(self) -> None:
        """Tell the sum. Raises Failure when something that was asked for is not there."""
        told = ", ".join(f"{n} {outcome}" for outcome, n in self._outcomes.most_common())
        self._output.tell(
            {"outcomes": dict(self._outcomes), "bytes": self._bytes, "errors": self._troubles},
            f"{told or 'no requests'}; {human_size(self._bytes)} were read",
        )
        fine = THERE if self._asked else THERE | AS_RECORDED
        missing = sum(n for outcome, n in self._outcomes.items() if outcome not in fine)
        problems = (
            [f"{counted(missing, 'request is', 'requests are')} not there"] if missing else []
        )
        if self._troubles:
            problems.append(
                f"{counted(self._troubles, 'partition', 'partitions')} could not be read to the end"
            )
        if problems:
            raise Failure(" and ".join(problems))


def fields_of(report: Report) -> dict[str, Any]:
    """A report for programs."""
    return {
        "request": report.request,
        "outcome": report.outcome.value,
        "partition": report.partition,
        "first": report.first,
        "last": report.last,
        "unique_id": report.unique_id,
        "version": report.version,
        "block": report.block and report.block.value,
        "size": report.size,
        "sha256": report.sha256,
        "missing": report.missing,
        "reason": report.reason,
        "recorded": report.recorded,
    }


def text_of(report: Report) -> Text:
    style = "green" if report.outcome in THERE else "yellow"
    if report.outcome not in THERE | AS_RECORDED:
        style = "red"
    text = Text()
    text.append(f"{report.outcome.value:<10}", style=style)
    text.append(f" {report.request}")
    if report.unique_id is not None:
        text.append(f"  {printable(report.unique_id)} v{report.version}")
    if report.size is not None:
        text.append(f"  {human_size(report.size)}")
    if report.partition is not None:
        last = "…" if report.last is None else report.last
        text.append(f"  partition {report.partition} offsets {report.first} to {last}", "dim")
    if report.missing:
        text.append(f"  missing {ranges(report.missing[:SHOWN], len(report.missing))}")
    if report.reason is not None:
        text.append(f"  {printable(report.reason)}")
    if report.outcome in THERE and not report.recorded:
        text.append("  no result is recorded")
    return text
