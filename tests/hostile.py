"""Every way to break a record of the splits topic (WIRE), under names that say what is wrong.

`cases` makes them for a request, with what must become of each: whether it is tied to the
request, and the code it is told by. Some only look wrong; their code is None, and they are read.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgpack

from splitferry_protocol.codec import crc_header
from splitferry_protocol.ids import U32_MAX, U64_MAX, RequestId
from splitferry_protocol.records import HEADER_MAX, PAYLOAD_MAX

LARGE = 256 * 1024
"""Bytes from which a case is left out of loads that hold thousands."""
BREAKS = "BatchTransferError"
DAMAGED = "SplitTaskFailed"


@dataclass(frozen=True)
class Case:
    name: str
    key: bytes | None
    value: bytes | None
    headers: Sequence[tuple[str, Any]]
    code: str | None = BREAKS
    """None: the record obeys the contract."""
    tied: bool = False

    @property
    def large(self) -> bool:
        return len(self.key or b"") + len(self.value or b"") > LARGE


@dataclass(frozen=True)
class Maker:
    """Cases for one request, whose sound split has `header` and `payload`."""

    request: RequestId
    unique_id: str = "a"

    @property
    def header(self) -> dict[str, Any]:
        return {
            "v": 1, "kind": "split", "request": list(self.request), "unique_id": self.unique_id,
            "version": 1, "block": "mem", "index": 2, "offset": 3, "total": 8,
        }  # fmt: skip

    @property
    def abort(self) -> dict[str, Any]:
        return {"v": 1, "kind": "abort", "request": list(self.request), "reason": "enough"}

    def case(
        self, name: str, value: bytes | None, tied: bool = False, code: str | None = BREAKS
    ) -> Case:
        headers = [] if value is None else [crc_header(value)]
        return Case(name, self.request.key, value, headers, code, tied)

    def split(self, name: str, tied: bool = True, code: str | None = BREAKS, **facts: Any) -> Case:
        """A split with `facts` in its header; `payload` is the msgpack object behind it."""
        payload = facts.pop("payload", b"\xc4\x05bytes")
        return self.case(name, msgpack.packb({**self.header, **facts}) + payload, tied, code)

    def raw(self, name: str, unknown: bytes, tied: bool = False, code: str | None = BREAKS) -> Case:
        """A split with one unknown key, whose value is given as bytes."""
        packed = b"\x8a" + msgpack.packb(self.header)[1:] + b"\xa1?" + unknown
        return self.case(name, packed + b"\xc4\x05bytes", tied, code)

    # ---- the corpus

    def all(self) -> Iterator[Case]:
        yield from self._sound()
        yield from self._cut()
        yield from self._types()
        yield from self._ranges()
        yield from self._maps()
        yield from self._nesting()
        yield from self._announced()
        yield from self._unreadable()
        yield from self._sizes()
        yield from self._payloads()
        yield from self._keys()
        yield from self._checksums()
        yield from self._strangers()

    def _sound(self) -> Iterator[Case]:
        sound = self.split("a sound split", code=None)
        assert sound.value is not None
        yield sound
        yield self.case("a sound abort", msgpack.packb(self.abort), True, None)
        yield replace(sound, name="a foreign header", headers=[("x", b"y"), *sound.headers])
        yield replace(sound, name="a foreign header that is null",
                      headers=[*sound.headers, ("x", None)])  # fmt: skip
        yield self.split("an unknown key", code=None, unknown=[1.5, {"a": b"b"}, None])
        yield self.split("the keys of an abort", code=None, reason="x")
        large: dict[str, Any] = {"offset": 2**63, "version": U64_MAX, "index": U64_MAX}
        for name, value in large.items():
            yield self.split(f"{name} at {value}", code=None, **{name: value})
        for total in (2**63, U64_MAX):
            yield self.split(f"a total of {total}", code=None, total=total)
        yield self.split("offset and length end at the largest u64", code=None,
                         offset=U64_MAX - 5, total=None)  # fmt: skip
        yield self.split("a unique_id with NUL", code=None, unique_id="a\0b")
        yield self.split("a unique_id of 512 bytes", code=None, unique_id="u" * 512)
        yield self.split("labels at both limits", code=None,
                         labels={f"{n:02}": "x" * 126 for n in range(16)})  # fmt: skip
        yield self.split("a reply of 256 bytes", code=None, reply=bytes(256))
        for mark, size in {0xC5: 2, 0xC6: 4}.items():
            yield self.split(f"a payload in the form {mark:#x}", code=None,
                             payload=bytes([mark]) + (5).to_bytes(size) + b"bytes")  # fmt: skip
        yield self.raw("an integer in 9 bytes", b"\xcf" + bytes(8), True, None)

    def _cut(self) -> Iterator[Case]:
        for kind, header, payload in (
            ("split", self.header, b"\xc4\x05bytes"),
            ("abort", self.abort, b""),
        ):
            packed = msgpack.packb(header)
            value = packed + payload
            for end in range(len(value)):
                tied = end >= len(packed)
                cut = self.case(f"{kind} cut to {end} bytes", value[:end], tied)
                yield cut
                yield replace(
                    cut,
                    name=f"{kind} cut to {end} bytes under way",
                    headers=[crc_header(value)],
                    code=DAMAGED if tied else BREAKS,
                )

    def _types(self) -> Iterator[Case]:
        others: list[Any] = [None, True, 1.0, -1, 1, 2**64 - 1, "x", b"x", [], [1], {}, {"a": 1}]
        others += [msgpack.ExtType(5, b"x"), msgpack.Timestamp(0)]
        allowed: dict[str, tuple[type, ...]] = {
            "unique_id": (str,),
            "version": (int,),
            "block": (),
            "index": (int,),
            "offset": (int,),
            "total": (int, type(None)),
            "sha256": (),
            "reply": (bytes,),
            "labels": (),
        }
        for name, types in allowed.items():
            for other in others:
                right = type(other) in types and other != -1
                right = right and not (name == "offset" and other == U64_MAX)
                right = right or (name == "labels" and other == {})
                yield self.split(f"{name} is {other!r}", code=None if right else BREAKS,
                                 **{name: other})  # fmt: skip
        for other in others:
            for name in ("v", "kind", "request"):
                if (name, other) != ("v", 1) or other is True:
                    yield self.split(f"{name} is {other!r}", tied=False, **{name: other})
            wrong = {**self.abort, "reason": other}
            right = type(other) is str
            yield self.case(f"reason is {other!r}", msgpack.packb(wrong), True,
                            None if right else BREAKS)  # fmt: skip
        for name in self.header:
            less = {other: value for other, value in self.header.items() if other != name}
            tied = name not in {"v", "kind", "request"}
            yield self.case(f"no {name}", msgpack.packb(less) + b"\xc4\x05bytes", tied)
        yield self.case("no reason", msgpack.packb({**self.header, "kind": "abort"}), True)

    def _ranges(self) -> Iterator[Case]:
        yield self.split("offset and length end beyond u64", offset=U64_MAX - 4, total=None)
        yield self.split("sha256 of 31 bytes", sha256=bytes(31))
        yield self.split("sha256 of 33 bytes", sha256=bytes(33))
        yield self.split("an empty reply", reply=b"")
        yield self.split("a reply of 257 bytes", reply=bytes(257))
        yield self.split("an empty unique_id", unique_id="")
        yield self.split("a unique_id of 513 bytes", unique_id="u" * 513)
        yield self.split("a unique_id of 514 bytes in 257 characters", unique_id="é" * 257)
        yield self.split("an unknown block", block="FILE")
        yield self.split("17 labels", labels={str(n): "" for n in range(17)})
        yield self.split("2,049 bytes of labels", labels={"a": "x" * 2048})
        yield self.split("a label that is no text", labels={"a": 1})
        for reason, code in {"x" * 1024: None, "x" * 1025: BREAKS, "": None}.items():
            packed = msgpack.packb({**self.abort, "reason": reason})
            yield self.case(f"a reason of {len(reason)} bytes", packed, True, code)

    def _maps(self) -> Iterator[Case]:
        packed = msgpack.packb(self.header)[1:]
        rest = b"\xc4\x05bytes"
        for name in self.header:
            twice = b"\x8a" + packed + msgpack.packb(name) + msgpack.packb(self.header[name])
            yield self.case(f"{name} twice", twice + rest)
        for key in (b"\x01", b"\xc0", b"\xc3", b"\xc4\x01a", b"\xcb" + bytes(8), b"\x90", b"\x80",
                    b"\xd4\x05x"):  # fmt: skip
            yield self.case(f"a key {key.hex()}", b"\x8a" + packed + key + b"\x01" + rest)
            yield self.raw(f"a key {key.hex()} inside", b"\x81" + key + b"\x01")
        yield self.raw("a key twice inside", b"\x82\xa1a\x01\xa1a\x02")
        for name, value in {"an array": b"\x93\x01\x02\x03", "nil": b"\xc0", "text": b"\xa1x",
                            "a number": b"\x01", "an empty map": b"\x80"}.items():  # fmt: skip
            yield self.case(f"the header is {name}", value + rest)

    def _nesting(self) -> Iterator[Case]:
        yield self.raw("nested 4 deep", b"\x91\x91\x91\x01", True, None)
        yield self.raw("nested 5 deep", b"\x91\x91\x91\x91\x01")
        yield self.raw("maps 5 deep", b"\x81\xa1a" * 4 + b"\x01")
        for depth in (1_000, 10_000, 100_000, 1_000_000):
            yield self.raw(f"{depth} arrays inside each other", b"\x91" * depth)
            yield self.raw(f"{depth} maps inside each other", b"\x81\xa1a" * depth)
            yield self.case(f"{depth} arrays from the first byte", b"\x91" * depth)
            yield self.case(f"{depth} arrays of 8,192", b"\xdc\x20\x00" * depth)

    def _announced(self) -> Iterator[Case]:
        """Objects that say they are larger than anything that was sent."""
        forms = {
            "str": (0xD9, 0xDA, 0xDB),
            "bin": (0xC4, 0xC5, 0xC6),
            "array": (0xDC, 0xDD),
            "map": (0xDE, 0xDF),
            "ext": (0xC7, 0xC8, 0xC9),
        }
        for name, marks in forms.items():
            for mark in marks:
                size = 4 if mark == marks[-1] else 1 if mark == marks[0] and len(marks) == 3 else 2
                announced = bytes([mark]) + b"\xff" * size
                yield self.raw(f"{name} of {256**size - 1}", announced)
                yield self.case(f"{name} of {256**size - 1} from the first byte", announced)
            yield self.raw(f"{name} of {256**size - 1}, 500 times", announced * 500)

    def _unreadable(self) -> Iterator[Case]:
        yield self.raw("an ext", b"\xd4\x05x", True, None)
        yield self.raw("a timestamp", b"\xd6\xff" + bytes(4), True, None)
        yield self.raw("a timestamp of 3 bytes", b"\xc7\x03\xff" + bytes(3))
        yield self.raw("a timestamp with 2^30 ns and more", b"\xd7\xff" + b"\xff" * 8)
        yield self.raw("the byte that msgpack never uses", b"\xc1")
        for name, text in {"invalid": b"\xff", "cut": b"\xc3", "a surrogate": b"\xed\xa0\x80",
                           "too long a form": b"\xc0\x80", "beyond Unicode": b"\xf5\x80\x80\x80",
                           }.items():  # fmt: skip
            packed = bytes([0xA0 | len(text)]) + text
            yield self.raw(f"text that is {name}", packed)
            yield self.raw(f"a key that is {name}", b"\x81" + packed + b"\x01")
            header = msgpack.packb({**self.header, "unique_id": text.decode("latin-1")})
            sound = msgpack.packb(text.decode("latin-1"))
            yield self.case(
                f"a unique_id that is {name}", header.replace(sound, packed) + b"\xc4\0"
            )
        yield self.case("an empty value", b"")
        yield self.case("no value", None)
        yield self.case("zeros", bytes(1000))

    def _sizes(self) -> Iterator[Case]:
        room = HEADER_MAX - len(msgpack.packb(self.header)) - len(b"\xa1?\xc5..")
        yield self.raw("a header of 8 KiB", b"\xc5" + struct.pack(">H", room) + bytes(room), True,
                       None)  # fmt: skip
        room += 1
        yield self.raw("a header of 8 KiB and a byte", b"\xc5" + struct.pack(">H", room)
                       + bytes(room))  # fmt: skip
        yield self.raw("a header of 20 MiB", b"\xc6" + struct.pack(">I", 20 << 20)
                       + bytes(20 << 20))  # fmt: skip

    def _payloads(self) -> Iterator[Case]:
        for size, code in {PAYLOAD_MAX: None, PAYLOAD_MAX + 1: BREAKS}.items():
            payload = b"\xc6" + size.to_bytes(4) + bytes(size)
            yield self.split(f"a payload of {size} bytes", code=code, payload=payload, total=None)
        for name, payload in {
            "is missing": b"",
            "is text": b"\xa5bytes",
            "is nil": b"\xc0",
            "is an ext": b"\xc7\x01\x05x",
            "says 2^32 - 1": b"\xc6\xff\xff\xff\xffbytes",
            "lacks its length": b"\xc6\0\0",
            "lacks a byte": b"\xc4\x06bytes",
            "has a byte behind it": b"\xc4\x05bytes\0",
            "is followed by another": b"\xc4\x05bytes\xc4\x05bytes",
        }.items():
            yield self.split(f"the payload {name}", payload=payload)
        yield self.case("an abort with a payload", msgpack.packb(self.abort) + b"\xc4\0", True)

    def _keys(self) -> Iterator[Case]:
        sound = self.split("", code=None)
        node, sequence = (str(number).encode() for number in self.request)
        for key in (
            None, b"", b"-", b"x", node, node + b"-", b"-" + sequence, node + b"--" + sequence,
            b"0" + node + b"-" + sequence, node + b"-0" + sequence, b"+" + self.request.key,
            node + b"-+" + sequence, b"-" + self.request.key, self.request.key + b"\n",
            b" " + self.request.key, self.request.key + b"\0", node + b"_" + sequence,
            node + b".0-" + sequence, b"0x" + self.request.key, b"1e1-" + sequence,
            node + b"-" + "\u0664\u0662".encode(), "\uff17".encode() + b"-" + sequence,
            b"\xff" + sequence,
            b"%d-%d" % (U32_MAX + 1, 1), b"%d-%d" % (1, U64_MAX + 1), self.request.key + b"1",
            b"1" * 1_000_000, b"1-" + b"1" * 1_000_000, b"0" * 100_000 + b"-1",
        ):  # fmt: skip
            shown = key if key is None or len(key) < 40 else key[:8] + b"..."
            yield replace(sound, name=f"the key {shown!r}", key=key, code=BREAKS, tied=False)
        yield self.split("another request's header", tied=False, request=[*self.request[:1], 1])
        for request in ([7], [7, 42, 1], [-1, 42], [U32_MAX + 1, 42], [7, True], [7.0, 42]):
            yield self.split(f"request is {request}", tied=False, request=request)

    def _checksums(self) -> Iterator[Case]:
        sound = self.split("", code=None)
        assert sound.value is not None
        name, right = crc_header(sound.value)
        sums: dict[str, Sequence[tuple[str, Any]]] = {
            "no crc32c": [],
            "two crc32c": [(name, right)] * 2,
            "a right crc32c and a wrong one": [(name, right), (name, bytes(4))],
            "a crc32c of 3 bytes": [(name, right[:3])],
            "a crc32c of 5 bytes": [(name, right + b"\0")],
            "an empty crc32c": [(name, b"")],
            "a crc32c that is null": [(name, None)],
            "a crc32c under CRC32C": [("CRC32C", right)],
        }
        for what, headers in sums.items():
            yield replace(sound, name=what, headers=headers, code=BREAKS)
        wrong = [(name, bytes(byte ^ 255 for byte in right))]
        yield replace(sound, name="a wrong crc32c", headers=wrong, code=DAMAGED)
        aborted = self.case("", msgpack.packb(self.abort), True)
        yield replace(aborted, name="an abort with a wrong crc32c", headers=wrong)
        strange = self.split("a wrong crc32c, and index is no number", index="2")
        yield replace(strange, headers=wrong)

    def _strangers(self) -> Iterator[Case]:
        for version in (0, 2, 255):
            yield self.split(f"v is {version}", tied=False, v=version)
        for kind in ("", "Split", "result", "accepted", "split\0", "x" * 1000):
            yield self.split(f"kind is {kind[:9]!r}", tied=False, kind=kind)


def cases(request: RequestId, unique_id: str = "a") -> Iterator[Case]:
    yield from Maker(request, unique_id).all()
