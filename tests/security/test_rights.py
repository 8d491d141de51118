"""Each side has the rights that docs/OPERATIONS.md grants, needs each of them, and names the one
that is missing."""

from __future__ import annotations

import argparse
import asyncio
import re
import shlex
import uuid
from collections.abc import AsyncIterator, Collection, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path

import pytest

from brokers import Topics, make_topics
from checker import violations
from command import Outcome, command, topics_of
from secured_broker import Grant, SecuredBroker, environment
from splitferry_protocol.ids import RequestId
from splitferry_protocol.records import Block, Split
from stage import Consumer, Stage, stage, until
from workload import Message, cut, message, origin, sending
from workload import send as write

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(300)]

GUIDE = Path(__file__).parents[2] / "docs" / "OPERATIONS.md"
AT_A_TIME = 4
HEALED = 30.0
"""Seconds (RELIABILITY, rule 8)."""


def documented(who: str, names: Topics, group: str) -> list[Grant]:
    """What the commands of the guide grant to `who`, for other topics and another group."""
    parser = argparse.ArgumentParser()
    for option in ("bootstrap-server", "allow-principal", "resource-pattern-type"):
        parser.add_argument(f"--{option}")
    parser.add_argument("--add", action="store_true")
    parser.add_argument("--operation", action="append")
    resources = {"topic": "topic", "group": "group", "transactional_id": "transactional id"}
    for resource in resources:
        parser.add_argument(f"--{resource.replace('_', '-')}")
    own = {"splits": names.splits, "results": names.results, "dead-letters": names.dead_letters}

    def renamed(name: str) -> str:
        name = re.sub(r"splitferry\.([a-z-]+)", lambda found: own[found[1]], name)
        return re.sub(r"\bsplitferry\b", group, name)

    found = []
    for line in re.findall(r"^kafka-acls\.sh (.*)$", GUIDE.read_text(), re.MULTILINE):
        told = parser.parse_args(shlex.split(line))
        if told.allow_principal == f"User:{who}":
            ((resource, name),) = [(r, n) for r in resources if (n := getattr(told, r))]
            name = renamed(name) + ("*" if told.resource_pattern_type else "")
            found += [Grant(operation, resources[resource], name) for operation in told.operation]
    assert found, who
    return found


def in_words(grant: Grant) -> str:
    """What a message says that is missing."""
    return f"no right to {grant.operation} on {grant.resource} {grant.name.removesuffix('*')}:"


def test_the_guides_commands_are_read() -> None:
    grants = documented("consumer", Topics("a.s", "a.r", "a.d"), "g")
    assert Grant("Write", "transactional id", "g/a.s/*") in grants
    assert Grant("Read", "group", "g") in grants
    assert len(grants) == 6


def named(consumer: Consumer, right: Grant, before: int) -> bool:
    """Whether the log names the missing right more often than before."""
    return consumer.log.read_text().count(in_words(right)) > before


class Ground:
    """Topics with one open request, a consumer that may do everything, and users to come."""

    def __init__(self, secured: SecuredBroker, directory: Path, made: Stage) -> None:
        self.secured = secured
        self.directory = directory
        self.names = made.names
        self.group = made.group
        self.stage = made
        self._turn = asyncio.Semaphore(AT_A_TIME)

    async def user(self, rights: Collection[Grant], names: Topics | None = None) -> dict[str, str]:
        """The options of a new user with these rights, perhaps for other topics."""
        name = f"user-{uuid.uuid4().hex[:8]}"
        await self.secured.add_user(name)
        await self.secured.grant(name, *rights)
        connection = self.secured.login(name, "SCRAM-SHA-256")
        return {
            **topics_of(names or self.names),
            **environment(connection, self.directory / name),
            "SPLITFERRY_GROUP": self.group,
            "XDG_STATE_HOME": str(self.directory / "state"),
        }

    async def run(
        self, rights: Collection[Grant], *args: str | Path, names: Topics | None = None
    ) -> Outcome:
        async with self._turn:
            return await command(await self.user(rights, names), *args)

    async def open_request(self, number: int) -> str:
        """A request whose splits do not come to an end."""
        split = Split(
            RequestId(9, number), f"open-{number}", 1, Block.FILE, 0, 0, 10, b"half", None, None,
            None,
        )  # fmt: skip
        async with sending(self.secured.bootstrap_servers) as producer:
            await write(producer, self.names.splits, [message(split, 1)])
        return str(split.request)

    async def dead_letter(self, number: int) -> None:
        """One of a record that is sound by now."""
        (split,) = cut(RequestId(9, number), b"bytes", 5)
        sound = message(split, 1)
        dead = replace(sound, headers=[*sound.headers, *origin(self.names.splits, 0, 0)])
        async with sending(self.secured.bootstrap_servers) as producer:
            await write(producer, self.names.dead_letters, [dead])


@asynccontextmanager
async def ground(secured: SecuredBroker, directory: Path) -> AsyncIterator[Ground]:
    names = await make_topics(secured.bootstrap_servers, partitions=1)
    async with stage(secured.bootstrap_servers, names, directory) as made:
        yield Ground(secured, directory, made)


def without_each(rights: Collection[Grant]) -> Iterator[tuple[Grant, list[Grant]]]:
    for missing in rights:
        yield missing, [right for right in rights if right != missing]


COMMANDS: dict[str, tuple[str, ...]] = {
    "producer": ("send", "ITEM"),
    "reader": ("result", "9-1"),
    "operator": ("abort", "9-1", "--reason", "enough"),
    "rebuilder": ("replay", "--dry-run"),
    "onlooker": ("status",),
    "inspector": ("dead-letters", "show", "0:0"),
    "requeuer": ("dead-letters", "requeue", "0:0"),
    "checker": ("topics", "check"),
    "maker": ("topics", "create", "--partitions", "1"),
}


@pytest.mark.parametrize("who", COMMANDS)
async def test_a_command_works_with_its_rights_and_names_the_one_it_lacks(
    secured: SecuredBroker, tmp_path: Path, who: str
) -> None:
    async with ground(secured, tmp_path) as here:
        item = tmp_path / "item"
        item.write_bytes(b"bytes")
        request = "9-1"
        args = [item if word == "ITEM" else word for word in COMMANDS[who]]
        if who not in {"maker", "rebuilder"}:
            await here.open_request(1)
            await here.dead_letter(2)
        # What one attempt makes, the next would find.
        fresh = (Topics(*(f"{one}.{n}" for one in vars(here.names).values())) for n in count())
        cases = []
        for number in range(len(documented(who, here.names, here.group))):
            names = next(fresh) if who == "maker" else here.names
            rights = documented(who, names, here.group)
            cases.append((names, rights.pop(number), rights))
        attempts = [partial(here.run, held, *args, names=names) for names, _, held in cases]
        if who == "requeuer":  # only one may do it at a time
            outcomes = [await attempt() for attempt in attempts]
        else:
            outcomes = await asyncio.gather(*(attempt() for attempt in attempts))
        for (_, missing, _), outcome in zip(cases, outcomes, strict=True):
            assert outcome.code == 1, (missing, outcome)
            said = outcome.stdout + outcome.stderr
            assert in_words(missing) in said, (missing, outcome)
            assert "kafka-acls.sh" in said
            assert len(outcome.stderr.splitlines()) <= 2, outcome
            assert outcome.error
        consumer = await here.stage.consumer()
        # Sooner it knows no signals yet, and is not stopped but ended by one.
        await until(lambda: consumer.heard("partition taken") > 0, "the consumer has its partition")
        if who == "reader":
            operator = documented("operator", here.names, here.group)
            ended = await here.run(operator, "abort", request, "--reason", "enough")
            assert ended.code == 0, ended.stderr
        names = next(fresh) if who == "maker" else here.names
        allowed = await here.run(documented(who, names, here.group), *args, names=names)
        assert allowed.code == 0, allowed
        await here.stage.stop()


async def test_a_running_consumer_names_the_right_it_lost_and_goes_on_once_it_is_back(
    secured: SecuredBroker, tmp_path: Path
) -> None:
    async with ground(secured, tmp_path) as here:
        rights = documented("consumer", here.names, here.group)
        options = await here.user(rights)
        variables = {name.removeprefix("SPLITFERRY_"): options[name] for name in options}
        user = variables["SASL_USERNAME"]
        consumer = await here.stage.consumer(
            **{name.removeprefix("SPLITFERRY_"): value for name, value in options.items()}
        )
        async with sending(secured.bootstrap_servers) as producer:

            async def item(number: int) -> RequestId:
                """Send an item, behind a record that becomes a dead letter."""
                request = RequestId(9, number)
                splits = cut(request, b"bytes", 5)
                poison = Message(None, b"\xc1")
                messages = [poison, *(message(split, 1) for split in splits)]
                await write(producer, here.names.splits, messages)
                return request

            async def arrives(request: RequestId, what: str) -> None:
                await until(lambda: request in here.stage.results, what, HEALED)

            await arrives(await item(0), "the first result")
            for number, right in enumerate(rights, 1):
                heard = consumer.log.read_text().count(in_words(right))
                await secured.revoke(user, right)
                if right == Grant("Read", "topic", here.names.results):
                    # They are read when a partition is taken, and only then.
                    await consumer.stop()
                    consumer, heard = await here.stage.consumer(**variables), 0
                request = await item(number)
                await until(partial(named, consumer, right, heard), f"it names {right}")
                assert request not in here.stage.results, right
                await secured.grant(user, right)
                await arrives(request, f"the result after {right} is back")
        await here.stage.settle()
        await here.stage.stop()
        assert not violations(await here.stage.history())


async def test_a_consumer_starts_only_with_what_it_would_miss_at_once(
    secured: SecuredBroker, tmp_path: Path
) -> None:
    """What it asks for first ends it with one line, as a wrong name would."""
    async with ground(secured, tmp_path) as here:
        rights = documented("consumer", here.names, here.group)
        first = [
            Grant("Read", "topic", here.names.splits),
            Grant("Write", "topic", here.names.dead_letters),
            Grant("Read", "group", here.group),
        ]
        cases = [(right, held) for right, held in without_each(rights) if right in first]
        root = tmp_path / "other"
        outcomes = await asyncio.gather(
            *(here.run(held, "consume", "--root", root) for _, held in cases)
        )
        for (right, _), outcome in zip(cases, outcomes, strict=True):
            assert outcome.code == 1
            assert in_words(right) in outcome.error
