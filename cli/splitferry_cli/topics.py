"""`splitferry topics`: create the topics, or check how they are set up."""

from __future__ import annotations

import asyncio

import click

from splitferry_protocol.records import PAYLOAD_MAX

from .cluster import Cluster, administration
from .command import Command, Common, Group, run
from .failures import Failure
from .options import option
from .topic_rules import Names, Topic, findings, wanted_settings
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
    splitferry --splits-topic up.splits topics create --split-size-max 4MiB
    """,
)
@option("--partitions", type=click.IntRange(1, 10_000), default=8, help="Of each topic.")
@option(
    "--replication-factor",
    type=click.IntRange(1, 32),
    help="Copies of each partition; the broker's default without it.",
)
@option(
    "--split-size-max",
    type=ByteSize(512 * 1024, PAYLOAD_MAX),
    default="16MiB",
    help="Largest payload of a split.",
)
@click.pass_obj
def create(
    common: Common, partitions: int, replication_factor: int | None, split_size_max: int
) -> None:
    """Create the topics that are missing; check the others, but change nothing about them."""
    run(_create(common, partitions, replication_factor or -1, split_size_max))


@topics.command(
    "check",
    cls=Command,
    examples="""
    splitferry topics check
    splitferry topics check --json
    """,
)
@click.pass_obj
def check(common: Common) -> None:
    """Check partition counts, record sizes and retention; exit code 1 with findings."""
    run(_check(common))


async def create_topics(
    cluster: Cluster, names: Names, partitions: int, replication: int, split_size_max: int
) -> list[str]:
    """Create what is missing, wait until it can be seen, and return the names created."""
    settings = wanted_settings(names, split_size_max)
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
        while len(await cluster.topics(list(settings))) < len(settings):  # noqa: ASYNC110
            await asyncio.sleep(0.1)  # the broker tells nobody
    return made


async def _create(common: Common, partitions: int, replication: int, split_size_max: int) -> None:
    names = common.names
    async with administration(common.connection) as cluster:
        made = await create_topics(cluster, names, partitions, replication, split_size_max)
        for name, topic in (await _described(cluster, names)).items():
            said = "created" if name in made else "was there"
            common.output.tell(
                {"topic": name, "created": name in made, "partitions": topic.partitions},
                f"{said:<9} {name}, {topic.partitions} partitions",
            )
    await _check(common)


async def _described(cluster: Cluster, names: Names) -> dict[str, Topic]:
    return await cluster.topics([names.splits, names.results, names.dead_letters])


async def _check(common: Common) -> None:
    names = common.names
    async with administration(common.connection) as cluster:
        held = await _described(cluster, names)
    found = findings(names, held, common.connection.bootstrap_servers)
    for finding in found:
        common.output.tell(
            {"topic": finding.topic, "problem": finding.problem, "remedy": finding.remedy},
            f"{finding.topic} {finding.problem}\n  mend it: {finding.remedy}",
        )
    if found:
        raise Failure(f"{len(found)} findings about the topics")
    common.output.note("The topics are set up well.")
