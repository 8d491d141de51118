"""`splitferry consume`: receive until stopped."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import structlog

from splitferry_consumer.bookmark import HORIZON
from splitferry_consumer.modes import FILE_MODE
from splitferry_consumer.service import Service, Settings, StartError

from . import collector, open_files
from .command import INTERRUPTED, Command, Common
from .failures import Failure
from .options import option
from .values import ByteSize, FileMode, Seconds
from .web import Address, AddressType, need_web, web_page
from .workers import WORKERS_MAX, Job, Supervisor, share

log = structlog.get_logger(__name__)


@click.command(
    "consume",
    cls=Command,
    service=True,
    examples="""
    splitferry consume --root /srv/received
    splitferry consume --root /srv/received --group archive --quota 500GiB
    splitferry consume --root /srv/received --file-mode 0600
    splitferry consume --root /srv/received --web 127.0.0.1:8080
    splitferry consume --root /srv/received --workers 4
    SPLITFERRY_ROOT=/srv/received splitferry consume
    """,
)
@option(
    "--root",
    required=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Directory for the files that are received.",
)
@option("--group", default="splitferry", metavar="GROUP", help="Consumer group to join.")
@option(
    "--horizon",
    type=click.IntRange(1, 2**40),
    default=HORIZON,
    metavar="OFFSETS",
    help="How long an ended request is remembered, and an open one may last.",
)
@option(
    "--idle-timeout",
    type=Seconds(),
    default=3600,
    help="Time without new bytes until a request expires.",
)
@option(
    "--write-timeout", type=Seconds(), default=120, help="Time until what cannot be written fails."
)
@option(
    "--accept-loss/--no-accept-loss",
    help="Go on where topics were truncated or recreated, saying what is lost.",
)
@option("--grace", type=Seconds(), default=30, help="Time to finish what is in flight at the end.")
@option(
    "--max-open-requests",
    type=click.IntRange(1),
    default=10_000,
    metavar="COUNT",
    help="Most requests that a partition keeps open; more are refused.",
)
@option("--max-item-size", type=ByteSize(), help="Most bytes of one item; else no limit.")
@option(
    "--max-gaps",
    type=click.IntRange(1),
    default=100_000,
    metavar="COUNT",
    help="Most missing ranges between the received ones of a request.",
)
@option("--quota", type=ByteSize(), help="Most bytes that the root may hold; else no limit.")
@option("--disk-reserve", type=ByteSize(0), default="64MiB", help="Bytes of disk to leave free.")
@option(
    "--file-mode",
    type=FileMode(),
    default=f"{FILE_MODE:04o}",
    help="Who may read files and segments, whatever the umask; directories match.",
)
@option("--memory-limit", type=ByteSize(), default="256MiB", help="Most bytes of `mem` items.")
@option(
    "--segment-lifetime",
    type=Seconds(),
    default=600,
    help="How long a shared memory segment waits to be fetched.",
)
@option(
    "--flow-high",
    type=ByteSize(1024 * 1024),
    default="64MiB",
    help="Bytes in flight at which reading pauses.",
)
@option(
    "--session-timeout",
    type=Seconds(),
    default=10,
    help="How long a silent consumer keeps its partitions.",
)
@option(
    "--workers",
    type=click.IntRange(1, WORKERS_MAX),
    default=1,
    metavar="COUNT",
    help="Processes that share the partitions, --memory-limit and --flow-high.",
)
@option(
    "--web",
    type=AddressType(),
    metavar="HOST:PORT",
    help="Serve the live page, /status, /metrics, /healthz and /readyz there.",
)
@option("--web-actions/--no-web-actions", help="Let the page abort requests.")
@click.pass_obj
def consume(
    common: Common, /, workers: int, web: Address | None, web_actions: bool, **given: Any
) -> None:
    """Receive until stopped.

    SIGTERM or SIGINT once: finish what is in flight, commit, exit code 0. Twice: exit at once.
    """
    if web_actions and web is None:
        raise click.UsageError("--web-actions is for the web page: give its address with --web")
    if web is not None:
        need_web()
    settings = Settings(
        connection=common.connection,
        splits_topic=common.names.splits,
        results_topic=common.names.results,
        dead_letters_topic=common.names.dead_letters,
        **given,
    )
    try:
        if workers == 1:
            open_files.take_all()
            collector.spare_requests()
            stopped = asyncio.run(_serve(Service(settings), settings, web, web_actions))
        else:
            shared = share(settings, workers)
            # Sockets are ours alone there, and their paths short enough.
            with TemporaryDirectory(prefix="splitferry-") as directory:
                jobs = [
                    Job(n, shared, common.verbose, Path(directory, f"{n}"), web is not None)
                    for n in range(1, workers + 1)
                ]
                stopped = asyncio.run(_serve(Supervisor(jobs), settings, web, web_actions))
    except StartError as error:
        raise Failure(str(error)) from error
    if not stopped:
        raise click.exceptions.Exit(INTERRUPTED)


async def _serve(
    running: Service | Supervisor, settings: Settings, web: Address | None, web_actions: bool
) -> bool:
    """Run until stopped. False: it was abandoned by a second signal."""
    signals = 0

    def on_signal(name: str) -> None:
        nonlocal signals
        signals += 1
        if signals == 1:
            log.info("stopping: finishing what is in flight; again to leave at once", signal=name)
            running.stop()
        elif signals == 2:
            log.warning("leaving at once", signal=name)
            running.abandon()
        else:
            os._exit(INTERRUPTED)

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal, number.name)
    async with web_page(running, settings, web, web_actions):
        await running.run()
    return signals < 2
