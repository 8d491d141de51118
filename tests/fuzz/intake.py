"""Fuzz the whole intake: hostile and sound records, through the real partition to real targets.

    .venv/bin/python tests/fuzz/intake.py --runs 100000 --seed 1

In rounds, each with a log, a root and shared memory of its own, and owners that follow one
another. After each round everything is settled, W stands at the end of the log or at the first
open request, `checker.violations` finds nothing, and no error was logged.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
import structlog

sys.path.insert(0, str(Path(__file__).parents[1]))

from checker import History, Kept, Outcome, look, violations
from hostile import cases
from memory_transport import DEAD_LETTERS, RESULTS, SPLITS, Kafka
from owners import STANDARD, Owner, until
from splitferry_consumer import partition as partition_module
from splitferry_consumer.targets import Target
from splitferry_consumer.targets.file import FileTarget
from splitferry_consumer.targets.limit import MemoryLimit
from splitferry_consumer.targets.memory import MemoryTarget
from splitferry_protocol.codec import InvalidRecord, crc_header, decode_outcome, decode_record
from splitferry_protocol.ids import RequestId
from splitferry_protocol.records import Block, Split
from workload import KIB, Message, make_load

ROUND = 2000
"""Records of a round, about: the checker keeps all of its items in memory."""
SIZES = (0, 1, 100, 10 * KIB, 70 * KIB)
FAR = 2**24
"""Bytes: a first split beyond makes the target refuse, which the log does not tell; it is tried
in `test_attacks.py`."""
HANDOVERS = 3
TENURE = 0.4
"""Seconds that an owner has before the next one follows, at most."""
BOUND = 30.0
"""Seconds after which a partition that is not at its end counts as stalled."""
GROWTH = 64 * 2**20
"""Bytes that the process may grow by, from a tenth of the rounds on."""
HORIZON = 10 * ROUND


def load(rng: random.Random) -> list[Message]:
    """Records of requests of every kind, with hostile ones for the same and for other ids."""
    sound = make_load(rng, 100, 1, SIZES, side_by_side=20)
    ids = sorted({key for message in sound if (key := message.key) and b"-" in key})
    hostile = [
        Message(case.key, case.value, case.headers)
        for number in range(2)
        for request in (RequestId.from_key(rng.choice(ids)), RequestId(9, number))
        for case in cases(request)
        if not case.large
    ]
    wanted = ROUND - len(sound)
    mixed = rng.sample(hostile, wanted // 2) + [mutated(rng, rng.choice(sound)) for _ in
                                                range(wanted - wanted // 2)]  # fmt: skip
    # Each among all that follows its own place, so that the sound ones keep their order.
    for message in mixed:
        sound.insert(rng.randrange(len(sound) + 1), message)
    return [message for message in sound if not reaches_far(message)]


def mutated(rng: random.Random, message: Message) -> Message:
    value = bytearray(message.value or b"")
    for _ in range(rng.randint(1, 3)):
        start = rng.randrange(min(len(value), 200) + 1)
        value[start : start + rng.randint(0, 3)] = rng.randbytes(rng.randint(0, 3))
    sums = [message.headers, [crc_header(bytes(value))], []]
    headers = rng.choices(sums, [2, 7, 1])[0]
    return replace(message, value=bytes(value), headers=headers)


def reaches_far(message: Message) -> bool:
    with suppress(InvalidRecord):
        content = decode_record(message.key, message.value, message.headers)
        return isinstance(content, Split) and content.total is None and content.end > FAR
    return False


async def run_round(rng: random.Random, directory: Path) -> tuple[int, Counter[str]]:
    """One round in `directory`. Returns the records and what they led to. Raises if it is wrong."""
    kafka, root, messages = Kafka(), directory / "root", load(rng)
    with ThreadPoolExecutor(4) as threads, structlog.testing.capture_logs() as logged:
        files = await FileTarget.open(root, executor=threads)
        memory = await MemoryTarget.open(MemoryLimit(2**28), lifetime=0, executor=threads)
        targets: dict[Block, Target] = {Block.FILE: files, Block.MEM: memory}
        owners = []
        for part in parts(rng, messages):
            for message in part:
                kafka.send_raw(message.key, message.value, message.headers)
            owners.append(Owner(kafka, targets, threads, rules=replace(STANDARD, horizon=HORIZON)))
            if len(owners) <= HANDOVERS:
                # Some have committed results by then, while W is still at an earlier request.
                await asyncio.sleep(rng.random() ** 2 * TENURE)
                await owners[-1].lose()
        await until(lambda: owners[-1].finished, BOUND)
        await owners[-1].lose()
        for target in targets.values():
            await asyncio.to_thread(target.close)
    history = seen(kafka, root)
    wrong = violations(history)
    wrong += [str(entry) for entry in logged if entry["log_level"] in {"error", "critical"}]
    if wrong:
        raise AssertionError("\n".join(wrong[:20]))
    told = Counter(type(outcome.told).__name__ for outcome in history.outcomes)
    return len(messages), told + Counter({"dead letter": len(history.dead_letters)})


def parts(rng: random.Random, messages: list[Message]) -> Iterator[list[Message]]:
    cuts = sorted(rng.choices(range(len(messages)), k=HANDOVERS))
    for start, end in zip([0, *cuts], [*cuts, len(messages)], strict=True):
        yield messages[start:end]


def seen(kafka: Kafka, root: Path) -> History:
    def kept(topic: str) -> list[Kept]:
        records = kafka.committed_records(topic)
        return [Kept(0, r.offset, r.key, r.value, r.headers) for r in records]

    return History(
        group=STANDARD.group,
        topic=SPLITS,
        splits={0: kept(SPLITS)},
        ends={0: kafka.logs[SPLITS, 0].end},
        outcomes=[Outcome(0, r.offset, decode_outcome(r.key, r.value)) for r in kept(RESULTS)],
        dead_letters=kept(DEAD_LETTERS),
        committed=kafka.offsets,
        tree=look(root),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--runs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    # The pauses of production are for the sake of others; nobody else is here.
    partition_module.TICK = partition_module.COMMIT_INTERVAL = 0.005
    partition_module.RETAKE_PAUSES = (0.001,) * 5
    process, began = psutil.Process(), time.monotonic()
    inputs, told, resident = 0, Counter[str](), []
    shared = Path("/dev/shm")  # where fsync costs nothing
    number = 0
    while inputs < options.runs:
        name = f"{options.seed}/{number}"
        with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as directory:
            try:
                count, what = asyncio.run(run_round(random.Random(name), Path(directory)))
            except Exception as error:
                print(f"round {name}: {type(error).__name__}: {error}")
                return 1
        inputs, told, number = inputs + count, told + what, number + 1
        gc.collect()
        resident.append(process.memory_info().rss)
    tenth = resident[len(resident) // 10]
    print(
        f"inputs: {inputs} in {number} rounds, {inputs / (time.monotonic() - began):.0f} a second"
    )
    print("told:", ", ".join(f"{count} {what}" for what, count in sorted(told.items())))
    print("violations: 0\nerrors logged: 0\npartitions stalled: 0")
    print("resident after the first round, after a tenth and at the end:",
          *(f"{size >> 20} MiB" for size in (resident[0], tenth, resident[-1])))  # fmt: skip
    return int(resident[-1] - tenth > GROWTH)


if __name__ == "__main__":
    sys.exit(main())
