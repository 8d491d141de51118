"""Logs: JSON lines on standard error when no person looks on."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator

import pytest
import structlog

from splitferry_cli import logs


@pytest.fixture(autouse=True)
def put_back() -> Iterator[None]:
    root, client = logging.getLogger(), logging.getLogger("aiokafka")
    held = root.handlers[:], root.level, client.level
    yield
    root.handlers[:], root.level, client.level = held
    structlog.reset_defaults()


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, object]]:
    captured = capsys.readouterr()
    assert not captured.out
    return [json.loads(line) for line in captured.err.splitlines()]


def test_events_are_json_lines_with_their_fields(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(verbose=False, service=True)
    log = structlog.get_logger("splitferry_consumer.group")
    log.debug("not shown")
    log.info("task group created", unique_id="a", version=1)
    (line,) = lines(capsys)
    assert line["event"] == "task group created"
    assert (line["unique_id"], line["version"], line["level"]) == ("a", 1, "info")
    assert line["logger"] == "splitferry_consumer.group"


def test_debug_messages_when_verbose(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(verbose=True, service=True)
    structlog.get_logger("splitferry_consumer.group").debug("shown")
    assert [line["event"] for line in lines(capsys)] == ["shown"]


@pytest.mark.parametrize(("service", "heard"), [(True, ["moved"]), (False, [])])
def test_the_client_warns_in_a_service_only(
    capsys: pytest.CaptureFixture[str], service: bool, heard: list[str]
) -> None:
    logs.configure(verbose=False, service=service)
    client = logging.getLogger("aiokafka.consumer.group_coordinator")
    client.info("joined")
    client.warning("moved")
    client.warning("retrying. Error: %s", "ConcurrentTransactions")
    assert [line["event"] for line in lines(capsys)] == heard


def test_an_exception_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(verbose=False, service=True)
    try:
        raise ValueError("why")
    except ValueError:
        structlog.get_logger("splitferry_consumer.partition").exception("failed")
    (line,) = lines(capsys)
    assert "ValueError: why" in str(line["exception"])


def test_a_standard_error_that_is_closed_changes_nothing() -> None:
    ended = subprocess.run(
        ["sh", "-c", '"$0" -m splitferry_cli completion bash 2>&-', sys.executable],
        stdout=subprocess.PIPE, check=False, timeout=30,
    )  # fmt: skip
    assert ended.returncode == 0
    assert ended.stdout
