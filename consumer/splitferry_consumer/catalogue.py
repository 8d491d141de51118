"""The catalogue of a root: which items are published, and what became of each request.

SQLite at `ROOT/.splitferry/catalog.db` (DESIGN, "A file", 5). Everything here blocks and belongs
to one thread; `targets.settling` says when which transaction runs. A verdict row is *pending*
while it names a temporary file that is still to be renamed, and final afterwards.

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
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

from splitferry_protocol.errors import (
    BatchTransferFailed,
    VersionMismatch,
    WsDataError,
    error_from_wire,
)
from splitferry_protocol.ids import RequestId, RequestKey
from splitferry_protocol.records import Status

from .targets import Item, TargetUnusable, Verdict

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
_ERRNO = {sqlite3.SQLITE_FULL: errno.ENOSPC, sqlite3.SQLITE_BUSY: errno.EBUSY}
_KEY = '"group" = ? AND topic = ? AND partition = ? AND first = ? AND node = ? AND sequence = ?'
_SAME_REQUEST = "(topic, partition, first, node, sequence)"
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


class Catalogue:
    """Opened by the thread that uses it.

    Every method raises OSError when SQLite could not do its work for now (locked, disk full,
    I/O error), and TargetUnusable when the database is damaged. The writing ones belong inside
    `transaction`.
    """

    def __init__(self, path: str) -> None:
        """Open or make the catalogue at `path`. Raises TargetUnusable, OSError."""
        self._path = path
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
                self._db.execute("PRAGMA journal_size_limit = 1048576").fetchone()
                self._db.execute("PRAGMA synchronous = FULL")
            self._prepare()
        except BaseException:
            self._db.close()
            raise

    def _prepare(self) -> None:
        if self._schema() == SCHEMA:
            return
        with self.transaction():
            found = self._schema()  # Another process may have been quicker.
            if found > SCHEMA:
                raise TargetUnusable(
                    f"{self._path} was written by a newer splitferry (schema {found}, this one "
                    f"knows {SCHEMA}): upgrade splitferry, or use another root"
                )
            if found == 0:
                for statement in _CREATE:
                    self._db.execute(statement)

    def _schema(self) -> int:
        with self._translated():
            return int(self._db.execute("PRAGMA user_version").fetchone()[0])

    def close(self) -> None:
        self._db.close()

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            code = _ERRNO.get(error.sqlite_errorcode, errno.EIO)
            raise OSError(code, f"{self._path}: {error}") from error
        except sqlite3.DatabaseError as error:
            if type(error) is not sqlite3.DatabaseError:
                raise
            raise TargetUnusable(
                f"{self._path} is damaged ({error}): restore it from a backup, or move it away "
                "and start with an empty catalogue, which forgets the versions held"
            ) from error

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
            return [_row(*columns) for columns in found]

    def published(self) -> int:
        """Bytes of all published items."""
        with self._translated():
            return int(self._db.execute("SELECT published FROM totals").fetchone()[0])

    def decide(
        self, item: Item, proposal: Verdict, temporary: str | None, quota: int | None
    ) -> tuple[Row, str | None]:
        """Phase 1: the verdict that holds for this opening; the first writer wins.

        Returns the row, and the temporary file that it named before, if it names another now.
        """
        row = self.find(item.key)
        if row is None:
            if proposal.status is Status.COMPLETED:
                completed = replace(proposal, target={"path": item.unique_id})
                proposal = self._objection(item, proposal, quota) or completed
            named = temporary if proposal.status is Status.COMPLETED else None
            row = Row(item.key, item.unique_id, item.version, proposal, named)
            self._insert(row)
        elif (
            row.temporary is not None
            and proposal.status is Status.COMPLETED
            and row.temporary != temporary
            and (row.verdict.size, row.verdict.sha256) == (proposal.size, proposal.sha256)
        ):
            # The owner before us got this far and no further. Its file may be gone, renamed or
            # not; ours has the same bytes, by the log, and is surely there.
            self._db.execute(
                f"UPDATE verdicts SET temporary = ? WHERE {_KEY}", (temporary, *_key(item.key))
            )
            return replace(row, temporary=temporary), row.temporary
        return row, None

    def _objection(self, item: Item, proposal: Verdict, quota: int | None) -> Verdict | None:
        """Why a completed item is not taken. Pending rows count: nothing stops them any more."""
        held = self._db.execute(
            f"""SELECT max(version) FROM (
                SELECT version, {_SAME_REQUEST[1:-1]} FROM items WHERE unique_id = ?1
                UNION ALL
                SELECT version, {_SAME_REQUEST[1:-1]} FROM verdicts
                WHERE unique_id = ?1 AND temporary IS NOT NULL
            ) WHERE {_SAME_REQUEST} <> (?2, ?3, ?4, ?5, ?6)""",
            (item.unique_id, *_key(item.key)[1:]),
        ).fetchone()[0]
        error: WsDataError | None = None
        if held is not None and held >= _u64(item.version):
            error = VersionMismatch.not_newer_than(int.from_bytes(held), item.version)
        elif quota is not None:
            taken = self.published() + self._growth(item.unique_id, proposal.size or 0)
            for row in self._rows("WHERE temporary IS NOT NULL", ()):
                taken += self._growth(row.unique_id, row.verdict.size or 0)
            if taken > quota:
                error = BatchTransferFailed(
                    item.key.request, f"with it the root would hold {taken} bytes, quota {quota}"
                )
        if error is None:
            return None
        return Verdict(Status.FAILED, error, proposal.size, proposal.sha256)

    def _growth(self, unique_id: str, size: int) -> int:
        held = self._db.execute("SELECT size FROM items WHERE unique_id = ?", (unique_id,))
        row = held.fetchone()
        return size - (int(row[0]) if row else 0)

    def _insert(self, row: Row) -> None:
        verdict = row.verdict
        self._db.execute(
            f"INSERT INTO verdicts ({_COLUMNS}, decided_at) VALUES ({'?, ' * 13}?)",
            (
                *_key(row.key),
                row.unique_id,
                _u64(row.version),
                verdict.status.value,
                _error(verdict.error),
                None if verdict.size is None else _u64(verdict.size),
                verdict.sha256,
                row.temporary,
                _now(),
            ),
        )

    def superseded(self, row: Row, by_pending: bool = False) -> bool:
        """Whether the pending row's item is published (or pending) in a newer version."""
        table = "verdicts" if by_pending else "items"
        condition = "AND temporary IS NOT NULL" if by_pending else ""
        found = self._db.execute(
            f"SELECT 1 FROM {table} WHERE unique_id = ? AND version > ? {condition}",
            (row.unique_id, _u64(row.version)),
        )
        return found.fetchone() is not None

    def publish(self, row: Row) -> Row:
        """Phase 2: the pending row's file is at its place. Returns the final row."""
        self._db.execute(
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
                *_key(row.key),
                row.unique_id,
                _u64(row.version),
                row.verdict.size,
                row.verdict.sha256,
                _now(),
            ),
        )
        return self.finish(row, row.verdict)

    def finish(self, row: Row, verdict: Verdict) -> Row:
        """Make the pending row final, with `verdict`. Returns it."""
        self._db.execute(
            f"UPDATE verdicts SET temporary = NULL, status = ?, error = ? WHERE {_KEY}",
            (verdict.status.value, _error(verdict.error), *_key(row.key)),
        )
        return replace(row, verdict=verdict, temporary=None)

    def passed(self, group: str, topic: str, partition: int, before: int) -> None:
        """Forget the final rows of openings below the offset `before`."""
        self._db.execute(
            """DELETE FROM verdicts WHERE "group" = ? AND topic = ? AND partition = ?
            AND first < ? AND temporary IS NULL""",
            (group, topic, partition, before),
        )


def _u64(number: int) -> bytes:
    return number.to_bytes(8)


def _key(key: RequestKey) -> tuple[str, str, int, int, int, bytes]:
    node_id, sequence = key.request
    return key.group, key.topic, key.partition, key.first, node_id, _u64(sequence)


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
