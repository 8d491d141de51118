"""Faults in the system calls of other processes, switched while they run.

    shim = Shim(run.root, tmp_path / "shim")
    run.environment |= shim.environment      # for the processes that are started from now on
    shim.fail("fsync", errno.EIO, times=3, where="/incoming/")
    shim.heal()

A library (`shim.c`), preloaded into the processes, asks a file that all of them map. It touches
only calls on paths below the root, and the wall clock. Needs Linux and a C compiler.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest

needs_shim = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("cc") is None,
    reason="a library is compiled and preloaded: needs Linux and cc",
)

CALLS = (
    *("write", "read", "fsync", "fsync directory", "rename"),
    *("fallocate", "truncate", "open", "mkdir", "unlink"),
)
"""As in `shim.c`. `read` and `write` are the positional ones; `fsync` is that of files."""
_NOTHING, _FAIL, _LOSE, _SHORT, _DELAY, _KILL = range(6)
FOREVER = -1


class _Rule(ctypes.Structure):
    _fields_: ClassVar = [
        ("action", ctypes.c_int32),
        ("error", ctypes.c_int32),
        ("skip", ctypes.c_int32),
        ("times", ctypes.c_int32),
        ("per_mille", ctypes.c_int32),
        ("seed", ctypes.c_uint32),
        ("calls", ctypes.c_int64),
        ("hits", ctypes.c_int64),
        ("where", ctypes.c_char * 88),
    ]


class _Control(ctypes.Structure):
    _fields_: ClassVar = [("clock", ctypes.c_int64), ("rules", _Rule * len(CALLS))]


class Shim:
    """One rule for each call, shared by all processes that run with `environment`.

    Args of the rules:
        times: how many calls are hit; FOREVER until `heal`.
        where: part of the path of the calls that count; of a rename the new path.
        skip: how many of them pass before.
        chance: that one of them is hit.
    """

    def __init__(self, below: Path, directory: Path) -> None:
        """Compile the library into `directory`, which is made, for calls on paths in `below`."""
        directory.mkdir(parents=True)
        library, control = directory / "shim.so", directory / "control"
        source = Path(__file__).with_name("shim.c")
        command = ["cc", "-shared", "-fPIC", "-O2", "-Wall", "-Wextra", "-Werror"]
        subprocess.run([*command, "-o", library, source, "-ldl"], check=True)
        control.write_bytes(bytes(ctypes.sizeof(_Control)))
        with control.open("r+b") as file:
            self._control = _Control.from_buffer(mmap.mmap(file.fileno(), 0))
        self.environment = {
            "LD_PRELOAD": str(library),
            "SHIM_CONTROL": str(control),
            "SHIM_BELOW": os.path.realpath(below),
        }

    def fail(
        self,
        call: str,
        error: int,
        times: int = FOREVER,
        where: str = "",
        skip: int = 0,
        chance: float = 1.0,
    ) -> None:
        """The call fails with the errno `error`, and does nothing."""
        self._set(call, _FAIL, error, times, where, skip, chance)

    def lose(
        self, times: int = FOREVER, where: str = "", skip: int = 0, chance: float = 1.0
    ) -> None:
        """A file's fsync fails with EIO, and its first page is lost, as a kernel does it: the
        next fsync succeeds."""
        self._set("fsync", _LOSE, errno.EIO, times, where, skip, chance)

    def short(
        self,
        call: str,
        times: int = FOREVER,
        where: str = "",
        skip: int = 0,
        chance: float = 1.0,
    ) -> None:
        """A read or write moves half of what it is asked for."""
        assert call in {"read", "write"}
        self._set(call, _SHORT, 0, times, where, skip, chance)

    def delay(
        self,
        call: str,
        seconds: float,
        times: int = FOREVER,
        where: str = "",
        skip: int = 0,
        chance: float = 1.0,
    ) -> None:
        """The call takes so much longer."""
        self._set(call, _DELAY, int(seconds * 1000), times, where, skip, chance)

    def kill(
        self, call: str, times: int = 1, where: str = "", skip: int = 0, chance: float = 1.0
    ) -> None:
        """The process gets SIGKILL just before the call."""
        self._set(call, _KILL, 0, times, where, skip, chance)

    def heal(self, call: str | None = None) -> None:
        """No call is hit any more; the counts stay."""
        for number, name in enumerate(CALLS):
            if call in {None, name}:
                self._control.rules[number].action = _NOTHING

    def step_clock(self, seconds: float) -> None:
        """Put the wall clock of the processes so far ahead of the true one (or behind it)."""
        self._control.clock = int(seconds * 1e9)

    def calls(self, call: str) -> int:
        """How often `call` met `where`, hit or not, since its rule was made."""
        return int(self._control.rules[CALLS.index(call)].calls)

    def hits(self, call: str) -> int:
        """How often the rule for `call` took effect."""
        return int(self._control.rules[CALLS.index(call)].hits)

    def counts(self) -> dict[str, int]:
        """Hits of every call."""
        return {call: self.hits(call) for call in CALLS}

    def _set(
        self, call: str, action: int, error: int, times: int, where: str, skip: int, chance: float
    ) -> None:
        rule = self._control.rules[CALLS.index(call)]
        rule.action = _NOTHING  # Nobody may see half of a rule.
        rule.error, rule.skip, rule.times = error, skip, times
        rule.per_mille, rule.seed = round(chance * 1000), random.getrandbits(32)
        rule.calls = rule.hits = 0
        rule.where = where.encode()
        rule.action = action
