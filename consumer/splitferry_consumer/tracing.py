"""Trace context that a producer gives in the labels of a request (W3C Trace Context).

`traceparent`, and `tracestate` beside it, travel in `labels` and so into the result by themselves.
Here they get into the log's lines, and, where the program has `opentelemetry-api` (extra `otel`)
with a tracer configured, into one span for each request: from its first split to its result.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import structlog

from splitferry_protocol.records import Result

try:
    from opentelemetry import trace
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
except ImportError:  # the extra `otel` is not installed
    _TRACER = False
else:
    _TRACER = True

log = structlog.get_logger(__name__)

_TRACEPARENT = re.compile(
    r"(?!ff|00-.{49}-..-)"  # version 00 has nothing behind its four fields
    r"[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?",
    re.ASCII,
)


def trace_id(labels: Mapping[str, str] | None) -> str | None:
    """The trace that a request belongs to, 32 hexadecimal digits; None where none is given."""
    match = _TRACEPARENT.fullmatch((labels or {}).get("traceparent", ""))
    return match[1] if match else None


def bound(labels: Mapping[str, str] | None) -> dict[str, str]:
    """What the log's lines about the request carry."""
    found = trace_id(labels)
    return {"trace_id": found} if found else {}


def record(result: Result, opened_at: int) -> None:
    """Tell the tracer of a request that has its result, if its producer gave a trace context.

    It is told whole: a span that is open while the partition is lost would have no end.

    Args:
        opened_at: when the log got the first split, Unix time in ms.
    """
    if not _TRACER or trace_id(result.labels) is None:
        return
    try:
        _tell(result, opened_at)
    except Exception:
        # The tracer is the program's own. What fails there must not cost a partition.
        log.exception("the tracer failed", request=str(result.request))


def _tell(result: Result, opened_at: int) -> None:
    parent = TraceContextTextMapPropagator().extract(dict(result.labels or {}))
    begin = min(opened_at, result.finished_at) if opened_at > 0 else result.finished_at
    span = trace.get_tracer("splitferry").start_span(
        "splitferry receive",
        context=parent,
        kind=trace.SpanKind.CONSUMER,
        start_time=begin * 1_000_000,
        attributes={
            "messaging.system": "kafka",
            "messaging.operation.type": "process",
            "messaging.destination.name": result.input.topic,
            "messaging.destination.partition.id": str(result.input.partition),
            "messaging.kafka.offset": result.input.first,
            "messaging.consumer.group.name": result.group,
            "splitferry.request": str(result.request),
            "splitferry.unique_id": result.unique_id,
            "splitferry.status": result.status,
            "splitferry.splits": result.splits,
        },
    )
    if result.error is not None:
        span.set_status(trace.StatusCode.ERROR, result.error.message)
    span.end(end_time=result.finished_at * 1_000_000)
