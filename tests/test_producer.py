"""The producer's parts that need no broker: the memory bound, settings, errors, folders."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import ssl
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from aiokafka import errors as kafka
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

import splitferry_producer
from failing import nobody_may_list
from splitferry_producer import (
    ConnectionSettings,
    DeliveryFailed,
    FolderFile,
    InvalidItem,
    LoginRefused,
    MemorySource,
    MissingRights,
    NoBroker,
    Producer,
    ProducerError,
    SourceError,
    UnknownTopic,
    list_folder,
    results,
)
from splitferry_producer.cluster import explain
from splitferry_producer.flow import Allowance, ByteBudget
from splitferry_producer.sending import Link
from splitferry_protocol.rights import TOPIC, Right


@given(
    capacity=st.integers(1, 50),
    requests=st.lists(st.lists(st.integers(0, 70), max_size=6), max_size=8),
    cancelled=st.sets(st.integers(0, 7)),
)
@settings(deadline=None)
def test_the_budget_serves_everyone_and_holds_its_bound(
    capacity: int, requests: list[list[int]], cancelled: set[int]
) -> None:
    budget = ByteBudget(capacity)

    async def confirm(size: int) -> None:
        assert budget.used <= max(capacity, largest)
        await asyncio.sleep(0)
        budget.release(size)

    async def request(sizes: list[int]) -> None:
        with Allowance(budget) as allowance:
            for size in sizes:
                await allowance.admit(size)
                await asyncio.sleep(0)
                allowance.hand_over(size)
                confirming.append(asyncio.create_task(confirm(size)))

    confirming: list[asyncio.Task[None]] = []
    largest = max((size for sizes in requests for size in sizes), default=0)

    async def run() -> None:
        tasks = [asyncio.create_task(request(sizes)) for sizes in requests]
        await asyncio.sleep(0)
        for number in cancelled & set(range(len(tasks))):
            tasks[number].cancel()
        async with asyncio.timeout(10):
            await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.gather(*confirming)

    asyncio.run(run())
    assert budget.used == 0
    assert "0 waiting" in repr(budget)


async def test_the_budget_is_first_come_first_served() -> None:
    budget, order = ByteBudget(10), []

    async def take(name: str, size: int) -> None:
        await budget.acquire(size)
        order.append(name)

    await budget.acquire(6)
    tasks = [asyncio.create_task(take("large", 9)), asyncio.create_task(take("small", 1))]
    await asyncio.sleep(0)
    assert order == []  # the small one fits, but came later
    budget.release(6)
    await asyncio.gather(*tasks)
    assert order == ["large", "small"]


async def test_bytes_granted_to_a_cancelled_task_come_back() -> None:
    budget = ByteBudget(10)
    await budget.acquire(10)
    waiting = asyncio.create_task(budget.acquire(5))
    await asyncio.sleep(0)
    budget.release(10)  # grants the 5
    waiting.cancel()  # before the task runs
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert budget.used == 0


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ({"bootstrap_servers": " "}, "at least one HOST:PORT"),
        ({"security_protocol": "TLS"}, "choose one of PLAINTEXT, SSL"),
        ({"security_protocol": "SASL_SSL"}, "needs sasl_username and sasl_password"),
        ({"sasl_username": "me", "sasl_password": "x"}, "set security_protocol to SASL_SSL"),
        ({"ssl_cafile": "ca.pem"}, "set security_protocol to SSL"),
        ({"security_protocol": "SSL", "ssl_keyfile": "key.pem"}, "needs ssl_certfile"),
        (
            {
                "security_protocol": "SASL_SSL",
                "sasl_mechanism": "MAGIC",
                "sasl_username": "me",
                "sasl_password": "x",
            },
            "choose one of PLAIN",
        ),
    ],
)
def test_settings_that_contradict_each_other_name_the_remedy(
    settings: dict[str, Any], remedy: str
) -> None:
    with pytest.raises(ValueError, match=remedy):
        ConnectionSettings(**settings)


def test_settings_become_client_options() -> None:
    assert ConnectionSettings("a:1").client_options() == {
        "bootstrap_servers": "a:1",
        "security_protocol": "PLAINTEXT",
    }
    secure = ConnectionSettings(
        "a:1", security_protocol="SASL_SSL", sasl_username="me", sasl_password="hush"
    )
    options = secure.client_options()
    context = options.pop("ssl_context")
    assert isinstance(context, ssl.SSLContext)
    assert context.check_hostname
    assert options["sasl_plain_password"] == "hush"
    assert "hush" not in repr(secure)


async def test_certificate_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    settings = ConnectionSettings(security_protocol="SSL", ssl_cafile=str(tmp_path / "none.pem"))
    with pytest.raises(ProducerError, match="certificate files"):
        async with Producer(settings, state_dir=tmp_path):
            pass


@pytest.mark.parametrize(
    ("error", "expected", "told"),
    [
        (kafka.TopicAuthorizationFailedError(), MissingRights, "right to Write on topic t:"),
        (kafka.ClusterAuthorizationFailedError(), MissingRights, "IdempotentWrite on cluster"),
        (kafka.UnknownTopicOrPartitionError(), UnknownTopic, "splitferry topics create"),
        (kafka.SaslAuthenticationFailed("no"), LoginRefused, "check the user name"),
        (kafka.KafkaConnectionError("gone"), NoBroker, "check that it is up"),
        (kafka.LeaderNotAvailableError(), ProducerError, "topic t cannot be used now: "),
        (NoBroker("as it is"), NoBroker, "as it is"),
    ],
)
def test_kafkas_errors_become_ours(
    error: Exception, expected: type[ProducerError], told: str
) -> None:
    made = explain(error, "a:1", Right("Write", TOPIC, "t"))
    assert type(made) is expected
    assert told in made.message
    assert "\n" not in made.message


async def test_a_record_that_is_not_taken_says_what_to_do() -> None:
    link = Link({"bootstrap_servers": "a:1"}, "t", 1000, 1.0)
    for error, told in (
        (kafka.MessageSizeTooLargeError(), "raise its max.message.bytes"),
        (kafka.OutOfOrderSequenceNumber(), "did not take a record for topic t: .*; send it again"),
    ):
        made = link._explain(error)
        assert type(made) is DeliveryFailed
        assert re.search(told, made.message)
    assert type(link._explain(kafka.KafkaConnectionError("gone"))) is NoBroker
    await link.close()


async def test_no_broker_is_told_with_its_cause(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening: nobody else can answer there
        servers = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(NoBroker, match=rf"at {servers} \(.*refused.*start one") as told:
            async with Producer(ConnectionSettings(servers), state_dir=tmp_path):
                pass
    assert "\n" not in str(told.value)


async def test_ids_that_cannot_name_a_file_are_refused_before_anything_is_read() -> None:
    producer = Producer(ConnectionSettings())
    source = MemorySource(b"", block=splitferry_producer.FileSource("x").block)
    with pytest.raises(InvalidItem, match=r"segment \. or \.\."):
        await producer.send(source, unique_id="../etc")


async def test_a_folder_is_listed_in_one_order_and_says_what_it_leaves_out(
    tmp_path: Path,
) -> None:
    names = ["b", "a/z", "a/é", "B", "a-b", "deep/er/f"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("b")
    (tmp_path / "loop").symlink_to(".")
    os.mkfifo(tmp_path / "fifo")
    with open(os.fsencode(tmp_path) + b"/not\xff", "wb"):
        pass
    (tmp_path / ".splitferry").mkdir()
    (tmp_path / ".splitferry" / "catalog.db").touch()
    with capture_logs() as logs:
        listing = await list_folder(tmp_path)
    assert listing.files == tuple(
        FolderFile(tmp_path / name, name) for name in sorted(names, key=str.encode)
    )
    assert [(path.name.encode(errors="replace"), cause) for path, cause in listing.skipped] == [
        (b"catalog.db", "cannot be named: the path lies in .splitferry/, which is the "
         "consumer's own"),
        (b"fifo", "is no regular file"),
        (b"link", "is a symbolic link"),
        (b"loop", "is a symbolic link"),
    ]  # fmt: skip
    assert [(path.name.encode(errors="replace"), cause) for path, cause in listing.failed] == [
        (b"not?", "cannot be named: the path is not valid UTF-8"),
    ]
    assert [entry["event"] for entry in logs] == ["not sent"] * 5


async def test_a_folder_that_cannot_be_listed_says_so(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="cannot be listed: No such file"):
        await list_folder(tmp_path / "none")


async def test_a_folder_inside_that_cannot_be_listed_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open/file").touch()
    (tmp_path / "shut").mkdir()
    nobody_may_list("shut", monkeypatch)
    with capture_logs() as logs:
        listing = await list_folder(tmp_path)
    assert [file.unique_id for file in listing.files] == ["open/file"]
    assert listing.skipped == ()
    assert listing.failed == ((tmp_path / "shut", "cannot be listed: Permission denied"),)
    assert len(logs) == 1


def test_all_that_is_exported_is_there() -> None:
    for name in splitferry_producer.__all__:
        assert getattr(splitferry_producer, name).__doc__, name
    errors = [
        found
        for name in splitferry_producer.__all__
        if isinstance(found := getattr(splitferry_producer, name), type)
        and issubclass(found, Exception)
    ]
    assert all(issubclass(found, ProducerError) for found in errors)


def test_the_package_does_not_import_the_consumer() -> None:
    program = "import sys, splitferry_producer; sys.exit('splitferry_consumer' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


async def test_a_cancellation_inside_a_reader_that_closes_is_not_ours() -> None:
    class Closing:
        async def stop(self) -> None:
            raise asyncio.CancelledError

    await results._close(Closing())  # type: ignore[arg-type]
