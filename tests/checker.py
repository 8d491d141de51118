"""The rules of docs/RELIABILITY.md, checked from outside.

`violations` is pure: it is given everything that can be seen of a run, works out from the splits
log alone what must have become of each request, and says what differs. It shares the codec
and the rule for names of files with the consumer, and nothing else: `reference` keeps whole items
in memory and knows no transactions, no W and no restarts.

`read_history` looks: at the topics with a plain aiokafka consumer that reads committed records,
at the group's offsets, and at the files.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeVar

from aiokafka import AIOKafkaConsumer

from brokers import administrator
from splitferry_protocol.codec import InvalidRecord, decode_outcome, decode_record
from splitferry_protocol.errors import VersionMismatch
from splitferry_protocol.ids import RequestId
from splitferry_protocol.paths import path_problem
from splitferry_protocol.records import Abort, Accepted, Block, Result, Split, Status

T = TypeVar("T")

CONNECT = "__connect.errors."
LETTER_HEADERS = [
    CONNECT + name
    for name in (
        *("topic", "partition", "offset"),
        *("exception.class.name", "exception.message", "timestamp"),
    )
]
PRIVATE = ".splitferry"
METADATA = re.compile(r"splitferry/1 S=(\d+) P=(\d+) H=(\d+)(?: T=[\w-]{22},[\w-]{22})?")


# ---- what is seen


class Kept(NamedTuple):
    """A committed record."""

    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    headers: Sequence[tuple[str, bytes]] = ()


class Outcome(NamedTuple):
    """A committed record of the results topic."""

    partition: int
    offset: int
    told: Result | Accepted


class Sighting(NamedTuple):
    """A published item, as it was found when its result became visible. `digest` None: nothing
    was there."""

    result: Result
    digest: bytes | None


@dataclass(frozen=True)
class Tree:
    """What lies below a root, and around it."""

    files: Mapping[str, bytes]
    """SHA-256 by path relative to the root."""
    temporary: Sequence[str] = ()
    outside: Sequence[str] = ()


@dataclass(frozen=True)
class History:
    """A run, when everything that was sent is settled and every consumer has stopped."""

    group: str
    topic: str
    splits: Mapping[int, Sequence[Kept]]
    ends: Mapping[int, int]
    outcomes: Sequence[Outcome]
    dead_letters: Sequence[Kept]
    committed: Mapping[int, tuple[int, str]]
    tree: Tree
    sightings: Sequence[Sighting] = ()
    trees: Sequence[Tree] = ()
    """As they were found on the way, for example right after a kill."""
    excused: Mapping[RequestId, tuple[Status, str]] = field(default_factory=dict)
    """Outcomes that the log alone does not tell: by the owner's decision or the target's."""
    stubs: frozenset[tuple[int, int]] = frozenset()
    """Partition and offset of the dead letters that are too large for their topic."""


# ---- what must have happened


@dataclass(eq=False)
class Opening:
    """One request, as the log tells it."""

    partition: int
    first: int
    split: Split
    total: int | None = None
    sha256: bytes | None = None
    labels: Mapping[str, str] | None = None
    reply: bytes | None = None
    newest: bytes | None = None
    """The token that was last owed the result, also after the end."""
    data: bytearray = field(default_factory=bytearray)
    there: bytearray = field(default_factory=bytearray)
    """One byte for each byte of `data`: 1 where it was received."""
    splits: int = 0
    duplicates: int = 0
    last: int = -1
    status: Status | None = None
    """None: still open."""
    code: str | None = None

    @property
    def request(self) -> RequestId:
        return self.split.request

    @property
    def digest(self) -> bytes:
        return hashlib.sha256(self.data).digest()

    def end(self, offset: int, status: Status, code: str | None) -> None:
        self.last, self.status, self.code = offset, status, code

    def take(self, split: Split, offset: int) -> bool:
        """Apply one split; whether it made the request fail."""
        self.reply = self.newest = split.reply or self.reply
        code = self._objection(split)
        if code is not None:
            self.end(offset, Status.FAILED, code)
            return True
        self.total = self.total if split.total is None else split.total
        self.sha256 = self.sha256 or split.sha256
        self.labels = self.labels if split.labels is None else split.labels
        grown = max(0, split.end - len(self.data))
        self.data.extend(bytes(grown))
        self.there.extend(bytes(grown))
        new = self.there.count(0, split.offset, split.end)
        if new or (self.total == 0 and self.splits == 0):
            self.splits += 1
        else:
            self.duplicates += 1
        self.data[split.offset : split.end] = split.payload
        self.there[split.offset : split.end] = b"\1" * len(split.payload)
        if self.total == len(self.data) and 0 not in self.there:
            if self.sha256 in (None, self.digest):
                self.end(offset, Status.COMPLETED, None)
            else:
                self.end(offset, Status.FAILED, "BatchTransferFailed")
        return False

    def _objection(self, split: Split) -> str | None:
        if split.version != self.split.version:
            return "VersionMismatch"
        pairs = [
            (split.unique_id, self.split.unique_id),
            (split.block, self.split.block),
            (split.total, self.total),
            (split.sha256, self.sha256),
            (split.labels, self.labels),
        ]
        if any(now != before for now, before in pairs if None not in (now, before)):
            return "BatchTransferFailed"
        total = self.total if split.total is None else split.total
        if total is not None and split.end > total:
            return "SplitTaskFailed"
        if total is not None and len(self.data) > total:
            return "BatchTransferFailed"
        if split.block is Block.FILE and path_problem(split.unique_id):
            return "BatchTransferError"
        there = self.there[split.offset : split.end]
        known = self.data[split.offset : split.end]
        if known != bytes(split.payload[: len(known)]) and any(
            here and old != new for here, old, new in zip(there, known, split.payload, strict=False)
        ):
            return "BatchTransferFailed"
        return None

    def reused_by(self, split: Split, refused: bool) -> bool:
        completed = self.status is Status.COMPLETED and not refused
        return (
            split.unique_id != self.split.unique_id
            or split.version != self.split.version
            or (None not in (split.total, self.total) and split.total != self.total)
            or (completed and split.sha256 not in (None, self.digest))
        )


@dataclass
class Reference:
    """What a log must lead to."""

    openings: dict[RequestId, Opening] = field(default_factory=dict)
    dead_letters: list[tuple[int, int, str]] = field(default_factory=list)
    """Partition, offset, code."""
    accepted: list[tuple[RequestId, int, bytes]] = field(default_factory=list)
    repeats: list[tuple[RequestId, bytes]] = field(default_factory=list)


def reference(
    splits: Mapping[int, Sequence[Kept]], refused: Collection[RequestId] = ()
) -> Reference:
    """Read the log once, from its start to its end, within the horizon.

    `refused`: requests that were complete, and whose item the target did not take.
    """
    told = Reference()
    for record in (record for log in splits.values() for record in log):
        try:
            content = decode_record(record.key, record.value, record.headers)
        except InvalidRecord as invalid:
            told.dead_letters.append((record.partition, record.offset, invalid.code))
            opening = told.openings.get(invalid.request) if invalid.request else None
            if opening is not None and opening.status is None:
                opening.end(record.offset, Status.FAILED, invalid.code)
            continue
        opening = told.openings.get(content.request)
        if isinstance(content, Abort):
            if opening is not None and opening.status is None:
                opening.end(record.offset, Status.ABORTED, "BatchTransferFailed")
            continue
        if opening is None:
            # What the first split declares is known, also when it is refused for what it says.
            opening = Opening(
                record.partition, record.offset, content,
                content.total, content.sha256, content.labels,
            )  # fmt: skip
            told.openings[content.request] = opening
        if opening.status is None:
            if content.reply and opening.reply and content.reply != opening.reply:
                told.accepted.append((content.request, content.index, opening.reply))
            if opening.take(content, record.offset):
                assert opening.code is not None
                told.dead_letters.append((record.partition, record.offset, opening.code))
        elif opening.reused_by(content, content.request in refused):
            told.dead_letters.append((record.partition, record.offset, "BatchTransferError"))
        elif content.reply is not None and content.reply != opening.newest:
            opening.newest = content.reply
            told.repeats.append((content.request, content.reply))
    return told


# ---- the rules


def violations(history: History) -> list[str]:
    """What is wrong, each with the number of the rule (RELIABILITY)."""
    results = [
        outcome
        for outcome in history.outcomes
        if isinstance(outcome.told, Result) and outcome.told.group == history.group
    ]
    errors = {_told(outcome).request: _told(outcome).error for outcome in results}
    refused = {request for request, error in errors.items() if isinstance(error, VersionMismatch)}
    expected = reference(history.splits, refused)
    return [
        *_results(history, expected, results),
        *_events(history, expected),
        *_dead_letters(history, expected),
        *_offsets(history, expected, results),
        *_files(history, expected, results),
    ]


def _results(history: History, expected: Reference, results: Sequence[Outcome]) -> Iterator[str]:
    first = [outcome for outcome in results if not _told(outcome).repeat]
    counts = Counter(_told(outcome).request for outcome in first)
    for request, opening in expected.openings.items():
        ended = opening.status is not None or request in history.excused
        if counts[request] != ended:
            yield f"3: {request} from {opening.first} has {counts[request]} results, not {ended:d}"
    for outcome in first:
        result = _told(outcome)
        opening_ = expected.openings.get(result.request)
        if opening_ is None:
            yield f"3: {result.request} has a result and was never sent"
            continue
        differences = list(_differences(history, expected, outcome, opening_))
        if differences:
            yield f"3: the result of {result.request} is wrong: {', '.join(differences)}"
    for outcome in results:
        result = _told(outcome)
        said = [_told(o) for o in first if _told(o).request == result.request]
        if result.repeat and (result.status, result.input) not in [
            (one.status, one.input) for one in said
        ]:
            yield f"5: a repeat for {result.request} tells something else than its result"


def _differences(
    history: History, expected: Reference, outcome: Outcome, opening: Opening
) -> Iterator[str]:
    result = _told(outcome)
    code = result.error.code if result.error else None
    item, split = opening.data, opening.split
    wanted: dict[str, object] = {
        "partition": opening.partition,
        "input": (history.topic, opening.partition, opening.first, opening.last),
        "status": opening.status,
        "code": opening.code,
        "unique_id": split.unique_id,
        "version": split.version,
        "block": split.block,
        "labels": opening.labels,
        "splits": opening.splits,
        "duplicates": opening.duplicates,
        "reply": opening.reply,
    }
    found: dict[str, object] = {
        name: getattr(result, name) for name in wanted if hasattr(result, name)
    } | {"partition": outcome.partition, "code": code, "input": tuple(result.input)}
    if result.request in history.excused:
        status, code = history.excused[result.request]
        for name in ("input", "splits", "duplicates", "reply", "labels"):
            del wanted[name], found[name]
        wanted |= {"status": status, "code": code}
    elif opening.status is Status.COMPLETED and code == "VersionMismatch":
        # The target holds this version or a newer one: another request must have brought it.
        wanted |= {"status": Status.FAILED, "code": code}
        if not any(
            other is not opening
            and other.status is Status.COMPLETED
            and other.split.unique_id == split.unique_id
            and other.split.version >= split.version
            for other in expected.openings.values()
        ):
            yield "no other request brought its version or a newer one"
    elif opening.status is Status.COMPLETED:
        wanted |= {"size": len(item), "sha256": opening.digest}
        found |= {"size": result.size, "sha256": result.sha256}
        if split.block is Block.FILE:
            wanted["target"], found["target"] = {"path": split.unique_id}, result.target
    for name, value in wanted.items():
        if found[name] != value:
            yield f"{name} is {found[name]!r} instead of {value!r}"


def _events(history: History, expected: Reference) -> Iterator[str]:
    told = [outcome.told for outcome in history.outcomes if outcome.told.group == history.group]
    accepted = Counter(
        (event.request, event.index, event.reply) for event in told if isinstance(event, Accepted)
    )
    yield from _uneven("3: accepted event", accepted, Counter(expected.accepted))
    repeats = Counter(
        (event.request, event.reply)
        for event in told
        if isinstance(event, Result) and event.repeat and event.reply is not None
    )
    yield from _uneven("5: repeat", repeats, Counter(expected.repeats))


def _dead_letters(history: History, expected: Reference) -> Iterator[str]:
    sent = {(r.partition, r.offset): r for log in history.splits.values() for r in log}
    found: Counter[tuple[int, int, str]] = Counter()
    for letter in history.dead_letters:
        added = {name: value.decode() for name, value in letter.headers if name in LETTER_HEADERS}
        if len(added) != len(LETTER_HEADERS) or added[CONNECT + "topic"] != history.topic:
            yield f"3: the dead letter at {letter.offset} lacks its headers"
            continue
        place = int(added[CONNECT + "partition"]), int(added[CONNECT + "offset"])
        found[(*place, added[CONNECT + "exception.class.name"])] += 1
        record = sent.get(place)
        own = [header for header in letter.headers if header[0] not in LETTER_HEADERS]
        value = b"" if record is not None and place in history.stubs else record and record.value
        if record is None or (record.key, value, list(record.headers)) != (
            letter.key,
            letter.value,
            own,
        ):
            yield f"3: the dead letter of {place} is not the record that was sent"
    yield from _uneven("3: dead letter", found, Counter(expected.dead_letters))
    yield from _stopped(history, expected, found)


def _stopped(
    history: History, expected: Reference, found: Counter[tuple[int, int, str]]
) -> Iterator[str]:
    """Partitions of which nothing was told from a bad record on."""
    for partition in history.ends:
        untold = [
            letter[1]
            for letter in expected.dead_letters
            if letter[0] == partition and not found[letter]
        ]
        told = [offset for number, offset, _ in found if number == partition]
        told += [
            outcome.told.input.last
            for outcome in history.outcomes
            if isinstance(outcome.told, Result) and outcome.partition == partition
        ]
        if untold and max(told, default=-1) < min(untold):
            yield f"7: partition {partition} stopped at the bad record at offset {min(untold)}"


def _uneven(name: str, found: Counter[T], wanted: Counter[T]) -> Iterator[str]:
    for key in {*found, *wanted}:
        if found[key] != wanted[key]:
            yield f"{name} {key} was told {found[key]} times instead of {wanted[key]}"


def _offsets(history: History, expected: Reference, results: Sequence[Outcome]) -> Iterator[str]:
    have = {_told(outcome).request for outcome in results if not _told(outcome).repeat}
    for partition, end in history.ends.items():
        watermark, metadata = history.committed.get(partition, (0, ""))
        without = [
            opening.first
            for opening in expected.openings.values()
            if opening.partition == partition and opening.request not in have
        ]
        passed = [first for first in without if first < watermark]
        if passed:
            yield f"2: W of partition {partition} is {watermark}, beyond {passed} without a result"
        goal = min([*without, end])
        if watermark != goal and not passed:
            yield f"8: W of partition {partition} is {watermark}, not at {goal}"
        if not end:
            continue
        match = METADATA.fullmatch(metadata)
        if match is None:
            yield f"2: the offset of partition {partition} has the metadata {metadata!r}"
            continue
        bound, _, horizon = map(int, match.groups())
        beyond = [
            outcome.offset
            for outcome in results
            if outcome.partition == partition
            and not _told(outcome).repeat
            and _told(outcome).input.last >= watermark - horizon
            and outcome.offset < bound
        ]
        if beyond:
            yield f"5: S of partition {partition} is {bound}, beyond the results at {beyond}"


def _files(history: History, expected: Reference, results: Sequence[Outcome]) -> Iterator[str]:
    # Two versions of an item may have the same bytes: the newer one stands for both.
    items = {
        (opening.split.block, opening.split.unique_id, opening.digest): opening
        for opening in sorted(expected.openings.values(), key=lambda one: one.split.version)
        if opening.status is Status.COMPLETED
    }
    winners: dict[str, Result] = {}
    versions: set[tuple[str, int]] = set()
    for outcome in results:
        result = _told(outcome)
        if result.repeat or not result.success or result.block is not Block.FILE:
            continue
        if (result.unique_id, result.version) in versions:
            yield f"3: two requests published {result.unique_id} version {result.version}"
        versions.add((result.unique_id, result.version))
        held = winners.get(result.unique_id)
        if held is None or held.version < result.version:
            winners[result.unique_id] = result
    for path, digest in history.tree.files.items():
        if (Block.FILE, path, digest) not in items:
            yield f"1: {path} has not the bytes of any request"
        elif path not in winners:
            yield f"3: {path} was published, and no result says so"
    for path, winner in winners.items():
        opening = expected.openings.get(winner.request)
        if opening is not None and history.tree.files.get(path) != opening.digest:
            yield f"5: {path} is missing, or not the newest version that a result announced"
    for tree in history.trees:
        for path, digest in tree.files.items():
            if (Block.FILE, path, digest) not in items:
                yield f"1: for a while {path} had not the bytes of any request"
        yield from (f"9: for a while there was {path}" for path in tree.outside)
    for result, found in history.sightings:
        opening = items.get((result.block, result.unique_id, found or b""))
        if opening is None or opening.split.version < result.version:
            yield f"4: the result of {result.request} was visible before its item"
    yield from (f"6: {path} stays behind" for path in history.tree.temporary)
    yield from (f"9: {path} was written" for path in history.tree.outside)


def _told(outcome: Outcome) -> Result:
    assert isinstance(outcome.told, Result)
    return outcome.told


# ---- looking


async def read_topic(servers: str, topic: str) -> tuple[dict[int, list[Kept]], dict[int, int]]:
    """All committed records of a topic by partition, and where its partitions end."""
    consumer = AIOKafkaConsumer(
        topic,
        bootstrap_servers=servers,
        isolation_level="read_committed",
        auto_offset_reset="earliest",
    )
    await consumer.start()  # without a group it is assigned all partitions
    try:
        partitions = sorted(consumer.assignment())
        ends = await consumer.end_offsets(partitions)
        found: dict[int, list[Kept]] = {tp.partition: [] for tp in partitions}
        left = list(partitions)
        while left := [tp for tp in left if await consumer.position(tp) < ends[tp]]:
            for tp, records in (await consumer.getmany(*left, timeout_ms=200)).items():
                found[tp.partition].extend(
                    Kept(tp.partition, r.offset, r.key, r.value, r.headers)
                    for r in records
                    if r.offset < ends[tp]
                )
        return found, {tp.partition: end for tp, end in ends.items()}
    finally:
        await consumer.stop()


async def read_outcomes(servers: str, topic: str) -> list[Outcome]:
    """All committed records of a results topic."""
    records, _ = await read_topic(servers, topic)
    return [
        Outcome(record.partition, record.offset, decode_outcome(record.key, record.value))
        for log in records.values()
        for record in log
    ]


async def read_committed(servers: str, group: str, topic: str) -> dict[int, tuple[int, str]]:
    """The group's committed offsets with their metadata."""
    async with administrator(servers) as admin:
        offsets = await admin.list_consumer_group_offsets(group)
    return {
        tp.partition: (found.offset, found.metadata)
        for tp, found in offsets.items()
        if tp.topic == topic and found.offset >= 0
    }


async def read_history(
    servers: str, names: tuple[str, str, str], group: str, root: Path
) -> History:
    """Everything at once; `names` are the splits, results and dead-letters topics."""
    splits, ends = await read_topic(servers, names[0])
    letters, _ = await read_topic(servers, names[2])
    return History(
        group=group,
        topic=names[0],
        splits=splits,
        ends=ends,
        outcomes=await read_outcomes(servers, names[1]),
        dead_letters=[letter for log in letters.values() for letter in log],
        committed=await read_committed(servers, group, names[0]),
        tree=look(root),
    )


def look(root: Path) -> Tree:
    """The files below `root`, and whatever else lies in the directory that holds it."""
    files: dict[str, bytes] = {}
    temporary = []
    for path in _files_below(root):
        name = path.relative_to(root).as_posix()
        if not name.startswith(PRIVATE):
            with suppress(FileNotFoundError):  # replaced at this very moment, when looked at live
                files[name] = digest_of(path)
        elif name.startswith(f"{PRIVATE}/incoming/"):
            temporary.append(name)
    outside = [str(path) for path in _files_below(root.parent) if root not in path.parents]
    return Tree(files, temporary, outside)


def digest_of(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _files_below(directory: Path) -> Iterable[Path]:
    for folder, _, names in os.walk(directory):
        for name in names:
            path = Path(folder, name)
            if not path.is_dir():  # a symbolic link that a test has laid
                yield path
