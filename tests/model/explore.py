"""Every order of events in small worlds, with the program's real code in them.

    PYTHONPATH=tests python -m model.explore [WORLD…]

A world is the splits log, results, offsets and transactions of a partition or two, up to two
owners of each, and a root. Its state is a tuple of numbers, each of which stands for a part
that was seen before; a step of an owner, which depends on nothing but that owner and what it
is answered, is done once by the real code, and remembered.
"""

from __future__ import annotations

import hashlib
import logging
import random
import sys
import time
from array import array
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Generic, NamedTuple, TypeVar

import structlog

from model.oracle import Event, Fate, Log, Opening, Reading, read
from model.owner import RESULTS, Question, Tenancy, taking
from model.snapshot import copied, frozen
from model.storage import Root, Storage, Violation
from model.worlds import SMALL, WORLDS, World
from splitferry_consumer.bookmark import Bookmark
from splitferry_consumer.catalogue import Row
from splitferry_consumer.ledger import DeadLetter
from splitferry_consumer.leftover import Leftover
from splitferry_consumer.taking import Misfit
from splitferry_consumer.targets import Verdict
from splitferry_consumer.transport import Record
from splitferry_protocol.codec import InvalidRecord, decode_outcome
from splitferry_protocol.ids import RequestId, RequestKey
from splitferry_protocol.records import Block, Result, Status
from world import GROUP, TOPIC

STATES = 300_000
"""Of a world in the full run."""
SMALLEST_STATES = 1_200_000
"""Of the smallest world with a crash, a zombie and a late duplicate."""
UNBOUNDED = 10**9
LONGEST = 300
"""Steps of a random way."""

V = TypeVar("V")
State = tuple[int, ...]
Step = tuple[str, State]

LOG, RECORDS, LETTERS, COMMITTED, TRANSACTION, OWNER, OTHER = range(7)
"""Places in a state, of partition 0; of partition 1 they follow."""
WIDTH = 7
ROOT, BUDGET, DECIDED, CHANGE = -4, -3, -2, -1


class Numbers(Generic[V]):
    """A number for each value; the same for two values with the same key."""

    def __init__(self, key: Callable[[V], Hashable] = lambda value: value) -> None:
        self._key = key
        self._numbers: dict[Hashable, int] = {}
        self.values: list[V] = []

    def of(self, value: V) -> int:
        key = self._key(value)
        number = self._numbers.get(key)
        if number is None:
            number = self._numbers[key] = len(self.values)
            self.values.append(value)
        return number

    def __len__(self) -> int:
        return len(self.values)


def _digest(value: object) -> bytes:
    return hashlib.blake2b(frozen(value).encode(), digest_size=16).digest()


class Entry(NamedTuple):
    """A place in the results log: a record's number, or none for a marker."""

    record: int | None
    fate: str
    """open, committed, aborted; or foreign: somebody else's, open."""


class Transaction(NamedTuple):
    commit: tuple[int, str]
    letters: tuple[tuple[RequestId | None, int], ...]
    left: str = ""
    """Which markers are still to be written, once it is decided."""
    passed: bool = False
    """Kafka takes it for complete, and does not write them."""
    pending: bool = False
    """The offset of one before it was left so."""


@dataclass(frozen=True)
class Taking:
    """An owner that is taking the partition, by what it asked and was answered so far."""

    answers: tuple[tuple[str, Any], ...] = ()
    accept_loss: bool = False


class Budget(NamedTuple):
    takes: int
    crashes: int
    unsure: int
    decisions: int
    timeouts: int
    foreign: int
    resets: int
    passes: int


class Change(NamedTuple):
    """The splits log is not the one that it was."""

    results: int
    """The end of the results at that time."""
    committed: tuple[int, str] | None


def _owner_key(owner: Taking | Tenancy | None) -> Hashable:
    return _digest(owner) if isinstance(owner, Tenancy) else owner


class Model:
    """The states of one world and the steps between them."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.storage = Storage()
        self.owners: Numbers[Taking | Tenancy | None] = Numbers(_owner_key)
        self.roots: Numbers[Root] = Numbers(_digest)
        self.outgoing: Numbers[tuple[bytes | None, bytes | None]] = Numbers()
        self.verdicts: Numbers[Verdict | Row] = Numbers(_digest)
        self.parts: Numbers[Any] = Numbers()
        self._remembered: dict[tuple[Any, ...], Any] = {}
        self._passed: set[tuple[int, ...]] = set()
        number = self.parts.of
        partition = (0, number(()), number(()), number(None), number(None), 0, 0)
        assert self.owners.of(None) == 0
        budget = Budget(*(getattr(world, name) for name in Budget._fields))
        tail = (self.roots.of(Root()), number(budget), number(frozenset()), number(None))
        self.first: State = partition * len(world.logs) + tail

    # ---- what is where

    def log(self, state: State, partition: int) -> tuple[int, Log]:
        """Start and contents of a splits log."""
        world = self.world
        version = state[partition * WIDTH + LOG]
        if version and world.changed is not None:
            return 0, world.changed if version == 2 else []
        return world.truncated if version else 0, world.logs[partition]

    def outdated(self, state: State, partition: int) -> bool:
        """Whether what is committed speaks of a log that is not there any more."""
        change: Change | None = self.parts.values[state[CHANGE]]
        committed = self.parts.values[state[partition * WIDTH + COMMITTED]]
        if change is None or partition or committed is None or committed != change.committed:
            return False
        bookmark = Bookmark.parse(*committed)
        start, log = self.log(state, partition)
        return bookmark.watermark < start or max(bookmark.watermark, bookmark.told) > len(log)

    def _with(self, state: State, partition: int, changes: Mapping[int, int]) -> State:
        """Places below WIDTH are the partition's. Owners can be told apart by nothing."""
        made = list(state)
        base = partition * WIDTH
        for place, value in changes.items():
            made[place if place < 0 else base + place] = value
        a, b = base + OWNER, base + OTHER
        if made[a] < made[b]:
            made[a], made[b] = made[b], made[a]
        return tuple(made)

    def _spent(self, state: State, kind: str) -> dict[int, int] | None:
        """The change to the budget, if it still has one of the kind."""
        budget: Budget = self.parts.values[state[BUDGET]]
        left: int = getattr(budget, kind)
        if not left:
            return None
        return {BUDGET: self.parts.of(budget._replace(**{kind: left - 1}))}

    def remember(self, key: tuple[Any, ...], work: Callable[[], V]) -> V:
        if key not in self._remembered:
            self._remembered[key] = work()
        made: V = self._remembered[key]
        return made

    def act(self, owner: int, step: str, *details: Any, key: Hashable = ()) -> tuple[int, Any]:
        """A step of an owner that holds the partition; its new number, and what it returned."""

        def work() -> tuple[int, Any]:
            tenancy = copied(self.owners.values[owner])
            answer = getattr(tenancy, step)(*details)
            return self.owners.of(tenancy), answer

        return self.remember((owner, step, key), work)

    # ---- steps

    def steps(self, state: State) -> Iterator[Step]:
        for partition in range(len(self.world.logs)):
            yield from self._broker(state, partition)
            yield from self._members(state, partition)
        yield from self._sweeps(state)

    def _broker(self, state: State, p: int) -> Iterator[Step]:
        here = state[p * WIDTH : (p + 1) * WIDTH]
        value = self.parts.values
        entries: tuple[Entry, ...] = value[here[RECORDS]]
        transaction: Transaction | None = value[here[TRANSACTION]]
        number = self.parts.of
        if transaction is not None and transaction.left and not transaction.passed:
            if (spent := self._spent(state, "passes")) is not None:
                passed = number(transaction._replace(passed=True))
                yield "Kafka passes over", self._with(state, p, {TRANSACTION: passed, **spent})
            for marker in transaction.left if self.world.apart else ("",):
                changes = {}
                if marker != "o":
                    changes[RECORDS] = number((*_ended(entries, "committed"), Entry(None, "")))
                if marker != "r":
                    changes[COMMITTED] = number(transaction.commit)
                left = transaction.left.replace(marker, "") if marker else ""
                after = transaction._replace(left=left, pending=transaction.pending and "o" in left)
                changes[TRANSACTION] = number(after if left else None)
                yield f"marker {marker}", self._with(state, p, changes)
        elif transaction and not transaction.passed and (spent := self._spent(state, "timeouts")):
            changes = self._aborted(state, p) | self._fenced(state, p) | spent
            yield "the transaction times out", self._with(state, p, changes)
        if (spent := self._spent(state, "foreign")) is not None:
            opened = (*entries, Entry(None, "foreign"))
            yield "foreign begins", self._with(state, p, {RECORDS: number(opened), **spent})
        if any(entry.fate == "foreign" for entry in entries):
            ended = tuple(e._replace(fate="") if e.fate == "foreign" else e for e in entries)
            yield "foreign ends", self._with(state, p, {RECORDS: number(ended)})
        quiet = here[OWNER] == here[OTHER] == 0 and transaction is None
        if quiet and (spent := self._spent(state, "resets")) is not None:
            for name, committed in (("deleted", None), ("set to 0", (0, "by hand"))):
                changes = {COMMITTED: number(committed), **spent}
                yield f"the offset is {name}", self._with(state, p, changes)
        if quiet and p == 0 and not here[LOG] and (self.world.changed or self.world.truncated):
            change = Change(len(entries), value[here[COMMITTED]])
            yield "the log changes", self._with(state, p, {LOG: 1, CHANGE: number(change)})
        if here[LOG] == 1 and self.world.changed is not None and not self.outdated(state, p):
            yield "the new log grows", self._with(state, p, {LOG: 2})

    def _aborted(self, state: State, p: int) -> dict[int, int]:
        value, number = self.parts.values, self.parts.of
        transaction: Transaction = value[state[p * WIDTH + TRANSACTION]]
        ended = (*_ended(value[state[p * WIDTH + RECORDS]], "aborted"), Entry(None, ""))
        # It may not have come to its own offset, which would end the one from before.
        left = (
            Transaction(transaction.commit, (), "o", passed=True) if transaction.pending else None
        )
        return {RECORDS: number(ended), TRANSACTION: number(left)}

    def _ending(self, state: State, p: int) -> dict[int, int]:
        """What an owner does about markers that Kafka has not written; empty: there are none."""
        value, number = self.parts.values, self.parts.of
        transaction: Transaction | None = value[state[p * WIDTH + TRANSACTION]]
        if transaction is None or not transaction.passed:
            return {}
        left = Leftover("o" in transaction.left, "r" in transaction.left)
        entries = value[state[p * WIDTH + RECORDS]]
        if left.results:
            entries = *_ended(entries, "committed" if left.commits else "aborted"), Entry(None, "")
        changes = {RECORDS: number(entries), TRANSACTION: number(None)}
        if left.commits and left.offset:
            changes[COMMITTED] = number(transaction.commit)
        return changes

    def _fenced(self, state: State, p: int) -> dict[int, int]:
        """A new epoch: who holds an older one is stale."""
        base = p * WIDTH
        return {place: state[base + place] & ~1 for place in (OWNER, OTHER)}

    def _members(self, state: State, p: int) -> Iterator[Step]:
        base = p * WIDTH
        codes = state[base + OWNER], state[base + OTHER]
        for place in (OWNER, OTHER):
            code = state[base + place]
            if place == OTHER and code == codes[0] and code:
                continue  # the same as its twin
            name = f"{'ab'[place - OWNER]}{p if base else ''}"
            owner = self.owners.values[code >> 1]
            if owner is None:
                yield from self._assigned(state, p, place, name)
                continue
            if (spent := self._spent(state, "crashes")) is not None:
                yield f"{name} crashes", self._with(state, p, {place: 0, **spent})
            if isinstance(owner, Taking):
                yield from self._taking(state, p, place, name, owner)
            else:
                yield from self._holding(state, p, place, name, owner)

    def _assigned(self, state: State, p: int, place: int, name: str) -> Iterator[Step]:
        base = p * WIDTH
        other = state[base + OWNER + OTHER - place]
        spent: dict[int, int] | None = {}
        if other:
            spent = self._spent(state, "takes")
        elif place == OTHER:
            spent = None  # the first place is as good
        if spent is not None:
            start = {place: self.owners.of(Taking()) << 1, **spent}
            yield f"{name} is assigned", self._with(state, p, start)
            if state[base + LOG]:
                start[place] = self.owners.of(Taking(accept_loss=True)) << 1
                yield f"{name} is assigned, loss accepted", self._with(state, p, start)

    def _taking(self, state: State, p: int, place: int, name: str, owner: Taking) -> Iterator[Step]:
        base = p * WIDTH
        code = state[base + place]
        value = self.parts.values
        entries: tuple[Entry, ...] = value[state[base + RECORDS]]
        operation, *details = self.remember((code >> 1, p), lambda: self._question(owner, p))
        changes: dict[int, int] = {}
        answer: Any = None
        fresh = code & 1
        again = self.owners.of(Taking(accept_loss=owner.accept_loss)) << 1
        match operation:
            case "fence":
                transaction: Transaction | None = value[state[base + TRANSACTION]]
                if transaction is not None and not transaction.passed:
                    if transaction.left:
                        return  # decided: the coordinator lets nobody in before it is done
                    changes |= self._aborted(state, p)
                changes |= self._fenced(state, p)
                fresh = 1
            case "settle":
                ending = self._ending(state, p)
                if ending:
                    # Who was fenced meanwhile cannot end it.
                    ended = self._with(state, p, {place: again, **(ending if fresh else {})})
                    yield f"{name} ends what is left open", ended
                    return
            case "committed":
                if "o" in self._left(state, p):
                    yield f"{name} is told that it is pending", self._with(state, p, {place: again})
                    return
                answer = value[state[base + COMMITTED]]
            case "splits_bounds":
                start, log = self.log(state, p)
                answer = (start, len(log))
            case "results_bounds":
                answer = (0, len(entries))
            case "results":
                start, end = details
                if any(entry.fate in {"open", "foreign"} for entry in entries[:end]):
                    # It waits for so long, and begins anew: the open one may be its own.
                    yield f"{name} gives up reading", self._with(state, p, {place: again})
                    return
                answer = tuple(
                    (offset, entry.record)
                    for offset, entry in enumerate(entries[:end])
                    if offset >= start and entry.fate == "committed"
                )
            case "taken":
                changes[place] = details[0] << 1 | fresh
                yield f"{name} holds", self._with(state, p, changes)
                return
            case _:
                # Who was fenced meanwhile may have seen two logs.
                if fresh and not self.outdated(state, p):
                    raise Violation(f"{name} is refused: {details[0]}")
                yield f"{name} is refused", self._with(state, p, {place: 0})
                return
        asked = replace(owner, answers=(*owner.answers, (operation, answer)))
        changes[place] = self.owners.of(asked) << 1 | fresh
        yield f"{name} {operation}", self._with(state, p, changes)

    def _left(self, state: State, p: int) -> str:
        """Which markers Kafka has not written, and will not write."""
        transaction: Transaction | None = self.parts.values[state[p * WIDTH + TRANSACTION]]
        return transaction.left if transaction is not None and transaction.passed else ""

    def _question(self, owner: Taking, p: int) -> tuple[Any, ...]:
        answers = [
            [Record(o, *self.outgoing.values[r]) for o, r in answer]
            if asked == "results"
            else answer
            for asked, answer in owner.answers
        ]
        try:
            tenancy = taking(answers, p, self.world.horizon, owner.accept_loss)
        except Question as question:
            return question.operation, *question.details
        except Misfit as misfit:
            return "refused", str(misfit)
        return "taken", self.owners.of(tenancy)

    def _holding(
        self, state: State, p: int, place: int, name: str, tenancy: Tenancy
    ) -> Iterator[Step]:
        base = p * WIDTH
        code = state[base + place]
        owner, fresh = code >> 1, code & 1

        def step(label: str, number: int, changes: Mapping[int, int] = {}) -> Step:
            return f"{name} {label}", self._with(state, p, {place: number << 1 | fresh, **changes})

        if not fresh:
            yield f"{name} loses it", self._dropped(state, p, place, tenancy, 0)
        _, log = self.log(state, p)
        position = tenancy.ledger.position
        at_end = position >= len(log)
        if not at_end:
            content = log[position]
            read_on, _ = self.act(owner, "read", position, content, key=state[base + LOG])
            yield step(f"reads {position}", read_on)
        for n in tenancy.comparing():
            yield step(f"compares {n}", self.act(owner, "compare", n, key=n)[0])
        for n in tenancy.open():
            # What nothing is left to come for expires, some time.
            spent: dict[int, int] | None = {} if at_end and n not in tenancy.comparing() else None
            status = Status.EXPIRED
            if spent is None and (spent := self._spent(state, "decisions")) is not None:
                status = self.world.decides
            if spent is not None:
                number, end = self.act(owner, "give_up", n, status, key=(n, status))
                spent[DECIDED] = self._decided(state, *end)
                yield step(f"gives up {n}", number, spent)
        for n in tenancy.ended():
            yield from self._settling(state, owner, n, tenancy, step)
        yield from self._publishing(state, p, place, name, tenancy)

    def _decided(self, state: State, key: RequestKey, last: int) -> int:
        decided: frozenset[tuple[RequestKey, int]] = self.parts.values[state[DECIDED]]
        return self.parts.of(decided | {(key, last)})

    # ---- the target

    def _settling(
        self, state: State, owner: int, n: int, tenancy: Tenancy, step: Callable[..., Step]
    ) -> Iterator[Step]:
        root, held = state[ROOT], self._held(state)
        request, incoming = tenancy.request(n)
        if incoming.row is not None:
            made, verdict = self._publish(root, incoming.row, incoming.temporary)
            assert verdict is not None
            yield step(f"places {n}", self._settled(owner, n, verdict), {ROOT: made})
            if (died := self._spent(state, "crashes")) is not None:
                made, _ = self._publish(root, incoming.row, incoming.temporary, dies=True)
                yield step(f"crashes placing {n}", 0, {ROOT: made, **died})
            return
        for unwritable in (False, True):
            spent: dict[int, int] = {}
            if unwritable:
                decision = self._spent(state, "decisions")
                if request.status is not Status.COMPLETED or decision is None:
                    continue
                spent = decision
                key = tenancy.proposal(n, unwritable)[0].key
                spent[DECIDED] = self._decided(state, key, request.last)
            label = f"cannot write {n}" if unwritable else f"settles {n}"
            if request.block is Block.MEM:
                made, verdict = self._announce(root, owner, n, tenancy, unwritable)
                yield step(label, self._settled(owner, n, verdict), {ROOT: made, **spent})
                continue
            made, answer, temporary = self.remember(
                ("decide", root, owner, n, unwritable, held),
                lambda flag=unwritable: self._decide(root, *tenancy.proposal(n, flag), held),  # type: ignore[misc]
            )
            if isinstance(answer, Verdict):
                number = self._settled(owner, n, answer)
            else:
                key_of = (n, self.verdicts.of(answer), temporary)
                number, _ = self.act(owner, "decided", n, answer, temporary, key=key_of)
            yield step(label, number, {ROOT: made, **spent})

    def _settled(self, owner: int, n: int, verdict: Verdict) -> int:
        return self.act(owner, "settled", n, verdict, key=(n, self.verdicts.of(verdict)))[0]

    def _decide(self, root: int, *details: Any) -> tuple[int, Row | Verdict, str | None]:
        made, answer, temporary = self.storage.decide(self.roots.values[root], *details)
        return self.roots.of(made), answer, temporary

    def _publish(
        self, root: int, row: Row, temporary: str | None, dies: bool = False
    ) -> tuple[int, Verdict | None]:
        def work() -> tuple[int, Verdict | None]:
            made, verdict = self.storage.publish(self.roots.values[root], row, temporary, dies)
            return self.roots.of(made), verdict

        return self.remember(("publish", root, self.verdicts.of(row), temporary, dies), work)

    def _announce(
        self, root: int, owner: int, n: int, tenancy: Tenancy, unwritable: bool
    ) -> tuple[int, Verdict]:
        _, verdict, data = tenancy.proposal(n, unwritable)
        name = "any"
        if verdict.status is not Status.COMPLETED:
            return root, verdict
        if self.world.segments:
            made, name = self.storage.announce(self.roots.values[root], data)
            root = self.roots.of(made)
        return root, verdict._replace(target={"shm": name, "host": "here"})

    def _dropped(self, state: State, p: int, place: int, tenancy: Tenancy, code: int) -> State:
        """The owner forgets the partition; what it held at the targets goes, as far as it may."""
        root = self.roots.values[state[ROOT]]
        for temporary in tenancy.temporary():
            root = self.storage.discard(root, temporary)
        for segment in tenancy.unannounced() if self.world.segments else ():
            root = self.storage.free(root, segment)
        return self._with(state, p, {place: code, ROOT: self.roots.of(root)})

    def _held(self, state: State) -> frozenset[str]:
        """The temporary files of living owners."""
        places = [p * WIDTH + n for p in range(len(self.world.logs)) for n in (OWNER, OTHER)]
        owners = [self.owners.values[state[place] >> 1] for place in places]
        return frozenset(n for o in owners if isinstance(o, Tenancy) for n in o.temporary())

    def _sweeps(self, state: State) -> Iterator[Step]:
        """What dead owners left on the disk."""
        root = self.roots.values[state[ROOT]]
        for temporary in sorted({*root.named, *root.disk.temporary} - self._held(state)):
            made = self.remember(
                ("sweep", state[ROOT], temporary),
                lambda name=temporary: self.roots.of(self.storage.sweep(root, name)),  # type: ignore[misc]
            )
            yield f"sweep {temporary}", self._with(state, 0, {ROOT: made})

    # ---- transactions

    def _publishing(
        self, state: State, p: int, place: int, name: str, tenancy: Tenancy
    ) -> Iterator[Step]:
        base = p * WIDTH
        owner, fresh = state[base + place] >> 1, state[base + place] & 1
        value, number = self.parts.values, self.parts.of
        transaction: Transaction | None = value[state[base + TRANSACTION]]
        if not fresh:
            return  # whatever it sends is refused, and then it loses the partition
        again = self.owners.of(Taking()) << 1
        if tenancy.batch is None:
            left = self._left(state, p)
            if left:
                dropped = self._dropped(state, p, place, tenancy, again)
                ending = self._ending(state, p)
                yield f"{name} ends what was left open", self._with(dropped, p, ending)
            # With results alone left open, an offset committed, and a transaction after it that
            # is aborted, they are lost: the known limit of docs/RELIABILITY.md.
            if transaction is not None and "o" not in left:
                return  # markers are still being written
            entries: tuple[Entry, ...] = value[state[base + RECORDS]]
            made, appended = self.act(owner, "begin", len(entries), key=len(entries))
            if appended is None:
                return
            results = [r for r in appended.records if r.topic == RESULTS]
            numbers = [self.outgoing.of((r.key, r.value)) for r in results]
            batch = self.owners.values[made]
            assert isinstance(batch, Tenancy)
            assert batch.batch is not None
            letters = tuple(_letters(batch))
            grown = (*entries, *(Entry(n, "open") for n in numbers))
            changes = {
                place: made << 1 | 1,
                RECORDS: number(grown),
                TRANSACTION: number(Transaction(appended.commit, letters, pending=bool(left))),
            }
            yield f"{name} begins", self._with(state, p, changes)
            return
        assert transaction is not None, "a current owner's transaction is gone"
        told = value[state[base + LETTERS]]
        decided = {
            TRANSACTION: number(transaction._replace(left="ro")),
            LETTERS: number(tuple(sorted([*told, *transaction.letters], key=str))),
        }
        made, _ = self.act(owner, "commit")
        committed = self._with(state, p, {**decided, place: made << 1 | 1})
        self.check(committed, p)
        yield f"{name} commits", committed
        if (spent := self._spent(state, "unsure")) is not None:
            dropped = self._dropped(state, p, place, tenancy, again)
            # The owner's place may have changed with its number.
            yield f"{name} commits, unheard", self._with(dropped, p, {**decided, **spent})
            yield f"{name} commits in vain", self._with(dropped, p, spent)

    # ---- what may never happen

    def check(self, state: State, p: int, at_end: bool = False) -> None:
        """Look at a partition whose next transaction is decided, or that is at its end."""
        base = p * WIDTH
        key = (
            p,
            at_end,
            *(state[base + n] for n in (LOG, RECORDS, LETTERS, COMMITTED, TRANSACTION)),
        )
        key = (*key, state[ROOT], state[DECIDED], state[CHANGE], state[BUDGET])
        if key in self._passed:
            return
        Verification(self, state, p).verify(at_end)
        self._passed.add(key)

    def done(self, state: State) -> bool:
        """Nothing is left to do; checks that nothing was lost on the way."""
        for p in range(len(self.world.logs)):
            base = p * WIDTH
            committed = self.parts.values[state[base + COMMITTED]]
            waiting = self.parts.values[state[base + TRANSACTION]] is not None
            if waiting or committed is None or committed[0] < len(self.log(state, p)[1]):
                return False
            if self.outdated(state, p) or (state[base + LOG] == 1 and self.world.changed):
                return False
        root = self.roots.values[state[ROOT]]
        if root.disk.temporary or root.named:
            return False
        for p in range(len(self.world.logs)):
            self.check(state, p, at_end=True)
        return True


def _ended(entries: Sequence[Entry], fate: str) -> Iterator[Entry]:
    return (entry._replace(fate=fate) if entry.fate == "open" else entry for entry in entries)


def _letters(tenancy: Tenancy) -> Iterator[tuple[RequestId | None, int]]:
    assert tenancy.batch is not None
    for event in tenancy.batch.events:
        if isinstance(event, DeadLetter):
            yield event.request, event.offset


@cache
def _outcome(key: bytes | None, value: bytes | None) -> Any:
    return decode_outcome(key, value)


class Verification:
    """What is visible of one partition, against what its log says."""

    def __init__(self, model: Model, state: State, p: int) -> None:
        self.model = model
        self.p = p
        value = model.parts.values
        here = state[p * WIDTH : (p + 1) * WIDTH]
        start, self.log = model.log(state, p)
        self.horizon = model.world.horizon
        self.root = model.roots.values[state[ROOT]]
        self.letters = value[here[LETTERS]]
        self.change: Change | None = value[state[CHANGE]] if here[LOG] else None
        self.by_hand = value[state[BUDGET]].resets < model.world.resets
        self.decided: frozenset[tuple[RequestKey, int]] = value[state[DECIDED]]
        transaction = value[here[TRANSACTION]]
        committed = value[here[COMMITTED]] if transaction is None else transaction.commit
        self.watermark = Bookmark.parse(*committed).watermark
        new = {"open"} if transaction is not None else set()
        since = self.change.results if self.change and model.world.changed is not None else 0
        outcomes = [
            _outcome(*model.outgoing.values[entry.record])
            for entry in value[here[RECORDS]][since:]
            if entry.record is not None and entry.fate in {"committed"} | new
        ]
        self.results: dict[Opening, Result] = {}
        self.told: Counter[Event] = Counter(
            ("letter", request, offset) for request, offset in self.letters
        )
        for outcome in outcomes:
            self._add(outcome)
        if start:
            # What was deleted is lost, but for the requests that had ended.
            known = {request for request, first in self.results if first < start}
            self.log = [
                c if n >= start or (c is not None and c.request in known) else None
                for n, c in enumerate(self.log)
            ]
        self.reading = self._read()

    def _add(self, outcome: Any) -> None:
        if not isinstance(outcome, Result):
            self.told["accepted", outcome.request, outcome.reply] += 1
        elif outcome.repeat:
            if (outcome.request, outcome.input.first) not in self.results:
                raise Violation(f"a repeat of {outcome.request} before its result")
            self.told["repeat", outcome.request, outcome.reply] += 1
        else:
            opening = outcome.request, outcome.input.first
            if opening in self.results:
                raise Violation(f"two results for the opening {opening}")
            for request, first in self.results:
                last = self.results[request, first].input.last
                if request == outcome.request and outcome.input.first <= last + self.horizon:
                    raise Violation(f"two results for {request} within the horizon")
            self.results[opening] = outcome

    def _read(self) -> Reading:
        decisions: dict[Opening, int] = {}
        again: set[int] = set()
        refused: set[Opening] = set()
        for (request, first), result in self.results.items():
            if (self._key(request, first), result.input.last) in self.decided:
                decisions[request, first] = result.input.last
            if any(r == request and f < first for r, f in self.results):
                again.add(first)
            if not result.success:
                refused.add((request, first))
        return read(self.log, self.horizon, decisions, again, refused)

    def _key(self, request: RequestId, first: int) -> RequestKey:
        return RequestKey(GROUP, TOPIC, self.p, request, first)

    def verify(self, at_end: bool) -> None:
        for opening, result in self.results.items():
            self._result(opening, result)
        for opening in self.reading.fates:
            if opening[1] < self.watermark and opening not in self.results:
                raise Violation(f"W {self.watermark} has passed {opening}, which has no result")
        self._events(at_end)

    def _result(self, opening: Opening, result: Result) -> None:
        key = self._key(*opening)
        self._target(key, result)
        fate = self.reading.fates.get(opening)
        if fate is None:
            raise Violation(f"a result for {opening}, which the log does not have")
        says = (result.status, result.error.code if result.error else None)
        if result.reply != fate.reply:
            raise Violation(f"{opening} waits for {fate.reply!r}, told is {result.reply!r}")
        if fate.decided:
            return
        if result.input.last != fate.last:
            raise Violation(f"{opening} ends at {fate.last}, told is {result.input.last}")
        taken = (fate.status, fate.code)
        if says != taken and not self._may_differ(key, fate, says):
            raise Violation(f"{opening} is {taken}, told is {says}")
        if (result.splits, result.duplicates) != (fate.splits, fate.duplicates):
            raise Violation(f"{opening} has {fate.splits}+{fate.duplicates} splits: {result}")
        if result.success and (result.size, result.sha256) != (fate.total, fate.digest):
            raise Violation(f"{opening} has other bytes than the log: {result}")

    def _may_differ(self, key: RequestKey, fate: Fate, says: tuple[Status, str | None]) -> bool:
        """What became of a request is decided once, by the target, whoever was first."""
        if fate.first.block is Block.MEM:
            return False
        refused = fate.status is Status.COMPLETED and says == (Status.FAILED, "VersionMismatch")
        return refused or any(decided == key for decided, _ in self.decided)

    def _target(self, key: RequestKey, result: Result) -> None:
        if result.block is Block.FILE:
            if not result.success and key in self.root.disk.published:
                raise Violation(f"{key} has {result.status}, and its file was published")
            if result.success and not self.root.settled(key, result.unique_id, result.version):
                raise Violation(f"{key} is announced, and its file is not durable")
        elif result.success and self.model.world.segments:
            assert result.target is not None
            held = self.root.segments.get(result.target["shm"])
            if held is None or hashlib.sha256(held).digest() != result.sha256:
                raise Violation(f"{key} is announced in a segment that does not hold it")

    def _events(self, at_end: bool) -> None:
        if self.by_hand or self.change is not None:
            return  # P was lost with the commit: what is told besides results is told again
        owners = {request for (request, _), fate in self.reading.fates.items() if fate.decided}
        expected = self.reading.events
        for event, times in self.told.items():
            # Before its owner ended it, another may have told what the log said of it.
            if times > max(expected[event], event[1] in owners):
                raise Violation(f"told {times} times instead of {expected[event]}: {event}")
        for event, times in expected.items() if at_end else ():
            kind, request, place = event
            record = self.log[place] if isinstance(place, int) else None
            invalid = kind == "letter" and isinstance(record, InvalidRecord)
            if (invalid or request not in owners) and self.told[event] != times:
                raise Violation(f"lost: {event}")


# ---- exploring


@dataclass
class Found:
    """What an exploration has seen."""

    states: int
    transitions: int
    depth: int
    seconds: float
    complete: bool
    """Whether there was nothing more to explore."""
    violation: str | None = None
    trace: Sequence[str] = ()


def explore(world: World, limit: int = UNBOUNDED, seconds: float = 1e9) -> Found:
    """Breadth first, so that a trace is a shortest one. Then look that all can still end well."""
    model = Model(world)
    began = time.monotonic()
    numbers: dict[State, int] = {model.first: 0}
    states: list[State] = [model.first]
    parents, names = array("q", [-1]), array("l", [0])
    labels: Numbers[str] = Numbers()
    labels.of("start")
    origins, goals = array("l"), array("l")
    finished: list[int] = []
    depth, next_level = 0, 1

    def trace(number: int) -> list[str]:
        steps = []
        while number > 0:
            steps.append(labels.values[names[number]])
            number = parents[number]
        return steps[::-1]

    def found(violation: str | None = None, at: int = 0, last: str = "") -> Found:
        elapsed = time.monotonic() - began
        complete = violation is None and current >= len(states)
        steps = [*trace(at), last] if violation else []
        return Found(len(states), len(origins), depth, elapsed, complete, violation, steps)

    current = 0
    label = ""
    while current < len(states):
        if current == next_level:
            depth, next_level = depth + 1, len(states)
        if len(states) >= limit or (current % 512 == 0 and time.monotonic() - began > seconds):
            return found()
        state = states[current]
        label = "?"
        try:
            if model.done(state):
                finished.append(current)
            for label, after in model.steps(state):
                number = numbers.get(after)
                if number is None:
                    number = numbers[after] = len(states)
                    states.append(after)
                    parents.append(current)
                    names.append(labels.of(label))
                origins.append(current)
                goals.append(number)
        except Exception as error:
            return found(f"{type(error).__name__}: {error}", current, f"after {label}")
        current += 1
    stuck = _stuck(len(states), origins, goals, finished)
    if stuck is not None:
        return found("no way leads to an end from here", stuck)
    return found()


def _stuck(
    count: int, origins: Sequence[int], goals: Sequence[int], ends: Sequence[int]
) -> int | None:
    """A state from which no end can be reached."""
    heads, following = array("l", [-1]) * count, array("l", [-1]) * len(goals)
    for edge, goal in enumerate(goals):
        following[edge] = heads[goal]
        heads[goal] = edge
    reached = bytearray(count)
    waiting = list(ends)
    for end in ends:
        reached[end] = 1
    while waiting:
        edge = heads[waiting.pop()]
        while edge != -1:
            origin = origins[edge]
            if not reached[origin]:
                reached[origin] = 1
                waiting.append(origin)
            edge = following[edge]
    number = reached.find(0)
    return None if number == -1 else number


def walks(world: World, seeds: Iterable[int], model: Model | None = None) -> Found:
    """Random ways through a world, each to its end or a bound. Complete: one came to its end."""
    model = model or Model(world)
    began = time.monotonic()
    seen: set[State] = set()
    transitions = depth = ended = 0

    def found(violation: str | None = None, trace: Sequence[str] = ()) -> Found:
        elapsed = time.monotonic() - began
        return Found(len(seen), transitions, depth, elapsed, ended > 0, violation, trace)

    for seed in seeds:
        choose = random.Random(seed)
        state, trace = model.first, [f"seed {seed}"]
        try:
            while len(trace) < LONGEST and not model.done(state):
                following = list(model.steps(state))
                if not following:
                    return found("no step leads on from here", trace)
                label, state = choose.choice(following)
                trace.append(label)
                seen.add(state)
                transitions += len(following)
            ended += len(trace) < LONGEST
        except Exception as error:
            return found(f"{type(error).__name__}: {error}", trace)
        depth = max(depth, len(trace))
    return found()


def main(names: Sequence[str]) -> int:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    violations = 0
    for world in [*SMALL, *WORLDS]:
        if names and not any(name in world.name for name in names):
            continue
        seen = explore(world, SMALLEST_STATES if world.name == "smallest" else STATES)
        violations += seen.violation is not None
        reach = "all of it" if seen.complete else "bounded"
        print(
            f"{world.name:30} {seen.states:9} states {seen.transitions:9} transitions "
            f"depth {seen.depth:3} {seen.seconds:6.1f} s  {reach:9} "
            f"violations={int(seen.violation is not None)}",
            flush=True,
        )
        if seen.violation is not None:
            print("   ", seen.violation)
            print("   ", " > ".join(seen.trace))
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
