"""Rounds of sides in turn, and what they come to.

Timings of a shared machine drift. So every round runs all sides, in an order that turns from
round to round, ratios are taken within a round, and medians are told with their spread.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from load import GIB, MIB
from splitferry_cli.kafka_jars import KAFKA_VERSION
from watched import Measurement

Side = Callable[[], Awaitable[Measurement]]
Rounds = Mapping[str, Sequence[Measurement]]
RESULTS = Path(__file__).parent / "results"
_PLACES = ("bootstrap_servers", "directory")
"""Options that say nothing to a reader elsewhere."""


async def alternate(sides: Mapping[str, Side], rounds: int) -> dict[str, list[Measurement]]:
    """Run every side once a round."""
    measured: dict[str, list[Measurement]] = {name: [] for name in sides}
    names = list(sides)
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            measurement = await sides[name]()
            measured[name].append(measurement)
            print(
                f"  round {number + 1}  {name:<22} {measurement.seconds:6.2f} s  "
                f"{measurement.cpu_seconds:5.2f} CPU s  {measurement.peak_rss / MIB:4.0f} MiB  "
                f"(load average {os.getloadavg()[0]:.1f})",
                flush=True,
            )
    return measured


def ratios(rounds: Rounds, side: str, base: str) -> list[float]:
    """How fast `side` was, as a part of the speed of `base`, round by round."""
    return [b.seconds / s.seconds for s, b in zip(rounds[side], rounds[base], strict=True)]


def spread(values: Sequence[float], form: str = ".2f") -> str:
    """Median and range."""
    middle = statistics.median(values)
    return f"{middle:{form}} ({min(values):{form}} to {max(values):{form}})"


def counted(files: int) -> str:
    return "1 file" if files == 1 else f"{files} files"


def table(rounds: Rounds, total: int, bases: Sequence[str]) -> str:
    """Markdown: medians with their ranges, and speeds as parts of the speeds of `bases`."""
    head = ["side", "s", "MB/s", "CPU s/GiB", "peak RSS, MiB", "s with start", "CPU s with start"]
    lines = [head + [f"of {base}" for base in bases], ["---"] * (len(head) + len(bases))]
    for side, runs in rounds.items():
        middle = statistics.median(run.seconds for run in runs)
        lines.append(
            [
                side,
                spread([run.seconds for run in runs]),
                f"{total / middle / 1e6:.0f}",
                spread([run.cpu_seconds * GIB / total for run in runs]),
                f"{max(run.peak_rss for run in runs) / MIB:.0f}",
                spread([run.whole_seconds for run in runs]),
                spread([run.whole_cpu_seconds for run in runs]),
                *(spread(ratios(rounds, side, base)) for base in bases),
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def save(name: str, told: argparse.Namespace, measured: Mapping[str, Rounds]) -> Path:
    """Write `results/NAME.json`: every run as it was, with what it ran on."""
    found = {
        "settings": {key: value for key, value in vars(told).items() if key not in _PLACES},
        "machine": machine(told.directory),
        "runs": {
            part: {side: [dataclasses.asdict(run) for run in runs] for side, runs in rounds.items()}
            for part, rounds in measured.items()
        },
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    return path


def machine(directory: Path) -> dict[str, Any]:
    """What figures depend on. Nothing in it names the machine or its user."""
    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    release = ".".join(platform.release().split(".")[:2])
    models = [line.split(":", 1)[1].strip() for line in cpu.splitlines() if "model name" in line]
    return {
        "cores": os.cpu_count(),
        "cpu": models[0] if models else platform.processor(),
        "memory_gib": round(psutil.virtual_memory().total / GIB),
        "file_system": _file_system(directory),
        "system": f"{platform.system()} {release} {platform.machine()}",
        "python": platform.python_version(),
        "aiokafka": version("aiokafka"),
        "kafka": KAFKA_VERSION,
        "day": time.strftime("%Y-%m-%d", time.gmtime()),
        "load_average": round(os.getloadavg()[0], 1),
    }


def _file_system(directory: Path) -> str:
    above = [
        found
        for found in psutil.disk_partitions(all=True)
        if directory.resolve().is_relative_to(found.mountpoint)
    ]
    return max(above, key=lambda found: len(found.mountpoint)).fstype if above else "unknown"
