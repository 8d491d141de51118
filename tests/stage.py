"""Real consumer processes over one root, that tests kill, stop and wake, and what can be seen."""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import json
import os
import signal
import sqlite3
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from aiokafka import AIOKafkaConsumer, TopicPartition

from brokers import Topics
from checker import (
    History,
    Sighting,
    Tree,
    digest_of,
    look,
    read_committed,
    read_history,
    read_topic,
)
from splitferry_cli.consumer_process import ConsumerProcess
from splitferry_consumer.segment import attach
from splitferry_consumer.targets.limit import MemoryLimit
from splitferry_consumer.targets.memory import MemoryTarget
from splitferry_protocol.codec import decode_outcome
from splitferry_protocol.ids import RequestId
from splitferry_protocol.records import Block, Result

SESSION = 1.0
"""Seconds: how long Kafka takes a dead consumer for a living one. Less than a default broker
allows; the brokers of these tests allow it."""
PATIENT = "10"
"""The session of consumers whose takings are counted: on a busy machine a heartbeat may come later
than `SESSION`, and then the partitions are taken again."""
LIFETIME = 5.0
"""Seconds that segments live. Each stage takes a fraction more, which marks its segments."""
BOUND = 60.0
"""Seconds after which what should happen counts as not happening."""
SHARED_MEMORY = Path("/dev/shm")


async def until(
    condition: Callable[[], bool | Awaitable[bool]],
    what: str,
    bound: float = BOUND,
    every: float = 0.02,
) -> None:
    """Wait for a condition, looked at `every` so many seconds. Fails with `what` after `bound`."""
    try:
        async with asyncio.timeout(bound):
            while True:
                answer = condition()
                if answer if isinstance(answer, bool) else await answer:
                    return
                await asyncio.sleep(every)
    except TimeoutError:
        raise AssertionError(f"not within {bound:.0f} s: {what}") from None


def whole_lines(log: Path) -> list[str]:
    """Those of a log that is written to, without the one that is not at its end yet."""
    return log.read_text().rpartition("\n")[0].splitlines()


def dead(owner: Path) -> bool:
    """Whether it is the directory of an owner that has ended, and that nobody sweeps just now."""
    try:
        lock = os.open(owner / "lock", os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(lock)
    return True


class Consumer(ConsumerProcess):
    """`splitferry consume` as a process, with its log."""

    def __init__(self, environment: dict[str, str], log: Path) -> None:
        super().__init__((), environment, log)
        self.log = log
        self.workers = int(environment.get("SPLITFERRY_WORKERS", 1))

    def heard(self, event: str) -> int:
        """How often the log tells `event`. Fails when the process has ended by itself."""
        assert self._process is None or self._process.returncode is None, self.log.read_text()
        with suppress(FileNotFoundError):
            return self.log.read_text().count(f'"event": "{event}"')
        return 0

    @property
    def hears(self) -> bool:
        """Whether a signal finds its handler: what it logs comes later. Sooner it is killed by
        one."""
        return not self.alive or (self.log.exists() and self.log.stat().st_size > 0)

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.returncode is None

    @property
    def pid(self) -> int:
        return self._running().pid

    def freeze(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        os.kill(self.pid, signal.SIGCONT)


class Stage:
    """Topics, a group and a root, and everything that was seen. Made by `stage`."""

    def __init__(self, servers: str, names: Topics, directory: Path) -> None:
        self.servers = servers
        self.names = names
        self.group = names.splits.removesuffix(".splits")
        self.sandbox = directory / "sandbox"
        self.root = self.sandbox / "root"
        self.root.mkdir(parents=True)
        self.logs = directory / "logs"
        self.logs.mkdir()
        self.lifetime = str(LIFETIME + int.from_bytes(os.urandom(3)) / 1e8)
        self.results: dict[RequestId, Result] = {}
        self.sightings: list[Sighting] = []
        self.trees: list[Tree] = []
        self.consumers: list[Consumer] = []
        self.environment: dict[str, str] = {}
        """Of every consumer that is started from now on, besides its options."""
        self._committed = self._bounds("read_committed")
        self._uncommitted = self._bounds("read_uncommitted")
        self._results: list[TopicPartition] = []
        self._watching: list[asyncio.Task[None]] = []
        self._looked: dict[TopicPartition, int] = {}
        """Offsets of the results up to which all items were looked at."""

    def _bounds(self, isolation: str) -> AIOKafkaConsumer:
        return AIOKafkaConsumer(
            bootstrap_servers=self.servers,
            isolation_level=isolation,
            auto_offset_reset="earliest",
        )

    # ---- processes

    async def consumer(self, **options: str) -> Consumer:
        """Start a consumer; `options` are named as the variables of the environment are."""
        environment = {
            "BOOTSTRAP_SERVERS": self.servers,
            "SPLITS_TOPIC": self.names.splits,
            "RESULTS_TOPIC": self.names.results,
            "DEAD_LETTERS_TOPIC": self.names.dead_letters,
            "ROOT": str(self.root),
            "GROUP": self.group,
            "SESSION_TIMEOUT": str(SESSION),
            "SEGMENT_LIFETIME": self.lifetime,
            **options,
        }
        made = Consumer(
            {f"SPLITFERRY_{name}": value for name, value in environment.items()} | self.environment,
            self.logs / f"{len(self.consumers)}.log",
        )
        self.consumers.append(made)
        await made.start()
        return made

    # ---- what is seen on the way

    async def results_ends(self) -> dict[TopicPartition, int]:
        """Where committed results end."""
        ends: dict[TopicPartition, int] = await self._committed.end_offsets(self._results)
        return ends

    async def transaction_open(self) -> bool:
        """Whether results were sent and neither committed nor aborted."""
        # In this order: what commits in between makes the second one the larger.
        written = await self._uncommitted.end_offsets(self._results)
        committed = await self._committed.end_offsets(self._results)
        return any(committed[tp] < end for tp, end in written.items())

    async def behind(self) -> int:
        """Records from W to the end of the splits, of all partitions."""
        splits = [TopicPartition(self.names.splits, tp.partition) for tp in self._results]
        ends = await self._committed.end_offsets(splits)
        offsets = await read_committed(self.servers, self.group, self.names.splits)
        return sum(end - offsets.get(tp.partition, (0, ""))[0] for tp, end in ends.items())

    async def caught_up(self) -> bool:
        """Whether all that was sent has its result: W is at the end."""
        return await self.behind() == 0

    def look(self) -> Tree:
        """The files as they are now; kept for the checker."""
        self.trees.append(look(self.root))
        return self.trees[-1]

    def writing(self) -> int:
        """How many files are on their way in."""
        files = (self.root / ".splitferry/incoming").glob("*/*")
        return sum(path.name != "lock" for path in files)

    def verdicts(self) -> dict[RequestId, bool]:
        """Requests with a verdict row, and whether its rename is pending. No consumer may run.

        Read from a copy: opening the catalogue would finish what a killed writer had begun.
        """
        private = self.root / ".splitferry"
        with tempfile.TemporaryDirectory() as copy:
            for name in ("catalog.db", "catalog.db-journal"):
                with suppress(FileNotFoundError):
                    Path(copy, name).write_bytes((private / name).read_bytes())
            database = sqlite3.connect(f"{copy}/catalog.db")
            try:
                rows = database.execute("SELECT node, sequence, temporary FROM verdicts")
                return {RequestId(n, int.from_bytes(s)): t is not None for n, s, t in rows}
            except sqlite3.OperationalError:  # killed before it was made
                return {}
            finally:
                database.close()

    def catalogue_locked(self) -> bool:
        """Whether a consumer is in the middle of a transaction of the catalogue.

        Frozen there, it keeps all others of the root from settling, and from starting.
        """
        path = self.root / ".splitferry" / "catalog.db"
        with closing(sqlite3.connect(path, timeout=0, isolation_level=None)) as database:
            try:
                database.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError:
                return True
            database.execute("ROLLBACK")
        return False

    def watch(self, results: list[TopicPartition]) -> None:
        """From now on also look at these partitions of the results."""
        self._results += results
        self._watching.append(asyncio.create_task(self._watch(results)))

    async def _watch(self, results: list[TopicPartition]) -> None:
        """Look at each item at the moment its result can be read."""
        reader = self._bounds("read_committed")
        try:
            await reader.start()
            reader.assign(results)
            while True:
                for records in (await reader.getmany(timeout_ms=100)).values():
                    for record in records:
                        told = decode_outcome(record.key, record.value)
                        if isinstance(told, Result) and not told.repeat:
                            if told.success:
                                sighting = await asyncio.to_thread(self._sight, told)
                                if sighting.digest is not None or self._lives(told):
                                    self.sightings.append(sighting)
                            self.results[told.request] = told
                for tp in results:
                    with suppress(TimeoutError):  # There is none of a topic that was deleted.
                        async with asyncio.timeout(1):
                            self._looked[tp] = await reader.position(tp)
        finally:
            await reader.stop()

    def _lives(self, result: Result) -> bool:
        """Not when its segment's lifetime, which begins when it is settled, may be over by now:
        on a slow machine the commit takes a while, and so do we."""
        age = time.time() - result.finished_at / 1000
        return result.block is Block.FILE or age < LIFETIME / 2

    def _sight(self, result: Result) -> Sighting:
        assert result.target is not None
        with suppress(FileNotFoundError):
            if "path" in result.target:
                return Sighting(result, digest_of(self.root / result.target["path"]))
            with attach(result.target["shm"], result.size) as data:
                return Sighting(result, hashlib.sha256(data).digest())
        return Sighting(result, None)

    # ---- the end

    @property
    def running(self) -> int:
        """Processes that should be alive."""
        return sum(c.workers for c in self.consumers if c._process is not None)

    def segments(self) -> list[str]:
        """Announced segments of this stage's consumers, and directories of dead ones."""
        found: list[str] = []
        for directory in SHARED_MEMORY.glob("splitferry-*/"):
            with suppress(OSError):
                if (directory / "lock").read_text() == self.lifetime:
                    found += [path.name for path in SHARED_MEMORY.glob(f"{directory.name}-*")]
                    found.append(directory.name)
        # A living worker has one directory, with nothing left in it at the end.
        return found if len(found) > self.running else []

    async def settle(self, held: int = 0) -> None:
        """Wait until W is at the end, or `held` records before it, and the living have swept what
        the dead had on its way in."""

        async def read() -> bool:
            return await self.behind() <= held

        def swept() -> bool:
            owners = [*(self.root / ".splitferry/incoming").glob("*")]
            # One that was started again may not have come so far that it has a directory.
            done = len(owners) <= self.running and not any(map(dead, owners))
            return done or not self.running

        await until(read, "W at the end", every=0.2)
        await until(swept, "temporary files of the dead are gone", every=0.2)

    async def freed(self) -> None:
        """Wait until what was left in the shared memory has had its time."""
        await until(lambda: not self.segments(), "segments of the dead are gone", every=0.2)

    async def stop(self) -> None:
        """SIGTERM for all who still run. Then nothing is left that a sweep would not clear."""
        await until(lambda: all(c.hears for c in self.consumers), "all hear signals")
        codes = await asyncio.gather(*(consumer.stop() for consumer in self.consumers))
        assert not any(codes), codes

        async def looked() -> bool:
            ends = await self.results_ends()
            return all(self._looked.get(tp, 0) >= end for tp, end in ends.items())

        async def swept() -> bool:
            return await asyncio.to_thread(self._sweep_memory)

        with suppress(AssertionError):  # Not when the topic was made anew.
            await until(looked, "all items were looked at", LIFETIME, every=0.2)
        await until(swept, "segments of the dead are gone", every=0.2)

    def _sweep_memory(self) -> bool:
        """What the dead have announced lives on for its lifetime: let that be over. Others sweep,
        too, and may hold an owner's lock just now."""
        for name in self.segments():
            with suppress(FileNotFoundError):
                os.utime(SHARED_MEMORY / name, (0, 0))
        MemoryTarget(MemoryLimit(0)).close()
        return not self.segments()

    async def history(self, **more: Any) -> History:
        """Everything for the checker."""
        names = (self.names.splits, self.names.results, self.names.dead_letters)
        history = await read_history(self.servers, names, self.group, self.root)
        return replace(history, sightings=self.sightings, trees=self.trees, **more)

    def errors(self) -> list[str]:
        """What consumers logged as errors: nothing that these tests do may be one.

        Only our own: aiokafka calls a missed heartbeat one, and leaves futures of a fenced
        producer that nobody retrieves.
        """
        lines = [line for c in self.consumers for line in whole_lines(c.log)]
        said = [line for line in lines if json.loads(line).get("level") == "error"]
        return [line for line in said if json.loads(line)["logger"].startswith("splitferry_")]


@asynccontextmanager
async def stage(servers: str, names: Topics, directory: Path) -> AsyncIterator[Stage]:
    """A stage whose consumers are all gone at the end, whatever happens."""
    made = Stage(servers, names, directory)
    await made._committed.start()
    await made._uncommitted.start()
    try:
        ends = await read_topic(servers, names.results)
        made.watch([TopicPartition(names.results, number) for number in ends[1]])
        yield made
    except BaseException:
        for consumer in made.consumers[-2:]:
            print(f"{consumer.log}:", *consumer.log.read_text().splitlines()[-40:], sep="\n")
        raise
    finally:
        for watching in made._watching:
            watching.cancel()
            await asyncio.wait([watching])
        for consumer in made.consumers:
            with suppress(AssertionError, ProcessLookupError):
                await consumer.kill()
        await made._committed.stop()
        await made._uncommitted.stop()
