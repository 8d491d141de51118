"""Logs on standard error through structlog: for people on a terminal, else JSON lines."""

from __future__ import annotations

import logging
import sys
from typing import Any

import structlog

_TRANSACTION_RETRIES = (
    "ConcurrentTransactions",
    "CONCURRENT_TRANSACTIONS",
    "concurrent transactions",
    "NotEnoughReplicas",
)
"""aiokafka warns of these when a transaction follows the last one at once; it then retries
by itself, and nothing is lost but some 20 ms."""


class _StandardError(logging.Handler):
    """Writes to what `sys.stderr` is now: a progress bar puts a proxy in its place.

    A line at a time, which no other process that writes there too can cut in two.
    """

    def emit(self, record: logging.LogRecord) -> None:
        try:
            sys.stderr.write(f"{self.format(record)}\n")
            sys.stderr.flush()
        except Exception:  # noqa: BLE001  # as every handler of the standard library
            self.handleError(record)


def demote_retries(record: logging.LogRecord) -> bool:
    """Log filter: aiokafka's harmless transaction retries are for debugging only."""
    if record.levelno == logging.WARNING and any(
        sign in record.getMessage() for sign in _TRANSACTION_RETRIES
    ):
        record.levelno, record.levelname = logging.DEBUG, "DEBUG"
        return logging.getLogger().isEnabledFor(logging.DEBUG)
    return True


def configure(*, verbose: bool, service: bool, worker: int | None = None) -> None:
    """Send structlog and the standard library's logging to standard error.

    Args:
        verbose: debug messages too.
        service: the command runs until stopped, so aiokafka's warnings matter. For a command
            that ends, its own error message says what went wrong.
        worker: number of this process among several that write to the same place.
    """

    def numbered(
        _: object, __: str, event: structlog.typing.EventDict
    ) -> structlog.typing.EventDict:
        return event if worker is None else {"worker": worker, **event}

    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        numbered,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    last: list[Any] = [structlog.stdlib.ProcessorFormatter.remove_processors_meta]
    if sys.stderr is not None and sys.stderr.isatty():  # None: closed by who started us
        # Without the values of variables, among which may be a password.
        tracebacks = structlog.dev.RichTracebackFormatter(show_locals=False)
        last.append(structlog.dev.ConsoleRenderer(exception_formatter=tracebacks))
    else:
        last += [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
    handler = _StandardError()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(foreign_pre_chain=shared, processors=last)
    )
    handler.addFilter(demote_retries)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.DEBUG if verbose else logging.INFO)
    quiet = logging.WARNING if service else logging.CRITICAL
    logging.getLogger("aiokafka").setLevel(logging.INFO if verbose else quiet)
    for chatty in ("asyncio", "httpx", "httpcore"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
