"""Rounds of sides in turn, and what they come to.

Timings of a shared machine drift. So every round runs all sides, in an order that turns from
round to round, ratios are taken within a round, and medians are told with their spread.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import statistics
from collections.abc import Awaitable, Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from load import GIB, MIB
from watched import Measurement

Side = Callable[[], Awaitable[Measurement]]
Rounds = Mapping[str, Sequence[Measurement]]
RESULTS = Path(__file__).parent / "results"


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


def save(name: str, settings: Mapping[str, Any], measured: Mapping[str, Rounds]) -> Path:
    """Write `results/NAME.json`: every run as it was, with what it ran on."""
    found = {
        "settings": settings,
        "machine": {
            "cores": os.cpu_count(),
            "system": platform.platform(),
            "python": platform.python_version(),
            "aiokafka": version("aiokafka"),
        },
        "runs": {
            part: {side: [dataclasses.asdict(run) for run in runs] for side, runs in rounds.items()}
            for part, rounds in measured.items()
        },
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(found, indent=1))
    return path
