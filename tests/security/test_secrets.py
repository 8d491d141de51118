"""A password is nowhere but in its file: not in what is printed or logged, not in /proc."""

from __future__ import annotations

import asyncio
import copy
import io
import logging
import os
import sys
import traceback
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import structlog
from rich.console import Console
from rich.traceback import Traceback

from brokers import make_topics
from command import command, topics_of
from secured_broker import EVERYTHING, PASSWORD, SecuredBroker, environment
from splitferry_cli import logs
from splitferry_consumer.service import Service, Settings, StartError
from splitferry_producer import LoginRefused, MemorySource, Producer
from splitferry_protocol.connection import ConnectionSettings, Secret
from stage import stage, until

WRONG = "wr0ng-" + "m4rked" * 20
"""Long enough to be cut by whoever shows long texts in part."""


def assert_hidden(text: str, secret: str = PASSWORD) -> None:
    """Neither the password nor a good part of it."""
    half = secret[: len(secret) // 2]
    found = [line for line in text.splitlines() if half in line]
    assert not found, found


def settings(servers: str = "a:1", password: str = PASSWORD) -> ConnectionSettings:
    return ConnectionSettings(
        servers, "SASL_PLAINTEXT", sasl_username="alice", sasl_password=password
    )


@pytest.mark.parametrize("show", [repr, str, "{}".format, "{0!r}".format, lambda it: f"{it!s:>9}"])
def test_a_secret_shows_itself_to_nobody(show: object) -> None:
    assert callable(show)
    held = settings()
    for shown in (held, held.client_options(), held.sasl_password, Secret(PASSWORD)[:200]):
        assert_hidden(show(shown))
    for kept in (held, replace(held, bootstrap_servers="b:1"), copy.deepcopy(held)):
        assert "\0".join([kept.sasl_password or ""]).encode() == PASSWORD.encode()


def fail_with(options: dict[str, object]) -> None:
    password = options["sasl_plain_password"]
    raise RuntimeError(type(password).__name__)


def test_tracebacks_with_locals_do_not_show_it() -> None:
    try:
        fail_with(settings(password=WRONG).client_options())
    except RuntimeError as error:
        told = "".join(
            traceback.TracebackException.from_exception(error, capture_locals=True).format()
        )
        console = Console(file=io.StringIO(), width=400)
        rich = Traceback.from_exception(type(error), error, error.__traceback__, show_locals=True)
        console.print(rich)
        assert isinstance(console.file, io.StringIO)
        told += console.file.getvalue()
    assert "options" in told
    assert_hidden(told, WRONG)


@pytest.fixture
def logging_as_it_was() -> Iterator[None]:
    root, kafka = logging.getLogger(), logging.getLogger("aiokafka")
    before = root.handlers[:], root.level, kafka.level
    yield
    root.handlers[:], root.level, kafka.level = before
    structlog.reset_defaults()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.usefixtures("logging_as_it_was")
def test_a_log_on_a_terminal_shows_no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Kafka's client holds of the password in its own variables is a plain text."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    logs.configure(verbose=True, service=True)
    payload = f"\0alice\0{PASSWORD}"
    try:
        raise RuntimeError(f"{len(payload)} bytes")
    except RuntimeError:
        structlog.get_logger("splitferry").exception("unexpected error")
    told = terminal.getvalue()
    assert "RuntimeError" in told
    assert_hidden(told)


@pytest.mark.kafka
async def test_a_librarys_debug_log_and_its_errors_do_not_show_it(
    secured: SecuredBroker, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    await secured.grant("alice", *EVERYTHING)
    names = await make_topics(secured.bootstrap_servers, partitions=1)
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.DEBUG, "aiokafka")  # which the command may have set before

    def service(connection: ConnectionSettings) -> Service:
        return Service(
            Settings(
                connection, tmp_path / "root", names.splits, names.splits, names.results,
                names.dead_letters,
            )
        )  # fmt: skip

    def producer(connection: ConnectionSettings) -> Producer:
        return Producer(
            connection,
            splits_topic=names.splits,
            results_topic=names.results,
            state_dir=tmp_path / "state",
        )

    login = secured.login("alice")
    receiving = service(login)
    running = asyncio.create_task(receiving.run())
    async with producer(login) as sending:
        await sending.send(MemorySource(b"bytes"), unique_id="item")
    receiving.stop()
    await running
    assert "SaslAuthenticateRequest" in caplog.text
    assert_hidden(caplog.text)
    assert_hidden(repr(sending) + repr(receiving) + repr(vars(receiving)))

    wrong = settings(secured.address("PASSWORD"), WRONG)
    with pytest.raises(LoginRefused) as refused:
        async with producer(wrong):
            pass
    with pytest.raises(StartError) as no_start:
        await service(wrong).run()
    for error in (refused.value, no_start.value):
        found = traceback.TracebackException.from_exception(error, capture_locals=True)
        told = "".join(found.format())
        assert "sasl_plain_password" in told
        assert_hidden(told, WRONG)
    assert_hidden(caplog.text, WRONG)


def proc(pid: int) -> str:
    return "".join(
        Path(f"/proc/{pid}/{name}").read_bytes().decode(errors="replace").replace("\0", "\n")
        for name in ("cmdline", "environ")
    )


@pytest.mark.kafka
async def test_no_process_shows_it(secured: SecuredBroker, tmp_path: Path) -> None:
    await secured.grant("alice", *EVERYTHING)
    names = await make_topics(secured.bootstrap_servers, partitions=1)
    item = tmp_path / "item"
    item.write_bytes(os.urandom(1000))
    options = {
        **topics_of(names),
        **environment(secured.login("alice"), tmp_path / "password"),
        "SPLITFERRY_VERBOSE": "1",
        "XDG_STATE_HOME": str(tmp_path / "state"),
    }
    async with stage(secured.bootstrap_servers, names, tmp_path / "stage") as made:
        variables = {name.removeprefix("SPLITFERRY_"): options[name] for name in options}
        consumer = await made.consumer(**variables)
        await until(lambda: consumer.heard("partition taken") > 0, "it has joined")
        assert "SASL_PASSWORD_FILE" in proc(consumer.pid)
        assert_hidden(proc(consumer.pid))
        runs = [
            await command(options, *args)
            for args in (
                ("send", "--json", item),
                ("result", "9-1"),
                ("abort", "9-1", "--reason", "x"),
                ("topics", "check"),
            )
        ]
        await made.stop()
        assert runs[0].code == 0, runs[0]
        assert "Authenticated as alice via PLAIN" in consumer.log.read_text()
        assert_hidden(consumer.log.read_text())
    (tmp_path / "password").write_text(WRONG)
    root = ("--root", tmp_path / "other")
    runs += [await command(options, *args) for args in (("send", item), ("consume", *root))]
    told = "".join(run.stdout + run.stderr for run in runs)
    assert "refuses the login" in told
    assert_hidden(told)
    assert_hidden(told, WRONG)
