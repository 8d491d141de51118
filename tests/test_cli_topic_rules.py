"""What is wrong with the topics, and the command that mends it."""

from __future__ import annotations

import dataclasses

import pytest

from splitferry_cli.topic_rules import (
    DAY_MS,
    DEAD_LETTER_EXTRA,
    Names,
    Replicas,
    Topic,
    findings,
    wanted_settings,
)

NAMES = Names("s", "r", "d")
SPLIT_MAX = 16 * 1024 * 1024


def good(replication: int = 1) -> dict[str, Topic]:
    """As `topics create` makes them, in sync."""
    brokers = list(range(replication))
    return {
        name: Topic(
            name,
            8,
            replication,
            {setting.name: setting.value for setting in settings},
            [Replicas(partition, brokers[0], brokers, brokers) for partition in range(8)],
        )
        for name, settings in wanted_settings(NAMES, SPLIT_MAX, replication).items()
    }


def changed(name: str, replication: int = 1, **settings: str) -> dict[str, Topic]:
    topics = good(replication)
    held = topics[name]
    new = {key.replace("_", "."): value for key, value in settings.items()}
    topics[name] = dataclasses.replace(held, settings={**held.settings, **new})
    return topics


def placed(name: str, *replicas: Replicas, replication: int = 3) -> dict[str, Topic]:
    """The first partitions of a topic are held like this."""
    topics = good(replication)
    rest = topics[name].replicas[len(replicas) :]
    topics[name] = dataclasses.replace(topics[name], replicas=[*replicas, *rest])
    return topics


@pytest.mark.parametrize(("replication", "brokers"), [(1, 1), (2, 2), (3, 3), (3, 9), (4, 9)])
def test_what_create_makes_is_well(replication: int, brokers: int) -> None:
    assert findings(NAMES, good(replication), "b:1", brokers=brokers) == []


def test_one_broker_needs_no_second_copy() -> None:
    wanted = wanted_settings(NAMES, SPLIT_MAX, 1)
    assert not any(s.name == "min.insync.replicas" for held in wanted.values() for s in held)


def test_every_setting_has_its_reason() -> None:
    for settings in wanted_settings(NAMES, SPLIT_MAX, 3).values():
        assert len({setting.name for setting in settings}) == len(settings)
        assert all(setting.reason for setting in settings)


@pytest.mark.parametrize("size", [512 * 1024, 1024 * 1024, SPLIT_MAX])
def test_records_of_every_split_size_fit(size: int) -> None:
    sizes = {
        name: int(setting.value)
        for name, settings in wanted_settings(NAMES, size).items()
        for setting in settings
        if setting.name == "max.message.bytes"
    }
    assert sizes["s"] >= size + 8 * 1024
    assert sizes["d"] >= sizes["s"] + DEAD_LETTER_EXTRA
    made = {
        name: dataclasses.replace(topic, settings={**topic.settings, "max.message.bytes": str(n)})
        for (name, topic), n in zip(good().items(), (sizes["s"], 10**6, sizes["d"]), strict=True)
    }
    assert findings(NAMES, made, "b:1", split_size=size) == []


@pytest.mark.parametrize(
    ("topics", "topic", "remedy"),
    [
        (changed("s", cleanup_policy="compact"), "s", "cleanup.policy=delete"),
        (changed("d", cleanup_policy="compact,delete"), "d", "cleanup.policy=delete"),
        (changed("r", retention_ms=str(DAY_MS)), "r", f"retention.ms={7 * DAY_MS}"),
        (changed("s", retention_ms="-1"), "r", "retention.ms=-1"),
        (changed("r", retention_bytes="1000"), "r", "retention.bytes=-1"),
        (changed("s", max_message_bytes="500000"), "s", "max.message.bytes="),
        (changed("r", max_message_bytes="1000"), "r", "max.message.bytes="),
        (changed("d", max_message_bytes="17825792"), "d", f"max.message.bytes={17825792 + 65536}"),
        (
            changed("r", message_timestamp_type="CreateTime"),
            "r",
            "message.timestamp.type=LogAppendTime",
        ),
        (changed("s", compression_type="uncompressed"), "s", "compression.type=producer"),
        (changed("s", min_insync_replicas="2"), "s", "min.insync.replicas=1"),
        (
            changed("r", 3, unclean_leader_election_enable="true"),
            "r",
            "unclean.leader.election.enable=false",
        ),
        (good() | {"r": dataclasses.replace(good()["r"], partitions=7)}, "r", "--partitions 8"),
        (placed("s", Replicas(0, -1, [4, 5], [])), "s", "start brokers 4 and 5"),
        (placed("s", Replicas(0, 0, [0, 1, 2], [0, 2])), "s", "start broker 1,"),
    ],
)
def test_each_fault_is_found_alone_with_its_remedy(
    topics: dict[str, Topic], topic: str, remedy: str
) -> None:
    (found,) = findings(NAMES, topics, "b:1", brokers=topics["d"].replication)
    assert found.topic == topic
    assert remedy in found.remedy
    assert not found.advice
    if "kafka-" in found.remedy:
        assert "--bootstrap-server b:1" in found.remedy
        assert f"{topic} " in f"{found.remedy} "


@pytest.mark.parametrize(
    ("topics", "brokers", "topic", "remedy"),
    [
        (changed("s", retention_ms="3600000"), 1, "s", f"retention.ms={7 * DAY_MS}"),
        (changed("s", retention_bytes="1000"), 1, "s", "retention.bytes=-1, or a size"),
        (changed("d", 3, min_insync_replicas="1"), 3, "d", "min.insync.replicas=2"),
        (changed("d", 3, min_insync_replicas="3"), 3, "d", "min.insync.replicas=2"),
        (changed("r", 2, min_insync_replicas="2"), 2, "r", "min.insync.replicas=1"),
        (good(3) | {"r": good(2)["r"]}, 9, "r", "3 replicas for each partition of r"),
        (good(2) | {"d": good(1)["d"]}, 2, "d", "2 replicas for each partition of d"),
    ],
)
def test_advice_is_given_where_everything_works_for_now(
    topics: dict[str, Topic], brokers: int, topic: str, remedy: str
) -> None:
    (found,) = findings(NAMES, topics, "b:1", brokers=brokers)
    assert found.topic == topic
    assert remedy in found.remedy
    assert found.advice


def test_the_splits_that_are_asked_for_have_to_fit() -> None:
    topics = changed("s", max_message_bytes=str(2**20))
    assert findings(NAMES, topics, "b:1") == []
    (found,) = findings(NAMES, topics, "b:1", split_size=2**20)
    assert f"too small for splits of {2**20} bytes" in found.problem


def test_too_few_replicas_in_sync_stop_the_writers() -> None:
    one_left = [Replicas(number, 0, [0, 1, 2], [0]) for number in range(8)]
    (found,) = findings(NAMES, placed("r", *one_left), "b:1", brokers=3)
    named = "partitions 0, 1, 2, 3, 4, 5, 6 and 7"
    assert found.problem == (
        f"is not in sync on brokers 1 and 2 for {named}: nothing can be written to {named}"
    )


def test_of_many_partitions_only_some_are_named() -> None:
    lost = [Replicas(number, -1, [3], []) for number in range(100)]
    (found,) = findings(NAMES, placed("r", *lost), "b:1", brokers=3)
    assert "partitions 0, 1, 2, 3, 4, 5, 6, 7 and 92 more" in found.problem


def test_more_results_partitions_and_endless_results_are_well() -> None:
    topics = changed("r", retention_ms="-1")
    topics["r"] = dataclasses.replace(topics["r"], partitions=9)
    assert findings(NAMES, topics, "b:1") == []


def test_missing_topics_are_each_found() -> None:
    found = findings(NAMES, {}, "b:1")
    assert [one.topic for one in found] == ["s", "r", "d"]
    assert all(one.remedy.endswith("topics create") for one in found)
    assert "--splits-topic s --results-topic r" in found[0].remedy
