"""Writes the vectors beside it: `python docs/vectors/generate.py`.

It shares no code with the project: msgpack, CRC-32C and murmur2 are written out here once more,
plainly, so that the vectors judge the implementation and not the other way round.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
U32, U64 = 2**32 - 1, 2**64 - 1
KEY = b"7-42"


class Raw(bytes):
    """Bytes of msgpack that stand as they are."""


class Pairs(list[tuple[Any, Any]]):
    """A map as pairs: keys may repeat, and need not be strings."""


def pack(value: Any) -> bytes:
    """The shortest msgpack of a value."""
    match value:
        case Raw():
            return bytes(value)
        case None:
            return b"\xc0"
        case bool():
            return b"\xc3" if value else b"\xc2"
        case int():
            return pack_integer(value)
        case float():
            return b"\xcb" + struct.pack(">d", value)
        case str():
            text = value.encode()
            return head(len(text), (0xA0, 32), 0xD9, 0xDA, 0xDB) + text
        case bytes():
            return head(len(value), (0, 0), 0xC4, 0xC5, 0xC6) + value
        case Pairs() | dict():
            pairs = list(value.items()) if isinstance(value, dict) else value
            packed = b"".join(pack(part) for pair in pairs for part in pair)
            return head(len(pairs), (0x80, 16), None, 0xDE, 0xDF) + packed
        case list():
            return head(len(value), (0x90, 16), None, 0xDC, 0xDD) + b"".join(map(pack, value))
    raise TypeError(type(value))


def head(size: int, fixed: tuple[int, int], one: int | None, two: int, four: int) -> bytes:
    lead, below = fixed
    if size < below:
        return bytes((lead | size,))
    if one is not None and size < 2**8:
        return bytes((one, size))
    return struct.pack(">BH", two, size) if size < 2**16 else struct.pack(">BI", four, size)


def pack_integer(value: int) -> bytes:
    if -32 <= value < 128:
        return struct.pack(">B", value & 0xFF)
    forms = "BHIQ" if value >= 0 else "bhiq"
    for number, form in enumerate(forms):
        try:
            return bytes(((0xCC if value > 0 else 0xD0) + number,)) + struct.pack(">" + form, value)
        except struct.error:
            continue
    raise OverflowError(value)


def crc32c(data: bytes) -> bytes:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return (crc ^ 0xFFFFFFFF).to_bytes(4, "big")


def murmur2(data: bytes) -> int:
    """Kafka's variant, as the signed 32-bit integer that Java shows."""
    hashed = 0x9747B28C ^ len(data)
    whole = len(data) // 4 * 4
    for (word,) in struct.iter_unpack("<I", data[:whole]):
        word = word * 0x5BD1E995 & U32
        word = (word ^ word >> 24) * 0x5BD1E995 & U32
        hashed = hashed * 0x5BD1E995 & U32 ^ word
    if rest := data[whole:]:
        hashed = (hashed ^ int.from_bytes(rest, "little")) * 0x5BD1E995 & U32
    hashed = (hashed ^ hashed >> 13) * 0x5BD1E995 & U32
    hashed ^= hashed >> 15
    return hashed - 2**32 if hashed >= 2**31 else hashed


# --- The records. A vector's `record` shows what the bytes mean: integers as decimal text (many
# --- JSON readers lose those above 2^53), binary as hex.

SPLIT = {
    "v": 1,
    "kind": "split",
    "request": [7, 42],
    "unique_id": "dir/a.bin",
    "version": 3,
    "block": "file",
    "index": 1,
    "offset": 4,
    "total": 8,
}
ABORT = {"v": 1, "kind": "abort", "request": [7, 42], "reason": "the file changed"}
ACCEPTED = {
    "v": 1,
    "kind": "accepted",
    "request": [7, 42],
    "group": "receivers",
    "index": 1,
    "reply": b"\x01\x02",
}
RESULT = {
    "v": 1,
    "kind": "result",
    "request": [7, 42],
    "unique_id": "dir/a.bin",
    "version": 3,
    "block": "file",
    "group": "receivers",
    "status": "completed",
    "success": True,
    "error": None,
    "size": 8,
    "sha256": bytes(range(32)),
    "target": {"path": "dir/a.bin"},
    "splits": 2,
    "duplicates": 1,
    "input": ["splitferry.splits", 5, 100, 102],
    "reply": b"\x01\x02",
    "repeat": False,
    "finished_at": 1767225600000,
}
FAILED = RESULT | {
    "status": "failed",
    "success": False,
    "error": {
        "code": "SplitTaskFailed",
        "message": "split 1 is damaged",
        "request_id": [7, 42],
        "idx": 1,
    },
    "sha256": None,
    "target": None,
    "reply": None,
}
PAYLOAD = b"\x00\x01\xfe\xff"


def request_key(node_id: int, sequence: int) -> bytes:
    return f"{node_id}-{sequence}".encode()


def without(header: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in header.items() if key != name}


def shown(value: Any) -> Any:
    match value:
        case bool() | None | str():
            return value
        case int():
            return str(value)
        case bytes():
            return value.hex()
        case list():
            return [shown(item) for item in value]
        case dict():
            return {name: shown(item) for name, item in value.items()}
    raise TypeError(type(value))


def valid(
    name: str,
    header: dict[str, Any],
    payload: bytes | None = None,
    *,
    value: bytes | None = None,
    ignored: tuple[str, ...] = (),
) -> dict[str, Any]:
    """`value` replaces the shortest encoding; keys in `ignored` are not part of the meaning."""
    shortest = pack(header) + (b"" if payload is None else pack(payload))
    record = {key: content for key, content in header.items() if key not in ("v", *ignored)}
    if payload is not None:
        record["payload"] = payload
    sent = shortest if value is None else value
    return {
        "name": name,
        "key": request_key(*header["request"]).hex(),
        "value": sent.hex(),
        "headers": [["crc32c", crc32c(sent).hex()]] if header["kind"] in ("split", "abort") else [],
        "shortest": value is None and not ignored,
        "record": shown(record),
    }


def invalid(
    reason: str,
    value: bytes | None,
    *,
    tied: bool = True,
    index: int | None = None,
    key: bytes | None = KEY,
    headers: list[tuple[str, bytes]] | None = None,
    damaged: bool = False,
) -> dict[str, Any]:
    if headers is None:
        headers = [("crc32c", crc32c(value or b""))]
    return {
        "reason": reason,
        "key": None if key is None else key.hex(),
        "value": None if value is None else value.hex(),
        "headers": [[name, content.hex()] for name, content in headers],
        "tied": tied,
        "index": None if index is None else str(index),
        "damaged": damaged,
        "code": "SplitTaskFailed" if damaged and index is not None else "BatchTransferError",
    }


def split_value(header: Any, payload: bytes = PAYLOAD) -> bytes:
    return pack(header) + pack(payload)


def padded(header: dict[str, Any], size: int) -> dict[str, Any]:
    """`header` with an unknown key that brings it to `size` bytes."""
    room = size - len(pack(header | {"pad": b""}))
    return header | {"pad": b"x" * (room - 1)}  # the longer form of bin takes one byte more


def wrong(header: dict[str, Any], name: str, values: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(f"{name}: {what}", header | {name: value}) for what, value in values.items()]


NOT_AN_INTEGER = {"a boolean": True, "a float": 1.0, "text": "1", "nil": None}
NOT_U64 = {"negative": -1, **NOT_AN_INTEGER}
NOT_TEXT = {"binary": b"a", "an integer": 1, "nil": None}
NOT_UTF8 = {"not UTF-8": Raw(b"\xa1\xff")}


def unreadable(header: dict[str, Any]) -> list[tuple[str, bytes]]:
    """Headers of any kind that speak for no request."""
    packed = pack(header)
    return [
        ("an empty value", b""),
        ("no map", pack([1, 2])),
        ("a byte that msgpack does not use", b"\xc1"),
        ("a header that is cut short", packed[: len(packed) // 2]),
        ("a duplicate key", pack(Pairs([*header.items(), ("kind", header["kind"])]))),
        ("a duplicate unknown key", pack(Pairs([*header.items(), ("x", 1), ("x", 1)]))),
        ("a key that is an integer", pack(Pairs([*header.items(), (1, 1)]))),
        ("a key that is binary", pack(Pairs([*header.items(), (b"x", 1)]))),
        ("nested 5 deep", pack(header | {"x": [[[[]]]]})),
        ("nested a thousand deep", pack(header | {"x": Raw(b"\x91" * 1000 + b"\xc0")})),
        ("arrays that announce more than there is", pack(header | {"x": Raw(b"\xdc\x20\0" * 600)})),
        ("text that is not UTF-8", pack(header | {"x": NOT_UTF8["not UTF-8"]})),
        *((reason, pack(wrong_one)) for reason, wrong_one in untied(header)),
    ]


def untied(header: dict[str, Any]) -> list[tuple[str, Any]]:
    return [
        *((f"no {name}", without(header, name)) for name in ("v", "kind", "request")),
        *wrong(header, "v", {"newer": 2, "zero": 0, **NOT_AN_INTEGER}),
        *wrong(header, "kind", {"unknown": "chunk", **NOT_TEXT}),
        *wrong(header, "request", {"another than the key's": [7, 43], "text": "7-42", "nil": None}),
        *wrong(header, "request", {"one number": [7], "three numbers": [7, 42, 0]}),
        *wrong(header, "request", {"a boolean": [True, 42], "a float": [7.0, 42]}),
        *wrong(header, "request", {"node id above u32": [2**32, 42], "negative": [7, -42]}),
    ]


def wrong_item(header: dict[str, Any]) -> list[tuple[str, Any]]:
    many = {f"{number}": "" for number in range(17)}
    return [
        *wrong(header, "unique_id", {"empty": "", "513 bytes": "a" * 513, **NOT_TEXT}),
        *wrong(header, "version", NOT_U64),
        *wrong(header, "block", {"unknown": "disk", "empty": "", **NOT_TEXT}),
        *wrong(header, "labels", {"nil": None, "an array": [], "text": "a", "17 pairs": many}),
        *wrong(header, "labels", {"2049 bytes": {"a": "b" * 2048}, "not text": {"a": 1}}),
    ]


def splits() -> dict[str, Any]:
    full = SPLIT | {
        "sha256": bytes(range(32)),
        "reply": b"\x01\x02",
        "labels": {"owner": "é", "": ""},
    }
    extremes = SPLIT | {"request": [U32, U64], "unique_id": "é" * 256, "version": U64}
    extremes |= {"index": U64, "offset": U64, "total": U64, "block": "mem", "reply": b"r" * 256}
    extremes |= {"labels": {f"{number:02}": "x" * 126 for number in range(16)}}
    unknown = {"x-float": 1.5, "x-nested": [[[1]]], "x-wide": list(range(1000))}
    unknown |= {"x-extension": Raw(b"\xd4\x05\x00"), "x-map": {"a": {"b": {}}}}
    packed = pack(SPLIT)
    wide_version = b"\xd9\x07version\xcf" + (3).to_bytes(8, "big")
    longer = b"\xde\x00\x09" + packed[1:].replace(b"\xa7version\x03", wide_version)
    reordered = dict(reversed(SPLIT.items()))
    good = [
        valid("a split", SPLIT, PAYLOAD),
        valid("every optional key", full, PAYLOAD),
        valid("the total is not known yet", SPLIT | {"total": None}, PAYLOAD),
        valid("an empty item", SPLIT | {"index": 0, "offset": 0, "total": 0}, b""),
        valid("the smallest numbers", SPLIT | {"request": [0, 0], "version": 0, "index": 0}, b"x"),
        valid("the largest of everything but the payload", extremes, b""),
        valid("no labels in the map", SPLIT | {"labels": {}}, PAYLOAD),
        valid("a payload of 256 bytes", SPLIT | {"total": None}, bytes(range(256))),
        valid("beyond its own total: readable, the request fails", SPLIT | {"total": 5}, PAYLOAD),
        valid("unknown keys", SPLIT | unknown, PAYLOAD, ignored=tuple(unknown)),
        valid("a header of 8192 bytes", padded(SPLIT, 8192), PAYLOAD, ignored=("pad",)),
        valid("keys in another order", reordered, PAYLOAD, value=split_value(reordered)),
        valid("longer forms of msgpack", SPLIT, PAYLOAD, value=longer + b"\xc6\0\0\0\4" + PAYLOAD),
    ]
    whole = split_value(SPLIT)
    crc = ("crc32c", crc32c(whole))
    flipped = whole[:-1] + b"\xfe"
    bad_fields = [
        *((f"no {name}", without(SPLIT, name)) for name in ("unique_id", "version", "block")),
        *((f"no {name}", without(SPLIT, name)) for name in ("offset", "total")),
        *wrong_item(SPLIT),
        *wrong(SPLIT, "offset", {"payload ends beyond u64": U64 - 3, **NOT_U64}),
        *wrong(SPLIT, "total", without(NOT_U64, "nil")),
        *wrong(SPLIT, "sha256", {"31 bytes": bytes(31), "33 bytes": bytes(33), "nil": None}),
        *wrong(SPLIT, "sha256", {"text": "a" * 32}),
        *wrong(SPLIT, "reply", {"empty": b"", "257 bytes": bytes(257), "text": "a", "nil": None}),
    ]
    bad_index = [("no index", without(SPLIT, "index")), *wrong(SPLIT, "index", NOT_U64)]
    bad_values = [
        ("no payload", packed),
        ("the payload is text", packed + pack("abcd")),
        ("the payload is nil", packed + pack(None)),
        ("the length of the payload is cut short", packed + b"\xc5\x00"),
        ("the payload is cut short", whole[:-1]),
        ("a byte after the payload", whole + b"\x00"),
        ("a second payload", whole + pack(PAYLOAD)),
    ]
    bad = [
        *(invalid(reason, value, tied=False) for reason, value in unreadable(SPLIT)),
        invalid("no value", None, tied=False, headers=[]),
        invalid("a header of 8193 bytes", split_value(padded(SPLIT, 8193)), tied=False),
        invalid("a kind of the results topic", pack(ACCEPTED), tied=False),
        invalid("no key", whole, tied=False, key=None),
        invalid("a key with a leading zero", whole, tied=False, key=b"07-42"),
        *(invalid(reason, split_value(header), index=1) for reason, header in bad_fields),
        *(invalid(reason, split_value(header)) for reason, header in bad_index),
        *(invalid(reason, value, index=1) for reason, value in bad_values),
        invalid("no crc32c header", whole, index=1, headers=[]),
        invalid("a crc32c header of 3 bytes", whole, index=1, headers=[("crc32c", crc[1][:3])]),
        invalid("two crc32c headers", whole, index=1, headers=[crc, crc]),
        invalid("damaged payload", flipped, index=1, headers=[crc], damaged=True),
        invalid(
            "a CRC in the wrong byte order",
            whole,
            index=1,
            headers=[("crc32c", crc[1][::-1])],
            damaged=True,
        ),
        invalid(
            "damaged, and the index is not readable",
            split_value(SPLIT | {"index": None}),
            headers=[crc],
            damaged=True,
        ),
        invalid("damaged header", b"\xc1" + whole[1:], tied=False, headers=[crc], damaged=True),
    ]
    return {"valid": good, "invalid": bad}


def aborts() -> dict[str, Any]:
    whole = pack(ABORT)
    good = [
        valid("an abort", ABORT),
        valid("an empty reason", ABORT | {"reason": ""}),
        valid("the longest reason", ABORT | {"reason": "é" * 512}),
        valid("unknown keys", ABORT | {"by": "operator"}, ignored=("by",)),
    ]
    reasons = wrong(ABORT, "reason", {"1025 bytes": "a" * 1025, **NOT_TEXT})
    bad = [
        *(invalid(reason, value, tied=False) for reason, value in unreadable(ABORT)),
        invalid("no reason", pack(without(ABORT, "reason"))),
        *(invalid(reason, pack(header)) for reason, header in reasons),
        invalid("a payload", whole + pack(PAYLOAD)),
        invalid("damaged", whole, headers=[("crc32c", bytes(4))], damaged=True),
        invalid("no crc32c header", whole, headers=[]),
    ]
    return {"valid": good, "invalid": bad}


def outcomes() -> dict[str, Any]:
    def failed(status: str, code: str, **fields: Any) -> dict[str, Any]:
        error = {"code": code, "message": "for people", **fields}
        return FAILED | {"status": status, "error": error}

    request = {"request_id": [7, 42]}
    errors = [
        failed("failed", "BatchTransferFailed", **request, reason="the digest differs"),
        failed("aborted", "BatchTransferFailed", **request, reason="aborted"),
        failed("expired", "BatchTransferFailed", **request, reason="idle"),
        failed("failed", "BatchTransferNotFound", **request),
        failed("failed", "BatchTransferError", **request, msg="an unsafe path"),
        failed("failed", "WriteDataFailed", **request),
        failed("failed", "VersionMismatch", expected=U64, actual=3),
        failed("failed", "CodeOfTheFuture"),
    ]
    memory = RESULT | {"block": "mem", "target": {"shm": "splitferry-1", "host": "a.example"}}
    good = [
        valid("completed, a file", RESULT),
        valid("completed, a memory segment", memory),
        valid("completed, handled in the process", memory | {"target": None}),
        valid("told once more", RESULT | {"repeat": True, "reply": b"\x03"}),
        valid("labels", RESULT | {"labels": {"owner": "é"}}),
        valid("failed", FAILED),
        valid("failed before the total was known", FAILED | {"size": None}),
        *(valid(f"{e['status']}: {e['error']['code']}", e) for e in errors),
        valid("unknown keys", RESULT | {"took": 1.5}, ignored=("took",)),
        valid("accepted", ACCEPTED),
    ]
    agree = [
        ("success does not agree with the status", RESULT | {"success": False}),
        ("completed with an error", RESULT | {"error": FAILED["error"]}),
        ("failed without an error", FAILED | {"error": None}),
    ]
    request_wrong = {"code": "WriteDataFailed", "message": "", "request_id": None}
    fields = [
        *((f"no {name}", without(RESULT, name)) for name in list(RESULT)[3:]),
        *wrong_item(RESULT),
        *wrong(RESULT, "group", {"empty": "", "257 bytes": "g" * 257, **NOT_TEXT}),
        *wrong(RESULT, "status", {"unknown": "lost", **NOT_TEXT}),
        *wrong(RESULT, "success", {"an integer": 1, "nil": None}),
        *agree,
        *wrong(FAILED, "error", {"text": "bad", "no code": {"message": ""}}),
        *wrong(FAILED, "error", {"a field of the code is wrong": request_wrong}),
        *wrong(RESULT, "size", without(NOT_U64, "nil")),
        *wrong(RESULT, "sha256", {"31 bytes": bytes(31), "text": "a" * 32}),
        *wrong(RESULT, "target", {"empty": {}, "text": "a", "no host": {"shm": "a"}}),
        *wrong(RESULT, "target", {"both": {"path": "a", "shm": "a", "host": "a"}}),
        *wrong(RESULT, "target", {"not text": {"path": b"a"}}),
        *wrong(RESULT, "splits", NOT_U64),
        *wrong(RESULT, "duplicates", NOT_U64),
        *wrong(RESULT, "input", {"nil": None, "three": ["t", 0, 0], "no topic": ["", 0, 0, 0]}),
        *wrong(RESULT, "input", {"partition above u32": ["t", 2**32, 0, 0]}),
        *wrong(RESULT, "input", {"ends before it begins": ["t", 0, 1, 0]}),
        *wrong(RESULT, "reply", {"empty": b"", "257 bytes": bytes(257), "text": "a"}),
        *wrong(RESULT, "repeat", {"an integer": 0, "nil": None}),
        *wrong(RESULT, "finished_at", NOT_U64),
    ]
    accepted = [
        *((f"accepted: no {name}", without(ACCEPTED, name)) for name in list(ACCEPTED)[3:]),
        *wrong(ACCEPTED, "group", {"empty": ""}),
        *wrong(ACCEPTED, "index", NOT_U64),
        *wrong(ACCEPTED, "reply", {"empty": b"", "nil": None}),
    ]
    bad = [
        *(invalid(why, value, tied=False, headers=[]) for why, value in unreadable(RESULT)),
        invalid("no value", None, tied=False, headers=[]),
        invalid("no key", pack(RESULT), tied=False, key=None, headers=[]),
        invalid("a kind of the splits topic", pack(ABORT), tied=False, headers=[]),
        *(invalid(why, pack(header), headers=[]) for why, header in fields + accepted),
        invalid("a byte after the header", pack(RESULT) + b"\x00", headers=[]),
    ]
    return {"valid": good, "invalid": bad}


def keys() -> dict[str, Any]:
    good = [(0, 0), (7, 42), (U32, U64)]
    bad = {
        "no dash": b"742",
        "no sequence": b"7-",
        "a leading zero": b"7-042",
        "a sign": b"+7-42",
        "white space": b"7-42\n",
        "node id above u32": b"4294967296-0",
        "sequence above u64": b"0-18446744073709551616",
        "a digit that is not ASCII": "\u0667-42".encode(),
        "empty": b"",
    }
    return {
        "valid": [
            {"key": request_key(*pair).hex(), "request": [str(part) for part in pair]}
            for pair in good
        ],
        "invalid": [{"key": key.hex(), "reason": reason} for reason, key in bad.items()],
    }


def checksums() -> list[dict[str, str]]:
    samples = [b"", b"123456789", bytes(32), b"\xff" * 32, bytes(range(32)), split_value(SPLIT)]
    return [{"bytes": sample.hex(), "crc32c": crc32c(sample).hex()} for sample in samples]


def partitions() -> list[dict[str, Any]]:
    samples = [b"7-42", b"0-0", b"%d-%d" % (U32, U64), b"21", b"foobar", b"abc"]
    samples += [b"a-little-bit-long-string", b"a-little-bit-longer-string"]
    samples += [b"lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8"]
    return [
        {
            "key": sample.hex(),
            "murmur2": murmur2(sample),
            "partitions": {str(n): (murmur2(sample) & 0x7FFFFFFF) % n for n in (1, 2, 3, 12, 50)},
        }
        for sample in samples
    ]


def paths() -> dict[str, Any]:
    return {
        "valid": ["a", "dir/a.bin", "...", ".hidden", "a b/é", "x/.splitferry/y", "s" * 255],
        "invalid": {
            "": "empty",
            "/a": "not relative",
            "a//b": "an empty segment",
            "a/": "an empty segment",
            "./a": "a segment .",
            "a/../b": "a segment ..",
            "a\0b": "a NUL",
            "s" * 256: "a segment of more than 255 bytes",
            ".splitferry": "the consumer's own directory",
            ".splitferry/catalog.db": "the consumer's own directory",
            ".SPLITFERRY/x": "the consumer's own directory where case is ignored",
        },
    }


FILES = {
    "splits.json": splits,
    "aborts.json": aborts,
    "outcomes.json": outcomes,
    "keys.json": keys,
    "crc32c.json": checksums,
    "partitioning.json": partitions,
    "paths.json": paths,
}


def rendered(name: str) -> str:
    """The text of one file, in ASCII."""
    return json.dumps(FILES[name](), indent=1) + "\n"


if __name__ == "__main__":
    for file_name in FILES:
        (HERE / file_name).write_text(rendered(file_name), encoding="ascii")
