"""The recovery drill: a root is lost, and comes back from the log, to the byte."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition

from brokers import Topics, administrator
from checker import look
from command import Outcome, command, topics_of
from splitferry_protocol.records import Block, Status
from stage import Stage, stage, until
from workload import KIB, MIB, make_load, send, sending

MakeTopics = Callable[..., Awaitable[Topics]]
REQUESTS, PARTITIONS = 200, 4
SIZES = (0, 1, 100, 5 * KIB, 64 * KIB, 300 * KIB, MIB)


async def everything(seen: Stage) -> dict[str, Any]:
    """All that Kafka keeps and a replay could have changed: where each log ends, transactions'
    markers included, every group there is, and what it has committed."""
    names = seen.names
    wanted = [
        TopicPartition(t, p) for t in (names.splits, names.results) for p in range(PARTITIONS)
    ]
    wanted.append(TopicPartition(names.dead_letters, 0))
    consumer = AIOKafkaConsumer(bootstrap_servers=seen.servers)
    await consumer.start()
    try:
        ends = await consumer.end_offsets(wanted)
        starts = await consumer.beginning_offsets(wanted)
    finally:
        await consumer.stop()
    async with administrator(seen.servers) as admin:
        groups = sorted(group[0] for group in await admin.list_consumer_groups())
        offsets = {group: await admin.list_consumer_group_offsets(group) for group in groups}
    return {"ends": ends, "starts": starts, "offsets": offsets}


async def replay(seen: Stage, *args: str | Path) -> tuple[Outcome, list[dict[str, Any]]]:
    environment = {"SPLITFERRY_BOOTSTRAP_SERVERS": seen.servers, **topics_of(seen.names)}
    done = await command(environment, "replay", "--group", seen.group, "--json", *args)
    return done, [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.timeout(240)
async def test_a_lost_root_is_rebuilt_and_nothing_else_is_changed(
    bootstrap_servers: str, topics: MakeTopics, tmp_path: Path
) -> None:
    names = await topics(partitions=PARTITIONS)
    messages = make_load(random.Random(2026), REQUESTS, PARTITIONS, SIZES)
    async with (
        stage(bootstrap_servers, names, tmp_path) as seen,
        sending(bootstrap_servers) as producer,
    ):
        await seen.consumer()
        await send(producer, names.splits, messages)
        await until(lambda: len(seen.results) == REQUESTS, "all results")
        await seen.settle()
        await seen.stop()
        received = look(seen.root).files
        statuses = Counter(result.status for result in seen.results.values())
        assert statuses[Status.COMPLETED] > 100
        assert statuses[Status.FAILED] > 10
        assert statuses[Status.ABORTED] > 10
        shutil.rmtree(seen.root)
        before = await everything(seen)

        first, told = await replay(seen, "--to", seen.root)
        assert first.code == 0, json.dumps([r for r in told if r.get("outcome") == "damaged"])
        assert look(seen.root).files == received
        assert look(seen.root).temporary == []
        *reports, summed = told
        outcomes = {report["request"]: report for report in reports}
        assert len(outcomes) == len(reports) == REQUESTS
        for request, result in seen.results.items():
            report = outcomes[str(request)]
            if not result.success:
                assert report["outcome"] == result.status.value
                continue
            assert report["outcome"] in {"complete", "superseded"}, report
            assert (report["size"], report["sha256"]) == (result.size, (result.sha256 or b"").hex())
        assert summed["errors"] == 0

        second, told = await replay(seen, "--to", seen.root)
        assert second.code == 0, second
        assert look(seen.root).files == received
        again = Counter(report["outcome"] for report in told[:-1] if report["block"] == "file")
        files = [r for r in seen.results.values() if r.success and r.block is Block.FILE]
        assert again["present"] + again["superseded"] == len(files)
        assert again["present"] == len(received)
        assert again["complete"] == 0
        after = await everything(seen)
        # Kafka takes away groups that have no members and no offsets, every ten minutes.
        assert after["offsets"].items() <= before["offsets"].items()
        assert seen.group in after["offsets"]
        assert {**after, "offsets": before["offsets"]} == before
