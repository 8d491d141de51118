"""Every command that README.md and docs/ show on a console is run, in its place, on a real broker.

Below one heading the commands are one session. What comes before it (a request left half sent, a
disk that is full) is brought about by the scene of that heading.
"""

from __future__ import annotations

import asyncio
import random
import re
import sqlite3
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, closing
from dataclasses import replace
from pathlib import Path

import click
import platformdirs
import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import NewTopic
from aiokafka.structs import OffsetAndMetadata

from brokers import SPLITS_BYTES, administrator, run
from checker import look, read_committed, read_history, read_outcomes, read_topic, violations
from console import REPOSITORY, Console, Section, Step, blocks, console, pages, sections, spans
from kafka_tools import put_kafka_tools
from small_disk import can_mount, small_disk
from splitferry_cli.app import splitferry
from splitferry_cli.broker import LocalBroker
from splitferry_cli.checks import lag
from splitferry_cli.kafka_process import free_ports
from splitferry_cli.topic_rules import BY_BROKER
from splitferry_consumer.bookmark import VERSION
from splitferry_consumer.catalogue import SCHEMA
from splitferry_protocol.connection import ConnectionSettings
from splitferry_protocol.errors import VersionMismatch
from splitferry_protocol.ids import RequestId
from splitferry_protocol.records import Abort, Result, Split, Status
from stage import until
from workload import KIB, MIB, Message, cut, damaged, message, send, sending

pytestmark = pytest.mark.timeout(300)

_BENCHMARK = "minutes and gigabytes, on a machine that does nothing else: by hand, for the figures"
_INSTALL = "the Makefile makes the environment of the tests from the checkout"

ELSEWHERE = {
    "make demo": "the same `splitferry demo`: tests/integration/test_cli.py",
    "make test": "what runs this",
    "make bench                                      # all of it and this page, 20 to 30 minutes": (
        _BENCHMARK
    ),
    'make bench ARGS="small latency"                 # some of it': _BENCHMARK,
    ".venv/bin/python benchmarks/receive.py --rounds 5  # one alone; --help tells its options": (
        _BENCHMARK
    ),
    ".venv/bin/python benchmarks/memory.py --mebibytes 8192  # larger than in the full run": (
        _BENCHMARK
    ),
    ".venv/bin/python benchmarks/report.py  # this page from the results at hand": (
        "what it makes of results: tests/test_benchmarks.py"
    ),
    "python3 -m venv venv": _INSTALL,
    ". venv/bin/activate": _INSTALL,
    "pip wheel --quiet --no-deps --wheel-dir dist path/to/splitferry": _INSTALL,
    'pip install --quiet "$(ls dist/splitferry-*.whl)[broker]"': _INSTALL,
    "pip install 'splitferry[broker]'     # from a checkout: pip install '.[broker]'": _INSTALL,
    "docker compose up -d --wait --scale consumer=3": "tests/integration/test_compose.py",
    "splitferry send model.bin            # Kafka answers on 127.0.0.1:9092": (
        "tests/integration/test_compose.py"
    ),
    "docker compose exec consumer ls /data": "tests/integration/test_compose.py",
    "splitferry consume --root /srv/received --web 127.0.0.1:8080": (
        "the port may be taken here: tests/integration/test_watching.py takes a free one"
    ),
    "NEW=kafka-new:9092": "the scene names the other broker of the tests",
    "pip install --upgrade 'splitferry[web]'": "there is one version, which is installed",
    "pip install 'splitferry[web]==1.0.0'": "there is one version, which is installed",
}
"""Commands that cannot run here, why, and where they are run instead."""

NO_COMMANDS = {"splitferry receive": "the name of a span of OpenTelemetry"}

LANGUAGES = {
    "console": "commands, run here",
    "python": "tests/integration/test_readme.py",
    "sh": "rights, granted by tests/security/test_rights.py",
    "json": "no commands",
    "toml": "no commands",
    "": "output, or a formula",
}

TOPICS = ("splitferry.splits", "splitferry.results", "splitferry.dead-letters")
GROUP = "splitferry"
UNIT = REPOSITORY / "deploy" / "systemd" / "splitferry-consume.service"
OPERATIONS = "Running splitferry"
"""The heading whose commands begin every session of docs/OPERATIONS.md."""

SHOWN = [section for page in pages() for section in sections(page)]
DUE = [
    Section(section.page, section.title, steps)
    for section in SHOWN
    if (steps := [step for step in section.steps if step.command not in ELSEWHERE])
]


# ---- the pages as a whole


def test_headings_are_told_apart() -> None:
    shown = [section.name for section in SHOWN]
    assert len(set(shown)) == len(shown)


def test_of_every_kind_of_block_it_is_known_who_runs_it() -> None:
    found = {language for page in pages() for _, language, _, _ in blocks(page)}
    assert found <= LANGUAGES.keys()


def test_no_exception_and_no_scene_outlives_its_commands() -> None:
    shown = {step.command for section in SHOWN for step in section.steps}
    assert ELSEWHERE.keys() <= shown
    assert SCENES.keys() <= {section.title for section in SHOWN}


def spoken() -> set[str]:
    return {span for page in pages() for span in spans(page)}


@pytest.mark.parametrize(
    "span", sorted(one for one in spoken() - NO_COMMANDS.keys() if one.startswith("splitferry "))
)
def test_commands_in_the_text_exist(span: str) -> None:
    command: click.Command = splitferry
    for word in span.split()[1:]:
        if isinstance(command, click.Group):
            assert word in command.commands, f"there is no command {word!r}"
            command = command.commands[word]
        elif word.startswith("--"):
            assert any(word in (*one.opts, *one.secondary_opts) for one in command.params)


def test_targets_of_make_in_the_text_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    named = {span.split()[1] for span in spoken() if span.startswith("make ")}
    assert named <= targets


def test_what_the_log_says_is_quoted_as_it_says_it() -> None:
    source = " ".join(
        path.read_text() for path in REPOSITORY.glob("consumer/splitferry_consumer/**/*.py")
    )
    text = (REPOSITORY / "docs" / "OPERATIONS.md").read_text()
    quoted = re.findall(r"log says `([^`]+)`(?: or `([^`]+)`)?", text)
    assert len(quoted) >= 4
    for phrase in (one for pair in quoted for one in pair if one):
        assert phrase in re.sub(r'"\s+f?"', "", source)


def test_every_alert_is_explained() -> None:
    rules = (REPOSITORY / "deploy" / "prometheus" / "alerts.yml").read_text()
    explained = [span for page in pages() for span in spans(page) if page.name == "OPERATIONS.md"]
    assert set(re.findall(r"alert: (\w+)", rules)) == {
        span for span in explained if re.fullmatch(r"Splitferry[A-Z]\w+", span)
    }


class Stage:
    """A console, a broker with nothing on it, and a service as an operator has set it up."""

    def __init__(self, shell: Console, servers: str) -> None:
        self.shell = shell
        self.servers = servers
        self.root = shell.path("/srv/received")
        for name in ("/etc/splitferry", "/srv/received", "/mnt"):
            shell.path(name).mkdir(parents=True)
        self.settings = shell.path("/etc/splitferry/consume.env")
        self.settings.write_text(
            f"SPLITFERRY_BOOTSTRAP_SERVERS={servers}\n"
            f"SPLITFERRY_GROUP={GROUP}\n"
            f"SPLITFERRY_ROOT={self.root}\n"
        )

    async def do(self, command: str) -> str:
        """Run what precedes the commands shown."""
        code, said = await self.shell.carry_out(Step(0, command, []))
        assert code == 0, (command, said)
        return "\n".join(said)

    async def begin(self, partitions: int = 2) -> None:
        """Make the topics, and start the service."""
        await self.do(f"splitferry topics create --partitions {partitions}")
        await self.do("systemctl start splitferry-consume")

    async def send(self, *contents: Split | Abort, partition: int) -> None:
        """Write to the splits topic as a producer does."""
        async with sending(self.servers) as producer:
            await send(
                producer, TOPICS[0], [replace(message(c, 1), partition=partition) for c in contents]
            )

    async def results(self) -> dict[RequestId, Result]:
        found = await read_outcomes(self.servers, TOPICS[1])
        return {
            one.told.request: one.told
            for one in found
            if isinstance(one.told, Result) and not one.told.repeat
        }

    async def result(self, request: RequestId) -> Result:
        """The result, once it is there."""

        async def told() -> bool:
            return request in await self.results()

        await until(told, f"a result of {request}")
        return (await self.results())[request]

    async def check(self) -> None:
        """Wait until all is done, stop, and hold what is left against "What may never happen"."""

        async def read() -> bool:
            behind = await lag(ConnectionSettings(self.servers), TOPICS[0], GROUP)
            return not any(behind.values())

        await until(read, "W at the end")
        await self.shell.close()
        assert not violations(await read_history(self.servers, TOPICS, GROUP, self.root))


Scene = Callable[[Stage], AbstractAsyncContextManager[None]]
SCENES: dict[str, Scene] = {}


def scene(title: str) -> Callable[[Callable[[Stage], AsyncIterator[None]]], None]:
    """What is done before the commands of a heading, and looked at after them."""

    def keep(made: Callable[[Stage], AsyncIterator[None]]) -> None:
        assert title not in SCENES
        SCENES[title] = asynccontextmanager(made)

    return keep


# ---- running


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalBroker]:
    """A broker of our own: the documents use the default names, and delete topics."""
    made = LocalBroker(tmp_path_factory.mktemp("broker"))
    run(made.start())
    yield made
    run(made.stop())


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The PATH: this environment's commands, and Kafka's tools."""
    directory = tmp_path_factory.mktemp("tools")
    put_kafka_tools(directory)
    return f"{Path(sys.executable).parent}:{directory}:/usr/bin:/bin:/usr/sbin:/sbin"


@pytest.mark.parametrize("section", DUE, ids=[section.name for section in DUE])
async def test_commands(section: Section, broker: LocalBroker, tools: str, tmp_path: Path) -> None:
    servers = broker.bootstrap_servers
    await empty(servers)
    environment = {
        "PATH": tools,
        "HOME": str(tmp_path),
        "XDG_CACHE_HOME": platformdirs.user_cache_dir(),
        "SPLITFERRY_BOOTSTRAP_SERVERS": servers,
        "SPLITFERRY_SESSION_TIMEOUT": "1",
    }
    async with console(tmp_path, environment, UNIT) as shell:
        play = SCENES.get(section.title, nothing)
        async with play(Stage(shell, servers)):
            if section.page.name == "OPERATIONS.md" and section.title != OPERATIONS:
                [before] = [one for one in SHOWN if one.title == OPERATIONS]
                await shell.run(before)
            await shell.run(section)


async def empty(servers: str) -> None:
    """Take the topics away, and with them the offsets of the group."""
    async with administrator(servers) as admin:
        names = [name for name in await admin.list_topics() if not name.startswith("__")]
        if names:
            await admin.delete_topics(names)
        async with asyncio.timeout(30):
            while set(names) & set(await admin.list_topics()):
                await asyncio.sleep(0.05)


@asynccontextmanager
async def nothing(_: Stage) -> AsyncIterator[None]:
    yield


# ---- scenes


def own_broker(here: Stage) -> str:
    """Have `splitferry broker` take a free port and a scratch directory; its address."""
    servers = f"127.0.0.1:{free_ports(0)[0]}"
    here.shell.set("SPLITFERRY_PORT", servers.rpartition(":")[2])
    here.shell.set("SPLITFERRY_DATA", str(here.shell.directory / "broker"))
    here.shell.set("SPLITFERRY_BOOTSTRAP_SERVERS", servers)
    return servers


@scene("Use it")
async def use_it(here: Stage) -> AsyncIterator[None]:
    own_broker(here)
    directory = here.shell.directory
    (directory / "recordings").mkdir()
    for name in ("model.bin", "recordings/one", "recordings/two"):
        (directory / name).write_bytes(random.Random(name).randbytes(100_000))
    yield
    received = directory / "received"
    for sent, name in (("model.bin", "model.bin"), ("recordings/one", "one")):
        assert (received / name).read_bytes() == (directory / sent).read_bytes()


@scene("A consumer in your own service, in ten minutes")
async def ten_minutes(here: Stage) -> AsyncIterator[None]:
    servers = own_broker(here)
    directory = here.shell.directory
    [program] = [
        "\n".join(lines)
        for _, language, _, lines in blocks(REPOSITORY / "docs" / "START.md")
        if language == "python"
    ]
    (directory / "service.py").write_text(program.replace("127.0.0.1:9092", servers))
    here.shell.set("PYTHONUNBUFFERED", "1")
    yield
    assert (directory / "received/model.bin").read_bytes() == (directory / "model.bin").read_bytes()
    assert "received received/model.bin, 50000000 bytes" in here.shell.logged()


REQUEST = RequestId(7, 42)
ITEM = b"half of it, and then the rest of it" * 1000


@scene("Upgrading")
async def upgrading(here: Stage) -> AsyncIterator[None]:
    """A request that is half sent goes on with the next version."""
    await here.begin()
    first, *rest = cut(REQUEST, ITEM, len(ITEM) // 2)
    await here.send(first, partition=0)
    await until((here.root / ".splitferry" / "catalog.db").exists, "a start")
    yield
    await here.send(*rest, partition=0)
    assert (await here.result(REQUEST)).success
    assert here.shell.path("/mnt/before-upgrade/catalog.db").exists()
    await here.check()


@scene("More partitions")
async def more_partitions(here: Stage) -> AsyncIterator[None]:
    await here.begin()
    first, *rest = cut(REQUEST, ITEM, len(ITEM) // 2)
    await here.send(first, partition=0)
    yield
    later = RequestId(7, 43)
    await here.send(*cut(later, ITEM, 5000), partition=3)
    await here.send(*rest, partition=0)
    assert (await here.result(later)).input[1] == 3
    assert (await here.result(REQUEST)).input[1] == 0
    await here.check()


@scene("Another host")
async def another_host(here: Stage) -> AsyncIterator[None]:
    rest = await received(here)
    old, here.root = here.root, here.shell.path("/mnt/received")
    yield
    await go_on(here, rest)
    assert not (old / f"items/{REQUEST}").exists()


@scene("A wrong release")
async def a_wrong_release(here: Stage) -> AsyncIterator[None]:
    """What a later version could have left: a catalogue, and the metadata of a commit."""
    await here.begin()
    for number in range(1, 4):
        await here.send(*cut(RequestId(7, number), b"", 1), partition=0)
        await here.result(RequestId(7, number))
    await here.do("systemctl stop splitferry-consume")
    catalogue = here.root / ".splitferry" / "catalog.db"
    await here.do("mkdir /mnt/before-upgrade")
    await here.do(f"cp -a {catalogue}* /mnt/before-upgrade")
    with closing(sqlite3.connect(catalogue)) as database:
        database.execute(f"PRAGMA user_version = {SCHEMA + 1}")
    async with AIOKafkaConsumer(
        bootstrap_servers=here.servers, group_id=GROUP, enable_auto_commit=False
    ) as later:
        where = TopicPartition(TOPICS[0], 0)
        later.assign([where])
        await later.commit({where: OffsetAndMetadata(3, f"splitferry/{VERSION + 1} what=ever")})
    for number in range(4, 10):
        splits = cut(RequestId(7, number), b"", 1)
        await here.send(*splits, partition=number % 2)
    yield
    for number in range(4, 10):
        assert (await here.result(RequestId(7, number))).success
    await here.check()


@scene("A full disk")
async def a_full_disk(here: Stage) -> AsyncIterator[None]:
    if not can_mount():
        pytest.skip("needs root, to mount a file system")
    here.shell.set("SPLITFERRY_DISK_RESERVE", "64KiB")
    async with small_disk(here.root, 8 * MIB) as disk:
        await here.begin()
        (here.root / "old.iso").write_bytes(bytes(4 * MIB))
        disk.fill(leave=512 * KIB)
        await here.send(*cut(REQUEST, bytes(3 * MIB), 512 * KIB), partition=0)
        await until(lambda: here.shell.heard("file write error"), "a disk that is full")
        yield
        assert (await here.result(REQUEST)).success
        disk.free()
        await here.check()


async def received(here: Stage) -> list[Split]:
    """An item in two versions, another one, and half of a third, of which the rest is returned."""
    await here.begin()
    for number, version in ((1, 1), (2, 3)):
        splits = cut(RequestId(7, number), ITEM[number:], 5000, unique_id="item", version=version)
        await here.send(*splits, partition=0)
        assert (await here.result(RequestId(7, number))).success
    await here.send(*cut(RequestId(7, 3), ITEM, 5000), partition=1)
    await here.result(RequestId(7, 3))
    first, *rest = cut(REQUEST, ITEM, len(ITEM) // 2)
    await here.send(first, partition=0)
    return rest


async def go_on(here: Stage, rest: list[Split]) -> None:
    """What was open completes, versions are still known, and every rule was kept."""
    late = RequestId(7, 4)
    await here.send(*cut(late, ITEM[4:], 5000, unique_id="item", version=2), partition=1)
    await here.send(*rest, partition=0)
    assert (await here.result(REQUEST)).success
    assert isinstance((await here.result(late)).error, VersionMismatch)
    await here.check()


@scene("Replay")
async def replay(here: Stage) -> AsyncIterator[None]:
    await here.send(*await received(here), partition=0)
    assert (await here.result(REQUEST)).success
    yield
    assert look(here.shell.path("/srv/rebuilt")).files == look(here.root).files
    await here.do("rm -r /srv/rebuilt")
    await here.check()


@scene("A lost disk")
async def a_lost_disk(here: Stage) -> AsyncIterator[None]:
    rest = await received(here)
    files = look(here.root).files
    assert len(files) == 2
    for name in here.root.iterdir():
        await here.do(f"rm -r {name}")
    yield
    assert look(here.root).files.items() >= files.items()
    await go_on(here, rest)


@scene("A lost or damaged catalogue")
async def a_lost_catalogue(here: Stage) -> AsyncIterator[None]:
    rest = await received(here)
    yield
    await go_on(here, rest)


@scene("A request that holds W")
async def a_request_that_holds_w(here: Stage) -> AsyncIterator[None]:
    rest = await received(here)
    yield
    assert (await here.result(REQUEST)).status is Status.ABORTED
    await here.send(*rest, partition=0)
    await here.check()


@scene("A poisoned topic")
async def a_poisoned_topic(here: Stage) -> AsyncIterator[None]:
    """A producer that sends halves and damage, and a good item behind that."""
    await here.begin()
    halves = [cut(RequestId(666, number), b"twice", 3)[0] for number in range(100)]
    await here.send(*halves, partition=0)
    async with sending(here.servers) as producer:
        await send(producer, TOPICS[0], [damaged(message(halves[0], 1))])
    good = RequestId(7, 1)
    await here.send(*cut(good, ITEM, 5000), partition=0)
    await here.result(good)
    yield
    late = RequestId(7, 2)
    await here.send(*cut(late, ITEM, 5000), partition=0)
    assert (await here.result(late)).success
    assert (await here.results()).keys() == {good, late, halves[0].request}


@scene("Another cluster")
async def another_cluster(here: Stage) -> AsyncIterator[None]:
    rest = await received(here)
    await here.send(*rest, partition=0)
    assert (await here.result(REQUEST)).success
    before = await here.results()
    async with LocalBroker(here.shell.path("/mnt/kafka")) as new:
        await here.do(f"NEW={new.bootstrap_servers}")
        await mirror(here.servers, new.bootstrap_servers)
        old, here.servers = here.servers, new.bootstrap_servers
        yield
        later = RequestId(7, 50)
        await here.send(*cut(later, ITEM, 5000), partition=0)
        assert (await here.result(later)).success
        assert (await here.results()).keys() == {later}
        await here.shell.close()
    here.servers = old
    assert await here.results() == before


async def mirror(source: str, target: str) -> None:
    """Copy the splits, as a tool that mirrors topics does."""
    topic = TOPICS[0]
    async with administrator(target) as admin:
        settings = {"message.timestamp.type": BY_BROKER, "max.message.bytes": str(SPLITS_BYTES)}
        await admin.create_topics([NewTopic(topic, 2, 1, topic_configs=settings)])
    logs, _ = await read_topic(source, topic)
    async with sending(target) as producer:
        for number, log in logs.items():
            records = [Message(one.key, one.value, one.headers, number) for one in log]
            await send(producer, topic, records)


@scene("Topics that were deleted or made anew")
async def topics_made_anew(here: Stage) -> AsyncIterator[None]:
    await received(here)
    await here.do("systemctl stop splitferry-consume")
    offsets = await read_committed(here.servers, GROUP, TOPICS[0])
    await empty(here.servers)
    await here.do("splitferry topics create --partitions 2")
    async with AIOKafkaConsumer(
        bootstrap_servers=here.servers, group_id=GROUP, enable_auto_commit=False
    ) as later:
        for number, (offset, metadata) in offsets.items():
            where = TopicPartition(TOPICS[0], number)
            later.assign([where])
            await later.commit({where: OffsetAndMetadata(offset, metadata)})
    again = [RequestId(7, 60 + number) for number in range(2)]
    for number, request in enumerate(again):
        await here.send(*cut(request, ITEM, 1000), partition=number)
    await here.do("systemctl start splitferry-consume")
    await until(lambda: here.shell.heard("partition refused"), "an alarm")
    yield
    again.append(RequestId(7, 62))
    await here.send(*cut(again[-1], ITEM, 1000), partition=0)
    for request in again:
        assert (await here.result(request)).success
    assert (await here.results()).keys() == {*again}
