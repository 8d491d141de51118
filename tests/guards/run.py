"""Take each guard out of a copy of the program and see its test go red.

The `*.toml` files beside this one list the guards:

    [[guard]]
    fault = "what goes wrong in production"
    guard = "what of the program makes it good"
    file = "consumer/splitferry_consumer/…"
    remove = "text that occurs once in the file"
    put = "what takes its place"
    test = "tests/…/test_….py::test_…"

    .venv/bin/python tests/guards/run.py [WORD…]    only guards whose fault or test has a word

A guard whose test stays green without it is not tested: exit code 1.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
ROOMS = ("protocol", "producer", "consumer", "cli")
BOUND = 900
"""Seconds after which a test counts as red: without its guard the program may hang."""


@dataclass(frozen=True)
class Guard:
    fault: str
    guard: str
    file: str
    remove: str
    put: str
    test: str

    def without(self, source: str) -> str:
        """The file's text with the guard taken out."""
        found = source.count(self.remove)
        if found != 1:
            raise ValueError(f"{self.fault}: {self.file} has the guard's text {found} times")
        return source.replace(self.remove, self.put)


def guards() -> Iterator[Guard]:
    for path in sorted(HERE.glob("*.toml")):
        for entry in tomllib.loads(path.read_text())["guard"]:
            yield Guard(**entry)


def goes_red(guard: Guard) -> bool:
    """Whether the test fails in a copy of the project without the guard."""
    with tempfile.TemporaryDirectory() as copy:
        for name in (*ROOMS, "tests", "docs", "pyproject.toml", "README.md"):
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, Path(copy, name))
            else:
                shutil.copy(source, copy)
        changed = Path(copy, guard.file)
        changed.write_text(guard.without(changed.read_text()))
        # Before the editable install, in this process and in those that the test starts.
        path = os.pathsep.join(str(Path(copy, room)) for room in ROOMS)
        command = [sys.executable, "-m", "pytest", "-x", "-q", guard.test, f"--timeout={BOUND}"]
        done = subprocess.run(
            command,
            cwd=copy,
            env={**os.environ, "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
        )
        if done.returncode == 1:
            return True
        if done.returncode:  # no such test, or no test at all: that proves nothing
            raise RuntimeError(done.stdout)
        return False


def main(words: Sequence[str]) -> int:
    chosen = [g for g in guards() if not words or any(w in g.fault + g.test for w in words)]
    green = 0
    for guard in chosen:
        began = time.monotonic()
        red = goes_red(guard)
        green += not red
        verdict = "red" if red else "STILL GREEN"
        print(f"{verdict:12}{time.monotonic() - began:5.0f} s  {guard.fault}: {guard.guard}")
    print(f"{len(chosen) - green} of {len(chosen)} guards seen red without them")
    return 1 if green else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
