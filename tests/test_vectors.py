"""The published vectors judge the code: what stands in `docs/vectors/` is read, not made, here.

Their generator shares no code with the project, so agreement says something about both.
"""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

from splitferry_protocol import (
    Abort,
    Accepted,
    InvalidRecord,
    RequestId,
    Result,
    Split,
    WsDataError,
    crc_header,
    decode_outcome,
    decode_record,
    encode_abort,
    encode_accepted,
    encode_result,
    encode_split,
    partition_for,
    path_problem,
)

VECTORS = Path(__file__).parent.parent / "docs" / "vectors"
RECORD_FILES = ("splits", "aborts", "outcomes")


def read(name: str) -> Any:
    return json.loads((VECTORS / f"{name}.json").read_text(encoding="ascii"))


def records(part: str) -> list[Any]:
    return [
        pytest.param(vector, id=f"{name}: {vector.get('name') or vector['reason']}")
        for name in RECORD_FILES
        for vector in read(name)[part]
    ]


def unhex(text: str | None) -> bytes | None:
    return None if text is None else bytes.fromhex(text)


def decode(vector: dict[str, Any], topic_of_splits: bool) -> Split | Abort | Result | Accepted:
    key, value = unhex(vector["key"]), unhex(vector["value"])
    if topic_of_splits:
        headers = [(name, bytes.fromhex(content)) for name, content in vector["headers"]]
        return decode_record(key, value, headers)
    return decode_outcome(key, value)


def encode(record: Split | Abort | Result | Accepted) -> bytes:
    match record:
        case Split():
            return encode_split(record)
        case Abort():
            return encode_abort(record)
        case Result():
            return encode_result(record)
        case Accepted():
            return encode_accepted(record)


def shown(value: Any) -> Any:
    """A record as the files show it: integers as decimal text, binary as hex."""
    match value:
        case WsDataError():
            return shown(value.to_wire())
        case bool() | None | str():
            return value
        case int():
            return str(value)
        case bytes() | memoryview():
            return value.hex()
        case tuple() | list():
            return [shown(item) for item in value]
        case dict():
            return {name: shown(item) for name, item in value.items()}
    raise TypeError(type(value))


def meaning(record: Split | Abort | Result | Accepted) -> dict[str, Any]:
    optional = {"sha256", "reply", "labels"} if isinstance(record, Split) else {"labels"}
    fields = {
        name: value
        for name, value in record._asdict().items()
        if name not in optional or value is not None
    }
    if isinstance(record, Result):
        fields["success"] = record.success
    return {"kind": type(record).__name__.lower(), **shown(fields)}


@pytest.mark.parametrize("vector", records("valid"))
def test_a_valid_vector_means_what_it_says(vector: dict[str, Any]) -> None:
    record = decode(vector, topic_of_splits=vector["record"]["kind"] in ("split", "abort"))
    assert meaning(record) == vector["record"]
    if vector["shortest"]:
        assert len(encode(record)) == len(vector["value"]) // 2
    if vector["headers"]:
        name, crc = crc_header(bytes.fromhex(vector["value"]))
        assert [[name, crc.hex()]] == vector["headers"]


@pytest.mark.parametrize("vector", records("valid"))
def test_what_is_encoded_reads_the_same(vector: dict[str, Any]) -> None:
    topic_of_splits = vector["record"]["kind"] in ("split", "abort")
    value = encode(decode(vector, topic_of_splits))
    headers = [[name, crc.hex()] for name, crc in [crc_header(value)]]
    again = decode(vector | {"value": value.hex(), "headers": headers}, topic_of_splits)
    assert meaning(again) == vector["record"]


@pytest.mark.parametrize("vector", records("invalid"))
def test_an_invalid_vector_is_refused_as_it_says(
    vector: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    topic_of_splits = not request.node.callspec.id.startswith("outcomes")
    with pytest.raises(InvalidRecord) as refused:
        decode(vector, topic_of_splits)
    error = refused.value
    assert error.message
    assert error.request == (RequestId(7, 42) if vector["tied"] else None)
    assert error.index == (None if vector["index"] is None else int(vector["index"]))
    assert error.damaged is vector["damaged"]
    assert error.code == error.error().code == vector["code"]


def test_keys() -> None:
    for vector in read("keys")["valid"]:
        request = RequestId(*map(int, vector["request"]))
        assert request.key.hex() == vector["key"]
        assert RequestId.from_key(bytes.fromhex(vector["key"])) == request
    for vector in read("keys")["invalid"]:
        with pytest.raises(ValueError, match=r"key|request id"):
            RequestId.from_key(bytes.fromhex(vector["key"]))


def test_checksums() -> None:
    for vector in read("crc32c"):
        assert crc_header(bytes.fromhex(vector["bytes"]))[1].hex() == vector["crc32c"]
    # RFC 3720, B.4, in the order of their bytes here.
    published = {bytes(32).hex(): "8a9136aa", (b"\xff" * 32).hex(): "62a8ab43"}
    assert published.items() <= {v["bytes"]: v["crc32c"] for v in read("crc32c")}.items()


def test_partitions() -> None:
    for vector in read("partitioning"):
        for count, partition in vector["partitions"].items():
            assert partition_for(bytes.fromhex(vector["key"]), int(count)) == partition


def test_paths() -> None:
    assert [path_problem(path) for path in read("paths")["valid"]] == [None] * 7
    assert None not in [path_problem(path) for path in read("paths")["invalid"]]


def test_the_files_are_what_the_generator_writes() -> None:
    generator = runpy.run_path(str(VECTORS / "generate.py"))
    assert {path.name for path in VECTORS.glob("*.json")} == set(generator["FILES"])
    for name in generator["FILES"]:
        assert (VECTORS / name).read_text(encoding="ascii") == generator["rendered"](name)
