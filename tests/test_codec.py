from __future__ import annotations

import re
import tracemalloc
from collections.abc import Callable
from typing import Any

import msgpack
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from splitferry_protocol.codec import (
    InvalidRecord,
    NewerVersion,
    crc_header,
    decode_outcome,
    decode_record,
    encode_abort,
    encode_accepted,
    encode_result,
    encode_split,
)
from splitferry_protocol.errors import (
    BatchTransferError,
    BatchTransferFailed,
    BatchTransferNotFound,
    SplitTaskFailed,
    VersionMismatch,
    WriteDataFailed,
    WsDataError,
)
from splitferry_protocol.ids import U32_MAX, U64_MAX, RequestId
from splitferry_protocol.records import (
    GROUP_MAX,
    HEADER_MAX,
    NESTING_MAX,
    PAYLOAD_MAX,
    REASON_MAX,
    REPLY_MAX,
    TARGET_MAX,
    TOPIC_MAX,
    UNIQUE_ID_MAX,
    Abort,
    Accepted,
    Block,
    Input,
    Result,
    Split,
    Status,
)

REQUEST = RequestId(7, 42)
SPLIT = Split(REQUEST, "a", 1, Block.FILE, 2, 3, None, b"\x00\xff")
ABORT = Abort(REQUEST, "enough")
ACCEPTED = Accepted(REQUEST, "g", 1, b"\x09")
RESULT = Result(
    request=REQUEST,
    unique_id="a",
    version=1,
    block=Block.FILE,
    labels=None,
    group="g",
    status=Status.COMPLETED,
    error=None,
    size=2,
    sha256=bytes(32),
    target={"path": "a"},
    splits=1,
    duplicates=0,
    input=Input("t", 0, 5, 5),
    reply=None,
    repeat=False,
    finished_at=1,
)

LARGEST_ID = RequestId(U32_MAX, U64_MAX)
LABELS_FULL = {f"{number:02}": "x" * 126 for number in range(16)}

Record = Split | Abort | Result | Accepted


def encode(record: Record) -> bytes:
    match record:
        case Split():
            return encode_split(record)
        case Abort():
            return encode_abort(record)
        case Result():
            return encode_result(record)
        case Accepted():
            return encode_accepted(record)


def decode(value: bytes, kind: type[Record], key: bytes = REQUEST.key) -> Record:
    if kind in (Split, Abort):
        return decode_record(key, value, [crc_header(value)])
    return decode_outcome(key, value)


def there_and_back(record: Record) -> Record:
    return decode(encode(record), type(record), record.request.key)


# --- Strategies


def texts(minimum: int, maximum: int) -> st.SearchStrategy[str]:
    characters = st.characters(codec="utf-8")
    short = st.text(characters, min_size=minimum, max_size=20)
    return short.filter(lambda text: len(text.encode()) <= maximum) | st.just("x" * maximum)


u32 = st.sampled_from([0, U32_MAX]) | st.integers(0, U32_MAX)
u64 = st.sampled_from([0, 127, 128, 2**32, 2**63, U64_MAX]) | st.integers(0, U64_MAX)
requests = st.builds(RequestId, u32, u64)
digests = st.binary(min_size=32, max_size=32)
replies = st.binary(min_size=1, max_size=256)
labels = st.none() | st.dictionaries(texts(0, 60), texts(0, 60), max_size=16)
items = {
    "request": requests,
    "unique_id": texts(1, UNIQUE_ID_MAX),
    "version": u64,
    "block": st.sampled_from(Block),
    "labels": labels,
}
splits = st.builds(
    Split,
    **items,
    index=u64,
    offset=st.integers(0, U64_MAX - 300),
    total=st.none() | u64,
    payload=st.binary(max_size=300),
    sha256=st.none() | digests,
    reply=st.none() | replies,
)
aborts = st.builds(Abort, request=requests, reason=texts(0, REASON_MAX))
accepteds = st.builds(
    Accepted, request=requests, group=texts(1, GROUP_MAX), index=u64, reply=replies
)
errors: st.SearchStrategy[WsDataError] = (
    st.builds(BatchTransferFailed, requests, texts(0, 900))
    | st.builds(BatchTransferNotFound, requests)
    | st.builds(BatchTransferError, requests, texts(0, 900))
    | st.builds(WriteDataFailed, requests, texts(0, 900))
    | st.builds(SplitTaskFailed, requests, u64, texts(0, 900))
    | st.builds(VersionMismatch, u64, u64)
)
targets = st.builds(lambda path: {"path": path}, texts(1, TARGET_MAX)) | st.builds(
    lambda shm, host: {"shm": shm, "host": host}, texts(1, TARGET_MAX), texts(1, TARGET_MAX)
)


@st.composite
def results(draw: st.DrawFn) -> Result:
    status = draw(st.sampled_from(Status))
    first, last = sorted((draw(u64), draw(u64)))
    return Result(
        **{name: draw(strategy) for name, strategy in items.items()},
        group=draw(texts(1, GROUP_MAX)),
        status=status,
        error=None if status is Status.COMPLETED else draw(errors),
        size=draw(st.none() | u64),
        sha256=draw(st.none() | digests),
        target=draw(st.none() | targets),
        splits=draw(u64),
        duplicates=draw(u64),
        input=Input(draw(texts(1, TOPIC_MAX)), draw(u32), first, last),
        reply=draw(st.none() | replies),
        repeat=draw(st.booleans()),
        finished_at=draw(u64),
    )


records: st.SearchStrategy[Record] = splits | aborts | results() | accepteds


# --- There and back


@settings(deadline=None)
@given(splits | aborts | accepteds)
def test_splits_aborts_and_accepted_events_come_back_as_they_went(record: Record) -> None:
    assert there_and_back(record) == record


@settings(deadline=None)
@given(results())
def test_results_come_back_as_they_went(result: Result) -> None:
    back = there_and_back(result)
    assert isinstance(back, Result)
    assert back._replace(error=None) == result._replace(error=None)
    assert type(back.error) is type(result.error)
    if back.error is not None and result.error is not None:
        assert back.error.to_wire() == result.error.to_wire()


def test_the_bytes_are_the_ones_written_out_by_hand() -> None:
    start = "a17601 a46b696e64"
    request = "a772657175657374 92072a"
    assert encode_abort(ABORT) == bytes.fromhex(
        f"84 {start} a561626f7274 {request} a6726561736f6e a6656e6f756768"
    )
    assert encode_split(SPLIT) == bytes.fromhex(
        f"89 {start} a573706c6974 {request} a9756e697175655f6964 a161 a776657273696f6e 01"
        "a5626c6f636b a466696c65 a5696e646578 02 a66f6666736574 03 a5746f74616c c0 c40200ff"
    )


@pytest.mark.parametrize("size", [0, 1, 255, 256, 65535, 65536, PAYLOAD_MAX])
def test_a_payload_of_any_size_is_a_view_into_the_value(size: int) -> None:
    value = encode_split(SPLIT._replace(payload=bytes(size)))
    headers = [crc_header(value)]
    tracemalloc.start()
    split = decode_record(REQUEST.key, value, headers)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert isinstance(split, Split)
    assert isinstance(split.payload, memoryview)
    assert split.payload.obj is value
    assert len(split.payload) == size
    assert peak < 64 * 1024


def test_a_payload_may_be_any_flat_view_of_bytes() -> None:
    for payload in (memoryview(b"abcd")[1:3], memoryview(bytearray(b"bc"))):
        split = there_and_back(SPLIT._replace(payload=payload))
        assert isinstance(split, Split)
        assert split.payload == b"bc"


def test_the_largest_result_fits_its_header() -> None:
    largest = RESULT._replace(
        request=LARGEST_ID,
        unique_id="u" * UNIQUE_ID_MAX,
        version=U64_MAX,
        labels=LABELS_FULL,
        group="g" * GROUP_MAX,
        status=Status.FAILED,
        error=BatchTransferFailed(LARGEST_ID, "é" * HEADER_MAX),
        size=U64_MAX,
        target={"shm": "s" * TARGET_MAX, "host": "h" * TARGET_MAX},
        splits=U64_MAX,
        duplicates=U64_MAX,
        input=Input("t" * TOPIC_MAX, U32_MAX, U64_MAX, U64_MAX),
        reply=bytes(256),
        finished_at=U64_MAX,
    )
    assert there_and_back(largest).request == largest.request


# --- Whatever comes in


CRC = st.sampled_from(["right", "wrong", "none", "short"])


def refused_or_read(key: bytes | None, value: bytes | None, crc: str) -> None:
    """Decoding as either topic may raise InvalidRecord, and nothing else."""
    headers = {
        "right": [crc_header(value or b"")],
        "wrong": [("crc32c", b"\x00\x01\x02\x03")],
        "none": [],
        "short": [("crc32c", b"\x00")],
    }[crc]
    reads: list[Callable[[], Record]] = [
        lambda: decode_record(key, value, headers),
        lambda: decode_outcome(key, value),
    ]
    for read in reads:
        try:
            told: Record | InvalidRecord = read()
        except InvalidRecord as error:
            told = error
        if isinstance(told, InvalidRecord):
            assert told.message
            assert told.error().code == told.code
            assert told.request is not None or told.index is None
        else:
            assert told.request.key == key


@settings(deadline=None, max_examples=300)
@given(st.none() | st.binary(max_size=30), st.none() | st.binary(max_size=200), CRC)
@example(None, None, "none")
@example(REQUEST.key, b"\x81\xc7\x0d\xff" + b"\xff" * 13 + b"\xc0", "right")  # a bad timestamp
def test_any_bytes_are_read_or_refused(key: bytes | None, value: bytes | None, crc: str) -> None:
    refused_or_read(key, value, crc)


msgpack_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), U64_MAX)
    | st.floats()
    | st.text(st.characters(codec="utf-8"), max_size=10)
    | st.binary(max_size=10)
    | st.builds(msgpack.ExtType, st.integers(0, 127), st.binary(max_size=13)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("abc"), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None, max_examples=300)
@given(records, st.data())
def test_a_valid_header_with_other_values_is_read_or_refused(
    record: Record, data: st.DataObject
) -> None:
    unpacker = msgpack.Unpacker()
    unpacker.feed(encode(record))
    header = unpacker.unpack()
    name = data.draw(st.sampled_from([*header, "unknown"]))
    header[name] = data.draw(msgpack_values)
    rest = b"\xc4\x01x" if isinstance(record, Split) else b""
    refused_or_read(record.request.key, msgpack.packb(header) + rest, "right")


@settings(deadline=None, max_examples=300)
@given(records, st.data(), CRC)
def test_mutated_bytes_are_read_or_refused(record: Record, data: st.DataObject, crc: str) -> None:
    value = bytearray(encode(record))
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(value)))
        stop = data.draw(st.integers(start, min(start + 4, len(value))))
        value[start:stop] = data.draw(st.binary(max_size=4))
    refused_or_read(record.request.key, bytes(value), crc)


@pytest.mark.parametrize(
    "hostile",
    [
        b"\x91" * HEADER_MAX,
        b"\xdc\x20\x00" * 3000,
        b"\xdd\xff\xff\xff\xff" * 2000,
        b"\xdf\xff\xff\xff\xff" * 2000,
        b"\x81\xa1a" * 3000,
        b"\x81\xa1a" + b"\x91" * 500 + b"\xc0",
        b"\x81\xc6\xff\xff\xff\xff",
        b"\x81\xdb\xff\xff\xff\xff",
        b"\x81\xa1a\xdc\x1f\x00" + b"\xc0" * 0x1F00,
    ],
    ids=lambda hostile: hostile[:6].hex(),
)
def test_hostile_headers_cost_little(hostile: bytes) -> None:
    def read() -> None:
        with pytest.raises(InvalidRecord):
            decode_outcome(REQUEST.key, hostile)

    read()
    tracemalloc.start()
    read()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # What is built is bounded by the 8 KiB that are there, not by what they announce.
    assert peak < 512 * 1024


# --- Values made by hand: other facts than a writer would send


HEADERS: dict[str, dict[str, Any]] = {
    "split": {
        "v": 1, "kind": "split", "request": [7, 42], "unique_id": "a", "version": 1,
        "block": "file", "index": 2, "offset": 3, "total": None,
    },
    "abort": {"v": 1, "kind": "abort", "request": [7, 42], "reason": "enough"},
    "result": {
        "v": 1, "kind": "result", "request": [7, 42], "unique_id": "a", "version": 1,
        "block": "file", "group": "g", "status": "completed", "success": True, "error": None,
        "size": 2, "sha256": bytes(32), "target": {"path": "a"}, "splits": 1, "duplicates": 0,
        "input": ["t", 0, 5, 5], "reply": None, "repeat": False, "finished_at": 1,
    },
    "accepted": {
        "v": 1, "kind": "accepted", "request": [7, 42], "group": "g", "index": 1, "reply": b"r",
    },
}  # fmt: skip


def like(sound: str, behind: bytes = b"", /, **facts: Any) -> bytes:
    """A sound value but for some facts of its header (Ellipsis takes a key away), and what is
    behind the header."""
    header = {name: fact for name, fact in {**HEADERS[sound], **facts}.items() if fact is not ...}
    return bytes(msgpack.packb(header)) + behind


def a_split(payload: bytes = b"\xc4\x01x", /, **facts: Any) -> bytes:
    return like("split", payload, **facts)


# --- Whom a refused record speaks for


def refusal(value: bytes, crc: bytes, key: bytes | None = REQUEST.key) -> InvalidRecord:
    with pytest.raises(InvalidRecord) as refused:
        decode_record(key, value, [("crc32c", crc)])
    return refused.value


def test_a_damaged_split_fails_its_request_with_its_index() -> None:
    value = encode_split(SPLIT)
    error = refusal(value[:-1] + b"\xfe", crc_header(value)[1])
    assert (error.request, error.index, error.damaged) == (REQUEST, SPLIT.index, True)
    told = error.error()
    assert isinstance(told, SplitTaskFailed)
    assert (told.request_id, told.idx) == (REQUEST, SPLIT.index)
    assert "CRC" in told.message


def test_a_damaged_abort_has_no_index_to_name() -> None:
    error = refusal(encode_abort(ABORT), bytes(4))
    assert (error.request, error.index, error.damaged) == (REQUEST, None, True)
    assert isinstance(error.error(), BatchTransferError)


def test_damage_is_the_cause_named_when_it_broke_a_field_too() -> None:
    value = encode_split(SPLIT)
    broken = value.replace(b"\xa4file", b"\xa4fils")
    assert "CRC" in refusal(broken, crc_header(value)[1]).message
    assert refusal(broken, crc_header(broken)[1]).message.startswith("block: ")
    unreadable = refusal(b"\xc1" + value[1:], crc_header(value)[1])
    assert "CRC" in unreadable.message
    assert unreadable.request is None


def test_a_record_of_a_newer_version_is_never_tied() -> None:
    value = encode_split(SPLIT).replace(b"\xa1v\x01", b"\xa1v\x02")
    error = refusal(value, crc_header(value)[1])
    assert error.request is None
    assert error.code == "BatchTransferError"
    assert type(error.error()) is WsDataError


@pytest.mark.parametrize(
    "header", [{"v": 2}, {"v": 2, "kind": "result", "request": None}], ids=["alone", "with others"]
)
def test_a_later_version_is_known_by_its_v_alone(header: dict[str, Any]) -> None:
    with pytest.raises(NewerVersion):
        decode_outcome(REQUEST.key, msgpack.packb(header))


def test_an_index_of_an_abort_is_an_unknown_key() -> None:
    header = {"v": 1, "kind": "abort", "request": [7, 42], "reason": "x", "index": 5}
    error = refusal(msgpack.packb(header), bytes(4))
    assert (error.request, error.index) == (REQUEST, None)


@pytest.mark.parametrize(
    ("index", "named"), [(0, 0), (U64_MAX, U64_MAX), (-1, None), (True, None), ("2", None)]
)
def test_a_damaged_split_names_its_index_only_where_that_is_one(
    index: object, named: int | None
) -> None:
    error = refusal(a_split(index=index), bytes(4))
    assert (error.request, error.index, error.damaged) == (REQUEST, named, True)


def test_an_error_of_a_tied_record_names_the_request_and_the_cause() -> None:
    error = refusal(encode_abort(ABORT), bytes(4))
    told = error.error()
    assert isinstance(told, BatchTransferError)
    assert (told.request_id, told.msg) == (REQUEST, error.message) == (REQUEST, str(error))


def test_an_error_of_an_untied_record_names_the_cause_alone() -> None:
    with pytest.raises(InvalidRecord) as refused:
        decode_record(None, None, [])
    assert not refused.value.damaged
    told = refused.value.error()
    assert (told.request_id, told.message) == (None, refused.value.message)


def test_only_a_later_version_with_a_valid_key_is_a_newer_one() -> None:
    def kind(version: object, key: bytes | None = REQUEST.key) -> type[InvalidRecord]:
        value = a_split(v=version)
        return type(refusal(value, crc_header(value)[1], key))

    assert kind(2) is kind(U64_MAX) is NewerVersion
    for never in (0, -1, True, 2.0, "2", None):
        assert kind(never) is InvalidRecord
    for foreign in (None, b"7"):
        assert kind(2, foreign) is InvalidRecord


def test_a_damaged_record_is_no_newer_version_whatever_it_claims() -> None:
    error = refusal(a_split(v=2), bytes(4))
    assert type(error) is InvalidRecord
    assert (error.request, error.index, error.damaged) == (None, None, True)


# --- What a refused record is told by: the dead letter and the failed request's result carry
# these words, and whoever writes a client has nothing else to find the fault by.


FULL = b"\x81\xa1a\xc5\xff\xff".ljust(HEADER_MAX, b"x")
"""A value as long as a header may be, of which more is announced."""
INPUT_FORM = "input: not [topic, partition, first offset, last offset]"
U64 = f"is not from 0 to {U64_MAX}"


REFUSED_ON_SPLITS_TOPIC: list[tuple[bytes | None, str]] = [
    (None, "the record has no value"),
    (b"", "the header is cut short"),
    (FULL, "the header is cut short"),
    (FULL + b"x", "the header is longer than 8 KiB"),
    (b"\xc1", "the header is not msgpack"),
    (b"\x90", "the header is not a map"),
    (b"\x82\xa1a\x01\xa1a\x02", "the header cannot be read: duplicate key"),
    (b"\x81\xc4\x01a\x01", "the header cannot be read: a key is not a string"),
    (b"\x81\xa1a" * NESTING_MAX + b"\x80", "the header is nested deeper than 4"),
    (b"\x81\xa1a" + b"\x91" * 1100 + b"\xc0", "the header is nested deeper than 4"),
    (a_split(v=2), "v: 2 is not a version known here (1)"),
    (a_split(v="1"), "v: '1' is not a version known here (1)"),
    (a_split(v=...), "the header has no 'v'"),
    (a_split(kind="Split"), "kind: 'Split' does not belong on this topic"),
    (like("accepted"), "kind: 'accepted' does not belong on this topic"),
    (a_split(request=[7]), "request: not [node id: u32, sequence: u64]"),
    (a_split(request=[7, 43]), "request: the header names 7-43, the key 7-42"),
    (a_split(index=...), "the header has no 'index'"),
    (a_split(unique_id=1), "unique_id: not a string"),
    (a_split(unique_id=""), "unique_id: 0 bytes, allowed are 1 to 512"),
    (a_split(version=1.0), "version: not an integer"),
    (a_split(version=-1), f"version: -1 {U64}"),
    (a_split(block="FILE"), "block: 'FILE' is not in the contract"),
    (a_split(block=[]), "block: [] is not in the contract"),
    (a_split(sha256="x"), "sha256: not binary"),
    (a_split(sha256=b"x"), "sha256: 1 bytes, allowed are 32 to 32"),
    (a_split(reply=None), "reply: nil; leave the key out instead"),
    (a_split(labels=[]), "labels: not a map of at most 16 pairs"),
    (a_split(labels={"a": "x" * 2048}), "labels: 2049 bytes, the limit is 2048"),
    (a_split(b""), "payload: no msgpack bin follows the header"),
    (a_split(b"\xa1x"), "payload: no msgpack bin follows the header"),
    (a_split(b"\xc4"), "payload: cut short"),
    (a_split(b"\xc4\x02x"), "payload: cut short"),
    (a_split(b"\xc4\x01xx"), "bytes follow the last object of the value"),
    (a_split(offset=U64_MAX), "offset: the payload ends beyond the largest u64"),
    (like("abort", b"\xc0"), "bytes follow the last object of the value"),
    (like("abort", reason="x" * 1025), "reason: 1025 bytes, allowed are 0 to 1024"),
]


@pytest.mark.parametrize(
    ("value", "words"), REFUSED_ON_SPLITS_TOPIC, ids=[words for _, words in REFUSED_ON_SPLITS_TOPIC]
)
def test_a_refused_record_of_the_splits_topic_is_told_its_cause(
    value: bytes | None, words: str
) -> None:
    with pytest.raises(InvalidRecord) as refused:
        decode_record(REQUEST.key, value, [crc_header(value or b"")])
    assert refused.value.message == words


REFUSED_ON_RESULTS_TOPIC: list[tuple[bytes | None, str]] = [
    (None, "the record has no value"),
    (a_split(), "kind: 'split' does not belong on this topic"),
    (like("accepted", b"\xc0"), "bytes follow the last object of the value"),
    (like("result", b"\xc0"), "bytes follow the last object of the value"),
    (like("result", reply=...), "the header has no 'reply'"),
    (like("result", status="done"), "status: 'done' is not in the contract"),
    (like("result", success=1), "success: not a boolean that agrees with the status"),
    (like("result", success=False), "success: not a boolean that agrees with the status"),
    (like("result", error={}), "error.code: not a string"),
    (like("result", error=[]), "error: neither nil nor a map"),
    (
        like("result", error={"code": "x", "message": "y"}),
        "error: given exactly when the status is not completed",
    ),
    (like("result", target="a"), "target: neither nil nor a map"),
    (like("result", target={"shm": "a"}), "target: holds neither path nor shm with host"),
    (like("result", target={"path": 1}), "target.path: not a string"),
    (like("result", input={}), INPUT_FORM),
    (like("result", input=["t", 0, 5]), INPUT_FORM),
    (like("result", input=["t", 0, 5, 5, 5]), INPUT_FORM),
    (like("result", input=["t", -1, 5, 5]), f"input.partition: -1 is not from 0 to {U32_MAX}"),
    (like("result", input=["t", 0, 6, 5]), "input.first: 6 is not from 0 to 5"),
    (like("result", input=["t", 0, 5, -1]), f"input.last: -1 {U64}"),
    (like("result", repeat=0), "repeat: not a boolean"),
]


@pytest.mark.parametrize(
    ("value", "words"),
    REFUSED_ON_RESULTS_TOPIC,
    ids=[words for _, words in REFUSED_ON_RESULTS_TOPIC],
)
def test_a_refused_record_of_the_results_topic_is_told_its_cause(
    value: bytes | None, words: str
) -> None:
    with pytest.raises(InvalidRecord) as refused:
        decode_outcome(REQUEST.key, value)
    assert refused.value.message == words


def test_a_missing_checksum_is_told_with_its_form_and_a_wrong_one_with_both_sums() -> None:
    value = like("abort")
    with pytest.raises(InvalidRecord) as missing:
        decode_record(REQUEST.key, value, [])
    assert missing.value.message == "the record needs exactly one crc32c header of 4 bytes"
    computed = crc_header(value)[1].hex()
    words = f"damaged: the CRC-32C is {computed}, the sender's 01020304"
    assert refusal(value, b"\1\2\3\4").message == words


# --- A producer cannot send what a consumer refuses


WRONG_SPLITS: list[tuple[str, Any]] = [
    ("request", RequestId(-1, 0)),
    ("request", RequestId(U32_MAX + 1, 0)),
    ("request", RequestId(0, U64_MAX + 1)),
    ("request", RequestId(True, 0)),
    ("unique_id", ""),
    ("unique_id", "é" * 257),
    ("unique_id", "a\udcff"),
    ("unique_id", b"a"),
    ("version", -1),
    ("version", U64_MAX + 1),
    ("version", True),
    ("version", 1.0),
    ("block", "file"),
    ("index", None),
    ("offset", -1),
    ("offset", U64_MAX),
    ("total", False),
    ("payload", bytes(PAYLOAD_MAX + 1)),
    ("payload", "text"),
    ("payload", memoryview(b"abcd").cast("H")),
    ("payload", memoryview(b"abcd")[::2]),
    ("sha256", bytes(31)),
    ("sha256", "a" * 32),
    ("reply", b""),
    ("reply", bytes(257)),
    ("labels", {str(number): "" for number in range(17)}),
    ("labels", {"a": "b" * 2048}),
    ("labels", {"a": 1}),
    ("labels", {1: "a"}),
    ("labels", {"a": "\ud800"}),
    ("labels", ["a"]),
]
WRONG_RESULTS: list[tuple[str, Any]] = [
    ("group", ""),
    ("group", "g" * 257),
    ("status", "completed"),
    ("error", WriteDataFailed(REQUEST)),
    ("size", -1),
    ("sha256", b""),
    ("target", {}),
    ("target", {"path": ""}),
    ("target", {"path": "a\udcff"}),
    ("target", {"path": "a", "mode": 1}),
    ("target", {"shm": "a"}),
    ("splits", U64_MAX + 1),
    ("duplicates", 1.5),
    ("input", Input("", 0, 0, 0)),
    ("input", Input("t" * 250, 0, 0, 0)),
    ("input", Input("t", U32_MAX + 1, 0, 0)),
    ("input", Input("t", 0, 2, 1)),
    ("reply", b""),
    ("repeat", 1),
    ("finished_at", 1.5),
]


@pytest.mark.parametrize(
    ("record", "field", "value"),
    [
        *((SPLIT, field, value) for field, value in WRONG_SPLITS),
        *((RESULT, field, value) for field, value in WRONG_RESULTS),
        (ABORT, "reason", "é" * 513),
        (ABORT, "reason", None),
        (ACCEPTED, "group", ""),
        (ACCEPTED, "index", -1),
        (ACCEPTED, "reply", None),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 20 else None,
)
def test_encoding_refuses_a_wrong_field_by_name(record: Any, field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{field}"):
        encode(record._replace(**{field: value}))


NO_BYTES = "payload: neither bytes nor a flat, contiguous view of bytes"
TOO_LARGE = "payload: 16777217 bytes, the limit is 16777216"


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (SPLIT._replace(unique_id="a\udcff"), "unique_id: not valid UTF-8"),
        (SPLIT._replace(block="file"), "block: neither file nor mem"),  # type: ignore[arg-type]
        (SPLIT._replace(payload="text"), NO_BYTES),  # type: ignore[arg-type]
        (SPLIT._replace(payload=memoryview(bytes(4)).cast("B", (2, 2))), NO_BYTES),
        (SPLIT._replace(payload=bytes(PAYLOAD_MAX + 1)), TOO_LARGE),
        (RESULT._replace(status="completed"), "status: not one of the contract's"),  # type: ignore[arg-type]
    ],
)
def test_what_only_a_writer_can_get_wrong_is_told_with_its_cause(
    record: Record, words: str
) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(words)}$"):
        encode(record)


SMALLEST: list[Record] = [
    Split(RequestId(0, 0), "u", 0, Block.FILE, 0, 0, 0, b"", bytes(32), b"r", {"": ""}),
    Abort(RequestId(0, 0), ""),
    Accepted(RequestId(0, 0), "g", 0, b"r"),
    RESULT._replace(
        version=0,
        size=0,
        target={"path": "p"},
        splits=0,
        input=Input("t", 0, 0, 0),
        reply=b"r",
        finished_at=0,
    ),
    RESULT._replace(target={"shm": "s", "host": "h"}),
]
LARGEST: list[Record] = [
    SPLIT._replace(
        request=LARGEST_ID,
        unique_id="u" * UNIQUE_ID_MAX,
        version=U64_MAX,
        index=U64_MAX,
        offset=U64_MAX - 2,
        total=U64_MAX,
        reply=bytes(REPLY_MAX),
        labels=LABELS_FULL,
    ),
    Abort(LARGEST_ID, "r" * REASON_MAX),
    Accepted(LARGEST_ID, "g" * GROUP_MAX, U64_MAX, bytes(REPLY_MAX)),
]


@pytest.mark.parametrize("record", [*SMALLEST, *LARGEST])
def test_a_field_may_stand_at_its_limit(record: Record) -> None:
    assert there_and_back(record) == record


class Wordy(WsDataError):
    """An error with a field of its own, which nothing cuts."""

    code = "Wordy"

    def __init__(self, size: int) -> None:
        super().__init__("too much to tell")
        self.size = size

    def fields(self) -> dict[str, Any]:
        return {"field": bytes(self.size)}


def test_a_header_of_8_kib_is_written_and_one_of_a_byte_more_is_not() -> None:
    def result(size: int) -> Result:
        return RESULT._replace(status=Status.FAILED, error=Wordy(size))

    room = HEADER_MAX - len(encode_result(result(256))) + 256
    assert len(encode_result(result(room))) == HEADER_MAX
    with pytest.raises(ValueError, match=r"^header: 8193 bytes, the limit is 8192$"):
        encode_result(result(room + 1))


@settings(deadline=None, max_examples=300)
@given(splits, st.data())
def test_encoding_refuses_what_decoding_refuses(split: Split, data: st.DataObject) -> None:
    """One field of a split takes any value: both directions agree on whether it is allowed."""
    field = data.draw(
        st.sampled_from(["unique_id", "version", "index", "total", "sha256", "reply"])
    )
    value = data.draw(
        st.none()
        | st.booleans()
        | st.integers(-2, U64_MAX)
        | st.floats()
        | st.text(st.characters(codec="utf-8"), max_size=3)
        | st.sampled_from(["u" * 512, "u" * 513, bytes(256), bytes(257)])
        | st.binary(max_size=33)
    )
    unpacker = msgpack.Unpacker()
    unpacker.feed(encode_split(split))
    header = unpacker.unpack()
    header[field] = value
    if value is None and field in ("sha256", "reply"):
        del header[field]  # None stands for leaving the key out
    received = msgpack.packb(header) + encode_payload(split)
    changed: dict[str, Any] = {field: value}
    try:
        read = decode(received, Split, split.request.key)
    except InvalidRecord:
        with pytest.raises(ValueError, match=f"^{field}"):
            encode_split(split._replace(**changed))
    else:
        assert read == split._replace(**changed)
        assert there_and_back(split._replace(**changed)) == read


def encode_payload(split: Split) -> bytes:
    packed: bytes = msgpack.packb(bytes(split.payload))
    return packed
