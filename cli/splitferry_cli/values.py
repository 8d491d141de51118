"""What option values look like: byte sizes, seconds, moments, request ids, offsets, labels."""

from __future__ import annotations

import math
import re
import time
from datetime import datetime
from fractions import Fraction
from typing import Any

import click

from splitferry_consumer.dead_letters import Position
from splitferry_consumer.modes import mode_problem
from splitferry_protocol.ids import RequestId

_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([kKMGT]?)(i?)(B?)", re.ASCII)
_AGO = re.compile(r"([0-9]{1,9})([smhdw])", re.ASCII)
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_POWERS = {"": 0, "k": 1, "K": 1, "M": 2, "G": 3, "T": 4}


def parse_size(text: str) -> int:
    """Bytes in `text`: plain (`4096`), binary (`512KiB`, `1MiB`) or decimal (`64kB`, `1MB`).

    Raises:
        ValueError: no size, or not a whole number of bytes.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None or (match[3] and not match[2]):
        raise ValueError(f"{text!r} is not a size: write bytes, or 512KiB, 1MiB, 2GiB")
    size = Fraction(match[1]) * (1024 if match[3] else 1000) ** _POWERS[match[2]]
    if size.denominator != 1:
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


class FileMode(click.ParamType[int]):
    """A mode of received files, in octal."""

    name = "octal"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        if not re.fullmatch(r"(0o?)?[0-7]{3,4}", value, re.ASCII):
            self.fail(f"{value!r} is not a file mode: write it in octal, as in 0640", param, ctx)
        mode = int(value.removeprefix("0o"), 8)
        if problem := mode_problem(mode):
            self.fail(
                f"files cannot have the mode {value}: {problem}; try 0640 or 0600", param, ctx
            )
        return mode


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


class Moment(click.ParamType[int]):
    """A moment, as Unix time in ms: a date, with a time perhaps, or a time span ago."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        if match := _AGO.fullmatch(value.strip()):
            return int((time.time() - int(match[1]) * _SECONDS[match[2]]) * 1000)
        try:
            return int(datetime.fromisoformat(value.strip()).timestamp() * 1000)
        except (ValueError, OverflowError):  # also of a year that no clock has
            self.fail(
                f"{value!r} is not a time: write 2026-05-01T12:00 (in your time zone, or with "
                "another behind it, as +00:00), or 90m, 2h, 3d for so long ago",
                param,
                ctx,
            )


class PartitionOffset(click.ParamType[Position]):
    """A place in a topic, `PARTITION:OFFSET`."""

    name = "partition:offset"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Position:
        if isinstance(value, Position):
            return value
        try:
            return Position.parse(value.strip())
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
