from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitferry_consumer.bookmark import Bookmark, NewerCommit

offsets = st.integers(0, 2**63 - 1)


@given(offsets, offsets, offsets, offsets)
def test_metadata_round_trips_and_is_short_ascii(w: int, s: int, p: int, h: int) -> None:
    bookmark = Bookmark(w, s, p, h)
    assert len(bookmark.metadata.encode("ascii")) < 100
    assert Bookmark.parse(w, bookmark.metadata) == bookmark


@pytest.mark.parametrize("metadata", ["", "by hand", "splitferry/1 S=1", "splitferry/x S=1"])
def test_foreign_metadata_leaves_the_safe_bounds(metadata: str) -> None:
    bookmark = Bookmark.parse(7, metadata)
    assert bookmark == Bookmark(7, None, 7, None)
    assert bookmark.results_from(horizon=10, start=3) == 3


@pytest.mark.parametrize(
    "metadata", ["splitferry/2", "splitferry/2 S=1 P=2 H=3", "splitferry/10 x"]
)
def test_metadata_of_a_later_version_is_not_taken_for_foreign(metadata: str) -> None:
    with pytest.raises(NewerCommit, match="splitferry"):
        Bookmark.parse(7, metadata)


def test_a_horizon_that_grew_reads_the_results_from_the_start() -> None:
    bookmark = Bookmark(7, 5, 7, horizon=10)
    assert bookmark.results_from(horizon=10, start=0) == 5
    assert bookmark.results_from(horizon=9, start=0) == 5
    assert bookmark.results_from(horizon=11, start=0) == 0
