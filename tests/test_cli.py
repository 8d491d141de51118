"""The command tree: help, examples, environment variables, messages, output."""

from __future__ import annotations

import asyncio
import errno
import io
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import click
import pytest
from aiokafka import errors as kafka
from click.testing import CliRunner
from rich.console import Console

from failing import nobody_may_list
from splitferry_cli import cluster
from splitferry_cli.app import splitferry
from splitferry_cli.bars import Bars
from splitferry_cli.cluster import records
from splitferry_cli.failures import Failure, explain, told
from splitferry_cli.logs import demote_retries
from splitferry_cli.output import (
    Output,
    counted,
    human_size,
    local_time,
    plain,
    result_fields,
    result_text,
)
from splitferry_cli.send import Item, items_of
from splitferry_cli.values import Moment
from splitferry_producer import ProducerError, SourceError
from splitferry_protocol.connection import ConnectionSettings
from splitferry_protocol.errors import BatchTransferFailed
from splitferry_protocol.ids import RequestId
from splitferry_protocol.records import Block, Input, Result, Status


def commands(
    command: click.Command = splitferry, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    yield path, command
    if isinstance(command, click.Group):
        for name, sub in command.commands.items():
            yield from commands(sub, (*path, name))


ALL = list(commands())
IDS = [" ".join(path) or "splitferry" for path, _ in ALL]


def test_the_commands_are_those_of_the_contract() -> None:
    assert set(IDS) == {
        *("splitferry", "consume", "send", "result", "abort", "topics", "topics create"),
        *("topics check", "broker", "demo", "replay", "completion", "status", "dead-letters"),
        *("dead-letters list", "dead-letters show", "dead-letters requeue"),
    }


@pytest.mark.parametrize("path", [path for path, _ in ALL], ids=IDS)
def test_help_has_examples(path: tuple[str, ...]) -> None:
    outcome = CliRunner().invoke(splitferry, [*path, "--help"], prog_name="splitferry")
    assert outcome.exit_code == 0
    _, _, examples = outcome.output.partition("Examples:\n")
    assert f"splitferry {' '.join(path)}".strip() in examples


@pytest.mark.parametrize("command", [command for _, command in ALL], ids=IDS)
def test_every_option_has_its_environment_variable(command: click.Command) -> None:
    for param in command.params:
        if isinstance(param, click.Option) and not param.is_eager:
            longest = max(param.opts, key=len)
            name = longest.removeprefix("--").replace("-", "_").upper()
            assert param.envvar == f"SPLITFERRY_{name}", longest
            assert param.show_envvar, longest


@pytest.mark.parametrize("path", [path for path, _ in ALL], ids=IDS)
def test_every_variable_and_the_file_are_shown_in_the_help(path: tuple[str, ...]) -> None:
    shown = CliRunner().invoke(splitferry, [*path, "--help"], prog_name="splitferry").output
    assert "SPLITFERRY_BOOTSTRAP_SERVERS" in shown
    assert "SPLITFERRY_CONFIG" in shown


def test_version() -> None:
    outcome = CliRunner().invoke(splitferry, ["--version"], prog_name="splitferry")
    assert outcome.exit_code == 0
    assert outcome.output.startswith("splitferry, version ")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["conusme"], "consume"),
        (["send"], "PATH"),
        (["send", "/nowhere/at/all"], "/nowhere/at/all does not exist"),
        (["send", "-"], "--unique-id"),
        (["send", __file__, "--split-size", "17MiB"], "at most 16777216"),
        (["send", __file__, "--split-size", "lots"], "512KiB"),
        (["send", __file__, "--timeout", "nan"], "above 0"),
        (["send", __file__, "--unique-id", "../up"], "segment . or .."),
        (["send", __file__, __file__], "same unique id"),
        (["send", __file__, "/tmp", "--unique-id", "x"], "single item"),
        (["send", __file__, "--node-id", "4294967296"], "--node-id"),
        (["send", __file__, "--label", "x"], "KEY=VALUE"),
        (["consume"], "--root"),
        (["consume", "--root", "/tmp", "--grace", "0"], "above 0"),
        (["consume", "--root", __file__], "--root"),
        (["result", "7"], "NODE-SEQUENCE"),
        (["abort", "7-42"], "--reason"),
        (["abort", "7-42", "--reason", "x" * 1025], "Error: --reason: 1025 bytes, "),
        (["abort", "7-42", "--reason", " \n"], "Error: --reason: it is blank: say why"),
        (["topics", "create", "--partitions", "0"], "--partitions"),
        (["demo", "/nowhere/at/all"], "/nowhere/at/all"),
    ],
)
def test_wrong_usage_is_exit_code_2_and_one_line(args: list[str], said: str) -> None:
    outcome = CliRunner().invoke(splitferry, args, prog_name="splitferry")
    assert outcome.exit_code == 2
    assert said in outcome.stderr
    assert len(outcome.stderr.splitlines()) == 1
    assert not outcome.stdout


def test_no_command_shows_the_help() -> None:
    outcome = CliRunner().invoke(splitferry, [], prog_name="splitferry")
    assert outcome.exit_code == 2
    assert "Commands:" in outcome.output


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (kafka.KafkaConnectionError("x"), "splitferry broker"),
        (kafka.UnknownTopicOrPartitionError("topic t does not exist"), "topics create"),
        (kafka.TopicAuthorizationFailedError("t"), "rights"),
        (kafka.GroupAuthorizationFailedError("g"), "rights"),
        (kafka.SaslAuthenticationFailed("no"), "--sasl-password-file"),
        (kafka.InvalidReplicationFactorError("t: too many"), "t: too many"),
        (TimeoutError(), "in time"),
        (OSError(errno.ENOSPC, "No space left on device", "/x"), "/x: the disk is full"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), "/x: Permission denied: give"),
        (ProducerError("said so"), "said so"),
        (ExceptionGroup("several", [OSError(errno.ENOSPC, "full")]), "disk is full"),
    ],
)
def test_foreseen_errors_are_told_with_their_remedy(error: Exception, said: str) -> None:
    assert said in str(explain(error, "b:1"))


def test_an_unforeseen_error_is_not_explained() -> None:
    assert explain(KeyError("x"), "b:1") is None


def result(**changes: Any) -> Result:
    return Result(
        **{
            "request": RequestId(7, 42),
            "unique_id": "a/b",
            "version": 3,
            "block": Block.FILE,
            "labels": {"k": "v"},
            "group": "g",
            "status": Status.COMPLETED,
            "error": None,
            "size": 2048,
            "sha256": bytes(32),
            "target": {"path": "a/b"},
            "splits": 1,
            "duplicates": 0,
            "input": Input("t", 0, 1, 2),
            "reply": None,
            "repeat": False,
            "finished_at": 1,
            **changes,
        }
    )


def test_a_result_for_programs() -> None:
    told = json.loads(json.dumps(plain(result_fields(result()))))
    assert told["request"] == "7-42"
    assert told["sha256"] == "00" * 32
    assert told["input"] == ["t", 0, 1, 2]
    assert (told["status"], told["error"], told["size"]) == ("completed", None, 2048)
    failed = result(status=Status.FAILED, error=BatchTransferFailed(RequestId(7, 42), "why"))
    assert plain(result_fields(failed))["error"]["reason"] == "why"


def test_a_result_for_people() -> None:
    assert "a/b v3  2.0 KiB" in result_text(result()).plain
    failed = result(status=Status.FAILED, error=BatchTransferFailed(RequestId(7, 42), "why"))
    assert "BatchTransferFailed: request 7-42 failed: why" in result_text(failed).plain


def test_names_cannot_steer_the_terminal() -> None:
    told = result_text(result(unique_id="a\x1b[2J\nb\udc80é", target={"path": "\x07"})).plain
    assert "a\\x1b[2J\\nb\\udc80é v3" in told
    assert told.isprintable()


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.5 KiB"),
        (2**20 - 1, "1.0 MiB"),
        (2**50, "1024.0 TiB"),
    ],
)
def test_sizes_for_people(size: int, text: str) -> None:
    assert human_size(size) == text


def test_one_of_a_kind_is_told_in_the_singular() -> None:
    told = [counted(number, "item is", "items are") for number in (0, 1, 2)]
    assert told == ["0 items are", "1 item is", "2 items are"]


def test_a_time_that_is_told_can_be_given_back() -> None:
    assert Moment().convert(local_time(1_777_636_800_999), None, None) == 1_777_636_800_000
    assert local_time(2**63 - 1)  # whatever a record says


def test_a_request_without_a_result_may_be_open(monkeypatch: pytest.MonkeyPatch) -> None:
    async def none(*_: object) -> list[Result]:
        return []

    monkeypatch.setattr("splitferry_cli.result.recorded_results", none)
    outcome = CliRunner().invoke(splitferry, ["result", "7-42"], prog_name="splitferry")
    assert outcome.exit_code == 1
    assert "request 7-42: no result is recorded yet; `splitferry status` shows" in outcome.stderr


async def test_what_a_folder_hides_is_told_as_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is in it is not known, so the command may not say that all is done."""
    (tmp_path / "open").touch()
    (tmp_path / "shut").mkdir()
    nobody_may_list("shut", monkeypatch)
    found, hidden = await items_of([str(tmp_path)], None, Block.FILE)
    assert (found.unique_id, hidden.unique_id) == ("open", "shut")
    with pytest.raises(SourceError, match="shut cannot be listed: Permission denied"):
        hidden.source(Block.FILE)


async def test_a_file_may_be_called_as_standard_input_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "-").touch()
    assert await items_of(["./-"], None, Block.FILE) == [Item(Path("-"), "-")]
    assert await items_of(["-"], "name", Block.FILE) == [Item(None, "name")]


async def test_of_no_partition_nothing_is_asked() -> None:
    """A reader that is stopped before its tasks have begun takes their end for a cancellation."""
    nobody = ConnectionSettings("127.0.0.1:1")
    assert [record async for record in records(nobody, "splits", [])] == []


def test_the_bars_of_send_count_in_one_unit() -> None:
    shown = io.StringIO()
    output = Output(as_json=False)
    output.console = Console(file=shown, force_terminal=True, width=120)
    with Bars(output, 100 * 2**20) as bars, bars.item("a", 100 * 2**20) as more:
        for _ in range(25):
            time.sleep(0.01)
            more(2**20)
        bars._progress.refresh()
    assert "MiB/s" in shown.getvalue()
    assert "MB" not in shown.getvalue()


@pytest.mark.parametrize(
    ("message", "level"),
    [
        ("retrying. Error: <class 'aiokafka.errors.ConcurrentTransactions'>", logging.DEBUG),
        ("retrying. Error: <class 'aiokafka.errors.NotEnoughReplicasError'>", logging.DEBUG),
        ("Heartbeat failed for group x because it is rebalancing", logging.WARNING),
    ],
)
def test_transaction_retries_are_no_warnings(message: str, level: int) -> None:
    record = logging.LogRecord("aiokafka", logging.WARNING, "", 0, message, None, None)
    demote_retries(record)
    assert record.levelno == level


def test_what_a_group_of_tasks_tripped_over_is_told() -> None:
    group = ExceptionGroup("unhandled errors in a TaskGroup", [AttributeError("no buffer")])
    assert told(group, "a:1").startswith("unexpected AttributeError: no buffer")


# A `send` without brokers.
SEND = """
import asyncio, sys
from splitferry_cli import send
from splitferry_producer import Sent
from splitferry_protocol.ids import RequestId
class Producer:
    def __init__(self, *_, **__): pass
    async def __aenter__(self): return self
    async def __aexit__(self, *_): pass
    async def send(self, source, *, unique_id, version, **_):
        return Sent(RequestId(7, 1), 0, unique_id, version, 3, bytes(32))
send.Producer = Producer
from splitferry_cli.__main__ import main
main()
"""


@pytest.mark.parametrize("form", ["--json", "--no-json"])
def test_whose_output_nobody_reads_ends_without_a_word(tmp_path: Path, form: str) -> None:
    (tmp_path / "a").touch()
    read_end, write_end = os.pipe()
    os.close(read_end)
    ended = subprocess.run(
        [sys.executable, "-c", SEND, "send", "--no-wait", form, tmp_path / "a"],
        stdout=write_end, stderr=subprocess.PIPE, text=True, check=False, timeout=30,
    )  # fmt: skip
    os.close(write_end)
    assert (ended.returncode, ended.stderr) == (1, "")


def test_standard_input_that_is_closed_is_told() -> None:
    ended = subprocess.run(
        ["sh", "-c", '"$0" "$@" <&-', sys.executable, "-c", SEND,
         "send", "--no-wait", "--json", "-", "--unique-id", "x"],
        capture_output=True, text=True, check=False, timeout=30,
    )  # fmt: skip
    assert '"standard input is closed"' in ended.stdout, ended


HANGS = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored
def hanging(path):
    print("listing", flush=True)
    time.sleep(600)
os.scandir = hanging
from splitferry_cli.__main__ import main
main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_what_a_thread_holds_up(tmp_path: Path, number: int) -> None:
    """As a file system whose server is away."""
    with subprocess.Popen(
        [sys.executable, "-c", HANGS, "send", tmp_path], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            process.send_signal(number)
            with suppress(subprocess.TimeoutExpired):
                process.wait(0.5)
            assert process.poll() is None, "the first one lets it end by itself"
            for _ in range(100):  # what comes while it is ending still counts as the first
                process.send_signal(number)
                with suppress(subprocess.TimeoutExpired):
                    assert process.wait(0.3) == 130
                    return
            raise AssertionError("it does not end")
        finally:
            process.kill()


async def test_records_that_do_not_come_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent:
        """A reader whose broker says where the log ends, and then nothing more."""

        def seek(self, where: Any, offset: int) -> None: ...

        async def beginning_offsets(self, wanted: Any) -> Any:
            return dict.fromkeys(wanted, 0)

        async def end_offsets(self, wanted: Any) -> Any:
            return dict.fromkeys(wanted, 1)

        async def position(self, where: Any) -> int:
            return 0

        async def getmany(self, *wanted: Any, timeout_ms: int) -> Any:
            await asyncio.sleep(0.01)
            return {}

    @asynccontextmanager
    async def reader(*_: Any) -> AsyncIterator[Any]:
        yield Silent()

    monkeypatch.setattr(cluster, "_reader", reader)
    monkeypatch.setattr(cluster, "SILENCE", 0.2)
    with pytest.raises(Failure, match=r"nothing came of t, partition 0, for 0\.2 s"):
        _ = [record async for record in records(ConnectionSettings(), "t", [0])]


async def test_an_empty_unique_id_is_no_id(tmp_path: Path) -> None:
    """As of a shell's variable that is not set."""
    (tmp_path / "f").touch()
    with pytest.raises(click.UsageError, match="0 bytes"):
        await items_of([str(tmp_path / "f")], "", Block.FILE)
