"""The verdict, then the rename: how received files become published ones.

Two transactions, both durable when they end (DESIGN, "A file", 4 and 5):

1. every opening gets its verdict row, whose first writer wins; a completed one is pending and
   names its temporary file;
2. under the same lock of the root, the pending rows are read again, their files renamed, the
   directories synced, the items recorded, the rows made final.

A crash in between leaves a pending row, and whoever comes next finishes it: a later owner of
the request, or a sweep that finds the owner dead. Nobody else's verdict can come of it, so a
zombie and the new owner may run these phases in any order. All of it happens on one thread of
its own, which takes everything that waits into one pair of transactions.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TypeVar

from splitferry_consumer.catalogue import Catalogue, Row
from splitferry_consumer.paths import Obstructed, Tree, open_directory
from splitferry_protocol.errors import WriteDataFailed
from splitferry_protocol.ids import RequestKey
from splitferry_protocol.records import Status

from . import Condemned, Item, Verdict

BATCH = 256
"""Requests settled in one pair of transactions at most."""

T = TypeVar("T")
Outcome = Row | Exception


@dataclass(slots=True)
class _Settlement:
    item: Item
    proposal: Verdict
    temporary: str | None
    release: Callable[[], None]
    future: Future[Verdict] = field(default_factory=Future)


class Settling:
    """Settles the requests of one root. `incoming` is the directory above all owners' ones."""

    def __init__(self, path: str, tree: Tree, incoming: int, quota: int | None) -> None:
        """Open the catalogue at `path`. Blocks. Raises TargetUnusable, OSError."""
        self.room = threading.RLock()
        """Held while `published` changes and what was published stops being temporary."""
        self._tree = tree
        self._incoming = incoming
        self._quota = quota
        self._waiting: deque[_Settlement] = deque()
        self._thread = ThreadPoolExecutor(1, "catalogue")
        self._closing = False
        self.published = 0
        """Bytes of all published items, as of our last look."""
        try:
            self._catalogue = self._thread.submit(Catalogue, path).result()
            self.run(self._look)
        except BaseException:
            self._thread.shutdown()
            raise

    def run(self, work: Callable[[], T]) -> T:
        """Have `work` done by the thread of the catalogue, and wait for it."""
        return self._thread.submit(work).result()

    def submit(self, work: Callable[[], None]) -> None:
        """Have `work` done after everything that waits already, without waiting for it."""
        self._thread.submit(work)

    async def settle(
        self, item: Item, proposal: Verdict, temporary: str | None, release: Callable[[], None]
    ) -> Verdict:
        """The verdict that holds. `temporary` is OWNER/NAME of a synced file, if completed.

        `release` is called when the temporary file's bytes count as published, or not at all.

        Raises:
            OSError, Condemned: as `Incoming.settle` does.
            TargetUnusable: the catalogue is damaged.
        """
        settlement = _Settlement(item, proposal, temporary, release)
        self._waiting.append(settlement)
        try:
            self._thread.submit(self._settle_waiting)
        except RuntimeError as error:
            raise Condemned("the target is closed") from error
        return await asyncio.wrap_future(settlement.future)

    async def passed(self, group: str, topic: str, partition: int, before: int) -> None:
        def forget() -> None:
            with self._catalogue.transaction():
                self._catalogue.passed(group, topic, partition, before)

        await asyncio.wrap_future(self._thread.submit(forget))

    def finish(self, owner: str, last: bool = False) -> set[str]:
        """Finish what the pending rows of `owner` began; returns the files they still name.

        After the `last` time nothing is settled any more, so nothing else comes to be named.
        """

        def work() -> set[str]:
            self._closing = self._closing or last
            rows = self._catalogue.pending(owner)
            if rows:
                self._publish(rows)
            self._look()
            return {os.path.basename(row.temporary or "") for row in self._catalogue.pending(owner)}

        return self.run(work)

    def named(self, temporary: str) -> bool:
        """Whether a pending row names the file. Only on the catalogue's thread."""
        owner = os.path.dirname(temporary)
        return any(row.temporary == temporary for row in self._catalogue.pending(owner))

    def close(self) -> None:
        """Wait for what is under way, then close the catalogue."""
        self._thread.submit(self._catalogue.close)
        self._thread.shutdown()

    def _look(self, settled: Sequence[_Settlement] = ()) -> None:
        published = self._catalogue.published()
        # Counted twice for a moment, the bytes could refuse another request for ever.
        with self.room:
            self.published = published
            for settlement in settled:
                settlement.release()

    def _settle_waiting(self) -> None:
        batch: list[_Settlement] = []
        while self._waiting and len(batch) < BATCH:
            settlement = self._waiting.popleft()
            if settlement.future.set_running_or_notify_cancel():
                batch.append(settlement)
        if not batch:
            return  # An earlier run has taken it along.
        outcomes: list[Outcome]
        try:
            if self._closing:
                raise Condemned("the target is closed")
            outcomes = self._settle(batch)
        except Exception as error:  # noqa: BLE001  whatever it is, those who wait must hear of it
            outcomes = [error] * len(batch)
        for settlement, outcome in zip(batch, outcomes, strict=True):
            if isinstance(outcome, Row):
                settlement.future.set_result(outcome.verdict)
            else:
                settlement.future.set_exception(outcome)

    def _settle(self, batch: Sequence[_Settlement]) -> list[Outcome]:
        failed = self._prepare(batch)
        rows: dict[RequestKey, Row] = {}
        replaced: list[tuple[RequestKey, str]] = []
        with self._catalogue.transaction():
            for settlement in batch:
                if settlement.item.key in failed:
                    continue
                row, before = self._catalogue.decide(
                    settlement.item, settlement.proposal, settlement.temporary, self._quota
                )
                rows[row.key] = row
                if before is not None:
                    replaced.append((row.key, before))
        outcomes: dict[RequestKey, Outcome] = {**rows, **failed}
        outcomes.update(self._publish([row for row in rows.values() if row.temporary is not None]))
        self._look([one for one in batch if isinstance(outcomes[one.item.key], Row)])
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

    def _publish(self, pending: Sequence[Row]) -> dict[RequestKey, Outcome]:
        """Phase 2 for rows that were pending when they were read."""
        outcomes: dict[RequestKey, Outcome] = {}
        if not pending:
            return outcomes
        with self._catalogue.transaction():
            placed: list[Row] = []
            # The versions of one item go over each other from the oldest to the newest.
            for before in sorted(pending, key=lambda row: (row.unique_id, row.version)):
                row = self._catalogue.find(before.key)
                if row is None:
                    outcomes[before.key] = Condemned("the verdict was forgotten: W has passed it")
                elif row.temporary is None:
                    outcomes[row.key] = row
                elif self._catalogue.superseded(row):
                    outcomes[row.key] = self._catalogue.finish(row, row.verdict)
                else:
                    try:
                        self._place(row, row.temporary)
                    except Obstructed as obstacle:
                        # Someone made a directory since the check. The file was not renamed and
                        # never will be, and no result was told: the row may still turn.
                        refusal = _refusal(row.verdict, row.key, obstacle)
                        outcomes[row.key] = self._catalogue.finish(row, refusal)
                    except OSError as error:
                        outcomes[row.key] = error
                    else:
                        placed.append(row)
            unsynced = self._tree.sync([row.unique_id for row in placed])
            for owner in {os.path.dirname(row.temporary or "") for row in placed}:
                self._sync_owner(owner)  # Only tidiness: that the old name is gone, too.
            for row in placed:
                if row.unique_id in unsynced:
                    outcomes[row.key] = _condemned(unsynced[row.unique_id])
                else:
                    outcomes[row.key] = self._catalogue.publish(row)
        return outcomes

    def _place(self, row: Row, temporary: str) -> None:
        try:
            self._tree.place(temporary, self._incoming, row.unique_id)
        except FileNotFoundError:
            if self._exists(temporary):
                raise  # A directory of the path went away under us: again.
            # Renamed by an owner that did not live to write it down (and perhaps replaced since,
            # by the next version, whose owner did not live either), or lost.
            size, sha256 = row.verdict.size, row.verdict.sha256
            if self._catalogue.superseded(row, by_pending=True):
                return
            if size is None or sha256 is None or not self._tree.holds(row.unique_id, size, sha256):
                raise Obstructed("the received bytes are gone from the temporary file") from None

    def _exists(self, temporary: str) -> bool:
        try:
            os.stat(temporary, dir_fd=self._incoming, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return True


def _refusal(proposal: Verdict, key: RequestKey, obstacle: Obstructed) -> Verdict:
    error = WriteDataFailed(key.request, str(obstacle))
    return replace(proposal, status=Status.FAILED, error=error, target=None)


def _condemned(error: OSError) -> Condemned:
    return Condemned(f"a directory could not be synced: {error}")
