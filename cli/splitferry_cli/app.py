"""The command tree: `splitferry` and its subcommands."""

from __future__ import annotations

from importlib.metadata import version

import click

from .abort import abort
from .broker import command as broker
from .command import Root
from .consume import consume
from .demo import demo
from .result import result
from .send import send
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
click.version_option(version("splitferry"), prog_name="splitferry")(splitferry)
for _command in (consume, send, result, abort, topics, broker, demo):
    splitferry.add_command(_command)
