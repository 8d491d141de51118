"""Records to bytes and back (WIRE, "Values"). No I/O, and payloads are never copied on the way in.

The way of a value: `read_header` finds the header's end and unpacks it, `_tie` says which
request it speaks for, and one small function per kind builds the record, which `check` then
holds against the contract.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from itertools import chain
from typing import Any, TypeVar

import google_crc32c
import msgpack

from .errors import BatchTransferError, SplitTaskFailed, WsDataError, error_from_wire
from .ids import U64_MAX, RequestId
from .records import (
    CRC_HEADER,
    HEADER_MAX,
    NESTING_MAX,
    VERSION,
    Abort,
    Accepted,
    Block,
    Input,
    Result,
    Split,
    Status,
)
from .validation import TARGETS, check

__all__ = [
    "InvalidRecord",
    "NewerVersion",
    "crc_header",
    "decode_outcome",
    "decode_record",
    "encode_abort",
    "encode_accepted",
    "encode_result",
    "encode_split",
    "read_header",
]

_Header = dict[str, Any]
T = TypeVar("T", bound=Split | Abort | Result | Accepted)
M = TypeVar("M", bound=StrEnum)
R = TypeVar("R")


class InvalidRecord(Exception):
    """A record that breaks the contract: the one exception that decoding raises.

    Attributes:
        message: the cause, for people.
        request: the request that the record speaks for, set only when it can be tied to one:
            the key is valid, and the header is readable, of this version, of a known kind, and
            names the same request.
        index: the split's index, when it is readable and the record is tied.
        damaged: the CRC does not fit the value.
    """

    def __init__(
        self,
        message: str,
        request: RequestId | None = None,
        index: int | None = None,
        damaged: bool = False,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.request = request
        self.index = index
        self.damaged = damaged

    @property
    def code(self) -> str:
        """The error's name in the contract, also for a record that is tied to no request."""
        split_damaged = self.damaged and self.index is not None
        return (SplitTaskFailed if split_damaged else BatchTransferError).code

    def error(self) -> WsDataError:
        """What becomes of the request.

        An untied record has no request to name: it gives a plain error with the same code.
        """
        if self.request is None:
            untied = WsDataError(self.message)
            untied.code = self.code
            return untied
        if self.damaged and self.index is not None:
            return SplitTaskFailed(self.request, self.index, self.message)
        return BatchTransferError(self.request, self.message)


class NewerVersion(InvalidRecord):
    """A record of a later version of the contract: what it says is not known here."""


def encode_split(split: Split) -> bytes:
    """The value of a split record: header and payload.

    Raises:
        ValueError: a field is not allowed, which the message names, or the header has more than
            8 KiB.
    """
    check(split)
    header = _begin("split", split.request) | _item(split)
    header |= {"index": split.index, "offset": split.offset, "total": split.total}
    header |= {
        name: value
        for name, value in (("sha256", split.sha256), ("reply", split.reply))
        if value is not None
    }
    return b"".join((_pack(header), _bin_head(len(split.payload)), split.payload))


def encode_abort(abort: Abort) -> bytes:
    """The value of an abort record. Raises ValueError as `encode_split` does."""
    check(abort)
    return _pack(_begin("abort", abort.request) | {"reason": abort.reason})


def encode_result(result: Result) -> bytes:
    """The value of a result. Raises ValueError as `encode_split` does.

    Texts of the error are cut to their limit, so that no error is too long to be told.
    """
    check(result)
    return _pack(
        _begin("result", result.request)
        | _item(result)
        | {
            "group": result.group,
            "status": result.status.value,
            "success": result.success,
            "error": result.error and result.error.to_wire(),
            "size": result.size,
            "sha256": result.sha256,
            "target": result.target and dict(result.target),
            "splits": result.splits,
            "duplicates": result.duplicates,
            "input": list(result.input),
            "reply": result.reply,
            "repeat": result.repeat,
            "finished_at": result.finished_at,
        }
    )


def encode_accepted(accepted: Accepted) -> bytes:
    """The value of an accepted event. Raises ValueError as `encode_split` does."""
    check(accepted)
    told = {"group": accepted.group, "index": accepted.index, "reply": accepted.reply}
    return _pack(_begin("accepted", accepted.request) | told)


def crc_header(value: bytes) -> tuple[str, bytes]:
    """The Kafka record header that every record on the splits topic carries: its name, and the
    CRC-32C of the whole value as 4 bytes, big-endian."""
    crc: int = google_crc32c.value(value)
    return CRC_HEADER, crc.to_bytes(4, "big")


def decode_record(
    key: bytes | None, value: bytes | None, headers: Sequence[tuple[str, bytes]]
) -> Split | Abort:
    """Read a record of the splits topic; the split's payload is a view into `value`.

    Args:
        key: the record's key; None where it has none.
        value: its value; None where it has none.
        headers: the record's own, as names and bytes; `crc32c` is among them.

    Raises:
        InvalidRecord: the record breaks the contract, whatever its bytes are.
    """
    if value is None:
        raise InvalidRecord("the record has no value")
    problem, damaged = _check_crc(value, headers)
    return _decode(key, value, _SPLITS_TOPIC, problem, damaged)


def decode_outcome(key: bytes | None, value: bytes | None) -> Result | Accepted:
    """Read a record of the results topic. Raises InvalidRecord as `decode_record` does."""
    if value is None:
        raise InvalidRecord("the record has no value")
    return _decode(key, value, _RESULTS_TOPIC)


def _begin(kind: str, request: RequestId) -> dict[str, Any]:
    return {"v": VERSION, "kind": kind, "request": list(request)}


def _item(record: Split | Result) -> dict[str, Any]:
    item: dict[str, Any] = {
        "unique_id": record.unique_id,
        "version": record.version,
        "block": record.block.value,
    }
    return item if record.labels is None else item | {"labels": dict(record.labels)}


def _pack(header: Mapping[str, Any]) -> bytes:
    packed: bytes = msgpack.packb(header)
    if len(packed) > HEADER_MAX:
        raise ValueError(f"header: {len(packed)} bytes, the limit is {HEADER_MAX}")
    return packed


def _bin_head(size: int) -> bytes:
    """What msgpack puts before binary of `size` bytes, in its shortest form."""
    lead, width = next(form for form in _BIN_FORMS.items() if size < 256 ** form[1])
    return bytes((lead,)) + size.to_bytes(width, "big")


_BIN_FORMS = {0xC4: 1, 0xC5: 2, 0xC6: 4}
"""First byte of a msgpack `bin`, and the width of the length after it, in bytes."""


def _check_crc(value: bytes, headers: Sequence[tuple[str, Any]]) -> tuple[str | None, bool]:
    """What is wrong with the checksum, if anything, and whether that means damage."""
    told = [content for name, content in headers if name == CRC_HEADER]
    if len(told) != 1 or not isinstance(told[0], bytes) or len(told[0]) != 4:
        return f"the record needs exactly one {CRC_HEADER} header of 4 bytes", False
    computed = crc_header(value)[1]
    if computed == told[0]:
        return None, False
    return f"damaged: the CRC-32C is {computed.hex()}, the sender's {told[0].hex()}", True


def _decode(
    key: bytes | None,
    value: bytes,
    kinds: Mapping[str, Callable[[RequestId, _Header, memoryview], T]],
    problem: str | None = None,
    damaged: bool = False,
) -> T:
    """Read and check one record. A `problem` known before still lets it be tied to its request."""
    request = index = None
    try:
        header, end = read_header(value)
        request, kind = _tie(key, header, kinds)
        if kind == "split" and type(given := header.get("index")) is int and 0 <= given <= U64_MAX:
            index = given
        if problem is None:
            record = kinds[kind](request, header, memoryview(value)[end:])
            check(record)
            return record
    except NewerVersion:
        if problem is None:
            raise
    except KeyError as missing:
        problem = problem or f"the header has no {missing}"
    except ValueError as cause:
        problem = problem or str(cause)
    raise InvalidRecord(problem, request, index, damaged)


def read_header(value: bytes) -> tuple[_Header, int]:
    """Unpack a value's header, whatever it says, and find its end in bytes.

    Raises:
        ValueError: it is not one map within the rules for headers.
    """
    unpacker = msgpack.Unpacker(max_buffer_size=HEADER_MAX)
    unpacker.feed(value[:HEADER_MAX])
    try:
        # Skipping builds nothing. It proves that every length announced is really there, and so
        # bounds what unpacking can cost: arrays nested a thousand deep that announce thousands
        # of elements each would otherwise be allocated in full before the first is missed.
        unpacker.skip()
        end: int = unpacker.tell()
        header = msgpack.unpackb(value[:end], object_pairs_hook=_map, strict_map_key=True)
    except msgpack.OutOfData:
        cause = "longer than 8 KiB" if len(value) > HEADER_MAX else "cut short"
        raise ValueError(f"the header is {cause}") from None
    except msgpack.StackError:
        raise ValueError(_TOO_DEEP) from None
    except msgpack.FormatError:
        raise ValueError("the header is not msgpack") from None
    except ValueError as cause:
        raise ValueError(f"the header cannot be read: {cause}") from None
    if type(header) is not dict:
        raise ValueError("the header is not a map")
    if _deeper_than(NESTING_MAX, header):
        raise ValueError(_TOO_DEEP)
    return header, end


_TOO_DEEP = f"the header is nested deeper than {NESTING_MAX}"


def _map(pairs: list[tuple[Any, Any]]) -> _Header:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("duplicate key")
    if not set(map(type, made)) <= {str}:
        raise ValueError("a key is not a string")
    return made


def _deeper_than(levels: int, container: Any) -> bool:
    if levels == 0:
        return True
    for inner in container.values() if type(container) is dict else container:
        kind = type(inner)
        if (kind is dict or kind is list) and _deeper_than(levels - 1, inner):
            return True
    return False


def _tie(key: bytes | None, header: _Header, kinds: Mapping[str, Any]) -> tuple[RequestId, str]:
    """Whom the record speaks for, and its kind. Raises ValueError or KeyError if nobody."""
    version = header["v"]
    if type(version) is not int or version != VERSION:
        RequestId.from_key(key)  # Without a valid key it is foreign, whatever version it claims.
        unknown = f"v: {reprlib.repr(version)} is not a version known here ({VERSION})"
        later = type(version) is int and version > VERSION
        raise NewerVersion(unknown) if later else ValueError(unknown)
    kind = header["kind"]  # Only now: a later version may do without.
    if type(kind) is not str or kind not in kinds:
        raise ValueError(f"kind: {reprlib.repr(kind)} does not belong on this topic")
    request = RequestId.from_wire(header["request"])
    if key != request.key:  # Only then it has to be read: an id has one form as a key.
        raise ValueError(f"request: the header names {request}, the key {RequestId.from_key(key)}")
    return request, kind


def _split(request: RequestId, header: _Header, rest: memoryview) -> Split:
    return Split(
        request,
        **_read_item(header),
        index=header["index"],
        offset=header["offset"],
        total=header["total"],
        payload=_payload(rest),
        sha256=_optional(header, "sha256"),
        reply=_optional(header, "reply"),
    )


def _payload(rest: memoryview) -> memoryview:
    """The content of the msgpack `bin` that fills `rest`, not copied."""
    width = _BIN_FORMS.get(rest[0]) if rest else None
    if width is None:
        raise ValueError("payload: no msgpack bin follows the header")
    size, content = int.from_bytes(rest[1 : 1 + width], "big"), rest[1 + width :]
    if len(rest) <= width or size > len(content):
        raise ValueError("payload: cut short")
    if size < len(content):
        raise ValueError(_TRAILING)
    return content


_TRAILING = "bytes follow the last object of the value"


def _abort(request: RequestId, header: _Header, rest: memoryview) -> Abort:
    _nothing_more(rest)
    return Abort(request, header["reason"])


def _result(request: RequestId, header: _Header, rest: memoryview) -> Result:
    _nothing_more(rest)
    result = Result(
        request,
        **_read_item(header),
        group=header["group"],
        status=_member(_STATUSES, header, "status"),
        error=_nil_or_map(header, "error", error_from_wire),
        size=header["size"],
        sha256=header["sha256"],
        target=_nil_or_map(header, "target", _target),
        splits=header["splits"],
        duplicates=header["duplicates"],
        input=_input(header["input"]),
        reply=header["reply"],
        repeat=header["repeat"],
        finished_at=header["finished_at"],
    )
    if header["success"] is not result.success:
        raise ValueError("success: not a boolean that agrees with the status")
    return result


def _accepted(request: RequestId, header: _Header, rest: memoryview) -> Accepted:
    _nothing_more(rest)
    return Accepted(request, header["group"], header["index"], header["reply"])


_SPLITS_TOPIC: Mapping[str, Callable[[RequestId, _Header, memoryview], Split | Abort]] = {
    "split": _split,
    "abort": _abort,
}
_RESULTS_TOPIC: Mapping[str, Callable[[RequestId, _Header, memoryview], Result | Accepted]] = {
    "result": _result,
    "accepted": _accepted,
}


def _nothing_more(rest: memoryview) -> None:
    if rest:
        raise ValueError(_TRAILING)


def _read_item(header: _Header) -> dict[str, Any]:
    return {
        "unique_id": header["unique_id"],
        "version": header["version"],
        "block": _member(_BLOCKS, header, "block"),
        "labels": _optional(header, "labels"),
    }


def _optional(header: _Header, name: str) -> Any:
    """A key that may be left out; nil does not stand for leaving it out."""
    if name in header and header[name] is None:
        raise ValueError(f"{name}: nil; leave the key out instead")
    return header.get(name)


def _member(members: Mapping[str, M], header: _Header, name: str) -> M:
    value = header[name]
    member = members.get(value) if type(value) is str else None
    if member is None:
        raise ValueError(f"{name}: {reprlib.repr(value)} is not in the contract")
    return member


_BLOCKS = {block.value: block for block in Block}
_STATUSES = {status.value: status for status in Status}
"""Asked for a value, an enumeration takes three times as long as a map."""


def _nil_or_map(header: _Header, name: str, read: Callable[[_Header], R]) -> R | None:
    value = header[name]
    if value is None:
        return None
    if type(value) is not dict:
        raise ValueError(f"{name}: neither nil nor a map")
    return read(value)


def _target(told: _Header) -> _Header:
    """Known keys only: a target map may grow."""
    return {name: value for name, value in told.items() if name in _TARGET_KEYS}


_TARGET_KEYS = frozenset(chain(*TARGETS))


def _input(told: Any) -> Input:
    if type(told) is not list or len(told) != len(Input._fields):
        raise ValueError("input: not [topic, partition, first offset, last offset]")
    return Input(*told)
