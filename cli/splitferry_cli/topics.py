"""`splitferry topics`: create the topics, or check how they are set up."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import click

from splitferry_producer.splitting import DEFAULT_SIZE
from splitferry_protocol.records import PAYLOAD_MAX

from .cluster import Cluster, administration
from .command import Command, Common, Group, run
from .failures import Failure
from .options import option
from .topic_rules import (
    REPLICAS,
    Finding,
    Names,
    Topic,
    findings,
    wanted_settings,
)
from .values import ByteSize

VISIBLE_SECONDS = 15


topics = Group(
    "topics",
    help="Create the topics, or check how they are set up.",
    examples="""
    splitferry topics create --partitions 16
    splitferry topics check
    """,
)


@topics.command(
    "create",
    cls=Command,
    examples="""
    splitferry topics create
    splitferry topics create --partitions 16 --replication-factor 3
    splitferry topics create --explain
    splitferry --splits-topic up.splits topics create --split-size-max 4MiB
    """,
)
@option(
    "--partitions",
    type=click.IntRange(1, 10_000),
    default=8,
    metavar="COUNT",
    help="Partitions of each topic.",
)
@option(
    "--replication-factor",
    type=click.IntRange(1, 32),
    metavar="COPIES",
    help="Copies of each partition; else 3, or one on each broker.",
)
@option(
    "--split-size-max",
    type=ByteSize(512 * 1024, PAYLOAD_MAX),
    default="16MiB",
    help="Largest payload of a split.",
)
@option("--explain/--no-explain", help="Say what each setting is for.")
@click.pass_obj
def create(
    common: Common,
    partitions: int,
    replication_factor: int | None,
    split_size_max: int,
    explain: bool,
) -> None:
    """Create the topics that are missing; check the others, but change nothing about them."""
    run(_create(common, partitions, replication_factor, split_size_max, explain))


@topics.command(
    "check",
    cls=Command,
    examples="""
    splitferry topics check
    splitferry topics check --split-size 4MiB
    splitferry topics check --explain
    splitferry topics check --json
    """,
)
@option(
    "--split-size",
    type=ByteSize(1, PAYLOAD_MAX),
    default=f"{DEFAULT_SIZE // 1024}KiB",
    help="Payload of a split that the topics have to take.",
)
@option("--explain/--no-explain", help="Say what each setting is for.")
@click.pass_obj
def check(common: Common, split_size: int, explain: bool) -> None:
    """Say what is wrong with the topics, and what mends it.

    Looked at: partition counts, record sizes, retention of the results against the splits,
    compaction, clocks, replicas. Exit code 1 when something is wrong; advice alone is none.
    """
    run(_check(common, split_size, explain))


async def create_topics(
    cluster: Cluster, names: Names, partitions: int, replication: int, split_size_max: int
) -> list[str]:
    """Create what is missing, wait until every broker tells of it; returns the names created."""
    settings = {
        name: {setting.name: setting.value for setting in wanted}
        for name, wanted in wanted_settings(names, split_size_max, replication).items()
    }
    held = await cluster.topics(list(settings))
    # The results need a partition for each that the splits have; those may be there already.
    least = max([partitions, *(topic.partitions for topic in held.values())])
    counts = {names.splits: partitions, names.results: least, names.dead_letters: partitions}
    made = [
        name
        for name in settings
        if name not in held
        and await cluster.create(name, counts[name], replication, settings[name])
    ]
    async with asyncio.timeout(VISIBLE_SECONDS):
        while made and not await cluster.known_everywhere(made):  # noqa: ASYNC110
            await asyncio.sleep(0.1)  # the brokers tell nobody
    return made


async def _create(
    common: Common, partitions: int, replication: int | None, split_size_max: int, explain: bool
) -> None:
    names = common.names
    async with administration(common.connection) as cluster:
        copies = replication or min(REPLICAS, await cluster.brokers())
        made = await create_topics(cluster, names, partitions, copies, split_size_max)
        for name, topic in (await _described(cluster, names)).items():
            said = "created" if name in made else "was there"
            common.output.tell(
                {"topic": name, "created": name in made, "partitions": topic.partitions},
                f"{said:<9} {name}, {topic.partitions} partitions",
            )
    await _check(common, DEFAULT_SIZE, explain, split_size_max)


async def _described(cluster: Cluster, names: Names) -> dict[str, Topic]:
    return await cluster.topics([names.splits, names.results, names.dead_letters])


async def _check(
    common: Common, split_size: int, explain: bool, split_size_max: int = PAYLOAD_MAX
) -> None:
    names, servers = common.names, common.connection.bootstrap_servers
    async with administration(common.connection) as cluster:
        held = await _described(cluster, names)
        brokers = await cluster.brokers()
    if explain:
        _explain(common, held, split_size_max)
    found = findings(names, held, servers, brokers=brokers, split_size=split_size)
    for finding in found:
        _tell(common, finding)
    wrong = sum(not finding.advice for finding in found)
    if wrong:
        raise Failure(f"{wrong} findings about the topics")
    common.output.note("The topics can be used." if found else "The topics are set up well.")


def _tell(common: Common, finding: Finding) -> None:
    kind = "advice" if finding.advice else "mend it"
    common.output.tell(
        {
            "topic": finding.topic,
            "problem": finding.problem,
            "remedy": finding.remedy,
            "advice": finding.advice,
        },
        f"{finding.topic} {finding.problem}\n  {kind}: {finding.remedy}",
    )


def _explain(common: Common, held: Mapping[str, Topic], split_size_max: int) -> None:
    """What `create` gives to each topic, why, and what the topic has."""
    replication = max((topic.replication for topic in held.values()), default=1)
    wanted = wanted_settings(common.names, split_size_max, replication)
    for name, settings in wanted.items():
        for setting in settings:
            has = held[name].settings.get(setting.name) if name in held else None
            differs = "" if has in {None, setting.value} else f", here {has}"
            common.output.tell(
                {
                    "topic": name,
                    "setting": setting.name,
                    "value": has,
                    "created_with": setting.value,
                    "reason": setting.reason,
                },
                f"{name} {setting.name}={setting.value}{differs}\n  {setting.reason}",
            )
