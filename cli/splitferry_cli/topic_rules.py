"""How the three topics should be set up, and what is wrong with the ones that are there.

The rules are WIRE's ("Topics", "dead letters") and what DESIGN says of S and of retention; no
I/O here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from splitferry_producer.splitting import DEFAULT_SIZE, OVERHEAD, TOPIC_DEFAULT

ROOM = 1024 * 1024
"""Bytes beside the payload that a topic is made with: more than the producer's OVERHEAD, so that
it need not be altered for whatever comes to need some."""
DEAD_LETTER_EXTRA = 64 * 1024
RESULT_BYTES = 256 * 1024
"""A batch of results, as a consumer publishes them."""
DAY_MS = 24 * 3600 * 1000
SPLITS_RETENTION_MS = 7 * DAY_MS
RESULTS_RETENTION_MS = 30 * DAY_MS
SPLITS_RETENTION_LEAST_MS = DAY_MS
"""A night without consumers costs nothing then."""
BY_BROKER = "LogAppendTime"
"""The time of a record is when the broker took it."""
REPLICAS = 3
"""Copies of each partition where there are so many brokers: one may be lost while another is
stopped for its upgrade."""
_NAMED = 8
"""Partitions that a finding names; of more it tells the number."""


@dataclass(frozen=True, slots=True)
class Replicas:
    """Which brokers hold a partition."""

    partition: int
    leader: int
    """-1: none."""
    held_by: Sequence[int]
    in_sync: Sequence[int]

    @property
    def behind(self) -> set[int]:
        return set(self.held_by) - set(self.in_sync)


@dataclass(frozen=True, slots=True)
class Topic:
    """A topic as the brokers describe it."""

    name: str
    partitions: int
    replication: int
    settings: Mapping[str, str] = field(default_factory=dict)
    replicas: Sequence[Replicas] = ()

    def number(self, setting: str, default: int) -> int:
        return int(self.settings.get(setting) or default)

    @property
    def record_bytes(self) -> int:
        return self.number("max.message.bytes", TOPIC_DEFAULT)

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
class Setting:
    """A setting that `topics create` gives to a topic, and what it is for."""

    name: str
    value: str
    reason: str


@dataclass(frozen=True, slots=True)
class Finding:
    """Something about a topic, and the command or setting that mends it."""

    topic: str
    problem: str
    remedy: str
    advice: bool = False
    """Everything works as it is, until a broker or a night fails."""


def wanted_settings(
    names: Names, split_size_max: int, replication: int = 1
) -> dict[str, list[Setting]]:
    """Settings by topic, for splits with up to `split_size_max` bytes of payload."""
    splits = split_size_max + ROOM
    common = [
        Setting(
            "cleanup.policy",
            "delete",
            "compaction would leave one record of each request, since they share their key",
        ),
        Setting(
            "message.timestamp.type",
            BY_BROKER,
            "retention and --since go by one clock; a writer's wrong one would have its records "
            "refused, or deleted too early",
        ),
    ]
    if replication >= REPLICAS:
        common.append(
            Setting(
                "min.insync.replicas",
                "2",
                "what counts as written is on two brokers, and one may be down meanwhile",
            )
        )
    return {
        names.splits: [
            *common,
            Setting(
                "max.message.bytes",
                str(splits),
                "the largest split (--split-size-max) with its header and Kafka's batch",
            ),
            Setting(
                "retention.ms",
                str(SPLITS_RETENTION_MS),
                "how long splits may wait for a consumer, and how far back a replay reaches",
            ),
            Setting(
                "compression.type",
                "producer",
                "any other makes the broker unpack every batch in its own heap, which a small "
                "batch can exhaust",
            ),
        ],
        names.results: [
            *common,
            Setting(
                "retention.ms",
                str(RESULTS_RETENTION_MS),
                "longer than the splits: splits that outlive their result would be done again",
            ),
            Setting(
                "retention.bytes",
                "-1",
                "results are deleted by their age alone, since the splits may be older",
            ),
        ],
        names.dead_letters: [
            *common,
            Setting(
                "max.message.bytes",
                str(splits + DEAD_LETTER_EXTRA),
                "a split with the headers that say what was wrong with it; larger ones leave a "
                "stub",
            ),
            Setting(
                "retention.ms",
                str(RESULTS_RETENTION_MS),
                "the time to look at what came damaged, and to send it again",
            ),
        ],
    }


def findings(
    names: Names,
    topics: Mapping[str, Topic],
    servers: str,
    *,
    brokers: int = 1,
    split_size: int = DEFAULT_SIZE,
) -> list[Finding]:
    """All that is to be said of the topics, in their order.

    Args:
        servers: stand in the commands that mend.
        brokers: how many there are.
        split_size: bytes of payload that the producers' splits have.
    """
    return list(_Check(names, topics, servers, brokers, split_size).all())


@dataclass(frozen=True, slots=True)
class _Check:
    names: Names
    topics: Mapping[str, Topic]
    servers: str
    brokers: int
    split_size: int

    def all(self) -> Iterator[Finding]:
        for name in (self.names.splits, self.names.results, self.names.dead_letters):
            topic = self.topics.get(name)
            if topic is None:
                yield self._missing(name)
                continue
            yield from self._replicas(topic)
            yield from self._durability(topic)
            yield from self._settings(topic)
        splits, results = self.topics.get(self.names.splits), self.topics.get(self.names.results)
        letters = self.topics.get(self.names.dead_letters)
        if splits:
            yield from self._splits(splits)
        if results:
            yield from self._results(results)
        if splits and letters and letters.record_bytes < splits.record_bytes + DEAD_LETTER_EXTRA:
            yield Finding(
                letters.name,
                f"takes records of {letters.record_bytes} bytes only: a dead letter needs "
                f"{DEAD_LETTER_EXTRA} more than the {splits.record_bytes} of {splits.name}",
                self._alter(letters, "max.message.bytes", splits.record_bytes + DEAD_LETTER_EXTRA),
            )
        if splits and results:
            yield from self._results_of(splits, results)

    def _missing(self, name: str) -> Finding:
        names = self.names
        return Finding(
            name,
            "does not exist",
            f"splitferry --bootstrap-servers {self.servers} --splits-topic {names.splits} "
            f"--results-topic {names.results} --dead-letters-topic {names.dead_letters} "
            "topics create",
        )

    # ---- each topic

    def _replicas(self, topic: Topic) -> Iterator[Finding]:
        leaderless = [one for one in topic.replicas if one.leader < 0]
        if leaderless:
            yield Finding(
                topic.name,
                f"has no leader for {_partitions(leaderless)}: nothing can be read or written",
                f"start {_brokers({b for one in leaderless for b in one.held_by})}",
            )
        behind = [one for one in topic.replicas if one.leader >= 0 and one.behind]
        if behind:
            least = topic.number("min.insync.replicas", 1)
            stopped = [one for one in behind if len(one.in_sync) < least]
            brokers = _brokers({broker for one in behind for broker in one.behind})
            yield Finding(
                topic.name,
                f"is not in sync on {brokers} for {_partitions(behind)}"
                + (f": nothing can be written to {_partitions(stopped)}" if stopped else ""),
                f"start {brokers}, or see what holds it up: kafka-topics.sh --bootstrap-server "
                f"{self.servers} --describe --under-replicated-partitions --topic {topic.name}",
            )

    def _durability(self, topic: Topic) -> Iterator[Finding]:
        in_sync = topic.number("min.insync.replicas", 1)
        wanted = min(REPLICAS, self.brokers)
        if in_sync > topic.replication:
            yield Finding(
                topic.name,
                f"wants {in_sync} replicas in sync but has {topic.replication}: "
                "nothing can be written",
                self._alter(topic, "min.insync.replicas", topic.replication),
            )
        elif topic.replication > 1 and in_sync == topic.replication:
            yield Finding(
                topic.name,
                f"wants all its {in_sync} replicas in sync: nothing can be written while one "
                "broker is down",
                self._alter(topic, "min.insync.replicas", in_sync - 1),
                advice=True,
            )
        elif topic.replication >= REPLICAS and in_sync < 2:
            yield Finding(
                topic.name,
                "calls a record written that one broker has: it may be lost with that broker",
                self._alter(topic, "min.insync.replicas", 2),
                advice=True,
            )
        if topic.replication < wanted:
            yield Finding(
                topic.name,
                f"is held by {topic.replication} of {self.brokers} brokers: what only they have "
                "is lost, or out of reach, with them",
                f"kafka-reassign-partitions.sh --bootstrap-server {self.servers} --execute "
                f"--reassignment-json-file FILE, which names {wanted} replicas for each partition "
                f"of {topic.name}",
                advice=True,
            )
        if topic.replication > 1 and topic.settings.get("unclean.leader.election.enable") == "true":
            yield Finding(
                topic.name,
                "may go on with a replica that lacks written records (unclean election): its "
                "partition would be refused, or a result be lost",
                self._alter(topic, "unclean.leader.election.enable", "false"),
            )

    def _settings(self, topic: Topic) -> Iterator[Finding]:
        if "compact" in topic.settings.get("cleanup.policy", "delete"):
            yield Finding(
                topic.name,
                "is compacted: records of a request would vanish",
                self._alter(topic, "cleanup.policy", "delete"),
            )
        if topic.settings.get("message.timestamp.type") != BY_BROKER:
            yield Finding(
                topic.name,
                "goes by the writers' clocks: one that is wrong has its records refused, or "
                "deleted too early",
                self._alter(topic, "message.timestamp.type", BY_BROKER),
            )

    # ---- the splits, the results, and both

    def _splits(self, splits: Topic) -> Iterator[Finding]:
        if splits.record_bytes < self.split_size + OVERHEAD:
            yield Finding(
                splits.name,
                f"takes records of {splits.record_bytes} bytes only: too small for splits of "
                f"{self.split_size} bytes",
                self._alter(splits, "max.message.bytes", self.split_size + ROOM),
            )
        compression = splits.settings.get("compression.type", "producer")
        if compression != "producer":
            yield Finding(
                splits.name,
                f"is compressed by the broker ({compression}): it unpacks every batch in its "
                "heap, and one small batch can exhaust it",
                self._alter(splits, "compression.type", "producer"),
            )
        if splits.retention_ms < SPLITS_RETENTION_LEAST_MS:
            yield Finding(
                splits.name,
                f"forgets splits after {splits.retention_ms:.0f} ms: what no consumer has "
                "settled by then is lost, and its partition refused",
                self._alter(splits, "retention.ms", SPLITS_RETENTION_MS),
                advice=True,
            )
        by_size = splits.number("retention.bytes", -1)
        if by_size >= 0:
            yield Finding(
                splits.name,
                f"forgets splits by size, beyond {by_size} bytes of a partition: a larger backlog "
                "is lost, and its partition refused",
                self._alter(splits, "retention.bytes", -1) + ", or a size that no backlog reaches",
                advice=True,
            )

    def _results(self, results: Topic) -> Iterator[Finding]:
        if results.record_bytes < RESULT_BYTES:
            yield Finding(
                results.name,
                f"takes records of {results.record_bytes} bytes only: too small for results",
                self._alter(results, "max.message.bytes", ROOM),
            )
        if results.number("retention.bytes", -1) >= 0:
            yield Finding(
                results.name,
                "forgets results by size (retention.bytes), whatever their age: requests could "
                "be done twice",
                self._alter(results, "retention.bytes", -1),
            )

    def _results_of(self, splits: Topic, results: Topic) -> Iterator[Finding]:
        if results.partitions < splits.partitions:
            yield Finding(
                results.name,
                f"has {results.partitions} partitions, fewer than the {splits.partitions} "
                f"of {splits.name}: no consumer starts",
                f"kafka-topics.sh --bootstrap-server {self.servers} --alter "
                f"--topic {results.name} --partitions {splits.partitions}",
            )
        if results.retention_ms < splits.retention_ms:
            keep = int(splits.retention_ms) if splits.retention_ms != float("inf") else -1
            yield Finding(
                results.name,
                f"forgets results after {results.retention_ms:.0f} ms, before {splits.name} "
                "forgets their splits: requests could be done twice",
                self._alter(results, "retention.ms", keep),
            )

    def _alter(self, topic: Topic, setting: str, value: object) -> str:
        return (
            f"kafka-configs.sh --bootstrap-server {self.servers} --alter --entity-type topics "
            f"--entity-name {topic.name} --add-config {setting}={value}"
        )


def _partitions(some: Sequence[Replicas]) -> str:
    return _listed("partition", [one.partition for one in some])


def _brokers(some: Collection[int]) -> str:
    return _listed("broker", sorted(some))


def _listed(what: str, numbers: Sequence[int]) -> str:
    """`partition 3`, `partitions 0, 1 and 2`; of many the first ones, and how many more."""
    if len(numbers) == 1:
        return f"{what} {numbers[0]}"
    shown = list(map(str, numbers[:_NAMED]))
    last = f"{len(numbers) - _NAMED} more" if len(numbers) > _NAMED else shown.pop()
    return f"{what}s {', '.join(shown)} and {last}"
