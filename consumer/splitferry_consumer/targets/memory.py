"""Items as named shared memory, which another process on this host opens.

    /dev/shm/splitferry-OWNER/lock      locked while that process lives; holds its lifetime
    /dev/shm/splitferry-OWNER/N.part    the bytes of one request on their way in
    /dev/shm/splitferry-OWNER-N         a segment whose name was announced

POSIX shared memory is files in a tmpfs, so writing is the same as for files. There is no
catalogue: two owners of a request make two segments, and the only result that commits names one.

An announced segment lives for the target's lifetime, counted from the announcement, or until a
reader frees it. That holds beyond `close` and beyond the death of the process: a reader may come
to the result later than the consumer's restart. What has outlived its time is removed by the
next sweep of any target on this host. A segment's mtime says when it was announced, in seconds
since the host was started: the wall clock may step.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack, suppress
from typing import TypeVar

import structlog

from splitferry_consumer.paths import DIRECTORY, PERMANENT, leads_to
from splitferry_consumer.segment import DIRECTORY as SHARED_MEMORY
from splitferry_consumer.segment import PREFIX
from splitferry_consumer.targets import Condemned, Item, Refused, TargetUnusable, Verdict, Whole
from splitferry_consumer.targets.inode import Descriptors, Inode
from splitferry_consumer.targets.limit import MemoryLimit
from splitferry_consumer.targets.owner import Owner
from splitferry_protocol.errors import BatchTransferFailed, WriteDataFailed
from splitferry_protocol.records import Status

log = structlog.get_logger(__name__)

T = TypeVar("T")

LIFETIME = 600.0
"""Seconds that an announced segment stays."""


class MemoryTarget:
    """Makes segments in the shared memory of this host. Needs Linux; elsewhere it refuses all."""

    in_memory = True

    def __init__(
        self,
        limit: MemoryLimit,
        *,
        lifetime: float = LIFETIME,
        mode: int = 0o600,
        executor: Executor | None = None,
        descriptors: Descriptors | None = None,
    ) -> None:
        """As `open`, but blocks."""
        self.limit = limit
        self.lifetime = lifetime
        self.mode = mode
        self.descriptors = descriptors or Descriptors()
        self.host = socket.gethostname()
        self.supported = sys.platform == "linux"
        self.closed = False
        self._executor = executor
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._sweeping = threading.Lock()
        """A cancelled sweep leaves its thread running, on descriptors that `close` closes."""
        self._announced: dict[str, tuple[int, float]] = {}
        """Bytes, and the monotonic time in seconds when the lifetime ends, by name."""
        self._left: dict[str, deque[tuple[float, str]]] = {}
        """What dead owners announced, by their names: moments (see `_now`) and names, oldest first.
        A dead owner announces nothing more, and may have left 100,000: they are looked at once."""
        self._resources = ExitStack()
        if self.supported:
            try:
                self._set_up()
            except OSError as error:
                self._resources.close()
                raise TargetUnusable(
                    f"cannot use shared memory in {SHARED_MEMORY}: {error.strerror}: "
                    "mount a tmpfs there that this user may write to"
                ) from error
            self._sweep()

    def _set_up(self) -> None:
        self.directory = os.open(SHARED_MEMORY, DIRECTORY)
        self._resources.callback(os.close, self.directory)
        self.owner = self._own()
        self._resources.callback(self._leave)

    def _leave(self) -> None:
        self.owner.release()

    def _own(self) -> Owner:
        owner = Owner.create(self.directory, PREFIX)
        # For those who clean up after us.
        os.pwrite(owner.lock, str(self.lifetime).encode(), 0)
        return owner

    def _stand(self) -> None:
        """Make our directory anew if somebody has removed it, as systemd-logind does when a user
        logs out (RemoveIPC). Raises OSError."""
        if not leads_to(self.owner.name, self.owner.directory, self.directory):
            removed, self.owner = self.owner, self._own()
            removed.release()
            log.warning("our shared memory was removed, and is made anew")

    @classmethod
    async def open(
        cls,
        limit: MemoryLimit,
        *,
        lifetime: float = LIFETIME,
        mode: int = 0o600,
        executor: Executor | None = None,
        descriptors: Descriptors | None = None,
    ) -> MemoryTarget:
        """Set up the target, and remove what dead owners left beyond its lifetime.

        Args:
            limit: bounds the bytes of segments on their way in and announced ones together.
            lifetime: seconds that an announced segment stays.
            mode: of the segments.
            executor: for blocking work; by default the loop's.

        Raises:
            TargetUnusable: one line for people, with cause and remedy.
        """

        def make() -> MemoryTarget:
            return cls(
                limit, lifetime=lifetime, mode=mode, executor=executor, descriptors=descriptors
            )

        return await asyncio.get_running_loop().run_in_executor(executor, make)

    def begin(self, item: Item) -> SegmentIncoming:
        """See `Target.begin`."""
        return SegmentIncoming(self, item, next(self._numbers))

    async def settle_whole(self, items: Sequence[Whole]) -> None:
        """See `Target.settle_whole`. Nothing is left to do for segments that have their name."""
        for one in items:
            one.tell(await one.incoming.settle(one.proposal))

    async def passed(self, group: str, topic: str, partition: int, before: int) -> None:
        """Nothing: this target keeps no verdicts."""

    async def sweep(self) -> None:
        """Remove the segments beyond their lifetime, and all that dead owners left unfinished.

        Worth calling every few seconds. Problems are logged, and met again by the next sweep.
        """
        if self.supported:
            await self.in_thread(self._sweep)

    def close(self) -> None:
        """Remove what is unfinished; announced segments live on to their time. Blocks."""
        with self._sweeping, self._resources:
            if self.supported and not self.closed:
                self._expire()
                self.closed = True
                try:
                    self._clear(self.owner, self.lifetime)
                except OSError as error:
                    log.warning("shared memory stays behind", cause=str(error))

    async def in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)

    def admit(self, item: Item, held: int, size: int, search: bool) -> None:
        """Grant `size` bytes more, of those that have become free after a `search`, if need be.

        Raises OSError, Refused.
        """
        try:
            self.limit.reserve(item, held, size)
        except OSError:
            if not search:
                raise
            self._expire()
            self.limit.reserve(item, held, size)

    def announce(self, name: str, size: int) -> None:
        with self._lock:
            self._announced[name] = (size, time.monotonic() + self.lifetime)

    def retract(self, name: str) -> None:
        """Unlink an announced segment."""
        self.unlink(name)
        with self._lock:
            size, _ = self._announced.pop(name, (0, 0.0))
        self.limit.release(size)

    def unlink(self, name: str) -> None:
        if self.closed:
            return
        try:
            os.unlink(name, dir_fd=self.directory)
        except FileNotFoundError:
            pass
        except OSError as error:
            log.warning("a segment stays behind", name=name, cause=str(error))

    def _expire(self) -> None:
        """Take back the segments of ours whose time is over, or which a reader has freed."""
        with self._lock:
            announced = list(self._announced.items())
        for name, (_, end) in announced:
            if time.monotonic() >= end or not os.path.exists(f"{SHARED_MEMORY}/{name}"):
                self.retract(name)

    def _sweep(self) -> None:
        with self._sweeping:
            if not self.closed:
                self._clear_dead()

    def _clear_dead(self) -> None:
        self._expire()
        try:
            self._stand()
            names = os.listdir(self.directory)
        except OSError as error:
            log.error("shared memory cannot be looked at", cause=str(error))
            return
        for name in self._left.keys() - names:  # Another sweeper was quicker.
            del self._left[name]
        for name in names:
            owner_name, _, number = name.removeprefix(PREFIX).partition("-")
            if not name.startswith(PREFIX) or number or PREFIX + owner_name == self.owner.name:
                continue
            try:
                with Owner.dead(self.directory, name) as owner:
                    if owner is not None:
                        self._clear(owner, _lifetime(owner, self.lifetime))
            except OSError as error:  # Among others: another user's.
                log.debug("could not clear", owner=name, cause=str(error))

    def _clear(self, owner: Owner, lifetime: float) -> None:
        """Remove what a dead owner left unfinished or beyond its lifetime, then its directory."""
        for name in owner.files():
            os.unlink(name, dir_fd=owner.directory)
        if owner.name not in self._left:
            self._left[owner.name] = deque(sorted(self._announced_by(owner)))
        left = self._left[owner.name]
        while left and _now() - left[0][0] >= lifetime:
            with suppress(FileNotFoundError):
                os.unlink(left[0][1], dir_fd=self.directory)
            left.popleft()
        if not left:
            owner.remove()

    def _announced_by(self, owner: Owner) -> Iterator[tuple[float, str]]:
        for name in os.listdir(self.directory):
            if name.startswith(f"{owner.name}-"):
                with suppress(FileNotFoundError):
                    found = os.stat(name, dir_fd=self.directory, follow_symlinks=False)
                    yield found.st_mtime, name


def _now() -> float:
    """Seconds since the start of the host, the same for all its processes; runs on in suspend."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _lifetime(owner: Owner, default: float) -> float:
    try:
        return float(os.pread(owner.lock, 32, 0))
    except ValueError:  # It died before it had written its lifetime, so it announced nothing.
        return default


class SegmentIncoming:
    """One segment on its way in; see `Incoming`."""

    def __init__(self, target: MemoryTarget, item: Item, number: int) -> None:
        self._target = target
        self._item = item
        self._number = number
        self._name = ""
        """OWNER-N, once there is something."""
        self._part = ""
        self._lock = threading.Lock()
        self._putting = False
        self._inode: Inode | None = None
        self._dropped = False
        self._verdict: Verdict | None = None

    def write_at(self, offset: int, data: memoryview | bytes) -> None:
        with self._lock:
            inode = self._begun()
            try:
                inode.write_at(offset, data)
            except OSError as error:
                if error.errno in PERMANENT:
                    cause = PERMANENT[error.errno]
                    raise Refused(WriteDataFailed(self._item.key.request, cause)) from error
                raise

    def read_at(self, offset: int, size: int) -> bytes:
        with self._lock:
            return self._begun().read_at(offset, size)

    async def settle(self, proposal: Verdict) -> Verdict:
        """See `Incoming.settle`. A completed segment has its final name from now on."""
        if self._verdict is None:
            if proposal.status is Status.COMPLETED:
                assert proposal.size is not None
                size = proposal.size
                verdict = await self._target.in_thread(lambda: self._finish(proposal, size))
            else:
                verdict = self._verdict = proposal
                await self._target.in_thread(self.discard)
            return verdict
        return self._verdict

    def put(self, data: memoryview | bytes, proposal: Verdict) -> None:
        """See `Incoming.put`. The verdict is final with it.

        Without room it fails at once: the event loop, on which it may run, is not for a look
        through all announced segments. Whoever tries again, in a thread, does look.
        """
        self._putting = True
        try:
            self.write_at(0, data)
            self._finish(proposal, len(data))
        finally:
            self._putting = False

    def discard(self) -> None:
        """See `Incoming.discard`. After `settle`: takes the segment away, as if it never was.

        To be called when the result that names it was not committed; without it the segment
        stays for its lifetime.
        """
        with self._lock:
            if self._dropped:
                return
            self._dropped = True
            if self._inode is not None:
                with suppress(OSError):
                    self._inode.close()
                self._target.descriptors.give()
                self._target.unlink(self._part)
            elif self._verdict is not None and self._verdict.status is Status.COMPLETED:
                self._target.retract(self._name)

    def _begun(self) -> Inode:
        if not self._target.supported:
            reason = "this consumer's system has no shared memory in /dev/shm: it needs Linux"
            raise Refused(BatchTransferFailed(self._item.key.request, reason))
        if self._dropped or self._verdict is not None or self._target.closed:
            raise Condemned("the bytes were dropped or announced")
        if self._inode is None:
            owner = self._target.owner.name
            self._name, self._part = f"{owner}-{self._number}", f"{owner}/{self._number}.part"
            descriptor = self._target.descriptors.open(self._part, self._target.directory)
            self._inode = Inode(descriptor, self._admit, self._target.limit.release)
        return self._inode

    def _admit(self, size: int) -> None:
        held = 0 if self._inode is None else self._inode.charged
        self._target.admit(self._item, held, size, search=not self._putting)

    def _finish(self, proposal: Verdict, size: int) -> Verdict:
        """Give the segment its final name. Raises OSError, Refused, Condemned."""
        with self._lock:
            if self._verdict is not None:
                return self._verdict
            inode = self._begun()
            if size == 0:
                inode.write_at(0, b"\0")  # Nothing can map an empty file.
            if not inode.trim(size or 1):
                raise Condemned(f"not exactly the item's {size} bytes were written")
            os.fchmod(inode.descriptor, self._target.mode)
            now = _now()
            os.utime(inode.descriptor, (now, now))  # For those who clean up after us.
            shared = self._target.directory
            try:
                os.rename(self._part, self._name, src_dir_fd=shared, dst_dir_fd=shared)
            except FileNotFoundError as error:
                raise Condemned("somebody removed the bytes") from error
            # The file's place in the limit goes over to the announced one.
            self._target.announce(self._name, inode.charged)
            os.close(inode.descriptor)
            self._target.descriptors.give()
            self._inode = None
            self._verdict = Verdict(
                Status.COMPLETED,
                None,
                size,
                proposal.sha256,
                {"shm": self._name, "host": self._target.host},
            )
            return self._verdict
