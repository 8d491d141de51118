"""Files: deaths at every step, zombies in every order, obstacles, limits, errors that heal."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import hashlib
import itertools
import json
import os
import re
import resource
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Iterable, Iterator, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from failing import failing, unprivileged
from small_disk import can_mount
from splitferry_consumer import catalogue
from splitferry_consumer.group import WHOLE_MAX
from splitferry_consumer.targets import (
    Condemned,
    Item,
    Refused,
    TargetUnusable,
    Verdict,
    Whole,
    file,
    settling,
)
from splitferry_consumer.targets.file import SMALL, FileIncoming, FileTarget
from splitferry_protocol.errors import (
    BatchTransferFailed,
    VersionMismatch,
    WriteDataFailed,
)
from splitferry_protocol.ids import U64_MAX, RequestId, RequestKey
from splitferry_protocol.records import Status

STEPS = Path(__file__).with_name("target_steps.py")
FAST = "/dev/shm" if Path("/dev/shm").is_dir() else None
"""Where fsync costs nothing: for what is tried hundreds of times and survives only a kill."""


def item(unique_id: str = "item", version: int = 1, sequence: int = 1, group: str = "g") -> Item:
    return Item(
        RequestKey(group, "splits", 0, RequestId(1, sequence), 10 * sequence), unique_id, version
    )


def completed(data: bytes) -> Verdict:
    return Verdict(Status.COMPLETED, None, len(data), hashlib.sha256(data).digest())


def expired(what: Item) -> Verdict:
    return Verdict(Status.EXPIRED, BatchTransferFailed(what.key.request, "expired"))


async def received(target: FileTarget, what: Item, data: bytes) -> FileIncoming:
    incoming = target.begin(what)
    await target.in_thread(lambda: incoming.write_at(0, data))
    return incoming


async def publish(target: FileTarget, what: Item, data: bytes) -> Verdict:
    return await (await received(target, what, data)).settle(completed(data))


async def publish_in_vain(target: FileTarget, monkeypatch: pytest.MonkeyPatch) -> None:
    """The verdict stands, and names a file that could not be renamed."""
    with monkeypatch.context() as patch:
        patch.setattr(target.tree, "place", failing(errno.EIO))
        with pytest.raises(OSError, match="Input/output"):
            await publish(target, item(), b"bytes")


def temporaries(root: Path) -> list[str]:
    incoming = root / ".splitferry/incoming"
    return [path.name for path in incoming.glob("*/*") if path.name != "lock"]


def heard(logs: list[MutableMapping[str, Any]]) -> list[str]:
    return [entry["event"] for entry in logs]


@contextmanager
def fast_root() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=FAST) as folder:
        yield Path(folder) / "root"


@pytest.fixture
async def target(tmp_path: Path) -> AsyncIterator[FileTarget]:
    opened = await FileTarget.open(tmp_path / "root")
    yield opened
    await asyncio.to_thread(opened.close)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "root"


# The way of a file


async def test_writes_in_any_order_become_one_file(target: FileTarget, root: Path) -> None:
    data = os.urandom(3_000_001)
    what = item("a/b c/ü.bin")
    incoming = target.begin(what)

    def write() -> None:
        for start in (2_000_000, 0, 1_000_000):
            incoming.write_at(start, memoryview(data)[start : start + 1_000_001])

    await target.in_thread(write)
    assert await target.in_thread(lambda: incoming.read_at(5, 7)) == data[5:12]
    assert not (root / "a").exists()
    verdict = await incoming.settle(completed(data))
    assert verdict == completed(data)._replace(target={"path": "a/b c/ü.bin"})
    published = root / "a/b c/ü.bin"
    assert published.read_bytes() == data
    assert published.stat().st_mode & 0o777 == 0o640
    assert temporaries(root) == []
    assert target.held == 0
    assert target.settling.published == len(data)
    assert await incoming.settle(expired(what)) == verdict


async def test_begin_does_no_io_and_an_empty_item_is_a_file(target: FileTarget, root: Path) -> None:
    incoming = target.begin(item())
    assert temporaries(root) == []
    verdict = await incoming.settle(completed(b""))
    assert verdict.status is Status.COMPLETED
    assert (root / "item").read_bytes() == b""


async def test_a_failed_proposal_leaves_no_file(target: FileTarget, root: Path) -> None:
    what = item(version=U64_MAX, sequence=U64_MAX // 10)
    what = replace(what, key=what.key._replace(first=2**62))
    incoming = await received(target, what, b"bytes")
    proposal = expired(what)._replace(size=U64_MAX, sha256=b"\xff" * 32)
    verdict = await incoming.settle(proposal)
    assert verdict.status is Status.EXPIRED
    assert not (root / "item").exists()
    assert temporaries(root) == []
    # Whoever asks again is told the same, whatever it proposes.
    again = await publish(target, what, b"bytes")
    assert (again.status, again.size, again.sha256) == (Status.EXPIRED, U64_MAX, b"\xff" * 32)
    assert isinstance(again.error, BatchTransferFailed)
    assert again.error.reason == "expired"
    assert again.error.request_id == what.key.request
    assert not (root / "item").exists()


async def test_discard_leaves_nothing(target: FileTarget, root: Path) -> None:
    incoming = await received(target, item(), b"bytes")
    assert target.held > 0
    await target.in_thread(incoming.discard)
    await target.in_thread(incoming.discard)
    assert (temporaries(root), target.held) == ([], 0)
    with pytest.raises(Condemned, match=r"^the bytes were dropped$"):
        await target.in_thread(lambda: incoming.write_at(0, b"bytes"))


async def test_what_was_renamed_is_not_removed(
    target: FileTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To find out that no row names it would be a transaction more for each file."""
    removed: list[str] = []
    monkeypatch.setattr(target, "remove", lambda temporary, _: removed.append(temporary))
    assert (await publish(target, item(), b"bytes")).status is Status.COMPLETED
    assert (removed, target.held) == ([], 0)


async def test_an_error_of_the_close_does_not_keep_what_nobody_wants(
    target: FileTarget, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    incoming = await received(target, item(), b"bytes")
    close = os.close

    def ill(descriptor: int) -> None:
        close(descriptor)
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "close", ill)
        await target.in_thread(incoming.discard)
    assert (temporaries(root), target.descriptors._taken) == ([], 0)


async def test_a_file_with_a_hole_is_condemned(target: FileTarget, root: Path) -> None:
    incoming = target.begin(item())
    await target.in_thread(lambda: incoming.write_at(4, b"bytes"))
    with pytest.raises(Condemned, match=r"^not exactly the item's 9 bytes were written$"):
        await incoming.settle(completed(b"123456789"))
    assert (temporaries(root), (root / "item").exists()) == ([], False)


async def test_the_order_of_what_makes_it_durable(
    target: FileTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes, then their name, then the verdict, then the rename, then its directories (rule 4)."""
    taken: list[str] = []
    sync, rename = os.fsync, os.rename
    transaction = target.settling._catalogue.transaction

    def fsync(descriptor: int) -> None:
        sync(descriptor)
        taken.append("sync " + os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))

    def renamed(source: str, destination: str, **options: int) -> None:
        rename(source, destination, **options)
        taken.append(f"rename {destination}")

    @contextmanager
    def committed() -> Iterator[None]:
        with transaction():
            yield
        taken.append("commit")

    incoming = await received(target, item("a/item"), b"bytes")
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", renamed)
    monkeypatch.setattr(target.settling._catalogue, "transaction", committed)
    await incoming.settle(completed(b"bytes"))
    owner = target.owner.name
    assert taken == [
        "sync 0",
        f"sync {owner}",
        "commit",
        "rename item",
        "sync root",
        "sync a",
        f"sync {owner}",
        "commit",
    ]


# Deaths


@pytest.mark.parametrize(
    ("recovery", "twice"),
    [
        ("receive", None),
        ("expire", None),
        ("receive-unswept", None),
        ("expire-unswept", None),
        ("receive-unswept", "COMMIT"),
        ("expire-unswept", "rename"),
    ],
)
def test_a_death_at_any_step(recovery: str, twice: str | None) -> None:
    """Rules 1, 3, 4, 6 and 9 after SIGKILL before every step; `twice`: the recovery dies, too."""
    with tempfile.TemporaryDirectory(dir=FAST) as folder:
        command = [sys.executable, str(STEPS), folder, recovery, *([twice] if twice else [])]
        ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
        assert ran.stderr == ""
        deaths = [json.loads(line) for line in ran.stdout.splitlines()]
    assert len(deaths) > 40
    seen = set()
    for death in deaths:
        assert death["exit"] == 0, death
        status, size, digest, place = death["verdict"]
        assert death["after_death"] in {"old", "new"}, death
        assert (status, death["recovered"]) in {("completed", "new"), ("expired", "old")}, death
        assert death["final"] == death["recovered"], death
        assert death["after_death"] == "old" or status == "completed", death
        assert death["again"] == death["verdict"], death
        assert death["left"] == [], death
        assert death["files"] == ["prepared", "root"], death
        if status == "completed":
            assert (size, place) == (20000, {"path": "a/b/item.bin"})
            assert digest == hashlib.sha256(b"new!" * 5000).hexdigest()
        seen.add((death["after_death"], status))
    if recovery.startswith("expire") and twice is None:
        assert seen == {("old", "expired"), ("old", "completed"), ("new", "completed")}


# Zombies


class Turns:
    """Lets the transactions of several targets run in a given order."""

    def __init__(self, order: str) -> None:
        self._order = list(order)
        self._changed = threading.Condition()

    def gate(self, who: str, target: FileTarget) -> None:
        transaction = target.settling._catalogue.transaction

        @contextmanager
        def in_turn() -> Iterator[None]:
            with self._changed:
                assert self._changed.wait_for(
                    lambda: not self._order or self._order[0] == who, timeout=30
                )
            try:
                with transaction():
                    yield
            finally:
                with self._changed:
                    if who in self._order:
                        self._order.remove(who)
                    self._changed.notify_all()

        target.settling._catalogue.transaction = in_turn  # type: ignore[method-assign]

    def done(self, who: str) -> None:
        with self._changed:
            self._order = [one for one in self._order if one != who]
            self._changed.notify_all()


ORDERS = sorted({"".join(order) for order in itertools.permutations("zznn")})


async def side_by_side(
    root: Path, order: str, zombie: tuple[Item, Verdict, bytes], owner: tuple[Item, Verdict, bytes]
) -> list[Verdict]:
    turns = Turns(order)

    async def run(who: str, what: Item, proposal: Verdict, data: bytes) -> Verdict:
        target = await FileTarget.open(root)
        incoming = await received(target, what, data)
        turns.gate(who, target)
        try:
            verdict = await incoming.settle(proposal)
        finally:
            turns.done(who)
        await asyncio.to_thread(target.close)
        return verdict

    return list(await asyncio.gather(run("z", *zombie), run("n", *owner)))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("zombie", ["completed", "expired"])
@pytest.mark.parametrize("owner", ["completed", "expired"])
async def test_a_zombie_and_the_new_owner_agree(order: str, zombie: str, owner: str) -> None:
    data, what = b"bytes" * 1000, item("a/item")
    proposals = {"completed": completed(data), "expired": expired(what)}
    with fast_root() as root:
        first, second = await side_by_side(
            root, order, (what, proposals[zombie], data), (what, proposals[owner], data)
        )
        assert str(first) == str(second)
        assert first.status == (zombie if order[0] == "z" else owner)
        assert (root / "a/item").exists() == (first.status is Status.COMPLETED)
        if first.status is Status.COMPLETED:
            assert (root / "a/item").read_bytes() == data
        assert list((root / ".splitferry/incoming").iterdir()) == []


async def test_a_zombie_obeys_a_verdict_that_turned(root: Path) -> None:
    """Judged completed by the zombie, refused by the new owner, who found a directory there."""
    zombie, owner = await FileTarget.open(root), await FileTarget.open(root)
    incoming = await received(zombie, item(), b"bytes")
    turns = Turns("znnz")
    turns.gate("z", zombie)
    turns.gate("n", owner)
    place = owner.tree.place

    def placed(source: str, source_directory: int, unique_id: str) -> None:
        (root / "item").mkdir()
        try:
            place(source, source_directory, unique_id)
        finally:
            (root / "item").rmdir()

    owner.tree.place = placed  # type: ignore[method-assign]
    verdicts = await asyncio.gather(
        incoming.settle(completed(b"bytes")), owner.begin(item()).settle(expired(item()))
    )
    assert [str(verdict.error) for verdict in verdicts] == [
        "request 1-1 could not be written: a directory stands there"
    ] * 2
    assert not (root / "item").exists()
    for target in (zombie, owner):
        await asyncio.to_thread(target.close)


async def test_a_row_that_was_pointed_to_other_bytes_is_published_from_those(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the two transactions of one that only wants a verdict, the next owner receives the
    bytes again, and those that the row named before are swept with their dead owner."""
    dead, owner, last = [await FileTarget.open(root) for _ in range(3)]
    read, go_on = threading.Event(), threading.Event()
    publish_now = last.settling._publish

    def after_the_others(*arguments: Any) -> Any:
        read.set()
        assert go_on.wait(30)
        return publish_now(*arguments)

    with monkeypatch.context() as patch:
        for target in (dead, owner):
            patch.setattr(target.tree, "place", failing(errno.EIO))
        with pytest.raises(OSError, match="Input/output"):
            await publish(dead, item(), b"bytes")
        fcntl.flock(dead.owner.lock, fcntl.LOCK_UN)
        patch.setattr(last.settling, "_publish", after_the_others)
        settled = asyncio.ensure_future(last.begin(item()).settle(expired(item())))
        assert await asyncio.to_thread(read.wait, 30)
        incoming = await received(owner, item(), b"bytes")
        with pytest.raises(OSError, match="Input/output"):
            await incoming.settle(completed(b"bytes"))
        await owner.sweep()
        assert not (root / ".splitferry/incoming" / dead.owner.name).exists()
        go_on.set()
        verdict = await settled
    assert verdict.status is Status.COMPLETED
    assert (root / "item").read_bytes() == b"bytes"
    assert await incoming.settle(completed(b"bytes")) == verdict
    assert (temporaries(root), owner.held) == ([], 0)
    for target in (dead, owner, last):
        await asyncio.to_thread(target.close)


async def test_bytes_that_no_row_names_any_more_go_though_their_owner_lives(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be cut off for long, and receives them no more."""
    zombie, owner = [await FileTarget.open(root) for _ in range(2)]
    await publish_in_vain(zombie, monkeypatch)
    assert len(temporaries(root)) == 1
    assert (await publish(owner, item(), b"bytes")).status is Status.COMPLETED
    assert (temporaries(root), owner.held) == ([], 0)
    for target in (zombie, owner):
        await asyncio.to_thread(target.close)


@pytest.mark.parametrize("order", ORDERS)
async def test_two_versions_at_once(order: str) -> None:
    """A newer version wins whenever it comes; an older one only if it was judged first."""
    older, newer = item(version=1, sequence=1), item(version=2, sequence=2)
    with fast_root() as root:
        first, second = await side_by_side(
            root, order, (older, completed(b"older"), b"older"), (newer, completed(b"new"), b"new")
        )
        assert second.status is Status.COMPLETED
        assert (root / "item").read_bytes() == b"new"
        if order[0] == "z":
            assert first.status is Status.COMPLETED
        else:
            assert isinstance(first.error, VersionMismatch)
            assert (first.error.expected, first.error.actual) == (3, 1)


async def test_an_unfinished_older_version_is_not_placed_over_a_newer_one(
    target: FileTarget, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Readers have seen the newer one, and its owner, who comes again, must still find it there."""
    older = await received(target, item(version=1), b"old")
    with monkeypatch.context() as patch:
        patch.setattr(target.tree, "place", failing(errno.EIO))
        with pytest.raises(OSError, match="Input/output"):
            await older.settle(completed(b"old"))
    newer = await received(target, item(version=2, sequence=2), b"new")
    with monkeypatch.context() as patch:
        error = OSError(errno.EIO, "not synced")
        patch.setattr(target.tree, "sync", lambda names: dict.fromkeys(names, error))
        with pytest.raises(Condemned):
            await newer.settle(completed(b"new"))
    assert (await older.settle(completed(b"old"))).status is Status.COMPLETED
    assert (root / "item").read_bytes() == b"new"
    assert temporaries(root) == []
    verdict = await publish(target, item(version=2, sequence=2), b"new")
    assert verdict.status is Status.COMPLETED
    assert (root / "item").read_bytes() == b"new"


async def test_an_unfinished_newer_version_explains_lost_bytes(root: Path) -> None:
    """v1 renamed, its owner dead; v2 renamed over it, its owner dead: both were published."""
    target = await FileTarget.open(root)
    for version, data in ((1, b"one"), (2, b"two")):
        incoming = await received(target, item(version=version, sequence=version), data)
        fail_next_syncs = target.tree.sync
        target.tree.sync = lambda unique_ids: {name: OSError(errno.EIO, "x") for name in unique_ids}  # type: ignore[method-assign]
        with pytest.raises(Condemned):
            await incoming.settle(completed(data))
        target.tree.sync = fail_next_syncs  # type: ignore[method-assign]
    assert (root / "item").read_bytes() == b"two"
    for version in (1, 2):
        what = item(version=version, sequence=version)
        verdict = await target.begin(what).settle(expired(what))
        assert verdict.status is Status.COMPLETED
        assert (root / "item").read_bytes() == b"two"
    await asyncio.to_thread(target.close)


# Verdicts against a model


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["a", "b", "a/x"]),
        st.integers(1, 4),
        st.sampled_from(["g", "h"]),
        st.booleans(),
        st.integers(0, 1),
    ),
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@given(ACTIONS)
def test_verdicts_follow_the_rules(actions: list[tuple[str, int, str, bool, int]]) -> None:
    """First writer wins; only over older versions; the same request again is no mismatch."""

    async def run(root: Path) -> None:
        targets = [await FileTarget.open(root), await FileTarget.open(root)]
        verdicts: dict[RequestKey, Status] = {}
        held: dict[str, tuple[int, int, bytes]] = {}
        for name, number, group, complete, who in actions:
            # A request has one name, one version and the same bytes for every group.
            version, sequence = 1 + number // 2, number + 10 * len(name)
            what = item(name, version, sequence + (100 if name == "b" else 0), group)
            data = str(what.key.request).encode()
            proposal = completed(data) if complete else expired(what)
            # The first write already tells that a path is taken; a verdict is still given.
            incoming = targets[who].begin(what)
            try:
                await targets[who].in_thread(lambda: incoming.write_at(0, data))  # noqa: B023
            except Refused as refused:
                proposal = Verdict(Status.FAILED, refused.error)
            verdict = await incoming.settle(proposal)
            if what.key not in verdicts:
                blocked = any(other in held for other in {"a": ["a/x"], "a/x": ["a"]}.get(name, []))
                before = held.get(name)
                if not complete and not blocked:
                    expected = Status.EXPIRED
                elif blocked or (before and before[0] >= version and before[1] != sequence):
                    expected = Status.FAILED
                else:
                    expected = Status.COMPLETED
                    held[name] = (version, sequence, data)
                verdicts[what.key] = expected
            assert verdict.status is verdicts[what.key]
            for path, (_, _, data) in held.items():
                assert (root / path).read_bytes() == data
        for target in targets:
            await target.sweep()
            assert target.settling.published == sum(len(data) for _, _, data in held.values())
            await asyncio.to_thread(target.close)
        assert list((root / ".splitferry/incoming").iterdir()) == []

    with fast_root() as root:
        asyncio.run(run(root))


# Obstacles and limits


async def test_a_directory_in_the_way_is_refused_at_the_first_write(
    target: FileTarget, root: Path
) -> None:
    (root / "item").mkdir()
    incoming = target.begin(item())
    with pytest.raises(Refused) as refused:
        await target.in_thread(lambda: incoming.write_at(0, b"bytes"))
    assert isinstance(refused.value.error, WriteDataFailed)
    cause = "a directory stands there"
    assert str(refused.value.error) == f"request 1-1 could not be written: {cause}"
    assert temporaries(root) == []


@pytest.mark.parametrize(
    ("obstacle", "cause"),
    [
        ("directory", "a directory stands there"),
        ("parent is a file", "leads through a file"),
        ("link", "leads through a file or a symbolic link"),
    ],
)
async def test_an_obstacle_that_comes_later_is_a_verdict(
    target: FileTarget, root: Path, obstacle: str, cause: str
) -> None:
    incoming = await received(target, item("a/item"), b"bytes")
    if obstacle == "directory":
        (root / "a/item").mkdir(parents=True)
    elif obstacle == "link":
        (root / "a").symlink_to(root.parent)
    else:
        (root / "a").write_bytes(b"")
    verdict = await incoming.settle(completed(b"bytes"))
    assert verdict.status is Status.FAILED
    assert isinstance(verdict.error, WriteDataFailed)
    assert cause in verdict.error.message
    assert verdict.target is None
    assert temporaries(root) == []
    assert not (root.parent / "item").exists()


async def test_an_obstacle_between_the_two_phases_turns_the_verdict(
    target: FileTarget, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    incoming = await received(target, item(), b"bytes")
    place = target.tree.place

    def placed(source: str, directory: int, unique_id: str) -> None:
        (root / "item").mkdir()
        place(source, directory, unique_id)

    monkeypatch.setattr(target.tree, "place", placed)
    verdict = await incoming.settle(completed(b"bytes"))
    assert isinstance(verdict.error, WriteDataFailed)
    assert verdict.target is None
    monkeypatch.undo()
    (root / "item").rmdir()
    assert (await publish(target, item(), b"bytes")).status is Status.FAILED
    assert not (root / "item").exists()
    assert (await publish(target, item(version=1, sequence=2), b"bytes")).status == "completed"


async def test_one_bad_item_in_a_batch_leaves_the_others(
    target: FileTarget, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = target.tree.place

    def placed(source: str, directory: int, unique_id: str) -> None:
        if unique_id == "f5":
            raise OSError(errno.EIO, "Input/output error")
        place(source, directory, unique_id)

    monkeypatch.setattr(target.tree, "place", placed)
    items = [item("b/x" if n == 3 else f"f{n}", sequence=n) for n in range(8)]
    files = [await received(target, what, b"bytes") for what in items]
    (root / "b").write_bytes(b"")
    gate = threading.Event()
    target.settling.submit(lambda: assert_set(gate))
    settled = [asyncio.ensure_future(one.settle(completed(b"bytes"))) for one in files]
    while len(target.settling._waiting) < len(items):
        await asyncio.sleep(0)
    gate.set()
    outcomes = await asyncio.gather(*settled, return_exceptions=True)
    statuses = [getattr(one, "status", type(one)) for one in outcomes]
    bad = {3: "failed", 5: OSError}
    assert statuses == [bad.get(n, "completed") for n in range(8)]


async def test_a_row_promises_only_what_can_be_kept(
    target: FileTarget, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the items before it came to, the name of its file is durable before its verdict."""
    order: list[str] = []
    check, sync, transaction = target.tree.check, os.fsync, target.settling._catalogue.transaction

    def checked(unique_id: str) -> None:
        if unique_id == "ill":
            raise OSError(errno.EIO, "Input/output error")
        check(unique_id)

    def fsync(descriptor: int) -> None:
        sync(descriptor)
        order.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))

    @contextmanager
    def committed() -> Iterator[None]:
        with transaction():
            yield
        order.append("commit")

    items = [item(name, sequence=n) for n, name in enumerate(("expired", "taken", "ill", "good"))]
    files = [await received(target, what, b"bytes") for what in items]
    (root / "taken").mkdir()
    monkeypatch.setattr(target.tree, "check", checked)
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(target.settling._catalogue, "transaction", committed)
    gate = threading.Event()
    target.settling.submit(lambda: assert_set(gate))
    proposals = [expired(items[0]), *[completed(b"bytes")] * 3]
    settled = [
        asyncio.ensure_future(one.settle(proposal))
        for one, proposal in zip(files, proposals, strict=True)
    ]
    while len(target.settling._waiting) < len(files):
        await asyncio.sleep(0)
    gate.set()
    outcomes = await asyncio.gather(*settled, return_exceptions=True)
    assert [getattr(one, "status", type(one)) for one in outcomes] == [
        "expired",
        "failed",
        OSError,
        "completed",
    ]
    assert target.owner.name in order[: order.index("commit")]


async def test_what_does_not_go_into_one_batch_goes_into_the_next(
    target: FileTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settling, "BATCH", 2)
    commits: list[None] = []
    transaction = target.settling._catalogue.transaction

    @contextmanager
    def committed() -> Iterator[None]:
        with transaction():
            yield
        commits.append(None)

    files = [await received(target, item(f"f{n}", sequence=n), b"bytes") for n in range(5)]
    monkeypatch.setattr(target.settling._catalogue, "transaction", committed)
    gate = threading.Event()
    target.settling.submit(lambda: assert_set(gate))
    submitted: list[None] = []
    submit = target.settling._thread.submit

    def count(*work: Any) -> Any:
        submitted.append(None)
        return submit(*work)

    monkeypatch.setattr(target.settling._thread, "submit", count)
    settled = [asyncio.ensure_future(one.settle(completed(b"bytes"))) for one in files]
    while len(target.settling._waiting) < len(files):
        await asyncio.sleep(0)
    gate.set()
    async with asyncio.timeout(10):
        assert [(await one).status for one in settled] == ["completed"] * 5
    assert len(submitted) == 3  # The thread comes once for each batch of 2, 2 and 1,
    assert len(commits) == 2 * 3  # and makes two transactions of it.


async def test_where_nobody_waits_any_more_nobody_else_is_kept_waiting(target: FileTarget) -> None:
    gone, here = [await received(target, item(f"f{n}", sequence=n), b"bytes") for n in range(2)]
    gate = threading.Event()
    target.settling.submit(lambda: assert_set(gate))
    proposal = completed(b"bytes")

    async def begin() -> None:
        target.settling.begin_settling(gone.item, proposal, gone, lambda _: None)

    await asyncio.to_thread(lambda: asyncio.run(begin()))  # The loop is closed with it.
    settled = asyncio.ensure_future(here.settle(proposal))
    while len(target.settling._waiting) < 2:
        await asyncio.sleep(0)
    gate.set()
    async with asyncio.timeout(10):
        assert (await settled).status is Status.COMPLETED


async def test_a_batch_is_durable_before_it_is_judged(
    target: FileTarget, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What came whole is settled together; one that cannot be synced is of no concern to others."""
    order: list[str] = []
    sync, transaction = os.fsync, target.settling._catalogue.transaction

    def fsync(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if path.endswith(f"/{target.owner.name}/2"):
            raise OSError(errno.EIO, "Input/output error")
        sync(descriptor)
        order.append("directory" if os.path.isdir(path) else "file")

    @contextmanager
    def committed() -> Iterator[None]:
        with transaction():
            yield
        order.append("commit")

    told: dict[str, str] = {}
    taken = []
    for n in range(5):
        incoming = target.begin(item(f"f{n}", sequence=n))
        await target.in_thread(partial(incoming.put, b"bytes", completed(b"bytes")))

        def tell(outcome: Verdict | Exception, name: str = f"f{n}") -> None:
            told[name] = getattr(outcome, "status", type(outcome).__name__)

        taken.append(Whole(incoming, completed(b"bytes"), tell))
    (root / "f3").mkdir()
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(target.settling._catalogue, "transaction", committed)
    await target.settle_whole(taken)
    completes = {f"f{n}": "completed" for n in (0, 1, 4)}
    assert told == {**completes, "f2": "Condemned", "f3": "failed"}
    assert order[:6] == ["file"] * 4 + ["directory", "commit"]
    # What was told once is told again without a look at the catalogue.
    monkeypatch.setattr(target.settling, "settle", failing(errno.EIO))
    assert (await taken[3].incoming.settle(completed(b"bytes"))).status is Status.FAILED
    assert {name for name in told if (root / name).is_file()} == {*completes}
    assert (temporaries(root), target.held) == ([], 0)


async def test_many_that_came_whole_are_told_though_one_does_not_listen(target: FileTarget) -> None:
    told: list[str] = []

    def deaf(_: object) -> None:
        raise RuntimeError("not listening")

    taken = []
    for n in range(3):
        incoming = target.begin(item(f"f{n}", sequence=n))
        await target.in_thread(partial(incoming.put, b"bytes", completed(b"bytes")))
        tell = deaf if n == 0 else lambda outcome: told.append(outcome.status)
        taken.append(Whole(incoming, completed(b"bytes"), tell))
    with pytest.raises(RuntimeError, match="not listening"):
        await target.settle_whole(taken)
    await caught_up(target)
    await asyncio.sleep(0)
    assert told == ["completed"] * 2


async def caught_up(target: FileTarget) -> None:
    """Wait until the catalogue's thread has done all that it was given."""
    await target.in_thread(lambda: target.settling.run(int))


def assert_set(gate: threading.Event) -> None:
    assert gate.wait(30)


async def test_offsets_that_no_file_has_are_refused(target: FileTarget) -> None:
    incoming = target.begin(item())
    for offset in (2**63 - 2, U64_MAX - 5):
        with pytest.raises(Refused):
            await target.in_thread(lambda: incoming.write_at(offset, b"bytes"))  # noqa: B023
    assert target.held == 0


async def test_the_quota_counts_published_and_temporary_bytes(root: Path) -> None:
    target = await FileTarget.open(root, quota=100_000)
    assert (await publish(target, item("a"), bytes(60_000))).status is Status.COMPLETED
    assert (target.settling.published, target.held) == (60_000, 0)
    incoming = target.begin(item("b", sequence=2))
    await target.in_thread(lambda: incoming.write_at(0, bytes(30_000)))
    with pytest.raises(Refused, match="quota 100000") as refused:
        await target.in_thread(lambda: incoming.write_at(30_000, bytes(20_000)))
    assert refused.value.error.request_id == incoming.item.key.request
    await target.in_thread(incoming.discard)
    # A replacement counts by what it adds, once it is judged.
    assert (await publish(target, item("a", 2, 3), bytes(30_000))).status is Status.COMPLETED
    assert target.settling.published == 30_000
    other = await FileTarget.open(root, quota=45_000)
    incoming = await received(other, item("c", sequence=4), bytes(8_000))
    assert (await publish(target, item("d", 1, 5), bytes(8_000))).status is Status.COMPLETED
    assert other.settling.published == 30_000  # What others add is counted from the next sweep.
    await other.sweep()
    assert other.settling.published == 38_000
    verdict = await incoming.settle(completed(bytes(8_000)))
    assert isinstance(verdict.error, BatchTransferFailed)
    assert "quota 45000" in verdict.error.reason
    for one in (target, other):
        await asyncio.to_thread(one.close)


async def test_published_bytes_are_never_counted_twice(
    target: FileTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    incoming = await received(target, item(), bytes(8192))
    for later in ("placed", "discard"):
        monkeypatch.setattr(incoming, later, lambda: None)
    await incoming.settle(completed(bytes(8192)))
    assert (target.settling.published, target.held) == (8192, 0)
    monkeypatch.undo()
    await target.in_thread(incoming.discard)
    assert target.held == 0


async def test_the_disk_reserve_heals(root: Path) -> None:
    target = await FileTarget.open(root, disk_reserve=2**62)
    incoming = target.begin(item())
    with pytest.raises(OSError, match="free") as full:
        await target.in_thread(lambda: incoming.write_at(0, b"bytes"))
    assert full.value.errno == errno.ENOSPC
    assert target.held == 0
    target._disk_reserve = 0
    await target.in_thread(lambda: incoming.write_at(0, b"bytes"))
    assert (await incoming.settle(completed(b"bytes"))).status is Status.COMPLETED
    await asyncio.to_thread(target.close)


async def test_what_is_reserved_stays_near_what_was_written(target: FileTarget) -> None:
    sparse = target.begin(item("sparse"))

    def scatter() -> None:
        for n in range(50):
            sparse.write_at(n * 2**26, b"x")

    await target.in_thread(scatter)
    assert target.held == 50 * 4096
    await target.in_thread(sparse.discard)
    whole = target.begin(item("whole"))
    steps = 0
    for n in range(64):
        before = target.held
        await target.in_thread(lambda: whole.write_at(n * 65536, bytes(65536)))  # noqa: B023
        assert target.held <= 2 * (n + 1) * 65536
        steps += target.held != before
    assert steps < 10
    await target.in_thread(whole.discard)


FULL_DISK = """
import asyncio, errno, os, sys
from splitferry_consumer.targets.inode import Inode

descriptor = os.open(sys.argv[1] + "/file", os.O_RDWR | os.O_CREAT)
inode = Inode(descriptor, lambda size: None, lambda size: None)
inode.write_at(0, bytes(2**20))
free = os.statvfs(sys.argv[1]).f_bavail
try:
    inode.write_at(2**20, bytes(8 * 2**20))
except OSError as error:
    assert error.errno == errno.ENOSPC
    assert os.statvfs(sys.argv[1]).f_bavail == free, "the disk stays full"
    inode.write_at(2**20, bytes(2 * 2**20))
    assert inode.trim(3 * 2**20) and inode.read_at(3 * 2**20 - 1, 1) == bytes(1)
    assert inode.charged == 3 * 2**20
    print("as it should")
"""


def test_a_full_disk_is_not_kept_full(tmp_path: Path) -> None:
    mount = f"mount -t tmpfs -o size=4m tmpfs '{tmp_path}' && exec \"$0\" -c \"$1\" '{tmp_path}'"
    command = ["unshare", "-rm", "sh", "-c", mount]
    try:
        subprocess.run([*command, "true", ""], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("a small file system needs leave to mount one")
    ran = subprocess.run(
        [*command, sys.executable, FULL_DISK], capture_output=True, text=True, check=False
    )
    assert (ran.stdout, ran.stderr) == ("as it should\n", "")


# Errors that heal, and those that do not


async def test_a_failed_sync_condemns_the_bytes(
    target: FileTarget, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    incoming = await received(target, item(), b"bytes")
    calls = []

    def fsync(descriptor: int) -> None:
        calls.append(descriptor)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fsync)
    for cause in ("the file could not be synced: .*Input/output error", "the bytes were dropped"):
        with pytest.raises(Condemned, match=f"^{cause}$"):
            await incoming.settle(completed(b"bytes"))
    assert len(calls) == 1
    assert (temporaries(root), target.held) == ([], 0)
    monkeypatch.undo()
    assert (await publish(target, item(), b"bytes")).status is Status.COMPLETED


async def test_a_directory_that_cannot_be_synced_condemns_and_the_next_owner_finishes(
    target: FileTarget, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    incoming = await received(target, item(), b"bytes")
    error = OSError(errno.EIO, "Input/output error")
    with monkeypatch.context() as patch:
        patch.setattr(target.tree, "sync", lambda names: dict.fromkeys(names, error))
        with pytest.raises(Condemned, match=r"^a directory could not be synced: .*Input/output"):
            await incoming.settle(completed(b"bytes"))
    await target.in_thread(incoming.discard)
    verdict = await target.begin(item()).settle(expired(item()))
    assert verdict.status is Status.COMPLETED
    assert (root / "item").read_bytes() == b"bytes"


async def test_a_file_whose_name_is_not_durable_gets_no_verdict(
    target: FileTarget, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row that named it would promise what a power loss takes away."""
    incoming = await received(target, item(), b"bytes")
    with monkeypatch.context() as patch:
        patch.setattr(target.settling, "_sync_owner", lambda _: OSError(errno.EIO, "ill"))
        with pytest.raises(Condemned, match=r"^a directory could not be synced: .*ill$"):
            await incoming.settle(completed(b"bytes"))
    await target.in_thread(incoming.discard)
    assert (await target.begin(item()).settle(expired(item()))).status is Status.EXPIRED
    assert not (root / "item").exists()


async def test_a_verdict_that_is_forgotten_meanwhile_is_received_again(
    target: FileTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another owner has published it, told it, and left it behind W, between the two phases."""
    incoming = await received(target, item(), b"bytes")
    publish = target.settling._publish

    def behind(*rows: Any) -> Any:
        with target.settling._catalogue.transaction():
            target.settling._catalogue._db.execute("DELETE FROM verdicts")
        return publish(*rows)

    monkeypatch.setattr(target.settling, "_publish", behind)
    with pytest.raises(Condemned, match=r"^the verdict was forgotten: W has passed it$"):
        await incoming.settle(completed(b"bytes"))
    await target.in_thread(incoming.discard)


async def test_bytes_that_somebody_removes_are_received_again(
    target: FileTarget, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the verdict and the rename: the row stays, and is pointed to the next bytes."""
    incoming = await received(target, item(), b"bytes")
    place = target.tree.place

    def placed(source: str, directory: int, unique_id: str) -> None:
        os.unlink(source, dir_fd=directory)
        place(source, directory, unique_id)

    with monkeypatch.context() as patch:
        patch.setattr(target.tree, "place", placed)
        with pytest.raises(Condemned, match=r"^the received bytes are gone from the temporary"):
            await incoming.settle(completed(b"bytes"))
    await target.in_thread(incoming.discard)
    assert (await publish(target, item(), b"bytes")).status is Status.COMPLETED
    assert (root / "item").read_bytes() == b"bytes"
    assert (temporaries(root), target.held) == ([], 0)


async def test_bytes_that_are_gone_with_their_owner_are_a_verdict(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever wants only the verdict has no bytes to receive again."""
    dead, owner = [await FileTarget.open(root) for _ in range(2)]
    await publish_in_vain(dead, monkeypatch)
    (name,) = temporaries(root)
    os.unlink(f"{dead.owner.name}/{name}", dir_fd=dead.incoming)
    verdict = await owner.begin(item()).settle(expired(item()))
    cause = "the received bytes are gone from the temporary file"
    assert str(verdict.error) == f"request 1-1 could not be written: {cause}"
    for target in (dead, owner):
        await asyncio.to_thread(target.close)


async def test_a_directory_that_goes_away_under_the_rename_is_made_again(
    target: FileTarget, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bytes are still there: nothing has to be received again."""
    incoming = await received(target, item("a/item"), b"bytes")

    def rename(*_: object, **__: object) -> None:
        (root / "a").rmdir()
        raise FileNotFoundError(errno.ENOENT, "No such file or directory")

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", rename)
        with pytest.raises(FileNotFoundError):
            await incoming.settle(completed(b"bytes"))
    assert (await incoming.settle(completed(b"bytes"))).status is Status.COMPLETED
    assert (root / "a/item").read_bytes() == b"bytes"


async def test_verdicts_that_could_not_be_cleared_are_cleared_from_a_catalogue_opened_anew(
    target: FileTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = target.settling._opened
    with monkeypatch.context() as patch:
        patch.setattr(catalogue.Catalogue, "passed", failing(errno.EIO))
        with pytest.raises(OSError, match="Input/output error"):
            await target.passed("group", "splits", 0, 10)
    await target.passed("group", "splits", 0, 10)
    assert target.settling._opened is not before


@pytest.mark.parametrize("recovery", ["again", "discard and receive", "discard and sweep"])
async def test_a_rename_that_fails_is_tried_again(
    target: FileTarget, root: Path, monkeypatch: pytest.MonkeyPatch, recovery: str
) -> None:
    incoming = await received(target, item(), b"bytes")

    def rename(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", rename)
        with pytest.raises(OSError, match="Input/output"):
            await incoming.settle(completed(b"bytes"))
        if recovery != "again":
            await target.in_thread(incoming.discard)
            await caught_up(target)
            assert len(temporaries(root)) == 1  # The verdict stands, and names it.
    if recovery == "again":
        assert (await incoming.settle(completed(b"bytes"))).status is Status.COMPLETED
    elif recovery == "discard and receive":
        assert (await publish(target, item(), b"bytes")).status is Status.COMPLETED
    else:
        await target.sweep()
    assert (root / "item").read_bytes() == b"bytes"
    assert (temporaries(root), target.held) == ([], 0)


async def test_a_locked_catalogue_heals(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "BUSY_TIMEOUT", 0.05)
    target = await FileTarget.open(root)
    incoming = await received(target, item(), b"bytes")
    program = (
        "import sqlite3, sys\n"
        "db = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
        "db.execute('BEGIN EXCLUSIVE'); print('locked', flush=True); sys.stdin.read()"
    )
    path = str(root / ".splitferry/catalog.db")
    locker = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, path, stdin=-1, stdout=-1
    )
    assert locker.stdout is not None
    assert await locker.stdout.readline() == b"locked\n"
    with pytest.raises(OSError, match=f"locked by process {locker.pid}"):
        await incoming.settle(completed(b"bytes"))
    assert not (root / "item").exists()
    await locker.communicate(b"")
    assert (await incoming.settle(completed(b"bytes"))).status is Status.COMPLETED
    await asyncio.to_thread(target.close)


@pytest.mark.parametrize("discarded", ["before", "after"])
async def test_a_cancelled_settle_is_not_begun(
    target: FileTarget, root: Path, discarded: str
) -> None:
    incoming = await received(target, item(), b"bytes")
    gate = threading.Event()
    target.settling.submit(lambda: assert_set(gate))
    settled = asyncio.ensure_future(incoming.settle(completed(b"bytes")))
    while not target.settling._waiting:
        await asyncio.sleep(0)
    settled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await settled
    if discarded == "before":
        await target.in_thread(incoming.discard)
    gate.set()
    await caught_up(target)
    await target.in_thread(incoming.discard)
    assert (temporaries(root), target.held, (root / "item").exists()) == ([], 0, False)
    assert (await target.begin(item()).settle(expired(item()))).status is Status.EXPIRED


# Owners


async def test_the_files_of_the_living_stay_and_those_of_the_dead_go(root: Path) -> None:
    target = await FileTarget.open(root)
    await received(target, item(), b"bytes")
    other = await FileTarget.open(root)
    await received(other, item("other", sequence=2), b"bytes")
    await target.sweep()
    assert len(temporaries(root)) == 2
    # The kernel's part in a death: the lock is gone, all else stays.
    fcntl.flock(other.owner.lock, fcntl.LOCK_UN)
    await target.sweep()
    assert len(temporaries(root)) == 1
    fcntl.flock(target.owner.lock, fcntl.LOCK_UN)
    third = await FileTarget.open(root)
    assert os.listdir(root / ".splitferry/incoming") == [third.owner.name]
    await asyncio.to_thread(third.close)
    await asyncio.to_thread(target.close)
    assert [path.name for path in (root / ".splitferry/incoming").iterdir()] == []
    await asyncio.to_thread(other.close)


def test_owners_start_while_others_sweep() -> None:
    """A sweeper never takes the directory of an owner that has just come."""
    with fast_root() as root:
        FileTarget(root).close()
        failures: list[BaseException] = []

        def come_and_go() -> None:
            try:
                for _ in range(40):
                    target = FileTarget(root)
                    incoming = target.begin(item())
                    incoming.write_at(0, b"bytes")
                    assert os.stat(incoming.temporary, dir_fd=target.incoming).st_nlink == 1
                    target.close()
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=come_and_go) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        assert list((root / ".splitferry/incoming").iterdir()) == []


async def test_what_is_published_is_verified_by_its_bytes(target: FileTarget, root: Path) -> None:
    assert await target.verified("item") is None
    await publish(target, item(version=U64_MAX), b"bytes")
    sha256 = hashlib.sha256(b"bytes").digest()
    assert await target.verified("item") == (U64_MAX, 5, sha256)
    (root / "item").write_bytes(b"bytez")
    assert await target.verified("item") is None
    (root / "item").unlink()
    assert await target.verified("item") is None


async def test_whether_another_process_uses_the_root(target: FileTarget, root: Path) -> None:
    assert not await target.shared()
    other = await FileTarget.open(root)
    assert await target.shared()
    await asyncio.to_thread(other.close)
    (root / ".splitferry/incoming/nobody").mkdir()
    assert not await target.shared()


async def test_passed_verdicts_are_forgotten(target: FileTarget, root: Path) -> None:
    for sequence in (1, 2, 3):
        what = item(f"f{sequence}", sequence=sequence)
        await target.begin(what).settle(expired(what))
    await target.passed("g", "splits", 0, 20)
    # Forgotten, the first may be judged anew; the others may not.
    verdicts = [await publish(target, item(f"f{n}", sequence=n), b"bytes") for n in (1, 2, 3)]
    assert [verdict.status for verdict in verdicts] == ["completed", "expired", "expired"]


@pytest.mark.skipif(
    not can_mount() or shutil.which("lowntfs-3g") is None,
    reason="needs root and lowntfs-3g, to mount a file system that folds names",
)
async def test_a_name_that_the_file_system_folds_goes_over_no_other(tmp_path: Path) -> None:
    disk, root = tmp_path / "disk", tmp_path / "root"
    disk.write_bytes(b"")
    os.truncate(disk, 32 * 2**20)
    root.mkdir()
    subprocess.run(["mkfs.ntfs", "-FQ", disk], check=True, capture_output=True)
    subprocess.run(["lowntfs-3g", "-o", "ignore_case", disk, root], check=True)
    try:
        target = await FileTarget.open(root)
        assert (await publish(target, item("a"), b"bytes")).status is Status.COMPLETED
        refused = await publish(target, item("A", 2, 2), b"other")
        assert isinstance(refused.error, BatchTransferFailed)
        assert (root / "a").read_bytes() == b"bytes"
        assert (await publish(target, item("a", 2, 3), b"newer")).status is Status.COMPLETED
        await asyncio.to_thread(target.close)
    finally:
        subprocess.run(["umount", root], check=True)


async def test_what_the_root_says_of_names_is_what_the_catalogue_goes_by(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same without a file system that folds them."""
    for sequence, folding, status in ((1, True, "failed"), (3, False, "completed")):
        monkeypatch.setattr(file, "folds_names", lambda _, folding=folding: folding)
        target = await FileTarget.open(root)
        await publish(target, item(f"a{sequence}", 1, sequence), b"bytes")
        verdict = await publish(target, item(f"A{sequence}", 1, sequence + 1), b"other")
        assert verdict.status == status
        await asyncio.to_thread(target.close)


# Roots that cannot be used


def test_a_newer_catalogue_is_refused(root: Path) -> None:
    FileTarget(root).close()
    with sqlite3.connect(root / ".splitferry/catalog.db") as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(TargetUnusable, match=r"newer splitferry .*upgrade") as refused:
        FileTarget(root)
    assert str(refused.value).endswith("or use another root")
    assert list((root / ".splitferry/incoming").iterdir()) == []


async def test_a_damaged_catalogue_names_a_remedy(root: Path) -> None:
    (root / ".splitferry").mkdir(parents=True)
    (root / ".splitferry/catalog.db").write_bytes(b"no database" * 1000)
    with pytest.raises(TargetUnusable, match=r"damaged .*restore it from a backup"):
        await FileTarget.open(root)


@pytest.mark.parametrize("name", ["file", "file/below", "root"])
async def test_a_root_that_is_none(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "root").mkdir()
    (tmp_path / "root/.splitferry").symlink_to(tmp_path)
    remedy = "something that is no directory stands there; choose another root"
    with pytest.raises(TargetUnusable) as refused:
        await FileTarget.open(tmp_path / name)
    assert re.fullmatch(f"cannot use the root {tmp_path / name}: .*: {remedy}", str(refused.value))


@pytest.mark.parametrize(
    ("causes", "remedy"),
    [
        (["EACCES", "EPERM", "EROFS"], "give this user write access, or choose another root"),
        (
            ["ENOTDIR", "EEXIST", "ELOOP"],
            "something that is no directory stands there; choose another root",
        ),
        (["ENOENT"], "make it, or put it back"),
        (["ENOSPC", "EDQUOT"], "make room on its file system, or choose another root"),
        (["EBUSY"], "end that process if it is frozen, or wait"),
        (["EIO"], "mend the file system, or choose another root"),
    ],
)
def test_a_root_that_cannot_be_used_names_cause_and_remedy(
    root: Path, monkeypatch: pytest.MonkeyPatch, causes: list[str], remedy: str
) -> None:
    for cause in causes:
        number = getattr(errno, cause)
        monkeypatch.setattr(os, "fsync", failing(number))
        with pytest.raises(TargetUnusable) as refused:
            FileTarget(root)
        told = f"cannot use the root {root}: {os.strerror(number)}: {remedy}"
        assert str(refused.value) == told


def test_a_root_without_write_access() -> None:
    folder = tempfile.mkdtemp()
    os.chmod(folder, 0o555)
    try:
        with unprivileged(), pytest.raises(TargetUnusable, match="write access"):
            FileTarget(folder)
    finally:
        os.chmod(folder, 0o755)
        shutil.rmtree(folder)


async def test_a_file_that_was_taken_away_before_its_row_was_final_is_received_again(
    target: FileTarget, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it was ever published cannot be known any more; that it failed would be wrong."""
    what, data = item(), b"bytes"
    incoming = await received(target, what, data)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "database or disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(catalogue.Catalogue, "publish", full)
        with pytest.raises(OSError, match="full"):
            await incoming.settle(completed(data))
    (root / "item").unlink()  # by a program that takes what has come
    await target.sweep()
    with pytest.raises(Condemned, match="bytes are gone"):
        await incoming.settle(completed(data))
    incoming.discard()
    assert (await publish(target, what, data)).status is Status.COMPLETED
    assert (root / "item").read_bytes() == data


async def test_whoever_settles_after_the_end_hears_of_it(root: Path) -> None:
    target = await FileTarget.open(root)
    files = [await received(target, item(f"f{n}", sequence=n), b"bytes") for n in range(2)]
    await asyncio.to_thread(target.close)
    for one in files:
        with pytest.raises(Condemned, match=r"^the target is closed$"):
            await asyncio.wait_for(one.settle(completed(b"bytes")), 5)


async def test_closing_waits_for_a_sweep_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else its thread would go on with descriptors that belong to others by then."""
    target = await FileTarget.open(tmp_path / "root")
    entered, go_on = threading.Event(), threading.Event()
    finish = target.settling.finish

    def slow(owner: str, last: bool = False) -> set[str]:
        if not last:
            entered.set()
            go_on.wait(10)
        return finish(owner, last)

    monkeypatch.setattr(target.settling, "finish", slow)
    sweeping = asyncio.create_task(target.sweep())
    await asyncio.to_thread(entered.wait, 10)
    sweeping.cancel()
    closing = asyncio.create_task(asyncio.to_thread(target.close))
    await asyncio.sleep(0.1)
    assert not closing.done()
    os.fstat(target.incoming)
    go_on.set()
    await closing


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files in /proc")
def test_directories_that_cannot_be_synced_cost_no_descriptors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = FileTarget(tmp_path / "root")
    shutil.rmtree(tmp_path / "root/.splitferry/incoming")

    def ill(_: int) -> None:
        raise OSError(errno.EIO, "ill")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", ill)
        before = os.listdir("/proc/self/fd")
        for _ in range(5):
            target._sweep()
        assert len(os.listdir("/proc/self/fd")) <= len(before)
    target._sweep()
    target.close()


# What is held open, and what is made durable at the start


def test_our_directories_are_durable_before_anything_is_in_them(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    sync = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    target = FileTarget(root)
    assert synced == [root.parent.name, "incoming", ".splitferry", "root"]
    target.close()


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files in /proc")
async def test_nothing_stays_open(root: Path) -> None:
    """Not after the end, not after a start that failed, not after our directories came anew."""
    before = os.listdir("/proc/self/fd")

    def come_and_go() -> None:
        target = FileTarget(root)
        incoming = target.begin(item())
        incoming.write_at(0, b"bytes")
        target.settling.run(lambda: target.settling.published)
        held = len(os.listdir("/proc/self/fd"))
        incoming.discard()
        asyncio.run(publish(target, item("other", sequence=2), b"bytes"))
        shutil.rmtree(root / ".splitferry/incoming")
        target._sweep()
        assert len(os.listdir("/proc/self/fd")) == held - 1
        target.close()
        catalog = root / ".splitferry/catalog.db"
        catalog.write_bytes(b"no database" * 1000)
        with pytest.raises(TargetUnusable):
            FileTarget(root)

    await asyncio.to_thread(come_and_go)
    # Others of this process may have gone meanwhile, with what the collector found.
    assert len(os.listdir("/proc/self/fd")) <= len(before)
    assert [one.name for one in threading.enumerate() if one.name.startswith("catalogue")] == []


async def test_a_closed_target_takes_nothing(root: Path) -> None:
    """Its descriptors may be somebody else's by now."""
    target = await FileTarget.open(root)
    begun = await received(target, item(), b"bytes")
    await asyncio.to_thread(target.close)
    for one in (begun, target.begin(item("other", sequence=2))):
        with pytest.raises(Condemned):
            await target.in_thread(lambda: one.write_at(0, b"bytes"))  # noqa: B023
        await target.in_thread(one.discard)
    await target.sweep()
    assert target.held == 0


async def test_what_waits_when_the_target_closes_is_not_settled_any_more(root: Path) -> None:
    """Its file goes with our directory, so no row may come to name it."""
    target = await FileTarget.open(root)
    incoming = await received(target, item(), b"bytes")
    gate = threading.Event()
    target.settling.submit(lambda: assert_set(gate))
    closing = asyncio.create_task(asyncio.to_thread(target.close))
    while not target.closed:
        await asyncio.sleep(0)
    await asyncio.sleep(0.1)
    settled = asyncio.ensure_future(target.settling.settle(item(), completed(b"bytes"), incoming))
    while not target.settling._waiting:
        await asyncio.sleep(0)
    gate.set()
    with pytest.raises(Condemned, match=r"^the target is closed$"):
        await settled
    await closing
    assert not (root / "item").exists()


async def test_bytes_that_a_verdict_names_outlive_their_owner(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = await FileTarget.open(root)
    incoming = await received(target, item(), b"bytes")
    with monkeypatch.context() as patch:
        patch.setattr(target.tree, "place", failing(errno.EIO))
        with pytest.raises(OSError, match="Input/output"):
            await incoming.settle(completed(b"bytes"))
        await asyncio.to_thread(target.close)
    assert (len(temporaries(root)), (root / "item").exists()) == (1, False)
    again = await FileTarget.open(root)
    assert (root / "item").read_bytes() == b"bytes"
    assert os.listdir(root / ".splitferry/incoming") == [again.owner.name]
    await asyncio.to_thread(again.close)


async def test_a_temporary_file_is_never_one_that_is_there(target: FileTarget, root: Path) -> None:
    """Not even by a link, whoever put it there; the next try takes another name."""
    (root / "victim").write_bytes(b"theirs")
    own = root / ".splitferry/incoming" / target.owner.name
    (own / "0").symlink_to(root / "victim")
    (own / "1").hardlink_to(root / "victim")
    incoming = target.begin(item())
    for _ in range(2):
        with pytest.raises(FileExistsError):
            await target.in_thread(lambda: incoming.write_at(0, b"ours"))
    await target.in_thread(lambda: incoming.write_at(0, b"ours"))
    assert (await incoming.settle(completed(b"ours"))).status is Status.COMPLETED
    assert (root / "victim").read_bytes() == b"theirs"


async def test_files_that_cannot_be_removed_at_the_end_are_swept_by_the_next(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = await FileTarget.open(root)
    await received(target, item(), b"bytes")
    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", failing(errno.EIO))
        with capture_logs() as logs:
            await asyncio.to_thread(target.close)
    told = {"event": "temporary files stay behind", "log_level": "warning", "root": str(root)}
    assert logs == [{**told, "cause": "[Errno 5] Input/output error"}]
    assert len(temporaries(root)) == 1
    again = await FileTarget.open(root)
    assert temporaries(root) == []
    await asyncio.to_thread(again.close)


@pytest.mark.parametrize("sealed", [False, True])
async def test_a_temporary_file_that_could_not_be_removed_is_swept(
    target: FileTarget, root: Path, monkeypatch: pytest.MonkeyPatch, sealed: bool
) -> None:
    """Sealed, a row may name it, and the catalogue is asked first."""
    dropped, kept = [await received(target, item(f"{n}", 1, n), b"bytes") for n in range(2)]
    if sealed:
        await target.in_thread(lambda: dropped.put(b"bytes", completed(b"bytes")))
        await target.in_thread(dropped.seal)
    with monkeypatch.context() as patch, capture_logs() as logs:
        patch.setattr(os, "unlink", failing(errno.EIO))
        await target.in_thread(dropped.discard)
        await caught_up(target)
    told = {"event": "a temporary file stays", "log_level": "warning", "file": dropped.temporary}
    assert logs == [{**told, "cause": "[Errno 5] Input/output error"}]
    assert len(temporaries(root)) == 2
    await target.sweep()
    assert temporaries(root) == [os.path.basename(kept.temporary)]
    assert target._left == set()
    await target.in_thread(kept.discard)
    assert (temporaries(root), target.held) == ([], 0)


async def test_a_sweep_that_cannot_look_is_told_and_met_again_by_the_next(
    target: FileTarget, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also by the first, in which nobody has the target yet, to close what it holds."""
    with monkeypatch.context() as patch, capture_logs() as logs:
        patch.setattr(os, "listdir", failing(errno.EMFILE))
        await target.sweep()
        second = await FileTarget.open(root)
    remedy = "Too many open files: mend the file system, or choose another root"
    told = {"event": "root unusable", "log_level": "error"}
    assert logs == [{**told, "reason": f"cannot use the root {root}: {remedy}"}] * 2
    await asyncio.to_thread(second.close)
    await target.sweep()


async def test_one_directory_that_cannot_be_cleared_leaves_the_others(
    target: FileTarget, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = await FileTarget.open(root)
    await received(dead, item(), b"bytes")
    fcntl.flock(dead.owner.lock, fcntl.LOCK_UN)
    (root / ".splitferry/incoming/strange").write_bytes(b"")
    order = ["strange", target.owner.name, dead.owner.name]
    listed = os.listdir

    def in_order(directory: int) -> list[str]:
        return sorted(listed(directory), key=lambda name: name in order and order.index(name))

    monkeypatch.setattr(os, "listdir", in_order)
    with capture_logs() as logs:
        await target.sweep()
    told = {"event": "could not clear", "log_level": "warning", "owner": "strange"}
    assert logs == [{**told, "root": str(root), "cause": "[Errno 20] Not a directory: 'strange'"}]
    assert temporaries(root) == []
    await asyncio.to_thread(dead.close)


async def test_what_is_large_is_synced_where_it_holds_up_nobody(
    target: FileTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The catalogue's thread settles for all; only what is small is synced there, together."""
    threads: dict[str, str] = {}
    sync = os.fsync

    def fsync(descriptor: int) -> None:
        name = os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))
        threads.setdefault(name, threading.current_thread().name)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    await publish(target, item("small", 1, 1), bytes(SMALL))
    await publish(target, item("large", 1, 2), bytes(SMALL + 1))
    assert WHOLE_MAX <= SMALL, "all that comes whole is synced there"
    assert threads["0"].startswith("catalogue")
    assert not threads["1"].startswith("catalogue")


async def test_files_may_be_dropped_while_the_target_closes(
    target: FileTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    incoming = await received(target, item(), b"bytes")
    await target.in_thread(lambda: incoming.put(b"bytes", completed(b"bytes")))
    await target.in_thread(incoming.seal)

    def closed(_: object) -> None:
        raise RuntimeError("cannot schedule new futures after shutdown")

    monkeypatch.setattr(target.settling, "submit", closed)
    await target.in_thread(incoming.discard)
    assert target.held == 0


async def test_what_blocks_is_done_by_the_given_threads(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: set[str] = set()
    sync = os.fsync

    def fsync(descriptor: int) -> None:
        threads.add(threading.current_thread().name)
        sync(descriptor)

    with ThreadPoolExecutor(1, "ours") as executor:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fsync)
            target = await FileTarget.open(root, executor=executor)
        assert threads == {"ours_0"}
        assert await target.in_thread(lambda: threading.current_thread().name) == "ours_0"
        await asyncio.to_thread(target.close)


async def test_sealed_bytes_that_no_row_names_go_at_once(target: FileTarget, root: Path) -> None:
    incoming = await received(target, item(), b"bytes")
    await target.in_thread(lambda: incoming.put(b"bytes", completed(b"bytes")))
    await target.in_thread(incoming.seal)
    await target.in_thread(incoming.discard)
    await caught_up(target)
    assert (temporaries(root), target.held) == ([], 0)


# A catalogue, a root, directories that somebody takes away


async def test_a_damaged_catalogue_heals_and_each_time_is_told_once(
    target: FileTarget, root: Path
) -> None:
    """Nothing is decided without the versions held; with them back it goes on, as before."""
    await publish(target, item(version=2), b"bytes")
    path = root / ".splitferry/catalog.db"
    sound = path.read_bytes()
    for sequence in (2, 3):
        incoming = await received(target, item(version=1, sequence=sequence), b"older")
        path.write_bytes(b"\xff" * len(sound))
        with capture_logs() as logs:
            for _ in range(3):
                with pytest.raises(OSError, match=r"damaged .*restore it from a backup") as failed:
                    await incoming.settle(completed(b"older"))
                assert failed.value.errno == errno.EIO
            unusable = {"event": "catalogue unusable", "log_level": "error"}
            assert logs == [{**unusable, "reason": failed.value.strerror}]
        path.write_bytes(sound)
        path.with_name("catalog.db-journal").unlink(missing_ok=True)
        with capture_logs() as logs:
            for _ in range(2):
                verdict = await incoming.settle(completed(b"older"))
                assert isinstance(verdict.error, VersionMismatch)
                await target.sweep()
            usable = {"event": "catalogue usable again", "log_level": "info"}
            assert logs == [{**usable, "root": str(root)}]
    assert (root / "item").read_bytes() == b"bytes"


async def test_that_versions_are_not_known_is_told_where_there_are_files(
    root: Path, tmp_path: Path
) -> None:
    with capture_logs() as logs:
        target = await FileTarget.open(root)
        await publish(target, item(version=2), b"bytes")
        for suffix in ("", "-journal"):
            (root / f".splitferry/catalog.db{suffix}").unlink()
        assert heard(logs) == []
        with pytest.raises(OSError, match="deleted or moved"):
            await publish(target, item("other", sequence=2), b"bytes")
        assert (await publish(target, item("other", sequence=2), b"bytes")).status == "completed"
        reason = "a new one is made, and the versions of the files here are not known"
        told = {"event": "no catalogue", "log_level": "warning", "root": str(root)}
        assert logs == [{**told, "reason": reason}]
        await asyncio.to_thread(target.close)
        again = await FileTarget.open(root)
        assert heard(logs) == ["no catalogue"]
        await asyncio.to_thread(again.close)


async def test_our_directories_are_made_anew(target: FileTarget, root: Path) -> None:
    """What was on its way in is received again; what comes now goes its usual way."""
    lost = await received(target, item(), b"bytes")
    before = target.owner.name
    shutil.rmtree(root / ".splitferry/incoming")
    with pytest.raises(Condemned):
        await lost.settle(completed(b"bytes"))
    await target.in_thread(lost.discard)
    with capture_logs() as logs:
        await target.sweep()
    told = {"event": "our directories were removed and are made anew", "log_level": "warning"}
    assert logs == [{**told, "root": str(root)}]
    assert target.owner.name != before
    assert not os.get_inheritable(target.incoming)
    assert os.listdir(root / ".splitferry/incoming") == [target.owner.name]
    assert (await publish(target, item(), b"bytes")).status is Status.COMPLETED
    assert (temporaries(root), target.held) == ([], 0)
    kept = target.owner.name
    await target.sweep()
    assert target.owner.name == kept


async def test_a_root_that_was_removed_is_used_again_when_it_is_back(root: Path) -> None:
    target = await FileTarget.open(root)
    shutil.rmtree(root)
    with capture_logs() as logs:
        await target.sweep()
    cause = "No such file or directory: make it, or put it back"
    told = {"event": "root unusable", "log_level": "error"}
    assert logs[0] == {**told, "reason": f"cannot use the root {root}: {cause}"}
    with pytest.raises(OSError, match="No such file"):
        await publish(target, item(), b"bytes")
    root.mkdir()
    await target.sweep()
    with pytest.raises(OSError, match="deleted or moved"):
        await publish(target, item(), b"bytes")
    assert (await publish(target, item(), b"bytes")).status is Status.COMPLETED
    assert (root / "item").read_bytes() == b"bytes"
    await asyncio.to_thread(target.close)


async def test_a_root_that_was_moved_is_waited_for(root: Path) -> None:
    """What stands at its path now is not it: bytes go to neither."""
    target = await FileTarget.open(root)
    incoming = await received(target, item(), b"bytes")
    moved = root.with_name("moved")
    root.rename(moved)
    root.mkdir()
    (root / ".splitferry").mkdir()
    remedy = "put that one back (mount it), or restart the consumer to go on with what is there now"
    for cause in ("deleted or moved", f"{root} is not the directory that it was: {remedy}"):
        with pytest.raises(OSError, match=re.escape(cause)):
            await incoming.settle(completed(b"bytes"))
        await target.sweep()
    assert os.listdir(root) == [".splitferry"]
    shutil.rmtree(root)
    moved.rename(root)
    assert (await incoming.settle(completed(b"bytes"))).status is Status.COMPLETED
    assert (root / "item").read_bytes() == b"bytes"
    await asyncio.to_thread(target.close)


# Limits


async def test_files_wait_for_others_when_as_many_are_open_as_may_be(
    target: FileTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The catalogue and the connections need some, too; one file at a time always goes."""
    for limit, together in ((162, 2), (3, 1)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, limit=limit: (limit, 2**20))
        files = [
            await received(target, item(f"{limit}-{n}", sequence=n), b"x") for n in range(together)
        ]
        late = target.begin(item("late"))
        told = r"; raise the limit of open files \(ulimit -n\)$"
        with pytest.raises(OSError, match=told) as failed:
            await target.in_thread(lambda: late.write_at(0, b"x"))  # noqa: B023
        assert failed.value.errno == errno.EMFILE
        await target.in_thread(files[0].discard)
        await target.in_thread(lambda: late.write_at(0, b"x"))  # noqa: B023
        for one in (late, *files[1:]):
            await target.in_thread(one.discard)


async def test_a_file_that_cannot_be_opened_takes_no_descriptor(
    target: FileTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (161, 161))
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", failing(errno.EIO))
        with pytest.raises(OSError, match="Input/output"):
            await received(target, item(), b"x")
    assert (await publish(target, item(), b"x")).status is Status.COMPLETED


@pytest.mark.parametrize("blocking", [False, True])
async def test_without_a_reserve_the_last_block_may_be_taken(
    root: Path, monkeypatch: pytest.MonkeyPatch, blocking: bool
) -> None:
    if blocking:
        target = await asyncio.to_thread(FileTarget, root)
    else:
        target = await FileTarget.open(root)
    free = SimpleNamespace(f_bavail=1, f_frsize=4096)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fstatvfs", lambda _: free)
        await target.in_thread((await received(target, item(), bytes(4096))).discard)
    await asyncio.to_thread(target.close)


async def test_the_quota_and_the_reserve_may_be_met_exactly(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = await FileTarget.open(root, quota=3 * 4096, disk_reserve=4096)
    space = os.statvfs(root)
    free = SimpleNamespace(f_bavail=2, f_frsize=4096, f_bfree=space.f_bfree)
    monkeypatch.setattr(os, "fstatvfs", lambda _: free)
    first = target.begin(item())
    await target.in_thread(lambda: first.write_at(0, bytes(4096)))
    assert target.held == 4096
    second = target.begin(item("b", sequence=2))
    free.f_bavail = 1
    with pytest.raises(OSError, match="make room"):
        await target.in_thread(lambda: second.write_at(0, b"x"))
    free.f_bavail = 100
    await target.in_thread(lambda: second.write_at(0, bytes(8192)))
    third = target.begin(item("c", sequence=3))
    with pytest.raises(Refused, match="quota"):
        await target.in_thread(lambda: third.write_at(0, b"x"))
    assert (await second.settle(completed(bytes(8192)))).status is Status.COMPLETED
    assert (await first.settle(completed(bytes(4096)))).status is Status.COMPLETED
    assert (target.settling.published, target.held) == (3 * 4096, 0)
    await asyncio.to_thread(target.close)


async def test_a_published_file_that_cannot_be_read_is_not_verified(
    target: FileTarget, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await publish(target, item(), b"bytes")
    with monkeypatch.context() as patch, capture_logs() as logs:
        patch.setattr(hashlib, "file_digest", failing(errno.EIO))
        assert await target.verified("item") is None
    told = {"event": "a published file cannot be read", "log_level": "warning"}
    cause = "[Errno 5] Input/output error"
    assert logs == [{**told, "file": str(root / "item"), "cause": cause}]
    assert await target.verified("item") is not None


async def test_what_is_reserved_ahead_of_an_end_does_not_use_up_the_quota(tmp_path: Path) -> None:
    target = await FileTarget.open(tmp_path / "root", quota=100 * 1024)
    data = os.urandom(96 * 1024)
    incoming = target.begin(item())
    try:
        for start in (48, 72, 0, 24):
            part = memoryview(data)[start * 1024 : (start + 24) * 1024]
            await target.in_thread(partial(incoming.write_at, start * 1024, part))
        assert (await incoming.settle(completed(data))).status is Status.COMPLETED
    finally:
        await target.in_thread(incoming.discard)
        await target.in_thread(target.close)


def test_a_root_that_was_made_is_durable_in_what_it_was_made_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[int] = set()
    fsync = os.fsync

    def noted(file: int) -> None:
        fsync(file)
        synced.add(os.fstat(file).st_ino)

    monkeypatch.setattr(os, "fsync", noted)
    FileTarget(tmp_path / "made/root").close()
    assert tmp_path.joinpath("made").stat().st_ino in synced
    assert tmp_path.stat().st_ino in synced


async def test_a_row_that_makes_no_sense_is_damage(tmp_path: Path) -> None:
    target = await FileTarget.open(tmp_path / "root")
    await publish(target, item(), b"bytes")
    await asyncio.to_thread(target.close)
    with sqlite3.connect(tmp_path / "root/.splitferry/catalog.db") as db:
        db.execute("UPDATE verdicts SET status = 'compleued', temporary = 'a/b'")
    target = await FileTarget.open(tmp_path / "root")
    with pytest.raises(OSError, match="is damaged"):
        await publish(target, item(), b"bytes")
    await asyncio.to_thread(target.close)


async def test_a_directory_that_a_reader_removes_with_its_file_is_no_lost_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "root"
    target = await FileTarget.open(root)
    sync = target.tree.sync

    def consumed(unique_ids: Any) -> Any:
        (root / "new/item").rename(tmp_path / "taken")
        (root / "new").rmdir()
        return sync(unique_ids)

    monkeypatch.setattr(target.tree, "sync", consumed)
    try:
        verdict = await publish(target, item("new/item"), b"bytes")
        assert verdict.status is Status.COMPLETED
    finally:
        await asyncio.to_thread(target.close)


async def test_one_transaction_waits_for_a_bounded_number_of_directories(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All others of the root wait meanwhile: 256 items 254 directories deep held them up 95 s."""
    with fast_root() as root:
        target = await FileTarget.open(root)
        sync, most = target.tree.sync, 0

        def counted(unique_ids: Iterable[str]) -> dict[str, OSError]:
            nonlocal most
            names = [*unique_ids]
            most = max(most, sum(name.count("/") for name in names))
            return sync(names)

        monkeypatch.setattr(target.tree, "sync", counted)
        deep = [
            await received(target, item(f"{n}{'/a' * 200}", sequence=n + 1), b"x") for n in range(8)
        ]
        await asyncio.gather(*[one.settle(completed(b"x")) for one in deep])
        assert most < settling.BATCH + 256
        await asyncio.to_thread(target.close)
