from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from splitferry_consumer.coverage import Coverage

SIZE = 64
ranges = st.tuples(st.integers(0, SIZE), st.integers(0, SIZE))


@given(st.lists(ranges), ranges)
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
    assert coverage.prefix == next(n for n in range(SIZE + 1) if n not in model)
    wanted = set(range(*asked))
    covered, missing = coverage.covered(*asked), coverage.missing(*asked)
    assert {byte for part in covered for byte in range(*part)} == wanted & model
    assert {byte for part in missing for byte in range(*part)} == wanted - model
    assert sorted(covered + missing) == sorted(set(covered + missing))


@given(st.lists(ranges))
def test_ranges_are_disjoint_ordered_and_do_not_touch(added: list[tuple[int, int]]) -> None:
    coverage = Coverage()
    for start, end in added:
        coverage.add(start, end)
    flat = [edge for part in coverage for edge in part]
    assert flat == sorted(set(flat))


def test_memory_grows_with_the_gaps_and_not_with_the_bytes() -> None:
    coverage = Coverage()
    for start in range(0, 100_000, 10):
        coverage.add(start, start + 10)
    assert len(coverage) == 1
    assert repr(coverage) == "Coverage([(0, 100000)])"
