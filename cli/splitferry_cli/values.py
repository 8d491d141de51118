"""What option values look like: byte sizes, seconds, request ids, labels."""

from __future__ import annotations

import math
import re
from typing import Any

import click

from splitferry_protocol.ids import RequestId

_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([kKMGT]?)(i?)(B?)", re.ASCII)
_POWERS = {"": 0, "k": 1, "K": 1, "M": 2, "G": 3, "T": 4}


def parse_size(text: str) -> int:
    """Bytes in `text`: plain (`4096`), binary (`512KiB`, `1MiB`) or decimal (`64kB`, `1MB`).

    Raises:
        ValueError: no size, or not a whole number of bytes.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None or (match[3] and not match[2]):
        raise ValueError(f"{text!r} is not a size: write bytes, or 512KiB, 1MiB, 2GiB")
    size = float(match[1]) * (1024 if match[3] else 1000) ** _POWERS[match[2]]
    if "." not in match[1]:
        size = int(match[1]) * (1024 if match[3] else 1000) ** _POWERS[match[2]]
    if size != int(size):
        raise ValueError(f"{text!r} is not a whole number of bytes")
    return int(size)


class ByteSize(click.ParamType[int]):
    """A size in bytes between `least` and `most`."""

    name = "bytes"

    def __init__(self, least: int = 1, most: int | None = None) -> None:
        self.least = least
        self.most = most

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            size = value if isinstance(value, int) else parse_size(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)
        if size < self.least or (self.most is not None and size > self.most):
            bound = f"at least {self.least}" if size < self.least else f"at most {self.most}"
            self.fail(f"{value} is out of range: {bound} bytes", param, ctx)
        return size


class Seconds(click.ParamType[float]):
    """A time span above zero; `nan` and `inf` are none."""

    name = "seconds"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        try:
            seconds = float(value)
        except ValueError:
            seconds = math.nan
        if not (math.isfinite(seconds) and seconds > 0):
            self.fail(f"{value!r} is not a time span: write seconds above 0, as in 30", param, ctx)
        return seconds


class Request(click.ParamType[RequestId]):
    """A request id, `NODE-SEQUENCE`."""

    name = "request"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> RequestId:
        if isinstance(value, RequestId):
            return value
        try:
            return RequestId.parse(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class Label(click.ParamType[tuple[str, str]]):
    """One label, `KEY=VALUE`."""

    name = "key=value"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, str]:
        if isinstance(value, tuple):
            return value
        key, equals, text = str(value).partition("=")
        if not key or not equals:
            self.fail(f"{value!r} is not a label: write KEY=VALUE", param, ctx)
        return key, text
