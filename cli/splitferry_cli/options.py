"""How an option gets its value: command line, environment, file, default, in this order.

Every option of every command is built here, so its environment variable and its key in the
TOML file follow from its name and nothing else.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

ENVIRONMENT_PREFIX = "SPLITFERRY_"

Decorated = TypeVar("Decorated", bound=Callable[..., Any])


class Option(click.Option):
    """An option with the environment variable its name calls for.

    Given on the command line before the subcommand, it counts as given on the command line
    of the subcommand.
    """

    def __init__(self, declarations: Sequence[str], **attributes: Any) -> None:
        super().__init__(declarations, **{"show_envvar": True, "show_default": True, **attributes})
        self.envvar = self.variable

    @property
    def variable(self) -> str:
        """The environment variable."""
        return ENVIRONMENT_PREFIX + self.key.upper()

    @property
    def key(self) -> str:
        """The option's name as the environment and the TOML file have it: `splits_topic`."""
        return max(self.opts, key=len).lstrip("-").replace("-", "_")

    def consume_value(
        self, ctx: click.Context, opts: Mapping[str, click.Parameter]
    ) -> tuple[Any, click.core.ParameterSource]:
        value, source = super().consume_value(ctx, opts)
        given = click.core.ParameterSource.COMMANDLINE
        above = ctx.parent
        while source is not given and above is not None and self.name is not None:
            if above.get_parameter_source(self.name) is given:
                return above.params[self.name], given
            above = above.parent
        return value, source


def option(*declarations: str, **attributes: Any) -> Callable[[Decorated], Decorated]:
    """As `click.option`, with the environment variable that the name calls for."""
    return click.option(*declarations, cls=Option, **attributes)


def options_of(command: click.Command) -> dict[str, Option]:
    """The options of `command` and of all its subcommands, by key."""
    found = {param.key: param for param in command.params if isinstance(param, Option)}
    if isinstance(command, click.Group):
        for sub in command.commands.values():
            found |= options_of(sub)
    found.pop("config", None)
    return found


def read_config(path: Path) -> dict[str, Any]:
    """Read a TOML file. Raises click.UsageError, one line, when that cannot be done."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise click.UsageError(
            f"cannot read the file of --config, {path}: {error.strerror}"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise click.UsageError(f"the file of --config, {path}, is not TOML: {error}") from error


def defaults_from(
    config: Mapping[str, Any], command: click.Command, path: Sequence[str], where: str = ""
) -> dict[str, Any]:
    """What `config` says about the options of the command that `path` names below `command`.

    A key counts for every command below its table; the nearest table wins. Everything in
    the file is checked, not only what this command uses.

    Returns:
        Values by parameter name, as they would stand on the command line.

    Raises:
        click.UsageError: a key that is no option, or a value that no option can have.
    """
    options = options_of(command)
    subcommands = {
        name.replace("-", "_"): sub
        for name, sub in (command.commands if isinstance(command, click.Group) else {}).items()
    }
    here = path[0].replace("-", "_") if path else None
    own: dict[str, Any] = {}
    nearer: dict[str, Any] = {}
    for name, value in config.items():
        key = name.replace("-", "_")
        if key in subcommands:
            if not isinstance(value, dict):
                raise click.UsageError(f"the file of --config: '{where}{name}' is a table")
            deeper = path[1:] if key == here else []
            found = defaults_from(value, subcommands[key], deeper, f"{where}{name}.")
            if key == here:
                nearer = found
        elif key in options:
            own[str(options[key].name)] = _as_text(options[key], f"{where}{name}", value)
        else:
            nearest = _nearest(key, [*options, *subcommands])
            raise click.UsageError(
                f"the file of --config has an unknown key '{where}{name}'; "
                f"the nearest valid one is '{where}{nearest}'"
            )
    return own | nearer


def _as_text(wanted: Option, name: str, value: Any) -> Any:
    """The value in the form that the command line would give it."""
    if wanted.is_flag:
        if isinstance(value, bool):
            return value
        raise click.UsageError(f"the file of --config: '{name}' is true or false, not {value!r}")
    if wanted.multiple and isinstance(value, list):
        return [str(part) for part in value]
    if isinstance(value, (bool, list, dict)):
        raise click.UsageError(f"the file of --config: '{name}' cannot be {value!r}")
    return [str(value)] if wanted.multiple else str(value)


def _nearest(key: str, valid: Iterable[str]) -> str:
    return difflib.get_close_matches(key, valid, n=1, cutoff=0.0)[0].replace("_", "-")
