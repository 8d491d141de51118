from __future__ import annotations

from typing import Any

import pytest

from splitferry_protocol.errors import (
    CODES,
    TEXT_MAX,
    BatchTransferError,
    BatchTransferFailed,
    BatchTransferNotFound,
    SplitTaskFailed,
    VersionMismatch,
    WriteDataFailed,
    WsDataError,
    error_from_wire,
)
from splitferry_protocol.ids import U64_MAX, RequestId

REQUEST = RequestId(7, 42)
ERRORS = [
    (BatchTransferFailed(REQUEST, "the digest differs"), {"reason": "the digest differs"}),
    (BatchTransferNotFound(REQUEST), {}),
    (BatchTransferError(REQUEST, "the header is not a map"), {"msg": "the header is not a map"}),
    (WriteDataFailed(REQUEST, "no space left"), {}),
    (SplitTaskFailed(REQUEST, 3, "damaged"), {"idx": 3}),
]


def test_the_tree_has_the_six_errors_of_the_contract_under_one_root() -> None:
    assert sorted(CODES) == [
        "BatchTransferError",
        "BatchTransferFailed",
        "BatchTransferNotFound",
        "SplitTaskFailed",
        "VersionMismatch",
        "WriteDataFailed",
    ]
    for code, kind in CODES.items():
        assert issubclass(kind, WsDataError)
        assert kind.code == kind.__name__ == code


@pytest.mark.parametrize(("error", "own"), ERRORS, ids=lambda value: getattr(value, "code", ""))
def test_an_error_travels_with_its_own_fields(error: WsDataError, own: dict[str, Any]) -> None:
    told = error.to_wire()
    assert told == {
        "code": type(error).__name__,
        "message": str(error),
        "request_id": [7, 42],
        **own,
    }
    back = error_from_wire(told)
    assert type(back) is type(error)
    assert back.to_wire() == told
    assert back.request_id == REQUEST


def test_a_version_mismatch_travels_with_both_versions() -> None:
    back = error_from_wire(VersionMismatch(5, 4).to_wire())
    assert isinstance(back, VersionMismatch)
    assert (back.expected, back.actual) == (5, 4)


@pytest.mark.parametrize(("held", "expected"), [(5, 6), (U64_MAX - 1, U64_MAX), (U64_MAX, U64_MAX)])
def test_the_expected_version_is_the_next_one_as_far_as_there_is_one(
    held: int, expected: int
) -> None:
    assert VersionMismatch.not_newer_than(held, 3).expected == expected


def test_a_message_of_another_writer_stays_as_it_was_sent() -> None:
    told = {"code": "SplitTaskFailed", "message": "pas bon", "request_id": [7, 42], "idx": 9}
    assert error_from_wire(told).message == "pas bon"


def test_an_unknown_code_is_kept_and_unknown_fields_do_no_harm() -> None:
    error = error_from_wire({"code": "QuotaExceeded", "message": "too much", "limit": [1, 2]})
    assert type(error) is WsDataError
    assert (error.code, error.message) == ("QuotaExceeded", "too much")
    assert WsDataError.code == "WsDataError"
    grown = VersionMismatch(5, 4).to_wire() | {"hint": {"at": 1}}
    assert isinstance(error_from_wire(grown), VersionMismatch)


@pytest.mark.parametrize(
    ("told", "named"),
    [
        ({"message": "m"}, "code"),
        ({"code": 1, "message": "m"}, "code"),
        ({"code": "New"}, "message"),
        ({"code": "New", "message": b"m"}, "message"),
        ({"code": "WriteDataFailed", "message": "m"}, "request"),
        ({"code": "WriteDataFailed", "message": "m", "request_id": "7-42"}, "request"),
        ({"code": "BatchTransferFailed", "message": "m", "request_id": [7, 42]}, "reason"),
        ({"code": "BatchTransferError", "message": "m", "request_id": [7, 42]}, "msg"),
        ({"code": "SplitTaskFailed", "message": "m", "request_id": [7, 42], "idx": True}, "idx"),
        ({"code": "VersionMismatch", "message": "m", "expected": 1, "actual": -1}, "actual"),
        ({"code": "VersionMismatch", "message": "m", "expected": 1.0, "actual": 1}, "expected"),
    ],
)
def test_a_known_code_without_its_fields_is_refused(told: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        error_from_wire(told)


def test_texts_are_cut_at_a_character_and_made_valid() -> None:
    told = BatchTransferFailed(REQUEST, "é" * TEXT_MAX).to_wire()
    assert len(told["reason"].encode()) == TEXT_MAX
    assert set(told["reason"]) == {"é"}
    odd = BatchTransferFailed(REQUEST, "x" + "é" * TEXT_MAX).to_wire()
    assert len(odd["reason"].encode()) == TEXT_MAX - 1
    assert WriteDataFailed(REQUEST, "name \udcff").to_wire()["message"].endswith("name ?")


def test_an_error_notes_the_record_that_gave_rise_to_it() -> None:
    error = WriteDataFailed(REQUEST)
    assert error.at(3, 99) is error
    assert (error.partition, error.offset) == (3, 99)
    assert WriteDataFailed.partition is None
