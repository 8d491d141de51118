"""Items as files below a root (DESIGN, "A file").

    ROOT/.splitferry/catalog.db             what is published, and the verdicts
    ROOT/.splitferry/incoming/OWNER/lock    locked while that process lives
    ROOT/.splitferry/incoming/OWNER/N       the bytes of one request on their way in

A file is received into a nameless place of its own, synced once, judged, and renamed over the
old one; see `settling` for the order and why.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import resource
import threading
from collections.abc import Callable
from concurrent.futures import Executor
from contextlib import ExitStack, suppress
from typing import TypeVar

import structlog

from splitferry_consumer.paths import DIRECTORY, PERMANENT, Obstructed, Tree, open_directory
from splitferry_protocol.errors import BatchTransferFailed, WriteDataFailed
from splitferry_protocol.paths import PRIVATE_DIRECTORY
from splitferry_protocol.records import Status

from . import Condemned, Item, Refused, TargetUnusable, Verdict
from .inode import Inode
from .owner import Owner
from .settling import Settling

log = structlog.get_logger(__name__)

T = TypeVar("T")

DESCRIPTOR_RESERVE = 160
"""Open files left to the catalogue, the directories, the connections and whatever else runs."""


class FileTarget:
    """Publishes files below `root`. Made by `open`; several processes may share a root.

    Attributes:
        held: bytes of this process's temporary files.
        closed: nothing can be written any more.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        quota: int | None = None,
        disk_reserve: int = 0,
        mode: int = 0o640,
        executor: Executor | None = None,
    ) -> None:
        """As `open`, but blocks."""
        self.root = os.path.realpath(root)
        self.mode = mode
        self.held = 0
        self._descriptors = 0
        self.closed = False
        self._quota = quota
        self._disk_reserve = disk_reserve
        self._executor = executor
        self._numbers = itertools.count()
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
        os.makedirs(self.root, exist_ok=True)
        root = os.open(self.root, DIRECTORY)
        stack.callback(os.close, root)
        state = open_directory(PRIVATE_DIRECTORY, root, 0o700)
        stack.callback(os.close, state)
        self.incoming = open_directory("incoming", state, 0o700)
        stack.callback(os.close, self.incoming)
        self.owner = Owner.create(self.incoming)
        stack.callback(self.owner.release)
        stack.callback(self._remove_owner)
        self.tree = Tree(root, self.mode)
        path = os.path.join(self.root, PRIVATE_DIRECTORY, "catalog.db")
        self.settling = Settling(path, self.tree, self.incoming, self._quota)
        stack.callback(self.settling.close)
        # What is made once is made durable once: the files in it sync their own directories.
        for directory in (self.incoming, state, root):
            os.fsync(directory)

    @classmethod
    async def open(
        cls,
        root: str | os.PathLike[str],
        *,
        quota: int | None = None,
        disk_reserve: int = 0,
        mode: int = 0o640,
        executor: Executor | None = None,
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
            return cls(root, quota=quota, disk_reserve=disk_reserve, mode=mode, executor=executor)

        return await asyncio.get_running_loop().run_in_executor(executor, make)

    def begin(self, item: Item) -> FileIncoming:
        """See `Target.begin`. The first write makes the temporary file."""
        return FileIncoming(self, item, f"{self.owner.name}/{next(self._numbers)}")

    async def passed(self, group: str, topic: str, partition: int, before: int) -> None:
        """See `Target.passed`. Raises OSError, TargetUnusable."""
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
        with self._resources:
            try:
                self._clear(self.owner, last=True)
            except (OSError, TargetUnusable) as error:
                log.warning("temporary files stay behind", root=self.root, cause=str(error))

    async def in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)

    def admit(self, item: Item, size: int) -> None:
        """Grant `size` bytes more of temporary file. Raises OSError, Refused."""
        with self.settling.room:
            taken = self.settling.published + self.held + size
            if self._quota is not None and taken > self._quota:
                reason = f"with it the root would hold {taken} bytes, quota {self._quota}"
                raise Refused(BatchTransferFailed(item.key.request, reason))
            space = os.fstatvfs(self.incoming)
            if space.f_bavail * space.f_frsize - size < self._disk_reserve:
                raise OSError(errno.ENOSPC, f"less than {self._disk_reserve} bytes would be free")
            self.held += size

    def release(self, size: int) -> None:
        with self.settling.room:
            self.held -= size

    def take_descriptor(self) -> None:
        """Before a temporary file is opened. Raises OSError when it has to wait for others.

        Without a reserve the catalogue could not open its journal, so nothing would settle, so
        no descriptor would ever be given back.
        """
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[0] - DESCRIPTOR_RESERVE
        with self.settling.room:
            if self._descriptors >= max(1, most):
                raise OSError(
                    errno.EMFILE,
                    f"{self._descriptors} files are on their way in, as many as may be open; "
                    "raise the limit of open files (ulimit -n)",
                )
            self._descriptors += 1

    def give_descriptor(self) -> None:
        with self.settling.room:
            self._descriptors -= 1

    def remove(self, temporary: str, perhaps_named: bool) -> None:
        """Remove a temporary file, unless a pending row names it. Never raises."""
        if self.closed:
            return  # `close` has cleared our directory.

        def unless_named() -> None:
            try:
                if not self.settling.named(temporary):
                    self._unlink(temporary)
                    return
            except (OSError, TargetUnusable) as error:
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
        for name in [] if self.closed else os.listdir(self.incoming):
            try:
                if name == self.owner.name:
                    self._clear_left()
                    continue
                with Owner.dead(self.incoming, name) as owner:
                    # The pending rows are read after the lock was got: an owner that is dead by
                    # then can add no row that names one of the files we are about to remove.
                    if owner is not None:
                        self._clear(owner)
            except (OSError, TargetUnusable) as error:
                log.warning("could not clear", owner=name, root=self.root, cause=str(error))

    def _clear(self, owner: Owner, last: bool = False) -> None:
        named = self.settling.finish(owner.name, last)
        for name in owner.files():
            if name not in named:
                self._unlink(f"{owner.name}/{name}")
        if not last:
            owner.remove()

    def _remove_owner(self) -> None:
        # After the catalogue's thread has ended and before the lock is given back.
        with suppress(OSError):
            self.owner.remove()

    def _clear_left(self) -> None:
        named = {f"{self.owner.name}/{name}" for name in self.settling.finish(self.owner.name)}
        for temporary in self._left - named:
            self._unlink(temporary)
            self._left.discard(temporary)


class FileIncoming:
    """One file on its way in; see `Incoming`."""

    def __init__(self, target: FileTarget, item: Item, temporary: str) -> None:
        self._target = target
        self._item = item
        self._temporary = temporary
        # A cancelled settle leaves its thread running: a discard has to wait for it.
        self._lock = threading.Lock()
        self._inode: Inode | None = None
        self._sealed = False
        self._dropped = False
        self._perhaps_named = False
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
        temporary = None
        if proposal.status is Status.COMPLETED:
            assert proposal.size is not None
            assert proposal.sha256 is not None
            size = proposal.size
            await self._target.in_thread(lambda: self._seal(size))
            temporary = self._temporary
            self._perhaps_named = True
        release = (lambda: None) if self._inode is None else self._inode.release
        verdict = await self._target.settling.settle(self._item, proposal, temporary, release)
        self._verdict, self._perhaps_named = verdict, False
        await self._target.in_thread(self.discard)
        return verdict

    def discard(self) -> None:
        """See `Incoming.discard`. Bytes that a pending verdict names stay until it is final."""
        with self._lock:
            self._drop()

    def _begun(self) -> Inode:
        if self._dropped or self._target.closed:
            raise Condemned("the bytes were dropped")
        if self._inode is None:
            try:
                self._target.tree.check(self._item.unique_id)
            except Obstructed as obstacle:
                raise self._refused(str(obstacle)) from obstacle
            self._target.take_descriptor()
            try:
                descriptor = os.open(
                    self._temporary,
                    os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC,
                    0o600,
                    dir_fd=self._target.incoming,
                )
            except OSError:
                self._target.give_descriptor()
                raise
            self._inode = Inode(
                descriptor,
                lambda size: self._target.admit(self._item, size),
                self._target.release,
            )
        return self._inode

    def _seal(self, size: int) -> None:
        """Make the bytes durable. Raises OSError, Refused, Condemned."""
        with self._lock:
            inode = self._begun()
            if self._sealed:
                return
            if not inode.trim(size):
                self._drop()
                raise Condemned(f"not exactly the item's {size} bytes were written")
            os.fchmod(inode.descriptor, self._target.mode)
            try:
                os.fsync(inode.descriptor)
            except OSError as error:
                self._drop()
                raise Condemned(f"the file could not be synced: {error}") from error
            self._sealed = True

    def _drop(self) -> None:
        if not self._dropped and self._inode is not None:
            with suppress(OSError):  # What close could tell concerns bytes nobody wants.
                self._inode.close()
            self._target.give_descriptor()
            self._target.remove(self._temporary, self._perhaps_named)
        self._dropped = True

    def _refused(self, cause: str) -> Refused:
        return Refused(WriteDataFailed(self._item.key.request, cause))


def _explain(root: str, error: OSError) -> str:
    match error.errno:
        case errno.EACCES | errno.EPERM | errno.EROFS:
            remedy = "give this user write access, or choose another root"
        case errno.ENOTDIR | errno.EEXIST | errno.ELOOP:
            remedy = "something that is no directory stands there; choose another root"
        case errno.ENOSPC | errno.EDQUOT:
            remedy = "make room on its file system, or choose another root"
        case errno.EBUSY:
            remedy = "another process holds the catalogue's lock: end it if it is frozen, or wait"
        case _:
            remedy = "mend the file system, or choose another root"
    return f"cannot use the root {root}: {error.strerror or error}: {remedy}"
