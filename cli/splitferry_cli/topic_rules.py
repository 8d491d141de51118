"""How the three topics should be set up, and what is wrong with the ones that are there.

The rules are WIRE's ("Topics", "dead letters"); no I/O here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from splitferry_protocol.records import HEADER_MAX

OVERHEAD = 1024 * 1024
"""Room beside the payload for header, key, record headers and Kafka's batch, in bytes."""
SMALLEST_SPLIT = 512 * 1024
"""Payload bytes that the splits topic must take: the producer's default split."""
DEAD_LETTER_EXTRA = 64 * 1024
RESULT_BYTES = 64 * 1024
DAY_MS = 24 * 3600 * 1000
SPLITS_RETENTION_MS = 7 * DAY_MS
RESULTS_RETENTION_MS = 30 * DAY_MS


@dataclass(frozen=True, slots=True)
class Topic:
    """A topic as the broker describes it."""

    name: str
    partitions: int
    replication: int
    settings: Mapping[str, str] = field(default_factory=dict)

    def number(self, setting: str, default: int) -> int:
        return int(self.settings.get(setting) or default)

    @property
    def record_bytes(self) -> int:
        return self.number("max.message.bytes", 1_048_588)

    @property
    def retention_ms(self) -> float:
        """-1 in Kafka is for ever: infinity here."""
        held = self.number("retention.ms", SPLITS_RETENTION_MS)
        return held if held >= 0 else float("inf")


@dataclass(frozen=True, slots=True)
class Names:
    splits: str
    results: str
    dead_letters: str


@dataclass(frozen=True, slots=True)
class Finding:
    """Something wrong with a topic, and the command that mends it."""

    topic: str
    problem: str
    remedy: str


def wanted_settings(names: Names, split_size_max: int) -> dict[str, dict[str, str]]:
    """Settings by topic, for splits with up to `split_size_max` bytes of payload."""
    splits = split_size_max + OVERHEAD
    return {
        names.splits: {
            "cleanup.policy": "delete",
            "max.message.bytes": str(splits),
            "retention.ms": str(SPLITS_RETENTION_MS),
        },
        names.results: {
            "cleanup.policy": "delete",
            "retention.ms": str(RESULTS_RETENTION_MS),
        },
        names.dead_letters: {
            "cleanup.policy": "delete",
            "max.message.bytes": str(splits + DEAD_LETTER_EXTRA),
            "retention.ms": str(RESULTS_RETENTION_MS),
        },
    }


def findings(names: Names, topics: Mapping[str, Topic], servers: str) -> list[Finding]:
    """All that is wrong with the topics; `servers` stands in the commands that mend it."""
    return list(_findings(names, topics, servers))


def _findings(names: Names, topics: Mapping[str, Topic], servers: str) -> Iterator[Finding]:
    def alter(topic: str, setting: str, value: object) -> str:
        return (
            f"kafka-configs.sh --bootstrap-server {servers} --alter --entity-type topics "
            f"--entity-name {topic} --add-config {setting}={value}"
        )

    for name in (names.splits, names.results, names.dead_letters):
        topic = topics.get(name)
        if topic is None:
            yield Finding(
                name,
                "does not exist, or this user may not see it",
                f"splitferry --bootstrap-servers {servers} --splits-topic {names.splits} "
                f"--results-topic {names.results} --dead-letters-topic {names.dead_letters} "
                "topics create",
            )
            continue
        if "compact" in topic.settings.get("cleanup.policy", "delete"):
            yield Finding(
                name,
                "is compacted: records of a request would vanish",
                alter(name, "cleanup.policy", "delete"),
            )
        in_sync = topic.number("min.insync.replicas", 1)
        if in_sync > topic.replication:
            yield Finding(
                name,
                f"wants {in_sync} replicas in sync but has {topic.replication}: "
                "nothing can be written",
                alter(name, "min.insync.replicas", topic.replication),
            )

    splits, results = topics.get(names.splits), topics.get(names.results)
    letters = topics.get(names.dead_letters)
    if splits and splits.record_bytes < SMALLEST_SPLIT + 2 * HEADER_MAX:
        yield Finding(
            splits.name,
            f"takes records of {splits.record_bytes} bytes only: too small for splits of "
            f"{SMALLEST_SPLIT} bytes",
            alter(splits.name, "max.message.bytes", SMALLEST_SPLIT + OVERHEAD),
        )
    if results and results.record_bytes < RESULT_BYTES:
        yield Finding(
            results.name,
            f"takes records of {results.record_bytes} bytes only: too small for results",
            alter(results.name, "max.message.bytes", OVERHEAD),
        )
    if splits and letters and letters.record_bytes < splits.record_bytes + DEAD_LETTER_EXTRA:
        yield Finding(
            letters.name,
            f"takes records of {letters.record_bytes} bytes only: a dead letter needs "
            f"{DEAD_LETTER_EXTRA} more than the {splits.record_bytes} of {splits.name}",
            alter(letters.name, "max.message.bytes", splits.record_bytes + DEAD_LETTER_EXTRA),
        )
    if splits and results:
        if results.partitions < splits.partitions:
            yield Finding(
                results.name,
                f"has {results.partitions} partitions, fewer than the {splits.partitions} "
                f"of {splits.name}",
                f"kafka-topics.sh --bootstrap-server {servers} --alter "
                f"--topic {results.name} --partitions {splits.partitions}",
            )
        if results.retention_ms < splits.retention_ms:
            keep = int(splits.retention_ms) if splits.retention_ms != float("inf") else -1
            yield Finding(
                results.name,
                f"forgets results after {results.retention_ms:.0f} ms, before {splits.name} "
                "forgets their splits: requests could be done twice",
                alter(results.name, "retention.ms", keep),
            )
        if results.number("retention.bytes", -1) != -1:
            yield Finding(
                results.name,
                "forgets results by size (retention.bytes), whatever their age",
                alter(results.name, "retention.bytes", -1),
            )
