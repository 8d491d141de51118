"""The verdict, then the rename: how received files become published ones.

Two transactions, both durable when they end (DESIGN, "Verdict first, rename second"):

1. every opening gets its verdict row, whose first writer wins; a completed one is pending and
   names its temporary file;
2. under the same lock of the root, the pending rows are read again, their files renamed, the
   directories synced, the items recorded, the rows made final.

A crash in between leaves a pending row, and whoever comes next finishes it: a later owner of
the request, or a sweep that finds the owner dead. Nobody else's verdict can come of it, so a
zombie and the new owner may run these phases in any order. All of it happens on one thread of
its own, which takes everything that waits into one pair of transactions. The files of a batch
are made durable there, too: the disk is set to work on all of them before the first is waited
for, so that one commit of the file system's journal serves many.
"""

from __future__ import annotations

import asyncio
import errno
import os
import re
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Container, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from operator import methodcaller
from typing import Protocol, TypeVar

import structlog

from splitferry_consumer.catalogue import Catalogue, Proposal, Published, Row, Standing
from splitferry_consumer.paths import Obstructed, Tree, open_directory
from splitferry_protocol.errors import WriteDataFailed
from splitferry_protocol.ids import RequestKey
from splitferry_protocol.paths import PRIVATE_DIRECTORY
from splitferry_protocol.records import Status

from . import Condemned, Item, TargetUnusable, Verdict

log = structlog.get_logger(__name__)

BATCH = 256
"""Requests settled in one pair of transactions at most, and directories synced for them: nobody
else settles anything meanwhile."""

T = TypeVar("T")
Outcome = Row | Exception


class Received(Protocol):
    """A temporary file, whole. Its methods block, and are called on the catalogue's thread."""

    @property
    def temporary(self) -> str:
        """OWNER/NAME."""

    def write_out(self) -> None:
        """Set the disk to work on the bytes. Raises as `seal` does."""

    def seal(self) -> None:
        """Make the bytes durable. Raises OSError, Refused, Condemned."""

    def release(self) -> None:
        """The bytes count as published."""

    def placed(self) -> None:
        """The file was renamed, and the verdict is final."""


@dataclass(slots=True, eq=False)
class _Settlement:
    item: Item
    proposal: Verdict
    received: Received | None
    wanted: Callable[[], bool]
    """Whether somebody still waits for the answer."""
    loop: asyncio.AbstractEventLoop
    tell: Callable[[Verdict | Exception], None]
    """Takes the answer, on the loop."""

    @property
    def temporary(self) -> str | None:
        return None if self.received is None else self.received.temporary


class Settling:
    """Settles the requests of one root. `incoming` is the directory above all owners' ones."""

    def __init__(
        self, root: str, tree: Tree, incoming: int, quota: int | None, folding: bool
    ) -> None:
        """Open the catalogue of `root`. Blocks. Raises TargetUnusable, OSError."""
        self.room = threading.RLock()
        """Held while `published` changes and what was published stops being temporary."""
        self._tree = tree
        self._incoming = incoming
        self._quota = quota
        self._folding = folding
        self._waiting: deque[_Settlement] = deque()
        self._scheduled = False
        """Whether the thread will come to look at what waits."""
        self._thread = ThreadPoolExecutor(1, "catalogue")
        self._closing = False
        self.published = 0
        """Bytes of all published items, as of our last look."""
        self._root = root
        self._opened: Catalogue | None = None
        self._unusable = False
        try:
            self._thread.submit(self._open).result()
            self.run(self._look)
        except BaseException:
            self.close()
            raise

    def run(self, work: Callable[[], T]) -> T:
        """Have `work` done by the thread of the catalogue, and wait for it. Raises OSError."""
        return self._thread.submit(self._carefully, work).result()

    def submit(self, work: Callable[[], None]) -> None:
        """Have `work` done after everything that waits already, without waiting for it."""
        self._thread.submit(work)

    def _carefully(self, work: Callable[[], T]) -> T:
        """Do `work` on the catalogue; after a failure the next one opens it anew.

        So whatever becomes of the file under us, what was put in order is found by the next
        try, and what is unusable now is, to those who wait, a fault that may heal.
        """
        try:
            done = work()
        except (OSError, TargetUnusable) as error:
            if self._opened is not None:
                self._opened.close()
                self._opened = None
            if not isinstance(error, TargetUnusable):
                raise
            if not self._unusable:
                log.error("catalogue unusable", reason=str(error))
            self._unusable = True
            raise OSError(errno.EIO, str(error)) from error
        if self._unusable:
            log.info("catalogue usable again", root=self._root)
        self._unusable = False
        return done

    def _open(self) -> Catalogue:
        if self._opened is None:
            # SQLite finds its files by their path, we ours by a descriptor: verdicts must not go
            # to one directory and files to another.
            if not self._tree.stands_at(self._root):
                raise TargetUnusable(
                    f"{self._root} is not the directory that it was: put that one back (mount "
                    "it), or restart the consumer to go on with what is there now"
                )
            path = os.path.join(self._root, PRIVATE_DIRECTORY, "catalog.db")
            self._opened = Catalogue(path, self._folding)
            if self._opened.made and self._tree.used():
                log.warning(
                    "no catalogue",
                    root=self._root,
                    reason="a new one is made, and the versions of the files here are not known",
                )
        return self._opened

    @property
    def _catalogue(self) -> Catalogue:
        """Raises OSError, TargetUnusable. Only on its thread, in what is done carefully."""
        return self._open()

    async def settle(
        self, item: Item, proposal: Verdict, received: Received | None = None
    ) -> Verdict:
        """The verdict that holds. `received` is what the item becomes, if completed.

        Raises:
            OSError, Refused, Condemned: as `Incoming.settle` does.
        """
        future: asyncio.Future[Verdict] = asyncio.get_running_loop().create_future()

        def tell(outcome: Verdict | Exception) -> None:
            if future.done():
                return
            if isinstance(outcome, Verdict):
                future.set_result(outcome)
            else:
                future.set_exception(outcome)

        self.begin_settling(item, proposal, received, tell, lambda: not future.cancelled())
        return await future

    def begin_settling(
        self,
        item: Item,
        proposal: Verdict,
        received: Received | None,
        tell: Callable[[Verdict | Exception], None],
        wanted: Callable[[], bool] = lambda: True,
    ) -> None:
        """As `settle`, but returns at once; `tell` is called on this loop with what comes of it.

        Nothing is begun any more when it is no longer `wanted`; then nothing is told.
        """
        loop = asyncio.get_running_loop()
        self._waiting.append(_Settlement(item, proposal, received, wanted, loop, tell))
        try:
            self._schedule()
        except RuntimeError:
            loop.call_soon(tell, Condemned("the target is closed"))

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            try:
                self._thread.submit(self._settle_waiting)
            except RuntimeError:
                self._scheduled = False  # Nobody comes any more, and whoever asks is to hear it.
                raise

    async def passed(self, group: str, topic: str, partition: int, before: int) -> None:
        def forget() -> None:
            with self._catalogue.transaction():
                self._catalogue.passed(group, topic, partition, before)

        await asyncio.wrap_future(self._thread.submit(self._carefully, forget))

    def finish(self, owner: str, last: bool = False) -> set[str]:
        """Finish what the pending rows of `owner` began; returns the files they still name.

        After the `last` time nothing is settled any more, so nothing else comes to be named.
        """

        def work() -> set[str]:
            self._closing = self._closing or last
            rows = self._catalogue.pending(owner)
            if rows:
                # Whether bytes that are gone were published before (and taken away by somebody)
                # cannot be known here. Nothing was told of them, so they are received again.
                self._publish(rows, {row.temporary for row in rows})
            self._look()
            return {os.path.basename(row.temporary or "") for row in self._catalogue.pending(owner)}

        return self.run(work)

    def item(self, unique_id: str) -> Published | None:
        """What is published under the name. Blocks. Raises OSError."""
        return self.run(lambda: self._catalogue.item(unique_id))

    def named(self, temporary: str) -> bool:
        """Whether a pending row names the file. Only on the catalogue's thread. Raises OSError."""
        owner = os.path.dirname(temporary)
        rows = self._carefully(lambda: self._catalogue.pending(owner))
        return any(row.temporary == temporary for row in rows)

    def close(self) -> None:
        """Wait for what is under way, then close the catalogue."""

        def work() -> None:
            if self._opened is not None:
                self._opened.close()

        self._thread.submit(work)
        self._thread.shutdown()

    def _look(self, settled: Iterable[Received] = ()) -> None:
        published = self._catalogue.published()
        # Counted twice for a moment, the bytes could refuse another request for ever.
        with self.room:
            self.published = published
            for received in settled:
                received.release()

    def _settle_waiting(self) -> None:
        self._scheduled = False  # Before the look: whoever comes after it schedules another.
        batch: list[_Settlement] = []
        directories: set[str] = set()
        while self._waiting and (self._closing or max(len(batch), len(directories)) < BATCH):
            settlement = self._waiting.popleft()
            if settlement.wanted():
                batch.append(settlement)
                name = settlement.item.unique_id
                directories.update(name[: slash.start()] for slash in re.finditer("/", name))
        if self._waiting:
            self._schedule()
        if self._closing:
            _tell((one, Condemned("the target is closed")) for one in batch)
            return
        sealed, unsealed = _seal(batch)
        _tell(unsealed.items())
        if not sealed:
            return
        outcomes: list[Outcome]
        try:
            outcomes = self._carefully(lambda: self._settle(sealed))
        except Exception as error:  # noqa: BLE001  whatever it is, those who wait must hear of it
            outcomes = [error] * len(sealed)
        _tell(zip(sealed, outcomes, strict=True))

    def _settle(self, batch: Sequence[_Settlement]) -> list[Outcome]:
        failed = self._prepare(batch)
        rows: dict[RequestKey, Row] = {}
        replaced: list[tuple[RequestKey, str]] = []
        proposals = [
            Proposal(one.item, one.proposal, one.temporary)
            for one in batch
            if one.item.key not in failed
        ]
        if proposals:
            with self._catalogue.transaction():
                for row, before in self._catalogue.decide(proposals, self._quota):
                    rows[row.key] = row
                    if before is not None:
                        replaced.append((row.key, before))
        outcomes: dict[RequestKey, Outcome] = {**rows, **failed}
        own = {settlement.temporary for settlement in batch}
        pending = [row for row in rows.values() if row.temporary is not None]
        given_up = {
            one.item.key for one in batch if isinstance(one.proposal.error, WriteDataFailed)
        }
        published, placed = self._publish(pending, own, given_up)
        outcomes.update(published)
        settled = [
            one.received
            for one in batch
            if one.received is not None and isinstance(outcomes[one.item.key], Row)
        ]
        self._look(settled)
        for received in settled:
            if received.temporary in placed:
                received.placed()
        for key, temporary in replaced:
            if isinstance(outcomes[key], Row):
                # No row names it any more. Its owner, or a sweep, may have been quicker.
                with suppress(OSError):
                    os.unlink(temporary, dir_fd=self._incoming)
        return [outcomes[settlement.item.key] for settlement in batch]

    def _prepare(self, batch: Sequence[_Settlement]) -> dict[RequestKey, Exception]:
        """Make sure that what a row will promise can be kept; returns what cannot be settled now.

        The path is free, and the temporary file's name is as durable as its bytes.
        """
        failed: dict[RequestKey, Exception] = {}
        owners: dict[str, OSError | None] = {}
        for settlement in batch:
            if settlement.temporary is None:
                continue
            key = settlement.item.key
            try:
                self._tree.check(settlement.item.unique_id)
            except Obstructed as obstacle:
                settlement.proposal = _refusal(settlement.proposal, key, obstacle)
                continue
            except OSError as error:
                failed[key] = error
                continue
            owner = os.path.dirname(settlement.temporary)
            if owner not in owners:
                owners[owner] = self._sync_owner(owner)
            unsynced = owners[owner]
            if unsynced is not None:
                failed[key] = _condemned(unsynced)
        return failed

    def _sync_owner(self, owner: str) -> OSError | None:
        try:
            directory = open_directory(owner, self._incoming)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
        except OSError as error:
            return error
        return None

    def _publish(
        self,
        pending: Sequence[Row],
        own: Container[str | None] = (),
        given_up: Container[RequestKey] = (),
    ) -> tuple[dict[RequestKey, Outcome], set[str]]:
        """Phase 2 for rows that were pending when they were read.

        `own` are the temporary files whose bytes can be received again. Returns what came of
        the rows, and the temporary files that were renamed.
        """
        outcomes: dict[RequestKey, Outcome] = {}
        renamed: set[str] = set()
        if not pending:
            return outcomes, renamed
        with self._catalogue.transaction():
            standing = self._catalogue.standing()
            placed: list[Row] = []
            # The versions of one item go over each other from the oldest to the newest.
            for before in sorted(pending, key=lambda row: (row.unique_id, row.version)):
                stands = standing.get(before.key)
                row: Row | None = before
                if stands is None or stands.temporary != before.temporary:
                    row = self._catalogue.find(before.key)
                if row is None:
                    outcomes[before.key] = Condemned("the verdict was forgotten: W has passed it")
                elif stands is None or row.temporary is None:
                    outcomes[row.key] = row
                elif stands.superseded:
                    outcomes[row.key] = self._catalogue.finish([row])[0]
                else:
                    try:
                        if self._place(row, row.temporary, row.temporary in own, stands):
                            renamed.add(row.temporary)
                    except Condemned as loss:
                        outcomes[row.key] = loss
                    except (Obstructed, OSError) as error:
                        # Someone made a directory since the check, or made it one that we may not
                        # write to, and the request was given up for that. The file was not renamed
                        # and never will be, and no result was told: the row may still turn.
                        unseen = row.key in given_up and self._is_unseen(row, row.temporary)
                        if isinstance(error, Obstructed) or unseen:
                            turned = replace(row, verdict=_refusal(row.verdict, row.key, error))
                            outcomes[row.key] = self._catalogue.finish([turned])[0]
                        else:
                            outcomes[row.key] = error
                    else:
                        placed.append(row)
            unsynced = {
                unique_id: error
                for unique_id, error in self._tree.sync([row.unique_id for row in placed]).items()
                # Else somebody took the file away already, and the directory with it.
                if not isinstance(error, FileNotFoundError)
            }
            for owner in {os.path.dirname(row.temporary or "") for row in placed}:
                self._sync_owner(owner)  # Only tidiness: that the old name is gone, too.
            for row in placed:
                if row.unique_id in unsynced:
                    outcomes[row.key] = _condemned(unsynced[row.unique_id])
            durable = [row for row in placed if row.unique_id not in unsynced]
            outcomes.update((row.key, row) for row in self._catalogue.publish(durable))
        return outcomes, renamed

    def _place(self, row: Row, temporary: str, own: bool, stands: Standing) -> bool:
        """Returns whether the file was renamed; it need not be where its bytes are published."""
        newer = self._catalogue.newer_pending(row) if stands.contested else []
        if any(self._holds(one) for one in newer):
            # Renamed by an owner that did not live to write it down: ours, over it, would take
            # back what readers have seen, and then be taken for the loss of the newer bytes.
            return False
        try:
            self._tree.place(temporary, self._incoming, row.unique_id)
        except FileNotFoundError:
            if self._exists(temporary):
                raise  # A directory of the path went away under us: again.
            # Renamed by an owner that did not live to write it down, or lost.
            if not self._holds(row):
                loss = "the received bytes are gone from the temporary file"
                if own:  # The row stays pending, and is pointed to them when they have come again.
                    raise Condemned(loss) from None
                raise Obstructed(loss) from None
            return False
        return True

    def _is_unseen(self, row: Row, temporary: str) -> bool:
        """Whether the row's bytes surely never came to its path."""
        try:
            return self._exists(temporary) and not self._holds(row)
        except OSError:
            return False

    def _holds(self, row: Row) -> bool:
        """Whether the published file has the row's bytes. Reads it all."""
        size, sha256 = row.verdict.size, row.verdict.sha256
        return (
            size is not None
            and sha256 is not None
            and self._tree.holds(row.unique_id, size, sha256)
        )

    def _exists(self, temporary: str) -> bool:
        try:
            os.stat(temporary, dir_fd=self._incoming, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return True


def _seal(
    batch: Sequence[_Settlement],
) -> tuple[list[_Settlement], dict[_Settlement, Exception]]:
    """Make the files durable; returns what can be judged now, and what cannot, with the cause.

    From the last one on: when its bytes are written, those of the others mostly are, too, and
    the file system commits them all at once.
    """
    failed: dict[_Settlement, Exception] = {}
    received = [(one, one.received) for one in batch if one.received is not None]
    for step in (methodcaller("write_out"), methodcaller("seal")):
        for settlement, file in reversed(received):
            if settlement not in failed:
                try:
                    step(file)
                except Exception as error:  # noqa: BLE001  of this one file, told to who waits
                    failed[settlement] = error
    return [one for one in batch if one not in failed], failed


def _tell(outcomes: Iterable[tuple[_Settlement, Outcome]]) -> None:
    """Let those who wait hear, with one call into each event loop."""

    def tell(told: list[tuple[_Settlement, Outcome]]) -> None:
        for settlement, outcome in told:
            settlement.tell(outcome.verdict if isinstance(outcome, Row) else outcome)

    by_loop: defaultdict[asyncio.AbstractEventLoop, list[tuple[_Settlement, Outcome]]]
    by_loop = defaultdict(list)
    for settlement, outcome in outcomes:
        by_loop[settlement.loop].append((settlement, outcome))
    for loop, told in by_loop.items():
        with suppress(RuntimeError):  # Closed: nobody waits there any more.
            loop.call_soon_threadsafe(tell, told)


def _refusal(proposal: Verdict, key: RequestKey, obstacle: Exception) -> Verdict:
    error = WriteDataFailed(key.request, str(obstacle))
    return proposal._replace(status=Status.FAILED, error=error, target=None)


def _condemned(error: OSError) -> Condemned:
    return Condemned(f"a directory could not be synced: {error}")
