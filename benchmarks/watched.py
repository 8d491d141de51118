"""A child process and what it costs: time, CPU and memory of it and of all it starts."""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import json
import signal
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

INTERVAL = 0.02
"""Seconds between two looks at a process."""
TREE_INTERVAL = 0.5
"""Seconds between two looks for new child processes, which cost more."""
STOP_SECONDS = 45


class Ended(Exception):
    """The process ended before it had done its work, or does not get it done; the message says
    what it said last."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """One run of one side. Times in seconds, sizes in bytes.

    Attributes:
        seconds: between the first and the last moment that the side names.
        cpu_seconds: user and system time of the process tree in between.
        peak_rss: of the process tree since its start: the sum of each process's own peak.
        whole_seconds, whole_cpu_seconds: the same from the start of the process on.
    """

    seconds: float
    cpu_seconds: float
    peak_rss: int
    whole_seconds: float
    whole_cpu_seconds: float

    def __add__(self, other: Measurement) -> Measurement:
        """Of two processes that worked in the same time."""
        return Measurement(
            max(self.seconds, other.seconds),
            self.cpu_seconds + other.cpu_seconds,
            self.peak_rss + other.peak_rss,
            max(self.whole_seconds, other.whole_seconds),
            self.whole_cpu_seconds + other.whole_cpu_seconds,
        )


class Watched:
    """A running process. Moments are Unix times, so that processes can tell them each other."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path) -> None:
        self._process = process
        self._log = log
        self._known = {process.pid: psutil.Process(process.pid)}
        self._peaks: dict[int, int] = {}
        self._cpu_of: dict[int, float] = {}
        self._times: list[float] = []
        self._cpu: list[float] = []
        self.started = time.time()

    def _look(self) -> None:
        for pid, process in self._known.items():
            with contextlib.suppress(psutil.Error):  # its last figures stay
                with process.oneshot():
                    times = process.cpu_times()
                    rss = process.memory_info().rss
                self._cpu_of[pid] = times.user + times.system
                self._peaks[pid] = max(self._peaks.get(pid, 0), rss, _high_water_mark(pid))
        self._times.append(time.time())
        self._cpu.append(sum(self._cpu_of.values()))

    async def watch(self) -> None:
        """Never returns; raises `Ended`."""
        tree_at = 0.0
        while self._process.returncode is None:
            if time.monotonic() - tree_at > TREE_INTERVAL:
                tree_at = time.monotonic()
                with contextlib.suppress(psutil.Error):
                    for child in self._known[self._process.pid].children(recursive=True):
                        self._known.setdefault(child.pid, child)
            self._look()
            await asyncio.sleep(INTERVAL)
        raise Ended(f"a measured process ended with {self._process.returncode}: {self.last_word}")

    @property
    def written(self) -> int:
        """Bytes that the process itself has written to files so far; what it sent is not in it."""
        return int(self._known[self._process.pid].io_counters().write_chars)

    @property
    def last_word(self) -> str:
        """The last line of its output."""
        lines = self._lines()
        return lines[-1] if lines else "it said nothing"

    async def said(self, key: str) -> dict[str, Any]:
        """The first line of its output that is a JSON object with `key`."""
        while True:
            for line in await asyncio.to_thread(self._lines):
                if f'"{key}"' in line:
                    said: dict[str, Any] = json.loads(line)
                    return said
            await asyncio.sleep(INTERVAL)

    async def printed(self, text: str, times: int = 1) -> float:
        """When lines with `text` were there so many times."""
        while sum(text in line for line in await asyncio.to_thread(self._lines)) < times:
            await asyncio.sleep(INTERVAL)
        return time.time()

    async def logged(self, event: str) -> float:
        """When it first logged `event`."""
        while True:
            for line in await asyncio.to_thread(self._lines):
                if f'"{event}"' in line:
                    return _moment(json.loads(line)["timestamp"])
            await asyncio.sleep(INTERVAL)

    def _lines(self) -> list[str]:
        return self._log.read_text(errors="replace").splitlines()

    def kill(self) -> None:
        """SIGKILL, in the midst of its work."""
        self._process.kill()

    def measured(self, first: float, last: float) -> Measurement:
        """The cost between two moments, to be asked for when the second has just passed."""
        self._look()
        return Measurement(
            last - first,
            self._cpu_at(last) - self._cpu_at(first),
            sum(self._peaks.values()),
            last - self.started,
            self._cpu_at(last),
        )

    def _cpu_at(self, moment: float) -> float:
        """CPU seconds until then, on a line between the looks before and after it."""
        after = min(bisect.bisect_left(self._times, moment), len(self._times) - 1)
        before = max(after - 1, 0)
        span = self._times[after] - self._times[before]
        part = (moment - self._times[before]) / span if span else 1.0
        return self._cpu[before] + min(part, 1.0) * (self._cpu[after] - self._cpu[before])


@contextlib.asynccontextmanager
async def watched(
    arguments: Sequence[str], log: Path, python: Path | None = None
) -> AsyncIterator[Watched]:
    """Python with `arguments`, all its output in `log`; stopped at the end with SIGTERM."""
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            python or sys.executable,
            *arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=output,
            stderr=output,
        )
    try:
        yield Watched(process, log)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(STOP_SECONDS):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()


def _high_water_mark(pid: int) -> int:
    """The kernel's own peak of a process's RSS, where it tells: it misses no spike."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next(
        (int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")),
        0,
    )


def _moment(stamp: str) -> float:
    return datetime.fromisoformat(stamp).timestamp()
