from __future__ import annotations

import os.path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitferry_protocol.paths import path_problem


@pytest.mark.parametrize(
    "unique_id",
    [
        "a",
        "dir/a.bin",
        "...",
        "..a/b..",
        ".hidden/x",
        "with space/é/\u202e",
        "back\\slash",
        "~/x",
        "C:x",
        "line\nbreak",
        ".splitferry2/x",
        "a/.splitferry/x",
        "s" * 255 + "/" + "s" * 255,
    ],
)
def test_a_path_below_the_root_is_taken(unique_id: str) -> None:
    assert path_problem(unique_id) is None


@pytest.mark.parametrize(
    ("unique_id", "named"),
    [
        ("", "0 bytes"),
        ("a/" * 256 + "a", "513 bytes"),
        ("/etc/passwd", "not relative"),
        ("//a", "not relative"),
        ("a//b", "empty segment"),
        ("a/", "empty segment"),
        (".", "segment . or .."),
        ("..", "segment . or .."),
        ("a/./b", "segment . or .."),
        ("../a", "segment . or .."),
        ("a/..", "segment . or .."),
        ("a\0b", "NUL"),
        ("s" * 256, "255 bytes"),
        ("é" * 128, "255 bytes"),
        ("a\udcff", "UTF-8"),
        (".splitferry", "the consumer's own"),
        (".splitferry/catalog.db", "the consumer's own"),
        (".SplitFerry/incoming/x", "the consumer's own"),
    ],
)
def test_every_other_path_is_refused_with_a_sentence(unique_id: str, named: str) -> None:
    problem = path_problem(unique_id)
    assert problem is not None
    assert problem.startswith("the path ")
    assert named in problem


@settings(deadline=None)
@given(st.lists(st.sampled_from(["..", ".", "", "a", "b\\..", "\0", ".splitferry"])).map("/".join))
def test_what_is_taken_stays_below_the_root_and_is_already_normal(unique_id: str) -> None:
    if path_problem(unique_id) is None:
        assert os.path.normpath(os.path.join("/root", unique_id)) == "/root/" + unique_id
        assert not unique_id.startswith(".splitferry")
