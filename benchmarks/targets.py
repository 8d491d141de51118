"""What is wanted of the figures, and what they reached. No I/O: stored runs in, lines out."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import growth
import receive
import restart
import send
import small
from latency import Latencies, latencies
from load import GIB, MIB
from restart import Restart
from rounds import Rounds, ratios
from watched import Measurement


@dataclass(frozen=True, slots=True)
class Saved:
    """One benchmark's results, as `rounds.save` wrote them."""

    settings: Mapping[str, Any]
    machine: Mapping[str, Any]
    parts: Mapping[str, Rounds]

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> Saved:
        """Raises KeyError or TypeError for results of another form."""
        parts = {
            part: {side: [_run(run) for run in runs] for side, runs in rounds.items()}
            for part, rounds in found["runs"].items()
        }
        return cls(found["settings"], found["machine"], parts)

    @property
    def total(self) -> int:
        """Bytes of all files of a run."""
        return int(self.settings["mebibytes"]) * MIB


def _run(found: Mapping[str, Any]) -> Measurement:
    kinds: dict[str, type[Measurement]] = {"delays": Latencies, "to_first_write": Restart}
    kind = next((kind for key, kind in kinds.items() if key in found), Measurement)
    return kind(**found)


@dataclass(frozen=True, slots=True)
class Reached:
    """One line of what is wanted, with a value of each round.

    Attributes:
        work: of what.
        bound: `values` are to reach it or, with `most`, not to exceed it.
        unit: behind the numbers.
    """

    work: str
    bound: float
    values: Sequence[float]
    unit: str = ""
    most: bool = False

    @property
    def middle(self) -> float:
        return statistics.median(self.values)

    @property
    def met(self) -> bool:
        return self.middle <= self.bound if self.most else self.middle >= self.bound

    @property
    def verdict(self) -> str:
        """Met or not, and how far the median is from the bound."""
        away = abs(self.middle / self.bound - 1) * 100
        side = "below" if self.middle < self.bound else "above"
        return f"{'met' if self.met else '**not met**'}, {away:.0f} % {side}"


def reached(saved: Mapping[str, Saved]) -> list[Reached]:
    """Every line that the results at hand can judge."""
    return [line for name, judge in _JUDGES.items() if name in saved for line in judge(saved[name])]


def _receive(saved: Saved) -> Iterator[Reached]:
    bounds = {receive.DRAIN: 0.9, receive.OPENMSISTREAM[2]: 3.0, receive.OPENMSISTREAM[4]: 2.3}
    for part, rounds in saved.parts.items():
        for base, bound in bounds.items():
            if {receive.CONSUME, base} <= rounds.keys():
                values = ratios(rounds, receive.CONSUME, base)
                yield Reached(f"receive, {part}: speed of {base}", bound, values)
        if not (runs := rounds.get(receive.CONSUME)):
            continue
        cpu = [run.cpu_seconds * GIB / saved.total for run in runs]
        yield Reached(f"receive, {part}: CPU seconds per GiB", 3.0, cpu, most=True)
        yield _rss(f"receive, {part}", runs)


def _memory(saved: Saved) -> Iterator[Reached]:
    for part, rounds in saved.parts.items():
        yield _rss(f"receive, 8 files, {part}", rounds["consume"])


def _rss(work: str, runs: Sequence[Measurement]) -> Reached:
    peaks = [run.peak_rss / MIB for run in runs]
    return Reached(f"{work}: peak RSS", 200, peaks, " MiB", most=True)


def _send(saved: Saved) -> Iterator[Reached]:
    for part, rounds in saved.parts.items():
        for base, bound in {send.BARE: 0.9, send.OPENMSISTREAM: 2.5}.items():
            if {send.SEND, base} <= rounds.keys():
                values = ratios(rounds, send.SEND, base)
                yield Reached(f"send, {part}: speed of {base}", bound, values)


def _small(saved: Saved) -> Iterator[Reached]:
    def rates(runs: Sequence[Measurement]) -> list[float]:
        return [saved.settings["requests"] / run.seconds for run in runs]

    for rounds in saved.parts.values():
        for side in (small.MEMORY, small.HANDLER):
            if side in rounds:
                yield Reached(f"small requests to {side}", 8_000, rates(rounds[side]), "/s")
        if small.FILES in rounds:
            yield Reached("small requests to files", 2_500, rates(rounds[small.FILES]), "/s")
            if small.DISK in rounds:
                values = ratios(rounds, small.FILES, small.DISK)
                yield Reached("or: small requests to files, of the disk's own rate", 0.6, values)


def _growth(saved: Saved) -> Iterator[Reached]:
    costs: dict[str, Callable[[Measurement], float]] = {
        "CPU time": lambda run: run.cpu_seconds,
        "time": lambda run: run.seconds,
    }
    for scale, what in growth.PER_SPLIT.items():
        steps = [step for step in saved.parts.get(scale, {}) if "shuffled" not in step]
        if len(steps) < 2:
            continue
        first, last = steps[0], steps[-1]
        least, most = (saved.parts[scale][step] for step in (first, last))
        records = splits_of(saved, scale, first) or 1, splits_of(saved, scale, last) or 1
        for name, cost in costs.items():
            values = [
                (cost(b) / records[1]) / (cost(a) / records[0])
                for a, b in zip(least, most, strict=True)
            ]
            yield Reached(
                f"growth from {first} to {last} {what}: {name} per split", 1.3, values, most=True
            )


def splits_of(saved: Saved, scale: str, step: str) -> int | None:
    """How many splits a step of a scale of `growth` has in all, where the cost of one counts; None
    where all steps are the same work."""
    records: int = saved.settings["records"][scale][step]
    return records if scale in growth.PER_SPLIT else None


def _restart(saved: Saved) -> Iterator[Reached]:
    for part, rounds in saved.parts.items():
        runs = [run for run in rounds[restart.RESTART] if isinstance(run, Restart)]
        if "ended" in part:
            values = [run.to_first_write for run in runs]
            yield Reached(f"restart, {part}: first new write after", 3.0, values, " s", most=True)
        else:
            values = ratios(rounds, restart.RESTART, restart.DRAIN)
            yield Reached(f"restart, {part}: speed of the drain", 0.8, values)


def _latency(saved: Saved) -> Iterator[Reached]:
    for side, runs in saved.parts.get("100 a second", {}).items():
        for part, bound in {0.5: 40, 0.99: 150}.items():
            values = [run.percentile(part) * 1e3 for run in latencies(runs)]
            work = f"latency at 100 a second to {side}: p{part * 100:.0f}"
            yield Reached(work, bound, values, " ms", most=True)


_JUDGES: dict[str, Callable[[Saved], Iterator[Reached]]] = {
    "receive": _receive,
    "memory": _memory,
    "send": _send,
    "small": _small,
    "growth": _growth,
    "restart": _restart,
    "latency": _latency,
}
