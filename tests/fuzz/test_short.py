"""The short form of both fuzzers. The long one is `make fuzz`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def fuzz(name: str, runs: int) -> str:
    command = [sys.executable, str(HERE / name), "--runs", str(runs), "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    return done.stdout


def test_the_codec_reads_or_refuses_whatever_comes() -> None:
    pytest.importorskip("atheris", reason="libFuzzer for Python is there for Linux on x86-64 only")
    told = fuzz("codec.py", 40_000)
    assert "inputs: 40000," in told
    assert "unexpected exceptions: 0" in told
    distinct = int(told.partition("distinct outcomes: ")[2].split()[0])
    assert distinct > 100


def test_the_whole_intake_keeps_the_rules_under_hostile_records() -> None:
    told = fuzz("intake.py", 6_000)
    assert "violations: 0" in told
    assert "partitions stalled: 0" in told
