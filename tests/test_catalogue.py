"""The rows of a root: first writer, versions, quota, totals, what SQLite raises."""

from __future__ import annotations

import errno
import io
import os
import sqlite3
import stat
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitferry_consumer import catalogue as module
from splitferry_consumer.catalogue import Catalogue, Proposal, Published, Row
from splitferry_consumer.targets import Item, TargetUnusable, Verdict
from splitferry_protocol.errors import (
    CODES,
    BatchTransferError,
    BatchTransferFailed,
    BatchTransferNotFound,
    SplitTaskFailed,
    VersionMismatch,
    WriteDataFailed,
    WsDataError,
)
from splitferry_protocol.ids import U32_MAX, U64_MAX, RequestId, RequestKey
from splitferry_protocol.records import Status

REQUEST = RequestId(U32_MAX, U64_MAX)
NONE = "is no catalogue of splitferry: move it away"
NEWER = (
    "was written by a newer splitferry (schema 2, this one knows 1): upgrade splitferry, "
    "or use another root"
)


@pytest.fixture
def catalogue(tmp_path: Path) -> Iterator[Catalogue]:
    opened = Catalogue(str(tmp_path / "catalog.db"))
    yield opened
    opened.close()


def item(version: int = 1, sequence: int = 1, unique_id: str = "item", group: str = "g") -> Item:
    key = RequestKey(group, "splits", 0, RequestId(1, sequence), sequence)
    return Item(key, unique_id, version)


def completed(size: int = 10) -> Verdict:
    return Verdict(Status.COMPLETED, None, size, b"\1" * 32)


def decide(
    catalogue: Catalogue,
    what: Item,
    proposal: Verdict,
    temporary: str | None = "owner/0",
    quota: int | None = None,
) -> Row:
    with catalogue.transaction():
        return catalogue.decide([Proposal(what, proposal, temporary)], quota)[0][0]


def publish(catalogue: Catalogue, what: Item, size: int = 10) -> Row:
    row = decide(catalogue, what, completed(size))
    assert row.temporary == "owner/0"
    with catalogue.transaction():
        return catalogue.publish([row])[0]


@pytest.mark.parametrize(
    "error",
    [
        BatchTransferFailed(REQUEST, "digest differs"),
        BatchTransferNotFound(REQUEST),
        BatchTransferError(REQUEST, "x"),
        WriteDataFailed(REQUEST, "disk full"),
        SplitTaskFailed(REQUEST, U64_MAX, "outside"),
        VersionMismatch(U64_MAX, 0),
    ],
)
def test_every_error_comes_back_whole(catalogue: Catalogue, error: WsDataError) -> None:
    assert type(error) in CODES.values()
    what = Item(RequestKey("g", "splits", 3, REQUEST, 2**63 - 1), "ü/\0", U64_MAX)
    decide(catalogue, what, Verdict(Status.FAILED, error, U64_MAX))
    row = catalogue.find(what.key)
    assert row is not None
    assert row.verdict.error is not None
    assert row.verdict.error.to_wire() == error.to_wire()
    assert (row.unique_id, row.version, row.verdict.size) == ("ü/\0", U64_MAX, U64_MAX)
    assert (row.temporary, row.verdict.target) == (None, None)


def test_the_first_writer_wins(catalogue: Catalogue) -> None:
    first = decide(catalogue, item(), completed())
    assert first.verdict == completed()._replace(target={"path": "item"})
    failed = Verdict(Status.FAILED, BatchTransferFailed(REQUEST, "x"))
    assert decide(catalogue, item(), failed, None) == first


def test_the_next_owner_points_the_row_to_its_own_bytes(catalogue: Catalogue) -> None:
    decide(catalogue, item(), completed())
    with catalogue.transaction():
        ((row, before),) = catalogue.decide([Proposal(item(), completed(), "next/0")], None)
    assert (row.temporary, before) == ("next/0", "owner/0")
    assert catalogue.pending("owner") == []
    assert catalogue.pending("next") == [row]
    assert catalogue.find(item().key) == row


OTHER_BYTES = completed()._replace(sha256=b"\2" * 32)
REFUSED = completed()._replace(
    status=Status.FAILED, error=BatchTransferFailed(REQUEST, "the digest differs")
)


@pytest.mark.parametrize(
    ("final", "proposal", "temporary"),
    [
        (False, completed(), "owner/0"),
        (False, completed(11), "next/0"),
        (False, OTHER_BYTES, "next/0"),
        (False, REFUSED, None),
        (True, completed(), "next/0"),
        (True, REFUSED, None),
    ],
    ids=["its own", "another size", "another digest", "none", "final", "none, final"],
)
def test_a_row_is_pointed_nowhere_but_to_the_same_bytes_while_it_waits_for_them(
    catalogue: Catalogue, final: bool, proposal: Verdict, temporary: str | None
) -> None:
    row = publish(catalogue, item()) if final else decide(catalogue, item(), completed())
    with catalogue.transaction():
        decided = catalogue.decide([Proposal(item(), proposal, temporary)], None)
    assert decided == [(row, None)]
    assert catalogue.find(item().key) == row
    assert row.temporary == (None if final else "owner/0")


def test_a_verdict_that_turns_keeps_its_cause(catalogue: Catalogue) -> None:
    pending = decide(catalogue, item(), completed())
    turned = replace(pending, verdict=REFUSED)
    with catalogue.transaction():
        assert catalogue.finish([turned]) == [replace(turned, temporary=None)]
    row = catalogue.find(item().key)
    assert row is not None
    assert str(row.verdict.error) == str(REFUSED.error)
    assert row.verdict._replace(error=REFUSED.error) == REFUSED


@given(st.integers(0, U64_MAX), st.integers(0, U64_MAX))
def test_only_a_newer_version_goes_over(held: int, actual: int) -> None:
    catalogue = Catalogue(":memory:")
    publish(catalogue, item(held))
    verdict = decide(catalogue, item(actual, 2), completed()).verdict
    if actual > held:
        assert verdict.status is Status.COMPLETED
    else:
        assert verdict == Verdict(Status.FAILED, verdict.error, 10, b"\1" * 32)
        assert isinstance(verdict.error, VersionMismatch)
        assert (verdict.error.expected, verdict.error.actual) == (min(held + 1, U64_MAX), actual)
    catalogue.close()


def test_a_pending_version_counts_as_held(catalogue: Catalogue) -> None:
    pending = decide(catalogue, item(5), completed())
    refused = decide(catalogue, item(5, 2), completed()).verdict
    assert isinstance(refused.error, VersionMismatch)
    # The same request for another group is the same item, not another.
    assert decide(catalogue, item(5, group="h"), completed()).verdict.status == "completed"
    with catalogue.transaction():
        catalogue.finish([replace(pending, verdict=refused)])
        row = catalogue.find(item(5, group="h").key)
        assert row is not None
        catalogue.finish([replace(row, verdict=refused)])
    assert decide(catalogue, item(4, 3), completed()).verdict.status == "completed"


def test_superseded_by_what_is_published_or_pending(catalogue: Catalogue) -> None:
    old = decide(catalogue, item(1), completed())
    new = decide(catalogue, item(2, 2), completed())
    assert catalogue.standing() == dict.fromkeys((old.key, new.key), ("owner/0", False, True))
    assert catalogue.newer_pending(old) == [new]
    with catalogue.transaction():
        catalogue.publish([new])
    assert catalogue.standing() == {old.key: ("owner/0", True, False)}
    assert catalogue.newer_pending(old) == []


def test_totals_and_quota(catalogue: Catalogue) -> None:
    publish(catalogue, item(1), 60)
    assert catalogue.published() == 60
    publish(catalogue, item(2, 2), 40)
    assert catalogue.published() == 40
    decide(catalogue, item(1, 3, "other"), completed(30))
    fits = decide(catalogue, item(3, 4), completed(70), quota=100)
    assert fits.verdict.status is Status.COMPLETED
    over = decide(catalogue, item(1, 5, "third"), completed(1), quota=100)
    assert isinstance(over.verdict.error, BatchTransferFailed)
    assert over.verdict.error.reason == "with it the root would hold 101 bytes, quota 100"
    assert over.verdict.error.request_id == RequestId(1, 5)


def test_an_empty_item_needs_no_room(catalogue: Catalogue) -> None:
    """Neither one that waits to be published, nor one that comes to a full root."""
    publish(catalogue, item(1), 100)
    for sequence, name in enumerate(("one", "two"), 2):
        empty = decide(catalogue, item(1, sequence, name), completed(0), quota=100)
        assert empty.verdict.status is Status.COMPLETED


def test_what_is_published_is_told_with_its_size_and_digest(catalogue: Catalogue) -> None:
    assert catalogue.item("item") is None
    publish(catalogue, item(U64_MAX - 1), 10)
    publish(catalogue, item(1, 2, "other"), 20)
    assert catalogue.item("item") == Published(U64_MAX - 1, 10, b"\1" * 32)
    publish(catalogue, item(U64_MAX, 3), 30)
    assert catalogue.item("item") == Published(U64_MAX, 30, b"\1" * 32)
    assert catalogue.item("other") == Published(1, 20, b"\1" * 32)


def test_a_published_version_is_of_the_request_that_brought_it(catalogue: Catalogue) -> None:
    """For another group the same request is the same item; another request is refused."""
    for version in (5, 6):
        row = publish(catalogue, item(version, version))
        assert row == catalogue.find(item(version, version).key)
        again = decide(catalogue, item(version, version, group="h"), completed()).verdict
        assert again.status is Status.COMPLETED
        other = decide(catalogue, item(version, 9, group=f"{version}"), completed()).verdict
        assert isinstance(other.error, VersionMismatch)


def test_large_numbers_are_kept_as_those_who_made_it_before_kept_them(
    catalogue: Catalogue,
) -> None:
    """Of another length they would not compare as the numbers do."""
    publish(catalogue, item(0x0102, 3))
    stored = catalogue._db.execute("SELECT version, sequence FROM items").fetchall()
    assert stored == [(b"\0\0\0\0\0\0\1\2", b"\0\0\0\0\0\0\0\3")]


def test_when_it_was_is_kept_in_milliseconds(catalogue: Catalogue) -> None:
    before = time.time_ns() // 1_000_000
    publish(catalogue, item())
    after = time.time_ns() // 1_000_000
    for moment in ("decided_at FROM verdicts", "published_at FROM items"):
        ((at,),) = catalogue._db.execute(f"SELECT {moment}").fetchall()
        assert isinstance(at, int)
        assert before <= at <= after


def test_names_spelled_alike_in_one_batch(tmp_path: Path) -> None:
    catalogue = Catalogue(str(tmp_path / "catalog.db"), folding=True)
    proposals = [
        Proposal(item(1, 1, "a"), completed(), "owner/0"),
        Proposal(item(1, 2, "A"), completed(), "owner/1"),
        Proposal(item(1, 3, "b"), completed(), "owner/2"),
        Proposal(item(1, 1, "a"), completed(), "owner/3"),  # the same bytes again
    ]
    with catalogue.transaction():
        decided = catalogue.decide(proposals, None)
    assert [(row.temporary, before) for row, before in decided] == [
        ("owner/0", None),
        (None, None),
        ("owner/2", None),
        ("owner/3", "owner/0"),
    ]
    assert catalogue.pending("owner") == [decided[3][0], decided[2][0]]
    catalogue.close()


def test_names_spelled_alike_are_found_among_many(tmp_path: Path) -> None:
    """By an index, which works only if the names stand in one order."""
    catalogue = Catalogue(str(tmp_path / "catalog.db"), folding=True)
    names = [f"{letter}{number}" for number in range(9) for letter in "qagzmbx"]
    for sequence, name in enumerate(names):
        publish(catalogue, item(1, sequence, name))
    for sequence, name in enumerate(names, len(names)):
        refused = decide(catalogue, item(1, sequence, name.upper()), completed()).verdict
        assert isinstance(refused.error, BatchTransferFailed)
        assert refused.error.reason.endswith(repr(name))
    catalogue.close()


def test_names_spelled_alike_where_the_root_folds_them(tmp_path: Path) -> None:
    exact = Catalogue(str(tmp_path / "exact.db"))
    folding = Catalogue(str(tmp_path / "folding.db"), folding=True)
    for catalogue in (exact, folding):
        publish(catalogue, item(unique_id="a/\u00e9"))
        decide(catalogue, item(1, 2, "Pending"), completed())
    for sequence, name in enumerate(("A/\u00e9", "a/e\u0301", "pending"), 3):
        refused = decide(folding, item(9, sequence, name), completed()).verdict
        assert isinstance(refused.error, BatchTransferFailed)
        assert refused.error.request_id == RequestId(1, sequence)
        there = "Pending" if name == "pending" else "a/\u00e9"
        assert refused.error.reason == (
            f"the root's file system takes its name for that of {there!r}"
        )
        assert decide(exact, item(9, sequence, name), completed()).verdict.error is None
    assert decide(folding, item(2, 9, "a/\u00e9"), completed()).verdict.error is None
    assert decide(folding, item(1, 10, "b/\u00e9"), completed()).verdict.error is None
    exact.close()
    folding.close()


def test_passed_forgets_only_final_rows_of_that_partition(catalogue: Catalogue) -> None:
    failed = Verdict(Status.FAILED, BatchTransferFailed(REQUEST, "x"))
    other = replace(item(1, 1), key=item(1, 1).key._replace(partition=1))
    topic = replace(item(1, 1), key=item(1, 1).key._replace(topic="other"))
    for what in (item(1, 1), item(1, 2), other, topic, item(1, 1, group="h")):
        decide(catalogue, what, failed, None)
    pending = decide(catalogue, item(1, 0), completed())
    with catalogue.transaction():
        catalogue.passed("g", "splits", 0, 2)
    left = [item(1, 2), other, topic, item(1, 1, group="h"), item(1, 0)]
    assert catalogue.find(item(1, 1).key) is None
    assert all(catalogue.find(what.key) for what in left)
    assert catalogue.pending("owner") == [pending]


def test_a_transaction_is_all_or_nothing(catalogue: Catalogue) -> None:
    def write_and_fail() -> None:
        with catalogue.transaction():
            catalogue.decide([Proposal(item(), completed(), "owner/0")], None)
            raise KeyError

    with pytest.raises(KeyError):
        write_and_fail()
    assert catalogue.find(item().key) is None
    publish(catalogue, item())


def test_what_failed_is_told_though_it_cannot_be_taken_back(catalogue: Catalogue) -> None:
    class Ill:
        in_transaction = True

        def execute(self, statement: str) -> None:
            if statement == "ROLLBACK":
                raise sqlite3.OperationalError("disk I/O error")

    db, ill = catalogue._db, Ill()
    catalogue._db = ill  # type: ignore[assignment]
    with pytest.raises(KeyError, match="cause"), catalogue.transaction():
        raise KeyError("cause")
    catalogue._db = db


def test_a_fault_of_ours_is_not_taken_for_damage_of_the_file(catalogue: Catalogue) -> None:
    row = decide(catalogue, item(), completed())
    with pytest.raises(sqlite3.IntegrityError), catalogue.transaction():
        catalogue._insert({row.key: row})
    assert catalogue.find(item().key) == row


def test_what_sqlite_cannot_do_for_another_cause_is_an_error_of_the_disk(
    catalogue: Catalogue,
) -> None:
    catalogue._db.execute("DROP TABLE totals")
    with pytest.raises(OSError, match=r"catalog.db: no such table: totals$") as failed:
        catalogue.published()
    assert failed.value.errno == errno.EIO


@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_nobody_else_may_read_it(tmp_path: Path, umask: int) -> None:
    """Nor its journal, nor one of both that others could read before."""
    before, path = os.umask(umask), tmp_path / "catalog.db"
    files = (path, tmp_path / "catalog.db-journal")
    for mode in (0o600, 0o644):
        for file in files:
            if mode == 0o644:
                file.chmod(mode)
        catalogue = Catalogue(str(path))
        publish(catalogue, item(mode, mode))
        assert [stat.S_IMODE(file.stat().st_mode) for file in files] == [0o600, 0o600]
        catalogue.close()
    os.umask(before)


def test_it_is_the_same_when_opened_again(tmp_path: Path) -> None:
    path = str(tmp_path / "catalog.db")
    first = Catalogue(path)
    row = publish(first, item())
    first.close()
    second = Catalogue(path)
    assert second.find(item().key) == row
    assert second.published() == 10
    second.close()
    with sqlite3.connect(path) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert db.execute("PRAGMA journal_mode").fetchone() != ("wal",)
    db.close()


def test_whether_it_was_made(tmp_path: Path) -> None:
    for made in (True, False):
        catalogue = Catalogue(str(tmp_path / "catalog.db"))
        assert catalogue.made is made
        catalogue.close()


def test_one_that_another_process_makes_at_the_same_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, look = str(tmp_path / "catalog.db"), Catalogue._is_ours
    others: list[Catalogue] = []

    def late(self: Catalogue) -> bool:
        found = look(self)
        monkeypatch.setattr(Catalogue, "_is_ours", look)
        others.append(Catalogue(path))
        return found

    monkeypatch.setattr(Catalogue, "_is_ours", late)
    catalogue = Catalogue(path)
    assert [one.made for one in (catalogue, *others)] == [False, True]
    publish(catalogue, item())
    for one in (catalogue, *others):
        one.close()


def test_its_journal_stays_and_stays_small(tmp_path: Path) -> None:
    catalogue = Catalogue(str(tmp_path / "catalog.db"))
    journal, failed = tmp_path / "catalog.db-journal", BatchTransferFailed(REQUEST, "x")
    many = [item(1, n, f"{n:0200}") for n in range(8000)]
    with catalogue.transaction():
        catalogue.decide(
            [Proposal(one, Verdict(Status.FAILED, failed), None) for one in many], None
        )
    with catalogue.transaction():
        catalogue.passed("g", "splits", 0, len(many))
        assert journal.stat().st_size > 2**20
    assert 0 < journal.stat().st_size <= 2**20
    catalogue.close()


def test_whoever_shares_a_folding_root_keeps_its_index(tmp_path: Path) -> None:
    path = str(tmp_path / "catalog.db")
    folding, exact = Catalogue(path, folding=True), Catalogue(path)
    publish(exact, item(unique_id="a"))
    assert decide(folding, item(2, 2, "A"), completed()).verdict.status is Status.FAILED
    for one in (folding, exact):
        one.close()


def test_one_that_is_of_no_use_is_left_closed(tmp_path: Path) -> None:
    """Whatever else a process has open of it loses its locks by a close of ours."""
    path = tmp_path / "catalog.db"
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE other (name)")
    database.close()
    before = os.listdir("/proc/self/fd")
    with pytest.raises(TargetUnusable, match="no catalogue") as refused:
        Catalogue(str(path))
    assert len(os.listdir("/proc/self/fd")) <= len(before), refused


@pytest.mark.parametrize(
    ("schema", "tables", "cause"),
    [
        (0, ["items"], NONE),
        (1, [], NONE),
        (1, ["items", "verdicts"], NONE),
        (2, ["items", "totals"], NONE),
        (2, ["verdicts"], NEWER),
    ],
)
def test_what_is_no_catalogue_of_this_version_is_left_as_it_is(
    tmp_path: Path, schema: int, tables: list[str], cause: str
) -> None:
    path = tmp_path / "catalog.db"
    with sqlite3.connect(path) as database:
        for table in tables:
            database.execute(f"CREATE TABLE {table} (name)")
        database.execute(f"PRAGMA user_version = {schema}")
    database.close()
    with pytest.raises(TargetUnusable) as refused:
        Catalogue(str(path))
    assert str(refused.value) == f"{path} {cause}"
    with sqlite3.connect(path) as database:
        assert database.execute("SELECT name FROM sqlite_master").fetchall() == [
            (table,) for table in tables
        ]
    database.close()


def test_what_sqlite_cannot_do_for_now_is_an_os_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("splitferry_consumer.catalogue.BUSY_TIMEOUT", 0.01)
    first, second = (Catalogue(str(tmp_path / "catalog.db")) for _ in range(2))
    with first.transaction():
        with pytest.raises(OSError, match=f"locked by process {os.getpid()}") as locked:
            publish(second, item())
        assert locked.value.errno == errno.EBUSY
        path = tmp_path / "catalog.db"
        assert locked.value.strerror == f"{path}: locked by process {os.getpid()}"
    publish(second, item())
    second._db.execute("PRAGMA max_page_count = 1")

    def fill() -> None:
        with second.transaction():
            items = [item(1, sequence, f"item {sequence}") for sequence in range(2, 100)]
            second.decide([Proposal(what, completed(), "owner/0") for what in items], None)

    with pytest.raises(OSError, match="full") as full:
        fill()
    assert full.value.errno == errno.ENOSPC
    assert second.find(item(1, 2).key) is None
    for one in (first, second):
        one.close()


def test_damage_names_a_remedy(tmp_path: Path) -> None:
    path = tmp_path / "catalog.db"
    catalogue = Catalogue(str(path))
    for sequence in range(200):
        publish(catalogue, item(1, sequence, f"item {sequence}"))
    catalogue.close()
    data = bytearray(path.read_bytes())
    data[8192:] = b"\xff" * (len(data) - 8192)
    path.write_bytes(data)
    catalogue = Catalogue(str(path))
    with pytest.raises(TargetUnusable) as damaged:
        catalogue.find(item(1, 100).key)
    assert str(damaged.value) == (
        f"{path} is damaged (database disk image is malformed): restore it from a backup, or move "
        "it away with its -journal, and an empty one is made, which forgets the versions held"
    )
    catalogue.close()


def test_a_link_instead_of_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "catalog.db").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(TargetUnusable) as refused:
        Catalogue(str(tmp_path / "catalog.db"))
    assert str(refused.value) == f"{tmp_path}/catalog.db is not a regular file: move it away"
    assert not (tmp_path / "elsewhere").exists()


def test_a_lock_whose_holder_is_not_told_is_another_processs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """/proc/locks is of Linux, and has only what this namespace may see."""
    monkeypatch.setattr("splitferry_consumer.catalogue.BUSY_TIMEOUT", 0.01)
    monkeypatch.setattr("splitferry_consumer.catalogue._lock_holder", lambda _: None)
    first, second = (Catalogue(str(tmp_path / "catalog.db")) for _ in range(2))
    with first.transaction(), pytest.raises(OSError, match=r"locked by another process$"):
        publish(second, item())
    assert second._db.execute("PRAGMA busy_timeout").fetchone() == (10,)
    for one in (first, second):
        one.close()


LOCKS = """\
1: FLOCK  ADVISORY  WRITE 11 08:0c:77 0 EOF
2: POSIX  ADVISORY  READ 12 08:0c:77 128 128
3: -> POSIX  ADVISORY  WRITE 13 08:0c:77 128 128
4: POSIX  ADVISORY  WRITE 14 08:0c:78 128 128
5: POSIX  ADVISORY  WRITE 15 0c:08:77 128 128
"""


@pytest.mark.parametrize(
    ("locks", "holder"),
    [
        (f"{LOCKS}6: POSIX  ADVISORY  WRITE 16 08:0c:77 128 128\n", "process 16"),
        (LOCKS, None),
        ("of another form\n", None),
        (None, None),
    ],
)
def test_the_holder_of_a_lock_is_read_from_the_locks_of_linux(
    monkeypatch: pytest.MonkeyPatch, locks: str | None, holder: str | None
) -> None:
    def opened(path: str, **_: object) -> io.StringIO:
        assert path == "/proc/locks"
        if locks is None:
            raise FileNotFoundError(path)
        return io.StringIO(locks)

    found = SimpleNamespace(st_dev=os.makedev(8, 12), st_ino=77)
    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", {"catalog.db": found}.__getitem__)
        patch.setattr(module, "open", opened, raising=False)
        told = module._lock_holder("catalog.db")
    assert told == holder


def test_one_that_was_deleted_is_told_to_be_gone(tmp_path: Path) -> None:
    path = tmp_path / "catalog.db"
    catalogue = Catalogue(str(path))
    for name in os.listdir(tmp_path):
        (tmp_path / name).unlink()
    with pytest.raises(OSError, match=r"the catalogue was deleted or moved$") as gone:
        publish(catalogue, item())
    assert gone.value.errno == errno.ESTALE
    catalogue.close()


def test_many_at_once_are_judged_as_one_after_another(catalogue: Catalogue) -> None:
    """The same opening twice, versions of one item in both orders, what the quota leaves."""
    proposals = [
        Proposal(item(2, 1), completed(40), "owner/0"),
        Proposal(item(2, 1), completed(40), "owner/1"),  # the same bytes again: their place now
        Proposal(item(1, 2), completed(1), "owner/2"),  # older
        Proposal(item(3, 3), completed(50), "owner/3"),  # newer
        Proposal(item(1, 4, "other"), completed(11), "owner/4"),  # over the quota of 100
        Proposal(item(1, 5, "third"), completed(10), "owner/5"),  # meets it
    ]
    with catalogue.transaction():
        decided = catalogue.decide(proposals, 100)
    assert [(row.temporary, before) for row, before in decided] == [
        ("owner/0", None),
        ("owner/1", "owner/0"),
        (None, None),
        ("owner/3", None),
        (None, None),
        ("owner/5", None),
    ]
    errors = [type(row.verdict.error).__name__ for row, _ in decided if row.verdict.error]
    assert errors == ["VersionMismatch", "BatchTransferFailed"]
    assert catalogue.pending("owner") == [decided[n][0] for n in (1, 3, 5)]


def test_openings_of_many_partitions_are_found_in_one_batch(catalogue: Catalogue) -> None:
    """The same request for two groups, too, whose versions do not stand against each other."""
    keys = [
        RequestKey(group, topic, partition, RequestId(1, first), first)
        for group in "gh"
        for topic in ("splits", "others")
        for partition in (0, 1)
        for first in (1, 2, 3)
    ]
    proposals = [
        Proposal(Item(key, f"{key[1:]}", 1), completed(), f"owner/{number}")
        for number, key in enumerate(keys)
    ]
    decided = []
    for _ in range(2):
        with catalogue.transaction():
            decided.append(catalogue.decide(proposals, None))
    assert decided[0] == decided[1]
    assert [row.key for row, _ in decided[0]] == keys
    assert {row.verdict.status for row, _ in decided[0]} == {Status.COMPLETED}
    assert catalogue.standing().keys() == {*keys}
    for number in range(len(keys)):
        assert catalogue.find(keys[number]) == decided[0][number][0]


@pytest.mark.parametrize(("count", "marks"), [(1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (256, 256)])
def test_batches_of_like_size_share_their_statements(count: int, marks: int) -> None:
    values = [*range(count)]
    asked, filled = module._one_of(values)
    assert asked == ", ".join("?" * marks)
    assert filled == values + [values[-1]] * (marks - count)
