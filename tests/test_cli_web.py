"""What `consume --web` takes, and what it says when it cannot serve."""

from __future__ import annotations

import sys

import click
import pytest
from click.testing import CliRunner

from splitferry_cli.app import splitferry
from splitferry_cli.web import Address, AddressType


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:8080", ("127.0.0.1", 8080)),
        ("localhost:0", ("localhost", 0)),
        (":8080", ("127.0.0.1", 8080)),
        ("8080", ("127.0.0.1", 8080)),
        ("[::1]:8080", ("::1", 8080)),
        ("0.0.0.0:65535", ("0.0.0.0", 65535)),
    ],
)
def test_an_address(text: str, address: tuple[str, int]) -> None:
    assert AddressType().convert(text, None, None) == Address(*address)


@pytest.mark.parametrize(
    "text",
    ["", "host", "host:", "host:x", "host:65536", "::1:80", "a:-1", "1" * 5000],
)
def test_what_is_none(text: str) -> None:
    with pytest.raises(click.BadParameter, match="write HOST:PORT"):
        AddressType().convert(text, None, None)


def test_actions_need_a_page() -> None:
    ran = CliRunner().invoke(splitferry, ["consume", "--root", "/nowhere", "--web-actions"])
    assert ran.exit_code == 2
    assert "give its address with --web" in ran.stderr


def test_a_missing_extra_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "splitferry_consumer.web.server", raising=False)
    ran = CliRunner().invoke(splitferry, ["consume", "--root", "/nowhere", "--web", "8080"])
    assert ran.exit_code == 1
    assert "pip install 'splitferry[web]'" in ran.stderr
