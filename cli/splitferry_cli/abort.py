"""`splitferry abort`: end a request by an operator's word."""

from __future__ import annotations

import asyncio
import contextlib

import click

from splitferry_producer import NoBroker
from splitferry_producer.cluster import client_options
from splitferry_producer.sending import Link
from splitferry_producer.splitting import TOPIC_DEFAULT
from splitferry_protocol.codec import encode_abort
from splitferry_protocol.connection import ConnectionSettings
from splitferry_protocol.errors import BatchTransferNotFound
from splitferry_protocol.ids import RequestId
from splitferry_protocol.records import Abort, Result, Status

from .cluster import administration, ends
from .command import Command, Common, run
from .failures import Failure
from .lookup import open_in, recorded_results, results_from
from .options import option
from .topic_rules import Names
from .values import Request, Seconds

WRITE_BOUND = 15.0
"""Seconds for the brokers to confirm an abort record."""


@click.command(
    "abort",
    cls=Command,
    examples="""
    splitferry abort 7-42 --reason "sent by mistake"
    splitferry abort 7-42 --reason "wrong version" --group archive --timeout 60
    """,
)
@click.argument("request", type=Request())
@option("--reason", required=True, metavar="TEXT", help="Why, as the result will say; up to 1 KiB.")
@option("--group", default="splitferry", metavar="GROUP", help="Consumer group to wait for.")
@option("--timeout", type=Seconds(), default=30, help="How long to wait for the result.")
@click.pass_obj
def abort(common: Common, request: RequestId, reason: str, group: str, timeout: float) -> None:
    """Write the abort record of REQUEST and wait for its result.

    Exit code 0 when the request ended aborted; 1 when it ended otherwise, or is not known.
    """
    if not reason.strip():
        raise click.UsageError("--reason: it is blank: say why", click.get_current_context())
    try:
        value = encode_abort(Abort(request, reason))
    except ValueError as error:  # begins with the field: "reason: "
        raise click.UsageError(f"--{error}", click.get_current_context()) from error
    result = run(_abort(common, request, value, group, timeout))
    common.output.result(result)
    if result.status is not Status.ABORTED:
        raise Failure(f"request {request} is not aborted: it has ended as {result.status}")


async def _abort(
    common: Common, request: RequestId, value: bytes, group: str, timeout: float
) -> Result:
    connection, names = common.connection, common.names
    # Noted before anything is looked up: a result that comes meanwhile lies behind it.
    starts = await _result_ends(connection, names)
    ended = await recorded_results(connection, names, request, group)
    if ended:
        common.output.note(f"Request {request} had ended before; nothing was written.")
        return ended[-1]
    partition = await open_in(connection, names, request, group)
    if partition is None:
        missing = BatchTransferNotFound(request)
        raise Failure(f"{missing.code}: {missing.message} to group {group}; nothing was written")
    await write(connection, names.splits, partition, request, value)
    try:
        async with (
            asyncio.timeout(timeout),
            contextlib.aclosing(
                results_from(connection, names, partition, starts.get(partition, 0))
            ) as results,
        ):
            async for result in results:
                if (result.request, result.group) == (request, group) and not result.repeat:
                    return result
    except TimeoutError:
        pass
    raise Failure(
        f"the abort record of request {request} is written, but no result came within "
        f"{timeout:g} s: is a consumer of group {group} running?"
    )


async def _result_ends(connection: ConnectionSettings, names: Names) -> dict[int, int]:
    async with administration(connection) as cluster:
        partitions = await cluster.partitions(names.results)
    return await ends(connection, names.results, range(partitions))


async def write(
    connection: ConnectionSettings, topic: str, partition: int, request: RequestId, value: bytes
) -> None:
    """Write an encoded abort record of `request`, within some 50 s. Raises ProducerError."""
    link = Link(await client_options(connection), topic, TOPIC_DEFAULT, WRITE_BOUND)
    await link.start()
    try:
        await (await link.send(request, value, partition))
    except NoBroker as error:
        raise NoBroker(f"{error}; the abort record may come yet") from error
    finally:
        await link.close()
