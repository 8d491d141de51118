"""What another version, or somebody else, has written: read as far as it is understood, refused
with one line where it is not."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path

import msgpack
import pytest

from brokers import Topics
from checker import violations
from command import command, topics_of
from splitferry_consumer.catalogue import SCHEMA, Catalogue
from splitferry_protocol.codec import crc_header
from splitferry_protocol.ids import RequestId
from splitferry_protocol.records import Status
from stage import stage, until
from workload import Message, cut, message, sending
from workload import send as write

MakeTopics = Callable[..., Awaitable[Topics]]


def with_header(sound: Message, **keys: object) -> Message:
    """The record with more in its header, or with something else."""
    assert sound.value is not None
    unpacker = msgpack.Unpacker()
    unpacker.feed(sound.value)
    header, payload = unpacker
    value = msgpack.packb({**header, **keys}) + msgpack.packb(payload)
    return Message(sound.key, value, [crc_header(value)], sound.partition)


async def test_records_of_a_newer_version(
    bootstrap_servers: str, topics: MakeTopics, tmp_path: Path
) -> None:
    """Keys that are not known are passed over; a version that is not known is a dead letter."""
    names = await topics(partitions=1)
    newer, extended, plain = (RequestId(1, number) for number in range(3))
    async with stage(bootstrap_servers, names, tmp_path) as here:
        await here.consumer()
        async with sending(bootstrap_servers) as producer:
            for request, keys in ((newer, {"v": 2}), (extended, {"hue": "blue"}), (plain, {})):
                sound = [message(split, 1) for split in cut(request, b"bytes", 2)]
                changed = [with_header(record, **keys) for record in sound]
                await write(producer, names.splits, changed)
        await until(lambda: plain in here.results, "the result of the last request")
        await here.settle()
        await here.stop()
        history = await here.history()
    assert not violations(history)
    assert newer not in here.results
    assert here.results[extended].status is Status.COMPLETED
    told = "__connect.errors.exception.message"
    causes = [dict(letter.headers)[told] for letter in history.dead_letters]
    assert len(causes) == 3
    assert all(b"2 is not a version known here (1)" in cause for cause in causes)


def newer(path: Path) -> None:
    Catalogue(str(path)).close()
    with closing(sqlite3.connect(path)) as database:
        database.execute(f"PRAGMA user_version = {SCHEMA + 1}")


def foreign(path: Path) -> None:
    with closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE photos (name TEXT)")


def foreign_with_our_number(path: Path) -> None:
    foreign(path)
    with closing(sqlite3.connect(path)) as database:
        database.execute(f"PRAGMA user_version = {SCHEMA}")


def no_database(path: Path) -> None:
    path.write_bytes(b"these are holiday photos, no catalogue " * 100)


def damaged(path: Path) -> None:
    Catalogue(str(path)).close()
    data = path.read_bytes()
    path.write_bytes(data[:100] + b"\xff" * (len(data) - 100))


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (newer, "was written by a newer splitferry (schema 2, this one knows 1): upgrade"),
        (foreign, "is no catalogue of splitferry: move it away"),
        (foreign_with_our_number, "is no catalogue of splitferry: move it away"),
        (no_database, "is damaged (file is not a database): restore it from a backup"),
        (damaged, "is damaged (database disk image is malformed): restore it from a backup"),
    ],
)
async def test_a_catalogue_that_is_not_ours_ends_the_start(
    bootstrap_servers: str,
    topics: MakeTopics,
    tmp_path: Path,
    made: Callable[[Path], None],
    said: str,
) -> None:
    catalogue = tmp_path / "root" / ".splitferry" / "catalog.db"
    catalogue.parent.mkdir(parents=True)
    await asyncio.to_thread(made, catalogue)
    before = catalogue.read_bytes()
    options = {
        **topics_of(await topics(partitions=1)),
        "SPLITFERRY_BOOTSTRAP_SERVERS": bootstrap_servers,
    }
    outcome = await command(options, "consume", "--root", tmp_path / "root")
    assert outcome.code == 1
    assert f"{catalogue} {said}" in outcome.error
    assert catalogue.read_bytes() == before


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            '[consume]\nfile-mod = "0600"',
            "unknown key 'consume.file-mod'; the nearest valid one is",
        ),
        ('sasl-passwort-file = "x"', "the nearest valid one is 'sasl-password-file'"),
        ('[consume]\nfile-mode = "0666"', "everyone could change what was received"),
    ],
)
async def test_a_configuration_of_another_version_is_wrong_usage(
    tmp_path: Path, text: str, said: str
) -> None:
    config = tmp_path / "splitferry.toml"
    config.write_text(text)
    outcome = await command({}, "consume", "--config", config, "--root", tmp_path / "root")
    assert outcome.code == 2
    assert said in outcome.error
    assert len(outcome.stderr.splitlines()) == 1
