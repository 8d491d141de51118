"""The command tree: `splitferry` and its subcommands."""

from __future__ import annotations

import click

from .abort import abort
from .broker import command as broker
from .command import Root
from .completion import completion
from .consume import consume
from .dead_letters import dead_letters
from .demo import demo
from .replay import replay
from .result import result
from .send import send
from .status import status
from .topics import topics

splitferry = Root(
    "splitferry",
    help="Move large items through Kafka in splits, with exactly one result for each.",
    examples="""
    splitferry demo
    splitferry --bootstrap-servers kafka:9092 topics create
    splitferry consume --root /srv/received
    splitferry send big.iso photos/
    """,
)
click.version_option(package_name="splitferry", prog_name="splitferry")(splitferry)
for _command in (
    *(consume, send, status, result, abort, replay),
    *(dead_letters, topics, broker, demo, completion),
):
    splitferry.add_command(_command)
