"""Where an option's value comes from, and what is wrong with a configuration file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from splitferry_cli.command import Command, Common, Root
from splitferry_cli.options import Option, defaults_from, option


@pytest.fixture
def tree() -> tuple[Root, dict[str, Any]]:
    """A root with one command and a nested one, and what the last run was given."""
    seen: dict[str, Any] = {}
    root = Root("splitferry", examples="splitferry")

    @root.command("move", cls=Command, examples="splitferry move")
    @option("--split-size", type=int, default=1)
    @option("--loud/--no-loud")
    @option("--label", "labels", multiple=True)
    @click.pass_obj
    def move(common: Common, /, **given: Any) -> None:
        seen.update(given, common=common)

    inner = click.Group("inner")
    root.add_command(inner)

    @inner.command("deep", cls=Command, examples="splitferry inner deep")
    @option("--split-size", type=int, default=1)
    @click.pass_obj
    def deep(common: Common, /, **given: Any) -> None:
        seen.update(given, common=common)

    return root, seen


def run(
    tree: tuple[Root, dict[str, Any]], *args: str, env: Mapping[str, str] | None = None
) -> tuple[int, str, dict[str, Any]]:
    outcome = CliRunner().invoke(tree[0], args, env=env, prog_name="splitferry")
    return outcome.exit_code, outcome.stderr, tree[1]


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "splitferry.toml"
    path.write_text(text)
    return str(path)


def test_command_line_beats_environment_beats_file_beats_default(tree: Any, tmp_path: Path) -> None:
    config = write(tmp_path, "split-size = 20\n")
    env = {"SPLITFERRY_SPLIT_SIZE": "30"}
    assert run(tree, "move")[2]["split_size"] == 1
    assert run(tree, "move", "--config", config)[2]["split_size"] == 20
    assert run(tree, "move", "--config", config, env=env)[2]["split_size"] == 30
    args = ("move", "--config", config, "--split-size", "40")
    assert run(tree, *args, env=env)[2]["split_size"] == 40


def test_the_file_may_be_named_in_the_environment(tree: Any, tmp_path: Path) -> None:
    env = {"SPLITFERRY_CONFIG": write(tmp_path, "split_size = 20\n")}
    assert run(tree, "move", env=env)[2]["split_size"] == 20


def test_a_command_table_overrides_what_is_said_for_all(tree: Any, tmp_path: Path) -> None:
    config = write(
        tmp_path,
        'split-size = 2\nlabel = ["a=1", "b=2"]\n[move]\nsplit_size = 3\nloud = true\n'
        "[inner]\nsplit-size = 4\n[inner.deep]\nsplit-size = 5\n",
    )
    code, _, seen = run(tree, "--config", config, "move")
    assert (code, seen["split_size"], seen["loud"]) == (0, 3, True)
    assert seen["labels"] == ("a=1", "b=2")
    assert run(tree, "--config", config, "inner", "deep")[2]["split_size"] == 5


def test_common_options_count_before_the_subcommand_as_after_it(tree: Any) -> None:
    env = {"SPLITFERRY_SPLITS_TOPIC": "from.environment"}
    for args in (("--splits-topic", "here", "move"), ("move", "--splits-topic", "here")):
        code, _, seen = run(tree, *args, env=env)
        assert (code, seen["common"].names.splits) == (0, "here")
    assert run(tree, "move", env=env)[2]["common"].names.splits == "from.environment"
    later = ("--splits-topic", "here", "move", "--splits-topic", "there")
    assert run(tree, *later)[2]["common"].names.splits == "there"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("splitsize = 1", "unknown key 'splitsize'; the nearest valid one is 'split-size'"),
        ("[move]\nlowd = true", "unknown key 'move.lowd'; the nearest valid one is 'move.loud'"),
        ("[mov]\nloud = true", "unknown key 'mov'; the nearest valid one is 'move'"),
        ("[inner.deep]\nloud = true", "unknown key 'inner.deep.loud'"),
        ("config = 'x'", "unknown key 'config'"),
        ("move = 1", "'move' is a table"),
        ("loud = 1", "'loud' is true or false, not 1"),
        ("split-size = true", "'split-size' cannot be True"),
        ("split-size = [1]", "'split-size' cannot be [1]"),
        ("split-size = 1.5", "'1.5' is not a valid integer"),
        ("split-size = ", "is not TOML"),
    ],
)
def test_a_bad_file_is_wrong_usage_and_says_where(
    tree: Any, tmp_path: Path, text: str, said: str
) -> None:
    code, stderr, seen = run(tree, "move", "--config", write(tmp_path, text))
    assert code == 2
    assert said in stderr
    assert len(stderr.splitlines()) == 1
    assert not seen


def test_the_whole_file_is_checked_whatever_the_command(tree: Any, tmp_path: Path) -> None:
    config = write(tmp_path, "[inner.deep]\nsplit-sise = 1\n")
    code, stderr, _ = run(tree, "move", "--config", config)
    assert code == 2
    assert "inner.deep.split-sise" in stderr


def test_a_file_that_is_not_there(tree: Any) -> None:
    code, stderr, _ = run(tree, "move", "--config", "/nowhere.toml")
    assert code == 2
    assert "/nowhere.toml" in stderr


def test_defaults_are_pure_of_the_tree(tree: Any) -> None:
    assert defaults_from({"split-size": 7, "inner": {}}, tree[0], ["inner", "deep"]) == {
        "split_size": "7"
    }


def test_the_environment_follows_from_the_name() -> None:
    built = Option(["--no-wait/--wait", "no_wait"])
    assert (built.key, built.envvar) == ("no_wait", "SPLITFERRY_NO_WAIT")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--bootstrap-servers", "here"], "'here' is not HOST:PORT"),
        (["--bootstrap-servers", "a:1,b:99999"], "'b:99999' is not HOST:PORT"),
        (["--splits-topic", "a b"], "'a b' is not a topic name"),
        (["--splits-topic", "x", "--results-topic", "x"], "need different names"),
        (["--sasl-password-file", "/nowhere"], "/nowhere"),
        (["--ssl-cafile", "/nowhere"], "/nowhere"),
        (["--security-protocol", "SASL_SSL", "--sasl-username", "me"], "--sasl-password-file"),
        (["--sasl-username", "me"], "--security-protocol"),
        (["--ssl-keyfile", __file__, "--security-protocol", "SSL"], "--ssl-certfile"),
        (["--ssl-cafile", __file__, "--security-protocol", "SSL"], "--ssl-cafile"),
        (["--splitsize", "1"], "Did you mean"),
        (["--split-size", "x"], "'x' is not a valid integer"),
    ],
)
def test_wrong_usage_is_one_line_that_names_the_remedy(
    tree: Any, args: list[str], said: str
) -> None:
    code, stderr, seen = run(tree, "move", *args)
    assert code == 2
    assert said in stderr
    assert len(stderr.splitlines()) == 1
    assert "splitferry move --help" in stderr
    assert not seen


def test_a_password_comes_from_its_file(tree: Any, tmp_path: Path) -> None:
    secret = tmp_path / "password"
    secret.write_text("open sesame\n")
    _, _, seen = run(
        tree,
        *("move", "--security-protocol", "sasl_plaintext", "--sasl-mechanism", "scram-sha-512"),
        *("--sasl-username", "me", "--sasl-password-file", str(secret)),
    )
    connection = seen["common"].connection
    assert connection.sasl_password == "open sesame"
    assert connection.sasl_mechanism == "SCRAM-SHA-512"
    assert "sesame" not in repr(seen["common"])
