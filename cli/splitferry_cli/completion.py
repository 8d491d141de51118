"""`splitferry completion`: what a shell has to run to complete the command line."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from .command import Command


@click.command(
    "completion",
    cls=Command,
    examples="""
    splitferry completion bash >> ~/.bashrc
    splitferry completion zsh >> ~/.zshrc
    splitferry completion fish > ~/.config/fish/completions/splitferry.fish
    """,
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the completion of commands, options and paths for SHELL.

    It counts in shells that are started afterwards, and asks the installed command: there is
    nothing to renew after an upgrade.
    """
    made = get_completion_class(shell)
    assert made is not None
    root = ctx.find_root()
    click.echo(made(root.command, {}, "splitferry", "_SPLITFERRY_COMPLETE").source())
