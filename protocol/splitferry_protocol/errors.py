"""The errors that travel in results (WIRE, "Errors"), under one root.

Every error knows its code, its own fields as attributes, and how to become the `error`
map of a result and back. Where a record gave rise to it, `partition` and `offset` say which.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .ids import U64_MAX, RequestId

TEXT_MAX = 1024
"""Bytes of UTF-8 of each text in an `error` map."""


class WsDataError(Exception):
    """Root of all that can go wrong with a request.

    Attributes:
        code: the name in the contract.
        request_id: the request spoken of, where the error has one.
        partition: of the record that gave rise to it, where one did.
        offset: of that record.
    """

    code: str = "WsDataError"
    request_id: RequestId | None = None
    partition: int | None = None
    offset: int | None = None

    @property
    def message(self) -> str:
        """One sentence for people."""
        return str(self)

    def fields(self) -> dict[str, Any]:
        """The error's own fields as they stand in the result's `error` map."""
        return {}

    def to_wire(self) -> dict[str, Any]:
        """The `error` map of a result, its texts cut to `TEXT_MAX` bytes and made valid UTF-8.

        A message may quote a file name or another program: whatever it holds, the result that
        carries it must fit its header and be sent.
        """
        told = {"code": self.code, "message": self.message, **self.fields()}
        return {
            name: cut(value, TEXT_MAX) if type(value) is str else value
            for name, value in told.items()
        }

    def at(self, partition: int, offset: int) -> WsDataError:
        """Note the record that gave rise to the error; returns the error itself."""
        self.partition, self.offset = partition, offset
        return self


class BatchTransferFailed(WsDataError):
    """The request as a whole fails.

    Attributes:
        reason: why, for people.
    """

    code = "BatchTransferFailed"

    def __init__(self, request_id: RequestId, reason: str) -> None:
        super().__init__(f"request {request_id} failed: {reason}")
        self.request_id = request_id
        self.reason = reason

    def fields(self) -> dict[str, Any]:
        return {"request_id": list(self.request_id or ()), "reason": self.reason}


class BatchTransferNotFound(WsDataError):
    """Asked about, aborted or replayed, but not known."""

    code = "BatchTransferNotFound"

    def __init__(self, request_id: RequestId) -> None:
        super().__init__(f"request {request_id} is not known")
        self.request_id = request_id

    def fields(self) -> dict[str, Any]:
        return {"request_id": list(self.request_id or ())}


class BatchTransferError(WsDataError):
    """A readable record of the request breaks the contract.

    Attributes:
        msg: how, for people.
    """

    code = "BatchTransferError"

    def __init__(self, request_id: RequestId, msg: str) -> None:
        super().__init__(f"request {request_id}: {msg}")
        self.request_id = request_id
        self.msg = msg

    def fields(self) -> dict[str, Any]:
        return {"request_id": list(self.request_id or ()), "msg": self.msg}


class WriteDataFailed(WsDataError):
    """The target could not be written after all retries; the message says why."""

    code = "WriteDataFailed"

    def __init__(self, request_id: RequestId, cause: str = "") -> None:
        super().__init__(f"request {request_id} could not be written" + (cause and f": {cause}"))
        self.request_id = request_id

    def fields(self) -> dict[str, Any]:
        return {"request_id": list(self.request_id or ())}


class SplitTaskFailed(WsDataError):
    """One split is damaged or lies outside the item.

    Attributes:
        idx: its index.
    """

    code = "SplitTaskFailed"

    def __init__(self, request_id: RequestId, idx: int, cause: str = "") -> None:
        super().__init__(f"request {request_id}, split {idx} is bad" + (cause and f": {cause}"))
        self.request_id = request_id
        self.idx = idx

    def fields(self) -> dict[str, Any]:
        return {"request_id": list(self.request_id or ()), "idx": self.idx}


class VersionMismatch(WsDataError):
    """Splits of one request differ in version, or the target holds this version or a newer one.

    Attributes:
        expected: the first split's version, or the least that the target would take.
        actual: the version that came.
    """

    code = "VersionMismatch"

    def __init__(self, expected: int, actual: int) -> None:
        super().__init__(f"version {actual} does not fit: expected {expected}")
        self.expected = expected
        self.actual = actual

    @classmethod
    def not_newer_than(cls, held: int, actual: int) -> VersionMismatch:
        """The target already holds `held`; only a later version may replace it."""
        return cls(min(held + 1, U64_MAX), actual)

    def fields(self) -> dict[str, Any]:
        return {"expected": self.expected, "actual": self.actual}


CODES: Mapping[str, type[WsDataError]] = {
    kind.code: kind
    for kind in (
        BatchTransferFailed,
        BatchTransferNotFound,
        BatchTransferError,
        WriteDataFailed,
        SplitTaskFailed,
        VersionMismatch,
    )
}


def error_from_wire(told: Mapping[str, Any]) -> WsDataError:
    """Read the `error` map of a result; the message stays as it was sent.

    A code that this version does not know becomes a plain `WsDataError` with that code.

    Raises:
        ValueError: the code or message, or a field that the code must have, is missing or wrong.
    """
    code, message = _text(told, "code"), _text(told, "message")
    error: WsDataError
    if code not in CODES:
        error = WsDataError(message)
        error.code = code
    elif code == VersionMismatch.code:
        error = VersionMismatch(_u64(told, "expected"), _u64(told, "actual"))
    else:
        request_id = RequestId.from_wire(told.get("request_id"))
        match code:
            case BatchTransferFailed.code:
                error = BatchTransferFailed(request_id, _text(told, "reason"))
            case BatchTransferError.code:
                error = BatchTransferError(request_id, _text(told, "msg"))
            case SplitTaskFailed.code:
                error = SplitTaskFailed(request_id, _u64(told, "idx"))
            case WriteDataFailed.code:
                error = WriteDataFailed(request_id)
            case _:
                error = BatchTransferNotFound(request_id)
    error.args = (message,)
    return error


def _text(told: Mapping[str, Any], name: str) -> str:
    value = told.get(name)
    if type(value) is not str:
        raise ValueError(f"error.{name}: not a string")
    return value


def _u64(told: Mapping[str, Any], name: str) -> int:
    value = told.get(name)
    if type(value) is not int or not 0 <= value <= U64_MAX:
        raise ValueError(f"error.{name}: not an integer from 0 to {U64_MAX}")
    return value


def cut(text: str, most: int) -> str:
    """As much of it as fits `most` bytes of UTF-8; what that cannot tell becomes `?`."""
    return text.encode("utf-8", "replace")[:most].decode("utf-8", "ignore")
