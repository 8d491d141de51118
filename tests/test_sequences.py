"""Sequences never repeat: across restarts, clock steps, processes, and lost state."""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from failing import failing
from splitferry_producer import StateError
from splitferry_producer.sequences import BLOCK, Sequences, floor_at, now_ms
from splitferry_protocol.ids import U32_MAX, U64_MAX


class Clock:
    def __init__(self, ms: int = 1_700_000_000_000) -> None:
        self.ms = ms

    def __call__(self) -> int:
        return self.ms


async def take(sequences: Sequences, count: int) -> list[int]:
    await sequences.open()
    return [await sequences.next() for _ in range(count)]


@given(
    steps=st.lists(
        st.tuples(st.integers(-10_000, 10_000), st.integers(0, BLOCK + 3), st.booleans()),
        min_size=1,
        max_size=6,
    )
)
@settings(deadline=None, max_examples=30)
def test_no_sequence_repeats_across_restarts_and_clock_steps(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[int, int, bool]]
) -> None:
    directory = tmp_path_factory.mktemp("state")
    clock = Clock()

    async def live() -> list[int]:
        given, sequences = [], Sequences(7, directory, clock)
        for step, count, restart in steps:
            clock.ms += step
            if restart:
                sequences = Sequences(7, directory, clock)
            given += await take(sequences, count)
        return given

    given = asyncio.run(live())
    assert given == sorted(set(given))


async def test_a_block_begins_at_the_present_time_even_if_the_state_was_lost(
    tmp_path: Path,
) -> None:
    clock = Clock()
    before = await take(Sequences(7, tmp_path, clock), 5000)
    (tmp_path / "node-7").unlink()
    clock.ms += 1
    after = await take(Sequences(7, tmp_path, clock), 1)
    assert after == [floor_at(clock.ms)]
    assert after > before


def test_processes_at_once_share_no_sequence(tmp_path: Path) -> None:
    program = (
        "import asyncio, sys, pathlib\n"
        "from splitferry_producer.sequences import Sequences\n"
        "async def main():\n"
        "    for _ in range(20):\n"
        "        s = Sequences(7, pathlib.Path(sys.argv[1]), lambda: 1000)\n"
        "        await s.open()\n"
        "        print(*[await s.next() for _ in range(1100)])\n"
        "asyncio.run(main())\n"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", program, tmp_path], stdout=subprocess.PIPE)
        for _ in range(4)
    ]
    given = [int(word) for process in running for word in process.communicate()[0].split()]
    assert [process.returncode for process in running] == [0] * 4
    assert len(given) == len(set(given)) == 4 * 20 * 1100


async def test_tasks_at_once_share_no_sequence(tmp_path: Path) -> None:
    sequences = Sequences(7, tmp_path)
    await sequences.open()
    given = await asyncio.gather(*(sequences.next() for _ in range(3 * BLOCK)))
    assert len(set(given)) == 3 * BLOCK


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_takes_a_block_of_its_own(tmp_path: Path) -> None:
    sequences = Sequences(7, tmp_path, Clock())
    mine = asyncio.run(take(sequences, 1))[0]
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(write_end, b"%d" % asyncio.run(sequences.next()))
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    theirs = int(os.read(read_end, 100))
    os.close(read_end)
    os.close(write_end)
    assert theirs == mine + BLOCK


async def test_the_default_node_id_is_drawn_once(tmp_path: Path) -> None:
    directory = tmp_path / "new" / "state"
    first = await asyncio.gather(*(Sequences(None, directory).open() for _ in range(8)))
    assert len({*first, await Sequences(None, directory).open()}) == 1
    assert 0 <= first[0] <= U32_MAX
    others = {await Sequences(None, tmp_path / str(number)).open() for number in range(8)}
    assert len(others) > 1
    assert directory.stat().st_mode & 0o077 == 0


async def test_nothing_is_left_beside_the_state(tmp_path: Path) -> None:
    await take(Sequences(None, tmp_path), BLOCK + 1)
    assert len(os.listdir(tmp_path)) == 3  # node-id, the node's state and its lock


async def test_without_a_state_directory_the_node_id_is_new_each_time(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    nodes, given = set(), []
    for _ in range(4):
        sequences = Sequences(None, tmp_path / "file" / "state")
        with capture_logs() as logs:
            given = await take(sequences, BLOCK + 5)
        assert [entry["log_level"] for entry in logs] == ["warning"]
        nodes.add(await sequences.open())
        assert given == sorted(set(given))
        assert given[0] <= floor_at(now_ms())
    assert len(nodes) > 1


async def test_a_given_node_id_needs_its_state(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StateError, match="leave the node id out"):
        await Sequences(7, tmp_path / "file").open()


async def test_a_state_that_cannot_be_kept_any_more_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that fills up meets whoever needs the next block, in the middle of a folder."""
    sequences = Sequences(None, tmp_path)
    node = await sequences.open()
    await take(sequences, BLOCK)
    monkeypatch.setattr(os, "fsync", failing(errno.ENOSPC))
    with pytest.raises(StateError, match=f"the sequences of node {node} .*No space left"):
        await sequences.next()
    monkeypatch.undo()
    await sequences.next()


@pytest.mark.parametrize("content", [b"", b"12", b"-3\n", b"abc\n", b"9" * 30 + b"\n", b"1 2\n"])
async def test_damaged_state_is_never_guessed_over(tmp_path: Path, content: bytes) -> None:
    node = await Sequences(None, tmp_path).open()
    (tmp_path / f"node-{node}").write_bytes(content)
    with pytest.raises(StateError, match="is damaged: use another node id"):
        await Sequences(node, tmp_path).open()
    # Not chosen by anyone, the node id may be another: a new one has no past.
    with capture_logs():
        assert await Sequences(None, tmp_path).open() != node
    assert (tmp_path / f"node-{node}").read_bytes() == content


async def test_numbers_out_of_range_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="out of range"):
        Sequences(U32_MAX + 1, tmp_path)
    (tmp_path / "node-7").write_text(f"{U64_MAX - 5}\n")
    with pytest.raises(StateError, match="no sequences left"):
        await Sequences(7, tmp_path).open()
