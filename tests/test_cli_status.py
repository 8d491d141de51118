"""How `splitferry status` advises and shows what it saw."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from splitferry_cli.cluster import Members
from splitferry_cli.output import Output
from splitferry_cli.status import Look, _rows, _screen
from splitferry_consumer.onlooker import SurveyedPartition
from splitferry_consumer.survey import SurveyedRequest
from splitferry_protocol.ids import RequestId
from splitferry_protocol.records import Status

ONE = RequestId(4294967295, 42)
ABORT = f'splitferry abort {ONE} --group archive --reason "TEXT"'


def seen(owner: str | None, status: Status | None = None) -> Look:
    """One partition whose W is held by a request that got its last bytes long ago."""
    holder = SurveyedRequest(
        ONE, 3, "a", 1, "file", status, None, 40, 20, [(20, 40)], 1, opened_at=0, grown_at=0
    )
    view = SurveyedPartition(0, 3, 0, 5, 5, 3, 5, 1, 0, holder, [holder])
    return Look([view], Members(1, {} if owner is None else {0: owner}))


@pytest.mark.parametrize("status", [None, Status.COMPLETED])
def test_without_a_consumer_the_advice_is_to_start_one(status: Status | None) -> None:
    ((fields, text),) = _rows("archive", seen(None, status))
    assert fields["advice"].startswith("no consumer reads the partition")
    assert fields["advice"].endswith(": splitferry consume --group archive --root DIR")
    assert "wait" not in text.plain


def test_the_command_to_copy_has_a_line_of_its_own_on_a_narrow_terminal() -> None:
    shown = io.StringIO()
    output = Output(as_json=False)
    output.console = Console(file=shown, force_terminal=True, width=80, height=50)
    rows = _rows("archive", seen("here"))
    assert rows[0][0]["advice"].endswith(f": {ABORT}")
    with _screen(output) as show:
        show(rows)
    assert ABORT in [line.strip() for line in shown.getvalue().splitlines()]
