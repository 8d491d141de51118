"""Apache Kafka's JVM: its settings, its storage, and that it never outlives its program.

The program that starts it holds the only write end of a pipe, and a guard process ends the
JVM when that pipe closes. The kernel closes it however the program dies, on Linux and macOS
alike, and whichever of its threads started the JVM (Linux's own PR_SET_PDEATHSIG fires when
that thread ends, not the program).
"""

from __future__ import annotations

import os
import random
import secrets
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

HOST = "127.0.0.1"
STOP_SECONDS = 20
"""What the JVM has between SIGTERM and SIGKILL."""

# Runs before the JVM, in its process: the child it forks is the guard, then it becomes the
# JVM, which so is the program's own child. The guard's parent changes when the JVM ends;
# it looks before each signal, as the process id may belong to somebody else by then.
_GUARD = f"""
import os, signal, sys, time
broker = os.getpid()
if os.fork():
    os.execv(sys.argv[1], sys.argv[1:])
os.closerange(1, 1024)
os.read(0, 1)
for number, seconds in (signal.SIGTERM, {STOP_SECONDS}), (signal.SIGKILL, 0):
    if os.getppid() == broker:
        os.kill(broker, number)
    end = time.monotonic() + seconds
    while os.getppid() == broker and time.monotonic() < end:
        time.sleep(0.05)
"""

_JVM = (
    "-Xms128m",
    "-Xmx512m",
    "-XX:+ExitOnOutOfMemoryError",
    "-Dorg.slf4j.simpleLogger.logFile=System.out",
    "-Dorg.slf4j.simpleLogger.showDateTime=true",
    "-Dorg.slf4j.simpleLogger.dateTimeFormat=yyyy-MM-dd HH:mm:ss.SSS",
)

SETTINGS = {
    "auto.create.topics.enable": "false",
    "default.replication.factor": "1",
    "group.initial.rebalance.delay.ms": "0",
    "group.min.session.timeout.ms": "1000",
    "log.cleaner.dedupe.buffer.size": "16777216",  # by default a quarter of this heap
    "message.max.bytes": "18874368",  # a payload of 16 MiB, its header, a dead letter's headers
    "min.insync.replicas": "1",
    "offsets.topic.num.partitions": "8",
    "offsets.topic.replication.factor": "1",
    "share.coordinator.state.topic.min.isr": "1",
    "share.coordinator.state.topic.replication.factor": "1",
    "transaction.state.log.min.isr": "1",
    "transaction.state.log.num.partitions": "8",
    "transaction.state.log.replication.factor": "1",
}
"""What makes one node quick to start and to rebalance, wherever it runs."""


def node(clients: str, advertised: str, controller: str) -> dict[str, str]:
    """A node that is broker and controller in one, by the `HOST:PORT` of its listeners."""
    return {
        "process.roles": "broker,controller",
        "node.id": "1",
        "listeners": f"PLAINTEXT://{clients},CONTROLLER://{controller}",
        "advertised.listeners": f"PLAINTEXT://{advertised}",
        "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
        "inter.broker.listener.name": "PLAINTEXT",
        "controller.listener.names": "CONTROLLER",
        "controller.quorum.voters": f"1@{controller}",
    }


def free_ports(port: int) -> tuple[int, int]:
    """`port` (0: a free one) and another free one. Raises OSError when `port` is not free.

    Free ones are taken below those that the kernel gives to connections (from 32768 on): until
    the JVM listens there, some client would be given one of these.
    """
    with _listening(port) as first, _listening(0) as second:
        return first.getsockname()[1], second.getsockname()[1]


def _listening(port: int) -> socket.socket:
    for chosen in () if port else random.sample(range(20_000, 32_000), 100):
        with suppress(OSError):
            return socket.create_server((HOST, chosen))
    return socket.create_server((HOST, port))


def spawn(
    java: Path,
    jars: Sequence[Path],
    data: Path,
    settings: Mapping[str, str],
    log: Path,
    lock: int,
) -> subprocess.Popen[bytes] | None:
    """Start Kafka with what it holds in `data`.

    Args:
        settings: of the broker, but for where it keeps its logs.
        log: where the JVM writes; begun anew.
        lock: a descriptor which the JVM keeps open as long as it lives.

    Returns:
        The JVM, whose guard leaves when its `stdin` is closed; None when the storage could
        not be formatted (`log` says why).
    """
    logs, properties = data / "kafka", data / "server.properties"
    lines = [f"{name}={value}\n" for name, value in {**settings, "log.dirs": str(logs)}.items()]
    properties.write_text("".join(lines))
    jvm = [str(java), *_JVM, "-cp", os.pathsep.join(map(str, jars))]
    with log.open("wb") as output:
        if not (logs / "meta.properties").exists():  # written last: the storage is not whole
            cluster = "S" + secrets.token_urlsafe(16)[1:]  # never begins with a dash
            tool = ["kafka.tools.StorageTool", "format", "-g", "-t", cluster, "-c", str(properties)]
            formatted = subprocess.run(  # noqa: S603 - our own arguments
                [*jvm, *tool], stdin=subprocess.DEVNULL, stdout=output, stderr=output, check=False
            )
            if formatted.returncode:
                return None
        return subprocess.Popen(  # noqa: S603 - our own arguments
            [sys.executable, "-I", "-S", "-c", _GUARD, *jvm, "kafka.Kafka", str(properties)],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            start_new_session=True,  # a terminal's Ctrl-C is for the program to act on
            pass_fds=[lock],
        )
