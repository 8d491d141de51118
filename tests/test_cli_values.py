"""Option values: sizes, seconds, request ids, labels."""

from __future__ import annotations

from typing import Any

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitferry_cli.values import ByteSize, FileMode, Label, Request, Seconds, parse_size
from splitferry_protocol.ids import RequestId


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("512KiB", 512 * 1024),
        ("1MiB", 1024**2),
        ("1.5 MiB", 1536 * 1024),
        ("2Gi", 2 * 1024**3),
        ("64kB", 64_000),
        ("1TB", 10**12),
        ("7B", 7),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@given(st.integers(0, 2**70))
def test_plain_bytes_are_exact(size: int) -> None:
    assert parse_size(str(size)) == size
    assert parse_size(f"{size}KiB") == size * 1024


@pytest.mark.parametrize("text", ["", "-1", "1.5", "KiB", "1iB", "1XB", "1e3", "٣", "nan", "1 2"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="not a"):
        parse_size(text)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (ByteSize(10, 20), "9"),
        (ByteSize(10, 20), "21"),
        (ByteSize(), "much"),
        (Seconds(), "0"),
        (Seconds(), "nan"),
        (Seconds(), "inf"),
        (Seconds(), "soon"),
        (FileMode(), "640640"),
        (FileMode(), "rw-"),
        (FileMode(), "0648"),
        (FileMode(), "0666"),
        (FileMode(), "0750"),
        (FileMode(), "0440"),
        (Request(), "7"),
        (Request(), "07-1"),
        (Label(), "novalue"),
        (Label(), "=x"),
    ],
)
def test_bad_values_are_refused_by_name(kind: click.ParamType[Any], text: str) -> None:
    with pytest.raises(click.BadParameter) as refused:
        kind.convert(text, None, None)
    assert text in refused.value.message


def test_good_values_pass_and_pass_again() -> None:
    for kind, text, value in (
        (ByteSize(1, 20), "20", 20),
        (Seconds(), "0.5", 0.5),
        (FileMode(), "0600", 0o600),
        (FileMode(), "640", 0o640),
        (FileMode(), "0o644", 0o644),
        (Request(), "7-42", RequestId(7, 42)),
        (Label(), "a=b=c", ("a", "b=c")),
    ):
        once = kind.convert(text, None, None)
        assert once == value
        assert kind.convert(once, None, None) == value


@pytest.mark.parametrize(("text", "size"), [("1.001kB", 1001), ("1.005GB", 1_005_000_000)])
def test_a_size_with_a_point_is_exact(text: str, size: int) -> None:
    assert parse_size(text) == size


def test_a_huge_size_is_wrong_usage() -> None:
    with pytest.raises(ValueError, match="not a whole number"):
        parse_size("9" * 310 + ".5")
