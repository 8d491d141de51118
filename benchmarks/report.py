"""Writes docs/PERFORMANCE.md, with its plots, from the results of the benchmarks and from the
chapters in performance.md, which are written by hand.

Results of `benchmarks/results` are first copied to `docs/performance`, which keeps what the page
shows; what was not measured anew stays.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from latency import latencies
from load import MIB
from receive import BASES
from restart import DRAIN, RESTART, Restart
from rounds import RESULTS, ratios, spread, table
from send import BARE, OPENMSISTREAM
from targets import Saved, reached, splits_of

DOCS = RESULTS.parent.parent / "docs"
TEMPLATE = Path(__file__).parent / "performance.md"
BENCHMARKS = "receive", "send", "end_to_end", "small", "latency", "memory", "restart", "growth"
_MADE = "<!-- Made by benchmarks/report.py: change benchmarks/performance.md instead. -->\n\n"
_NONE = "*Not measured yet.*"


def page(template: str, saved: Mapping[str, Saved]) -> str:
    """The template with a table in the place of each `{{ name }}`.

    Raises:
        KeyError: there is no such table.
    """
    makers: dict[str, Callable[[Saved], str]] = {
        "receive": lambda found: _files(found, BASES),
        "send": lambda found: _files(found, [BARE, OPENMSISTREAM]),
        "end_to_end": lambda found: _files(found, [BARE]),
        "small": _small,
        "latency": _latency,
        "memory": _memory,
        "restart": _restart,
        "growth": _growth,
    }

    def fill(match: re.Match[str]) -> str:
        name = match[1]
        if name == "targets":
            return _targets(saved)
        if name == "machine":
            return _machine(saved)
        make = makers[name]
        if name not in saved:
            return _NONE
        links = f"![{name}](performance/{name}.svg)\n\n[Every run](performance/{name}.json), "
        return f"{make(saved[name])}\n\n{links}{saved[name].machine['day']}."

    return _MADE + re.sub(r"\{\{ (\w+) \}\}", fill, template)


def _rows(head: list[str], lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *lines])


def _targets(saved: Mapping[str, Saved]) -> str:
    lines = [
        [
            line.work,
            f"{'at most' if line.most else 'at least'} {line.bound:,}{line.unit}",
            spread(line.values, ",.0f" if line.bound >= 10 else ".2f") + line.unit,
            line.verdict,
        ]
        for line in reached(saved)
    ]
    return _rows(["work", "wanted", "reached", ""], lines) if lines else _NONE


def _machine(saved: Mapping[str, Saved]) -> str:
    kinds: dict[str, list[str]] = {}
    for name, found in saved.items():
        machine = found.machine
        facts = (
            f"{machine['cores']} cores ({machine['cpu']}), {machine['memory_gib']} GiB of memory, "
            f"{machine['file_system']}, {machine['system']}, Python {machine['python']}, aiokafka "
            f"{machine['aiokafka']}, Apache Kafka {machine['kafka']}"
        )
        load = f"{name} (load average at its end {machine['load_average']})"
        kinds.setdefault(facts, []).append(load)
    return "\n".join(f"- {facts}: {', '.join(names)}" for facts, names in kinds.items()) or _NONE


def _files(saved: Saved, bases: list[str]) -> str:
    size, split = saved.settings["mebibytes"], saved.settings["split_size"]
    return "\n\n".join(
        f"{part}, {size} MiB in all, splits of {split} KiB:\n\n"
        + table(rounds, saved.total, [base for base in bases if base in rounds])
        for part, rounds in saved.parts.items()
    )


def _small(saved: Saved) -> str:
    count = saved.settings["requests"]
    lines = [
        [
            side,
            spread([count / run.seconds for run in runs], ",.0f"),
            spread([run.cpu_seconds / count * 1e6 for run in runs], ".0f"),
            f"{max(run.peak_rss for run in runs) / MIB:.0f}",
        ]
        for rounds in saved.parts.values()
        for side, runs in rounds.items()
    ]
    head = ["side", "requests a second", "CPU µs each", "peak RSS, MiB"]
    return f"{count:,} requests of {saved.settings['size']:,} bytes:\n\n{_rows(head, lines)}"


def _latency(saved: Saved) -> str:
    lines = []
    for part, rounds in saved.parts.items():
        for side, runs in rounds.items():
            milliseconds = (
                spread([run.percentile(one) * 1e3 for run in latencies(runs)], ".0f")
                for one in (0.5, 0.99)
            )
            cpu = spread([run.cpu_seconds / run.seconds for run in runs])
            lines.append([part, side, *milliseconds, cpu])
    return _rows(["rate", "to", "p50, ms", "p99, ms", "cores that the consumer takes"], lines)


def _memory(saved: Saved) -> str:
    lines = [
        [part, f"{max(run.peak_rss for run in rounds['consume']) / MIB:.0f}"]
        for part, rounds in saved.parts.items()
    ]
    return _rows(["8 files of together", "peak RSS, MiB"], lines)


def _restart(saved: Saved) -> str:
    lines = []
    for part, rounds in saved.parts.items():
        runs = [run for run in rounds[RESTART] if isinstance(run, Restart)]
        again = spread(ratios(rounds, RESTART, DRAIN)) if DRAIN in rounds else "-"
        lines.append([part, spread([run.to_first_write for run in runs]), again])
    return _rows(["behind the start", "first new write, s", "re-read, of the drain"], lines)


def _growth(saved: Saved) -> str:
    tables = []
    for scale, rounds in saved.parts.items():
        lines = []
        unit = "s"
        for step, runs in rounds.items():
            factor, form = 1.0, ".2f"
            if count := splits_of(saved, scale, step):
                unit, factor, form = "µs a split", 1e6 / count, ".1f"
            times = spread([run.seconds * factor for run in runs], form)
            costs = spread([run.cpu_seconds * factor for run in runs], form)
            lines.append([step, times, costs, f"{max(run.peak_rss for run in runs) / MIB:.0f}"])
        tables.append(_rows([scale, unit, f"CPU {unit}", "peak RSS, MiB"], lines))
    return "\n\n".join(tables)


def main(arguments: list[str] | None = None) -> None:
    argparse.ArgumentParser(description=__doc__).parse_args(arguments)
    import plots  # noqa: PLC0415 - only here is matplotlib needed

    kept = DOCS / "performance"
    kept.mkdir(exist_ok=True)
    saved: dict[str, Saved] = {}
    for name in BENCHMARKS:
        path = kept / f"{name}.json"
        if (fresh := RESULTS / path.name).exists():
            shutil.copyfile(fresh, path)
        if path.exists():
            saved[name] = Saved.of(json.loads(path.read_text()))
            plots.draw(name, saved[name], kept / f"{name}.svg")
    (DOCS / "PERFORMANCE.md").write_text(page(TEMPLATE.read_text(), saved))
    print(f"docs/PERFORMANCE.md: {', '.join(saved) or 'no results yet'}")


if __name__ == "__main__":
    main()
