"""What is wrong with the topics, and the command that mends it."""

from __future__ import annotations

import dataclasses

import pytest

from splitferry_cli.topic_rules import (
    DAY_MS,
    DEAD_LETTER_EXTRA,
    Names,
    Topic,
    findings,
    wanted_settings,
)

NAMES = Names("s", "r", "d")
SPLIT_MAX = 16 * 1024 * 1024


def good() -> dict[str, Topic]:
    return {
        name: Topic(name, 8, 1, settings)
        for name, settings in wanted_settings(NAMES, SPLIT_MAX).items()
    }


def changed(name: str, **settings: str) -> dict[str, Topic]:
    topics = good()
    held = topics[name]
    new = {key.replace("_", "."): value for key, value in settings.items()}
    topics[name] = dataclasses.replace(held, settings={**held.settings, **new})
    return topics


def test_what_create_makes_is_well() -> None:
    assert findings(NAMES, good(), "b:1") == []


@pytest.mark.parametrize("size", [512 * 1024, 1024 * 1024, SPLIT_MAX])
def test_records_of_every_split_size_fit(size: int) -> None:
    settings = wanted_settings(NAMES, size)
    splits, letters = (int(settings[name]["max.message.bytes"]) for name in ("s", "d"))
    assert splits >= size + 8 * 1024
    assert letters >= splits + DEAD_LETTER_EXTRA


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
        (changed("s", min_insync_replicas="2"), "s", "min.insync.replicas=1"),
        (good() | {"r": dataclasses.replace(good()["r"], partitions=7)}, "r", "--partitions 8"),
    ],
)
def test_each_fault_is_found_alone_with_its_remedy(
    topics: dict[str, Topic], topic: str, remedy: str
) -> None:
    (found,) = findings(NAMES, topics, "b:1")
    assert found.topic == topic
    assert remedy in found.remedy
    assert "--bootstrap-server b:1" in found.remedy
    assert f"{topic} " in f"{found.remedy} "


def test_more_results_partitions_and_endless_results_are_well() -> None:
    topics = changed("r", retention_ms="-1")
    topics["r"] = dataclasses.replace(topics["r"], partitions=9)
    assert findings(NAMES, topics, "b:1") == []


def test_missing_topics_are_each_found() -> None:
    found = findings(NAMES, {}, "b:1")
    assert [one.topic for one in found] == ["s", "r", "d"]
    assert all(one.remedy.endswith("topics create") for one in found)
    assert "--splits-topic s --results-topic r" in found[0].remedy
