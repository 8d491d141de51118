from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from splitferry_consumer.flow import MINIMUM_SHARE, Flow, Gauge


def test_a_partition_pauses_at_the_high_mark_and_goes_on_at_the_low_one() -> None:
    gauge = Gauge(Flow(high=10 * MINIMUM_SHARE))
    steps = [
        (10 * MINIMUM_SHARE - 1, False),
        (1, True),
        (-5 * MINIMUM_SHARE + 1, True),  # between the marks nothing changes
        (-1, False),
        (1, False),
    ]
    seen = []
    for size, _ in steps:
        gauge.add(size)
        seen.append(gauge.paused)
    assert seen == [paused for _, paused in steps]


def test_partitions_share_the_whole_and_none_is_starved() -> None:
    flow = Flow(high=8 * MINIMUM_SHARE)
    flow.divide(4)
    one, other = Gauge(flow), Gauge(flow)
    one.add(2 * MINIMUM_SHARE)
    assert one.paused
    assert not other.paused
    flow.divide(1000)
    assert flow.high == MINIMUM_SHARE
    flow.divide(0)
    assert flow.high == 8 * MINIMUM_SHARE


@given(st.lists(st.integers(1, 3 * MINIMUM_SHARE)))
def test_a_partition_that_let_everything_go_is_never_paused(sizes: list[int]) -> None:
    gauge = Gauge(Flow(high=MINIMUM_SHARE))
    for size in sizes:
        gauge.add(size)
    for size in sizes:
        gauge.add(-size)
    assert gauge.bytes == 0
    assert not gauge.paused
