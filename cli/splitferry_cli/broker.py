"""A real Apache Kafka on this machine, for development and tests: one node, no Docker,
no installed Java (extra `broker`)."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import click
import platformdirs
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError

from .command import Command, Common
from .kafka_jars import KAFKA_VERSION, BrokerUnavailable, java, kafka_jars
from .kafka_process import HOST, SETTINGS, STOP_SECONDS, free_ports, node, spawn
from .options import option

__all__ = ["BrokerUnavailable", "LocalBroker", "answers", "command"]

_START_SECONDS = 60
_LOCK_SECONDS = 5
"""How long the JVM of a program just killed may take to leave its data folder."""


async def answers(bootstrap_servers: str) -> bool:
    """Whether a broker at `HOST:PORT` is ready for clients."""
    host, _, port = bootstrap_servers.rpartition(":")
    try:  # first a bare connection: the client logs each one that fails as an error
        _, writer = await asyncio.open_connection(host, int(port))
    except OSError:
        return False
    writer.close()
    client = AIOKafkaAdminClient(bootstrap_servers=bootstrap_servers)
    try:
        await client.start()
        return bool((await client.describe_cluster())["brokers"])
    except KafkaError:
        return False
    finally:
        await client.close()


class LocalBroker:
    """Apache Kafka as a child process, listening on loopback only.

    What it holds stays in `data` for the next start. `port` 0 takes a free one, which
    further starts of the same object keep. The JVM writes to `log` (default: `broker.log`
    in `data`), which each start begins anew.
    """

    def __init__(self, data: Path, port: int = 0, log: Path | None = None) -> None:
        self.data = data.absolute()
        self.port = port
        self.log = log or self.data / "broker.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._stopping = threading.Event()
        # Launching and ending run in threads, which go on when the task that waits for them
        # is cancelled: an end waits here for the launch that it is to undo.
        self._changing = threading.Lock()

    @property
    def bootstrap_servers(self) -> str:
        return f"{HOST}:{self.port}"

    @property
    def pid(self) -> int | None:
        """The JVM's process id, None while it is not started."""
        return self._process.pid if self._process else None

    async def start(self) -> None:
        """Return once the broker answers.

        Raises:
            BrokerUnavailable: with cause and remedy.
        """
        assert self._process is None, "already started"
        self._stopping.clear()
        try:
            await self._answering(await asyncio.to_thread(self._launch))
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """SIGTERM, then SIGKILL when the broker has not ended after 20 s. Idempotent."""
        self._stopping.set()
        await asyncio.to_thread(self._end)

    async def wait(self) -> None:
        """Return only by raising BrokerUnavailable, when the broker ends by itself."""
        process = self._process
        while process and process.poll() is None:  # noqa: ASYNC110 - no event tells of it
            await asyncio.sleep(0.25)
        raise await asyncio.to_thread(self._ended)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.stop()

    def _launch(self) -> subprocess.Popen[bytes]:
        with self._changing:
            runtime = java()
            try:
                self.data.mkdir(parents=True, exist_ok=True)
                lock = os.open(self.data / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                try:
                    self._own(lock)
                    self._ports()  # before the fetch: what is wrong here shows at once
                    jars = kafka_jars(cancelled=self._stopping.is_set)
                    if self._stopping.is_set():
                        raise BrokerUnavailable("the start of the broker was interrupted")
                    ports = self._ports()
                    settings = self._settings(*(f"{HOST}:{port}" for port in ports))
                    self._process = spawn(runtime, jars, self.data, settings, self.log, lock)
                finally:
                    os.close(lock)  # the JVM has its own copy, and with it the lock
            except OSError as error:
                raise BrokerUnavailable(
                    f"cannot use {error.filename or self.data} ({error.strerror}): "
                    "mend that, or choose another folder with --data"
                ) from None
            if self._process is None:
                raise self._ended()
            self.port = ports[0]
            return self._process

    def _settings(self, clients: str, controller: str) -> dict[str, str]:
        """By the `HOST:PORT` of its listeners. A test's broker has more."""
        return SETTINGS | node(clients, clients, controller)

    def _own(self, lock: int) -> None:
        end = time.monotonic() + _LOCK_SECONDS
        while True:
            try:
                return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > end:
                    raise BrokerUnavailable(
                        f"{self.data} is in use by another broker: stop that one (what is "
                        f"left of a killed one ends within {STOP_SECONDS} s), or choose another "
                        "folder with --data"
                    ) from None
            time.sleep(0.1)

    def _ports(self) -> tuple[int, int]:
        try:
            return free_ports(self.port)
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            cause = "is taken" if taken else f"cannot be used ({error.strerror})"
            raise BrokerUnavailable(
                f"port {self.port} on {HOST} {cause}: choose another one with --port, "
                "or use the broker that is there with --bootstrap-servers"
            ) from None

    async def _answering(self, process: subprocess.Popen[bytes]) -> None:
        try:
            async with asyncio.timeout(_START_SECONDS):
                while not await answers(self.bootstrap_servers):
                    if process.poll() is not None:
                        raise await asyncio.to_thread(self._ended)
                    await asyncio.sleep(0.1)
        except TimeoutError:
            raise BrokerUnavailable(
                f"the broker does not answer after {_START_SECONDS} s: its log is {self.log}"
            ) from None

    def _end(self) -> None:
        with self._changing:
            process, self._process = self._process, None
            if process is None:
                return
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            assert process.stdin is not None
            process.stdin.close()  # and with this the guard leaves

    def _ended(self) -> BrokerUnavailable:
        lines = self.log.read_text(errors="replace").splitlines()
        causes = [line for line in lines if "Exception" in line or "ERROR" in line]
        code = None if self._process is None else self._process.poll()
        if code is not None and code < 0:
            why = f"killed by {signal.Signals(-code).name}"
        elif causes:
            why = causes[-1].strip()
        else:
            why = "it gave no reason" if code is None else f"exit code {code}"
        return BrokerUnavailable(f"the broker has ended: {why}; its log is {self.log}")


@click.command(
    "broker",
    cls=Command,
    examples="""
    splitferry broker
    splitferry broker --port 19092 --data /tmp/kafka
    """,
)
@option(
    "--port",
    type=click.IntRange(0, 65535),
    default=9092,
    help="Port on 127.0.0.1; 0 takes a free one.",
)
@option(
    "--data",
    type=click.Path(file_okay=False, path_type=Path),
    default=platformdirs.user_data_path("splitferry", appauthor=False) / "broker",
    help="Directory that keeps what the broker holds; else one among the user's data.",
)
@click.pass_obj
def command(common: Common, port: int, data: Path) -> None:
    """Run a real Apache Kafka on this machine, for development.

    Ctrl-C or SIGTERM stops it; what it holds is there again at the next start.
    """
    asyncio.run(_serve(LocalBroker(data, port), common))


async def _serve(broker: LocalBroker, common: Common) -> None:
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    signals = (signal.SIGINT, signal.SIGTERM)

    def leave() -> None:
        for number in signals:  # the second one ends this program, and the guard does the rest
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_DFL)
        task.cancel()

    for number in signals:
        loop.add_signal_handler(number, leave)
    try:
        async with broker:
            common.output.tell(
                {
                    "bootstrap_servers": broker.bootstrap_servers,
                    "data": str(broker.data),
                    "pid": broker.pid,
                },
                f"Apache Kafka {KAFKA_VERSION} answers on {broker.bootstrap_servers} "
                f"and keeps its data in {broker.data}. Ctrl-C stops it.",
            )
            await broker.wait()
    except asyncio.CancelledError:
        common.output.note("The broker has stopped.")
