"""Metrics for Prometheus, read from the live objects when they are asked for.

A series is named by a partition or a state, of which there are few, and in one case by a request:
the one that holds W of its partition and stands still. Nothing that a producer writes freely is a
label.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
)
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from splitferry_consumer.observing import TRANSACTION_BOUNDS, Transactions
from splitferry_consumer.partition import PartitionState
from splitferry_consumer.service import Service
from splitferry_consumer.web.health import Disk
from splitferry_consumer.web.status import VERSION, held_since, holder_of, lag

STANDSTILL = 5.0
"""Seconds without new bytes after which the request that holds W is named.

On a busy partition each look finds another one: they would be series without end.
"""
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def exposition(service: Service, disk: Callable[[], Disk]) -> Callable[[], bytes]:
    """What `/metrics` answers, each time that it is called."""
    registry = CollectorRegistry()
    registry.register(_Metrics(service, disk))
    return lambda: generate_latest(registry)


class _Metrics(Collector):
    def __init__(self, service: Service, disk: Callable[[], Disk]) -> None:
        self._service = service
        self._disk = disk

    def describe(self) -> Iterable[Metric]:
        """Nothing ahead: the registry would collect once to learn the names."""
        return ()

    def collect(self) -> Iterator[Metric]:
        yield from self._counters()
        yield from self._gauges()
        yield from self._partitions()

    def _counters(self) -> Iterator[Metric]:
        observer = self._service.observer
        live = [p.ledger.late_duplicates for p in self._service.partitions if p.ledger is not None]
        build = InfoMetricFamily("splitferry_build", "The version that runs")
        build.add_metric([], {"version": VERSION})
        yield build
        yield _labelled(
            CounterMetricFamily,
            "splitferry_received_bytes",
            "Bytes of payload read from the log, repeated ones included",
            "block",
            {block.value: size for block, size in observer.received.items()},
        )
        yield _labelled(
            CounterMetricFamily,
            "splitferry_requests",
            "Results committed",
            "status",
            {status.value: observer.requests[status] for status in observer.requests},
        )
        for name, text, value in (
            ("splitferry_splits", "Splits read from the log", observer.splits),
            (
                "splitferry_duplicate_splits",
                "Splits that added no byte: of requests with a result, and of ended ones",
                observer.duplicates + sum(live),
            ),
            ("splitferry_dead_letters", "Dead letters published", observer.dead_letters),
            (
                "splitferry_partition_retakes",
                "Times that a partition had to be taken again, or was refused",
                observer.retakes,
            ),
        ):
            yield CounterMetricFamily(name, text, value=value)
        yield _transactions(observer.transactions)

    def _gauges(self) -> Iterator[Metric]:
        service, disk = self._service, self._disk()
        for name, text, value in (
            (
                "splitferry_in_flight_bytes",
                "Bytes read and not yet written",
                sum(partition.gauge.bytes for partition in service.partitions),
            ),
            (
                "splitferry_in_flight_limit_bytes",
                "Bytes in flight at which reading pauses",
                service.settings.flow_high,
            ),
            ("splitferry_memory_bytes", "Bytes of mem items held", service.memory.used),
            ("splitferry_memory_limit_bytes", "Most bytes of mem items", service.memory.limit),
            ("splitferry_disk_free_bytes", "Free bytes of the root's file system", disk["free"]),
            ("splitferry_disk_reserve_bytes", "Bytes that stay free", disk["reserve"]),
        ):
            if value is not None:
                yield GaugeMetricFamily(name, text, value=value)

    def _partitions(self) -> Iterator[Metric]:
        partitions = self._service.partitions
        states = Counter(partition.state for partition in partitions)
        yield _labelled(
            GaugeMetricFamily,
            "splitferry_partitions",
            "Partitions of this consumer, by what they are about",
            "state",
            {state.value: states[state] for state in PartitionState},
        )
        taken = {str(p.number): (p, p.ledger) for p in partitions if p.ledger is not None}
        for name, text, values in (
            (
                "splitferry_open_requests",
                "Requests that are open",
                {number: led.open for number, (_, led) in taken.items()},
            ),
            (
                "splitferry_unsettled_requests",
                "Requests that have ended, with their result not committed",
                {number: led.unsettled for number, (_, led) in taken.items()},
            ),
            (
                "splitferry_watermark",
                "W: the offset below which everything has its result",
                {number: led.watermark for number, (_, led) in taken.items()},
            ),
            (
                "splitferry_lag_records",
                "Records of the log that are not read yet",
                {number: far for number, (p, _) in taken.items() if (far := lag(p)) is not None},
            ),
        ):
            yield _labelled(GaugeMetricFamily, name, text, "partition", values)
        age = GaugeMetricFamily(
            "splitferry_watermark_age_seconds",
            "Since the first split of the request that holds W",
            labels=["partition", "request"],
        )
        idle = GaugeMetricFamily(
            "splitferry_watermark_idle_seconds",
            "Since the last split that added bytes to the request that holds W",
            labels=["partition", "request"],
        )
        for number, (partition, _) in taken.items():
            state = holder_of(partition)
            if state is not None and time.monotonic() - state.active_at >= STANDSTILL:
                since, quiet = held_since(state)
                age.add_metric([number, str(state.request)], since)
                idle.add_metric([number, str(state.request)], quiet)
        yield age
        yield idle


def _labelled(
    kind: type[CounterMetricFamily] | type[GaugeMetricFamily],
    name: str,
    text: str,
    label: str,
    values: dict[str, int],
) -> Metric:
    family = kind(name, text, labels=[label])
    for value, number in values.items():
        family.add_metric([value], number)
    return family


def _transactions(transactions: Transactions) -> Metric:
    bounds = [*map(str, TRANSACTION_BOUNDS), "+Inf"]
    return HistogramMetricFamily(
        "splitferry_transaction_seconds",
        "How long the transactions took that were committed",
        buckets=list(zip(bounds, accumulate(transactions.counts), strict=True)),
        sum_value=transactions.seconds,
    )
