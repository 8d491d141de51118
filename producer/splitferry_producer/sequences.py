"""Sequences that never repeat for a node id (WIRE, "Topics").

Two things are held against repetition. A state file for each node id holds the next free
sequence; a process takes a block of them under a lock, and the file is on disk before the first
is used, so a restart, a crash or a second process begins behind the block. And no block begins
below the present time in ms, shifted left by 20: where a state file was lost, the clock alone
keeps new sequences above all that were given while it was right, for nobody takes 2**20
sequences in one millisecond.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import structlog
from platformdirs import user_state_path

from splitferry_protocol.ids import U32_MAX, U64_MAX

from .errors import StateError

_log = structlog.get_logger(__name__)

BLOCK = 1024
"""Sequences that a process takes at a time."""
_CLOCK_SHIFT = 20
_LOCK_TIMEOUT = 10.0
"""Seconds; whoever holds the lock only rewrites a small file."""


def now_ms() -> int:
    """Unix time in ms."""
    return time.time_ns() // 1_000_000


def floor_at(clock_ms: int) -> int:
    """The lowest sequence that may be given at this time."""
    return clock_ms << _CLOCK_SHIFT


def default_state_dir() -> Path:
    return user_state_path("splitferry")


class Sequences:
    """Gives the sequences of one node id.

    Args:
        node_id: None takes this user's own on this machine: drawn once, kept in `directory`.
        directory: where the state is kept; None: the user's state directory.
        clock: Unix time in ms.
    """

    def __init__(
        self,
        node_id: int | None = None,
        directory: Path | None = None,
        clock: Callable[[], int] = now_ms,
    ) -> None:
        if node_id is not None and not 0 <= node_id <= U32_MAX:
            raise StateError(f"node id {node_id} is out of range: give one from 0 to {U32_MAX}")
        self._given = node_id
        self._directory = directory if directory is not None else default_state_dir()
        self._clock = clock
        self._node_id = node_id
        self._persistent = True
        self._next = self._end = 0
        self._process = os.getpid()
        self._lock = asyncio.Lock()

    def __repr__(self) -> str:
        return f"<Sequences node={self._node_id} next={self._next} block_end={self._end}>"

    async def open(self) -> int:
        """Settle the node id and take the first block; returns the node id.

        Without a usable state directory, a node id that was not chosen is replaced by a random
        one of this process: no one else uses it, so its sequences cannot repeat.

        Raises:
            StateError: the state of a chosen node id cannot be kept or read.
        """
        async with self._lock:
            await asyncio.to_thread(self._open)
        assert self._node_id is not None
        return self._node_id

    async def next(self) -> int:
        """A sequence that was never given. Raises StateError when the state cannot be kept."""
        async with self._lock:
            # A forked child has its parent's block in memory: it must not use it.
            if self._next == self._end or self._process != os.getpid():
                try:
                    await asyncio.to_thread(self._reserve)
                except OSError as error:
                    raise self._unusable(error) from error
            given = self._next
            self._next += 1
            return given

    def _open(self) -> None:
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            if self._node_id is None:
                self._node_id = self._own_node_id()
            self._reserve()
        except (OSError, StateError) as error:
            if self._given is not None:
                raise self._unusable(error) from error
            self._node_id = secrets.randbelow(U32_MAX + 1)
            self._persistent = False
            _log.warning(
                "no state directory: using a random node id for this process",
                directory=str(self._directory),
                node_id=self._node_id,
                cause=str(error),
            )
            self._reserve()

    def _unusable(self, error: OSError | StateError) -> StateError:
        if isinstance(error, StateError):
            return error
        return StateError(
            f"the sequences of node {self._node_id} cannot be kept in {self._directory} "
            f"({error.strerror or error}): make it writable, choose another state directory, "
            "or leave the node id out"
        )

    def _own_node_id(self) -> int:
        path = self._directory / "node-id"
        with contextlib.suppress(FileExistsError):
            temporary = self._write_temporary(f"{secrets.randbelow(U32_MAX + 1)}\n")
            try:
                os.link(temporary, path)  # unlike a rename, does not replace another's choice
            finally:
                os.unlink(temporary)
            self._sync_directory()
        return _read_number(path, U32_MAX)

    def _reserve(self) -> None:
        floor = floor_at(self._clock())
        if self._persistent:
            with self._locked():
                path = self._directory / f"node-{self._node_id}"
                stored = _read_number(path, U64_MAX) if path.exists() else 0
                start = max(stored, floor)
                end = self._block_end(start)
                os.replace(self._write_temporary(f"{end}\n"), path)
                self._sync_directory()
        else:
            start = max(self._end, floor)
            if self._process != os.getpid():
                # A child of a fork shares the node id; it needs one of its own, but the id
                # was told already. Better no sequence than one twice.
                raise StateError("a forked process needs a producer of its own")
            end = self._block_end(start)
        self._next, self._end, self._process = start, end, os.getpid()

    def _block_end(self, start: int) -> int:
        if start + BLOCK > U64_MAX:
            raise StateError(
                f"node {self._node_id} has no sequences left (next is {start}): "
                "choose another node id"
            )
        return start + BLOCK

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        # A file of its own, for the state file is replaced: a lock on it would be on the old inode.
        path = self._directory / f"node-{self._node_id}.lock"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            deadline = time.monotonic() + _LOCK_TIMEOUT
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise StateError(
                            f"{path} has been locked for {_LOCK_TIMEOUT:g} s: end the stopped "
                            "process that holds it, or use another node id"
                        ) from None
                    time.sleep(0.002)
            yield
        finally:
            os.close(descriptor)

    def _write_temporary(self, text: str) -> Path:
        path = self._directory / f".{secrets.token_hex(8)}"
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            try:
                os.write(descriptor, text.encode())
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError:
            path.unlink(missing_ok=True)
            raise
        return path

    def _sync_directory(self) -> None:
        descriptor = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _read_number(path: Path, largest: int) -> int:
    """Read a state file. It is replaced in one step, so nothing of ours leaves half of one."""
    text = path.read_bytes()[:64]
    number = int(text) if text.strip().isdigit() and text.endswith(b"\n") else -1
    if not 0 <= number <= largest:
        raise StateError(
            f"{path} is damaged: use another node id, or delete the file if this machine's clock "
            "has never been ahead of the true time (sequences then begin at the present time, "
            "above all that were given before)"
        )
    return number
