from __future__ import annotations

import random
import tracemalloc
from collections.abc import Iterator

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from splitferry_consumer import coverage as coverage_module
from splitferry_consumer.coverage import CHUNK, Coverage

SIZE = 64
short = st.builds(
    lambda start, size: (start, start + size), st.integers(0, SIZE), st.integers(0, 3)
)
ranges = short | st.tuples(st.integers(0, SIZE), st.integers(0, SIZE))
# Long ranges soon melt into one: many that are apart come of many short ones.
many = st.lists(ranges, max_size=6) | st.lists(short, min_size=10, max_size=40)


@pytest.fixture(scope="module", autouse=True)
def short_chunks() -> Iterator[None]:
    """So that a few ranges are many chunks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coverage_module, "CHUNK", 4)
        yield


@given(many, ranges)
@example([(0, 1), (3, 4)], (0, 4))  # one byte is no gap
def test_it_agrees_with_a_set_of_bytes(
    added: list[tuple[int, int]], asked: tuple[int, int]
) -> None:
    coverage, model = Coverage(), set[int]()
    for start, end in added:
        coverage.add(start, end)
        model |= set(range(start, end))
    assert {byte for start, end in coverage for byte in range(start, end)} == model
    assert coverage.size == len(model)
    assert coverage.end == max(model, default=-1) + 1
    assert coverage.gaps == len(coverage.missing(0, coverage.end))
    assert coverage.prefix == next(n for n in range(SIZE + 5) if n not in model)
    wanted = set(range(*asked))
    covered, missing = coverage.covered(*asked), coverage.missing(*asked)
    assert {byte for part in covered for byte in range(*part)} == wanted & model
    assert {byte for part in missing for byte in range(*part)} == wanted - model
    assert sorted(covered + missing) == sorted(set(covered + missing))


@given(many)
def test_ranges_are_disjoint_ordered_and_do_not_touch(added: list[tuple[int, int]]) -> None:
    coverage = Coverage()
    for start, end in added:
        coverage.add(start, end)
    flat = [edge for part in coverage for edge in part]
    assert flat == sorted(set(flat))
    assert all(0 < len(chunk) <= coverage_module.CHUNK for chunk in coverage._chunks)


def test_memory_grows_with_the_gaps_and_not_with_the_bytes() -> None:
    coverage = Coverage()
    for start in range(0, 100_000, 10):
        coverage.add(start, start + 10)
    assert len(coverage) == 1
    assert repr(coverage) == "Coverage([(0, 100000)])"


@pytest.mark.parametrize("shuffled", [False, True])
def test_a_gap_costs_a_few_bytes_and_one_insertion_little(
    shuffled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coverage_module, "CHUNK", CHUNK)
    starts = list(range(0, 200_000, 2))
    if shuffled:
        random.Random(1).shuffle(starts)
    tracemalloc.start()
    try:
        coverage = Coverage()
        for start in starts:
            coverage.add(start, start + 1)
        assert coverage.gaps == 99_999
        # A chunk grows in steps, by an eighth at most.
        assert tracemalloc.get_traced_memory()[0] < 100_000 * 16 * 9 / 8 + 2000
        # An insertion moves a chunk at the most, however many gaps there are.
        assert max(map(len, coverage._chunks)) <= CHUNK
    finally:
        tracemalloc.stop()


@given(many, st.integers(1, 12))
@example([(6, 7), (8, 9), (10, 12)], 2)  # the second cell begins where its first range does
@example([(0, 1), (2, 3), (8, 9), (10, 12)], 3)  # and so does the third, behind an empty one
def test_an_outline_hides_small_gaps_and_nothing_else(
    added: list[tuple[int, int]], most: int
) -> None:
    coverage = Coverage()
    for start, end in added:
        coverage.add(start, end)
    drawn = coverage.outline(most)
    if len(coverage) <= most:
        assert drawn == list(coverage)
        return
    assert len(drawn) <= most
    flat = [edge for part in drawn for edge in part]
    assert flat == sorted(set(flat))
    shown = {byte for part in drawn for byte in range(*part)}
    there = {byte for part in coverage for byte in range(*part)}
    assert there <= shown
    cell = coverage.end / most
    for gap in coverage.missing(0, coverage.end):
        hidden = shown & set(range(*gap))
        assert len(hidden) <= 2 * cell + 1, "two cells at most share a gap that neither shows"
    assert {flat[0], flat[-1]} <= {edge for part in coverage for edge in part}


@given(many, st.none() | st.integers(0, 3), st.integers(1, 6))
@example([(0, 2)], 0, 3)  # nothing is missing
def test_the_first_missing_ranges(
    added: list[tuple[int, int]], behind: int | None, most: int
) -> None:
    coverage = Coverage()
    for start, end in added:
        coverage.add(start, end)
    total = None if behind is None else coverage.end + behind
    known: list[tuple[int, int | None]] = [*coverage.missing(0, total or coverage.end)]
    if total is None:
        known.append((coverage.end, None))
    assert list(coverage.first_missing(total, most)) == known[:most]
