from __future__ import annotations

import pytest

from splitferry_consumer.pace import SPAN, Pace


@pytest.mark.parametrize("seconds", [1, 3, 60])
def test_a_steady_stream_has_its_rate_from_the_first_second_on(seconds: int) -> None:
    pace, now = Pace(), 1000.0
    for step in range(seconds * 10):
        now = 1000.0 + step / 10
        pace.add(100, now)
    assert pace.rate(now) == pytest.approx(1000, rel=0.15)


def test_it_fades_when_nothing_comes() -> None:
    pace = Pace()
    assert pace.rate(5.0) == 0
    pace.add(1000, 10.0)
    assert pace.rate(10.0) == pytest.approx(1000, rel=0.15), "as if it had taken a second"
    rates = [pace.rate(10.0 + seconds) for seconds in (1, 2, 5, 20, 60)]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 1000 / SPAN * 1e-4
