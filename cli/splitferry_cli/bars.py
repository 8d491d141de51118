"""Progress bars: one for everything, and one for each item on its way."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Self

from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from .output import Output, human_size


class _Rate(ProgressColumn):
    """Rich's own counts in MB, beside MiB."""

    def render(self, task: Task) -> Text:
        return Text("?" if task.speed is None else f"{human_size(task.speed)}/s")


class Shown:
    """Progress in `columns`, for a block. Shown only where a person looks on."""

    def __init__(self, output: Output, *columns: ProgressColumn) -> None:
        self._progress = Progress(
            *columns, console=output.console, transient=True, disable=not output.live
        )

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()


class Bars(Shown):
    """`total` is bytes, None when it is not known."""

    def __init__(self, output: Output, total: int | None) -> None:
        super().__init__(
            output,
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            DownloadColumn(binary_units=True),
            _Rate(),
            TimeRemainingColumn(),
        )
        self._whole = self._progress.add_task("all", total=total)

    @contextlib.contextmanager
    def item(self, name: str, total: int | None) -> Iterator[Callable[[int], None]]:
        """A bar for one item; the function it gives is told how many bytes more were sent."""
        bar = self._progress.add_task(name, total=total)

        def more(size: int) -> None:
            self._progress.advance(bar, size)
            self._progress.advance(self._whole, size)

        try:
            yield more
        finally:
            self._progress.remove_task(bar)
