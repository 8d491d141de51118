"""The benchmarks' own arithmetic, and the page that is made of their results."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Callable, Coroutine
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import report
from latency import KEPT, Latencies, thinned
from load import KIB, MIB, Load
from rounds import alternate, ratios, spread
from splitferry_cli.topic_rules import Names
from targets import Reached, Saved, reached
from watched import Measurement

NAMES = Names("splits", "results", "dead-letters")
MACHINE = {
    "cores": 2,
    "cpu": "some",
    "memory_gib": 4,
    "file_system": "ext4",
    "system": "Linux",
    "python": "3.11",
    "aiokafka": "0.14",
    "kafka": "4.3",
    "day": "2026-01-02",
    "load_average": 0.5,
}


def measured(seconds: float, cpu: float = 1.0, rss: int = 100 * MIB) -> Measurement:
    return Measurement(seconds, cpu, rss, seconds + 1, cpu + 1)


def stored(measurement: Measurement, **more: Any) -> dict[str, Any]:
    names = "seconds", "cpu_seconds", "peak_rss", "whole_seconds", "whole_cpu_seconds"
    return {name: getattr(measurement, name) for name in names} | more


def saved(settings: dict[str, Any], runs: dict[str, dict[str, list[dict[str, Any]]]]) -> Saved:
    """By way of JSON, as a result is kept."""
    found = {"settings": settings, "machine": MACHINE, "runs": runs}
    return Saved.of(json.loads(json.dumps(found)))


RECEIVE = saved(
    {"mebibytes": 1024, "split_size": 512},
    {
        "8 files": {
            "drain, CRC on": [stored(measured(seconds)) for seconds in (4, 2, 3)],
            "consume": [stored(measured(seconds, 3.3)) for seconds in (5, 2, 3)],
        }
    },
)
LATENCY = saved(
    {},
    {"100 a second": {"files": [stored(measured(1), delays=[n / 1000 for n in range(101)])] * 3}},
)


def load(**how: Any) -> Load:
    """3 items of 5 splits, the last one shorter."""
    return Load(NAMES, 2, 3, 3 * (4 * KIB + 100), KIB, **how)


def test_a_load_is_all_items_a_split_of_each_in_turn() -> None:
    order = list(load().order())
    assert order == [(item, index) for index in range(5) for item in range(3)]
    assert len(order) == load().records
    assert load().used == [0, 1]


def test_only_so_many_items_of_a_load_are_open_at_once() -> None:
    order = list(load(together=2).order())
    assert order[:4] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert order[10:] == [(2, index) for index in range(5)]


def test_a_shuffled_load_has_the_same_splits() -> None:
    order = list(load(shuffled=True).order())
    assert order != list(load().order())
    assert sorted(order) == sorted(load().order())


def test_an_open_load_lacks_the_last_split_of_each_item() -> None:
    order = list(load(open=True).order())
    assert {index for _, index in order} == {0, 1, 2, 3}
    assert len(order) == load(open=True).records


def test_the_splits_of_an_item_are_whole_and_carry_its_digest() -> None:
    some = load(first=7)
    splits = [some.split(1, index) for index in range(some.splits)]
    whole = b"".join(bytes(split.payload) for split in splits)
    assert len(whole) == some.size
    assert all(one.end == other.offset for one, other in pairwise(splits))
    assert splits[-1].sha256 == hashlib.sha256(whole).digest()
    assert {split.request.sequence for split in splits} == {8}


async def test_every_side_runs_once_a_round_in_an_order_that_turns() -> None:
    ran: list[str] = []

    def side(name: str) -> Callable[[], Coroutine[Any, Any, Measurement]]:
        async def run() -> Measurement:
            ran.append(name)
            return measured(len(ran))

        return run

    found = await alternate({name: side(name) for name in "abc"}, 3)
    assert "".join(ran) == "abcbcacab"
    assert [run.seconds for run in found["a"]] == [1, 6, 8]


def test_a_ratio_is_taken_within_a_round() -> None:
    rounds = {"own": [measured(2), measured(8)], "base": [measured(1), measured(4)]}
    assert ratios(rounds, "own", "base") == [0.5, 0.5]
    assert spread([3, 1, 2], ".1f") == "2.0 (1.0 to 3.0)"


def test_two_processes_at_once_cost_both_and_take_the_longer_time() -> None:
    both = measured(2, 1.0, 5) + measured(3, 2.0, 7)
    assert (both.seconds, both.cpu_seconds, both.peak_rss) == (3, 3.0, 12)
    assert (both.whole_seconds, both.whole_cpu_seconds) == (4, 5.0)


def test_many_delays_are_kept_by_their_ranks() -> None:
    kept = thinned([n / 100_000 for n in reversed(range(100_000))])
    assert len(kept) == KEPT
    assert Latencies(1, 1, 1, 1, 1, kept).percentile(0.99) == pytest.approx(0.99, abs=0.001)
    assert thinned([0.3, 0.1, 0.2]) == [0.1, 0.2, 0.3]


@pytest.mark.parametrize(
    ("value", "most", "verdict"),
    [
        (1.0, False, "met, 25 % above"),
        (0.6, False, "**not met**, 25 % below"),
        (1.0, True, "**not met**, 25 % above"),
        (0.6, True, "met, 25 % below"),
        (0.8, True, "met, 0 % above"),
    ],
)
def test_a_line_says_whether_it_is_met_and_by_how_much(
    value: float, most: bool, verdict: str
) -> None:
    assert Reached("work", 0.8, [value, 0.0, 9.0], most=most).verdict == verdict


def test_stored_runs_are_judged() -> None:
    lines = {line.work: line for line in reached({"receive": RECEIVE, "latency": LATENCY})}
    drain = lines["receive, 8 files: speed of drain, CRC on"]
    assert (drain.middle, drain.met) == (1.0, True)
    cpu = lines["receive, 8 files: CPU seconds per GiB"]
    assert (cpu.middle, cpu.met) == (3.3, False)
    assert lines["latency at 100 a second to files: p99"].middle == pytest.approx(99)
    assert not any("OpenMSIStream" in work for work in lines), "a side that was left out"


def test_growth_is_the_cost_of_a_split_not_of_a_run() -> None:
    steps = {"1,000": 10.0, "1,000 shuffled": 99.0, "1,000,000": 120.0}
    runs = {step: [stored(measured(seconds, seconds))] for step, seconds in steps.items()}
    records = {"splits": {"1,000": 100, "1,000 shuffled": 100, "1,000,000": 1000}}
    lines = reached({"growth": saved({"records": records}, {"splits": runs})})
    assert [line.middle for line in lines] == [pytest.approx(1.2)] * 2
    assert all(line.met for line in lines)


def test_the_page_has_a_table_for_each_name_and_says_what_was_not_measured() -> None:
    page = report.page("{{ targets }}\n\n{{ receive }}\n\n{{ send }}", {"receive": RECEIVE})
    assert "| receive, 8 files: CPU seconds per GiB | at most 3.0 | 3.30 " in page
    assert "(performance/receive.svg)" in page
    assert "2026-01-02" in page
    assert page.endswith("*Not measured yet.*")
    with pytest.raises(KeyError):
        report.page("{{ nothing }}", {})


def test_the_page_is_what_the_report_makes_of_its_chapters_and_the_results_kept() -> None:
    results = {
        name: Saved.of(json.loads(path.read_text()))
        for name in report.BENCHMARKS
        if (path := report.DOCS / "performance" / f"{name}.json").exists()
    }
    made = report.page(report.TEMPLATE.read_text(), results)
    assert (report.DOCS / "PERFORMANCE.md").read_text() == made, "run benchmarks/report.py"


@pytest.mark.parametrize("name", report.BENCHMARKS)
def test_a_benchmark_can_be_told_where_and_tells_its_purpose(name: str, tmp_path: Path) -> None:
    benchmark = importlib.import_module(name)
    told = benchmark.parser().parse_args([f"--directory={tmp_path}", "--rounds=1"])
    assert (told.directory, told.rounds) == (tmp_path, 1)
    assert benchmark.__doc__
    assert benchmark.main
