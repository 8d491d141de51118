"""A broker that may be killed, for the tests of this directory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from brokers import KillableBroker, run


@pytest.fixture(scope="session")
def killable_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KillableBroker]:
    """Behind five networks; each test leaves it running."""
    broker = KillableBroker(tmp_path_factory.mktemp("killable"), proxies=5)
    run(broker.start())
    yield broker
    run(broker.stop())
