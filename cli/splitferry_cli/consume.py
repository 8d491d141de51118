"""`splitferry consume`: receive until stopped."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
from pathlib import Path
from typing import Any

import click
import structlog

from splitferry_consumer.service import Service, Settings, StartError

from .command import INTERRUPTED, Command, Common
from .failures import Failure
from .options import option
from .values import ByteSize, Seconds

log = structlog.get_logger(__name__)


@click.command(
    "consume",
    cls=Command,
    service=True,
    examples="""
    splitferry consume --root /srv/received
    splitferry consume --root /srv/received --group archive --quota 500GiB
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
    default=250_000,
    metavar="OFFSETS",
    help="How long an ended request is remembered, and an open one may last.",
)
@option("--idle-timeout", type=Seconds(), default=3600, help="Expire a request without new bytes.")
@option("--write-timeout", type=Seconds(), default=120, help="Give up what cannot be written.")
@option(
    "--accept-loss/--no-accept-loss",
    help="Go on where topics were truncated or recreated, saying what is lost.",
)
@option("--grace", type=Seconds(), default=30, help="Time to finish what is in flight at the end.")
@option("--quota", type=ByteSize(), help="Most bytes that the root may hold.")
@option("--disk-reserve", type=ByteSize(0), default="64MiB", help="Bytes of disk to leave free.")
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
@option("--session-timeout", type=Seconds(), default=10, help="Kafka's session time-out.")
@click.pass_obj
def consume(common: Common, /, **given: Any) -> None:
    """Receive until stopped.

    SIGTERM or SIGINT once: finish what is in flight, commit, exit code 0. Twice: exit at once.
    """
    settings = Settings(
        connection=common.connection,
        splits_topic=common.names.splits,
        results_topic=common.names.results,
        dead_letters_topic=common.names.dead_letters,
        **given,
    )
    # Each file on its way in is an open one: take all that this user may have.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    try:
        stopped = asyncio.run(_serve(Service(settings)))
    except StartError as error:
        raise Failure(str(error)) from error
    if not stopped:
        raise click.exceptions.Exit(INTERRUPTED)


async def _serve(service: Service) -> bool:
    """Run until stopped. False: it was abandoned by a second signal."""
    signals = 0

    def on_signal(name: str) -> None:
        nonlocal signals
        signals += 1
        if signals == 1:
            log.info("stopping: finishing what is in flight; again to leave at once", signal=name)
            service.stop()
        elif signals == 2:
            log.warning("leaving at once", signal=name)
            service.abandon()
        else:
            os._exit(INTERRUPTED)

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal, number.name)
    await service.run()
    return signals < 2
