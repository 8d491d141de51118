"""`splitferry dead-letters`: look into the dead letters, and send them again."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator
from contextlib import aclosing
from typing import Any

import click
from aiokafka import TopicPartition

from splitferry_consumer.dead_letters import Letter, Position, Requeued
from splitferry_consumer.log_reader import LogReader
from splitferry_protocol.codec import InvalidRecord, decode_record, read_header
from splitferry_protocol.records import Split

from .command import Command, Common, Group, run
from .dump import brief, cut, hex_dump
from .failures import Failure
from .options import option
from .output import counted, human_size, local_time, printable
from .requeue import Handled, Outcome, find, letters, requeue
from .values import Moment, PartitionOffset

dead_letters = Group(
    "dead-letters",
    help="Look into the dead letters, and send them again.",
    examples="""
    splitferry dead-letters list
    splitferry dead-letters show 0:12
    splitferry dead-letters requeue 0:12 3:7
    """,
)


@dead_letters.command(
    "list",
    cls=Command,
    examples="""
    splitferry dead-letters list
    splitferry dead-letters list --since 2h --limit 1000
    splitferry dead-letters list --since 2030-01-31T18:00 --json
    """,
)
@option("--since", type=Moment(), metavar="TIME", help="Only later ones: 15m, 2h, 7d or a date.")
@option("--limit", type=click.IntRange(1), default=100, metavar="N", help="Only the newest N.")
@click.pass_obj
def list_(common: Common, since: int | None, limit: int) -> None:
    """List the dead letters, the newest last.

    The first column names each: PARTITION:OFFSET of the dead-letter topic.
    """
    found = run(_list(common, since, limit))
    for row in found:
        common.output.tell(row, _line(row))
    if len(found) == limit:
        common.output.note(f"The newest {limit}; --limit shows more.")
    elif not found:
        common.output.note("No dead letters.")


@dead_letters.command(
    "show",
    cls=Command,
    examples="""
    splitferry dead-letters show 0:12
    splitferry dead-letters show 0:12 --bytes 4096
    """,
)
@click.argument("letter", metavar="N", type=PartitionOffset())
@option("--bytes", "shown", type=click.IntRange(0), default=256, help="Bytes of the value to show.")
@click.pass_obj
def show(common: Common, letter: Position, shown: int) -> None:
    """Show the dead letter N: where it comes from, what is wrong with it, and what it holds.

    N is PARTITION:OFFSET, as in the list.
    """
    found, note = run(_show(common, letter))
    fields = {**_with(_row(found), note), **_content(found), "value": (found.value or b"")[:shown]}
    common.output.tell(fields, "\n".join(_page(found, note, shown)))


@dead_letters.command(
    "requeue",
    cls=Command,
    examples="""
    splitferry dead-letters requeue 0:12
    splitferry dead-letters requeue 0:12 0:13 3:7 --json
    splitferry dead-letters requeue 0:12 --force
    """,
)
@click.argument("wanted", metavar="N...", type=PartitionOffset(), nargs=-1, required=True)
@option(
    "--group",
    default="splitferry",
    metavar="GROUP",
    help="Consumer group whose results are looked at.",
)
@option("--force/--no-force", help="Also those that would do nothing, or die again.")
@click.pass_obj
def requeue_(common: Common, wanted: tuple[Position, ...], group: str, force: bool) -> None:
    """Send the records of the dead letters N… again, to the partitions that they came from.

    Each is sent once, however often this is run, on whatever machine. Exit code 1 when one of
    them was refused or not found.
    """
    left = run(_requeue(common, wanted, group, force))
    if left:
        raise Failure(f"{counted(left, 'dead letter was', 'dead letters were')} not sent")


async def _list(common: Common, since: int | None, limit: int) -> list[dict[str, Any]]:
    topic = common.names.dead_letters
    async with LogReader(await asyncio.to_thread(common.connection.client_options)) as log:
        found = [
            row
            for partition in await log.partitions(topic)
            for row in await _newest(log, TopicPartition(topic, partition), since, limit)
        ]
    found.sort(key=lambda row: row["written_at"])  # stable: in the order of partitions, offsets
    return found[-limit:]


async def _newest(
    log: LogReader, where: TopicPartition, since: int | None, limit: int
) -> list[dict[str, Any]]:
    """The newest of one partition, in their order.

    Read from the end backwards, in windows that double: nobody knows how many offsets are notes
    and markers of transactions.
    """
    least, end = await log.bounds(where)
    if since is not None:
        later = await log.offset_at(where, since)
        least = end if later is None else max(least, later)
    window = 2 * limit
    while True:
        start = max(least, end - window)
        # Rows and not letters, whose values may be large.
        newest: deque[dict[str, Any]] = deque(maxlen=limit)
        notes: dict[str, Requeued] = {}
        async with aclosing(letters(log, where, start, end)) as records:
            async for one in records:
                if isinstance(one, Requeued):
                    notes.setdefault(str(one.letter), one)
                else:
                    newest.append(_row(one))
        if start == least or len(newest) == limit:
            return [_with(row, notes.get(row["dead_letter"])) for row in newest]
        window *= 2


async def _show(common: Common, position: Position) -> tuple[Letter, Requeued | None]:
    topic = common.names.dead_letters
    async with LogReader(await asyncio.to_thread(common.connection.client_options)) as log:
        found = await find(log, topic, position)
        if not isinstance(found, Letter):
            raise Failure(f"dead letter {position}: {found}")
        where = TopicPartition(topic, position.partition)
        _, end = await log.bounds(where)
        async with aclosing(letters(log, where, position.offset, end)) as records:
            async for one in records:
                if isinstance(one, Requeued) and one.letter == position:
                    return found, one
    return found, None


async def _requeue(common: Common, wanted: tuple[Position, ...], group: str, force: bool) -> int:
    """How many were not sent."""
    left = 0
    async with aclosing(requeue(common.connection, common.names, group, wanted, force)) as outcomes:
        async for told in outcomes:
            left += told.outcome in {Outcome.REFUSED, Outcome.MISSING}
            common.output.tell(
                {
                    "dead_letter": str(told.letter),
                    "outcome": told.outcome.value,
                    "to": told.to and str(told.to),
                    "at": told.at,
                    "reason": told.reason,
                },
                _told(told, common.names.splits),
            )
    return left


def _told(told: Handled, topic: str) -> str:
    text = f"{told.outcome:<15}  {told.letter}"
    if told.to is not None:
        text += f"  → {topic} {told.to}"
    if told.at is not None:
        text += f" at {local_time(told.at)}"
    if told.reason is not None:
        text += f": {printable(told.reason)}"
    return text


# ---- how a dead letter is shown


def _row(letter: Letter) -> dict[str, Any]:
    return {
        "dead_letter": str(letter.at),
        "written_at": letter.written_at,
        "code": letter.code,
        "message": letter.message,
        "topic": letter.topic,
        "partition": letter.source.partition,
        "offset": letter.source.offset,
        "request": letter.request,
        "size": len(letter.value or b""),
        "requeued": None,
    }


def _with(row: dict[str, Any], note: Requeued | None) -> dict[str, Any]:
    return row if note is None else {**row, "requeued": {"to": str(note.to), "at": note.at}}


def _line(row: dict[str, Any]) -> str:
    """A row of the list for people."""
    request = "" if row["request"] is None else f"  request {row['request']}"
    again = "" if row["requeued"] is None else f"  sent again to {row['requeued']['to']}"
    return (
        f"{row['dead_letter']:<8}  {local_time(row['written_at'])}  from {printable(row['topic'])} "
        f"{row['partition']}:{row['offset']}{request}  {human_size(row['size'])}{again}\n"
        f"          {printable(row['code'])}: {cut(row['message'], 'cut')}"
    )


def _content(letter: Letter) -> dict[str, Any]:
    """What the record says now, by the contract as it is known here."""
    problem = None
    try:
        decode_record(letter.key, letter.value, letter.headers)
    except InvalidRecord as invalid:
        problem = invalid.message
    try:
        header = _simple(read_header(letter.value or b"")[0])
    except ValueError:
        header = None
    return {
        "sent_at": letter.sent_at,
        "problem": problem,
        "key": letter.key,
        "headers": [[name, value] for name, value in letter.headers],
        "header": header,
    }


def _simple(value: Any) -> Any:
    """What msgpack holds, in types that JSON can have as well."""
    if isinstance(value, dict):
        return {name: _simple(part) for name, part in value.items()}
    if type(value) is list:
        return [_simple(part) for part in value]
    return value if value is None or isinstance(value, (bool, int, str, bytes)) else repr(value)


def _page(letter: Letter, note: Requeued | None, shown: int) -> Iterator[str]:
    content = _content(letter)
    yield f"dead letter  {letter.at}, written {local_time(letter.written_at)}"
    sent = local_time(letter.sent_at)
    yield f"from         {printable(letter.topic)} {letter.source}, sent {sent}"
    yield f"error        {printable(letter.code)}: {printable(letter.message)}"
    yield f"now          {_now(letter, content['problem'])}"
    if note is not None:
        yield f"sent again   {local_time(note.at)} to {printable(letter.topic)} {note.to}"
    yield f"key          {brief(letter.key)}"
    for name, value in letter.headers:
        yield f"header       {cut(name, 'cut')}: {brief(value)}"
    for name, value in (content["header"] or {}).items():
        told = brief(value) if isinstance(value, bytes) else cut(repr(value), "cut")
        yield f"says         {cut(name, 'cut')} = {told}"
    size = len(letter.value or b"")
    kept = "not kept (too large), or empty from the start" if letter.is_stub else f"{size} bytes"
    yield f"value        {kept}"
    yield from hex_dump(letter.value or b"", shown)


def _now(letter: Letter, problem: str | None) -> str:
    if letter.is_stub:
        return "nothing is known but what the error says"
    if problem is not None:
        return f"invalid: {printable(problem)}"
    record = decode_record(letter.key, letter.value, letter.headers)
    if not isinstance(record, Split):
        return f"a valid abort record of request {record.request}"
    total = "unknown" if record.total is None else record.total
    return (
        f"a valid split of request {record.request}: index {record.index}, bytes {record.offset} "
        f"to {record.end} of {total}"
    )
