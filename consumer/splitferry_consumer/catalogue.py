"""The catalogue of a root: which items are published, and what became of each request.

SQLite at `ROOT/.splitferry/catalog.db` (DESIGN, "Verdict first, rename second"). Everything
here blocks and belongs to one thread; `targets.settling` says when which transaction runs. A
verdict row is *pending* while it names a temporary file that is still to be renamed, and final
afterwards.

Versions, sequences and sizes go up to 2**64 - 1, SQLite's integers are signed: they are kept as
8 bytes, big-endian, which compare as the numbers do.
"""

# ruff: noqa: S608  what is put into the statements are the names of columns below
from __future__ import annotations

import errno
import json
import os
import sqlite3
import stat
import time
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

from splitferry_protocol.errors import (
    BatchTransferFailed,
    VersionMismatch,
    WsDataError,
    error_from_wire,
)
from splitferry_protocol.ids import RequestId, RequestKey
from splitferry_protocol.records import Status

from .modes import make_private
from .targets import Item, TargetUnusable, Verdict

T = TypeVar("T")

SCHEMA = 1
BUSY_TIMEOUT = 5.0
"""Seconds to wait for another process's transaction."""

_CREATE = (
    """CREATE TABLE items (
        unique_id TEXT PRIMARY KEY, version BLOB NOT NULL, size INTEGER NOT NULL,
        sha256 BLOB NOT NULL, published_at INTEGER NOT NULL, "group" TEXT NOT NULL,
        topic TEXT NOT NULL, partition INTEGER NOT NULL, first INTEGER NOT NULL,
        node INTEGER NOT NULL, sequence BLOB NOT NULL
    ) WITHOUT ROWID""",
    """CREATE TABLE verdicts (
        "group" TEXT NOT NULL, topic TEXT NOT NULL, partition INTEGER NOT NULL,
        first INTEGER NOT NULL, node INTEGER NOT NULL, sequence BLOB NOT NULL,
        unique_id TEXT NOT NULL, version BLOB NOT NULL, status TEXT NOT NULL,
        error TEXT, size BLOB, sha256 BLOB, temporary TEXT, decided_at INTEGER NOT NULL,
        PRIMARY KEY ("group", topic, partition, first, node, sequence)
    ) WITHOUT ROWID""",
    "CREATE INDEX pending ON verdicts (unique_id) WHERE temporary IS NOT NULL",
    "CREATE TABLE totals (published INTEGER NOT NULL)",
    "INSERT INTO totals VALUES (0)",
    """CREATE TRIGGER item_added AFTER INSERT ON items BEGIN
        UPDATE totals SET published = published + new.size;
    END""",
    """CREATE TRIGGER item_replaced AFTER UPDATE OF size ON items BEGIN
        UPDATE totals SET published = published + new.size - old.size;
    END""",
    """CREATE TRIGGER item_removed AFTER DELETE ON items BEGIN
        UPDATE totals SET published = published - old.size;
    END""",
    f"PRAGMA user_version = {SCHEMA}",
)
_ALIKE = "CREATE INDEX IF NOT EXISTS alike ON items (unique_id COLLATE alike)"
_TABLES = {"items", "verdicts", "totals"}
_ERRNO = {
    sqlite3.SQLITE_FULL: errno.ENOSPC,
    sqlite3.SQLITE_BUSY: errno.EBUSY,
    sqlite3.SQLITE_READONLY: errno.EROFS,
    sqlite3.SQLITE_READONLY_DBMOVED: errno.ESTALE,
}
_KEY = '"group" = ? AND topic = ? AND partition = ? AND first = ? AND node = ? AND sequence = ?'
_REQUEST = "topic, partition, first, node, sequence"
_COLUMNS = (
    '"group", topic, partition, first, node, sequence, '
    "unique_id, version, status, error, size, sha256, temporary"
)


@dataclass(frozen=True, slots=True)
class Row:
    """A verdict row. `temporary` is OWNER/NAME while the rename is pending."""

    key: RequestKey
    unique_id: str
    version: int
    verdict: Verdict
    temporary: str | None


class Published(NamedTuple):
    """An item at its place. `size` is bytes."""

    version: int
    size: int
    sha256: bytes


class Proposal(NamedTuple):
    """What a request is to become. `temporary` is OWNER/NAME of its synced file, if completed."""

    item: Item
    proposed: Verdict
    temporary: str | None


class _Held(NamedTuple):
    """A version of an item: published, or pending, which nothing stops any more."""

    version: int
    request: tuple[Any, ...]
    """As `_request` has it: whose version it is, whatever the group."""


class Standing(NamedTuple):
    """How a pending row stands among the others."""

    temporary: str
    superseded: bool
    """Its item is published in a newer version."""
    contested: bool
    """Other versions of its item are pending, too."""


class Catalogue:
    """Opened by the thread that uses it.

    Every method raises OSError when SQLite could not do its work for now (locked, disk full,
    I/O error), and TargetUnusable when the database is damaged. The writing ones belong inside
    `transaction`.

    After either of them only a catalogue opened anew can be trusted: the file at the path may
    be another one by now (deleted, put back from a backup, moved with its root).

    Attributes:
        made: there was none.
    """

    def __init__(self, path: str, folding: bool = False) -> None:
        """Open or make the catalogue at `path`. Raises TargetUnusable, OSError.

        `folding`: the file system takes names for the same that differ only in case, or in how
        their letters are composed.
        """
        self._path = path
        self._folding = folding
        self.made = False
        # SQLite's locks are POSIX locks: a close of any other descriptor of this file in this
        # process would drop them. So the file is looked at, and never opened, besides SQLite.
        with suppress(FileNotFoundError):
            if not stat.S_ISREG(os.lstat(path).st_mode):
                raise TargetUnusable(f"{path} is not a regular file: move it away")
        with self._translated():
            self._db = sqlite3.connect(path, timeout=BUSY_TIMEOUT, isolation_level=None)
        try:
            with self._translated():
                # A rollback journal works wherever locks do; WAL needs memory shared by all
                # users of the database, which no network file system gives.
                self._db.execute("PRAGMA journal_mode = PERSIST").fetchone()
                # The file is there now, empty if it is new; a new journal takes over its mode.
                for name in (path, f"{path}-journal"):
                    with suppress(FileNotFoundError):
                        make_private(name)
                self._db.execute("PRAGMA journal_size_limit = 1048576").fetchone()
                self._db.execute("PRAGMA synchronous = FULL")
                # Always, for whoever shares the root has to keep the index below.
                self._db.create_collation("alike", _compare_folded)
            self._prepare()
            if folding:
                with self.transaction():
                    self._db.execute(_ALIKE)
        except BaseException:
            self._db.close()
            raise

    def _prepare(self) -> None:
        if self._is_ours():
            return
        with self.transaction():
            if self._is_ours():  # Another process was quicker.
                return
            for statement in _CREATE:
                self._db.execute(statement)
        self.made = True

    def _is_ours(self) -> bool:
        """Whether this is a catalogue; False: the database is empty. Raises TargetUnusable."""
        with self._translated():
            # One statement, so one moment: between two of them another process may have made it.
            schema, names = self._db.execute(
                "SELECT user_version, (SELECT json_group_array(name) FROM sqlite_master) "
                "FROM pragma_user_version"
            ).fetchone()
        tables = set(json.loads(names))
        if schema == 0 and not tables:
            return False
        if schema > SCHEMA and "verdicts" in tables:
            raise TargetUnusable(
                f"{self._path} was written by a newer splitferry (schema {schema}, this one "
                f"knows {SCHEMA}): upgrade splitferry, or use another root"
            )
        if schema != SCHEMA or not tables >= _TABLES:
            raise TargetUnusable(f"{self._path} is no catalogue of splitferry: move it away")
        return True

    def close(self) -> None:
        self._db.close()

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            code = _ERRNO.get(error.sqlite_errorcode, errno.EIO)
            raise OSError(code, f"{self._path}: {self._cause(code, error)}") from error
        except sqlite3.DatabaseError as error:
            if type(error) is not sqlite3.DatabaseError:
                raise
            raise TargetUnusable(
                f"{self._path} is damaged ({error}): restore it from a backup, or move it away "
                "with its -journal, and an empty one is made, which forgets the versions held"
            ) from error

    def _cause(self, code: int, error: sqlite3.Error) -> str:
        if code == errno.ESTALE:
            return "the catalogue was deleted or moved"
        if code == errno.EBUSY:
            return f"locked by {_lock_holder(self._path) or 'another process'}"
        return str(error)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing, durable when it has ended, and alone among all users of the root."""
        with self._translated():
            try:
                self._db.execute("BEGIN IMMEDIATE")
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    with suppress(sqlite3.Error):
                        self._db.execute("ROLLBACK")
                raise

    def find(self, key: RequestKey) -> Row | None:
        rows = self._rows(f"WHERE {_KEY}", _key(key))
        return rows[0] if rows else None

    def pending(self, owner: str) -> list[Row]:
        """The pending rows whose temporary files lie in the directory `owner`."""
        rows = self._rows("WHERE temporary IS NOT NULL", ())
        return [row for row in rows if (row.temporary or "").startswith(f"{owner}/")]

    def _rows(self, where: str, values: tuple[Any, ...]) -> list[Row]:
        with self._translated():
            found = self._db.execute(f"SELECT {_COLUMNS} FROM verdicts {where}", values)
            try:
                return [_row(*columns) for columns in found]
            except (TypeError, ValueError) as error:
                raise sqlite3.DatabaseError(f"a verdict makes no sense: {error}") from error

    def item(self, unique_id: str) -> Published | None:
        """What is published under the name."""
        with self._translated():
            found = self._db.execute(
                "SELECT version, size, sha256 FROM items WHERE unique_id = ?", (unique_id,)
            ).fetchone()
        return found and Published(int.from_bytes(found[0]), int(found[1]), bytes(found[2]))

    def published(self) -> int:
        """Bytes of all published items."""
        with self._translated():
            return int(self._db.execute("SELECT published FROM totals").fetchone()[0])

    def decide(
        self, proposals: Sequence[Proposal], quota: int | None
    ) -> list[tuple[Row, str | None]]:
        """Phase 1: the verdicts that hold for these openings; the first writer wins.

        Returns for each the row, and the temporary file that it named before, if it names
        another now.
        """
        rows = self._known([one.item.key for one in proposals])
        held = self._held({one.item.unique_id for one in proposals})
        occupied = self._occupied() if quota is not None else 0
        new: dict[RequestKey, Row] = {}
        decided: list[tuple[Row, str | None]] = []
        for item, proposed, temporary in proposals:
            row, before = rows.get(item.key), None
            if row is None:
                verdict, named = proposed, None
                if proposed.status is Status.COMPLETED:
                    if self._folding:
                        self._insert(new)
                        new.clear()
                    growth = (
                        self._growth(item.unique_id, proposed.size or 0) if quota is not None else 0
                    )
                    error = self._objection(item, held[item.unique_id], occupied + growth, quota)
                    if error is None:
                        place = {"path": item.unique_id}
                        verdict = proposed._replace(target=place)
                        held[item.unique_id].append(_Held(item.version, _request(item.key)))
                        occupied += growth
                        named = temporary
                    else:
                        verdict = Verdict(Status.FAILED, error, proposed.size, proposed.sha256)
                row = new[item.key] = Row(item.key, item.unique_id, item.version, verdict, named)
            elif (
                row.temporary is not None
                and proposed.status is Status.COMPLETED
                and row.temporary != temporary
                and (row.verdict.size, row.verdict.sha256) == (proposed.size, proposed.sha256)
            ):
                # The owner before us got this far and no further. Its file may be gone, renamed
                # or not; ours has the same bytes, by the log, and is surely there.
                before, row = row.temporary, replace(row, temporary=temporary)
                if item.key in new:
                    new[item.key] = row
                else:
                    self._db.execute(
                        f"UPDATE verdicts SET temporary = ? WHERE {_KEY}",
                        (temporary, *_key(item.key)),
                    )
            rows[item.key] = row
            decided.append((row, before))
        self._insert(new)
        return decided

    def _known(self, keys: Iterable[RequestKey]) -> dict[RequestKey, Row]:
        """The rows that are there already."""
        firsts: defaultdict[tuple[str, str, int], list[int]] = defaultdict(list)
        for key in keys:
            firsts[key.group, key.topic, key.partition].append(key.first)
        found: dict[RequestKey, Row] = {}
        for partition, offsets in firsts.items():
            marks, values = _one_of(offsets)
            where = f'WHERE "group" = ? AND topic = ? AND partition = ? AND first IN ({marks})'
            found.update((row.key, row) for row in self._rows(where, (*partition, *values)))
        return found

    def _held(self, unique_ids: Collection[str]) -> defaultdict[str, list[_Held]]:
        """The versions of these items that are published or pending."""
        held: defaultdict[str, list[_Held]] = defaultdict(list)
        marks, values = _one_of([*unique_ids])
        for unique_id, version, *request in self._db.execute(
            f"""SELECT unique_id, version, {_REQUEST} FROM items WHERE unique_id IN ({marks})
            UNION ALL
            SELECT unique_id, version, {_REQUEST} FROM verdicts WHERE temporary IS NOT NULL""",
            values,
        ):
            held[unique_id].append(_Held(int.from_bytes(version), tuple(request)))
        return held

    def _objection(
        self, item: Item, held: Iterable[_Held], taken: int, quota: int | None
    ) -> WsDataError | None:
        """Why a completed item is not taken; with it the root would hold `taken` bytes."""
        request = _request(item.key)
        newest = max((one.version for one in held if one.request != request), default=-1)
        if self._folding and (other := self._alike(item.unique_id)):
            return BatchTransferFailed(
                item.key.request, f"the root's file system takes its name for that of {other!r}"
            )
        if newest >= item.version:
            return VersionMismatch.not_newer_than(newest, item.version)
        if quota is not None and taken > quota:
            return BatchTransferFailed(
                item.key.request, f"with it the root would hold {taken} bytes, quota {quota}"
            )
        return None

    def _alike(self, unique_id: str) -> str | None:
        """An item of another name that has the same place on a folding file system."""
        found = self._db.execute(
            """SELECT unique_id FROM items
            WHERE unique_id = ?1 COLLATE alike AND unique_id <> ?1
            UNION ALL
            SELECT unique_id FROM verdicts WHERE temporary IS NOT NULL
            AND unique_id = ?1 COLLATE alike AND unique_id <> ?1""",
            (unique_id,),
        ).fetchone()
        return found and str(found[0])

    def _occupied(self) -> int:
        """Bytes of all items that are published or pending."""
        return self.published() + sum(
            self._growth(row.unique_id, row.verdict.size or 0)
            for row in self._rows("WHERE temporary IS NOT NULL", ())
        )

    def _growth(self, unique_id: str, size: int) -> int:
        held = self._db.execute("SELECT size FROM items WHERE unique_id = ?", (unique_id,))
        row = held.fetchone()
        return size - (int(row[0]) if row else 0)

    def _insert(self, rows: Mapping[RequestKey, Row]) -> None:
        now = _now()
        self._db.executemany(
            f"INSERT INTO verdicts ({_COLUMNS}, decided_at) VALUES ({'?, ' * 13}?)",
            (
                (
                    *_key(row.key),
                    row.unique_id,
                    _u64(row.version),
                    row.verdict.status.value,
                    _error(row.verdict.error),
                    None if row.verdict.size is None else _u64(row.verdict.size),
                    row.verdict.sha256,
                    row.temporary,
                    now,
                )
                for row in rows.values()
            ),
        )

    def standing(self) -> dict[RequestKey, Standing]:
        """How all pending rows stand."""
        with self._translated():
            found = self._db.execute(
                f"""SELECT "group", {_REQUEST}, temporary, EXISTS (
                    SELECT 1 FROM items WHERE items.unique_id = verdicts.unique_id
                    AND items.version > verdicts.version
                ), unique_id FROM verdicts WHERE temporary IS NOT NULL"""
            ).fetchall()
        names = Counter(unique_id for *_, unique_id in found)
        return {
            RequestKey(
                group, topic, partition, RequestId(node, int.from_bytes(sequence)), first
            ): Standing(temporary, bool(superseded), names[unique_id] > 1)
            for (
                group, topic, partition, first, node, sequence, temporary, superseded, unique_id
            ) in found
        }  # fmt: skip

    def newer_pending(self, row: Row) -> list[Row]:
        """The pending rows of newer versions of the row's item."""
        return self._rows(
            "WHERE unique_id = ? AND version > ? AND temporary IS NOT NULL",
            (row.unique_id, _u64(row.version)),
        )

    def publish(self, rows: Sequence[Row]) -> list[Row]:
        """Phase 2: the pending rows' files are at their places. Returns the final rows."""
        now = _now()
        self._db.executemany(
            """INSERT INTO items
                ("group", topic, partition, first, node, sequence,
                unique_id, version, size, sha256, published_at)
            VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
            ON CONFLICT (unique_id) DO UPDATE SET
                "group" = excluded."group", topic = excluded.topic,
                partition = excluded.partition, first = excluded.first, node = excluded.node,
                sequence = excluded.sequence, version = excluded.version, size = excluded.size,
                sha256 = excluded.sha256, published_at = excluded.published_at""",
            (
                (
                    *_key(row.key),
                    row.unique_id,
                    _u64(row.version),
                    row.verdict.size,
                    row.verdict.sha256,
                    now,
                )
                for row in rows
            ),
        )
        return self.finish(rows)

    def finish(self, rows: Sequence[Row]) -> list[Row]:
        """Make the pending rows final, with their verdicts as they are given. Returns them."""
        self._db.executemany(
            f"UPDATE verdicts SET temporary = NULL, status = ?, error = ? WHERE {_KEY}",
            ((row.verdict.status.value, _error(row.verdict.error), *_key(row.key)) for row in rows),
        )
        return [Row(row.key, row.unique_id, row.version, row.verdict, None) for row in rows]

    def passed(self, group: str, topic: str, partition: int, before: int) -> None:
        """Forget the final rows of openings below the offset `before`."""
        self._db.execute(
            """DELETE FROM verdicts WHERE "group" = ? AND topic = ? AND partition = ?
            AND first < ? AND temporary IS NULL""",
            (group, topic, partition, before),
        )


def _compare_folded(one: str, other: str) -> int:
    first, second = (unicodedata.normalize("NFKD", name).casefold() for name in (one, other))
    return (first > second) - (first < second)


def _lock_holder(path: str) -> str | None:
    """The process that holds a lock of SQLite for writing, where Linux tells it."""
    with suppress(OSError, ValueError):
        found = os.stat(path)
        major, minor = os.major(found.st_dev), os.minor(found.st_dev)
        inode = f"{major:02x}:{minor:02x}:{found.st_ino}"
        with open("/proc/locks", encoding="ascii") as locks:
            for line in locks:
                # NUMBER: POSIX ADVISORY WRITE PID DEVICE:INODE START END
                _, kind, _, access, process, place, *_ = line.split()
                if (kind, access, place) == ("POSIX", "WRITE", inode):
                    return f"process {process}"
    return None


def _u64(number: int) -> bytes:
    return number.to_bytes(8)


def _key(key: RequestKey) -> tuple[str, str, int, int, int, bytes]:
    node_id, sequence = key.request
    return key.group, key.topic, key.partition, key.first, node_id, _u64(sequence)


def _request(key: RequestKey) -> tuple[Any, ...]:
    """Who a version is of: the same for every group."""
    return _key(key)[1:]


def _one_of(values: Sequence[T]) -> tuple[str, list[T]]:
    """Marks and values for IN; numbers of marks that differ little share a prepared statement."""
    size = 1 << (len(values) - 1).bit_length()
    return ", ".join("?" * size), [*values, *[values[-1]] * (size - len(values))]


def _now() -> int:
    return time.time_ns() // 1_000_000


def _error(error: WsDataError | None) -> str | None:
    return None if error is None else json.dumps(error.to_wire())


def _row(
    group: str,
    topic: str,
    partition: int,
    first: int,
    node: int,
    sequence: bytes,
    unique_id: str,
    version: bytes,
    status: str,
    error: str | None,
    size: bytes | None,
    sha256: bytes | None,
    temporary: str | None,
) -> Row:
    verdict = Verdict(
        Status(status),
        None if error is None else error_from_wire(json.loads(error)),
        None if size is None else int.from_bytes(size),
        sha256,
        {"path": unique_id} if status == Status.COMPLETED else None,
    )
    request = RequestId(node, int.from_bytes(sequence))
    key = RequestKey(group, topic, partition, request, first)
    return Row(key, unique_id, int.from_bytes(version), verdict, temporary)
