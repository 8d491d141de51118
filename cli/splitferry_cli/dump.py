"""Bytes from anywhere, for people to look at: nothing in them can steer a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from .output import printable

SHOWN = 200
"""Characters of a key or of a header's value."""
_ROW = 16
_FIRST, _LAST = 0x20, 0x7E
"""Printable ASCII."""


def brief(value: bytes | None) -> str:
    """`value` in one line: as text where it is text, else in hex; long ones are cut."""
    if value is None:
        return "none"
    try:
        text = value.decode()
    except UnicodeDecodeError:
        text = ""
    shown = text if text and text.isprintable() else f"hex {value.hex()}" if value else "empty"
    return cut(shown, f"{len(value)} bytes")


def cut(text: str, size: str) -> str:
    """At most `SHOWN` characters of what may be printed, with its `size` where it has more."""
    text = printable(text)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}… ({size})"


def hex_dump(value: bytes, most: int) -> Iterator[str]:
    """The first `most` bytes in rows of 16, as offset, hex and ASCII, and how many are left."""
    for start in range(0, min(len(value), most), _ROW):
        row = value[start : min(start + _ROW, most)]
        text = "".join(chr(byte) if _FIRST <= byte <= _LAST else "." for byte in row)
        yield f"{start:08x}  {row[:8].hex(' '):<23}  {row[8:].hex(' '):<23}  |{text}|"
    if len(value) > most:
        yield f"… {len(value) - most} bytes more"
