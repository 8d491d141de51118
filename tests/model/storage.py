"""A root without a disk: the real catalogue, in memory, and the real settling on a stand-in tree.

What `Tree` and the file system do for settling is a rename and a look: `Disk` does them on
dictionaries. `tests/test_model.py` holds it against the real ones. A crash may come after the
verdict, and after the rename.
"""

from __future__ import annotations

import hashlib
import threading
from asyncio import AbstractEventLoop
from collections import deque
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar, cast

from model.snapshot import copied
from splitferry_consumer.catalogue import Catalogue, Row
from splitferry_consumer.paths import Tree
from splitferry_consumer.targets import Item, Verdict
from splitferry_consumer.targets.settling import Settling, _Settlement
from splitferry_protocol.ids import RequestKey
from splitferry_protocol.records import Status

T = TypeVar("T")


NOWHERE = cast("AbstractEventLoop", None)


def nobody(_: Verdict | Exception) -> None:
    """Waits for the answer."""


class Violation(Exception):
    """Something happened that may never happen (RELIABILITY)."""


class Crash(BaseException):
    """The process dies here."""


class Decided(BaseException):
    """The first transaction of a settlement has ended, and rows are pending."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows


class File(NamedTuple):
    data: bytes
    key: RequestKey
    version: int


@dataclass
class Whole:
    """A temporary file that is durable already."""

    temporary: str

    def write_out(self) -> None: ...
    def seal(self) -> None: ...
    def release(self) -> None: ...
    def placed(self) -> None: ...


@dataclass
class Disk:
    """Stands in for `Tree`, and for the directory of incoming files."""

    temporary: dict[str, File] = field(default_factory=dict)
    """By OWNER/NAME. Every file has an owner of its own here: they die one by one."""
    places: dict[str, File] = field(default_factory=dict)
    published: dict[RequestKey, bool] = field(default_factory=dict)
    """Openings whose file was ever at its place, and whether that was synced."""
    dies: bool = False
    """The process dies after the next rename."""

    def check(self, unique_id: str) -> None:
        """Nothing stands in the way here."""

    def place(self, source: str, _directory: int, unique_id: str) -> None:
        if source not in self.temporary:
            raise FileNotFoundError(source)
        file, held = self.temporary[source], self.places.get(unique_id)
        another = held is not None and held.key != file.key
        if another and held is not None and held.version >= file.version:
            raise Violation(f"{unique_id}: version {file.version} over {held.version}")
        self.places[unique_id] = self.temporary.pop(source)
        self.published.setdefault(file.key, False)

    def sync(self, unique_ids: Iterable[str]) -> dict[str, OSError]:
        if self.dies:
            raise Crash
        self.published.update({self.places[unique_id].key: True for unique_id in unique_ids})
        return {}

    def holds(self, unique_id: str, size: int, sha256: bytes) -> bool:
        file = self.places.get(unique_id)
        return file is not None and (len(file.data), _digest(file.data)) == (size, sha256)


@dataclass
class Root:
    """All that outlives a process: what the catalogue holds, and the disk."""

    disk: Disk = field(default_factory=Disk)
    verdicts: list[tuple[Any, ...]] = field(default_factory=list)
    items: list[tuple[Any, ...]] = field(default_factory=list)
    segments: dict[str, bytes] = field(default_factory=dict)
    """Shared memory: name and bytes of what is announced."""

    @property
    def named(self) -> set[str]:
        """Temporary files that pending verdicts name."""
        return {row[12] for row in self.verdicts if row[12] is not None}

    def settled(self, key: RequestKey, unique_id: str, version: int) -> bool:
        """Whether a completed opening was durably at its place, or a newer version is."""
        file = self.disk.places.get(unique_id)
        if file is None or (file.key != key and file.version <= version):
            return False
        return self.disk.published.get(key, False) or self.disk.published[file.key]


class Settler(Settling):
    """The real settling, on the calling thread, that can stop between its transactions."""

    def __init__(self, catalogue: Catalogue, disk: Disk, stops: bool) -> None:
        self.room = threading.RLock()
        self.published = 0
        self._opened = catalogue
        self._unusable = False
        self._disk = disk
        self._tree = cast("Tree", disk)
        self._incoming = -1
        self._quota = None
        self._waiting = deque()
        self._closing = False
        self._stops = stops

    def run(self, work: Callable[[], T]) -> T:
        return work()

    def _sync_owner(self, owner: str) -> OSError | None:
        return None

    def _exists(self, temporary: str) -> bool:
        return temporary in self._disk.temporary

    def _publish(
        self,
        pending: Sequence[Row],
        own: Container[str | None] = (),
        given_up: Container[RequestKey] = (),
    ) -> tuple[dict[RequestKey, Row | Exception], set[str]]:
        if pending and self._stops:
            raise Decided(pending)
        return super()._publish(pending, own, given_up)


class Storage:
    """Operations on roots: each takes a root and returns another, with what it answered."""

    def __init__(self) -> None:
        self._catalogue = Catalogue(":memory:")
        self._database = self._catalogue._db

    @contextmanager
    def _opened(self, before: Root, stops: bool = False) -> Iterator[tuple[Root, Settler]]:
        """A copy of the root with a settler on it; what is left there when the body ends."""
        root, database = copied(before), self._database
        with self._catalogue.transaction():
            for table, rows in (("verdicts", root.verdicts), ("items", root.items)):
                database.execute(f"DELETE FROM {table}")
                for row in rows:
                    marks = ", ".join("?" * len(row))
                    database.execute(f"INSERT INTO {table} VALUES ({marks})", row)
        yield root, Settler(self._catalogue, root.disk, stops)
        disk = root.disk
        disk.dies = False
        for name in ("temporary", "places", "published"):
            setattr(disk, name, dict(sorted(getattr(disk, name).items(), key=str)))
        verdicts = database.execute('SELECT * FROM verdicts ORDER BY "group", partition, first')
        root.verdicts = [(*row[:-1], 0) for row in verdicts]  # without the time
        items = database.execute("SELECT * FROM items ORDER BY unique_id")
        root.items = [(*row[:4], 0, *row[5:]) for row in items]

    def decide(
        self, before: Root, item: Item, proposal: Verdict, data: bytes, held: Collection[str]
    ) -> tuple[Root, Row | Verdict, str | None]:
        """The first transaction. A pending row, or the verdict that is final already.

        `held` are the temporary files of living owners.
        """
        with self._opened(before, stops=True) as (root, settler):
            temporary = None
            if proposal.status is Status.COMPLETED:
                used = {*held, *root.named, *root.disk.temporary}
                temporary = next(n for k in range(1, 99) if (n := f"{k}/file") not in used)
                root.disk.temporary[temporary] = File(data, item.key, item.version)
            answer: Row | Verdict
            try:
                received = None if temporary is None else Whole(temporary)
                settlement = _Settlement(item, proposal, received, bool, NOWHERE, nobody)
                outcome = settler._settle([settlement])[0]
            except Decided as decided:
                (answer,) = decided.rows
            else:
                assert isinstance(outcome, Row), outcome
                answer = outcome.verdict
            if not settler.named(temporary or "/"):
                root.disk.temporary.pop(temporary or "", None)
                temporary = None
        return root, answer, temporary

    def publish(
        self, before: Root, row: Row, temporary: str | None, dies: bool = False
    ) -> tuple[Root, Verdict | None]:
        """The second transaction; None when the process died in it."""
        with self._opened(before) as (root, settler):
            root.disk.dies = dies
            try:
                outcome = settler._publish([row], {temporary})[0][row.key]
            except Crash:
                answer = None
            else:
                assert isinstance(outcome, Row), outcome
                answer = outcome.verdict
                root.disk.temporary.pop(temporary or "", None)
        return root, answer

    def sweep(self, before: Root, temporary: str) -> Root:
        """The owner of this temporary file is dead: finish what it began, and clear it away."""
        with self._opened(before) as (root, settler):
            owner, _, name = temporary.partition("/")
            if name not in settler.finish(owner):
                root.disk.temporary.pop(temporary, None)
        return root

    def discard(self, before: Root, temporary: str) -> Root:
        """A living owner drops a request: the file goes, unless a pending verdict names it."""
        with self._opened(before) as (root, settler):
            if not settler.named(temporary):
                root.disk.temporary.pop(temporary, None)
        return root

    def announce(self, before: Root, data: bytes) -> tuple[Root, str]:
        """A segment gets its name."""
        root = copied(before)
        name = next(n for n in map(str, range(1, 99)) if n not in root.segments)
        root.segments[name] = data
        return root, name

    def free(self, before: Root, name: str) -> Root:
        root = copied(before)
        del root.segments[name]
        return root


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()
