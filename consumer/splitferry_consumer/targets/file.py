"""Items as files below a root.

    ROOT/.splitferry/catalog.db             what is published, and the verdicts
    ROOT/.splitferry/incoming/OWNER/lock    locked while that process lives
    ROOT/.splitferry/incoming/OWNER/N       the bytes of one request on their way in

A file is received into a place of its own, synced once, judged, and renamed over the
old one; see `settling` for the order and why.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack, suppress
from functools import partial
from typing import TypeVar

import structlog

from splitferry_consumer import modes
from splitferry_consumer.catalogue import Published
from splitferry_consumer.modes import directory_mode, make_directories
from splitferry_consumer.paths import (
    DIRECTORY,
    PERMANENT,
    Obstructed,
    Tree,
    folds_names,
    leads_to,
    open_directory,
)
from splitferry_protocol.errors import BatchTransferFailed, WriteDataFailed
from splitferry_protocol.paths import PRIVATE_DIRECTORY
from splitferry_protocol.records import Status

from . import Condemned, Item, Refused, TargetUnusable, Verdict, Whole
from .inode import Descriptors, Inode
from .owner import Owner
from .settling import Settling

log = structlog.get_logger(__name__)

T = TypeVar("T")

SMALL = 128 * 1024
"""Bytes up to which files are made durable together, on the catalogue's thread."""


class FileTarget:
    """Publishes files below `root`. Made by `open`; several processes may share a root.

    Attributes:
        held: bytes of this process's temporary files.
        closed: nothing can be written any more.
    """

    in_memory = False

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        quota: int | None = None,
        disk_reserve: int = 0,
        mode: int = modes.FILE_MODE,
        executor: Executor | None = None,
        descriptors: Descriptors | None = None,
    ) -> None:
        """As `open`, but blocks."""
        self.root = os.path.realpath(root)
        self.mode = mode
        self.held = 0
        self.descriptors = descriptors or Descriptors()
        self.closed = False
        self._quota = quota
        self._disk_reserve = disk_reserve
        self._executor = executor
        self._numbers = itertools.count()
        self._sweeping = threading.Lock()
        """A cancelled sweep leaves its thread running, on descriptors that `close` closes."""
        self._left: set[str] = set()
        """Temporary files that were dropped while a pending row perhaps named them."""
        with ExitStack() as stack:
            try:
                self._set_up(stack)
            except OSError as error:
                raise TargetUnusable(_explain(self.root, error)) from error
            self._resources = stack.pop_all()
        self._sweep()

    def _set_up(self, stack: ExitStack) -> None:
        make_directories(self.root, directory_mode(self.mode))
        self._root = os.open(self.root, DIRECTORY)
        stack.callback(os.close, self._root)
        self.incoming = self._open_incoming()
        stack.callback(os.close, self.incoming)
        self.owner = Owner.create(self.incoming)
        stack.callback(self._leave_owner)
        self.tree = Tree(self._root, self.mode)
        folding = folds_names(self.owner.directory)
        self.settling = Settling(self.root, self.tree, self.incoming, self._quota, folding)
        stack.callback(self.settling.close)

    def _open_incoming(self) -> int:
        """Open the directory above all owners' ones, made and durable."""
        state = open_directory(PRIVATE_DIRECTORY, self._root, modes.PRIVATE_DIRECTORY)
        with ExitStack() as opened:
            opened.callback(os.close, state)
            incoming = open_directory("incoming", state, modes.PRIVATE_DIRECTORY)
            with ExitStack() as kept:
                kept.callback(os.close, incoming)
                # What is made once is made durable once: its files sync their own directories.
                for directory in (incoming, state, self._root):
                    os.fsync(directory)
                kept.pop_all()
        return incoming

    def _stand(self) -> None:
        """Make our directories anew if somebody has removed them, or the root. Raises OSError.

        Each takes the place of the old one behind the same descriptor, so whoever is about to
        use that is never led elsewhere. What was on its way in below the old ones cannot be
        settled any more: it is condemned, and received again.
        """
        if not self.tree.stands_at(self.root):
            if os.fstat(self._root).st_nlink:
                return  # Moved or unmounted: it may come back, and what is there is not ours.
            _replace(self._root, os.open(self.root, DIRECTORY))
        own = f"{PRIVATE_DIRECTORY}/incoming/{self.owner.name}"
        if leads_to(own, self.owner.directory, self._root):
            return
        _replace(self.incoming, self._open_incoming())
        removed, self.owner = self.owner, Owner.create(self.incoming)
        removed.release()
        log.warning("our directories were removed and are made anew", root=self.root)

    @classmethod
    async def open(
        cls,
        root: str | os.PathLike[str],
        *,
        quota: int | None = None,
        disk_reserve: int = 0,
        mode: int = modes.FILE_MODE,
        executor: Executor | None = None,
        descriptors: Descriptors | None = None,
    ) -> FileTarget:
        """Check and set up `root` (made if missing), and clear what dead owners left in it.

        Args:
            quota: bytes that published files and this process's temporary ones may take.
            disk_reserve: bytes of the file system that stay free.
            mode: of the published files; directories get the matching search bits.
            executor: for blocking work; by default the loop's.

        Raises:
            TargetUnusable: one line for people, with cause and remedy.
        """

        def make() -> FileTarget:
            return cls(
                root,
                quota=quota,
                disk_reserve=disk_reserve,
                mode=mode,
                executor=executor,
                descriptors=descriptors,
            )

        return await asyncio.get_running_loop().run_in_executor(executor, make)

    def begin(self, item: Item) -> FileIncoming:
        """See `Target.begin`. The first write makes the temporary file."""
        return FileIncoming(self, item)

    async def verified(self, unique_id: str) -> Published | None:
        """What is published under the name, if its file has exactly those bytes; reads it all.
        One that cannot be read has not. Raises OSError, of the catalogue."""

        def look() -> Published | None:
            item = self.settling.item(unique_id)
            try:
                whole = item and self.tree.holds(unique_id, item.size, item.sha256)
            except OSError as error:
                file = os.path.join(self.root, unique_id)
                log.warning("a published file cannot be read", file=file, cause=str(error))
                return None
            return item if whole else None

        return await self.in_thread(look)

    async def shared(self) -> bool:
        """Whether another process that lives uses the root. Raises OSError."""

        def look() -> bool:
            with self._sweeping:
                return any(
                    Owner.lives(self.incoming, name)
                    for name in os.listdir(self.incoming)
                    if name != self.owner.name
                )

        return await self.in_thread(look)

    async def settle_whole(self, items: Sequence[Whole]) -> None:
        """See `Target.settle_whole`."""
        done = asyncio.get_running_loop().create_future()
        waiting = set(items)
        left: list[FileIncoming] = []

        def told(one: Whole, incoming: FileIncoming, outcome: Verdict | Exception) -> None:
            if one not in waiting:
                return
            if isinstance(outcome, Verdict):
                incoming.settled(outcome)
                if incoming.holds:
                    left.append(incoming)
            waiting.discard(one)
            try:
                one.tell(outcome)
            except Exception as error:  # noqa: BLE001  raised here, past those told after it
                if not done.done():
                    done.set_exception(error)
            if not waiting and not done.done():
                done.set_result(None)

        for one in items:
            incoming = one.incoming
            assert isinstance(incoming, FileIncoming)
            tell = partial(told, one, incoming)
            self.settling.begin_settling(incoming.item, one.proposal, incoming, tell)
        if items:
            await done
        if left:
            await self.in_thread(lambda: _discard(left))

    async def passed(self, group: str, topic: str, partition: int, before: int) -> None:
        """See `Target.passed`. Raises OSError."""
        await self.settling.passed(group, topic, partition, before)

    async def sweep(self) -> None:
        """Finish what dead owners had decided, remove their temporary files, look at the quota.

        Worth calling every minute or so. Problems are logged, and met again by the next sweep.
        """
        await self.in_thread(self._sweep)

    def close(self) -> None:
        """Remove this process's temporary files and give everything back. Blocks.

        Requests that are settled by now are settled; later ones are condemned.
        A file that a pending verdict names, which could not be published now, stays for the
        next owner or sweep.
        """
        self.closed = True
        with self._sweeping, self._resources:
            try:
                self._clear(self.owner, last=True)
            except OSError as error:
                log.warning("temporary files stay behind", root=self.root, cause=str(error))

    async def in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)

    def admit(self, item: Item, size: int) -> None:
        """Grant `size` bytes more of temporary file. Raises OSError, Refused."""
        with self.settling.room:
            total = self.settling.published + self.held + size
            if self._quota is not None and total > self._quota:
                reason = f"with it the root would hold {total} bytes, quota {self._quota}"
                raise Refused(BatchTransferFailed(item.key.request, reason))
            space = os.fstatvfs(self.incoming)
            free = space.f_bavail * space.f_frsize
            if free - size < self._disk_reserve:
                cause = f"{free} bytes of disk are free, {self._disk_reserve} of them in reserve"
                raise OSError(errno.ENOSPC, f"{cause}: make room")
            self.held += size

    def release(self, size: int) -> None:
        with self.settling.room:
            self.held -= size

    def new_name(self) -> str:
        """For a temporary file: OWNER/NAME."""
        return f"{self.owner.name}/{next(self._numbers)}"

    def remove(self, temporary: str, perhaps_named: bool) -> None:
        """Remove a temporary file, unless a pending row names it. Never raises."""
        if self.closed:
            return  # `close` has cleared our directory.

        def unless_named() -> None:
            try:
                if not self.settling.named(temporary):
                    self._unlink(temporary)
                    return
            except OSError as error:
                log.warning("a temporary file stays", file=temporary, cause=str(error))
            self._left.add(temporary)

        if perhaps_named:
            with suppress(RuntimeError):  # Closed at this very moment.
                self.settling.submit(unless_named)
            return
        try:
            self._unlink(temporary)
        except OSError as error:
            log.warning("a temporary file stays", file=temporary, cause=str(error))
            self._left.add(temporary)

    def _unlink(self, temporary: str) -> None:
        with suppress(FileNotFoundError):
            os.unlink(temporary, dir_fd=self.incoming)

    def _sweep(self) -> None:
        with self._sweeping:
            if not self.closed:
                self._clear_dead()

    def _clear_dead(self) -> None:
        try:
            self._stand()
            names = os.listdir(self.incoming)
        except OSError as error:
            log.error("root unusable", reason=_explain(self.root, error))
            return
        for name in names:
            try:
                if name == self.owner.name:
                    self._clear_left()
                    continue
                with Owner.dead(self.incoming, name) as owner:
                    # The pending rows are read after the lock was got: an owner that is dead by
                    # then can add no row that names one of the files we are about to remove.
                    if owner is not None:
                        self._clear(owner)
            except OSError as error:
                log.warning("could not clear", owner=name, root=self.root, cause=str(error))

    def _clear(self, owner: Owner, last: bool = False) -> None:
        named = self.settling.finish(owner.name, last)
        for name in owner.files():
            if name not in named:
                self._unlink(f"{owner.name}/{name}")
        if not last:
            owner.remove()

    def _leave_owner(self) -> None:
        """After the catalogue's thread has ended."""
        with suppress(OSError):
            self.owner.remove()
        self.owner.release()

    def _clear_left(self) -> None:
        # Those that are left later may be named by a row that `finish` did not see.
        left = set(self._left)
        named = {f"{self.owner.name}/{name}" for name in self.settling.finish(self.owner.name)}
        for temporary in left - named:
            self._unlink(temporary)
            self._left.discard(temporary)


def _discard(many: Iterable[FileIncoming]) -> None:
    for incoming in many:
        incoming.discard()


def _replace(descriptor: int, by: int) -> None:
    """Let `descriptor` be what `by` is, which is closed."""
    os.dup2(by, descriptor, inheritable=False)
    os.close(by)


class FileIncoming:
    """One file on its way in; see `Incoming`."""

    def __init__(self, target: FileTarget, item: Item) -> None:
        self._target = target
        self.item = item
        self.temporary = ""
        """OWNER/NAME of the file, once there is one."""
        self._size = 0
        # A cancelled settle leaves its thread running: a discard has to wait for it.
        self._lock = threading.Lock()
        self._inode: Inode | None = None
        self._finished = False
        self._sealed = False
        self._dropped = False
        self._verdict: Verdict | None = None

    def write_at(self, offset: int, data: memoryview | bytes) -> None:
        with self._lock:
            inode = self._begun()
            try:
                inode.write_at(offset, data)
            except OSError as error:
                if error.errno in PERMANENT:
                    raise self._refused(PERMANENT[error.errno]) from error
                raise

    def read_at(self, offset: int, size: int) -> bytes:
        with self._lock:
            return self._begun().read_at(offset, size)

    async def settle(self, proposal: Verdict) -> Verdict:
        if self._verdict is not None:
            return self._verdict
        received = None
        if proposal.status is Status.COMPLETED:
            assert proposal.size is not None
            assert proposal.sha256 is not None
            received, self._size = self, proposal.size
            if proposal.size > SMALL:
                await self._target.in_thread(self.seal)
        verdict = await self._target.settling.settle(self.item, proposal, received)
        self.settled(verdict)
        if self.holds:
            await self._target.in_thread(self.discard)
        return verdict

    def settled(self, verdict: Verdict) -> None:
        """The verdict is final."""
        self._verdict = verdict

    @property
    def holds(self) -> bool:
        """Whether there is something to discard."""
        return self._inode is not None and not self._dropped

    def put(self, data: memoryview | bytes, proposal: Verdict) -> None:
        """See `Incoming.put`. The bytes are made durable with those of others, later."""
        self.write_at(0, data)
        self._size = len(data)
        self.write_out()

    def discard(self) -> None:
        """See `Incoming.discard`. Bytes that a pending verdict names stay until it is final."""
        with self._lock:
            self._drop()

    def _begun(self) -> Inode:
        if self._dropped or self._target.closed:
            raise Condemned("the bytes were dropped")
        if self._inode is None:
            try:
                self._target.tree.check(self.item.unique_id)
            except Obstructed as obstacle:
                raise self._refused(str(obstacle)) from obstacle
            self.temporary = self._target.new_name()
            self._inode = Inode(
                self._target.descriptors.open(self.temporary, self._target.incoming),
                lambda size: self._target.admit(self.item, size),
                self._target.release,
            )
        return self._inode

    def write_out(self) -> None:
        """See `Received.write_out`."""
        with self._lock:
            self._finish_bytes().write_out()

    def seal(self) -> None:
        """See `Received.seal`."""
        with self._lock:
            inode = self._finish_bytes()
            if self._sealed:
                return
            try:
                os.fsync(inode.descriptor)
            except OSError as error:
                self._drop()
                raise Condemned(f"the file could not be synced: {error}") from error
            self._sealed = True

    def _finish_bytes(self) -> Inode:
        inode = self._begun()
        if not self._finished:
            if not inode.trim(self._size):
                self._drop()
                raise Condemned(f"not exactly the item's {self._size} bytes were written")
            os.fchmod(inode.descriptor, self._target.mode)
            self._finished = True
        return inode

    def release(self) -> None:
        """See `Received.release`."""
        if self._inode is not None:
            self._inode.release()

    def placed(self) -> None:
        """See `Received.placed`."""
        with self._lock:
            self._drop(removed=True)

    def _drop(self, removed: bool = False) -> None:
        if not self._dropped and self._inode is not None:
            with suppress(OSError):  # What close could tell concerns bytes nobody wants.
                self._inode.close()
            self._target.descriptors.give()
            if not removed:
                perhaps_named = self._sealed and self._verdict is None
                self._target.remove(self.temporary, perhaps_named)
        self._dropped = True

    def _refused(self, cause: str) -> Refused:
        return Refused(WriteDataFailed(self.item.key.request, cause))


def _explain(root: str, error: OSError) -> str:
    match error.errno:
        case errno.EACCES | errno.EPERM | errno.EROFS:
            remedy = "give this user write access, or choose another root"
        case errno.ENOTDIR | errno.EEXIST | errno.ELOOP:
            remedy = "something that is no directory stands there; choose another root"
        case errno.ENOENT:
            remedy = "make it, or put it back"
        case errno.ENOSPC | errno.EDQUOT:
            remedy = "make room on its file system, or choose another root"
        case errno.EBUSY:
            remedy = "end that process if it is frozen, or wait"
        case _:
            remedy = "mend the file system, or choose another root"
    return f"cannot use the root {root}: {error.strerror or error}: {remedy}"
