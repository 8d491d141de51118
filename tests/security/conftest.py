"""One secured broker for all tests here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from brokers import run
from secured_broker import SecuredBroker


@pytest.fixture(scope="session")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecuredBroker]:
    broker = SecuredBroker(tmp_path_factory.mktemp("secured"), ["alice"])
    run(broker.start())
    yield broker
    run(broker.stop())
