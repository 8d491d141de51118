"""The list of guards fits the program as it is; `make guards` takes each out and sees red."""

from __future__ import annotations

import ast

import pytest

from guards.run import ROOT, Guard, guards


@pytest.mark.parametrize("guard", list(guards()), ids=lambda guard: guard.fault)
def test_a_guard_can_be_taken_out(guard: Guard) -> None:
    changed = guard.without((ROOT / guard.file).read_text())
    if guard.file.endswith(".py"):
        ast.parse(changed)
    file, _, name = guard.test.partition("::")
    assert f"def {name.partition('[')[0]}(" in (ROOT / file).read_text(), guard.test
