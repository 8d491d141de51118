"""What a command says on standard output: lines for people, or one JSON object per line."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from rich.console import Console
from rich.text import Text

from splitferry_protocol.ids import RequestId
from splitferry_protocol.records import Result, Status

STYLES = {
    Status.COMPLETED: "green",
    Status.FAILED: "red",
    Status.ABORTED: "yellow",
    Status.EXPIRED: "yellow",
}


class _Console(Console):
    def on_broken_pipe(self) -> None:
        # Rich's own ends the program in the middle of a task.
        raise BrokenPipeError


class Output:
    """Standard output in the form that was asked for."""

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json
        if isinstance(sys.stdout, io.TextIOWrapper):
            # A name that the terminal's encoding lacks is no reason to fail.
            sys.stdout.reconfigure(errors="backslashreplace")
        self.console: Console = _Console(highlight=False, markup=False, emoji=False, soft_wrap=True)

    @property
    def live(self) -> bool:
        """Progress bars make sense: a person looks on."""
        return self.console.is_terminal and not self.as_json

    def tell(self, fields: Mapping[str, Any], text: str | Text) -> None:
        """Print `fields` for a program, or `text` for a person."""
        if self.as_json:
            self.console.file.write(json.dumps(plain(fields)) + "\n")
            self.console.file.flush()
        else:
            self.console.print(text)

    def note(self, text: str | Text) -> None:
        """Print what is for people only."""
        if not self.as_json:
            self.console.print(text)

    def result(self, result: Result) -> None:
        """One line for one result."""
        self.tell(result_fields(result), result_text(result))


def plain(value: Any) -> Any:
    """`value` as JSON can have it: bytes as hex, request ids as `7-42`."""
    if isinstance(value, RequestId):
        return str(value)
    if isinstance(value, (bytes, bytearray, memoryview)):
        return value.hex()
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(part) for part in value]
    return value


def printable(text: str) -> str:
    """`text` with escapes for what would steer a terminal: names come from anywhere."""
    return "".join(
        one if one.isprintable() else one.encode("unicode_escape", "surrogatepass").decode()
        for one in text
    )


def human_size(size: float) -> str:
    """Bytes for people: `3.2 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < (1024 if unit == "B" else 1023.95):  # what would be rounded to 1024.0
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def local_time(moment: int) -> str:
    """A Unix time in ms for people, and for options that take a time."""
    try:
        return f"{datetime.fromtimestamp(moment / 1000).astimezone():%Y-%m-%d %H:%M:%S%z}"
    except (ValueError, OverflowError, OSError):
        return str(moment)  # whoever wrote the record chose it, and no calendar has it


def ranges(missing: Sequence[tuple[int, int | None]], count: int) -> str:
    """`50 to 100, 200 to the end` (first byte, first byte after), of `count` ranges."""
    shown = ", ".join(f"{start} to {'the end' if end is None else end}" for start, end in missing)
    left = count - len(missing)
    return f"{shown} and {left} more" if left > 0 else shown


def counted(number: int, one: str, many: str) -> str:
    """`1 item`, `2 items`."""
    return f"{number} {one if number == 1 else many}"


def result_fields(result: Result) -> dict[str, Any]:
    """A result for programs: what `send --json` promises (CLI), and the rest of the record."""
    return {
        "request": result.request,
        "unique_id": result.unique_id,
        "version": result.version,
        "status": str(result.status),
        "size": result.size,
        "sha256": result.sha256,
        "error": None if result.error is None else result.error.to_wire(),
        "group": result.group,
        "target": result.target,
        "labels": result.labels,
        "splits": result.splits,
        "duplicates": result.duplicates,
        "input": result.input,
        "repeat": result.repeat,
        "finished_at": result.finished_at,
    }


def result_text(result: Result) -> Text:
    text = Text()
    text.append(f"{result.status:<9}", style=STYLES[result.status])
    text.append(f" {result.request}  {printable(result.unique_id)} v{result.version}")
    if result.size is not None:
        text.append(f"  {human_size(result.size)}")
    if result.sha256 is not None:
        text.append(f"  sha256 {result.sha256.hex()[:16]}", style="dim")
    if result.error is not None:
        text.append(f"  {result.error.code}: {printable(result.error.message)}", style="red")
    elif result.target:
        text.append(f"  → {printable(str(result.target.get('path') or result.target.get('shm')))}")
    return text
