"""A consumer as a process of its own, which never outlives the program that started it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from .failures import Failure
from .options import ENVIRONMENT_PREFIX

STOP_SECONDS = 45
"""The consumer's own grace is 30 s."""

# The program holds the only write end of the child's standard input. However the program
# dies, the kernel closes it, and the read in the thread returns.
_CHILD = """
import os, signal, threading
def leave_with_parent():
    os.read(0, 1)
    os.kill(os.getpid(), signal.SIGKILL)
threading.Thread(target=leave_with_parent, daemon=True).start()
from splitferry_cli.__main__ import main
main()
"""


class ConsumerProcess:
    """`splitferry consume` with `arguments`, its log appended to a file.

    Args:
        environment: of the options that matter; all others of this program are kept away.
    """

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self._arguments = arguments
        self._environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(ENVIRONMENT_PREFIX)},
            **environment,
        }
        self._log = log
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        descriptor = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-c",
                _CHILD,
                "consume",
                *self._arguments,
                env=self._environment,
                stdin=asyncio.subprocess.PIPE,
                stdout=descriptor,
                stderr=descriptor,
                start_new_session=True,  # a terminal's Ctrl-C is for the program to act on
            )
        finally:
            os.close(descriptor)

    async def watch(self) -> None:
        """Return only by raising Failure, when the process ends by itself."""
        process = self._running()
        code = await process.wait()
        if process is self._process:
            raise Failure(f"the consumer has ended with {code}: {self.last_words()}")

    async def kill(self) -> None:
        """SIGKILL."""
        process, self._process = self._running(), None
        process.kill()
        await process.wait()

    async def stop(self) -> int:
        """SIGTERM, and SIGKILL when it has not ended after 45 s; the exit code. Idempotent."""
        process, self._process = self._process, None
        if process is None:
            return 0
        try:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(STOP_SECONDS):
                return await process.wait()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()

    def last_words(self) -> str:
        """The last line of the log."""
        lines = self._log.read_text(errors="replace").splitlines()
        return lines[-1] if lines else "it said nothing"

    def _running(self) -> asyncio.subprocess.Process:
        assert self._process is not None, "not started"
        return self._process
