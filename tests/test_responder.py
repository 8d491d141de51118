from __future__ import annotations

import pytest
from structlog.testing import capture_logs

from splitferry_consumer.responder import SharedWithBatchHandler


def test_the_first_token_is_held_and_nobody_is_told() -> None:
    responder = SharedWithBatchHandler()
    assert repr(responder) == "<SharedWithBatchHandler reply=None taken=False>"
    assert responder.update(None) is None
    assert responder.update(b"a") is None
    assert responder.reply == b"a"
    assert repr(responder) == "<SharedWithBatchHandler reply=61 taken=False>"


def test_an_older_token_is_handed_out_once_when_a_newer_one_comes() -> None:
    responder = SharedWithBatchHandler()
    responder.update(b"a")
    assert responder.update(b"b") == b"a"
    assert responder.update(b"b") is None
    assert responder.update(None) is None
    assert responder.update(b"a") == b"b"


def test_the_newest_token_is_taken_once_for_the_result() -> None:
    responder = SharedWithBatchHandler()
    responder.update(b"a")
    responder.update(b"b")
    assert responder.final() == b"b"
    with pytest.raises(RuntimeError, match=r"^the reply of this request was already taken"):
        responder.final()
    assert responder.reply == b"b"


def test_nothing_is_taken_when_nobody_waits() -> None:
    assert SharedWithBatchHandler().final() is None


def test_an_update_after_the_end_is_an_error_and_is_logged() -> None:
    responder = SharedWithBatchHandler()
    responder.final()
    taken = r"^the reply of this request was already taken for its result$"
    with capture_logs() as logs, pytest.raises(RuntimeError, match=taken):
        responder.update(b"late")
    assert [(entry["event"], entry["reply"]) for entry in logs] == [
        ("responder update error", b"late".hex())
    ]
