"""What all commands have in common: options, examples, logs, messages, exit codes."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
import textwrap
import traceback
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import click

from splitferry_protocol.connection import SASL_MECHANISMS, SECURITY_PROTOCOLS, ConnectionSettings

from . import logs
from .failures import Failure, first, told, usage
from .options import Option, defaults_from, read_config
from .output import Output
from .topic_rules import Names

T = TypeVar("T")

INTERRUPTED = 130


@dataclass(frozen=True, slots=True)
class Common:
    """What every command is given: where Kafka is, the topics, and how to speak."""

    connection: ConnectionSettings
    names: Names
    output: Output
    environment: Mapping[str, str]
    """The options of the connection, as a child process takes them."""
    verbose: bool


def _apply_config(ctx: click.Context, _: click.Parameter, value: Path | None) -> Path | None:
    """Take defaults from the file, on behalf of the command at the end of the line."""
    if value is not None and not isinstance(ctx.command, click.Group):
        path = ctx.command_path.split()[1:]
        ctx.default_map = defaults_from(read_config(value), ctx.find_root().command, path)
    return value


def _topic(ctx: click.Context, param: click.Parameter, value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,249}", value) or value in {".", ".."}:
        raise click.BadParameter(
            f"{value!r} is not a topic name: 1 to 249 letters, digits, '.', '_' or '-'", ctx, param
        )
    return value


def _servers(ctx: click.Context, param: click.Parameter, value: str) -> str:
    for server in value.split(","):
        match = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[^:\s]+):([0-9]{1,5})", server.strip())
        if match is None or not 0 < int(match[2]) < 65536:
            raise click.BadParameter(
                f"{server!r} is not HOST:PORT, as in 127.0.0.1:9092", ctx, param
            )
    return value


_FILE = click.Path(exists=True, dir_okay=False, readable=True, path_type=Path)

COMMON: Sequence[Option] = (
    Option(
        ["--bootstrap-servers"],
        default="127.0.0.1:9092",
        callback=_servers,
        metavar="HOST:PORT,…",
        help="Kafka brokers to begin with.",
    ),
    *(
        Option(
            [f"--{name}-topic"],
            default=f"splitferry.{name}",
            callback=_topic,
            metavar="TOPIC",
            help=f"Topic of the {name.replace('-', ' ')}.",
        )
        for name in ("splits", "results", "dead-letters")
    ),
    Option(
        ["--security-protocol"],
        type=click.Choice(SECURITY_PROTOCOLS, case_sensitive=False),
        default="PLAINTEXT",
        help="Whether to encrypt, and whether to log in.",
    ),
    Option(
        ["--sasl-mechanism"],
        type=click.Choice(SASL_MECHANISMS, case_sensitive=False),
        default="PLAIN",
        help="How to log in.",
    ),
    Option(["--sasl-username"], metavar="NAME", help="User to log in as."),
    Option(["--sasl-password-file"], type=_FILE, help="File that holds the password."),
    Option(["--ssl-cafile"], type=_FILE, help="Certificates to trust (PEM); else the system's."),
    Option(["--ssl-certfile"], type=_FILE, help="Own certificate (PEM)."),
    Option(["--ssl-keyfile"], type=_FILE, help="Key of the own certificate (PEM)."),
    Option(
        ["--config"],
        type=_FILE,
        is_eager=True,
        callback=_apply_config,
        help="TOML file with option values.",
    ),
    Option(["--json/--no-json", "as_json"], help="One JSON object per line, for programs."),
    Option(["--verbose/--no-verbose", "-v"], help="Debug messages, and tracebacks of errors."),
)


def _connection(given: dict[str, Any], ctx: click.Context) -> ConnectionSettings:
    """Take what belongs to the connection out of `given`. Raises click.UsageError."""
    password_file: Path | None = given.pop("sasl_password_file")
    try:
        password = (
            None if password_file is None else password_file.read_text("utf-8").rstrip("\r\n")
        )
    except (OSError, UnicodeDecodeError) as error:
        raise click.UsageError(f"cannot read --sasl-password-file: {error}", ctx) from error
    names = [field.name for field in fields(ConnectionSettings) if field.name != "sasl_password"]
    values = {name: given.pop(name) for name in names}
    try:
        connection = ConnectionSettings(
            **{name: value and str(value) for name, value in values.items()},
            sasl_password=password,
        )
        connection.client_options()  # reads the certificates: better now than in the middle
    except ValueError as error:
        said = str(error).replace("sasl_password", "sasl_password_file")
        for name in (*names, "sasl_password_file"):
            said = re.sub(rf"\b{name}\b", f"--{name.replace('_', '-')}", said)
        raise click.UsageError(said, ctx) from error
    except OSError as error:
        raise click.UsageError(
            f"a file of --ssl-cafile, --ssl-certfile, --ssl-keyfile is not a fitting PEM: {error}",
            ctx,
        ) from error
    return connection


def _examples(formatter: click.HelpFormatter, examples: str) -> None:
    with formatter.section("Examples"):
        for line in textwrap.dedent(examples).strip().splitlines():
            formatter.write(f"{'':>{formatter.current_indent}}{line}\n")


class Command(click.Command):
    """A command with the common options, which its callback gets as one `Common` object.

    Args:
        examples: command lines for `--help`.
        service: runs until it is stopped, and so logs what Kafka's client warns of.
    """

    def __init__(self, *args: Any, examples: str, service: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.examples = examples
        self.service = service
        self.params += COMMON

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, common in (("Options", False), ("Common options", True)):
            shown = [
                param
                for param in self.get_params(ctx)
                if isinstance(param, click.Option) and (param in COMMON) is common
            ]
            rows = [row for param in shown if (row := param.get_help_record(ctx)) is not None]
            with formatter.section(title):
                formatter.write_dl(rows)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        _examples(formatter, self.examples)

    def invoke(self, ctx: click.Context) -> Any:
        given = {param.name: ctx.params.pop(str(param.name)) for param in COMMON}
        del given["config"]
        verbose = given.pop("verbose")
        logs.configure(verbose=verbose, service=self.service)
        names = Names(*(given.pop(f"{topic}_topic") for topic in Names.__slots__))
        if len(set(astuple(names))) < 3:
            raise click.UsageError(
                "--splits-topic, --results-topic and --dead-letters-topic need different names", ctx
            )
        output = Output(as_json=given.pop("as_json"))
        environment = {
            param.variable: str(given[param.name])
            for param in COMMON
            if given.get(param.name) is not None
        }
        connection = _connection(given, ctx)
        ctx.obj = Common(connection, names, output, environment, verbose)
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            error.ctx = error.ctx or ctx
            raise
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception as caught:
            cause = first(caught)
            if isinstance(cause, BrokenPipeError):
                # Who read our output has left. Nothing may be flushed to it at exit.
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                raise click.exceptions.Exit(1) from None
            if verbose:
                traceback.print_exc()
            raise Failure(told(cause, connection.bootstrap_servers)) from caught


class Group(click.Group):
    """A command with subcommands; the common options given to it count for all of them."""

    def __init__(self, *args: Any, examples: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.examples = examples
        self.params += COMMON

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        _examples(formatter, self.examples)


class Root(Group):
    """The whole: one line on standard error for what fails, and the exit code (CLI)."""

    def main(  # type: ignore[override]  # never returns, whatever the mode
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        **extra: Any,
    ) -> NoReturn:
        extra["standalone_mode"] = False
        try:
            code = super().main(args, prog_name, complete_var, **extra)
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            code = error.exit_code
        except click.UsageError as error:
            click.echo(f"Error: {usage(error)}", err=True)
            code = error.exit_code
        except click.ClickException as error:
            click.echo(f"Error: {error.format_message()}", err=True)
            code = error.exit_code
        except (click.Abort, KeyboardInterrupt):
            click.echo("Interrupted.", err=True)
            code = INTERRUPTED
        sys.exit(code if isinstance(code, int) else 0)


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run `work` on an event loop; SIGINT and SIGTERM cancel it, and it may clean up.

    Raises:
        KeyboardInterrupt: it was interrupted.
    """

    async def main() -> T:
        task = asyncio.current_task()
        assert task is not None
        interrupted = False

        def interrupt() -> None:
            nonlocal interrupted
            if task.done():  # what is left is a thread that hangs, and the loop waits for it
                os._exit(INTERRUPTED)
            interrupted = True
            task.cancel()

        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, interrupt)
        try:
            return await work
        except asyncio.CancelledError:
            if interrupted:
                raise KeyboardInterrupt from None
            raise

    return asyncio.run(main())
