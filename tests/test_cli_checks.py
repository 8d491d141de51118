"""The checks after a transfer that need no broker."""

from __future__ import annotations

from pathlib import Path

import pytest

from splitferry_cli.checks import PIECE, nothing_left, same_files


def pair(tmp_path: Path, sent: bytes, arrived: bytes | None) -> tuple[Path, Path]:
    one, other = tmp_path / "sent", tmp_path / "arrived"
    one.write_bytes(sent)
    if arrived is not None:
        other.write_bytes(arrived)
    return one, other


@pytest.mark.parametrize("content", [b"", b"x", b"x" * PIECE, b"x" * PIECE + b"y"])
def test_files_that_are_the_same(tmp_path: Path, content: bytes) -> None:
    assert same_files([pair(tmp_path, content, content)]) is None


@pytest.mark.parametrize(
    ("sent", "arrived"),
    [
        (b"", None),
        (b"", b"x"),
        (b"x", b""),
        (b"x", b"y"),
        (b"x" * PIECE, b"x" * PIECE + b"y"),
        (b"x" * PIECE + b"y", b"x" * PIECE),
        (b"x" * PIECE + b"y", b"x" * PIECE + b"z"),
    ],
)
def test_files_that_differ(tmp_path: Path, sent: bytes, arrived: bytes | None) -> None:
    told = same_files([pair(tmp_path, sent, arrived)])
    assert told is not None
    assert "arrived" in told


def test_what_is_left(tmp_path: Path) -> None:
    assert nothing_left(tmp_path) is None
    owner = tmp_path / ".splitferry/incoming/owner"
    owner.mkdir(parents=True)
    (owner / "lock").touch()
    assert nothing_left(tmp_path) is None
    (owner / "7").touch()
    assert nothing_left(tmp_path) == "temporary files are left: 7"
