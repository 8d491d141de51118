"""Where items are checked and let go."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from splitferry_consumer.targets import Condemned, Item, Verdict
from splitferry_consumer.targets.verifying import VerifyingIncoming
from splitferry_protocol.ids import RequestId, RequestKey
from splitferry_protocol.records import Status

ITEM = Item(RequestKey("g", "splits", 0, RequestId(1, 1), 0), "../anything", 1)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


async def test_bytes_are_there_until_the_request_ends_and_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = descriptors()
    incoming = VerifyingIncoming(ITEM)
    incoming.write_at(5, b"world")
    incoming.write_at(0, b"hello")
    assert incoming.read_at(0, 10) == b"helloworld"
    assert list(tmp_path.iterdir()) == []
    for proposal in (Verdict(Status.COMPLETED, None, 10, bytes(32)), Verdict(Status.ABORTED)):
        assert await incoming.settle(proposal) is proposal
    with pytest.raises(Condemned):
        incoming.write_at(0, b"late")
    assert descriptors() <= before


async def test_an_empty_item_needs_no_file() -> None:
    incoming = VerifyingIncoming(ITEM)
    proposal = Verdict(Status.COMPLETED, None, 0, bytes(32))
    assert await incoming.settle(proposal) is proposal
    incoming.discard()
