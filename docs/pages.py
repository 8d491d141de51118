"""What of the documentation is made from the code: the pages of the site, and the example file.

`python docs/pages.py` writes `splitferry.example.toml` beside it; `mkdocs` takes the rest from
here as a hook (see `mkdocs.yml`), so that the reference of the command and of the library cannot
differ from them.
"""

from __future__ import annotations

import ast
import inspect
import posixpath
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from splitferry_cli.app import splitferry
from splitferry_cli.command import COMMON, Command, Group
from splitferry_cli.options import Option

HERE = Path(__file__).parent
REPOSITORY = HERE.parent
EXAMPLE = HERE / "splitferry.example.toml"

API = {
    "producer": ("splitferry_producer", "Sending, and reading results"),
    "consumer": ("splitferry_consumer", "Receiving"),
    "protocol": ("splitferry_protocol", "The contract: ids, records, their bytes, errors"),
}

ROOT_PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
}


def commands(
    command: click.Command = splitferry, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Command | Group]]:
    """Every command with its words, the groups before what is in them."""
    assert isinstance(command, Command | Group)
    yield path, command
    if isinstance(command, Group):
        for name, below in command.commands.items():
            yield from commands(below, (*path, name))


def own_options(command: click.Command) -> list[Option]:
    """Those that not every command has."""
    return [p for p in command.params if isinstance(p, Option) and p not in COMMON]


# ---- the example file


def example_config() -> str:
    """Every option with its default, commented out: what a `--config` file may say."""
    parts = [
        "# Every option that a --config file may set, with its default.\n"
        "# Take the # away from a line to change it. The command line wins over the environment,\n"
        "# which wins over this file. An option above the first table counts for every command\n"
        "# that has it; one in a table for that command. Where a word in capitals stands for the\n"
        "# value, the option has no default.\n",
        *(_toml(option) for option in COMMON if option.key != "config"),
    ]
    for path, command in commands():
        if options := own_options(command):
            table = ".".join(path)
            parts += [f"\n[{table}]  # splitferry {' '.join(path)}\n", *map(_toml, options)]
    return "\n".join(parts)


def _toml(option: Option) -> str:
    return f"# {option.help}\n#{option.key.replace('_', '-')} = {_literal(option)}\n"


def _default(option: Option) -> Any:
    """As the option has it before it is converted; None where it has none, or where it is a path
    that depends on who runs the command."""
    default = option.to_info_dict()["default"]
    return None if isinstance(default, Path) else default


def _literal(option: Option) -> str:
    default = _default(option)
    if option.multiple:
        return f'["{_placeholder(option)}"]'
    if option.is_flag:
        return str(bool(default)).lower()
    if isinstance(default, int | float):
        return str(default)
    return f'"{_placeholder(option) if default is None else default}"'


def _placeholder(option: Option) -> str:
    return option.make_metavar(click.Context(splitferry)).strip("<>[]")


# ---- the pages of the site


def commands_page() -> str:
    parts = [
        "# The command line",
        "Made from the commands themselves. Every option has its environment variable, and may "
        "stand in a TOML file that `--config` names (["
        f"{EXAMPLE.name}]({EXAMPLE.name}) has them all); the command line wins over the "
        "environment, the environment over the file. Exit codes: 0 done, 1 something failed "
        "(and it says what), 2 wrong usage, 130 interrupted.",
    ]
    for path, command in commands():
        with click.Context(command, info_name=" ".join(("splitferry", *path))) as ctx:
            usage = " ".join(command.collect_usage_pieces(ctx))
        parts += [
            f"## {' '.join(('splitferry', *path))}",
            inspect.cleandoc(command.help or ""),
            f"```\n{' '.join(('splitferry', *path))} {usage}\n```",
            "```console\n"
            + "".join(
                f"$ {line}\n" for line in textwrap.dedent(command.examples).strip().splitlines()
            )
            + "```",
        ]
        if options := own_options(command):
            parts.append(_table(options))
    parts += ["## Common options", "Of every command.", _table(COMMON)]
    return "\n\n".join(parts) + "\n"


def _table(options: Any) -> str:
    rows = ["| option | variable | default | |", "|---|---|---|---|"]
    for option in options:
        names = " / ".join([*option.opts, *option.secondary_opts])
        taken = "" if option.is_flag else f" {option.make_metavar(click.Context(splitferry))}"
        default = _default(option)
        literal = _literal(option).strip('"')
        shown = "" if default is None or option.multiple else f"`{literal}`"
        cells = [f"`{names}{taken}`", f"`{option.variable}`", shown, option.help or ""]
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows)


def examples_page() -> str:
    parts = ["# Examples", "Each runs as it is, and is run by a test."]
    for path in sorted((REPOSITORY / "examples").glob("*.py")):
        text = path.read_text()
        about = ast.get_docstring(ast.parse(text)) or ""
        title, _, rest = about.partition("\n")
        code = text.split('"""\n', 1)[1].strip()
        parts += [f"## {path.name}", title, _with_console(rest), f"```python\n{code}\n```"]
    return "\n\n".join(part for part in parts if part) + "\n"


def _with_console(text: str) -> str:
    """Lines that begin with `$` as a block of commands."""
    return re.sub(r"(?:^\$ .*\n?)+", r"```console\n\g<0>\n```\n", text, flags=re.MULTILINE)


def api_page(package: str, title: str) -> str:
    page = f"# {title}\n\n::: {package}\n"
    if package == "splitferry_protocol":  # both sides export it, it is told where it stands
        page += "\n## ConnectionSettings\n\n::: splitferry_protocol.connection.ConnectionSettings\n"
    return page


def root_page(name: str) -> str:
    """A page that stands at the root of the repository, where its links begin."""
    text = (REPOSITORY / name).read_text()
    text = re.sub(r"\]\((?!\w+:|#)", "](../", text).replace("](../docs/", "](")
    for other, made in ROOT_PAGES.items():
        text = text.replace(f"](../{other}", f"]({made}")
    return re.sub(r"\]\(\.\./examples[^)]*\)", "](examples.md)", text)


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """A hook of mkdocs: what is only in the repository has no page to link to."""

    def unlinked(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(page.file.src_uri), link[2]))
        return link[1] if target.startswith("../") else link[0]

    return re.sub(r"\[([^\]]+)\]\(([^):]+)\)", unlinked, markdown)


def on_files(files: Any, config: Any) -> Any:
    """A hook of mkdocs: adds the pages that are made."""
    from mkdocs.structure.files import File  # noqa: PLC0415  only where the site is built

    made = {
        **{made: root_page(name) for name, made in ROOT_PAGES.items()},
        "commands.md": commands_page(),
        "examples.md": examples_page(),
        **{f"api/{name}.md": api_page(*about) for name, about in API.items()},
    }
    for name, content in made.items():
        files.append(File.generated(config, name, content=content))
    return files


if __name__ == "__main__":
    EXAMPLE.write_text(example_config(), encoding="utf-8")
