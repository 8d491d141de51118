"""Fuzz the codec, guided by coverage: whatever comes in is read, or refused with InvalidRecord.

    .venv/bin/python tests/fuzz/codec.py --runs 1000000 --seed 1

What is read must be written again within the contract's limits, and then be read as the same.
The corpus is `hostile.py` and one record of each kind; half of the mutations know msgpack.
"""

from __future__ import annotations

import argparse
import atexit
import os
import random
import re
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import atheris
import msgpack
import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))

with atheris.instrument_imports(include=["splitferry_protocol"]):
    from hostile import cases
    from splitferry_protocol.codec import InvalidRecord, crc_header, decode_outcome, decode_record
    from splitferry_protocol.records import HEADER_MAX, Abort, Result, Split
    from test_codec import ABORT, ACCEPTED, REQUEST, RESULT, SPLIT, Record, encode

SIZE_MAX = 12 * 1024
"""Bytes of an input: beyond the limit of a header."""
SLOW = 1.0
"""Seconds of a thread's time that no input may take."""
GROWTH = 64 * 2**20
"""Bytes that the process may grow by, from a tenth of the runs on: libFuzzer's corpus grows too."""
TOPICS, CHECKSUMS, KEYS = 2, 4, 3
"""What the first byte of an input chooses between."""
NASTY: list[Any] = [
    None, True, 1.0, 0, 1, -1, 2**63, 2**64 - 1, "", "x", "x" * 513, b"", b"x", bytes(32),
    bytes(257), [], [7, 42], {}, {"a": "b"}, [[[[1]]]], msgpack.ExtType(5, b"x"),
    msgpack.Timestamp(0), {"code": "BatchTransferFailed", "message": "x" * 2000}, {"path": "a"},
    ["t", 0, 5, 5], "result", "failed",
]  # fmt: skip

SOUND = [bytes([0]) + encode(record) for record in (SPLIT, ABORT)]
SOUND += [bytes([1]) + encode(record) for record in (ACCEPTED, RESULT)]


class Fuzzer:
    def __init__(self, runs: int) -> None:
        self.runs = runs
        self.done = 0
        self.outcomes: Counter[str] = Counter()
        self.unexpected: list[str] = []
        self.slowest = 0.0
        self.process = psutil.Process()
        self.began = time.monotonic()
        self.resident = [self._resident()]

    def _resident(self) -> int:
        return int(self.process.memory_info().rss)

    def __call__(self, data: bytes) -> None:
        began = time.thread_time()
        try:
            self.outcomes[outcome(data)] += 1
        except Exception:
            self.unexpected.append(f"{data.hex()}\n{traceback.format_exc()}")
        self.slowest = max(self.slowest, time.thread_time() - began)
        self.done += 1
        if self.done == self.runs // 10:
            self.resident.append(self._resident())

    def report(self) -> int:
        """Print what was found; returns the exit code."""
        self.resident.append(self._resident())
        seconds = time.monotonic() - self.began
        grown = self.resident[-1] - self.resident[1]
        print(f"inputs: {self.done}, {self.done / seconds:.0f} a second")
        print(f"distinct outcomes: {len(self.outcomes)}")
        print(f"read: {sum(n for said, n in self.outcomes.items() if said.startswith('read'))}")
        print(f"unexpected exceptions: {len(self.unexpected)}")
        print(f"slowest input: {self.slowest * 1000:.1f} ms")
        print("resident at the start, after a tenth and at the end:",
              *(f"{size >> 20} MiB" for size in self.resident))  # fmt: skip
        print(*self.unexpected[:3], sep="\n", end="")
        return int(bool(self.unexpected) or self.slowest > SLOW or grown > GROWTH)


def outcome(data: bytes) -> str:
    """Read one input, and check what was read. Returns which way it went."""
    if not data:
        return "empty"
    choice, value = data[0], data[1:]
    choice, topic = divmod(choice, TOPICS)
    choice, checksum = divmod(choice, CHECKSUMS)
    key: bytes | None = REQUEST.key
    match choice % KEYS:
        case 1:
            key, value = value[: choice // KEYS], value[choice // KEYS :]
        case 2:
            key = None if choice // KEYS == 0 else key
    right = crc_header(value)
    headers = [[right], [(right[0], bytes(4))], [], [right, right]][checksum]
    told: Record | InvalidRecord
    try:
        told = decode_outcome(key, value) if topic else decode_record(key, value, headers)
    except InvalidRecord as invalid:
        told = invalid
    if isinstance(told, InvalidRecord):
        assert told.error().code == told.code
        assert told.request is None or told.request.key == key
        cause = re.sub(r"[0-9a-f]*\d[0-9a-f]*|'.*'", "", told.message)
        return f"{told.code} {told.request is not None} {cause}"
    assert told.request.key == key
    check_again(told)
    return f"read {type(told).__name__}"


def check_again(told: Record) -> None:
    """What was read is written within the limits, and then read as the same."""
    value = encode(told)
    payload = len(told.payload) + 5 if isinstance(told, Split) else 0
    assert len(value) <= HEADER_MAX + payload
    key = told.request.key
    again: Record
    if isinstance(told, Split | Abort):
        again = decode_record(key, value, [crc_header(value)])
    else:
        again = decode_outcome(key, value)
    if isinstance(told, Result):
        assert isinstance(again, Result)
        wires = [result.error and result.error.to_wire() for result in (told, again)]
        assert wires[0] == wires[1]
        told, again = told._replace(error=None), again._replace(error=None)
    assert told == again


def mutate(data: bytes, size_max: int, seed: int) -> bytes:
    """Half of the time as libFuzzer does it, else on the values of the header."""
    rng = random.Random(seed)
    if rng.random() < 0.25:  # most of the corpus is broken already, and more would not be read
        data = rng.choice(SOUND)
    header, rest = taken_apart(data[1:])
    if header is None or rng.random() < 0.5:
        mutated: bytes = atheris.Mutate(data, size_max)
        return mutated
    pairs = list(header.items())
    for _ in range(rng.randint(1, 2)):
        index = rng.randrange(len(pairs) + 1)
        name = pairs[index][0] if index < len(pairs) else rng.choice(["?", "labels", "reply", 5])
        pair = name, rng.choice(NASTY)
        match rng.randrange(4):
            case 0 if index < len(pairs):
                del pairs[index]
            case 1:
                pairs.insert(index, pair)
            case _:
                pairs[index : index + 1] = [pair]
    packer = msgpack.Packer(autoreset=False)
    packer.pack_map_header(len(pairs))
    for part in (part for pair in pairs for part in pair):
        packer.pack(part)
    changed: bytes = data[:1] + packer.bytes() + rest
    return changed[:size_max]


def taken_apart(value: bytes) -> tuple[dict[Any, Any] | None, bytes]:
    unpacker = msgpack.Unpacker(strict_map_key=False)
    unpacker.feed(value)
    try:
        header = unpacker.unpack()
    except Exception:
        return None, b""
    return (header if type(header) is dict else None), value[unpacker.tell() :]


def seeds(directory: Path) -> None:
    hostile = [b"\0" + case.value for case in cases(REQUEST) if not case.large and case.value]
    for number, data in enumerate(hostile + SOUND):
        (directory / str(number)).write_bytes(data)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--runs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    fuzzer = Fuzzer(options.runs)
    with tempfile.TemporaryDirectory() as corpus:
        seeds(Path(corpus))
        atexit.register(finish, fuzzer)
        arguments = [
            *(sys.argv[0], corpus, f"-atheris_runs={options.runs}", f"-seed={options.seed}"),
            *(f"-max_len={SIZE_MAX}", "-verbosity=0", "-close_fd_mask=0"),
        ]
        atheris.Setup(arguments, fuzzer, custom_mutator=mutate)
        atheris.Fuzz()


def finish(fuzzer: Fuzzer) -> None:
    """libFuzzer ends the process by itself, with a code of its own."""
    code = fuzzer.report()
    sys.stdout.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
