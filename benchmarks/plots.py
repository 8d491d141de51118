"""Pictures of stored results, as SVG: medians, with lines from the least to the largest."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from latency import latencies
from load import GIB, MIB
from restart import RESTART, Restart
from rounds import Rounds
from targets import Saved, splits_of
from watched import Measurement

Value = Callable[[Measurement], float]
OWN, OTHER = "#3f51b5", "#9e9e9e"
_OTHERS = "drain", "disk", "bare", "OpenMSIStream"
mpl.rcParams.update(
    {
        "svg.fonttype": "none",  # text stays text
        "svg.hashsalt": "splitferry",  # the same results give the same bytes
        "axes.spines.top": False,
        "axes.spines.right": False,
        "font.size": 9,
    }
)


def draw(name: str, saved: Saved, path: Path) -> None:
    """Write the picture of one benchmark."""
    figure = _DRAWERS[name](saved)
    figure.savefig(path, format="svg", metadata={"Date": None}, facecolor="white")


def _bars(parts: dict[str, Rounds], values: dict[str, Value]) -> Figure:
    """A row for each part, a column for each value, a bar for each side."""
    sides = max(len(rounds) for rounds in parts.values())
    size = (4 + 2.6 * len(values), len(parts) * (0.7 + 0.3 * sides))
    figure = Figure(figsize=size, layout="constrained")
    grid: Any = figure.subplots(len(parts), len(values), squeeze=False)
    for row, (part, rounds) in zip(grid, parts.items(), strict=True):
        for axes, (title, value) in zip(row, values.items(), strict=True):
            found = [[value(run) for run in runs] for runs in rounds.values()]
            _steps(axes, list(rounds), found, axes is row[0])
            axes.set_title(f"{part}: {title}" if axes is row[0] else title)
    return figure


def _whiskers(found: Sequence[Sequence[float]]) -> list[list[float]]:
    middles = [statistics.median(some) for some in found]
    return [
        [middle - min(some) for middle, some in zip(middles, found, strict=True)],
        [max(some) - middle for middle, some in zip(middles, found, strict=True)],
    ]


def _rss(run: Measurement) -> float:
    return run.peak_rss / MIB


def _files(saved: Saved) -> Figure:
    values: dict[str, Value] = {
        "seconds": lambda run: run.seconds,
        "CPU seconds per GiB": lambda run: run.cpu_seconds * GIB / saved.total,
        "peak RSS, MiB": _rss,
    }
    return _bars(dict(saved.parts), values)


def _small(saved: Saved) -> Figure:
    count = saved.settings["requests"]
    values: dict[str, Value] = {
        "requests a second": lambda run: count / run.seconds,
        "CPU µs each": lambda run: run.cpu_seconds / count * 1e6,
    }
    return _bars(dict(saved.parts), values)


def _memory(saved: Saved) -> Figure:
    rounds = {part: rounds["consume"] for part, rounds in saved.parts.items()}
    return _bars({"8 files": rounds}, {"peak RSS, MiB": _rss})


def _restart(saved: Saved) -> Figure:
    rounds = {part: rounds[RESTART] for part, rounds in saved.parts.items()}

    def first(run: Measurement) -> float:
        assert isinstance(run, Restart)
        return run.to_first_write

    return _bars({"restart": rounds}, {"seconds to the first new write": first})


def _latency(saved: Saved) -> Figure:
    """Of all rounds together: the part of the requests that was answered within a time."""
    figure = Figure(figsize=(3.4 * len(saved.parts), 3), layout="constrained")
    grid: Any = figure.subplots(1, len(saved.parts), squeeze=False, sharey=True)
    for axes, (part, rounds) in zip(grid[0], saved.parts.items(), strict=True):
        for side, runs in rounds.items():
            delays = sorted(delay * 1e3 for run in latencies(runs) for delay in run.delays)
            axes.step(delays, [n / len(delays) for n in range(1, len(delays) + 1)], label=side)
        most = max(run.percentile(0.995) for runs in rounds.values() for run in latencies(runs))
        axes.set(title=part, xlabel="ms", xlim=(0, most * 1e3))
        axes.grid(alpha=0.3)
    grid[0][0].set_ylabel("part of the requests")
    grid[0][0].legend()
    return figure


def _growth(saved: Saved) -> Figure:
    steps = [len(rounds) for rounds in saved.parts.values()]
    figure = Figure(figsize=(9, sum(0.8 + 0.25 * count for count in steps)), layout="constrained")
    grid: Any = figure.subplots(len(steps), 2, squeeze=False, height_ratios=[s + 2 for s in steps])
    values: dict[str, Value] = {"": lambda run: run.seconds, "CPU ": lambda run: run.cpu_seconds}
    for row, (scale, rounds) in zip(grid, saved.parts.items(), strict=True):
        for axes, (kind, value) in zip(row, values.items(), strict=True):
            factors = [1e6 / (splits_of(saved, scale, step) or 1e6) for step in rounds]
            found = [
                [value(run) * factor for run in runs]
                for factor, runs in zip(factors, rounds.values(), strict=True)
            ]
            _steps(axes, list(rounds), found, axes is row[0])
            unit = "s" if splits_of(saved, scale, next(iter(rounds))) is None else "µs a split"
            axes.set_title(f"{scale}: {kind}{unit}")
    return figure


def _steps(axes: Any, names: list[str], found: list[list[float]], labelled: bool) -> None:
    axes.barh(
        names,
        [statistics.median(some) for some in found],
        xerr=_whiskers(found),
        color=[OTHER if any(word in name for word in _OTHERS) else OWN for name in names],
        height=0.6,
    )
    axes.invert_yaxis()
    if not labelled:
        axes.set_yticklabels([])


_DRAWERS: dict[str, Callable[[Saved], Figure]] = {
    "receive": _files,
    "send": _files,
    "end_to_end": _files,
    "small": _small,
    "latency": _latency,
    "memory": _memory,
    "restart": _restart,
    "growth": _growth,
}
