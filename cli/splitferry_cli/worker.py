"""One worker of `splitferry consume --workers`, as a process; `workers.py` starts it."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
import traceback
from contextlib import AbstractAsyncContextManager, nullcontext, suppress

from splitferry_consumer.service import Service

from . import collector, logs, open_files
from .failures import told
from .workers import ABANDON, JOINED, STOP, Job

WORDS_MAX = 1000
"""Characters that are told, so that a pipe takes them at once."""


def main() -> None:
    # Unbuffered: the orders that follow are for the thread.
    with open(0, "rb", buffering=0, closefd=False) as given:
        line = given.readline()
    if not line:  # the supervisor has died meanwhile
        return
    job = Job.decode(line)
    logs.configure(verbose=job.verbose, service=True, worker=job.number)
    open_files.take_all()
    collector.spare_requests()
    try:
        asyncio.run(_serve(job))
    except Exception as error:  # noqa: BLE001 - told, and the supervisor decides
        if job.verbose:
            traceback.print_exc()
        words = told(error, job.settings.connection.bootstrap_servers)
        _say(f"{words[:WORDS_MAX]}\n".encode())
        sys.exit(1)


async def _serve(job: Job) -> None:
    service = Service(job.settings)
    loop = asyncio.get_running_loop()
    threading.Thread(target=_obey, args=(job, loop, service), name="orders", daemon=True).start()
    for number in (signal.SIGINT, signal.SIGTERM):
        # Once or often, for the order to leave at once is the supervisor's.
        loop.add_signal_handler(number, service.stop)
    joining = asyncio.create_task(_tell(service))
    try:
        async with _page(job, service):
            await service.run()
    finally:
        joining.cancel()


def _page(job: Job, service: Service) -> AbstractAsyncContextManager[None]:
    if not job.web:
        return nullcontext()
    from splitferry_consumer.web.server import serving_at  # noqa: PLC0415 - the extra `web`
    from splitferry_consumer.web.source import OneProcess  # noqa: PLC0415

    return serving_at(OneProcess(service), job.socket)


async def _tell(service: Service) -> None:
    await service.assigned.wait()
    _say(JOINED)


def _say(line: bytes) -> None:
    with suppress(BrokenPipeError):  # the supervisor has died; the thread sees it too
        os.write(1, line)


def _obey(job: Job, loop: asyncio.AbstractEventLoop, service: Service) -> None:
    """Carry out the supervisor's orders; leave with it, and leave nothing of it behind."""
    orders = {STOP: service.stop, ABANDON: service.abandon}
    while order := os.read(0, 1):
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(orders[order])
    with suppress(OSError):
        job.socket.unlink(missing_ok=True)
        job.socket.parent.rmdir()
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
