from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from splitferry_consumer.flow import MINIMUM_SHARE, RECORD_OVERHEAD, Flow, Gauge, weight


def test_a_partition_is_full_at_the_high_mark_and_goes_on_at_the_low_one() -> None:
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
        seen.append(gauge.full)
    assert seen == [full for _, full in steps]


def test_a_view_weighs_as_much_as_the_value_that_it_keeps_in_memory() -> None:
    value = bytes(1000)
    assert weight(memoryview(value)[999:]) == weight(value) == RECORD_OVERHEAD + 1000
    assert weight(None) == RECORD_OVERHEAD


def test_busy_partitions_share_the_whole_and_none_is_starved() -> None:
    flow = Flow(high=8 * MINIMUM_SHARE)
    one, other, idle = Gauge(flow), Gauge(flow), Gauge(flow)
    one.add(7 * MINIMUM_SHARE)
    seen = [one.full]  # alone it has all
    other.add(1)
    one.add(1)
    seen.append(one.full)  # it has half now
    assert seen == [False, True]
    assert not other.full
    one.add(-one.bytes)
    assert flow.high == 8 * MINIMUM_SHARE
    idle.add(0)
    assert flow.busy == 1
    many = [Gauge(flow) for _ in range(1000)]
    for gauge in many:
        gauge.add(1)
    assert flow.high == MINIMUM_SHARE


@given(st.lists(st.integers(1, 3 * MINIMUM_SHARE)))
def test_a_partition_that_let_everything_go_is_never_full(sizes: list[int]) -> None:
    flow = Flow(high=MINIMUM_SHARE)
    gauge = Gauge(flow)
    for size in sizes:
        gauge.add(size)
    for size in sizes:
        gauge.add(-size)
    assert gauge.bytes == flow.busy == 0
    assert not gauge.full
