"""Several consumer processes in one group, under one supervisor.

Each worker is an interpreter of its own that is told everything over its standard input: first
its job, then orders, a byte each. The supervisor holds the only write end, so that a worker sees
the pipe close however the supervisor dies, and leaves. On its standard output it says when the
group has taken it, and why it could not start.
"""

from __future__ import annotations

import asyncio
import base64
import os
import pickle
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import click
import structlog

from splitferry_consumer.service import Settings

from .failures import Failure

log = structlog.get_logger(__name__)

WORKERS_MAX = 64
FIRST_PAUSE = 0.5
"""Seconds before a worker that has ended is started again; they double each time."""
LONGEST_PAUSE = 10.0
"""Seconds: what held a worker up is healed, and progress resumes within 30 s."""
RAN_WELL = 60.0
"""Seconds after which an end counts as the first one again."""
CLOSING = 25.0
"""Seconds that a worker has besides its grace, until it is killed."""
LEAVING = 5.0
"""Seconds that it has when it is not to finish anything."""
FLOW_LEAST = 1024 * 1024

COMMAND = (sys.executable, "-P", "-m", "splitferry_cli.worker")
STOP = b"s"
ABANDON = b"a"
JOINED = b"joined\n"


@dataclass(frozen=True)
class Job:
    """What one worker is told.

    Attributes:
        number: from 1.
        socket: where its page is served for the supervisor's.
        web: whether it is served.
    """

    number: int
    settings: Settings
    verbose: bool
    socket: Path
    web: bool

    def encode(self) -> bytes:
        """One line."""
        return base64.b64encode(pickle.dumps(self)) + b"\n"

    @staticmethod
    def decode(line: bytes) -> Job:
        job = pickle.loads(base64.b64decode(line))  # noqa: S301 - from our own parent
        assert isinstance(job, Job)
        return job


def share(settings: Settings, workers: int) -> Settings:
    """What each of the workers is told: what holds for all together is divided among them.

    Raises click.UsageError: too little to be divided.
    """
    if settings.flow_high // workers < FLOW_LEAST:
        raise click.UsageError("--flow-high: give each of the --workers 1 MiB at least")
    return replace(
        settings,
        flow_high=settings.flow_high // workers,
        memory_limit=max(1, settings.memory_limit // workers),
    )


@dataclass
class Worker:
    """One of them, whichever process it is at the moment.

    Attributes:
        trouble: why there is none; None: it runs.
        restarts: how often it was started again.
    """

    job: Job
    trouble: str | None = "not started yet"
    restarts: int = 0
    process: asyncio.subprocess.Process | None = field(default=None, repr=False)

    @property
    def number(self) -> int:
        return self.job.number

    @property
    def socket(self) -> Path:
        return self.job.socket


class Supervisor:
    """Keeps a worker running for each job, from `run` until it was stopped."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.workers = [Worker(job) for job in jobs]
        self._stopping = asyncio.Event()
        self._orders = b""
        self._joined = False
        self._grace = max(job.settings.grace for job in jobs)

    def stop(self) -> None:
        """Have each worker finish what is in flight within the grace, then return from `run`."""
        self._order(STOP, self._grace + CLOSING)

    def abandon(self) -> None:
        """Return from `run` without waiting for what is in flight; the log has it."""
        self._order(ABANDON, LEAVING)

    def _order(self, order: bytes, bound: float) -> None:
        self._orders += order
        self._stopping.set()
        for worker in self.workers:
            if worker.process is not None and worker.process.stdin is not None:
                worker.process.stdin.write(order)
        asyncio.get_running_loop().call_later(bound, self._kill)

    def _kill(self) -> None:
        for worker in self.workers:
            if worker.process is not None:
                log.error("the worker does not stop, it is killed", worker=worker.number)
                _kill(worker.process)

    async def run(self) -> None:
        """Keep the workers running until stopped. No process is left at the end.

        Raises:
            Failure: none of them can start, for a reason that starting again does not heal; or
                one did not end well when it was stopped.
        """
        keeping = [asyncio.create_task(self._keep(worker)) for worker in self.workers]
        try:
            await asyncio.wait(keeping, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            for task in keeping:
                task.cancel()
            await asyncio.wait(keeping)
        for task in keeping:
            if not task.cancelled() and (failure := task.exception() or task.result()):
                raise failure

    async def _keep(self, worker: Worker) -> Failure | None:
        """Return what went wrong at the end, for the others must end, too. Raises Failure."""
        number, pause = worker.number, FIRST_PAUSE
        while not self._stopping.is_set():
            began = time.monotonic()
            code, words = await self._live(worker)
            how = _ending(code)
            if self._stopping.is_set():
                if code and ABANDON not in self._orders:
                    return Failure(f"worker {number} did not stop well: {words or how}")
                return None
            if words and not self._joined:
                raise Failure(words)
            if time.monotonic() - began >= RAN_WELL:
                pause = FIRST_PAUSE
            worker.trouble = f"it has ended ({words or how})"
            log.error(
                "the worker has ended, it is started again",
                worker=number,
                how=how,
                error=words or None,
                pause=pause,
            )
            with suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._stopping.wait()
            worker.restarts += 1
            pause = min(2 * pause, LONGEST_PAUSE)
        return None

    async def _live(self, worker: Worker) -> tuple[int, str]:
        """One process of it, from start to end: its exit code, and why it could not go on."""
        try:
            process = await asyncio.create_subprocess_exec(
                *COMMAND,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                start_new_session=True,  # a terminal's Ctrl-C is for the supervisor to act on
            )
        except OSError as error:
            return 1, f"no process can be started for it: {error.strerror}"
        assert process.stdin is not None
        assert process.stdout is not None
        worker.process, worker.trouble = process, None
        words = b""
        try:
            process.stdin.write(worker.job.encode() + self._orders)
            async for line in process.stdout:
                if line == JOINED:
                    self._joined = True
                else:
                    words = line
            return await process.wait(), words.decode().strip()
        finally:
            worker.process = None
            if process.returncode is None:
                _kill(process)
                await process.wait()


def _kill(process: asyncio.subprocess.Process) -> None:
    """As `process.kill` does, which first looks whether the process has ended: what it finds then
    is taken from the event loop, which waits for it, warns, and takes the exit code for 255."""
    if process.returncode is None:
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)


def _ending(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"
