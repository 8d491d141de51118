"""Trace context in labels: carried to the result, to log lines, and to one span."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from bench import captured_logs
from owners import results, until
from splitferry_consumer import tracing
from splitferry_protocol.records import Block
from watching import Watched, watched
from world import split

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
LABELS = {"traceparent": f"00-{TRACE}-{SPAN}-01", "tracestate": "vendor=1", "team": "blue"}


@pytest.fixture(scope="module")
def exporter() -> InMemorySpanExporter:
    """A program has one provider."""
    made = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(made))
    trace.set_tracer_provider(provider)
    return made


@pytest.fixture
def spans(exporter: InMemorySpanExporter) -> Iterator[InMemorySpanExporter]:
    exporter.clear()
    yield exporter
    exporter.clear()


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (f"00-{TRACE}-{SPAN}-01", TRACE),
        (f"cc-{TRACE}-{SPAN}-01-what-comes", TRACE),
        (f"00-{TRACE}-{SPAN}-01-what-comes", None),
        (f"ff-{TRACE}-{SPAN}-01", None),
        (f"00-{TRACE.upper()}-{SPAN}-01", None),
        (f"00-{'0' * 32}-{SPAN}-01", None),
        (f"00-{TRACE}-{'0' * 16}-01", None),
        (f"00-{TRACE}-{SPAN}-01\n", None),
        ("", None),
        ("<script>", None),
    ],
)
def test_what_a_trace_context_is(given: str, found: str | None) -> None:
    assert tracing.trace_id({"traceparent": given}) == found
    assert tracing.bound({"traceparent": given}) == ({"trace_id": found} if found else {})


def test_without_labels_there_is_no_trace() -> None:
    assert tracing.trace_id(None) is None
    assert tracing.bound({"team": "blue"}) == {}


@pytest.fixture
async def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Watched]:
    async with watched(tmp_path / "root", monkeypatch, partitions=1) as made:
        yield made


async def test_a_request_is_one_span_of_its_producers_trace(
    page: Watched, spans: InMemorySpanExporter
) -> None:
    page.kafka.send(split(1, 0, b"half", total=8, block=Block.FILE, labels=LABELS))
    await until(lambda: page.service.observer.splits == 1)
    assert spans.get_finished_spans() == ()
    page.kafka.send(split(1, 4, b"half", total=8, block=Block.FILE))
    page.kafka.send(split(2, 0, b"whole", total=5, block=Block.FILE))
    await until(lambda: len(page.service.observer.results) == 2)
    (span,) = spans.get_finished_spans()
    assert span.context is not None
    assert span.parent is not None
    assert f"{span.context.trace_id:032x}" == TRACE
    assert f"{span.parent.span_id:016x}" == SPAN
    assert span.context.trace_state.to_header() == "vendor=1"
    (result,) = (r for r in results(page.kafka) if r.labels)
    assert result.labels == LABELS
    assert span.start_time == 1000 * 10**6, "what the log says of the first split"
    assert span.end_time == result.finished_at * 10**6
    assert span.attributes is not None
    assert span.attributes["splitferry.request"] == "1-1"
    assert span.attributes["splitferry.status"] == "completed"
    assert span.status.is_unset


async def test_a_failure_is_a_failed_span(page: Watched, spans: InMemorySpanExporter) -> None:
    for version in (1, 2):
        page.kafka.send(split(1, 0, b"half", total=8, version=version, labels=LABELS))
    await until(lambda: len(page.service.observer.results) == 1)
    (span,) = spans.get_finished_spans()
    assert span.status.status_code is trace.StatusCode.ERROR
    assert "version" in (span.status.description or "")


async def test_a_tracer_that_fails_costs_no_partition(
    page: Watched, spans: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: object) -> None:
        raise RuntimeError("no spans today")

    monkeypatch.setattr(trace, "get_tracer", fails)
    with captured_logs() as logs:
        page.kafka.send(split(1, 0, b"whole", total=5, labels=LABELS))
        await until(lambda: len(page.service.observer.results) == 1)
        page.kafka.send(split(2, 0, b"whole", total=5))
        await until(lambda: len(page.service.observer.results) == 2)
    assert [line["request"] for line in logs if line["event"] == "the tracer failed"] == ["1-1"]
    assert page.service.observer.retakes == 0
    assert spans.get_finished_spans() == ()


async def test_without_the_api_nothing_is_told(
    page: Watched, spans: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracing, "_TRACER", False)
    page.kafka.send(split(1, 0, b"whole", total=5, labels=LABELS))
    await until(lambda: len(page.service.observer.results) == 1)
    assert spans.get_finished_spans() == ()


async def test_log_lines_about_the_request_name_its_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with captured_logs() as logs:
        async with watched(tmp_path / "root", monkeypatch, partitions=1) as page:
            page.kafka.send(split(1, 0, b"whole", total=5, labels=LABELS))
            page.kafka.send(split(2, 0, b"whole", total=5))
            await until(lambda: len(page.service.observer.results) == 2)
    lines = {line["request"]: line for line in logs if line["event"] == "task group created"}
    assert lines["1-1"]["trace_id"] == TRACE
    assert "trace_id" not in lines["1-2"]
