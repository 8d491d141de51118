"""What `splitferry replay` is told, and how it tells."""

from __future__ import annotations

import io
import json
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from splitferry_cli.app import splitferry
from splitferry_cli.failures import Failure
from splitferry_cli.output import Output
from splitferry_cli.replay import Account, fields_of, text_of
from splitferry_cli.values import Moment
from splitferry_consumer.replay import Outcome, Report
from splitferry_protocol.ids import RequestId
from splitferry_protocol.records import Block

ONE = RequestId(7, 42)
WHOLE = Report(
    ONE, Outcome.COMPLETE, 3, 10, 12, "a/b", 5, Block.FILE, 2048, bytes(32), recorded=True
)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "give either --to DIR, to rebuild, or --dry-run, to verify only"),
        (["--to", "x", "--dry-run"], "give either --to DIR, to rebuild, or --dry-run"),
        (["--dry-run", "--request", "7-1", "--since", "1h"], "--request names requests; a time"),
        (["--dry-run", "--request", "7-1", "--to-offset", "0:7"], "--request names requests"),
        (["--dry-run", "--from-offset", "7"], "'7' is not PARTITION:OFFSET, as in 0:12"),
        (
            ["--dry-run", "--from-offset", "0:5", "--to-offset", "0:2"],
            "0:5 lies behind --to-offset 0:2",
        ),
        (["--dry-run", "--since", "1h", "--until", "2h"], "--since lies behind --until"),
        (["--dry-run", "--until", "soon"], "'soon' is not a time: write 2026-05-01T12:00"),
    ],
)
def test_wrong_usage_is_one_line_with_the_remedy(args: list[str], said: str) -> None:
    outcome = CliRunner().invoke(splitferry, ["replay", *args], prog_name="splitferry")
    assert outcome.exit_code == 2
    assert said in outcome.output
    assert "splitferry replay --help" in outcome.output


def test_moments() -> None:
    kind = Moment()
    assert kind.convert("1970-01-01T00:00:02.5+00:00", None, None) == 2500
    assert kind.convert("1970-01-02T01:00+01:00", None, None) == 86_400_000
    local = datetime(2026, 5, 1, 12, tzinfo=UTC).astimezone().strftime("%Y-%m-%d %H:%M")
    assert kind.convert(local, None, None) == 1_777_636_800_000
    assert kind.convert(2500, None, None) == 2500
    for text, seconds in {"90s": 90, "5m": 300, "2h": 7200, "3d": 259_200, "1w": 604_800}.items():
        ago = time.time() - kind.convert(text, None, None) / 1000
        assert ago == pytest.approx(seconds, abs=5)


def test_a_report_for_people_names_what_they_ask_for() -> None:
    assert text_of(WHOLE).plain == (
        "complete   7-42  a/b v5  2.0 KiB  partition 3 offsets 10 to 12"
    )
    hostile = Report(ONE, Outcome.COMPLETE, 0, 1, 2, "\x1b[31m", 1, Block.FILE, 1, bytes(32))
    assert "\\x1b[31m" in text_of(hostile).plain
    assert text_of(hostile).plain.endswith("no result is recorded")
    missing = [(100 * n, 100 * n + 50) for n in range(7)]
    open_ = Report(
        ONE, Outcome.INCOMPLETE, 0, 1, None, "a", 1, Block.FILE, missing=[*missing, (900, None)]
    )
    assert text_of(open_).plain == (
        "incomplete 7-42  a v1  partition 0 offsets 1 to …  missing 0 to 50, 100 to 150, "
        "200 to 250, 300 to 350, 400 to 450 and 3 more"
    )
    assert text_of(Report(ONE, Outcome.UNKNOWN, reason="why")).plain == "unknown    7-42  why"


def test_a_report_for_programs_has_every_range(capsys: pytest.CaptureFixture[str]) -> None:
    with Account(Output(as_json=True), set()) as account:
        account.report(WHOLE)
        account.note(None, "good to know")
    account.conclude()
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert told == [
        {
            "request": "7-42", "outcome": "complete", "partition": 3, "first": 10, "last": 12,
            "unique_id": "a/b", "version": 5, "block": "file", "size": 2048,
            "sha256": "00" * 32, "missing": [], "reason": None, "recorded": True,
        },
        {"partition": None, "note": "good to know"},
        {"outcomes": {"complete": 1}, "bytes": 0, "errors": 0},
    ]  # fmt: skip
    open_ = Report(ONE, Outcome.INCOMPLETE, missing=[(n, n + 1) for n in range(0, 20, 2)])
    assert len(fields_of(open_)["missing"]) == 10


@pytest.mark.parametrize(
    ("outcome", "of_all", "by_id"),
    [
        (Outcome.COMPLETE, True, True),
        (Outcome.PRESENT, True, True),
        (Outcome.SUPERSEDED, True, True),
        (Outcome.FAILED, True, False),
        (Outcome.ABORTED, True, False),
        (Outcome.EXPIRED, True, False),
        (Outcome.INCOMPLETE, False, False),
        (Outcome.DELETED, False, False),
        (Outcome.DAMAGED, False, False),
        (Outcome.UNWRITTEN, False, False),
        (Outcome.UNKNOWN, False, False),
    ],
)
def test_what_counts_as_there(outcome: Outcome, of_all: bool, by_id: bool) -> None:
    for asked, there in ((set[RequestId](), of_all), ({ONE}, by_id)):
        account = Account(Output(as_json=True), asked)
        account.report(Report(ONE, outcome))
        if there:
            account.conclude()
        else:
            with pytest.raises(Failure, match="1 request is not there"):
                account.conclude()


def test_a_partition_that_could_not_be_read_is_a_failure() -> None:
    account = Account(Output(as_json=True), set())
    account.report(WHOLE)
    account.trouble(2, "the leader is away")
    with pytest.raises(Failure, match="1 partition could not be read to the end"):
        account.conclude()


def test_the_bar_shows_bytes_rate_and_what_remains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("splitferry_cli.replay.REFRESH", 0)
    shown = io.StringIO()
    output = Output(as_json=False)
    output.console = Console(file=shown, force_terminal=True, width=120)
    with Account(output, set()) as account:
        account.to_read(100)
        for _ in range(25):
            time.sleep(0.01)
            account.have_read(2, 1024 * 1024)
        account._progress.refresh()
    drawn = shown.getvalue()
    assert " 50%" in drawn
    assert "25.0 MiB" in drawn
    assert "MiB/s" in drawn
    assert "0:00:0" in drawn


def test_to_is_a_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    args = ["replay", "--to", str(tmp_path / "file")]
    outcome = CliRunner().invoke(splitferry, args, prog_name="splitferry")
    assert outcome.exit_code == 2
    assert "is a file" in outcome.output
