"""All faults mixed, for a short time; `make soak` does it for longer (docs/RELIABILITY.md)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from shim import needs_shim

RUN = Path(__file__).parents[1] / "soak" / "run.py"
MINUTES = os.environ.get("SPLITFERRY_SOAK_MINUTES", "0.7")


@needs_shim
@pytest.mark.kafka
@pytest.mark.timeout(420)
def test_a_short_soak() -> None:
    seed = os.environ.get("SPLITFERRY_FAULT_SEED")
    arguments = ["--minutes", MINUTES, *(["--seed", seed] if seed else [])]
    done = subprocess.run(
        [sys.executable, str(RUN), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    print(done.stdout)
    assert done.returncode == 0
