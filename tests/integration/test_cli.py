"""The command as a process, on a real broker."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from aiokafka import AIOKafkaProducer

from bombs import ZSTD, batch, bomb, record, send_batch
from splitferry_cli import checks
from splitferry_cli.cluster import records
from splitferry_cli.topic_rules import Names
from splitferry_protocol.codec import InvalidRecord, decode_record, encode_result
from splitferry_protocol.connection import ConnectionSettings
from splitferry_protocol.ids import RequestId
from splitferry_protocol.partitioning import partition_for
from splitferry_protocol.records import Abort, Block, Input, Result, Split, Status

NOBODY = "127.0.0.1:1"
STARTED = 120.0
"""Seconds that a broker and a consumer may take to start, on a busy machine."""


@dataclass(frozen=True)
class Outcome:
    code: int
    stdout: str
    stderr: str

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.stdout.splitlines()]

    @property
    def error(self) -> str:
        """The one line that says what is wrong."""
        assert "Traceback" not in self.stderr, self.stderr
        (line,) = [line for line in self.stderr.splitlines() if line.startswith("Error: ")]
        return line


class Cli:
    """Runs the command with the topics of one test."""

    def __init__(self, servers: str, topics: Any, home: Path) -> None:
        self.connection = ConnectionSettings(servers)
        self.names = Names(topics.splits, topics.results, topics.dead_letters)
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("SPLITFERRY_")},
            "HOME": str(home),
            "XDG_STATE_HOME": str(home / "state"),
            "SPLITFERRY_BOOTSTRAP_SERVERS": servers,
            "SPLITFERRY_SPLITS_TOPIC": topics.splits,
            "SPLITFERRY_RESULTS_TOPIC": topics.results,
            "SPLITFERRY_DEAD_LETTERS_TOPIC": topics.dead_letters,
        }

    async def begin(
        self, *args: str | Path, env: Mapping[str, str] | None = None
    ) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "splitferry_cli", *map(str, args)),
            env={**self.environment, **(env or {})},
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )

    async def __call__(
        self, *args: str | Path, env: Mapping[str, str] | None = None, given: bytes = b""
    ) -> Outcome:
        return await ended(await self.begin(*args, env=env), given)

    @contextlib.asynccontextmanager
    async def consumer(self, root: Path) -> AsyncIterator[asyncio.subprocess.Process]:
        process = await self.begin("consume", "--root", root)
        try:
            yield process
            process.send_signal(signal.SIGTERM)
            outcome = await ended(process)
            assert outcome.code == 0, outcome.stderr
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()

    async def splits(self) -> list[Split | Abort]:
        """What the splits topic has, without what is not of the contract."""
        found = []
        async for read in records(self.connection, self.names.splits, range(4)):
            with contextlib.suppress(InvalidRecord):
                found.append(decode_record(read.key, read.value, read.headers))
        return found


async def ended(process: asyncio.subprocess.Process, given: bytes | None = None) -> Outcome:
    stdout, stderr = await process.communicate(given)
    assert process.returncode is not None
    return Outcome(process.returncode, stdout.decode(), stderr.decode())


async def first_split(cli: Cli) -> Split:
    """The first split on the topic, once it is there."""
    async with asyncio.timeout(30):
        while not (found := await cli.splits()):
            await asyncio.sleep(0.1)
    assert isinstance(found[0], Split)
    return found[0]


@pytest.fixture
async def cli(bootstrap_servers: str, topics: Callable[..., Awaitable[Any]], tmp_path: Path) -> Cli:
    return Cli(bootstrap_servers, await topics(partitions=4), tmp_path / "home")


COMMANDS: list[tuple[str, ...]] = [
    ("send", __file__),
    ("result", "7-42"),
    ("abort", "7-42", "--reason", "x"),
    ("status",),
    ("dead-letters", "list"),
    ("dead-letters", "requeue", "0:1"),
    ("topics", "check"),
    ("topics", "create"),
    ("consume", "--root", "root"),
]


@pytest.mark.parametrize("args", COMMANDS, ids=lambda args: args[0])
async def test_no_broker_is_one_line(cli: Cli, args: tuple[str, ...], tmp_path: Path) -> None:
    args = tuple(str(tmp_path / "root") if arg == "root" else arg for arg in args)
    outcome = await cli(*args, "--bootstrap-servers", NOBODY)
    assert outcome.code == 1
    assert NOBODY in outcome.error
    assert "broker" in outcome.error


@pytest.mark.parametrize(
    "args", [c for c in COMMANDS if not {"create", "list"} & {*c}], ids=lambda a: a[0]
)
async def test_an_unknown_topic_is_named(cli: Cli, args: tuple[str, ...], tmp_path: Path) -> None:
    args = tuple(str(tmp_path / "root") if arg == "root" else arg for arg in args)
    outcome = await cli(*args, "--splits-topic", "not-there")
    assert outcome.code == 1
    assert "Traceback" not in outcome.stderr
    said = outcome.stdout + outcome.stderr
    assert "not-there" in said
    assert "topics create" in said


async def test_a_root_that_cannot_be_made(cli: Cli) -> None:
    outcome = await cli("consume", "--root", "/proc/splitferry")
    assert outcome.code == 1
    assert "/proc/splitferry" in outcome.error


async def test_topics_are_created_once_and_checked(cli: Cli) -> None:
    mine = {
        f"SPLITFERRY_{kind.upper()}_TOPIC": f"{cli.names.splits}.new.{kind}"
        for kind in ("splits", "results", "dead_letters")
    }
    for created in (True, False):
        made = await cli("topics", "create", "--partitions", "3", "--json", env=mine)
        assert made.code == 0, made.stderr
        assert [(row["created"], row["partitions"]) for row in made.rows] == [(created, 3)] * 3
    explained = await cli("topics", "check", "--explain", "--json", env=mine)
    assert explained.code == 0, explained
    assert {row["topic"] for row in explained.rows} == set(mine.values())
    assert all(row["value"] == row["created_with"] and row["reason"] for row in explained.rows)
    few = {**mine, "SPLITFERRY_SPLITS_TOPIC": cli.names.splits}
    outcome = await cli("topics", "check", "--json", env=few)
    assert outcome.code == 1
    assert "fewer than the 4" in outcome.rows[0]["problem"]
    assert outcome.rows[0]["remedy"].endswith("--partitions 4")


async def test_results_follow_more_splits_partitions(cli: Cli) -> None:
    new = {"SPLITFERRY_RESULTS_TOPIC": f"{cli.names.splits}.late.results"}
    made = await cli("topics", "create", "--partitions", "2", "--json", env=new)
    rows = {row["topic"]: row for row in made.rows if "partitions" in row}
    assert rows[new["SPLITFERRY_RESULTS_TOPIC"]]["partitions"] == 4


async def test_send_receive_and_ask(cli: Cli, tmp_path: Path) -> None:
    folder, root = tmp_path / "folder", tmp_path / "root"
    (folder / "sub").mkdir(parents=True)
    (folder / "empty").write_bytes(b"")
    (folder / "sub" / "big").write_bytes(os.urandom(1_500_000))
    async with cli.consumer(root):
        sent = await cli("send", folder, "--version", "5", "--json", "--label", "a=b")
        assert sent.code == 0, sent.stderr
        rows = {row["unique_id"]: row for row in sent.rows}
        assert set(rows) == {"empty", "sub/big"}
        assert rows["sub/big"]["status"] == "completed"
        assert rows["sub/big"]["size"] == 1_500_000
        assert rows["sub/big"]["labels"] == {"a": "b"}
        assert (root / "sub/big").read_bytes() == (folder / "sub/big").read_bytes()
        assert (root / "empty").read_bytes() == b""

        again = await cli("send", folder / "empty", "--version", "5", "--json")
        assert again.code == 1
        assert again.rows[0]["error"]["code"] == "VersionMismatch"
        assert "1 item did not complete" in again.error

        memory = await cli("send", "-", "--unique-id", "m", "--memory", "--json", given=b"mem")
        assert memory.code == 0, memory.stderr
        assert memory.rows[0]["target"]["shm"]

        request = rows["sub/big"]["request"]
        asked = await cli("result", request, "--json")
        assert asked.code == 0
        assert asked.rows == [rows["sub/big"]]
        other = await cli("result", request, "--group", "somebody")
        assert other.code == 1
        assert "BatchTransferNotFound" in other.error

        late = await cli("abort", request, "--reason", "too late", "--json")
        assert late.code == 1
        assert late.rows == [rows["sub/big"]]
        assert "ended as completed" in late.error
        assert not any(isinstance(record, Abort) for record in await cli.splits())
    assert not await asyncio.to_thread(checks.nothing_left, root)


async def test_abort_ends_an_open_request(cli: Cli, tmp_path: Path) -> None:
    async with cli.consumer(tmp_path / "root"):
        process = await cli.begin(
            "send", "-", "--unique-id", "endless", "--json", "--split-size", "1000"
        )
        assert process.stdin is not None
        process.stdin.write(b"x" * 5000)
        request = (await first_split(cli)).request
        outcome = await cli("abort", str(request), "--reason", "enough", "--json")
        assert outcome.code == 0, outcome.stderr
        assert outcome.rows[0]["status"] == "aborted"
        assert "enough" in outcome.rows[0]["error"]["reason"]
        sender = await ended(process)
        assert sender.code == 1
        assert sender.rows[0]["status"] == "aborted"


async def test_abort_without_a_consumer_writes_and_says_so(cli: Cli, tmp_path: Path) -> None:
    sent = await cli("send", __file__, "--no-wait", "--json")
    assert sent.code == 0, sent.stderr
    assert sent.rows[0]["status"] == "sent"
    request = sent.rows[0]["request"]
    outcome = await cli("abort", request, "--reason", "enough", "--timeout", "0.5")
    assert outcome.code == 1
    assert "no result came" in outcome.error
    assert Abort(RequestId.parse(request), "enough") in await cli.splits()


@pytest.mark.parametrize("hostile", ["a header's name that is no text", "a bomb"])
async def test_no_record_keeps_an_abort_from_its_request(cli: Cli, hostile: str) -> None:
    """What stands at W or above may be anything, and an abort is the way past it."""
    bad = batch(record(0, b"k", b"v", [(b"\xff", b"")]), 1)
    made = bad if hostile.startswith("a header") else bomb(ZSTD, 512 * 2**20)
    for partition in range(4):
        await send_batch(cli.connection.bootstrap_servers, cli.names.splits, made, partition)
    sent = await cli("send", __file__, "--no-wait", "--json")
    request = sent.rows[0]["request"]
    outcome = await cli("abort", request, "--reason", "enough", "--timeout", "0.5")
    assert "no result came" in outcome.error
    assert Abort(RequestId.parse(request), "enough") in await cli.splits()


async def test_abort_of_an_unknown_request_writes_nothing(cli: Cli) -> None:
    outcome = await cli("abort", "7-42", "--reason", "x")
    assert outcome.code == 1
    assert "BatchTransferNotFound" in outcome.error
    assert await cli.splits() == []


async def test_ctrl_c_during_send_aborts_the_request(cli: Cli) -> None:
    process = await cli.begin("send", "-", "--unique-id", "endless", "--split-size", "1000")
    assert process.stdin is not None
    process.stdin.write(b"x" * 5000)
    request = (await first_split(cli)).request
    process.send_signal(signal.SIGINT)
    assert await process.wait() == 130
    assert "Traceback" not in (await ended(process)).stderr
    last = (await cli.splits())[-1]
    assert isinstance(last, Abort)
    assert last.request == request


async def test_a_second_signal_ends_consume_with_130(cli: Cli, tmp_path: Path) -> None:
    process = await cli.begin("consume", "--root", tmp_path / "root")
    assert process.stderr is not None
    await process.stderr.readline()  # it is up so far that it logs, so it hears signals
    # Both at once: between them it could have ended well.
    for number in (signal.SIGSTOP, signal.SIGINT, signal.SIGTERM, signal.SIGCONT):
        process.send_signal(number)
    assert (await ended(process)).code == 130


async def test_a_result_is_found_after_partitions_were_added(cli: Cli) -> None:
    request = RequestId(7, 42)
    result = Result(
        request,
        unique_id="a",
        version=1,
        block=Block.FILE,
        labels=None,
        group="g",
        status=Status.COMPLETED,
        error=None,
        size=0,
        sha256=bytes(32),
        target={"path": "a"},
        splits=1,
        duplicates=0,
        input=Input(cli.names.splits, 0, 0, 0),
        reply=None,
        repeat=False,
        finished_at=1,
    )
    elsewhere = (partition_for(request.key, 4) + 1) % 4
    producer = AIOKafkaProducer(bootstrap_servers=cli.connection.bootstrap_servers)
    await producer.start()
    try:
        value = encode_result(result)
        await producer.send_and_wait(cli.names.results, value, request.key, elsewhere)
    finally:
        await producer.stop()
    outcome = await cli("result", "7-42", "--json")
    assert outcome.code == 0, outcome.stderr
    assert [row["request"] for row in outcome.rows] == ["7-42"]


async def test_half_a_pipe_is_no_traceback(cli: Cli) -> None:
    process = await cli.begin("topics", "check")
    assert process.stdout is not None
    process._transport.get_pipe_transport(1).close()  # type: ignore[attr-defined]
    outcome = await ended(process)
    assert "Traceback" not in outcome.stderr
    assert "Exception ignored" not in outcome.stderr


@pytest.mark.timeout(240)
@pytest.mark.parametrize("kill", [False, True])
async def test_demo(cli: Cli, tmp_path: Path, kill: bool) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    options = ["--size", "24MiB", "--json", *(["--kill"] if kill else [])]
    outcome = await cli("demo", *options, env={"TMPDIR": str(scratch)})
    assert outcome.code == 0, outcome.stderr
    *results, summary = outcome.rows
    assert len(results) == summary["files"] == (20 if kill else 8)
    assert all(row["status"] == "completed" for row in results)
    assert len(summary["checks"]) == 7 + kill
    assert set(summary["checks"].values()) == {None}
    assert (summary["recovery_seconds"] is not None) is kill
    assert list(scratch.iterdir()) == []


@pytest.mark.timeout(240)
async def test_demo_tells_when_the_consumer_dies(cli: Cli, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    process = await cli.begin("demo", "--size", "64MiB", env={"TMPDIR": str(scratch)})
    async with asyncio.timeout(STARTED):
        while not list(scratch.glob("*/received/.splitferry")):
            await asyncio.sleep(0.1)
    children = await asyncio.to_thread(psutil.Process(process.pid).children)
    (consumer,) = [child for child in children if "consume" in child.cmdline()]
    consumer.kill()
    outcome = await ended(process)
    assert outcome.code == 1
    assert "the consumer has ended with -9" in outcome.error
    assert list(scratch.iterdir()) == []


@pytest.mark.timeout(240)
async def test_demo_cleans_up_after_ctrl_c(cli: Cli, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    process = await cli.begin("demo", "--size", "64MiB", env={"TMPDIR": str(scratch)})
    async with asyncio.timeout(STARTED):
        while not list(scratch.glob("*/received/.splitferry")):
            await asyncio.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert await process.wait() == 130
    assert "Traceback" not in (await ended(process)).stderr
    assert list(scratch.iterdir()) == []
