"""The supervisor of several workers, with small programs for workers."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

from bench import captured_logs
from owners import until
from splitferry_cli import workers as workers_module
from splitferry_cli.failures import Failure
from splitferry_cli.workers import Job, Supervisor, share
from splitferry_consumer.service import Settings
from splitferry_protocol.connection import ConnectionSettings

SETTINGS = Settings(ConnectionSettings("127.0.0.1:1"), Path("root"), grace=0.2)
BOUND = 60.0
"""Seconds that some starts of Python may take on a busy machine."""
OBEYS = "os.read(0, 1)"
FALLS = f"""
print("joined", flush=True)
if number == 1 and run < 6: sys.exit(3)
{OBEYS}
"""

Make = Callable[[str], Supervisor]


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Two workers that run a program, in which `number` is theirs and `run` counts their runs."""
    begin = f"""
import base64, os, pathlib, sys
line = b""
while not line.endswith(b"\\n"):
    line += os.read(0, 1)
number = 1 + (b"NUMBER2" in base64.b64decode(line))
counter = pathlib.Path({str(tmp_path)!r}, f"{{number}}")
run = 1 + (int(counter.read_text()) if counter.exists() else 0)
counter.write_text(str(run))
"""

    def make(program: str) -> Supervisor:
        command = (sys.executable, "-S", "-c", begin + program)
        monkeypatch.setattr(workers_module, "COMMAND", command)
        return Supervisor([Job(n, SETTINGS, False, Path(f"NUMBER{n}"), False) for n in (1, 2)])

    monkeypatch.setattr(workers_module, "FIRST_PAUSE", 0.01)
    return make


async def ended_five_times(made: Make) -> list[Any]:
    """What is said of it; the other worker has run on."""
    supervisor = made(FALLS)
    with captured_logs() as logs:
        running = asyncio.create_task(supervisor.run())
        await until(lambda: supervisor.workers[0].restarts == 5, BOUND)
        supervisor.stop()
        await running
    assert supervisor.workers[1].restarts == 0
    return [line for line in logs if line["event"].startswith("the worker has ended")]


async def test_one_that_ends_is_started_again_after_ever_longer_pauses(
    made: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers_module, "LONGEST_PAUSE", 0.04)
    said = await ended_five_times(made)
    assert [line["pause"] for line in said[:4]] == [0.01, 0.02, 0.04, 0.04]
    assert {(line["worker"], line["how"]) for line in said} == {(1, "exit code 3")}


async def test_one_that_ran_well_is_started_again_soon(
    made: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers_module, "RAN_WELL", 0.0)
    assert {line["pause"] for line in await ended_five_times(made)} == {0.01}


async def test_why_none_can_start_is_raised_and_none_is_left(made: Make) -> None:
    supervisor = made(f"if number == 2: print('no such root'); sys.exit(1)\n{OBEYS}")
    with pytest.raises(Failure, match=r"^no such root$"):
        await asyncio.wait_for(supervisor.run(), BOUND)
    assert all(worker.process is None for worker in supervisor.workers)


async def test_once_one_has_joined_the_same_reason_may_heal(made: Make, tmp_path: Path) -> None:
    """A broker that is away for a moment must not end those who wait for it."""
    supervisor = made(
        f"""
if number == 2 and run < 3:
    import time
    while not pathlib.Path(str(counter) + ".go").exists(): time.sleep(0.01)
    print("no broker"); sys.exit(1)
print("joined", flush=True)
{OBEYS}
"""
    )
    running = asyncio.create_task(supervisor.run())
    await until(lambda: supervisor._joined, BOUND)
    (tmp_path / "2.go").touch()
    await until(lambda: supervisor.workers[1].restarts == 2 or running.done(), BOUND)
    assert supervisor.workers[1].trouble in (None, "it has ended (no broker)")
    supervisor.stop()
    await running


async def test_one_that_does_not_stop_is_killed_and_told(
    made: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers_module, "CLOSING", 0.2)
    supervisor = made(
        f"""
print("joined", flush=True)
{OBEYS}
if number == 1:
    import time; time.sleep(15)
pathlib.Path(str(counter) + ".ended").touch()
"""
    )
    running = asyncio.create_task(supervisor.run())
    await until(lambda: supervisor._joined, BOUND)
    began = time.monotonic()
    supervisor.stop()
    with pytest.raises(Failure, match="worker 1 did not stop well: SIGKILL"):
        await running
    assert time.monotonic() - began >= 0.4


async def test_one_that_ends_badly_does_not_cut_off_another(made: Make, tmp_path: Path) -> None:
    supervisor = made(
        f"""
print("joined", flush=True)
{OBEYS}
if number == 1: sys.exit(7)
import time; time.sleep(0.1)
pathlib.Path(str(counter) + ".ended").touch()
"""
    )
    running = asyncio.create_task(supervisor.run())
    await until(lambda: (tmp_path / "1").exists() and (tmp_path / "2").exists(), BOUND)
    supervisor.stop()
    with pytest.raises(Failure, match="worker 1 did not stop well: exit code 7"):
        await running
    assert (tmp_path / "2.ended").exists()


def test_what_holds_for_all_is_divided() -> None:
    shared = share(SETTINGS, 4)
    assert (shared.flow_high, shared.memory_limit) == (16 * 1024 * 1024, 64 * 1024 * 1024)
    assert share(SETTINGS, 1) == SETTINGS
    with pytest.raises(click.UsageError, match="--flow-high"):
        share(SETTINGS, 65)
