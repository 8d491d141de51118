"""`consume --workers`: several processes that end, start and answer as one."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from brokers import make_topics
from command import command, topics_of
from scene import Scene, scene
from splitferry_consumer.web.app import TOKEN_HEADER
from splitferry_protocol.records import Status
from stage import PATIENT, Consumer, until
from watching import page_of, samples

WORKERS = 2
PARTITIONS = 4


def workers_of(consumer: Consumer) -> list[psutil.Process]:
    """Its processes that run, in order of their start."""
    return sorted(psutil.Process(consumer.pid).children(), key=psutil.Process.create_time)


def numbers_that_took(made: Scene, consumer: Consumer) -> dict[int, int]:
    """Which worker took each partition last."""
    lines = (line for line in made.lines(consumer) if line["event"] == "partition taken")
    return {line["partition"]: line["worker"] for line in lines}


async def started(made: Scene, **options: str) -> Consumer:
    """With each worker holding its share of the partitions."""
    consumer = await made.run.consumer(WORKERS=str(WORKERS), **options)
    await shared(made, consumer)
    return consumer


async def shared(made: Scene, consumer: Consumer) -> None:
    def fairly() -> bool:
        held = list(numbers_that_took(made, consumer).values())
        return len(held) == PARTITIONS and set(held) == set(range(1, WORKERS + 1))

    await until(fairly, "all workers have partitions")


async def test_one_result_for_each_request_whatever_worker_is_killed(
    bootstrap_servers: str, tmp_path: Path
) -> None:
    async with scene(bootstrap_servers, tmp_path, PARTITIONS) as made:
        consumer = await started(made)
        begun = [await made.begin(partition) for partition in range(PARTITIONS)]
        whole = [await made.item(number % PARTITIONS) for number in range(40)]
        await made.told(*whole)
        victim = workers_of(consumer)[0]
        victim.kill()
        said = await made.said(consumer, "the worker has ended, it is started again")
        assert (said["how"], said["level"]) == ("SIGKILL", "error")
        more = [await made.item(number % PARTITIONS) for number in range(40)]
        for partition, (_, left) in enumerate(begun):
            await made.send(left, partition)
        await made.told(*more, *(request for request, _ in begun))
        await until(lambda: len(workers_of(consumer)) == WORKERS, "as many workers again")
        assert victim.pid not in [worker.pid for worker in workers_of(consumer)]
        await made.sound()


async def test_one_signal_lets_all_finish_what_is_in_flight(
    bootstrap_servers: str, tmp_path: Path
) -> None:
    """Also where a service manager gives it to all processes, not to the first one alone."""
    async with scene(bootstrap_servers, tmp_path, PARTITIONS) as made:
        consumer = await started(made)
        sent = [await made.item(number % PARTITIONS, 200_000) for number in range(12)]
        workers = workers_of(consumer)
        workers[0].terminate()
        assert await consumer.stop() == 0
        assert not any(worker.is_running() for worker in workers)
        drained = [line["worker"] for line in made.lines(consumer) if line["event"] == "stopping"]
        assert sorted(drained) == [1, 2], "each of them once"
        assert consumer.heard("stopped with work in flight; the next owner reads it again") == 0
        await made.consumer()
        await made.told(*sent)
        await made.sound()


async def test_a_second_signal_ends_all_at_once(bootstrap_servers: str, tmp_path: Path) -> None:
    """A worker that does not react is killed."""
    async with scene(bootstrap_servers, tmp_path, PARTITIONS) as made:
        consumer = await started(made)
        workers = workers_of(consumer)
        workers[1].suspend()
        process, supervisor = consumer._running(), psutil.Process(consumer.pid)
        supervisor.send_signal(signal.SIGINT)
        await made.said(consumer, "stopping: finishing what is in flight; again to leave at once")
        await asyncio.to_thread(workers[0].wait, 30)
        assert consumer.alive, "it waits for the other one"
        supervisor.send_signal(signal.SIGINT)
        async with asyncio.timeout(30):
            assert await process.wait() == 130
        assert not workers[1].is_running() or workers[1].status() == psutil.STATUS_ZOMBIE


async def test_one_page_and_metrics_for_all(bootstrap_servers: str, tmp_path: Path) -> None:
    async with scene(bootstrap_servers, tmp_path, PARTITIONS) as made:
        consumer = await started(
            made, WEB="127.0.0.1:0", WEB_ACTIONS="true", SESSION_TIMEOUT=PATIENT
        )
        async with page_of(made, consumer) as client:
            await answered(client, "readyz", 200)
            begun = [(await made.begin(number % PARTITIONS))[0] for number in range(10)]
            done = [await made.item(number % PARTITIONS) for number in range(10)]
            await made.told(*done)
            status = await shown(client, len(begun))
            held = {view["partition"]: view["worker"] for view in status["partitions"]}
            assert held == numbers_that_took(made, consumer)
            assert {view["pid"] for view in status["workers"]} == {
                worker.pid for worker in workers_of(consumer)
            }
            assert {row["request"] for row in status["results"]} == set(map(str, done))
            assert status["flow"]["high"] == 64 * 1024 * 1024
            rows = status["requests"]["shown"]
            whole = [row["request"] for row in rows]
            # Two of one millisecond are told apart by their partitions in either order.
            rows.sort(key=lambda row: (-row["opened_at"], -row["first"], row["partition"]))
            newest = [row["request"] for row in rows]
            for sort, order in ("oldest", whole), ("newest", newest):
                pages = [
                    row["request"]
                    for offset in range(0, 12, 3)
                    for row in (await window(client, sort=sort, offset=offset, limit=3))["shown"]
                ]
                assert pages == order
            assert (await window(client, find=str(begun[4])))["matching"] == 1

            series = samples((await client.get("metrics")).text)
            each = 'splitferry_requests_total{{status="completed",worker="{}"}}'.format
            requests = [series[each(number)] for number in (1, 2)]
            assert min(requests) > 0
            assert sum(requests) == len(done)
            assert series['splitferry_worker_up{worker="1"}'] == 1
            assert (await client.get("healthz")).json() == {"ok": True, "detail": "2 workers"}

            request = begun[7]
            detail = (await client.get(f"requests/{request}")).json()
            assert (detail["request"], detail["exact"]) == (str(request), True)
            ended = await client.post(
                f"requests/{request}/abort",
                json={"reason": "enough"},
                headers={TOKEN_HEADER: status["token"], "origin": str(client.base_url).rstrip("/")},
            )
            assert ended.status_code == 202, ended.text
            await made.told(request)
            assert made.run.results[request].status is Status.ABORTED


@pytest.mark.timeout(240)
async def test_a_frozen_worker_is_shown_and_holds_nobody_up(
    bootstrap_servers: str, tmp_path: Path
) -> None:
    async with scene(bootstrap_servers, tmp_path, PARTITIONS) as made:
        # Long enough to see all of it before the other worker takes over.
        consumer = await started(made, WEB="127.0.0.1:0", SESSION_TIMEOUT="25")
        async with page_of(made, consumer) as client:
            await answered(client, "readyz", 200)
            status = (await client.get("status")).json()
            frozen = psutil.Process(status["workers"][1]["pid"])
            theirs = [view["partition"] for view in status["partitions"] if view["worker"] == 2]
            frozen.suspend()
            try:
                ready = await answered(client, "readyz", 503)
                assert not ready["checks"]["workers"]["ok"]
                assert ready["checks"]["workers"]["detail"] == "worker 2: it does not answer"
                status = (await client.get("status")).json()
                assert [view["missing"] for view in status["workers"]] == [
                    None, "it does not answer",
                ]  # fmt: skip
                lost = [v["partition"] for v in status["partitions"] if v["state"] == "missing"]
                assert lost == theirs
                assert status["partitions"][lost[0]]["reason"] == "worker 2: it does not answer"
                series = samples((await client.get("metrics")).text)
                assert series['splitferry_worker_up{worker="2"}'] == 0
                assert (await client.get("healthz")).status_code == 200

                async def taken_over() -> bool:
                    views = (await client.get("status")).json()["partitions"]
                    return [v["worker"] for v in views] == [1] * PARTITIONS

                await until(taken_over, "the other worker has its partitions")
            finally:
                frozen.resume()
            await answered(client, "readyz", 200)
            await made.told(*[await made.item(partition) for partition in range(PARTITIONS)])


async def answered(client: httpx.AsyncClient, path: str, code: int) -> Any:
    """What it says once it answers so."""
    answer: httpx.Response | None = None

    async def so() -> bool:
        nonlocal answer
        answer = await client.get(path)
        return answer.status_code == code

    await until(so, f"{path} answers {code}", 30)
    assert answer is not None
    return answer.json()


async def shown(client: httpx.AsyncClient, count: int) -> Any:
    """The status, once that many requests are open."""
    status: Any = None

    async def have() -> bool:
        nonlocal status
        status = (await client.get("status")).json()
        return bool(status["requests"]["total"] == count)

    await until(have, f"{count} open requests")
    return status


async def window(client: httpx.AsyncClient, **query: str | int) -> Any:
    return (await client.get("status", params=query)).json()["requests"]


async def test_nothing_outlives_the_supervisor(
    bootstrap_servers: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    async with scene(bootstrap_servers, tmp_path, PARTITIONS) as made:
        consumer = await started(made, WEB="127.0.0.1:0")
        left = workers_of(consumer)
        assert len(list(tmp_path.glob("splitferry-*/*"))) == WORKERS
        await consumer.kill()
        _, alive = await asyncio.to_thread(psutil.wait_procs, left, 30)
        for worker in alive:
            worker.kill()
        assert alive == []
        assert list(tmp_path.glob("splitferry-*")) == []


@pytest.mark.parametrize("wrong", ["topic", "root"])
async def test_what_no_restart_heals_is_said_once(
    bootstrap_servers: str, tmp_path: Path, wrong: str
) -> None:
    names = await make_topics(bootstrap_servers, PARTITIONS)
    environment = topics_of(names) | {"SPLITFERRY_BOOTSTRAP_SERVERS": bootstrap_servers}
    if wrong == "root":
        (tmp_path / ".splitferry").touch()
        said = f"cannot use the root {tmp_path}"
    else:
        said = environment["SPLITFERRY_SPLITS_TOPIC"] = "no-such-topic"
    outcome = await command(environment, "consume", "--root", tmp_path, "--workers", "3")
    assert outcome.code == 1
    assert said in outcome.error
    assert len(outcome.stderr.splitlines()) == 1, outcome.stderr
