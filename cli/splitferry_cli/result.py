"""`splitferry result`: what was recorded of a request."""

from __future__ import annotations

import click

from splitferry_protocol.errors import BatchTransferNotFound
from splitferry_protocol.ids import RequestId

from .command import Command, Common, run
from .failures import Failure
from .lookup import recorded_results
from .options import option
from .values import Request


@click.command(
    "result",
    cls=Command,
    examples="""
    splitferry result 7-42
    splitferry result 7-42 --group archive --json
    """,
)
@click.argument("request", type=Request())
@option(
    "--group",
    metavar="GROUP",
    help="Consumer group that recorded it; else all.",
)
@click.pass_obj
def result(common: Common, request: RequestId, group: str | None) -> None:
    """Print the recorded result of REQUEST; exit code 1 when there is none."""
    found = run(recorded_results(common.connection, common.names, request, group))
    if not found:
        raise Failure(
            f"{BatchTransferNotFound.code}: request {request}: no result is recorded yet; "
            "`splitferry status` shows what is open"
        )
    for one in found:
        common.output.result(one)
